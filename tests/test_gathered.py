"""Tokens that a kernel in low precision puts in order itself; the order is that of the layout, and so is the result."""

from dataclasses import dataclass

import pytest
import torch
from precision_cases import unordered

from fastdit.attention import BlockMethod, MethodState, Pattern, get_method
from fastdit.attention import method as base
from fastdit.attention.kernels import block_sparse_attention
from fastdit.attention.kernels.checks import SWITCH
from fastdit.attention.kernels.fa4 import check as fa4_check
from fastdit.attention.kernels.options import Options
from fastdit.layout import TokenLayout, stack_heads
from fastdit.mask import BlockMask
from fastdit.tokens import AttentionCall, TokenSpec, VideoGrid

SPEC = TokenSpec(VideoGrid(3, 5, 7), 19, text_first=True)


@dataclass(frozen=True, kw_only=True)
class Own(BlockMethod):
    """An order for each head, with padding in its middle, and every third block."""

    def pattern(self, q, k, call, state):
        orders = [torch.randperm(105, generator=torch.Generator().manual_seed(head)) for head in range(q.shape[1])]
        build = {"block": 16, "segments": torch.tensor([10, 95])}
        layout = stack_heads([TokenLayout.build(SPEC, order=order, **build) for order in orders])
        number = torch.arange(layout.num_blocks)
        lengths = layout.lengths()[None]
        sizes = {"block_q": 16, "block_k": 16, "lengths_q": lengths, "lengths_k": lengths}
        return Pattern(layout, BlockMask.from_dense((number + number[:, None]) % 3 == 0, **sizes))


METHODS = {
    "own": Own(compensate="mean"),
    "draft": get_method("draft", tile=(2, 2, 4), density=0.4),
    "radial": get_method("radial", block_size=16, order="hwf", compensate="mean"),
}


@pytest.fixture
def seen(monkeypatch):
    """Record what the door is given, and what is laid out."""
    calls = {"index": [], "tokens": [], "laid out": 0}
    door, lay_out = base.block_sparse_attention, base.lay_out

    def watched_door(q, k, v, mask, **how):
        calls["index"].append(how["index"])
        calls["tokens"].append(q.shape[2])
        return door(q, k, v, mask, **how)

    def watched_lay_out(layout, *tensors):
        calls["laid out"] += len(tensors)
        return lay_out(layout, *tensors)

    monkeypatch.setattr(base, "block_sparse_attention", watched_door)
    monkeypatch.setattr(base, "lay_out", watched_lay_out)
    return calls


def qkv(spec=SPEC, batch=2):
    return torch.randn(3, batch, spec.num_tokens, 2, 16).transpose(2, 3).unbind()


def padded(spec=SPEC):
    padding = torch.zeros(2, spec.num_tokens, dtype=torch.bool)
    padding[0, spec.text.start + 4 : spec.text.stop] = True
    return AttentionCall(spec, key_padding=padding)


def low(**changes):
    return MethodState(kernel="reference", precision="int8_fp8", **changes)


@pytest.mark.parametrize("name", METHODS)
def test_methods_leave_the_order_to_low_precision(name, seen, monkeypatch):
    tensors, call = qkv(), padded()
    out = METHODS[name].forward(*tensors, call, low())
    assert seen["laid out"] == 0 and seen["tokens"] == [SPEC.num_tokens] and seen["index"][0] is not None
    monkeypatch.setattr(BlockMethod, "_takes_any_order", lambda self, *tensors: False)
    assert torch.equal(METHODS[name].forward(*tensors, call, low()), out)
    assert seen["laid out"] == 3 and seen["tokens"][1] > SPEC.num_tokens and seen["index"][1] is None


