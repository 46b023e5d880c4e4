"""What every registered method must hold; a new method gets all of it by being registered."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fastdit.attention import AttentionMethod, MethodState, Pattern, get_method, list_methods, method_class
from fastdit.attention.kernels import block_sparse_attention
from fastdit.attention.methods.paro import calibrate
from fastdit.tokens import AttentionCall, TokenSpec, VideoGrid

GRIDS = [VideoGrid(1, 6, 10), VideoGrid(3, 9, 11), VideoGrid(5, 8, 16), VideoGrid(2, 13, 5)]
TEXTS = [(0, False), (11, True), (11, False)]

# Fields that make a method keep every block, for methods whose density field does not say so; None: it keeps nothing.
EVERYTHING = {"radial": {"decay": 1e6, "min_band": 1}, "dense": {}, "paro": {"density": 1.0}, "skip": None}
SMALL = {
    "radial": {"block_size": 16},
    "draft": {"tile": (1, 4, 4)},
    "adaspa": {"block_size": 16},
    "sla": {"block_size": 16},
    "diagonal": {"block_size": 16},
    "multi_diagonal": {"block_size": 16},
    "vertical_stripe": {"block_size": 16},
}


def calibrated(q, k, call, fields):
    return {"plan": calibrate(lambda look: look(q, k, call), density=fields.get("density", 0.4), block_size=16)}


# Functions (q, k, call, fields) -> fields for methods that are made for the queries and keys of a test.
PREPARE = {"paro": calibrated}


def small(name, q, k, call, **fields):
    fields = {**SMALL.get(name, {}), **fields}
    return get_method(name, **(PREPARE[name](q, k, call, fields) if name in PREPARE else fields))


def chosen(method, q, k, call):
    """A state in which the pattern is made already: the call that makes it may compute more than that (adaspa)."""
    state = MethodState()
    pattern = method.resolve(q, k, call, state)
    state.refresh = False
    return pattern, state


def samples(*tensors):
    return zip(*(x.split(1) for x in tensors), strict=True)


def settled(method, q, k, v, call):
    """The output once patterns are made, its state, and the pattern of each sample: a batch is what each gets alone."""
    state, patterns = MethodState(), []
    for i, sample in enumerate(samples(q, k, v)):
        padding = None if call.key_padding is None else call.key_padding[i : i + 1]
        alone, own = dataclasses.replace(call, key_padding=padding), MethodState()
        method.forward(*sample, alone, own)  # which may compute more than the pattern (adaspa)
        own.refresh = False
        patterns.append(method.resolve(*sample[:2], alone, own))
    method.forward(q, k, v, call, state)
    state.refresh = False
    return method.forward(q, k, v, call, state), state, patterns


def qkv(spec, batch=1, heads=3, dim=16, dtype=torch.float32):
    return (torch.randn(batch, heads, spec.num_tokens, dim, dtype=dtype) for _ in range(3))


def reference(q, k, v, pattern, key_padding=None):
    """Attention of a pattern by its token mask, in the model's own token order."""
    tokens = pattern.layout.padded_tokens
    mask = pattern.mask.to_tokens(tokens, tokens)
    mask = mask.expand(q.shape[0], q.shape[1], -1, -1)
    inverse = pattern.layout.inverse.expand(q.shape[1], -1)
    kept = torch.stack([mask[:, h][:, inverse[h]][:, :, inverse[h]] for h in range(q.shape[1])], 1)
    if key_padding is not None:
        kept = kept & ~key_padding[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=kept)


@pytest.fixture(params=list_methods())
def name(request):
    return request.param


@pytest.fixture(params=[name for name in list_methods() if EVERYTHING.get(name, {}) is not None])
def attending(request):
    return request.param


def test_methods_are_frozen_dataclasses_that_round_trip(name):
    call = AttentionCall(TokenSpec(VideoGrid(3, 4, 5)))
    method = small(name, *list(qkv(call.tokens))[:2], call)
    assert isinstance(method, AttentionMethod) and method_class(name) is type(method) and method.name == name
    again = get_method(name, **dataclasses.asdict(method))
    assert again == method and hash(again) == hash(method)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.name_of_nothing = 1


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_forward_is_attention_of_the_pattern(name, grid, text, poisoned_empty):
    call = AttentionCall(TokenSpec(grid, *text))
    q, k, v = qkv(call.tokens, batch=2)
    method = small(name, q, k, call)
    out, state, patterns = settled(method, q, k, v, call)
    expected = [reference(*sample, pattern) for sample, pattern in zip(samples(q, k, v), patterns, strict=True)]
    torch.testing.assert_close(out, torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert float(state.kept) == pytest.approx(sum(pattern.density for pattern in patterns) / 2, rel=1e-6)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_keeping_everything_equals_dense(attending, grid, text):
    call = AttentionCall(TokenSpec(grid, *text), scale=0.3)
    q, k, v = qkv(call.tokens)
    method = small(attending, q, k, call, **EVERYTHING.get(attending, {"density": 1.0}))
    pattern, state = chosen(method, q, k, call)
    out = method.forward(q, k, v, call, state)
    assert pattern.density == pytest.approx(1)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, scale=0.3), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_text_is_dense_and_every_query_attends(attending, text):
    call = AttentionCall(TokenSpec(VideoGrid(3, 9, 11), *text))
    q, k, _ = qkv(call.tokens)
    pattern = small(attending, q, k, call).pattern(q, k, call, MethodState())
    blocks = pattern.mask.to_dense()
    video = pattern.layout.video_blocks
    assert blocks[..., video:, :].all() and blocks[..., :, video:].all()
    assert (blocks.any(-1)).all()
    assert int(pattern.mask.lengths_q.sum()) == call.tokens.num_tokens


