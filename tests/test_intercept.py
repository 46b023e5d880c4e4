"""What else may be done to a model while sparse attention is enabled, and what is refused."""

import gc
import pickle
import threading
import warnings
import weakref
from types import SimpleNamespace

import pytest
import tiny
import torch
import torch.nn.functional as F

import fastdit
from fastdit.pipelines.runtime import LAYERS

COMMON = ("wan", "cogvideox", "hunyuan_video")


def forward(model, kind, **options):
    with torch.no_grad():
        return model(**tiny.arguments(kind, **options)).sample


def sparse_calls(model):
    return fastdit.find_sparse_attention(model).report()["totals"]["sparse_calls"]


def check_stays_sparse(kind, change, tolerance=0.0):
    """A change before and one after enabling give the same output, sparse in every layer."""
    outputs = []
    for change_first in (True, False):
        model = tiny.transformer(kind)
        if change_first:
            change(model)
        handle = fastdit.enable_sparse_attention(model, **tiny.DRAFT)
        if not change_first:
            change(model)
        outputs += [forward(model, kind), forward(model, kind)]
        assert handle.report()["totals"]["sparse_calls"] == 4
        fastdit.disable_sparse_attention(model)
        stock = tiny.transformer(kind)
        change(stock)
        torch.testing.assert_close(forward(model, kind), forward(stock, kind), rtol=0, atol=tolerance)
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", COMMON)
def test_lora(kind):
    from peft import LoraConfig

    def add(model):
        torch.manual_seed(3)
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))

    check_stays_sparse(kind, add)


@pytest.mark.parametrize("kind", COMMON)
def test_group_offload(kind):
    check_stays_sparse(
        kind,
        lambda model: model.enable_group_offload(
            onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
        ),
    )


@pytest.mark.parametrize("kind", COMMON)
def test_accelerate_offload(kind):
    import accelerate

    check_stays_sparse(kind, lambda model: accelerate.cpu_offload(model, execution_device=torch.device("cpu")))


@pytest.mark.parametrize("kind", COMMON)
def test_layerwise_casting(kind):
    def cast(model):
        model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)

    check_stays_sparse(kind, cast)


def test_autocast_does_not_reach_a_method():
    """Blocks are chosen and sums are made in the precision that the method asks for."""
    seen = []

    class Watcher(tiny.Recorder):
        def forward(self, q, k, v, call, state):
            seen.append((torch.is_autocast_enabled("cpu"), (q.float() @ k.float().mT).dtype))
            return super().forward(q, k, v, call, state)

    model = tiny.transformer("wan")
    fastdit.enable_sparse_attention(model, Watcher())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(**tiny.arguments("wan"))
    assert seen == [(False, torch.float32)] * 2


@pytest.mark.parametrize("kind", COMMON)
def test_gradient_checkpointing(kind):
    model = tiny.transformer(kind).train()
    fastdit.enable_sparse_attention(model, "draft", density=1.0, tile=(1, 4, 4))
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(**tiny.arguments(kind)).sample.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.enable_gradient_checkpointing()
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, msg=name)


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_model_offload_hooks_come_and_go(name):
    """Pipelines under ``enable_model_cpu_offload`` remove and add accelerate's hooks at the end of every run."""
    from accelerate import cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    pipe = tiny.pipeline(name)
    expected = tiny.run(pipe)
    for enable_first in (True, False):
        if not enable_first:
            cpu_offload_with_hook(pipe.transformer, "cpu")
        recorder = tiny.Recorder()
        pipe.enable_sparse_attention(recorder, schedule=tiny.EVERY_STEP)
        for _ in range(2):
            recorder.calls.clear()
            cpu_offload_with_hook(pipe.transformer, "cpu")
            torch.testing.assert_close(tiny.run(pipe), expected)
            assert [call.step for call in recorder.calls if call.layer == 0][:: 2 if name == "wan" else 1] == [0, 1, 2]
            assert recorder.calls[0].num_steps == 3
            remove_hook_from_module(pipe.transformer)
            pipe._reset_stateful_cache() if hasattr(pipe, "_reset_stateful_cache") else None
        pipe.disable_sparse_attention()
        assert torch.equal(tiny.run(pipe), expected)


def test_first_block_cache():
    from diffusers import FirstBlockCacheConfig

    pipe = tiny.pipeline("wan", layers=3)
    handle = pipe.enable_sparse_attention(**tiny.DRAFT, schedule=tiny.EVERY_STEP)
    tiny.run(pipe, steps=6)
    every = handle.report()["totals"]["calls"]
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    handle.reset()
    assert tiny.run(pipe, steps=6).isfinite().all()
    assert 0 < handle.report()["totals"]["calls"] < every
    pipe.transformer.disable_cache()
    pipe.disable_sparse_attention()
    assert "_fastdit" not in pipe.transformer.__dict__


