"""What the Markdown files show works: examples run, names, options, targets and links exist."""

import ast
import dataclasses
import doctest
import re
import sys
import types
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import test_methods
import torch
from docstrings import public_names

import fastdit
from fastdit.attention import method as base
from fastdit.attention.kernels import dispatch as kernels
from fastdit.attention.kernels.options import Options
from fastdit.pipelines.families import family as families

ROOT = Path(__file__).resolve().parent.parent
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/**/*.md"))]
FENCE = re.compile(r"(?:^<!-- run(?:: (?P<mark>\w+))? -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    file: Path
    line: int
    kind: str
    mark: str | None
    text: str

    def run(self, names: dict[str, Any]) -> dict[str, Any]:
        exec(compile("\n" * self.line + self.text, self.file, "exec"), names)
        return names


def blocks(file: Path) -> list[Block]:
    text = file.read_text()
    found = []
    for match in FENCE.finditer(text):
        mark = match["mark"] or ("plain" if match[0].startswith("<!-- run") else None)
        line = text[: match.start("text")].count("\n")
        found.append(Block(file, line, match["kind"], mark, match["text"]))
    return found


ALL = [block for file in FILES for block in blocks(file)]


def marked(mark: str) -> Block:
    return next(block for block in ALL if block.mark == mark)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_examples_run(file, capsys):
    names: dict[str, Any] = {}
    for block in blocks(file):
        if block.mark == "plain":
            block.run(names)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    text = "\n".join(block.text for block in blocks(file) if block.kind == "pycon")
    result = runner.run(doctest.DocTestParser().get_doctest(text, {}, file.name, relative(file), 0))
    assert result.failed == 0, capsys.readouterr().out


@pytest.mark.parametrize("block", [b for b in ALL if b.kind == "python"], ids=lambda b: f"{relative(b.file)}:{b.line}")
def test_python_is_right_as_far_as_can_be_seen(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "fastdit":
            assert hasattr(fastdit, node.attr), f"fastdit.{node.attr}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pipe.enable_sparse_attention" and node.args:
            fields = {k.arg: ast.literal_eval(k.value) for k in node.keywords if k.arg not in ("schedule", "kernel")}
            method = ast.literal_eval(node.args[0])
            plan = method.endswith(".json") and not fields
            assert plan or fastdit.get_method(method, **fields).name in fastdit.list_methods()


def test_commands_and_options_exist():
    from typer.main import get_command

    from fastdit.cli import app

    commands = get_command(app).commands
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    seen = 0
    for block in ALL:
        for line in block.text.splitlines() if block.kind == "sh" else ():
            words = re.sub(r'"[^"]*"', "x", line.split("#")[0]).split()
            if words[:1] == ["make"]:
                assert {w for w in words[1:2] if "=" not in w} <= targets, line
            if words[:1] == ["fastdit"]:
                seen += 1
                command, rest = commands[words[1]], words[2:]
                if hasattr(command, "commands"):
                    command, rest = command.commands[rest[0]], rest[1:]
                options = {o for p in command.params for o in p.opts} | {"--help"}
                assert {w for w in rest if w.startswith("-")} <= options, line
    assert seen >= 4


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_links_lead_somewhere(file):
    shown = re.sub(r"<!--.*?-->", "", file.read_text(), flags=re.S)
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", shown)
    missing = [link for link in links if not link.startswith("http") and not (file.parent / link).exists()]
    assert not missing


def test_every_method_and_family_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    methods = (ROOT / "docs/methods.md").read_text()
    for name in fastdit.list_methods():
        assert f"| `{name}` |" in text and f"\n## {name}\n" in methods, name
        for field in dataclasses.fields(fastdit.get_method(name)):
            assert f"| `{field.name}` |" in methods, f"{name}.{field.name}"
    for name in fastdit.list_families():
        for transformer in families._REGISTRY[name].transformers:
            assert f"`{transformer}`" in text, transformer


@pytest.fixture
def method_example(monkeypatch):
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    # a dataclass looks its module up while it is made
    module = types.ModuleType("nearby")
    monkeypatch.setitem(sys.modules, "nearby", module)
    marked("method").run(vars(module))
    monkeypatch.setitem(test_methods.EVERYTHING, "nearby", {"reach": 1000})
    return "nearby"


@pytest.mark.parametrize("mark", ["method", "family", "kernel"])
def test_examples_pass_the_docstring_check(mark):
    assert list(public_names(ast.parse(marked(mark).text), command_line=False, kernel=mark == "kernel")) == []


@pytest.mark.parametrize("grid", test_methods.GRIDS, ids=str)
@pytest.mark.parametrize("text", test_methods.TEXTS, ids=str)
def test_method_example_passes_the_battery(method_example, grid, text):
    test_methods.test_forward_is_attention_of_the_pattern(method_example, grid, text, None)
    test_methods.test_keeping_everything_equals_dense(method_example, grid, text)
    assert method_example in fastdit.list_methods()


def test_method_example_passes_the_rest_of_the_battery(method_example):
    test_methods.test_methods_are_frozen_dataclasses_that_round_trip(method_example)
    for text in test_methods.TEXTS:
        test_methods.test_text_is_dense_and_every_query_attends(method_example, text)
    for text_first in (True, False):
        test_methods.test_padded_text_is_never_attended_to(method_example, text_first)
    near, far = (fastdit.pattern(method_example, grid=(6, 8, 8), reach=reach).density for reach in (0, 2))
    assert near == pytest.approx(1 / 6) and far == pytest.approx(24 / 36)


def test_family_example_runs_sparse(monkeypatch):
    from diffusers import WanTransformer3DModel

    monkeypatch.setattr(families, "_REGISTRY", dict(families._REGISTRY))
    marked("family").run({"__name__": "mymodel"})

    class MyTransformer3DModel(WanTransformer3DModel):
        pass

    model = MyTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=16, ffn_dim=16, num_layers=2, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    inputs = (torch.randn(1, 4, 3, 16, 16), torch.tensor([500]), torch.randn(1, 5, 8))
    assert families.find_family(model).name == "mymodel"
    settings = {"density": 0.3, "tile": (1, 4, 4), "schedule": fastdit.Schedule()}
    with torch.no_grad(), fastdit.sparse_attention(model, "draft", **settings) as handle:
        model(*inputs, return_dict=False)
    totals = handle.report()["totals"]
    assert totals["sparse_calls"] == 2 and not totals["fallbacks"]
    assert handle.density == pytest.approx(0.3, abs=0.05)


def test_kernel_example_equals_the_reference(monkeypatch):
    kernel = types.ModuleType("fastdit.attention.kernels.example")
    marked("kernel").run(vars(kernel))
    monkeypatch.setitem(sys.modules, kernel.__name__, kernel)
    monkeypatch.setattr(kernels, "_ON_REQUEST", (*kernels._ON_REQUEST, "example"))
    mask = fastdit.BlockMask.from_dense(torch.rand(1, 2, 5, 7) < 0.4, block_q=16, block_k=16, tokens_q=75, tokens_k=99)
    q, k, v = torch.randn(1, 2, 75, 32), torch.randn(1, 2, 99, 32), torch.randn(1, 2, 99, 32)
    results = [kernels.block_sparse_attention(q, k, v, mask, kernel=name) for name in ("example", "reference")]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert "8192" in kernel.check(torch.empty(1, 1, 9000, 8), k, v, mask, Options(1.0))
