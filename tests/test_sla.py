"""Sparse-Linear Attention against eager definitions written from its papers, token by token."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastdit.attention import MethodState, get_method
from fastdit.attention.methods.sla import linear
from fastdit.attention.methods.sla.linear import linear_attention
from fastdit.token_orders import token_order
from fastdit.tokens import AttentionCall, TokenSpec, VideoGrid

VARIANTS = ("paper", "sla1", "full", "sla2")
MAPS = ("softmax", "elu", "relu", "hedgehog")
BLOCK = 16
DIM = 8
CALLS = {
    "ragged": (TokenSpec(VideoGrid(3, 5, 7)), {}, None),
    "one frame": (TokenSpec(VideoGrid(1, 7, 11)), {"order": "tile", "tile": (1, 4, 4)}, None),
    "text first": (TokenSpec(VideoGrid(2, 5, 9), 21, True), {}, (4, 18)),
    "text last": (TokenSpec(VideoGrid(4, 4, 6), 5), {"order": "token"}, (5, 2)),
}


def make(variant, **fields):
    return get_method("sla", **{"variant": variant, "block_size": BLOCK, "density": 0.3, **fields})


def learned(method, heads=2, dim=DIM, dtype=torch.float64):
    """Weights of a layer that are nothing like those at the start."""
    weights = method.make_weights(heads, dim).to(dtype)
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return weights


def inputs(spec, real_text=None, batch=2, heads=2, dtype=torch.float64):
    q, k, v = torch.randn(3, batch, heads, spec.num_tokens, DIM, dtype=dtype)
    padding = None
    if real_text is not None:
        padding = torch.zeros(batch, spec.num_tokens, dtype=torch.bool)
        for sample, real in enumerate(real_text):
            padding[sample, spec.text.start + real : spec.text.stop] = True
    return q, k, v, AttentionCall(spec, key_padding=padding, scale=0.4)


def blocks_of(method, spec):
    """The tokens of each block: the video in the method's order, then the text."""
    order = token_order(spec.grid, method.order, method.tile) + spec.video.start
    text = torch.arange(spec.text.start, spec.text.stop)
    return list(order.split(BLOCK)), list(text.split(BLOCK)) if len(text) else []


def classes(method, q, k, spec):
    """Split the key blocks of each query block of one head into critical, marginal and negligible ones, by token."""
    video, text = blocks_of(method, spec)
    mean = torch.cat([k[tokens] for tokens in video]).mean(0)
    critical = torch.zeros(len(q), len(q), dtype=torch.bool)
    negligible = torch.zeros_like(critical)
    for tokens in text:
        critical[tokens] = critical[:, tokens] = True
    for rows in video:
        scores = [float(q[rows].mean(0) @ (k[columns].mean(0) - mean)) for columns in video]
        ranked = sorted(range(len(video)), key=lambda j: -scores[j])
        kept = max(1, math.floor(method.density * len(video) + 0.5))
        dropped = len(video) - max(kept, math.floor((1 - method.negligible) * len(video) + 0.5))
        for place, j in enumerate(ranked):
            critical[rows[:, None], video[j]] |= place < kept
            negligible[rows[:, None], video[j]] |= place >= len(video) - dropped
    return critical, ~critical & ~negligible, negligible


def features(method, weights, x, head, side):
    if method.feature_map == "hedgehog":
        parts = weights.features_q if side == "q" or method.tie else weights.features_k
        x = x @ parts.weight[head].T
        return torch.cat([torch.softmax(x, -1), torch.softmax(-x, -1)], -1)
    return {"softmax": lambda: torch.softmax(x, -1), "elu": lambda: F.elu(x) + 1, "relu": x.relu}[method.feature_map]()