@pytest.mark.parametrize("case", ["no precision", "excused", "second branch", "odd strides", "same order"])
def test_who_gets_tokens_in_order(case, seen):
    """All but low precision; and whoever would have to be told of an index that is not needed."""
    method, tensors, state, excuses = METHODS["own"], qkv(), low(), []
    if case == "no precision":
        state = MethodState()
    elif case == "excused":
        state = MethodState(precision="int8", excuse=excuses.append)
    elif case == "second branch":
        method = get_method("sla", block_size=16, order="hwf")
    elif case == "odd strides":
        tensors = [x.mT.contiguous().mT for x in tensors]
    else:
        method = get_method("radial", block_size=16)
        spec = TokenSpec(VideoGrid(2, 4, 8))
        method.forward(*qkv(spec), AttentionCall(spec), state)
        assert seen["tokens"] == [64] and seen["index"] == [None]
        return
    parts = []
    state.measure = lambda part, device, run: parts.append(part) or run()
    method.forward(*tensors, padded(), state)
    assert seen["laid out"] == 3 and seen["index"] == [None] and seen["tokens"][0] > SPEC.num_tokens
    assert parts.count("order") == 2 and len(excuses) == (case == "excused")


def test_only_the_way_back_is_timed(seen):
    parts, state = [], low()
    state.measure = lambda part, device, run: parts.append(part) or run()
    METHODS["own"].forward(*qkv(), padded(), state)
    assert parts == ["choice", "order"]


@pytest.mark.parametrize("how", [{}, {"precision": "int8"}, {"precision": "int8_fp8", "compensate": "mean"}], ids=str)
@pytest.mark.parametrize("own", [True, False])
def test_reference_is_that_of_tokens_in_order(own, how):
    tensors, layout, mask = unordered(16, torch.float32, own=own)
    laid_out = [layout.apply(x[:, :, : layout.num_tokens]) for x in tensors]
    expected = block_sparse_attention(*laid_out, mask, kernel="reference", **how)
    found = block_sparse_attention(*tensors, mask, kernel="reference", index=layout.index, **how)
    assert all(torch.equal(x, y) and x.isfinite().all() for x, y in zip(found, expected, strict=True))


def test_other_kernels_refuse():
    tensors, layout, mask = unordered(16, torch.float32, own=True)
    refused = "order of the mask and no index; put them in order"
    with pytest.raises(RuntimeError, match=f"kernel 'cpu' cannot run: .*{refused}"):
        block_sparse_attention(*tensors, mask, kernel="cpu", index=layout.index)
    with pytest.raises(RuntimeError, match=f"no kernel can run.*cpu: .*{refused}"):
        block_sparse_attention(*tensors, mask, index=layout.index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", True)
        half = [x.half() for x in tensors]
        assert refused in fa4_check(*half, mask, Options(1.0, index=layout.index))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.int(), r"must be \(1 or H, n\) int64 with H = 2, got \(1, 75\) torch.int32"),
        (lambda index: index[0], r"must be \(1 or H, n\) int64 with H = 2, got \(75,\)"),
        (lambda index: index.expand(3, -1), r"with H = 2, got \(3, 75\)"),
        (lambda index: index[:, :20], "the mask has 5 blocks of 16 queries.*got 20"),
        (lambda index: index.to("meta"), "index must be on the device of q, cpu, got meta"),
    ],
)
def test_an_index_that_does_not_fit(change, message):
    tensors, layout, mask = unordered(16, torch.float32, own=False, blocks=(16, 16))
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(*tensors, mask, kernel="reference", index=change(layout.index))


def test_an_index_is_for_as_many_queries_as_keys():
    (q, k, v), layout, mask = unordered(16, torch.float32, own=False)
    with pytest.raises(ValueError, match="orders queries and keys alike, so they must be as many, got 60 and 61"):
        block_sparse_attention(q[:, :, 1:], k, v, mask, kernel="reference", index=layout.index)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [(3, 61, r"must be in \[-1, 61\), got 61"), (3, -2, "got -2"), (3, -1, "-1 where the mask's lengths count real")],
)
def test_an_index_is_checked_on_request(place, value, message, monkeypatch):
    tensors, layout, mask = unordered(16, torch.float32, own=True)
    monkeypatch.setenv(SWITCH, "1")
    block_sparse_attention(*tensors, mask, kernel="reference", index=layout.index)
    index = layout.index.clone()
    index[1, place] = value
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(*tensors, mask, kernel="reference", index=index)
