"""Each head gets the tiles that come nearest to exact attention, which is checked by computing all of them."""

import itertools
import math

import pytest
import torch

from fastdit.attention import MethodState, get_method
from fastdit.attention.methods import profiled
from fastdit.tokens import AttentionCall, TokenSpec, VideoGrid

TILES = ((4, 2, 2), (1, 4, 4), (4, 1, 4), (4, 4, 1))
FIELDS = {"density": 0.2, "block_size": 16, "parts": 4, "samples": 24}


def along_axes(spec, batch=2):
    """Four heads, whose queries look at their neighbours along time, in their frame, along rows, along columns."""
    place = torch.stack(torch.unravel_index(torch.arange(spec.grid.num_tokens), tuple(vars(spec.grid).values())), -1)
    weights = torch.tensor([[0.3, 6, 6], [9, 0.7, 0.7], [3, 9, 0.2], [3, 0.2, 9]])
    q = torch.randn(batch, 4, spec.num_tokens, 24)
    k = torch.randn(batch, 4, spec.num_tokens, 24)
    angles = place[:, :, None] * torch.tensor([0.25, 0.5, 0.75, 1.0])
    waves = torch.cat([angles.cos(), angles.sin()], -1)  # products of these fall off with distance
    for head in range(4):
        near = (waves * weights[head, :, None].sqrt()).flatten(1)
        q[:, head, spec.video], k[:, head, spec.video] = 4 * near, near
    return q, k, torch.randn(batch, 4, spec.num_tokens, 24)


def shapes_of(state, batch):
    """The shapes that the heads of each sample have chosen."""
    return [state.memory[f"sample {i} of {batch}"].memory["profiled"][-1][0] for i in range(batch)]


def dense(q, k, v, scale, padding=None):
    logits = q @ k.mT * scale
    return (logits if padding is None else logits.masked_fill(padding[:, None, None], -torch.inf)).softmax(-1) @ v


@pytest.mark.parametrize("compensate", [None, "mean"])
@pytest.mark.parametrize("text", ["none", "first", "last", "padded"])
@pytest.mark.parametrize("at_once", [1, 1 << 24])
def test_heads_take_the_tiles_whose_output_is_nearest(text, compensate, at_once, monkeypatch):
    """Every shape is run for all heads, as a method with one shape, and compared at the sampled queries."""
    monkeypatch.setattr(profiled, "SCORES_AT_ONCE", at_once)
    spec = TokenSpec(VideoGrid(5, 8, 12), 0 if text == "none" else 7, text_first=text == "first")
    padding = torch.zeros(2, spec.num_tokens, dtype=torch.bool)
    padding[0, -3:] = True
    call = AttentionCall(spec, scale=0.3, key_padding=padding if text == "padded" else None)
    q, k, v = along_axes(spec)
    state = MethodState()
    method = get_method("profiled", tiles=TILES, compensate=compensate, **FIELDS)
    out = method.forward(q, k, v, call, state)
    exact = dense(q, k, v, 0.3, call.key_padding)
    rows = torch.linspace(spec.video.start, spec.video.stop - 1, 24).round().long()
    outs = [
        get_method("profiled", tiles=(tile,), compensate=compensate, **FIELDS).forward(q, k, v, call, MethodState())
        for tile in TILES
    ]
    errors = torch.stack([(x - exact)[:, :, rows].square().sum((2, 3)) for x in outs])
    chosen = errors.argmin(0)
    assert shapes_of(state, 2) == [tuple(of_sample) for of_sample in chosen.tolist()]
    assert len(set(chosen.flatten().tolist())) >= 3
    for sample, head in itertools.product(range(2), range(4)):
        torch.testing.assert_close(out[sample, head], outs[chosen[sample, head]][sample, head])


def test_shapes_stay_for_the_video_and_go_with_it():
    spec = TokenSpec(VideoGrid(5, 8, 12))
    method, state = get_method("profiled", tiles=TILES, **FIELDS), MethodState()
    q, k, v = along_axes(spec)
    method.forward(q, k, v, AttentionCall(spec), state)
    shapes = shapes_of(state, 2)
    turned = [x.flip(1) for x in (q, k, v)]
    method.forward(*turned, AttentionCall(spec, step=1), state)
    assert shapes_of(state, 2) == shapes
    state.reset()
    method.forward(*turned, AttentionCall(spec), state)
    assert shapes_of(state, 2) == [of_sample[::-1] for of_sample in shapes] != shapes


def test_samples_that_choose_other_tiles_have_no_one_pattern():
    spec = TokenSpec(VideoGrid(5, 8, 12))
    method = get_method("profiled", tiles=TILES, **FIELDS)
    q, k, v = along_axes(spec)
    turned = [torch.cat([x[:1], x[1:].flip(1)]) for x in (q, k, v)]
    with pytest.raises(
        ValueError, match="the 2 samples of the batch choose different tiles; ask for the pattern of one"
    ):
        method.pattern(*turned[:2], AttentionCall(spec), MethodState())
    assert len({x.pattern.layout for x in states_of(method, turned, spec)}) == 2


def states_of(method, tensors, spec):
    state = MethodState()
    method.forward(*tensors, AttentionCall(spec), state)
    return [state.memory[f"sample {i} of 2"] for i in range(2)]


def test_each_row_keeps_equally_many_blocks():
    spec = TokenSpec(VideoGrid(5, 8, 12), 5)
    method = get_method("profiled", tiles=TILES, **FIELDS)
    q, k, _ = along_axes(spec)
    pattern = method.pattern(q, k, AttentionCall(spec), MethodState())
    blocks, video = pattern.mask.to_dense(), pattern.layout.video_blocks
    assert blocks.shape[1] == 4 and pattern.layout.index.shape[0] == 4
    assert (blocks[:, :, :video, :video].sum(-1) == math.floor(0.2 * video + 0.5)).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tiles": ()}, "tiles must be"),
        ({"tiles": ((4, 4),)}, "tiles must be"),
        ({"tiles": ((4, 0, 16),)}, "tiles must be"),
        ({"parts": 3}, "parts must divide a block of 64 tokens, got 3"),
        ({"samples": 0}, "samples must be"),
        ({"density": 0}, "density must be"),
        ({"block_size": 48}, "block_size must be"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        get_method("profiled", **fields)
