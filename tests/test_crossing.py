"""Tokens that are put into the order of the method once for all layers, and what keeps them from it."""

import copy
import functools

import pytest
import tiny
import torch
from diffusers.hooks import HookRegistry, ModelHook

import fastdit
from fastdit.attention import Pattern
from fastdit.layout import TokenLayout
from fastdit.pipelines import order_once as crossing
from fastdit.pipelines.interception import hooks
from fastdit.pipelines.interception.installation import installed
from fastdit.pipelines.order_once import PLACES, Crossing
from fastdit.schedule import Schedule

KINDS = ("wan", "wan_i2v", "ltx")
GRID = (3, 9, 7)
METHODS = {
    "radial": {"method": "radial", "order": "curve", "block_size": 16, "min_band": 1},
    "adaspa": {"method": "adaspa", "order": "tile", "block_size": 16, "density": 0.3},
    "sla": {"method": "sla", "order": "token", "block_size": 32, "density": 0.3},
    "draft": {"method": "draft", "tile": (1, 3, 7), "density": 0.4},  # tiles of 21 tokens, blocks of 32: gaps
    "draft, whole tiles": {"method": "draft", "tile": (1, 4, 4), "density": 0.4},
    "draft, means": {"method": "draft", "tile": (1, 2, 8), "density": 0.4, "compensate": "mean", "parts": 4},
}
GRIDS = {"draft, whole tiles": (3, 4, 8), "draft, means": (2, 4, 16)}
WITH_GAPS = ("draft",)


def forward(model, kind, grid=GRID, **changes):
    with torch.no_grad():
        return model(**{**tiny.arguments(kind, grid=grid, batch=2), **changes}).sample


def crossed(model):
    """Where tokens were put into order, and back, in the latest forward pass."""
    return installed(model).runtime.forward.crossed


@pytest.fixture
def in_every_layer(monkeypatch):
    """A function that makes forward passes keep the model's order from then on."""
    return lambda: monkeypatch.setattr(hooks, "order_once", lambda *arguments: None)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_once_is_as_good_as_in_every_layer(kind, name, in_every_layer, monkeypatch):
    model, grid = tiny.transformer(kind, layers=3), GRIDS.get(name, GRID)
    fastdit.enable_sparse_attention(model, **METHODS[name], schedule=Schedule(dense_layers=(1,)))
    copies = []
    apply = TokenLayout.apply
    monkeypatch.setattr(TokenLayout, "apply", lambda self, x: copies.append(not self.identity) or apply(self, x))
    found = [forward(model, kind, grid, timestep=torch.full((2,), float(t))) for t in (900, 500)]
    once = name not in WITH_GAPS
    assert crossed(model) == (list(PLACES) if once else [])
    assert any(copies) is not once
    in_every_layer()
    installed(model).runtime.forget()
    expected = [forward(model, kind, grid, timestep=torch.full((2,), float(t))) for t in (900, 500)]
    assert crossed(model) == [] and any(copies)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_patterns_are_those_of_raster_order():
    """The same blocks of the same tokens, so that nothing but the way there differs."""
    model = tiny.transformer("wan")
    fastdit.enable_sparse_attention(model, **METHODS["radial"])
    forward(model, "wan")
    state = installed(model).runtime.layers[0].memories[0].state
    (pattern,) = (entry for entry in state.cache.entries.values() if isinstance(entry, Pattern))
    expected = fastdit.pattern(grid=GRID, **METHODS["radial"])
    assert pattern.layout.identity and not expected.layout.identity
    assert torch.equal(pattern.mask.to_dense(), expected.mask.to_dense())


def check_left_alone(model, kind="wan", grid=GRID, **changes):
    forward(model, kind, grid, **changes)
    assert crossed(model) == []
    assert fastdit.find_sparse_attention(model).report()["totals"]["sparse_calls"] > 0


def test_not_with_control_tokens():
    model = tiny.transformer("vace")
    fastdit.enable_sparse_attention(model, **METHODS["radial"])
    check_left_alone(model, "vace")


def test_not_with_time_for_each_token():
    model = tiny.transformer("wan")
    fastdit.enable_sparse_attention(model, **METHODS["radial"])
    check_left_alone(model, timestep=torch.full((2, 3 * 9 * 7), 500.0))


def test_not_while_training():
    model = tiny.transformer("wan")
    fastdit.enable_sparse_attention(model, **METHODS["radial"])
    model(**tiny.arguments("wan", grid=GRID)).sample.sum().backward()
    assert crossed(model) == []


