"""Under ``torch.compile`` there are as many graphs as without us, and no step compiles anything again."""

import pytest
import tiny
import torch
from torch._dynamo.testing import CompileCounter

import fastdit
from fastdit.pipelines.interception.operator import _attention


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_whole(model, counter):
    return torch.compile(model, fullgraph=True, backend=counter)


def compile_in_place(model, counter):
    model.compile(fullgraph=True, backend=counter)
    return model


def compile_blocks(model, counter):
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    return model


def steps(model, kind, timesteps=(900.0, 700.0, 500.0), **options):
    outputs = []
    for timestep in timesteps:
        arguments = tiny.arguments(kind, **options)
        arguments["timestep"] = torch.full_like(arguments["timestep"], timestep)
        with torch.no_grad():
            outputs.append(model(**arguments).sample)
    return outputs


CASES = [
    ("wan", compile_whole),
    ("wan", compile_blocks),
    pytest.param("wan", compile_in_place, marks=pytest.mark.slow),
    pytest.param("vace", compile_whole, marks=pytest.mark.slow),
    pytest.param("cogvideox", compile_whole, marks=pytest.mark.slow),
    pytest.param("hunyuan_video", compile_whole, marks=pytest.mark.slow),
    pytest.param("hunyuan_video", compile_blocks, marks=pytest.mark.slow),
    pytest.param("mochi", compile_whole, marks=pytest.mark.slow),
    pytest.param("ltx", compile_whole, marks=pytest.mark.slow),
    pytest.param("ltx", compile_blocks, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("kind", "compile"), CASES)
def test_stock_graph_count_and_no_recompilation(kind, compile):
    layers = 3 if compile is compile_blocks else 2
    stock = CompileCounter()
    expected_dense = steps(compile(tiny.transformer(kind, layers=layers), stock), kind)[0]
    torch._dynamo.reset()
    schedule = fastdit.Schedule(warmup_steps=1)

    eager = tiny.transformer(kind, layers=layers)
    fastdit.enable_sparse_attention(eager, **tiny.DRAFT, schedule=schedule)
    expected = steps(eager, kind)

    model = tiny.transformer(kind, layers=layers)
    handle = fastdit.enable_sparse_attention(model, **tiny.DRAFT, schedule=schedule)
    counter = CompileCounter()
    compiled = compile(model, counter)
    first, *later = steps(compiled, kind)
    assert counter.frame_count == stock.frame_count
    with torch._dynamo.config.patch(error_on_recompile=True):
        again = steps(compiled, kind)
    torch.testing.assert_close(first, expected_dense)
    torch.testing.assert_close([first, *later], expected)
    torch.testing.assert_close(again, expected)
    totals = handle.report()["totals"]
    assert totals["dense"] == {"warm-up step": totals["calls"] // 3} and not totals["fallbacks"]
    assert totals["calls"] == 6 * len(handle.report()["layers"])


def test_enable_and_disable_on_a_compiled_model():
    counter = CompileCounter()
    model = torch.compile(tiny.transformer("wan"), fullgraph=True, backend=counter)
    stock = steps(model, "wan", (900.0,))
    handle = fastdit.enable_sparse_attention(model, **tiny.DRAFT)
    sparse = steps(model, "wan", (900.0,))
    assert not torch.equal(sparse[0], stock[0])
    assert handle.report()["totals"]["sparse_calls"] == 2
    fastdit.disable_sparse_attention(model)
    assert torch.equal(steps(model, "wan", (900.0,))[0], stock[0])
    assert counter.frame_count <= 3


def test_another_resolution_runs():
    model = tiny.transformer("wan")
    handle = fastdit.enable_sparse_attention(model, **tiny.DRAFT)
    grids = ((3, 8, 8), (2, 4, 6))
    expected = [steps(model, "wan", (900.0,), grid=grid)[0] for grid in grids]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for grid, output in zip(grids, expected, strict=True):
        torch.testing.assert_close(steps(compiled, "wan", (900.0,), grid=grid)[0], output)
    assert not handle.report()["totals"]["fallbacks"]


def gradients(model, seed):
    model.zero_grad()
    arguments = tiny.arguments("wan", grid=(2, 4, 6), seed=seed)
    model(**arguments).sample.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", [tiny.DRAFT, {"method": "sla", "density": 0.5}], ids=["draft", "sla"])
def test_gradients_are_those_of_the_model_as_it_is(method):
    """Attention runs between graphs then, and one layer is compiled for all of them."""
    frames = []
    for layers in (2, 3):
        torch._dynamo.reset()
        model = tiny.transformer("wan", layers=layers)
        handle = fastdit.enable_sparse_attention(model, **method)
        expected = [gradients(model, seed) for seed in (0, 1)]
        counter = CompileCounter()
        model.compile(backend=counter)
        actual = [gradients(model, 0)]
        with torch._dynamo.config.patch(error_on_recompile=True):
            actual.append(gradients(model, 1))
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
        totals = handle.report()["totals"]
        assert totals["sparse_calls"] == totals["calls"] == 4 * layers
        frames.append(counter.frame_count)
    assert frames[0] == frames[1]


def test_a_frozen_model_trains_the_weights_of_the_method():
    model = tiny.transformer("wan", layers=2)
    model.requires_grad_(False)
    handle = fastdit.enable_sparse_attention(model, "sla", density=0.5)
    expected = gradients(model, 0)
    assert expected and all("sparse_attention_weights" in name for name in expected)
    model.compile(backend="eager")
    torch.testing.assert_close(gradients(model, 0), expected, rtol=1e-4, atol=1e-6)
    assert handle.report()["totals"]["sparse_calls"] == 4


def test_gradients_in_one_graph_are_refused_clearly():
    model = tiny.transformer("wan", layers=1)
    fastdit.enable_sparse_attention(model, **tiny.DRAFT)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"leave fullgraph out, or use torch.no_grad"):
        compiled(**tiny.arguments("wan", grid=(1, 4, 4)))


@pytest.mark.slow
def test_pipeline_with_a_compiled_transformer():
    pipe = tiny.pipeline("wan")
    handle = pipe.enable_sparse_attention(**tiny.DRAFT, schedule=fastdit.Schedule(warmup_steps=1))
    expected = tiny.run(pipe)
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="aot_eager")
    assert pipe.sparse_attention is handle
    torch.testing.assert_close(tiny.run(pipe), expected, rtol=1e-4, atol=1e-4)
    pipe.disable_sparse_attention()
    assert pipe.sparse_attention is None


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this torch has no such tag")
def test_no_cuda_graph_records_what_the_operator_does():
    """It differs from step to step, so inductor has to divide its graphs there; it goes by this tag."""
    assert torch.Tag.cudagraph_unsafe in _attention._opoverload.tags
