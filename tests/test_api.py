"""The public surface: handle, errors, presets, the methods of pipelines."""

import copy
import json
import subprocess
import sys
import warnings
from types import SimpleNamespace

import diffusers
import pytest
import tiny
import torch
import torch.nn.functional as F

import fastdit
from fastdit.attention.kernels import fa4
from fastdit.attention.kernels.triton import kernel as triton_attention
from fastdit.report import summary


@pytest.fixture
def model():
    return tiny.transformer("wan")


def forward(model):
    with torch.no_grad():
        return model(**tiny.arguments("wan")).sample


def is_stock(model):
    return "_fastdit" not in model.__dict__ and not model._forward_pre_hooks and not model._forward_hooks


def test_attached_to_pipelines_and_usable_by_any_of_them():
    pipe = tiny.pipeline("wan")
    assert pipe.sparse_attention is None
    handle = pipe.enable_sparse_attention("draft", density=0.5)
    assert isinstance(handle, fastdit.SparseAttention) and pipe.sparse_attention is handle
    assert fastdit.find_sparse_attention(pipe.transformer) is handle
    pipe.disable_sparse_attention()
    assert pipe.sparse_attention is None
    assert diffusers.DiffusionPipeline().sparse_attention is None


def test_attached_when_fastdit_comes_first():
    code = (
        "import sys, fastdit; assert 'torch' not in sys.modules; from diffusers import DiffusionPipeline as Pipe;"
        "assert Pipe.enable_sparse_attention and Pipe.disable_sparse_attention and Pipe.sparse_attention;"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there():
    for name in fastdit.__all__:
        assert getattr(fastdit, name) is not None
    assert fastdit.mask.BlockMask is fastdit.BlockMask
    with pytest.raises(AttributeError, match="no attribute 'enable_sparse'"):
        _ = fastdit.enable_sparse


def test_handle_counts():
    pipe = tiny.pipeline("wan")
    schedule = fastdit.Schedule(warmup_steps=1, tail_steps=1, dense_layers=(-1,))
    handle = pipe.enable_sparse_attention(**tiny.DRAFT, schedule=schedule)
    assert handle.density is None and handle.overall_density is None and handle.attention_seconds == 0
    assert "No attention call so far" in handle.summary()
    tiny.run(pipe, steps=4)
    report = json.loads(json.dumps(handle.report()))
    assert report["method"] == {
        "name": "draft",
        "compensate": "mean",
        "density": 0.4,
        "tile": [1, 4, 4],
        "per_row": True,
        "parts": 8,
    }
    assert report["schedule"]["warmup_steps"] == 1
    first, last = report["layers"]
    assert first["layer"] == "blocks.0.attn1" and first["calls"] == 8 and first["sparse_calls"] == 4
    assert first["dense"] == {"warm-up step": 2, "tail step": 2}
    assert last["dense"] == {"dense layer": 8} and last["density"] is None
    assert report["totals"]["calls"] == 16 and report["totals"]["sparse_calls"] == 4
    assert handle.density == pytest.approx(first["density"])
    assert handle.overall_density == pytest.approx((4 * first["density"] + 12) / 16)
    assert 0 < handle.attention_seconds < 60
    assert handle.attention_seconds == pytest.approx(
        sum(layer["sparse_seconds"] + layer["dense_seconds"] for layer in report["layers"])
    )
    summary = handle.summary()
    for text in (
        "draft (compensate=mean, density=0.4",
        "blocks.1.attn1",
        "8 dense layer",
        "2 warm-up step",
        f"{handle.density:.1%}",
    ):
        assert text in summary
    handle.reset()
    assert handle.density is None and pipe.sparse_attention is handle
    tiny.run(pipe, steps=4)
    assert handle.report()["totals"]["calls"] == 16
    handle.disable()
    assert pipe.sparse_attention is None and handle.report()["totals"]["calls"] == 16


def test_measured_density_is_that_of_the_patterns(model):
    handle = fastdit.enable_sparse_attention(model, "radial")
    forward(model)
    expected = fastdit.pattern("radial", grid=(3, 8, 8)).density
    assert handle.density == pytest.approx(expected, rel=1e-5)


def test_enabling_again_replaces(model):
    expected = forward(model)
    first = fastdit.enable_sparse_attention(model, **tiny.DRAFT)
    second = fastdit.enable_sparse_attention(model, "dense")
    assert torch.equal(forward(model), expected)
    assert first.report()["totals"]["calls"] == 0 and second.report()["totals"]["calls"] == 2
    first.disable()
    assert fastdit.find_sparse_attention(model) is second
    second.disable()
    assert is_stock(model) and torch.equal(forward(model), expected)


def test_context_manager(model):
    expected = forward(model)
    with fastdit.sparse_attention(model, **tiny.DRAFT) as handle:
        assert not torch.equal(forward(model), expected)
    assert is_stock(model) and handle.density is not None
    with pytest.raises(ZeroDivisionError), fastdit.sparse_attention(model, **tiny.DRAFT):
        _ = 1 / 0
    assert is_stock(model)


def test_wrapped_transformers_are_unwrapped(model):
    for wrapped in (torch.compile(model, backend="eager"), torch.nn.DataParallel(model)):
        handle = fastdit.enable_sparse_attention(wrapped, **tiny.DRAFT)
        assert fastdit.find_sparse_attention(model) is handle is fastdit.find_sparse_attention(wrapped)
        fastdit.disable_sparse_attention(wrapped)
        assert is_stock(model)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"method": "drft"}, ValueError, "did you mean 'draft'"),
        ({"method": "draft", "densty": 0.2}, TypeError, "did you mean 'density'"),
        ({"method": "draft", "density": 25}, ValueError, "write 0.25 to keep 25 %"),
        ({"method": 3}, TypeError, "must be a name, a method, a plan or None"),
        ({"method": tiny.Recorder(), "density": 0.2}, TypeError, "cannot be combined with a method object"),
        ({"method": "draft", "kernel": "magic"}, ValueError, "kernels are: "),
        ({"method": "draft", "schedule": 12}, TypeError, "must be a fastdit.Schedule"),
        (
            {"method": "draft", "schedule": fastdit.Schedule(dense_layers=(2,))},
            ValueError,
            "2 self-attention layers",
        ),
        ({"density": 0}, ValueError, "density must be in"),
    ],
)
def test_bad_input_changes_nothing(model, options, error, match):
    with pytest.raises(error, match=match):
        fastdit.enable_sparse_attention(model, **options)
    assert is_stock(model)
    handle = fastdit.enable_sparse_attention(model, **tiny.DRAFT)
    with pytest.raises(error, match=match):
        fastdit.enable_sparse_attention(model, **options)
    assert fastdit.find_sparse_attention(model) is handle


