"""Which module may know which: an import only ever points to the left in ``ORDER``."""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = (
    {"tokens", "schedule", "metrics"},
    {"files", "environment", "validation"},
    {"token_orders"},
    {"layout", "mask"},
    {"attention.kernels"},
    {"attention"},
    {"pipelines"},
    {"plans"},
    {"defaults"},
    {"search"},
    {"report"},
    {"api", "functional"},
    {"attach"},
    {""},  # fastdit/__init__.py
    {"demo"},
    {"generation"},
    {"bench"},
    {"cli"},
    {"benches", "tools"},
    {"__main__"},
)
MAY_IMPORT = {  # packages that only some parts of fastdit know
    "diffusers": ("", "api", "bench", "demo", "generation", "pipelines"),
    "accelerate": ("", "api", "demo", "generation", "pipelines"),
    "transformers": ("demo", "generation", "pipelines"),
    "typer": ("cli",),
    "rich": ("cli", "report"),
    "imageio": ("bench", "demo", "generation"),
}
OUTSIDE = ("benches", "tools")  # not installed with the package
OPTIONAL = {"matplotlib", "peft", "skimage", "lpips", "xformers", "flash_attn", "pandas", "jinja2"}


class Import(NamedTuple):
    file: Path
    line: int
    source: str
    target: str
    at_import: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.target}"


def python_files() -> list[Path]:
    return sorted([*ROOT.glob("fastdit/**/*.py"), *ROOT.glob("benches/**/*.py"), *ROOT.glob("tools/**/*.py")])


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(file: Path) -> Iterator[Import]:
    """Yield every import of a file; names imported from a package count as modules where they are modules."""
    source = module_name(file)
    package = source if file.name == "__init__.py" else source.rpartition(".")[0]

    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(file, child.lineno, source, alias.name, at_import)
            elif isinstance(child, ast.ImportFrom):
                base = ".".join(package.split(".")[: len(package.split(".")) + 1 - child.level]) if child.level else ""
                target = ".".join(filter(None, (base, child.module)))
                for alias in child.names:
                    inner = f"{target}.{alias.name}"
                    yield Import(file, child.lineno, source, inner if is_module(inner) else target, at_import)
            else:
                inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or is_type_checking(
                    child
                )
                yield from visit(child, at_import and not inside)

    yield from visit(ast.parse(file.read_text()), True)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def part(module: str) -> str | None:
    """Name the part of fastdit that a module belongs to; ``None`` for a foreign one."""
    if module.split(".")[0] in OUTSIDE:
        return module.split(".")[0]
    if module.split(".")[0] != "fastdit":
        return None
    inner = module.removeprefix("fastdit").removeprefix(".")
    return "attention.kernels" if f"{inner}.".startswith("attention.kernels.") else inner.split(".")[0]


def rank(name: str) -> int:
    ranks = [i for i, names in enumerate(ORDER) if name in names]
    assert ranks, f"fastdit/{name} is not in ORDER: say where it belongs"
    return ranks[0]


ALL = [found for file in python_files() for found in imports(file)]


def test_arrows_point_left():
    inside = [(i, part(i.source), part(i.target)) for i in ALL if part(i.target) is not None]
    assert len(inside) > 20
    wrong = [str(i) for i, source, target in inside if source != target and rank(source) <= rank(target)]
    assert not wrong, "\n".join(wrong)


def test_there_is_no_circle():
    """Also not by imports for type checkers alone, nor by those within functions."""
    files = {module_name(file): file for file in python_files()}
    reached: dict[str, set[str]] = {name: set() for name in files}
    for each in ALL:
        # a package stands for no module of its own: its modules are imported through it
        if each.target in files and each.target != each.source and files[each.target].name != "__init__.py":
            reached[each.source].add(each.target)
    changed = True
    while changed:
        changed = False
        for name, known in reached.items():
            more = known.union(*(reached[other] for other in known))
            changed |= len(more) > len(known)
            reached[name] = more
    circles = {name: sorted(o for o in known if name in reached[o]) for name, known in reached.items() if name in known}
    assert not circles


def test_no_folder_is_full():
    counts = Counter(file.parent.relative_to(ROOT).as_posix() for file in python_files() if file.stem != "__init__")
    assert {folder: count for folder, count in counts.items() if count > 15} == {}


def test_methods_do_not_import_each_other():
    tree = ast.parse((ROOT / "fastdit/attention/methods/__init__.py").read_text())
    names = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "METHODS"
    )

    def method(module: str) -> str | None:
        inner = module.removeprefix("fastdit.attention.methods.")
        return inner.split(".")[0] if inner != module else None

    pairs = [(i, method(i.source), method(i.target)) for i in ALL]
    assert {source for _, source, _ in pairs if source} == set(names)
    wrong = [str(i) for i, source, target in pairs if source and target and source != target]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_only_some_parts_import(package):
    users = [i for i in ALL if i.target.split(".")[0] == package and part(i.source) not in OUTSIDE]
    wrong = [str(i) for i in users if part(i.source) not in MAY_IMPORT[package]]
    assert not wrong, "\n".join(wrong)


def test_triton_stays_in_its_files():
    files = {i.file.relative_to(ROOT).as_posix() for i in ALL if i.target.split(".")[0] == "triton"}
    wrong = [f for f in files if not f.startswith(("fastdit/attention/kernels/triton/", "benches/"))]
    assert not wrong


def test_triton_files_are_imported_when_first_used():
    wrong = [
        str(i)
        for i in ALL
        if i.at_import
        and i.target.startswith("fastdit.attention.kernels.triton.")
        and not i.source.startswith("fastdit.attention.kernels.triton")
        and not i.source.startswith("benches.")
    ]
    assert not wrong, "\n".join(wrong)


def test_optional_packages_are_imported_when_used():
    wrong = [str(i) for i in ALL if i.at_import and i.target.split(".")[0] in OPTIONAL]
    assert not wrong, "\n".join(wrong)


def loaded_after(code: str, names: set[str]) -> set[str]:
    """Run code in a process of its own, and say which of the named packages it loaded."""
    script = f"import sys\n{code}\nprint(*({names!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_import_is_light():
    assert loaded_after("import fastdit", {"triton", "diffusers", "transformers", "matplotlib", "pydantic"}) == set()


def test_public_names_exist_and_stay_light():
    code = "import fastdit\nfor name in fastdit.__all__: getattr(fastdit, name)"
    assert loaded_after(code, {"triton", "matplotlib"}) == set()


def test_help_needs_no_torch():
    code = "from fastdit.cli import main\nsys.argv = ['fastdit', '--help']\ntry: main()\nexcept SystemExit: pass"
    assert loaded_after(code, {"torch", "diffusers", "numpy", "pydantic"}) == set()