def definition(method, q, k, v, call, weights):
    """Attention of the papers, from the maps of all tokens."""
    out = torch.empty_like(v)
    for b in range(q.shape[0]):
        real = torch.ones(q.shape[2], dtype=torch.bool) if call.key_padding is None else ~call.key_padding[b]
        for h in range(q.shape[1]):
            queries, keys, values = q[b, h], k[b, h], v[b, h]
            pooled = queries, keys
            if method.variant == "sla2":
                pooled = queries @ weights.router_q.weight.T, keys @ weights.router_k.weight.T
            critical, marginal, negligible = classes(method, *pooled, call.tokens)
            covered = {"paper": marginal, "full": torch.ones_like(critical)}.get(method.variant, ~critical) & real
            assert negligible.any() and not (negligible & critical).any()
            exact = torch.softmax((queries @ keys.T * 0.4).masked_fill(~(critical & real), -torch.inf), -1) @ values
            if method.variant == "sla2":
                keys = keys - keys[real].mean(0)
            sides = features(method, weights, queries, h, "q"), features(method, weights, keys, h, "k")
            weight = (sides[0] @ sides[1].T) * covered
            total = weight.sum(-1, keepdim=True)
            linear_part = torch.where(total > 0, weight @ values / total.where(total > 0, 1), 0)
            some = covered.any(-1, keepdim=True)
            if method.variant == "sla2":
                video = blocks_of(method, call.tokens)[0]
                share = torch.zeros(len(queries), 1, dtype=q.dtype)
                for number, rows in enumerate(video):
                    share[rows] = mixed(weights.mix.logits[h], number, len(video)).sigmoid()
                share = share * some
                out[b, h] = (1 - share) * exact + share * linear_part
            else:
                projected = linear_part @ weights.projection.weight.T + weights.projection.bias
                out[b, h] = exact + projected * some
    return out


def mixed(logits, number, count):
    """The value at a block's middle on the line through the values at the middles of equal parts."""
    place = (number + 0.5) / count * len(logits) - 0.5
    place = min(max(place, 0.0), len(logits) - 1.0)
    low = min(int(place), max(len(logits) - 2, 0))
    high = min(low + 1, len(logits) - 1)
    return logits[low] + (logits[high] - logits[low]) * (place - low)