def test_unknown_models_are_refused_with_a_list():
    with pytest.raises(
        ValueError, match=r"Linear is not a video transformer.*Supported families: wan \(WanTransformer3D"
    ):
        fastdit.enable_sparse_attention(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="SimpleNamespace has no transformer"):
        fastdit.enable_sparse_attention(SimpleNamespace(unet=None))


def test_bare_transformer_with_fractional_warm_up_says_what_to_do(model):
    fastdit.enable_sparse_attention(model, "draft", schedule=fastdit.Schedule(warmup_steps=0.5))
    with pytest.raises(ValueError, match="warmup_steps as a count"):
        forward(model)


def test_a_kernel_that_this_machine_cannot_run_is_refused_at_once(model, monkeypatch):
    monkeypatch.setattr(fa4, "available", lambda: "it is not there")
    with pytest.raises(RuntimeError, match="kernel 'fa4' cannot run: it is not there"):
        fastdit.enable_sparse_attention(model, **tiny.DRAFT, kernel="fa4")
    assert is_stock(model)
    elsewhere = tiny.transformer("wan").to("meta")
    assert fastdit.enable_sparse_attention(elsewhere, **tiny.DRAFT, kernel="fa4").report()["kernel"] == "fa4"


def test_unknown_kernel_failure_reaches_the_user(model, monkeypatch):
    monkeypatch.setattr(triton_attention, "available", lambda: None)
    fastdit.enable_sparse_attention(model, **tiny.DRAFT, kernel="triton")
    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="triton"):
        warnings.simplefilter("error")
        forward(model)


