"""The plan that PAROAttention runs from: a value, and a file."""

import copy
import json
import math

import pytest
import torch
from safetensors.torch import save_file

from fastdit.attention import get_method
from fastdit.attention.methods.paro.masks import AXIS_ORDERS, ParoPlan, pack, unpack
from fastdit.tokens import TokenSpec, VideoGrid

TEXTS = [(0, False), (19, True), (19, False)]


def plan_for(spec, heads=3, layers=1, edges=(1,), block_size=16, seed=0, density=0.4):
    """A plan of random orders and blocks."""
    noise = torch.Generator().manual_seed(seed)
    rows = math.ceil(spec.grid.num_tokens / block_size)
    blocks = torch.rand(len(edges), layers, heads, rows, rows, generator=noise) < density
    chosen = torch.randint(6, (layers, heads), generator=noise).tolist()
    orders = [[AXIS_ORDERS[place] for place in layer] for layer in chosen]
    bits = pack(blocks | torch.eye(rows, dtype=torch.bool))
    return ParoPlan(tokens=spec, block_size=block_size, density=density, orders=orders, edges=edges, bits=bits)


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 65])
def test_packing(rows):
    blocks = torch.rand(3, 2, rows, rows) < 0.5
    bits = pack(blocks)
    assert bits.dtype == torch.uint8 and bits.shape == (3, 2, rows, math.ceil(rows / 8))
    assert torch.equal(unpack(bits, rows), blocks)


def test_the_first_block_is_the_lowest_bit():
    first_and_tenth = torch.arange(11) % 9 == 0
    assert pack(first_and_tenth).tolist() == [1, 2]


def test_plans_are_values():
    spec = TokenSpec(VideoGrid(3, 5, 7), 4)
    plan, same, other = plan_for(spec), plan_for(spec), plan_for(spec, seed=1)
    assert plan == same and hash(plan) == hash(same) and plan != other and plan != "plan"
    assert copy.deepcopy(plan) is plan and (plan.num_layers, plan.num_heads) == (1, 3)
    assert repr(plan) == "ParoPlan(3x5x7 + 4 text tokens, 1 layers, 3 heads, density 0.4, 1 step buckets)"
    with pytest.raises(AttributeError, match="a plan never changes: density cannot be set"):
        plan.density = 0.1
    plan.blocks(0, 0).zero_()
    assert plan == same and plan.blocks(0, 0).any()


@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_files(text, tmp_path):
    plan = plan_for(TokenSpec(VideoGrid(3, 5, 7), *text), layers=2, edges=(0.2, 0.5, 1))
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    again = ParoPlan.load(path)
    assert again == plan and again.orders == plan.orders and again.tokens == plan.tokens
    assert all(torch.equal(again.blocks(b, l), plan.blocks(b, l)) for b in range(3) for l in range(2))
    method = get_method("paro", plan=str(path))
    assert method.loaded == plan and method.plan == str(path) and copy.deepcopy(method) == method


RIGHT = {"grid": {"frames": 1, "height": 6, "width": 10}, "text_tokens": 0, "text_first": False}


def damaged(about=None, **tensors):
    def change(path):
        rows = {"orders": torch.zeros(1, 2, dtype=torch.uint8), "blocks": torch.ones(1, 1, 2, 4, 1, dtype=torch.uint8)}
        right = {
            "version": 1,
            "tokens": RIGHT,
            "block_size": 16,
            "density": 0.5,
            "edges": [1],
        }
        about_ = {k: v for k, v in {**right, **(about or {})}.items() if v is not None}
        kept = {name: x for name, x in {**rows, **tensors}.items() if x is not None}
        save_file(kept, path, {"paro_plan": json.dumps(about_)})

    return change


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "cannot be read: No such file"),
        (lambda path: path.write_bytes(b"not at all a file of tensors"), "not a plan for 'paro', or it is damaged"),
        (lambda path: save_file({"x": torch.ones(1)}, path), "but not a plan for 'paro'"),
        (lambda path: save_file({"x": torch.ones(1)}, path, {"paro_plan": "{"}), "or it is damaged"),
        (lambda path: save_file({"x": torch.ones(1)}, path, {"paro_plan": "[]"}), "or it is damaged"),
        (damaged({"version": 2}), "version must be 1, got 2; calibrate it again"),
        (damaged({"tokens": None}), "or it is damaged: tokens is missing"),
        (
            damaged({"tokens": {"grid": {"frames": 1.0, "height": 6, "width": 10}}}),
            r"tokens.grid.frames must be a valid integer, got 1.0",
        ),
        (
            damaged({"tokens": RIGHT | {"text_first": "false"}}),
            "tokens.text_first must be a valid boolean, got 'false'",
        ),
        (damaged({"tokens": RIGHT | {"ordered": 1}}), "tokens.ordered must be a valid boolean, got 1"),
        (damaged({"density": 7}), r"density must be in \(0, 1\]"),
        (damaged({"block_size": 32}), r"must be \(1, 1, 2, 2, 1\) uint8, got \(1, 1, 2, 4, 1\)"),
        (damaged({"edges": [0.5, 1]}), r"bits of 2 buckets, .* must be \(2, 1, 2, 4, 1\) uint8"),
        (damaged({"edges": []}), "edges of step buckets must be"),
        (damaged(orders=torch.full((1, 2), 6, dtype=torch.uint8)), "or it is damaged"),
        (damaged(orders=torch.zeros(1, 3, dtype=torch.uint8)), "1 layers and 3 heads"),
        (damaged(orders=None), "or it is damaged"),
        (damaged(blocks=None), "or it is damaged"),
        (damaged(blocks=torch.ones(1, 1, 2, 4, 1)), "torch.float32"),
    ],
)
def test_files_that_are_no_plans(write, message, tmp_path):
    path = tmp_path / "plan.safetensors"
    write(path)
    with pytest.raises(ValueError, match=message):
        get_method("paro", plan=str(path))


def test_the_damaged_file_is_right_when_nothing_is_damaged(tmp_path):
    damaged()(tmp_path / "plan.safetensors")
    assert ParoPlan.load(tmp_path / "plan.safetensors").num_heads == 2


@pytest.mark.parametrize("orders", [[["fhw", "xyz"]], [["fhw", "fwh"], ["fhw"]], []])
def test_bad_orders(orders):
    bits = torch.zeros(1, max(1, len(orders)), 2, 4, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"orders must be fhw, fwh|0 layers"):
        ParoPlan(
            tokens=TokenSpec(VideoGrid(1, 6, 10)), block_size=16, density=0.5, orders=orders, edges=(1,), bits=bits
        )
