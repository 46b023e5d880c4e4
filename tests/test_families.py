"""Every family on real diffusers classes with tiny random weights: intercepted wholly, and given back exactly."""

import copy

import pytest
import tiny
import torch

import fastdit
from fastdit.pipelines import find_family


def forward(model, kind, **options):
    with torch.no_grad():
        return model(**tiny.arguments(kind, **options)).sample


@pytest.fixture(params=tiny.KINDS)
def kind(request):
    return request.param


@pytest.fixture
def model(kind):
    return tiny.transformer(kind)


def test_every_self_attention_is_reached_once(model, kind):
    recorder = tiny.Recorder()
    handle = fastdit.enable_sparse_attention(model, recorder)
    forward(model, kind)
    layers = find_family(model).self_attentions(model)
    expected = {"vace": 3}.get(kind, 2)
    assert len(layers) == expected
    assert sorted(call.layer for call in recorder.calls) == list(range(expected))
    assert {call.num_layers for call in recorder.calls} == {expected}
    assert [layer["sparse_calls"] for layer in handle.report()["layers"]] == [1] * expected


def test_tokens_are_read_off_the_call(model, kind):
    recorder = tiny.Recorder()
    fastdit.enable_sparse_attention(model, recorder)
    forward(model, kind, grid=(2, 5, 7))
    tokens = recorder.calls[0].tokens
    assert tokens.grid == fastdit.VideoGrid(2, 5, 7)
    assert tokens.text_first == kind.startswith("cogvideox")
    # the only sample has seven real text tokens; Mochi's processor drops the others
    assert tokens.text_tokens == {"hunyuan_video": 12, "mochi": 7, "cogvideox": 12, "cogvideox15": 12}.get(kind, 0)


def test_padded_text_is_marked(model, kind):
    recorder = tiny.Recorder()
    fastdit.enable_sparse_attention(model, recorder)
    forward(model, kind, batch=2)
    for call in recorder.calls:
        if kind == "hunyuan_video":
            padded = torch.zeros(2, 204, dtype=torch.bool)
            padded[1, 192 + 7 :] = True
            assert torch.equal(call.key_padding, padded)
            assert call.key_padding is recorder.calls[0].key_padding
        else:
            assert call.key_padding is None


def test_dense_method_is_bit_identical(model, kind):
    expected = forward(model, kind, batch=2)
    handle = fastdit.enable_sparse_attention(model, "dense")
    assert torch.equal(forward(model, kind, batch=2), expected)
    assert handle.report()["totals"]["sparse_calls"] == 0
    assert handle.overall_density == 1


def test_scheduled_dense_step_is_bit_identical(model, kind):
    expected = forward(model, kind, batch=2)
    handle = fastdit.enable_sparse_attention(model, **tiny.DRAFT, schedule=fastdit.Schedule(warmup_steps=1))
    assert torch.equal(forward(model, kind, batch=2), expected)
    assert set(handle.report()["totals"]["dense"]) == {"warm-up step"}


