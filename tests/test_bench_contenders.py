"""What is timed is right: contenders that run here, the blocks that others are told, and the check itself."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import CASES, naive
from torch.nn.attention.flex_attention import flex_attention

from fastdit.attention.kernels import block_sparse_attention
from fastdit.bench.inputs.problems import PROBLEMS, find_problems
from fastdit.bench.measuring.contenders import Broken, Contender, Unavailable, contenders, flex_mask, prepare
from fastdit.bench.measuring.measure import Times, interleaved
from fastdit.bench.measuring.verify import fault, visible_keys
from fastdit.mask import BlockMask

KNOWN = {contender.name: contender for contender in contenders()}
RAGGED = [case for case in CASES if case.rows != "empty"]


@pytest.mark.parametrize("case", RAGGED, ids=str)
def test_flex_is_told_the_same_blocks(case):
    mask = case.mask()
    q, k, v = case.tensors(torch.float32)
    blocks = flex_mask(mask, q.shape[2], k.shape[2])
    assert torch.equal(blocks.to_dense().bool(), mask.to_dense())
    out = flex_attention(q, k, v, block_mask=blocks)  # uncompiled, it looks at the mask of single tokens alone
    torch.testing.assert_close(out, naive(q, k, v, mask)[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", RAGGED, ids=str)
def test_visible_keys(case):
    mask = case.mask()
    tokens_q, tokens_k = case.tokens
    expected = mask.to_tokens(tokens_q, tokens_k)
    rows = torch.tensor([0, tokens_q // 2, tokens_q - 1])
    for b in range(case.heads[0]):
        for h in range(case.heads[1]):
            found = visible_keys(mask, b, h, rows, tokens_k)
            assert torch.equal(found, expected[b % len(expected), h % expected.shape[1], rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["fastdit-cpu", "sdpa-flash", "sdpa-math"])
def test_contenders_pass(name, dtype):
    case = CASES[4]
    mask = case.mask()
    q, k, v = case.tensors(dtype)
    out = prepare(KNOWN[name], q, k, v, mask)[1]
    assert fault(out, q, k, v, mask if KNOWN[name].sparse else None) is None


def spoil(what: str, out: torch.Tensor, mask) -> torch.Tensor:
    out = out.clone()
    if what == "nan":
        out[0, -1, 3, 0] = torch.nan
    elif what == "scale":
        out *= 1.01
    elif what == "last row":
        out[:, :, -1] += 0.01
    elif what == "shape":
        return out[:, :, 1:]
    return out


@pytest.mark.parametrize("what", ["nan", "scale", "last row", "shape", "a block left out", "dense"])
def test_wrong_results_are_found(what):
    case = CASES[4]
    mask = case.mask()
    q, k, v = case.tensors(torch.float32)
    assert fault(block_sparse_attention(q, k, v, mask)[0], q, k, v, mask) is None
    run = mask
    if what == "a block left out":
        run = case.mask()
        for name in ("indices", "counts", "full_counts"):
            getattr(run, name).copy_(getattr(mask, name))
        run.counts[0, 0] -= 1
        run.full_counts[0, 0].clamp_(max=int(run.counts[0, 0].max()))
        run = type(mask).from_dense(run.to_dense(), block_q=32, block_k=32, tokens_q=100, tokens_k=100)
    out = naive(q, k, v, case.mask() if what == "dense" else run)[0]
    assert fault(spoil(what, out, mask), q, k, v, mask) is not None


def test_low_precision_has_a_budget_of_its_own():
    q, k, v = (torch.randn(1, 2, 64, 32) for _ in range(3))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    noisy = out + 0.03 * out.std() * torch.randn_like(out)
    assert fault(noisy, q, k, v, None) is not None
    assert fault(noisy, q, k, v, None, exact=False) is None
    assert fault(out * 1.2, q, k, v, None, exact=False) is not None


def test_absent_contenders_say_why():
    q, k, v = (torch.randn(1, 1, 64, 32) for _ in range(3))
    mask = BlockMask.from_dense(torch.ones(2, 2, dtype=torch.bool), block_q=32, block_k=32, tokens_q=64, tokens_k=64)
    reasons = {}
    for contender in KNOWN.values():
        try:
            prepare(contender, q, k, v, mask)
        except Unavailable as error:
            reasons[contender.name] = str(error)
    assert {"sdpa-cudnn", "fa3", "fa4", "natten", "sparge", "flex", "flex-dense"} <= set(reasons)
    assert all(reasons.values())

    def broken(*_):
        raise RuntimeError("no such\nthing")

    with pytest.raises(Unavailable, match=r"RuntimeError: no such$"):
        prepare(Contender("broken", True, broken), q, k, v, mask)
    with pytest.raises(Broken, match=r"RuntimeError: no such$"):
        prepare(Contender("ours", True, broken, ours=True), q, k, v, mask)


def test_problems():
    assert PROBLEMS["wan-14b-720p"].tokens.num_tokens == 75600
    assert PROBLEMS["demo"].tokens.num_tokens == 6912
    (own,) = find_problems(["8x16x16/4x64"])
    assert (own.tokens.num_tokens, own.heads, own.head_dim, own.flops) == (2048, 4, 64, 4 * 4 * 2048**2 * 64)
    with pytest.raises(ValueError, match="problems are: demo"):
        find_problems(["wan"])
    for size in ("8x16/4x64", "2x4x4/0x32", "2x4x4/2x0", "0x4x4/2x32"):
        with pytest.raises(ValueError, match="is not a size"):
            find_problems([size])


def test_demo_problem_is_the_demo():
    import json

    from fastdit.demo import DEFAULTS, WEIGHTS

    config = json.loads((WEIGHTS / "transformer" / "config.json").read_text())
    demo = PROBLEMS["demo"]
    assert (demo.layers, demo.heads, demo.head_dim) == tuple(
        config[name] for name in ("num_layers", "num_attention_heads", "attention_head_dim")
    )
    assert demo.steps == DEFAULTS.num_inference_steps
    assert demo.pixels == (DEFAULTS.num_frames, DEFAULTS.height, DEFAULTS.width)


def test_runs_are_interleaved():
    order = []
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, "cpu", repeats=3)
    assert order[:6] == ["a", "b"] * 3
    assert len(times["a"].samples) == len(times["b"].samples) >= 3
    assert Times((1.0, 3.0, 2.0)).seconds == 2