def test_not_with_a_cache_over_steps():
    from diffusers import FirstBlockCacheConfig

    model = tiny.transformer("wan")
    model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    fastdit.enable_sparse_attention(model, **METHODS["radial"])
    with torch.no_grad(), model.cache_context("cond"):
        model(**tiny.arguments("wan", grid=GRID))
    assert crossed(model) == []


@pytest.mark.parametrize("on", ["class", "model"])
def test_not_with_another_forward(on, monkeypatch):
    model = tiny.transformer("wan")
    stock = type(model).forward

    def another(self, *args, **kwargs):
        return stock(self, *args, **kwargs)

    if on == "class":
        monkeypatch.setattr(type(model), "forward", another)
    else:
        model.forward = another.__get__(model)
    fastdit.enable_sparse_attention(model, **METHODS["radial"])
    check_left_alone(model)


@pytest.mark.parametrize("target", ["proj_out", "to_q"])
def test_with_adapters_that_come_later(target):
    """An adapter that wraps the way out would add tokens in one order to tokens in another."""
    from peft import LoraConfig

    results = []
    for later in (False, True):
        model = tiny.transformer("wan")
        for change in (1, 0) if later else (0, 1):
            if change:
                fastdit.enable_sparse_attention(model, **METHODS["radial"])
            else:
                torch.manual_seed(3)
                model.add_adapter(LoraConfig(r=2, target_modules=[target], init_lora_weights=False))
        results.append(forward(model, "wan"))
        assert bool(crossed(model)) is not (later and target == "proj_out")
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def test_with_offload():
    import accelerate

    model = tiny.transformer("wan")
    fastdit.enable_sparse_attention(model, **METHODS["radial"])
    expected = forward(model, "wan")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(forward(model, "wan"), expected) and crossed(model) == list(PLACES)


def test_steps_that_are_all_dense_are_exact():
    pipe = tiny.pipeline("wan")
    schedule = Schedule(warmup_steps=2)
    tokens = []
    with fastdit.sparse_attention(pipe, **METHODS["radial"], schedule=schedule):
        pipe.transformer.register_forward_hook(lambda *arguments: tokens.append(list(crossed(pipe.transformer))))
        tiny.run(pipe, steps=4)
    passes = len(tokens) // 4
    assert tokens == 2 * passes * [[]] + 2 * passes * [list(PLACES)]


@pytest.mark.parametrize("regional", [False, True])
def test_compiled_graphs_order_in_every_layer(regional):
    model = tiny.transformer("wan")
    fastdit.enable_sparse_attention(model, **METHODS["radial"])
    expected = forward(model, "wan")
    if regional:
        model.compile_repeated_blocks(backend="eager")
    else:
        model.compile(backend="eager")
    torch.testing.assert_close(forward(model, "wan"), expected, rtol=1e-4, atol=1e-5)
    assert crossed(model) == (list(PLACES) if regional else [])


def test_copies_cross_by_themselves():
    model = tiny.transformer("wan")
    fastdit.enable_sparse_attention(model, **METHODS["radial"])
    expected = forward(model, "wan")
    copied = copy.deepcopy(model)
    fastdit.disable_sparse_attention(model)
    assert not any(isinstance(h, Crossing) for m in model.modules() for h in m._forward_hooks.values())
    assert torch.equal(forward(copied, "wan"), expected) and crossed(copied) == list(PLACES)
    assert installed(copied).runtime is not None and not torch.equal(forward(model, "wan"), expected)


@pytest.fixture
def unseen(monkeypatch):
    """Let others go unnoticed, as code that hides behind the stock classes might."""
    monkeypatch.setattr(crossing, "watched", lambda transformer, ours: False)


def test_tokens_that_do_not_come_back_are_an_error(unseen):
    model = tiny.transformer("wan")
    fastdit.enable_sparse_attention(model, **METHODS["radial"])
    forward(model, "wan")

    def twice(module, args, output):
        model.proj_out(output)

    model.norm_out.register_forward_hook(twice)
    with pytest.raises(RuntimeError, match="put into order by rotary, entry, exit, exit, not once by each"):
        forward(model, "wan")


