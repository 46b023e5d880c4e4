"""What diffusers hooks into transformers works as without us, whichever of the two is enabled first."""

import functools

import pytest
import tiny
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import HookRegistry, apply_layer_skip
from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
from diffusers.hooks.layer_skip import AttentionProcessorSkipHook, AttentionScoreSkipFunctionMode
from diffusers.hooks.smoothed_energy_guidance_utils import (
    SmoothedEnergyGuidanceConfig,
    _apply_smoothed_energy_guidance_hook,
)
from torch.overrides import TorchFunctionMode

import fastdit
from fastdit.pipelines.families.family import find_family

TIMESTEPS = (900.0, 500.0, 300.0)
KINDS = ("wan", "cogvideox", "hunyuan_video", "mochi", "ltx")  # one per family
DENSE = {"method": "draft", "density": 1.0, "tile": (1, 2, 2)}


def attention(model):
    return find_family(model).self_attentions(model)[0][1]


def blocks(model):
    return "blocks" if hasattr(model, "blocks") else "transformer_blocks"


def cache(make):
    def add(model, now):
        model.enable_cache(make(now))

    return add


def skip_scores(model, now):
    hook = AttentionProcessorSkipHook(None, skip_attention_scores=True)
    HookRegistry.check_if_exists_or_initialize(attention(model)).register_hook(hook, "skip scores")


def skip_layers(**options):
    return lambda model, now: apply_layer_skip(model, LayerSkipConfig(indices=[0], fqn=blocks(model), **options))


def smooth_energy(model, now):
    _apply_smoothed_energy_guidance_hook(model, SmoothedEnergyGuidanceConfig([0], blocks(model)), 1.0)


def broadcast(now):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, cross_attention_block_skip_range=3, current_timestep_callback=now
    )


def faster(now):
    return FasterCacheConfig(
        spatial_attention_block_skip_range=2, is_guidance_distilled=True, current_timestep_callback=now
    )


def offload(model, now):
    cpu = torch.device("cpu")
    model.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type="block_level", num_blocks_per_group=1
    )


ADDONS = {
    "attention scores skipped": skip_scores,
    "layers skipped": skip_layers(),
    "feed-forward skipped": skip_layers(skip_attention=False),
    "smoothed energy guidance": smooth_energy,
    "pyramid attention broadcast": cache(broadcast),
    "FasterCache": cache(faster),
    "first block cache": cache(lambda now: FirstBlockCacheConfig(threshold=0.3)),
    "MagCache": cache(lambda now: MagCacheConfig(num_inference_steps=3, retention_ratio=0.0, mag_ratios=[1.0] * 4)),
    "TaylorSeer": cache(
        lambda now: TaylorSeerCacheConfig(
            cache_interval=2, disable_cache_before_step=1, use_lite_mode=True, taylor_factors_dtype=torch.float32
        )
    ),
    "SeaCache": cache(lambda now: SeaCacheConfig(threshold=10.0)),
    "layerwise casting": lambda model, now: model.enable_layerwise_casting(
        storage_dtype=torch.bfloat16, compute_dtype=torch.float32
    ),
    "group offload": offload,
}
CANNOT = {"smoothed energy guidance": ("mochi", "ltx")}  # the hooks of diffusers do not take these models
NO_EFFECT = {"group offload": KINDS, "SeaCache": KINDS[1:]}
CASES = [(kind, name) for name in ADDONS for kind in KINDS if kind not in CANNOT.get(name, ())]


