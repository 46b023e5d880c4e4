"""Mixed precision: weights in fp32 under autocast, where norms leave queries in fp32 and values in the lower dtype."""

import warnings

import pytest
import tiny
import torch
import torch.nn.functional as F

import fastdit
from fastdit.pipelines.families.family import find_family
from fastdit.pipelines.obstacles import as_autocast

BF16, FP16 = torch.bfloat16, torch.float16


def forward(model, kind, dtype=BF16):
    with torch.autocast("cpu", dtype):
        return model(**tiny.arguments(kind, grid=(2, 4, 6))).sample


def attended(model):
    """Collect the dtypes of what self-attentions return."""
    seen = []
    for _, module in find_family(model).self_attentions(model):
        module.register_forward_hook(lambda module, args, out: seen.append(out[0].dtype))
    return seen


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_sparse_as_dense(kind, dtype):
    outputs, dtypes = [], []
    for method in (None, {"method": "dense"}, {"method": "draft", "density": 1.0, "tile": (1, 2, 2)}, tiny.DRAFT):
        model = tiny.transformer(kind)
        seen = attended(model)
        handle = None if method is None else fastdit.enable_sparse_attention(model, **method)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*attention runs dense")
            outputs.append(forward(model, kind, dtype))
        dtypes.append(seen)
        if method not in (None, {"method": "dense"}):
            totals = handle.report()["totals"]
            assert totals["sparse_calls"] == totals["calls"] > 0
    assert torch.equal(outputs[1], outputs[0])
    assert (outputs[2] - outputs[0]).float().norm() <= 0.02 * outputs[0].float().norm()
    assert all(found == dtypes[0] for found in dtypes)
    assert len({output.dtype for output in outputs}) == 1


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_gradients_as_dense(kind):
    gradients = []
    for method in (None, {"method": "draft", "density": 1.0, "tile": (1, 2, 2)}):
        model = tiny.transformer(kind).train()
        if method is not None:
            handle = fastdit.enable_sparse_attention(model, **method)
        forward(model, kind).float().square().mean().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        gradients.append(torch.cat([found[name].flatten() for name in sorted(found)]))
    assert handle.report()["totals"]["sparse_calls"] > 0
    assert (gradients[1] - gradients[0]).norm() <= 0.03 * gradients[0].norm()


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_weights_of_a_method_learn(kind):
    model = tiny.transformer(kind).train()
    handle = fastdit.enable_sparse_attention(model, "sla", density=0.3, block_size=16)
    forward(model, kind).float().square().mean().backward()
    totals = handle.report()["totals"]
    assert totals["sparse_calls"] == totals["calls"]
    learned = {name: p.grad for name, p in model.named_parameters() if name.startswith("sparse_attention_weights")}
    assert learned and all(grad is not None and grad.isfinite().all() for grad in learned.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wan", "hunyuan_video"])
def test_compiled(kind):
    torch._dynamo.reset()
    model = tiny.transformer(kind)
    handle = fastdit.enable_sparse_attention(model, **tiny.DRAFT)
    with torch.no_grad():
        expected = forward(model, kind)
        found = forward(torch.compile(model, fullgraph=True, backend="aot_eager"), kind)
    torch._dynamo.reset()
    assert found.dtype == expected.dtype and not handle.report()["totals"]["fallbacks"]
    assert (found - expected).float().norm() <= 0.02 * expected.float().norm()


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (FP16, torch.float32, BF16), (torch.float64,) * 3])
@pytest.mark.parametrize("enabled", [True, False])
def test_casts_are_those_of_pytorch(dtypes, enabled):
    q, k, v = (torch.randn(1, 2, 8, 16, dtype=torch.float32).to(dtype).requires_grad_() for dtype in dtypes)
    with torch.autocast("cpu", BF16, enabled=enabled):
        cast = as_autocast(q, k, v)
        if enabled:
            assert {x.dtype for x in cast} == {F.scaled_dot_product_attention(q, k, v).dtype}
        else:
            assert all(mine is theirs for mine, theirs in zip(cast, (q, k, v), strict=True))
    meta = torch.empty(1, 2, 8, 16, device="meta")
    assert as_autocast(meta, meta, meta) == (meta,) * 3
