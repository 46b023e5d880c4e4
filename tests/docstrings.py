"""Check what ruff cannot: docstrings against signatures, shapes, types, file sizes, tests that check nothing.

Run as ``python tests/docstrings.py [FILE ...]``; prints ``file:line: what is wrong`` and exits with 1 if anything is.
A method inherits the docstring of the one in the package that it overrides: it needs none, or one without ``Args:``.
The functions of a kernel module follow the contract in ``kernels/dispatch.py`` likewise. "Arguments as for ``name``"
stands for the entries of another function of the package, beside which ``Args:`` has only what differs. Mood and
layout of docstrings, and documented exceptions, are ruff's part (pyproject.toml).
"""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINES = 400
KERNEL_LINES = 600
SHAPE = re.compile(r"``[^`\n]*\([^`\n]*\)[^`\n]*``|0-d|``\(\)``")
TENSOR = re.compile(r"\bTensor\b")
CONTRACT = ("available", "check", "run", "no_gain")
"""The functions of a kernel, whose arguments `kernels/dispatch.py` documents."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


def check_file(file: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of everything that is wrong in a file."""
    text = file.read_text()
    tree = ast.parse(text)
    parts = file.resolve().relative_to(ROOT).parts
    lines, limit = text.count("\n"), KERNEL_LINES if "kernels" in parts else LINES
    if lines > limit:
        yield 1, f"{lines} lines; {limit} is the limit: split the file by what its parts are about"
    if parts[0] == "tests":
        yield from thin_tests(tree)
    else:
        # the modules there are steps of one training script, where a sentence may do for an Args: section
        script = parts[0] == "tools" or (parts[:2] == ("fastdit", "demo") and file.name != "__init__.py")
        kernel = parts[:3] == ("fastdit", "attention", "kernels")
        for line, fault in public_names(tree, command_line=parts[:2] == ("fastdit", "cli"), kernel=kernel):
            if not (script and "no Args: section" in fault):
                yield line, fault


def public_names(tree: ast.Module, *, command_line: bool, kernel: bool = False) -> Iterator[tuple[int, str]]:
    functions = [node for node in tree.body if isinstance(node, Function)]
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            functions += [inner for inner in node.body if isinstance(inner, Function)]
    for node in functions:
        yield from check_types(node)
    for node in tree.body:
        if isinstance(node, Function) and is_public(node):
            follows = kernel and node.name in CONTRACT
            yield from check_function(node, node.name, command_line=command_line, inherits=follows)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from check_class(node)
            for inner in node.body:
                if isinstance(inner, Function) and is_public(inner):
                    inherits = overrides(node, inner.name)
                    if ast.get_docstring(inner) is None and not inherits:
                        yield inner.lineno, f"{node.name}.{inner.name}: no docstring, and it overrides none"
                    yield from check_function(inner, f"{node.name}.{inner.name}", inherits=inherits)


def borrowed(doc: str) -> dict[str, str]:
    """Return the arguments that a docstring takes from that of another function."""
    name = re.search(r"Arguments\s+as\s+for\s+``([\w.]+)``", doc)
    return package_arguments().get(name[1].rpartition(".")[2], {}) if name else {}


@cache
def package_arguments() -> dict[str, dict[str, str]]:
    arguments: dict[str, dict[str, str]] = {}
    for file in sorted((ROOT / "fastdit").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, Function) and (entries := section(ast.get_docstring(node) or "", "Args")):
                arguments.setdefault(node.name, entries)
    return arguments


@cache
def package_classes() -> dict[str, list[ast.ClassDef]]:
    classes: dict[str, list[ast.ClassDef]] = {}
    for file in (ROOT / "fastdit").rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef):
                classes.setdefault(node.name, []).append(node)
    return classes


def overrides(node: ast.ClassDef, method: str) -> bool:
    """Tell whether a base class in the package has a documented method of that name."""
    names = [ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases]
    bases = [base for name in names if name != node.name for base in package_classes().get(name, [])]
    documented = any(
        isinstance(inner, Function) and inner.name == method and ast.get_docstring(inner)
        for base in bases
        for inner in base.body
    )
    return documented or any(overrides(base, method) for base in bases)


def is_public(node: Function) -> bool:
    decorators = [ast.unparse(d) for d in node.decorator_list]
    hidden = any("jit" in d or "overload" in d or d.endswith(".setter") for d in decorators)
    return not node.name.startswith("_") and not hidden


def check_types(node: Function) -> Iterator[tuple[int, str]]:
    if any("jit" in ast.unparse(d) for d in node.decorator_list):
        return
    untyped = [name for name, argument in parameters(node).items() if argument.annotation is None]
    if untyped:
        yield node.lineno, f"{node.name}: no type for {', '.join(untyped)}"
    if node.returns is None and node.name != "__init__":
        yield node.lineno, f"{node.name}: no type for what it returns"