def test_fused_projections():
    wan = tiny.transformer("wan")
    expected = forward(wan, "wan")
    fastdit.enable_sparse_attention(wan, tiny.Recorder())
    wan.fuse_qkv_projections()
    torch.testing.assert_close(forward(wan, "wan"), expected)
    assert sparse_calls(wan) == 2

    model = tiny.transformer("cogvideox")
    expected = forward(model, "cogvideox")
    fastdit.enable_sparse_attention(model, tiny.Recorder())
    model.fuse_qkv_projections()
    with pytest.raises(RuntimeError, match=r"replaced by FusedCogVideoX.*enable_sparse_attention\(\) again"):
        forward(model, "cogvideox")
    fastdit.enable_sparse_attention(model, tiny.Recorder())
    torch.testing.assert_close(forward(model, "cogvideox"), expected)
    assert sparse_calls(model) == 2
    model.unfuse_qkv_projections()
    with pytest.raises(RuntimeError, match="replaced"):
        forward(model, "cogvideox")
    fastdit.disable_sparse_attention(model)
    # these are processors of ours, left over from before: without a layer they are stock
    assert torch.equal(forward(model, "cogvideox"), expected)
    fastdit.enable_sparse_attention(model, tiny.Recorder())
    torch.testing.assert_close(forward(model, "cogvideox"), expected)
    fastdit.disable_sparse_attention(model)
    assert not any("Sparse" in type(p).__name__ for p in model.attn_processors.values())


def test_replaced_processor_is_noticed_and_left_alone():
    model = tiny.transformer("wan")
    fastdit.enable_sparse_attention(model, **tiny.DRAFT)
    theirs = type(model.blocks[1].attn2.processor)()
    model.blocks[1].attn1.set_processor(theirs)
    with pytest.raises(RuntimeError, match=r"blocks\.1\.attn1 was replaced by WanAttnProcessor"):
        forward(model, "wan")
    fastdit.disable_sparse_attention(model)
    assert model.blocks[1].attn1.processor is theirs


class Foreign:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return hidden_states


class ForeignModule(torch.nn.Module):
    def forward(self, attn, hidden_states, *args):
        return hidden_states


@pytest.mark.parametrize("processor", [Foreign(), ForeignModule()])
def test_foreign_processor_is_refused(processor):
    model = tiny.transformer("wan")
    first, second = (block.attn1.processor for block in model.blocks)
    del model.blocks[1].attn1.processor
    model.blocks[1].attn1.processor = processor
    before = dict(model.__dict__)
    with pytest.raises(RuntimeError, match="cannot intercept the attention of Foreign"):
        fastdit.enable_sparse_attention(model, **tiny.DRAFT)
    assert model.blocks[0].attn1.processor is first and model.blocks[1].attn1.processor is processor
    assert model.__dict__.keys() == before.keys() and not model._forward_pre_hooks
    assert second is not processor


def test_refusal_for_the_second_transformer_undoes_the_first():
    pipe = tiny.pipeline("wan22")
    pipe.transformer_2.blocks[0].attn1.processor = Foreign()
    with pytest.raises(RuntimeError, match="cannot intercept"):
        pipe.enable_sparse_attention(**tiny.DRAFT)
    assert pipe.sparse_attention is None and "_fastdit" not in pipe.transformer.__dict__


def test_unreached_layer_is_an_error():
    model = tiny.transformer("wan")
    model.blocks[1].attn1.forward = lambda hidden_states, *args, **kwargs: hidden_states
    fastdit.enable_sparse_attention(model, **tiny.DRAFT)
    with pytest.raises(RuntimeError, match=r"did not reach 1 of 2 self-attention layers.*blocks\.1\.attn1"):
        forward(model, "wan")


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("method", ["dense", "draft"])
def test_layers_that_are_skipped_are_not_taken_for_a_fault(method, index):
    """Skip-layer guidance leaves blocks out, of the first forward too."""
    model = tiny.transformer("wan")
    model.blocks[index].forward = lambda hidden_states, *args, **kwargs: hidden_states
    expected = forward(model, "wan")
    fastdit.enable_sparse_attention(model, method, **({"density": 1.0} if method == "draft" else {}))
    with pytest.warns(UserWarning, match=rf"left out 1 of 2 self-attention layers.*blocks\.{index}\.attn1"):
        found = forward(model, "wan")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward(model, "wan")


def test_attention_backend_still_serves_dense_calls():
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    active = _AttentionBackendRegistry.get_active_backend()[0]
    try:
        model = tiny.transformer("wan")
        model.set_attention_backend("_native_math")
        expected = forward(model, "wan")
        model.reset_attention_backend()
        handle = fastdit.enable_sparse_attention(model, tiny.Recorder(), schedule=fastdit.Schedule(dense_layers=(0,)))
        model.set_attention_backend("_native_math")
        torch.testing.assert_close(forward(model, "wan"), expected)
        assert handle.report()["totals"]["sparse_calls"] == 1
        fastdit.disable_sparse_attention(model)
        assert model.blocks[0].attn1.processor._attention_backend == AttentionBackendName._NATIVE_MATH
        assert torch.equal(forward(model, "wan"), expected)
    finally:
        _AttentionBackendRegistry.set_active_backend(active)