def test_tokens_that_are_not_those_of_the_grid_are_an_error(unseen):
    model = tiny.transformer("wan")
    fastdit.enable_sparse_attention(model, **METHODS["radial"])
    model.proj_out.register_forward_hook(lambda module, args, out: out[:, 1:], prepend=True)
    with pytest.raises(RuntimeError, match="has 188 tokens at its exit and rotary embeddings for 189"):
        forward(model, "wan")


def blocks_of(model):
    return model.blocks if hasattr(model, "blocks") else model.transformer_blocks


class Reader(torch.nn.Module):
    """A layer of somebody else's, in place of one of the model's."""

    def __init__(self, inner, seen):
        super().__init__()
        self.inner, self.seen = inner, seen

    def forward(self, *args, **kwargs):
        self.seen.append(args[0])
        return self.inner(*args, **kwargs)


def observe(model, how, seen, monkeypatch):
    """Let somebody else see the tokens inside of the model."""
    block = blocks_of(model)[1]
    name = "ffn" if hasattr(block, "ffn") else "ff"
    feed = getattr(block, name)
    if how == "hook":
        block.register_forward_hook(lambda module, args, output: seen.append(output))
    elif how == "pre-hook":
        feed.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    elif how == "global hook":
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, args, output: seen.append(output) if module is block else None
        )
        return handle.remove
    elif how == "module":
        setattr(block, name, Reader(feed, seen))
    elif how == "forward":
        stock = block.forward

        def another(*args, **kwargs):
            seen.append(args[0] if args else kwargs["hidden_states"])
            return stock(*args, **kwargs)

        block.forward = another
    elif how == "class":
        stock = type(feed).forward

        def patched(self, *args, **kwargs):
            if self is feed:
                seen.append(args[0])
            return stock(self, *args, **kwargs)

        monkeypatch.setattr(type(feed), "forward", functools.wraps(stock)(patched))
    elif how == "diffusers hook":

        class Keep(ModelHook):
            def post_forward(self, module, output):
                seen.append(output)
                return output

        HookRegistry.check_if_exists_or_initialize(block).register_hook(Keep(), "keep")
    else:
        attention = block.attn2
        stock = attention.processor

        class Processor(type(stock)):
            def __call__(self, attn, hidden_states, *args, **kwargs):
                seen.append(hidden_states)
                return super().__call__(attn, hidden_states, *args, **kwargs)

        attention.processor = Processor()
    return lambda: None


@pytest.mark.parametrize(
    "how", ["hook", "pre-hook", "global hook", "module", "forward", "class", "diffusers hook", "processor"]
)
@pytest.mark.parametrize("kind", ["wan", "ltx"])
def test_whoever_looks_inside_sees_tokens_in_the_order_of_the_model(kind, how, monkeypatch):
    seen = []
    model = tiny.transformer(kind)
    forget = observe(model, how, seen, monkeypatch)
    try:
        expected = forward(model, kind)
        fastdit.enable_sparse_attention(model, "multi_diagonal", density=1.0, block_size=16)
        found = forward(model, kind)
    finally:
        forget()
    assert crossed(model) == [] and len(seen) == 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-5)


def test_a_control_signal_that_is_added_inside_falls_on_its_own_tokens():
    control = torch.randn(1, GRID[0] * GRID[1] * GRID[2], 32, generator=torch.Generator().manual_seed(1))
    model = tiny.transformer("wan")
    model.blocks[0].register_forward_hook(lambda module, args, output: output + control)
    expected = forward(model, "wan")
    fastdit.enable_sparse_attention(model, "multi_diagonal", density=1.0, block_size=16)
    torch.testing.assert_close(forward(model, "wan"), expected, rtol=1e-4, atol=1e-5)


def test_weights_that_are_cast_or_moved_by_diffusers_do_no_harm():
    model = tiny.transformer("wan")
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    fastdit.enable_sparse_attention(model, **METHODS["radial"])
    forward(model, "wan")
    assert crossed(model) == list(PLACES)


def test_a_forward_that_raises_leaves_no_order_behind():
    model = tiny.transformer("wan")
    fastdit.enable_sparse_attention(model, **METHODS["radial"])
    forward(model, "wan")
    feed, model.blocks[1].ffn = model.blocks[1].ffn, None
    with pytest.raises(TypeError):
        forward(model, "wan")
    model.blocks[1].ffn = feed
    latent = tiny.arguments("wan", grid=GRID)["hidden_states"]
    expected = tiny.transformer("wan").rope(latent)
    assert all(torch.equal(a, b) for a, b in zip(model.rope(latent), expected, strict=True))