@pytest.mark.parametrize("real", [0, 5, 21])
@pytest.mark.parametrize("text_first", [True, False])
def test_video_attends_to_video_at_any_density(attending, text_first, real):
    """Text alone, which may be padding, is not enough: each query of the video gets a block of the video."""
    spec = TokenSpec(VideoGrid(4, 9, 11), 21, text_first)
    q, k, v = qkv(spec, batch=2)
    q[:, :, spec.video.start + 50 :] *= 1e-3  # maps that are kept as a whole have rows that matter little
    padding = torch.zeros(2, spec.num_tokens, dtype=torch.bool)
    padding[:, spec.text.start + real : spec.text.stop] = True
    call = AttentionCall(spec, key_padding=padding[:1])
    has_density = "density" in {f.name for f in dataclasses.fields(method_class(attending))}
    method = small(attending, q, k, call, **({"density": 1e-3} if has_density or attending == "paro" else {}))
    for sample in samples(q, k, v):  # a method may choose an order for each
        pattern, state = chosen(method, *sample[:2], call)
        video = pattern.layout.video_blocks
        mask = state.mask(pattern, call)
        assert (mask.to_dense()[..., :video, :video] & (mask.lengths_k[..., None, :video] > 0)).any(-1).all()
        assert (method.forward(*sample, call, state).abs().amax(-1) > 0).all()


@pytest.mark.parametrize("text_first", [True, False])
def test_padded_text_is_never_attended_to(name, text_first):
    spec = TokenSpec(VideoGrid(3, 9, 11), 21, text_first)
    q, k, v = qkv(spec, batch=2)
    padding = torch.zeros(2, spec.num_tokens, dtype=torch.bool)
    for sample, real in enumerate([5, 18]):
        padding[sample, spec.text.start + real : spec.text.stop] = True
    call = AttentionCall(spec, key_padding=padding)
    method = small(name, q, k, call)
    out, _, patterns = settled(method, q, k, v, call)
    parts = zip(samples(q, k, v), patterns, padding.split(1), strict=True)
    expected = [reference(*sample, pattern, own) for sample, pattern, own in parts]
    torch.testing.assert_close(out, torch.cat(expected), rtol=1e-4, atol=1e-5)
    k = k.masked_fill(padding[:, None, :, None], 1e4)
    v = v.masked_fill(padding[:, None, :, None], float("nan"))
    if method.static:
        again = method.forward(q, k, v.nan_to_num(1e6), call, MethodState())
        torch.testing.assert_close(again, out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5, 0.9])
def test_density_is_what_was_asked_for(name, density):
    if "density" not in {f.name for f in dataclasses.fields(method_class(name))}:
        assert name in EVERYTHING, "a method without a density says how it keeps everything"
        return
    call = AttentionCall(TokenSpec(VideoGrid(6, 16, 16)))
    q, k, _ = qkv(call.tokens)
    pattern = small(name, q, k, call, density=density).pattern(q, k, call, MethodState())
    assert pattern.density == pytest.approx(density, abs=0.02)


@pytest.mark.parametrize("density", [0, -0.1, 1.1, 25, float("nan"), "0.2", True, None])
def test_density_outside_its_range(name, density):
    if "density" not in {f.name for f in dataclasses.fields(method_class(name))}:
        with pytest.raises(TypeError, match="no field 'density'"):
            get_method(name, density=density)
        return
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\]"):
        get_method(name, density=density)


def test_patterns_are_reused_as_they_may_be(name):
    spec = TokenSpec(VideoGrid(3, 9, 11))
    state = MethodState()
    q, k, _ = qkv(spec)
    method = small(name, q, k, AttentionCall(spec))
    first = method.resolve(q, k, AttentionCall(spec), state)
    state.refresh = False
    assert method.resolve(*list(qkv(spec))[:2], AttentionCall(spec, step=1), state) is first
    state.refresh = True
    again = method.resolve(*list(qkv(spec))[:2], AttentionCall(spec, step=2), state)
    assert (again is first) == method.static
    state.reset()
    assert state.pattern is None