def test_context_parallel_calls_stay_stock_and_say_so(monkeypatch):
    from diffusers.models.transformers import transformer_wan

    model = tiny.transformer("wan")
    expected = forward(model, "wan")
    stock = transformer_wan.dispatch_attention_fn
    for block in model.blocks:
        block.attn1.processor._parallel_config = SimpleNamespace()
    monkeypatch.setattr(
        transformer_wan,
        "dispatch_attention_fn",
        lambda *args, parallel_config=None, **kwargs: stock(*args, **kwargs),
    )
    handle = fastdit.enable_sparse_attention(model, **tiny.DRAFT)
    with pytest.warns(UserWarning, match="context parallelism"):
        out = forward(model, "wan")
    assert torch.equal(out, expected)
    assert handle.report()["totals"]["fallbacks"] == {"context parallelism splits the sequence": 2}


def test_call_outside_of_a_forward_stays_stock_and_says_so():
    model = tiny.transformer("wan")
    hidden = torch.randn(1, 20, 32)
    with torch.no_grad():
        expected = model.blocks[0].attn1(hidden)
        fastdit.enable_sparse_attention(model, **tiny.DRAFT)
        with pytest.warns(UserWarning, match="outside of a forward"):
            assert torch.equal(model.blocks[0].attn1(hidden), expected)


def test_mixed_dtypes_are_left_to_the_stock_call():
    model = tiny.transformer("wan")
    handle = fastdit.enable_sparse_attention(model, **tiny.DRAFT)
    model.blocks[1].attn1.to_v.register_forward_hook(lambda module, args, out: out.double())
    with (
        torch.no_grad(),
        pytest.warns(
            UserWarning, match="of different kinds: torch.float32 on cpu, torch.float32 on cpu, torch.float64"
        ),
        pytest.raises(RuntimeError, match="dtype"),
    ):
        model(**tiny.arguments("wan"))
    assert handle.report()["layers"][1]["fallbacks"].keys() == {
        "queries, keys and values are of different kinds: torch.float32 on cpu, torch.float32 on cpu, "
        "torch.float64 on cpu"
    }


def test_the_default_device_of_torch_does_not_matter():
    model = tiny.transformer("wan")
    fastdit.enable_sparse_attention(model, **tiny.DRAFT)
    expected = forward(model, "wan")
    model, values = tiny.transformer("wan"), tiny.arguments("wan")
    with torch.no_grad(), torch.device("meta"):
        fastdit.enable_sparse_attention(model, **tiny.DRAFT)
        found = model(**values).sample
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_warning_comes_once(recwarn):
    model = tiny.transformer("ltx")
    arguments = tiny.arguments("ltx") | {"num_frames": None, "video_coords": torch.rand(1, 3, 192)}
    fastdit.enable_sparse_attention(model, **tiny.DRAFT)
    with torch.no_grad():
        model(**arguments)
        model(**arguments)
    assert len([w for w in recwarn if "runs dense" in str(w.message)]) == 1


def test_threads_do_not_mix_models():
    models = [tiny.transformer(kind, seed=seed) for seed, kind in enumerate(("wan", "wan", "cogvideox"))]
    kinds = ("wan", "wan", "cogvideox")
    for model in models:
        fastdit.enable_sparse_attention(model, **tiny.DRAFT)
    expected = [forward(model, kind) for model, kind in zip(models, kinds, strict=True)]
    results: list = [None] * 3

    def work(index):
        results[index] = [forward(models[index], kinds[index]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, one in zip(results, expected, strict=True):
        assert all(torch.equal(output, one) for output in outputs)


def test_pickle_gives_a_stock_model():
    model = tiny.transformer("wan")
    expected = forward(model, "wan")
    stock = type(model.blocks[0].attn1.processor)
    fastdit.enable_sparse_attention(model, **tiny.DRAFT)
    processor = pickle.loads(pickle.dumps(model.blocks[0].attn1.processor))
    assert type(processor) is stock
    loaded = pickle.loads(pickle.dumps(model))
    assert fastdit.find_sparse_attention(loaded) is None
    assert torch.equal(forward(loaded, "wan"), expected)


def test_nothing_outlives_the_model():
    gc.collect()
    before = set(LAYERS)
    model = tiny.transformer("wan")
    handle = fastdit.enable_sparse_attention(model, **tiny.DRAFT)
    with model.cache_context("cond"):
        forward(model, "wan")
    assert len(set(LAYERS) - before) == 2
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert "blocks.1.attn1" in handle.summary()
    handle.disable()
    del handle
    gc.collect()
    assert not set(LAYERS) - before


def test_other_uses_of_the_functions_are_untouched():
    sdpa = F.scaled_dot_product_attention
    model = tiny.transformer("wan")
    fastdit.enable_sparse_attention(model, **tiny.DRAFT)
    assert F.scaled_dot_product_attention is sdpa
    cross = type(model.blocks[0].attn2.processor)
    assert "Sparse" not in cross.__name__