def test_methods_of_both_transformers_are_shown():
    handle = tiny.pipeline("wan22").enable_sparse_attention(**tiny.DRAFT)
    report = handle.report()
    assert report["methods"] == dict.fromkeys(("transformer", "transformer_2"), report["method"])
    assert handle.summary().startswith("Sparse attention: draft (")
    report["methods"]["transformer_2"] = {"name": "radial", "decay": 0.5}
    title = " ".join(summary(report, width=300).split())
    assert "transformer: draft (" in title and "; transformer_2: radial (decay=0.5)" in title


def test_deep_copied_pipeline():
    pipe = tiny.pipeline("wan")
    handle = pipe.enable_sparse_attention(**tiny.DRAFT)
    expected = tiny.run(pipe)
    copied = copy.deepcopy(pipe)
    assert copied.sparse_attention is not handle
    assert torch.equal(tiny.run(copied), expected)
    totals = [found.report()["totals"] for found in (copied.sparse_attention, handle)]
    counts = [{name: value for name, value in each.items() if not name.endswith("seconds")} for each in totals]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("method", ["draft", "radial", "dense"])
@pytest.mark.parametrize("text_first", [False, True])
def test_one_call(method, text_first):
    q, k, v = (torch.randn(2, 3, 2 * 5 * 6 + 4, 16) for _ in range(3))
    options = {"grid": (2, 5, 6), "text_tokens": 4, "text_first": text_first, "method": method}
    out = fastdit.sparse_attention_call(q, k, v, **options)
    assert out.shape == q.shape and out.isfinite().all()
    full = {"draft": {"density": 1.0}, "dense": {}, "radial": None}[method]
    if full is not None:
        out = fastdit.sparse_attention_call(q, k, v, **options, **full)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=1e-4, atol=1e-5)


def test_one_call_with_padding_and_scale():
    q, k, v = (torch.randn(2, 3, 24, 16) for _ in range(3))
    padding = torch.zeros(2, 24, dtype=torch.bool)
    padding[1, 22:] = True
    out = fastdit.sparse_attention_call(
        q, k, v, grid=(1, 4, 5), text_tokens=4, method="draft", density=1.0, scale=0.1, key_padding=padding
    )
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=~padding[:, None, None], scale=0.1)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_pattern():
    pattern = fastdit.pattern("radial", grid=(3, 8, 8), text_tokens=5)
    assert pattern.layout.num_tokens == 197 and 0 < pattern.density <= 1
    q = torch.randn(1, 2, 192, 16)
    assert fastdit.pattern("draft", grid=(3, 8, 8), q=q, k=q, density=0.5, tile=(1, 4, 4)).density < 0.6
    with pytest.raises(ValueError, match="chooses its blocks from queries and keys: give q and k"):
        fastdit.pattern("draft", grid=(3, 8, 8))
    with pytest.raises(ValueError, match="make 192 tokens, but q has 100"):
        fastdit.pattern("draft", grid=(3, 8, 8), q=q[:, :, :100], k=q[:, :, :100])
    with pytest.raises(TypeError, match="cannot be combined"):
        fastdit.pattern(tiny.Recorder(), grid=(3, 8, 8), density=0.5)


def test_one_call_under_autocast():
    q, k, v = (torch.randn(1, 2, 96, 16) for _ in range(3))
    call = {"grid": (3, 4, 8), "method": "adaspa", "block_size": 16, "density": 0.4}
    expected = fastdit.sparse_attention_call(q, k, v, **call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fastdit.sparse_attention_call(q, k, v, **call), expected)