def video(kind, name, *when):
    """Make the outputs of four steps with what is hooked in, enabled in this order; return them with the handle."""
    model, time, handle = tiny.transformer(kind), [0.0], None
    for what in when:
        if what == "addon":
            ADDONS[name](model, lambda: time[0])
        else:
            handle = fastdit.enable_sparse_attention(model, **DENSE)
    outputs = []
    for step, timestep in enumerate(TIMESTEPS):
        arguments = tiny.arguments(kind, grid=(2, 6, 6))
        arguments["timestep"] = torch.full_like(arguments["timestep"], timestep)
        time[0] = timestep
        said = {"step_index": step, "num_inference_steps": 3, "sigma": timestep / 1000}
        with torch.no_grad(), model.cache_context("cond", **said):
            outputs.append(model(**arguments).sample)
    return torch.stack(outputs), handle


@functools.cache
def plain(kind):
    return video(kind, None)[0]


@pytest.mark.filterwarnings("ignore:.*intercepts the functions of torch")
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_addons_work_as_without_us(kind, name):
    expected, _ = video(kind, name, "addon")
    if kind not in NO_EFFECT.get(name, ()):
        assert not torch.allclose(plain(kind), expected, rtol=1e-4, atol=2e-4)
    for when in (("addon", "ours"), ("ours", "addon")):
        found, handle = video(kind, name, *when)
        assert handle.report()["totals"]["sparse_calls"] > 0
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_foreign_function_mode_gets_the_stock_call(kind):
    class Nothing(TorchFunctionMode):
        """Stand for the attention scores of all layers."""

        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if func is torch.nn.functional.scaled_dot_product_attention:
                return torch.zeros_like(args[0] if args else kwargs["query"])
            return func(*args, **kwargs)

    model = tiny.transformer(kind)
    arguments = tiny.arguments(kind, grid=(2, 4, 6))
    with torch.no_grad(), Nothing():
        expected = model(**arguments).sample
        handle = fastdit.enable_sparse_attention(model, **tiny.DRAFT)
        with pytest.warns(UserWarning, match="dense, because Nothing intercepts the functions of torch"):
            assert torch.equal(model(**arguments).sample, expected)
    totals = handle.report()["totals"]
    assert totals["fallbacks"] == {"Nothing intercepts the functions of torch": totals["calls"]}
    with torch.no_grad(), torch.device("cpu"):
        model(**arguments)
    assert handle.report()["totals"]["sparse_calls"] == totals["calls"]


@pytest.mark.slow
def test_a_foreign_function_mode_acts_in_a_compiled_model():
    torch._dynamo.reset()
    model = tiny.transformer("wan", layers=1)
    arguments = tiny.arguments("wan", grid=(2, 4, 6))
    with torch.no_grad(), AttentionScoreSkipFunctionMode():
        expected = model(**arguments).sample
    fastdit.enable_sparse_attention(model, **tiny.DRAFT)
    with torch.no_grad():
        model(**arguments)
        compiled = torch.compile(model, backend="eager")
        with AttentionScoreSkipFunctionMode():
            found = compiled(**arguments).sample
    torch._dynamo.reset()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["wan", "cogvideox", "hunyuan_video"])
def test_diffusers_finds_what_it_knows_of_a_processor(kind, monkeypatch):
    """Layers that skip attention scores find the processor of a layer by its class."""
    model = tiny.transformer(kind)
    known = AttentionProcessorMetadata(lambda module, hidden_states, *args, **kwargs: hidden_states)
    AttentionProcessorRegistry._register()
    monkeypatch.setattr(AttentionProcessorRegistry, "_registry", dict(AttentionProcessorRegistry._registry))
    AttentionProcessorRegistry.register(type(attention(model).processor), known)
    arguments = tiny.arguments(kind, grid=(2, 4, 6))
    handle = fastdit.enable_sparse_attention(model, **DENSE)
    apply_layer_skip(model, LayerSkipConfig([0], blocks(model), skip_attention=False, skip_attention_scores=True))
    with torch.no_grad(), pytest.warns(UserWarning, match="AttentionScoreSkipFunctionMode intercepts"):
        found = model(**arguments).sample
        handle.disable()
        torch.testing.assert_close(found, model(**arguments).sample, rtol=1e-4, atol=1e-4)