def test_a_pattern_of_another_video_is_not_reused(name):
    state = MethodState(refresh=False)
    for shape, batch in [((2, 8, 12), 2), ((2, 12, 8), 2), ((2, 12, 8), 1), ((2, 12, 8), 3)]:
        call = AttentionCall(TokenSpec(VideoGrid(*shape)))
        q, k, v = qkv(call.tokens, batch=batch)
        method = small(name, q, k, call)
        method.forward(q, k, v, call, state)
        out = method.forward(q, k, v, call, state)
        torch.testing.assert_close(out, settled(method, q, k, v, call)[0], rtol=1e-4, atol=1e-5)


def test_selection_is_deterministic(name):
    call = AttentionCall(TokenSpec(VideoGrid(3, 9, 11)))
    q, k, _ = qkv(call.tokens)
    method = small(name, q, k, call)
    one, two = (method.pattern(q, k, call, MethodState()).mask.to_dense() for _ in range(2))
    assert torch.equal(one, two)


def test_gradients_flow(attending):
    call = AttentionCall(TokenSpec(VideoGrid(2, 5, 7), 3))
    q, k, v = (x.requires_grad_() for x in qkv(call.tokens))
    method = small(attending, q.detach(), k.detach(), call)
    pattern, state = chosen(method, q, k, call)
    method.forward(q, k, v, call, state).square().sum().backward()
    got = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    reference(q, k, v, pattern).square().sum().backward()
    for x, grad in zip((q, k, v), got, strict=True):
        torch.testing.assert_close(grad, x.grad, rtol=1e-3, atol=1e-5)


def test_half_precision_selects_in_single(name):
    call = AttentionCall(TokenSpec(VideoGrid(3, 9, 11)))
    q, k, v = qkv(call.tokens, dtype=torch.bfloat16)
    method = small(name, q, k, call)
    out = method.forward(q, k, v, call, chosen(method, q, k, call)[1])
    assert out.dtype == torch.bfloat16 and out.isfinite().all()


@pytest.mark.parametrize("grid", [VideoGrid(3, 4, 8), VideoGrid(3, 9, 11)], ids=str)
@pytest.mark.parametrize("order", ["curve", "tile", "hwf"])
def test_tokens_may_come_in_the_shared_order(name, grid, order):
    call = AttentionCall(TokenSpec(grid))
    q, k, v = qkv(call.tokens, batch=2)
    has_order = "order" in {field.name for field in dataclasses.fields(method_class(name))}
    method = small(name, q, k, call, **({"order": order} if has_order else {}))
    shared = method.shared_order(call.tokens)
    assert (shared is not None) == (has_order or (name == "draft" and grid.height == 4))
    if shared is None:
        return
    ordered = AttentionCall(dataclasses.replace(call.tokens, ordered=True))
    first, second = MethodState(), MethodState()
    for _ in range(2):
        expected = method.forward(q, k, v, call, first)[:, :, shared]
        out = method.forward(*(x[:, :, shared] for x in (q, k, v)), ordered, second)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        first.refresh = second.refresh = False
    assert float(first.kept) == pytest.approx(float(second.kept), rel=1e-6)
    if has_order:
        assert method.layout(ordered, q.device, second).identity


def test_head_dependent_layouts():
    """A layout per head, as PARO needs it: the door computes each head in its own order."""
    spec = TokenSpec(VideoGrid(3, 4, 5), 4)
    from fastdit.layout import TokenLayout
    from fastdit.mask import BlockMask

    orders = torch.stack([torch.randperm(60) for _ in range(3)])
    layout = TokenLayout.build(spec, block=16, order=orders)
    blocks = torch.rand(1, 3, layout.num_blocks, layout.num_blocks) < 0.5
    lengths = layout.lengths()[None]
    mask = BlockMask.from_dense(blocks, block_q=16, block_k=16, lengths_q=lengths, lengths_k=lengths)
    q, k, v = qkv(spec, batch=2)
    out, _ = block_sparse_attention(*(layout.apply(x) for x in (q, k, v)), mask)
    torch.testing.assert_close(layout.undo(out), reference(q, k, v, Pattern(layout, mask)), rtol=1e-4, atol=1e-5)


def test_unknown_names_say_what_there_is():
    with pytest.raises(ValueError, match=r"unknown method 'radail' \(did you mean 'radial'\?\); methods are: dense"):
        get_method("radail")
    with pytest.raises(
        TypeError, match=r"no field 'densty' \(did you mean 'density'\?\); it has: compensate, density, tile"
    ):
        get_method("draft", densty=0.2)
    with pytest.raises(TypeError, match="it has none"):
        get_method("dense", density=0.2)


def test_the_default_device_of_torch_does_not_matter(name):
    call = AttentionCall(TokenSpec(VideoGrid(3, 9, 11), 11, True))
    q, k, v = qkv(call.tokens)
    method = small(name, q, k, call)
    expected, state = method.pattern(q, k, call, MethodState()), MethodState()
    out = method.forward(q, k, v, call, MethodState())
    with torch.device("meta"):
        found = method.pattern(q, k, call, MethodState())
        again = method.forward(q, k, v, call, state)
    assert torch.equal(found.layout.index, expected.layout.index)
    assert torch.equal(found.mask.to_dense(), expected.mask.to_dense())
    torch.testing.assert_close(again, out, rtol=0, atol=0)