def check_function(
    node: Function, name: str, *, command_line: bool = False, inherits: bool = False
) -> Iterator[tuple[int, str]]:
    doc = ast.get_docstring(node)
    if doc is None or (inherits and not section(doc, "Args")):
        return  # of the first ruff and the caller take care
    arguments = parameters(node)
    if command_line and any(is_option(a) for a in arguments.values()):
        for argument, node_ in arguments.items():
            if is_option(node_) and not re.search(r"help=|\boption\(", ast.unparse(node_.annotation)):
                yield node_.lineno, f"{name}: option {argument} has no help"
        return
    own, others = section(doc, "Args"), borrowed(doc)
    documented = {key: text for key, text in others.items() if key in arguments} | own
    yield from compare(node.lineno, name, list(arguments), documented, ordered=not others)
    for argument, node_ in arguments.items():
        if annotated_tensor(node_.annotation) and not SHAPE.search(documented.get(argument, doc)):
            yield node_.lineno, f"{name}: no shape in double backticks for the tensor {argument}"
    if annotated_tensor(node.returns) and not SHAPE.search(without(doc, "Args")):
        yield node.lineno, f"{name}: no shape in double backticks for the tensor it returns"


def check_class(node: ast.ClassDef) -> Iterator[tuple[int, str]]:
    doc = ast.get_docstring(node)
    if doc is None:
        return
    documented = section(doc, "Args")
    if any("dataclass" in ast.unparse(d) for d in node.decorator_list):
        own = {
            n.target.id: n.annotation
            for n in node.body
            if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) and not n.target.id.startswith("_")
        }
        own = {n: kind for n, kind in own.items() if not re.search(r"ClassVar|\boption\(", ast.unparse(kind))}
        inherits = any(ast.unparse(base) not in ("ABC", "Protocol") for base in node.bases)
        known = own | dict.fromkeys(documented, ast.Constant(None)) if inherits else own
        yield from compare(node.lineno, node.name, list(known), documented, ordered=not inherits)
        for name, kind in own.items():
            if annotated_tensor(kind) and not SHAPE.search(documented.get(name, doc)):
                yield node.lineno, f"{node.name}: no shape in double backticks for the tensor {name}"
        return
    for inner in node.body:
        if isinstance(inner, Function) and inner.name == "__init__":
            documented = documented or section(ast.get_docstring(inner) or "", "Args")
            yield from compare(node.lineno, node.name, list(parameters(inner)), documented)


def compare(
    line: int, name: str, actual: list[str], documented: dict[str, str], *, ordered: bool = True
) -> Iterator[tuple[int, str]]:
    missing = [a for a in actual if a not in documented]
    extra = [d for d in documented if d not in actual]
    if missing:
        where = "missing under Args:" if documented else "no Args: section for"
        yield line, f"{name}: {where} {', '.join(missing)}"
    if extra:
        yield line, f"{name}: under Args: but not in the signature: {', '.join(extra)}"
    if ordered and not missing and len(documented) == len(actual) and list(documented) != actual:
        yield line, f"{name}: Args: in another order than the signature"


def parameters(node: Function) -> dict[str, ast.arg]:
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args]
    out = {a.arg: a for a in named if a.arg not in ("self", "cls") or a.annotation is not None}
    if arguments.vararg:
        out[f"*{arguments.vararg.arg}"] = arguments.vararg
    out |= {a.arg: a for a in arguments.kwonlyargs}
    if arguments.kwarg:
        out[f"**{arguments.kwarg.arg}"] = arguments.kwarg
    return {name: a for name, a in out.items() if not name.startswith("_")}


def annotated_tensor(annotation: ast.expr | None) -> bool:
    # a callable or module that handles tensors is no tensor
    text = ast.unparse(annotation) if annotation is not None else ""
    return bool(TENSOR.search(re.sub(r"Callable\[.*\]|Iterator\[.*\]|dict\[.*\]", "", text)))


def is_option(argument: ast.arg) -> bool:
    return argument.annotation is not None and bool(
        re.search(r"\b(option|typer\.Option|typer\.Argument)\(", ast.unparse(argument.annotation))
    )


def section(doc: str, title: str) -> dict[str, str]:
    """Read the entries of a section of a Google docstring: name and text."""
    entries: dict[str, str] = {}
    name, inside = "", False
    for line in doc.splitlines():
        if re.fullmatch(r"\w+:", line):
            inside = line == f"{title}:"
        elif inside and line and not line.startswith(" "):
            inside = False
        elif inside and (found := re.match(r" {4}(\*{0,2}\w+)(?: \([^)]*\))?:(.*)", line)):
            name = found[1]
            entries[name] = found[2]
        elif inside and name:
            entries[name] += "\n" + line
    return entries


def without(doc: str, title: str) -> str:
    return re.sub(rf"^{title}:\n(?:(?: .*)?\n)*", "", doc + "\n", flags=re.MULTILINE)


def thin_tests(tree: ast.Module) -> Iterator[tuple[int, str]]:
    checking = re.compile(r"\bassert\w*\b|\braises\b|\bwarns\b|\bcheck\w*\b|\bexpect\w*\b|\bfail\b")
    for node in ast.walk(tree):
        if isinstance(node, Function) and node.name.startswith("test_") and not checking.search(ast.unparse(node)):
            yield node.lineno, f"{node.name} checks nothing"


def main(arguments: list[str]) -> int:
    files = [Path(a) for a in arguments] or sorted(
        file for folder in ("fastdit", "benches", "tests", "tools") for file in (ROOT / folder).rglob("*.py")
    )
    found = 0
    for file in files:
        for line, text in check_file(file):
            found += 1
            print(f"{file.resolve().relative_to(ROOT)}:{line}: {text}")
    print(f"{len(files)} files, {found} violations")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