@pytest.mark.parametrize("case", CALLS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_follow_their_definitions(variant, case, poisoned_empty):
    spec, fields, real_text = CALLS[case]
    method = make(variant, **fields, negligible=0.25, mix_points=3 if variant == "sla2" else 1)
    weights = learned(method)
    q, k, v, call = inputs(spec, real_text)
    out = method.forward(q, k, v, call, MethodState(weights=weights))
    torch.testing.assert_close(out, definition(method, q, k, v, call, weights))


@pytest.mark.parametrize("features", [*MAPS, "tied"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_feature_maps_follow_their_definitions(variant, features):
    fields = {"feature_map": "hedgehog", "tie": True} if features == "tied" else {"feature_map": features}
    method = make(variant, **fields, negligible=0.25)
    weights = learned(method)
    q, k, v, call = inputs(TokenSpec(VideoGrid(2, 5, 9), 6), (6, 1))
    out = method.forward(q, k, v, call, MethodState(weights=weights))
    torch.testing.assert_close(out, definition(method, q, k, v, call, weights))


def test_density_counts_the_exact_part():
    spec = TokenSpec(VideoGrid(4, 8, 8))
    q, k, v, call = inputs(spec)
    for variant in VARIANTS:
        method = make(variant, density=0.25)
        state = MethodState(weights=learned(method))
        method.forward(q, k, v, call, state)
        assert float(state.kept) == 0.25


def test_lowest_blocks_are_negligible_and_critical_ones_never():
    q, k, _, call = inputs(TokenSpec(VideoGrid(4, 8, 8), 3))
    for negligible, density, expected in [(0.1, 0.3, 2), (0.5, 0.3, 8), (0.9, 0.3, 11), (0.9, 1.0, 0), (0.0, 0.3, 0)]:
        pattern = make("paper", negligible=negligible, density=density).pattern(q, k, call, MethodState())
        if expected == 0:
            assert pattern.negligible is None
            continue
        assert (pattern.negligible[..., :16, :].sum(-1) == expected).all()
        assert not pattern.negligible[..., 16:, :].any() and not pattern.negligible[..., 16:].any()
        assert not (pattern.negligible & pattern.mask.to_dense()).any()
    assert make("sla1", negligible=0.5).pattern(q, k, call, MethodState()).negligible is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_critical_is_dense(variant):
    q, k, v, call = inputs(*CALLS["text first"][::2])
    method = make(variant, density=1.0)
    weights = learned(method)
    if variant == "full":  # whose linear part covers all tokens whatever is critical
        weights = method.make_weights(2, DIM).double()
    out = method.forward(q, k, v, call, MethodState(weights=weights))
    allowed = ~call.key_padding[:, None, None]
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=0.4))


@pytest.mark.parametrize("variant", VARIANTS)
def test_untrained_is_sparse_attention(variant):
    q, k, v, call = inputs(TokenSpec(VideoGrid(3, 5, 7)), dtype=torch.float32)
    method = make(variant)
    exact = method.forward(q, k, v, call, MethodState())
    out = method.forward(q, k, v, call, MethodState(weights=method.make_weights(2, DIM)))
    if variant == "sla2":
        assert 0 < (out - exact).norm() < 0.01 * exact.norm()
    else:
        assert torch.equal(out, exact)


def test_stand_ins_belong_to_the_exact_part():
    q, k, v, call = inputs(TokenSpec(VideoGrid(3, 5, 7)))
    differences = []
    for weights in (None, learned(make("sla1"))):
        plain, compensated = (
            make("sla1", compensate=compensate).forward(q, k, v, call, MethodState(weights=weights))
            for compensate in (None, "mean")
        )
        differences.append(compensated - plain)
    assert differences[0].abs().max() > 0.01
    torch.testing.assert_close(*differences)


def test_padding_reaches_nothing():
    spec = TokenSpec(VideoGrid(2, 5, 9), 21)
    for variant in VARIANTS:
        q, k, v, call = inputs(spec, (4, 18))
        method = make(variant)
        state = MethodState(weights=learned(method))
        out = method.forward(q, k, v, call, state)
        state.refresh = False
        k, v = (x.masked_fill(call.key_padding[:, None, :, None], 1e3) for x in (k, v))
        torch.testing.assert_close(method.forward(q, k, v, call, state), out)


@pytest.mark.parametrize("features", ["softmax", "hedgehog"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_in_double_precision(variant, features):
    method = make(variant, feature_map=features, density=0.4, mix_points=2 if variant == "sla2" else 1)
    weights = learned(method)
    q, k, v, call = inputs(TokenSpec(VideoGrid(2, 4, 7), 3), (1,), batch=1)
    state = MethodState(weights=weights)
    method.resolve(q, k, call, state)
    state.refresh = False
    trained = [parameter for parameter in weights.parameters() if parameter.requires_grad]
    tensors = [x.requires_grad_() for x in (q, k, v)] + trained
    assert torch.autograd.gradcheck(lambda *_: method.forward(q, k, v, call, state), tensors, fast_mode=True)
    method.forward(q, k, v, call, state).square().sum().backward()
    assert all(x.grad.abs().max() > 0 for x in tensors)


@pytest.mark.parametrize("variant", VARIANTS)
def test_untrained_weights_get_gradients(variant):
    method = make(variant)
    weights = method.make_weights(2, DIM)
    q, k, v, call = inputs(TokenSpec(VideoGrid(2, 4, 7)), dtype=torch.float32)
    method.forward(q, k, v, call, MethodState(weights=weights)).square().sum().backward()
    trained = dict(weights.named_parameters())
    fixed = {name for name, parameter in trained.items() if not parameter.requires_grad}
    assert fixed == ({"router_q.weight", "router_k.weight"} if variant == "sla2" else set())
    assert all(trained[name].grad.abs().max() > 0 for name in trained.keys() - fixed)


@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_is_as_good_as_eager(variant):
    spec = TokenSpec(VideoGrid(3, 8, 10))
    method = make(variant)
    weights = learned(method, dtype=torch.float32)
    q, k, v, call = (x.bfloat16() if isinstance(x, torch.Tensor) else x for x in inputs(spec))
    state = MethodState(weights=weights)
    out = method.forward(q, k, v, call, state)
    assert out.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in weights.parameters())
    exact = [x.double() for x in (q, k, v)]
    state.refresh = False
    wanted = method.forward(*exact, call, state)
    # the two parts, their features and their sum are each rounded to 8 bits
    assert (out - wanted).abs().max() <= 4 * 2**-8 * wanted.abs().max()


@pytest.mark.parametrize("covered", ["some", "all"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_linear_attention_is_a_registered_operator(covered, dtype):
    q, k = torch.rand(2, 2, 2, 11, 3, dtype=torch.float64).to(dtype)
    v = torch.randn(2, 2, 11, 2, dtype=torch.float64).to(dtype)
    blocks = None if covered == "all" else torch.rand(1, 2, 3, 3) < 0.5
    lengths = torch.tensor([4, 0, 2], dtype=torch.int32).view(1, 1, 3)
    arguments = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(linear_attention, (*arguments, blocks, lengths, 4))
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda *x: linear_attention(*x, blocks, lengths, 4), arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_attention_adds_up_in_single_precision(dtype, monkeypatch):
    """The sums do not get worse with length, under autocast, or with the number of heads that run at once."""
    q, k = torch.rand(2, 1, 2, 2000, 8).to(dtype)
    v = (torch.randn(1, 2, 2000, 8) + 3).to(dtype)
    lengths = torch.full((1, 1, 125), 16, dtype=torch.int32)
    blocks = torch.rand(1, 2, 125, 125) < 0.8
    out = linear_attention(q, k, v, blocks, lengths, 16)
    weight = (q.double() @ k.double().mT) * blocks.repeat_interleave(16, 2).repeat_interleave(16, 3)
    wanted = weight @ v.double() / weight.sum(-1, keepdim=True)
    # the output is rounded to 8 bits; sums in bf16 would be off by more than ten times as much
    assert ((out - wanted) / wanted).abs().max() <= (2**-8 if dtype == torch.bfloat16 else 0) + 1e-6
    monkeypatch.setattr(linear, "_STATE_BYTES", 1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(linear_attention(q, k, v, blocks, lengths, 16), out)


def test_a_router_decides_what_is_critical():
    q, k, _, call = inputs(TokenSpec(VideoGrid(4, 8, 8)))
    method = make("sla2")
    weights = method.make_weights(2, DIM).double()
    plain, started = (method.pattern(q, k, call, MethodState(weights=w)).mask.to_dense() for w in (None, weights))
    assert torch.equal(plain, started)
    weights.router_q.weight.neg_()
    turned = method.pattern(q, k, call, MethodState(weights=weights)).mask.to_dense()
    opposite = method.pattern(-q, k, call, MethodState()).mask.to_dense()
    assert torch.equal(turned, opposite) and not torch.equal(turned, plain)


def test_a_projection_outlives_the_module_on_its_device():
    """Where a model is offloaded, parameters are gone from the device when the module has been called."""
    module = make("paper").make_weights(2, DIM).projection
    found = module(torch.empty(1, dtype=torch.float32))
    with torch.no_grad():
        module.weight.fill_(7)
        module.bias.fill_(7)
    assert all((x == 0).all() for x in found)


def test_weights_of_a_file_need_a_model():
    q, k, v, call = inputs(TokenSpec(VideoGrid(2, 4, 8)))
    with pytest.raises(ValueError, match=r"weights in file\.safetensors are loaded when sparse attention is enabled"):
        make("paper", weights="file.safetensors").forward(q, k, v, call, MethodState())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "sla3"}, "variant must be one of paper, sla1, full, sla2, got 'sla3'"),
        ({"feature_map": "exp"}, "feature_map must be one of softmax, elu, relu, hedgehog, got 'exp'"),
        ({"negligible": 1.0}, r"negligible must be in \[0, 1\), got 1.0"),
        ({"negligible": -0.1}, "negligible must be"),
        ({"tie": True}, "tie=True needs feature_map='hedgehog', got 'softmax'"),
        ({"mix_points": 0, "variant": "sla2"}, "mix_points must be a whole number of at least 1, got 0"),
        ({"mix_points": 4}, "mix_points belongs to the mix of variant 'sla2', got variant 'paper'"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        get_method("sla", **fields)
