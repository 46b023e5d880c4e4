"""Functions and processors that something else patches, before sparse attention is enabled or while it is."""

import importlib
import sys

import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers.models import attention_processor
from diffusers.models.transformers import transformer_hunyuan_video, transformer_ltx, transformer_wan

import fastdit
from fastdit.pipelines.interception.twins import Twin

USED = {  # a function that the processors of a kind find in their module, or in torch.nn.functional
    "wan": (transformer_wan, "_get_qkv_projections"),
    "wan_i2v": (transformer_wan, "_get_qkv_projections"),
    "vace": (transformer_wan, "_get_qkv_projections"),
    "cogvideox": (F, "scaled_dot_product_attention"),
    "cogvideox15": (F, "scaled_dot_product_attention"),
    "hunyuan_video": (transformer_hunyuan_video, "dispatch_attention_fn"),
    "mochi": (F, "pad"),
    "ltx": (transformer_ltx, "apply_rotary_emb"),
}


def forward(model, kind="wan"):
    with torch.no_grad():
        return model(**tiny.arguments(kind, grid=(2, 4, 6))).sample


def scaled(stock, factor=2.0):
    """Patch a function: the last of what it returns is multiplied."""

    def patched(*args, **kwargs):
        out = stock(*args, **kwargs)
        return (*out[:-1], out[-1] * factor) if isinstance(out, tuple) else out * factor

    return patched


def test_every_kind_is_patched():
    assert set(USED) == set(tiny.KINDS)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_function_patched_at_any_time_acts(kind, monkeypatch):
    """Method ``dense`` is the stock call, whatever the functions around it are."""
    module, name = USED[kind]
    model = tiny.transformer(kind)
    stock = forward(model, kind)
    with fastdit.sparse_attention(model, "dense"):
        assert torch.equal(forward(model, kind), stock)
        monkeypatch.setattr(module, name, scaled(getattr(module, name)))
        while_enabled = forward(model, kind)
    patched = forward(model, kind)
    assert not torch.equal(patched, stock)
    assert torch.equal(while_enabled, patched)
    with fastdit.sparse_attention(model, "dense"):
        assert torch.equal(forward(model, kind), patched)
        monkeypatch.undo()
        assert torch.equal(forward(model, kind), stock)
    with fastdit.sparse_attention(model, "dense"):
        assert torch.equal(forward(model, kind), stock)


def test_a_sparse_call_sees_patched_functions_too(monkeypatch):
    model = tiny.transformer("wan")
    with fastdit.sparse_attention(model, tiny.Recorder()):
        stock = forward(model)
        monkeypatch.setattr(transformer_wan, "_get_qkv_projections", scaled(transformer_wan._get_qkv_projections))
        patched = forward(model)
    assert not torch.equal(patched, stock)
    torch.testing.assert_close(patched, forward(model))


def test_functions_patched_act_in_a_compiled_model(monkeypatch):
    torch._dynamo.reset()
    model = tiny.transformer("wan", layers=1)
    fastdit.enable_sparse_attention(model, "dense")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    stock = forward(compiled)
    for name in ("_get_qkv_projections", "dispatch_attention_fn"):
        monkeypatch.setattr(transformer_wan, name, scaled(getattr(transformer_wan, name)))
    while_enabled = forward(compiled)
    fastdit.enable_sparse_attention(model, "dense")
    again = forward(compiled)
    fastdit.disable_sparse_attention(model)
    expected = forward(model)
    torch._dynamo.reset()
    assert not torch.allclose(stock, expected)
    torch.testing.assert_close(while_enabled, expected)
    torch.testing.assert_close(again, expected)


def test_a_processor_patched_while_enabled_is_refused_and_then_taken(monkeypatch):
    cls = transformer_wan.WanAttnProcessor
    model = tiny.transformer("wan")
    stock = forward(model)
    fastdit.enable_sparse_attention(model, "dense")
    called = []

    def look(attn):
        called.append(attn)

    monkeypatch.setattr(transformer_wan, "look", look, raising=False)
    body = (
        "def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):\n"
        "    look(attn)\n"
        "    query, key, value = _get_qkv_projections(attn, hidden_states, hidden_states)\n"
        "    query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))\n"
        "    out = dispatch_attention_fn(query, key, value, backend=self._attention_backend)\n"
        "    return attn.to_out[0](out.flatten(2, 3).type_as(query))\n"
    )
    made: dict = {}
    exec(compile(body, "patch", "exec"), vars(transformer_wan), made)
    monkeypatch.setattr(cls, "__call__", made["__call__"])
    with pytest.raises(RuntimeError, match=r"__call__ of WanAttnProcessor was replaced.*enable_sparse_attention\(\)"):
        forward(model)
    with fastdit.sparse_attention(model, "dense"):
        sparse = forward(model)
        assert [attn for attn in called if attn is model.blocks[0].attn1]
    assert torch.equal(sparse, forward(model)) and not torch.equal(sparse, stock)
    monkeypatch.undo()
    with fastdit.sparse_attention(model, "dense"):
        assert torch.equal(forward(model), stock)


def test_a_processor_changed_in_place_is_noticed(monkeypatch):
    call = attention_processor.CogVideoXAttnProcessor2_0.__call__
    model = tiny.transformer("cogvideox")
    fastdit.enable_sparse_attention(model, "dense")
    monkeypatch.setattr(call, "__defaults__", (None, None))
    forward(model, "cogvideox")
    monkeypatch.setattr(call, "__code__", call.__code__.replace(co_firstlineno=1))
    with pytest.raises(RuntimeError, match="__call__ of CogVideoXAttnProcessor2_0 was replaced"):
        forward(model, "cogvideox")


def test_a_call_from_nowhere_is_refused(monkeypatch):
    made: dict = {}
    exec("def __call__(self, attn, hidden_states, **_):\n    return dispatch_attention_fn(*[hidden_states] * 3)", made)
    model = tiny.transformer("wan")
    monkeypatch.setattr(transformer_wan.WanAttnProcessor, "__call__", made["__call__"])
    with pytest.raises(RuntimeError, match="comes from no module that is loaded"):
        fastdit.enable_sparse_attention(model, "dense")


def test_a_twin_takes_over_what_is_added_changed_and_removed(monkeypatch):
    name = "a_module_of_this_test"
    source = type(sys)(name)
    monkeypatch.setitem(sys.modules, name, source)
    source.first, source.second, source.call = 1, None, "theirs"
    twin = Twin(source, {"call": "ours", "absent": "ours"})
    monkeypatch.setitem(sys.modules, twin.module.__name__, twin.module)
    twin.refresh()
    assert (twin.module.first, twin.module.second, twin.module.call) == (1, None, "ours")
    assert not hasattr(twin.module, "absent") and twin.module.__name__ != name
    del source.second
    source.first, source.third = torch.ones(2), None
    twin.refresh()
    assert twin.module.first is source.first and twin.module.third is None and not hasattr(twin.module, "second")
    assert importlib.import_module(twin.module.__name__) is twin.module
