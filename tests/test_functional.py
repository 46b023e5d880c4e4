"""One call without a model: what does not fit is refused before anything is chosen, whatever the method."""

import dataclasses

import pytest
import torch
from test_methods import SMALL, small

import fastdit
from fastdit.attention import MethodState, list_methods, method_class
from fastdit.tokens import AttentionCall, TokenSpec, VideoGrid

GRID, VIDEO = (3, 5, 7), 105
WITHOUT_PLAN = [name for name in list_methods() if name != "paro"]


@pytest.fixture(params=list_methods())
def name(request):
    return request.param


@pytest.fixture
def untouched(monkeypatch, name):
    """Fail as soon as the method is asked for anything."""

    def touched(*args):
        raise AssertionError("the method was asked")

    monkeypatch.setattr(method_class(name), "forward", touched)
    monkeypatch.setattr(method_class(name), "pattern", touched)


def attention(q, k, v, padding, scale=None):
    scores = (q.double() @ k.double().mT * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(
        padding[:, None, None], -torch.inf
    )
    return scores.softmax(-1) @ v.double()


SHAPES = {
    "grouped queries": ((1, 4, VIDEO, 16), (1, 2, VIDEO, 16), (1, 2, VIDEO, 16)),
    "no samples": ((0, 4, VIDEO, 16),) * 3,
    "no heads": ((1, 0, VIDEO, 16),) * 3,
    "more keys": ((1, 2, VIDEO, 16), (1, 2, VIDEO + 8, 16), (1, 2, VIDEO + 8, 16)),
    "fewer keys": ((1, 2, VIDEO, 16), (1, 2, VIDEO - 5, 16), (1, 2, VIDEO - 5, 16)),
    "other values": ((1, 2, VIDEO, 16), (1, 2, VIDEO, 16), (1, 2, VIDEO, 8)),
    "other batch": ((2, 2, VIDEO, 16), (1, 2, VIDEO, 16), (1, 2, VIDEO, 16)),
    "three axes": ((2, VIDEO, 16),) * 3,
}


def test_shapes_are_checked_before_the_choice(name, untouched):
    for shapes in SHAPES.values():
        q, k, v = (torch.zeros(shape) for shape in shapes)
        with pytest.raises(ValueError, match=rf"{VIDEO}"):
            fastdit.sparse_attention_call(q, k, v, grid=GRID, method=method_class(name)())
        if k.shape == v.shape:
            with pytest.raises(ValueError, match=rf"{VIDEO}"):
                fastdit.pattern(method_class(name)(), grid=GRID, q=q, k=k)


REFUSED = [
    ({"kernel": "fastest"}, "unknown kernel 'fastest'"),
    ({"precision": "int4"}, "unknown precision 'int4'"),
    ({"scale": float("nan")}, "scale must be finite"),
    ({"text_tokens": 4}, "make 109 tokens, but q has 105"),
    ({"kernel": "cpu", "state": MethodState(kernel="reference")}, "kernel='cpu' was given with a state"),
    ({"key_padding": torch.zeros(2, VIDEO, dtype=torch.bool)}, r"key_padding must be \(1, 105\) bool"),
    ({"key_padding": torch.zeros(1, VIDEO)}, r"got \(1, 105\) torch.float32"),
    ({"key_padding": torch.zeros(1, 1, 1, VIDEO, dtype=torch.bool)}, r"got \(1, 1, 1, 105\)"),
]


def test_options_are_checked_before_the_choice(name, untouched):
    q = torch.zeros(1, 2, VIDEO, 16)
    for options, message in REFUSED:
        with pytest.raises(ValueError, match=message):
            fastdit.sparse_attention_call(q, q, q, grid=GRID, method=method_class(name)(), **options)


def test_dtypes_are_checked_before_the_choice(name, untouched):
    q = torch.zeros(1, 2, VIDEO, 16)
    for other in (q.half(), q.int()):
        with pytest.raises(TypeError, match="one dtype"):
            fastdit.sparse_attention_call(q, other, q, grid=GRID, method=method_class(name)())


@pytest.mark.parametrize("text_first", [True, False])
def test_padding_may_be_anywhere_in_the_text(name, text_first):
    """With all blocks kept each query gets dense attention to the keys that are real, and the pairs count as all."""
    spec = TokenSpec(VideoGrid(*GRID), 23, text_first)
    q, k, v = torch.randn(3, 5, 2, spec.num_tokens, 16)
    text = torch.arange(23)
    padding = torch.zeros(5, spec.num_tokens, dtype=torch.bool)
    padding[:, spec.text] = torch.stack([text < 9, (text > 3) & (text < 19), text >= 0, text % 2 == 0, text > 20])
    fields = {"radial": {"decay": 1e6, "min_band": 1}, "dense": {}, "skip": {}}.get(name, {"density": 1.0})
    method = small(name, q, k, AttentionCall(spec), **fields)
    state = MethodState()
    given = {"grid": GRID, "text_tokens": 23, "text_first": text_first, "method": method, "state": state}
    out = fastdit.sparse_attention_call(q, k, v, **given, key_padding=padding)
    expected = attention(q, k, v, padding) if name != "skip" else torch.zeros_like(q).double()
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    assert float(state.kept) == pytest.approx(0 if name == "skip" else 1)


@pytest.mark.parametrize("name", WITHOUT_PLAN)
def test_order_of_the_text_does_not_matter(name):
    """Real tokens get the same whether padding comes in front of the text or after it."""
    spec = TokenSpec(VideoGrid(*GRID), 21)
    q, k, v = torch.randn(3, 1, 3, spec.num_tokens, 16)
    padding = torch.arange(spec.num_tokens)[None] >= VIDEO + 13
    turned = torch.cat([torch.arange(VIDEO), torch.arange(VIDEO, spec.num_tokens).roll(8)])
    given = {"grid": GRID, "text_tokens": 21, "method": small(name, q, k, AttentionCall(spec))}
    expected = fastdit.sparse_attention_call(q, k, v, **given, key_padding=padding)
    q, k, v = (x[:, :, turned] for x in (q, k, v))
    found = fastdit.sparse_attention_call(q, k, v, **given, key_padding=padding[:, turned])
    torch.testing.assert_close(found, expected[:, :, turned], rtol=1e-4, atol=1e-5)


def test_padded_video_is_refused_but_by_dense_attention(name, text=21):
    spec = TokenSpec(VideoGrid(*GRID), text)
    q, k, v = torch.randn(3, 2, 3, spec.num_tokens, 16)
    padding = torch.zeros(2, spec.num_tokens, dtype=torch.bool)
    padding[1, 90:VIDEO] = True
    given = {"grid": GRID, "text_tokens": text, "method": small(name, q, k, AttentionCall(spec))}
    if name == "dense":
        out = fastdit.sparse_attention_call(q, k, v, **given, key_padding=padding)
        torch.testing.assert_close(out.double(), attention(q, k, v, padding), rtol=1e-4, atol=1e-5)
        return
    with pytest.raises(ValueError, match=r"marks \[0, 15\] video tokens"):
        fastdit.sparse_attention_call(q, k, v, **given, key_padding=padding)


@pytest.mark.parametrize("name", WITHOUT_PLAN)
@pytest.mark.parametrize("text_first", [True, False])
def test_density_with_padded_text_is_that_without_it(name, text_first):
    padded, cut = MethodState(), MethodState()
    whole, short = (TokenSpec(VideoGrid(*GRID), text, text_first) for text in (90, 7))
    q, k, v = torch.randn(3, 1, 2, whole.num_tokens, 16)
    real = torch.cat([torch.arange(whole.video.start, whole.video.stop), torch.arange(7) + whole.text.start]).sort()[0]
    padding = torch.ones(1, whole.num_tokens, dtype=torch.bool).index_fill(1, real, False)
    method = small(name, q, k, AttentionCall(whole))
    for tokens, tensors, state, given in (
        (whole, (q, k, v), padded, padding),
        (short, (x[:, :, real] for x in (q, k, v)), cut, None),
    ):
        call = AttentionCall(tokens, key_padding=given)
        for _ in range(2):  # the first call of a video may search
            tensors = tuple(tensors)
            method.forward(*tensors, call, state)
    assert float(padded.kept) == pytest.approx(float(cut.kept), abs=1e-6)


def test_the_default_dtype_of_torch_does_not_matter(name):
    grid = (3, 12, 15)
    spec = TokenSpec(VideoGrid(*grid), 11)
    q, k, v = torch.randn(3, 1, 2, spec.num_tokens, 16)
    known, results = {f.name for f in dataclasses.fields(method_class(name))}, []
    fields = {field: value for field, value in {"order": "tile", "compensate": "mean"}.items() if field in known}
    for default in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        torch.set_default_dtype(default)
        try:
            method = small(name, q, k, AttentionCall(spec), **fields)
            state, given = MethodState(), {"grid": grid, "text_tokens": 11, "method": method}
            outs = [fastdit.sparse_attention_call(q, k, v, **given, state=state) for _ in range(2)]
            blocks = fastdit.pattern(method, grid=grid, text_tokens=11, q=q, k=k).mask.to_dense()
        finally:
            torch.set_default_dtype(torch.float32)
        results.append((*outs, state.kept, blocks))
    for result in results[1:]:
        for expected, found in zip(results[0], result, strict=True):
            assert expected.dtype == found.dtype and torch.equal(expected, found)


def test_the_default_device_of_torch_does_not_matter(name):
    spec = TokenSpec(VideoGrid(*GRID), 11)
    q, k, v = torch.randn(3, 1, 3, spec.num_tokens, 16)
    method = small(name, q, k, AttentionCall(spec))
    padding = torch.arange(spec.num_tokens)[None] % 3 == 0
    padding[:, :VIDEO] = False
    given = {"grid": GRID, "text_tokens": 11, "method": method, "key_padding": padding}
    expected = fastdit.sparse_attention_call(q, k, v, **given)
    with torch.device("meta"):
        assert torch.equal(fastdit.sparse_attention_call(q, k, v, **given), expected)


def test_autocast_does_not_change_the_pattern(name):
    spec = TokenSpec(VideoGrid(4, 12, 15))
    q, k, _ = torch.randn(3, 1, 3, spec.num_tokens, 16)
    method, given = small(name, q, k, AttentionCall(spec)), {"grid": (4, 12, 15), "q": q, "k": k}
    expected = fastdit.pattern(method, **given).mask.to_dense()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fastdit.pattern(method, **given).mask.to_dense(), expected)


@pytest.mark.parametrize("name", WITHOUT_PLAN)
def test_strides_do_not_matter(name):
    spec = TokenSpec(VideoGrid(*GRID), 9)
    tensors = torch.randn(3, 1, 3, spec.num_tokens, 16)
    given = {"grid": GRID, "text_tokens": 9, "method": name, **SMALL.get(name, {})}
    expected = fastdit.sparse_attention_call(*tensors, **given)
    for strided in (tensors.mT.contiguous().mT, tensors.transpose(2, 3).contiguous().transpose(2, 3)):
        found = fastdit.sparse_attention_call(*strided, **given)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