@pytest.mark.parametrize("grid", [(3, 8, 8), (2, 5, 7), (1, 3, 3)])
def test_full_density_is_dense(model, kind, grid):
    expected = forward(model, kind, grid=grid, batch=2)
    for options in ({"method": "draft", "density": 1.0, "tile": (1, 4, 4)},):
        fastdit.enable_sparse_attention(model, **options)
        torch.testing.assert_close(forward(model, kind, grid=grid, batch=2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grid", [(3, 8, 8), (2, 5, 7)])
def test_sparse_leaves_something_out(model, kind, grid):
    expected = forward(model, kind, grid=grid, batch=2)
    handle = fastdit.enable_sparse_attention(model, **tiny.DRAFT)
    out = forward(model, kind, grid=grid, batch=2)
    assert out.isfinite().all()
    assert not torch.allclose(out, expected, atol=1e-5)
    assert 0.1 < handle.density < 0.95
    assert handle.density == handle.overall_density
    assert not handle.report()["totals"]["fallbacks"]


def test_static_method_runs(model, kind):
    handle = fastdit.enable_sparse_attention(model, "radial")
    assert forward(model, kind, batch=2).isfinite().all()
    assert handle.report()["totals"]["dense"] == {}
    assert 0 < handle.density <= 1


def test_disable_restores_everything(model, kind):
    expected = forward(model, kind)
    processors = [module.processor for _, module in find_family(model).self_attentions(model)]
    before = dict(model.__dict__)
    hooks = [(set(m._forward_pre_hooks), set(m._forward_hooks)) for m in model.modules()]
    handle = fastdit.enable_sparse_attention(model, **tiny.DRAFT)
    forward(model, kind)
    fastdit.disable_sparse_attention(model)
    after = [module.processor for _, module in find_family(model).self_attentions(model)]
    assert all(a is b for a, b in zip(after, processors, strict=True))
    assert model.__dict__.keys() == before.keys()
    assert [(set(m._forward_pre_hooks), set(m._forward_hooks)) for m in model.modules()] == hooks
    assert torch.equal(forward(model, kind), expected)
    assert handle.report()["totals"]["calls"] == len(processors)
    fastdit.disable_sparse_attention(model)


def test_two_resolutions_in_a_row(model, kind):
    grids = ((3, 8, 8), (2, 4, 6), (3, 8, 8))
    fresh = []
    for grid in grids:
        with fastdit.sparse_attention(model, **tiny.DRAFT):
            fresh.append(forward(model, kind, grid=grid))
    fastdit.enable_sparse_attention(model, **tiny.DRAFT, schedule=fastdit.Schedule(refresh_steps=100))
    for grid, expected in zip(grids, fresh, strict=True):
        assert torch.equal(forward(model, kind, grid=grid), expected)


def test_two_models_at_once(model, kind):
    other = tiny.transformer(kind, seed=1)
    alone = []
    for each in (model, other):
        with fastdit.sparse_attention(each, **tiny.DRAFT):
            alone.append(forward(each, kind))
    first = fastdit.enable_sparse_attention(model, **tiny.DRAFT)
    second = fastdit.enable_sparse_attention(other, **tiny.DRAFT)
    assert torch.equal(forward(model, kind), alone[0])
    assert torch.equal(forward(other, kind), alone[1])
    fastdit.disable_sparse_attention(other)
    assert torch.equal(forward(model, kind), alone[0])
    assert first.report()["totals"]["calls"] == 2 * second.report()["totals"]["calls"]


def test_deep_copy_runs_sparse_on_its_own(model, kind):
    stock = forward(model, kind)
    handle = fastdit.enable_sparse_attention(model, **tiny.DRAFT)
    expected = forward(model, kind)
    copied = copy.deepcopy(model)
    calls = handle.report()["totals"]["calls"]
    assert torch.equal(forward(copied, kind), expected)
    assert handle.report()["totals"]["calls"] == calls
    other = fastdit.find_sparse_attention(copied)
    assert other is not None and other is not handle and other is fastdit.find_sparse_attention(copied)
    assert other.report()["totals"]["calls"] == calls
    fastdit.disable_sparse_attention(copied)
    assert torch.equal(forward(copied, kind), stock)
    assert torch.equal(forward(model, kind), expected)
    fastdit.disable_sparse_attention(model)
    assert torch.equal(forward(model, kind), stock)


def test_save_and_load_give_a_stock_model(model, kind, tmp_path):
    expected = forward(model, kind)
    fastdit.enable_sparse_attention(model, **tiny.DRAFT)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert fastdit.find_sparse_attention(loaded) is None
    assert not any("Sparse" in type(m.processor).__name__ for _, m in find_family(loaded).self_attentions(loaded))
    torch.testing.assert_close(forward(loaded, kind), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["draft", "radial"])
def test_gradients_flow(model, kind, method):
    fields = {"draft": {"density": 1.0, "tile": (1, 4, 4)}, "radial": {}}[method]
    fastdit.enable_sparse_attention(model, method, **fields)
    model.zero_grad()
    model(**tiny.arguments(kind, grid=(2, 4, 4))).sample.square().mean().backward()
    sparse = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    fastdit.disable_sparse_attention(model)
    model.zero_grad()
    model(**tiny.arguments(kind, grid=(2, 4, 4))).sample.square().mean().backward()
    dense = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert sparse.keys() == dense.keys() and any("to_q" in name for name in sparse)
    for name, grad in sparse.items():
        assert grad.isfinite().all(), name
        if method == "draft":
            torch.testing.assert_close(grad, dense[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_pipeline(name):
    pipe = tiny.pipeline(name)
    expected = tiny.run(pipe)
    handle = pipe.enable_sparse_attention("dense")
    assert torch.equal(tiny.run(pipe), expected)
    handle = pipe.enable_sparse_attention(**tiny.DRAFT, schedule=fastdit.Schedule(warmup_steps=1))
    out = tiny.run(pipe)
    assert out.isfinite().all() and not torch.equal(out, expected)
    totals = handle.report()["totals"]
    assert totals["dense"] == {"warm-up step": totals["calls"] // 3} and not totals["fallbacks"]
    assert handle.density < 0.6 and handle.overall_density == pytest.approx((1 + 2 * handle.density) / 3)
    assert torch.equal(tiny.run(pipe), out)
    pipe.disable_sparse_attention()
    assert torch.equal(tiny.run(pipe), expected)


def test_two_transformers_share_one_run():
    pipe = tiny.pipeline("wan22")
    recorder = tiny.Recorder()
    handle = pipe.enable_sparse_attention(recorder, schedule=fastdit.Schedule(warmup_steps=2))
    tiny.run(pipe, steps=4)
    assert {call.step for call in recorder.calls} == {2, 3}
    calls = {layer["transformer"]: layer["calls"] for layer in handle.report()["layers"]}
    assert all(calls[title] > 0 for title in ("transformer", "transformer_2"))
    assert sum(layer["calls"] for layer in handle.report()["layers"]) == 4 * 2 * 2


def test_ltx_without_a_grid_says_so():
    model = tiny.transformer("ltx")
    arguments = tiny.arguments("ltx")
    coordinates = torch.rand(1, 3, 192)
    arguments |= {"num_frames": None, "height": None, "width": None, "video_coords": coordinates}
    with torch.no_grad():
        expected = model(**arguments).sample
        handle = fastdit.enable_sparse_attention(model, **tiny.DRAFT)
        with pytest.warns(UserWarning, match="video_coords"):
            out = model(**arguments).sample
    assert torch.equal(out, expected)
    (reason,) = handle.report()["totals"]["fallbacks"]
    assert "video_coords" in reason and "video_coords" in handle.summary()


def test_extra_tokens_say_so():
    model = tiny.transformer("ltx")
    arguments = tiny.arguments("ltx") | {"num_frames": 2, "video_coords": torch.rand(1, 3, 192)}
    fastdit.enable_sparse_attention(model, **tiny.DRAFT)
    with torch.no_grad(), pytest.warns(UserWarning, match="192 tokens, but a video of 2x8x8 has 128"):
        model(**arguments)


def test_list_families():
    assert fastdit.list_families() == ("wan", "cogvideox", "hunyuan_video", "mochi", "ltx")


def test_subclass_is_known():
    class Mine(type(tiny.transformer("wan"))):
        pass

    model = tiny.transformer("wan")
    model.__class__ = Mine
    recorder = tiny.Recorder()
    fastdit.enable_sparse_attention(model, recorder)
    forward(model, "wan")
    assert len(recorder.calls) == 2
