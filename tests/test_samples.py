"""Each sample of a batch gets what it gets alone, and nothing depends on the defaults of torch: in every method."""

import contextlib
import dataclasses
import typing

import pytest
import torch
from test_methods import small

from fastdit.attention import MethodState, list_methods, method_class
from fastdit.attention.per_head.table import Table
from fastdit.layout import TokenLayout
from fastdit.token_orders import ORDERS, token_order
from fastdit.tokens import AttentionCall, TokenSpec, VideoGrid

GRID = VideoGrid(3, 5, 8)
HEADS, DIM = 4, 16
LISTED = {"order": ("tile",), "parts": (4,), "mix_points": (3,), "density": (0.4,)}


def variants(name):
    """Fields that differ from the defaults in one choice: flags, options, and those that are listed."""
    kinds = typing.get_type_hints(method_class(name))
    found = [{}]
    for field in dataclasses.fields(method_class(name)):
        kind, options = kinds[field.name], LISTED.get(field.name, ())
        if kind is bool:
            options = (not field.default,)
        for part in (kind, *typing.get_args(kind)):
            if typing.get_origin(part) is typing.Literal:
                options = typing.get_args(part)
        found += [{field.name: option} for option in options if option != field.default]
    needed = {"tie": {"feature_map": "hedgehog"}, "mix_points": {"variant": "sla2"}}
    return [fields | needed.get(next(iter(fields), ""), {}) for fields in found]


CASES = [(name, fields) for name in list_methods() for fields in variants(name)]


@pytest.fixture(params=[*CASES, ("plan", {})], ids=lambda case: f"{case[0]}-{case[1]}")
def case(request):
    return request.param


def heads_of(name):
    return HEADS if name != "plan" else sum(not method_class(name).empty for name in list_methods())


def made(name, fields, q, k, call):
    if name != "plan":
        return small(name, q, k, call, **fields)
    methods = tuple(small(name, q, k, call) for name in list_methods() if not method_class(name).empty)
    return Table(edges=(1.0,), methods=methods, choices=((tuple(i % len(methods) for i in range(q.shape[1])),),))


def state_of(method, **how):
    """A state with weights that are not zero, where a method has weights."""
    weights = None
    if method.trained_for:
        with torch.device("cpu"):
            weights, generator = method.make_weights(HEADS, DIM), torch.Generator().manual_seed(0)
            for weight in weights.parameters():
                weight.data += 0.3 * torch.randn(weight.shape, generator=generator, dtype=torch.float32)
    return MethodState(weights=weights, **how)


def sequence(text, heads=HEADS, batch=2, dtype=torch.float32):
    """Two samples as different as prompts can be, in two steps, and their call; text is padded differently in each."""
    spec = TokenSpec(GRID, 0 if text == "none" else 21, text == "first")
    padding = torch.zeros(batch, spec.num_tokens, dtype=torch.bool)
    for sample, real in zip(padding, (5, 18), strict=False):
        sample[spec.text.start + real : spec.text.stop] = True
    scales = torch.tensor([0.5, 3.0], dtype=dtype)[:batch, None, None, None]
    steps = [
        [torch.randn(batch, heads, spec.num_tokens, DIM, dtype=dtype) * scales for _ in range(3)] for _ in range(2)
    ]
    return steps, AttentionCall(spec, num_steps=4, key_padding=padding if text != "none" else None)


def run(method, steps, call, **how):
    """Outputs and densities of two steps, the second of which uses the pattern of the first; and that pattern."""
    state, outs, kept = state_of(method, **how), [], []
    for step, (q, k, v) in enumerate(steps):
        outs.append(method.forward(q, k, v, dataclasses.replace(call, step=step), state))
        kept.append(float(state.kept))
        state.refresh = False
    pattern = None if state.pattern is None else state.pattern.mask.to_dense()
    return outs, kept, pattern


def sample_of(steps, call, i):
    padding = None if call.key_padding is None else call.key_padding[i : i + 1]
    return [[x[i : i + 1] for x in step] for step in steps], dataclasses.replace(call, key_padding=padding)


def check_samples(method, steps, call, which=(0, 1), **how):
    together, kept, pattern = run(method, steps, call, **how)
    densities = []
    for i in which:
        alone, density, own = run(method, *sample_of(steps, call, i), **how)
        for got, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(got[i : i + 1], expected, rtol=1e-4, atol=1e-5)
        assert pattern is None or torch.equal(pattern[i : i + 1] if len(pattern) > 1 else pattern, own)
        densities.append(density)
    if len(which) == 2:
        torch.testing.assert_close(torch.tensor(kept), torch.tensor(densities).mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", ["none", "first"])
def test_a_batch_is_its_samples(case, text):
    steps, call = sequence(text, heads=heads_of(case[0]))
    check_samples(made(*case, *steps[0][:2], call), steps, call)


@pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
@pytest.mark.parametrize("name", [*list_methods(), "plan"])
def test_a_batch_is_its_samples_in_low_precision(name, precision):
    steps, call = sequence("last", heads=heads_of(name))
    method = made(name, {}, *steps[0][:2], call)
    with torch.no_grad():
        check_samples(method, steps, call, kernel="reference", precision=precision)


def test_what_is_not_finite_stays_in_its_sample(case):
    steps, call = sequence("last", heads=heads_of(case[0]))
    method = made(*case, *steps[0][:2], call)
    for step in steps:
        for x in step:
            x[0, :, 7], x[0, :, 60] = torch.nan, torch.inf
    check_samples(method, steps, call, which=(1,))


@pytest.mark.parametrize("fields", [{}, {"compensate": "mean"}], ids=str)
@pytest.mark.parametrize("name", [name for name in list_methods() if not method_class(name).empty])
def test_gradients_in_fp64(name, fields):
    if not set(fields) <= {field.name for field in dataclasses.fields(method_class(name))}:
        return
    call = AttentionCall(TokenSpec(VideoGrid(2, 5, 7), 3))
    q, k, v = (torch.randn(2, HEADS, call.tokens.num_tokens, DIM, dtype=torch.float64) for _ in range(3))
    method = small(name, q, k, call, **fields)
    state = state_of(method)
    method.forward(q, k, v, call, state)
    state.refresh = False
    inputs = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: method.forward(*x, call, state), inputs, fast_mode=True)


@contextlib.contextmanager
def default(what):
    before = torch.get_default_dtype()
    try:
        if isinstance(what, torch.dtype):
            torch.set_default_dtype(what)
        else:
            torch.set_default_device(what)
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


DEFAULTS = [torch.bfloat16, torch.float16, torch.float64, "meta"]


@pytest.mark.parametrize("what", DEFAULTS, ids=str)
def test_defaults_of_torch_do_not_matter(case, what):
    steps, call = sequence("first", heads=heads_of(case[0]))
    method = made(*case, *steps[0][:2], call)
    expected, kept, pattern = run(method, steps, call)
    with default(what):
        again = made(*case, *steps[0][:2], call)
        got, also_kept, also_pattern = run(again, steps, call)
    assert again == method and kept == also_kept
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    assert (pattern is None) == (also_pattern is None) and (pattern is None or torch.equal(pattern, also_pattern))


@pytest.mark.parametrize("what", DEFAULTS, ids=str)
@pytest.mark.parametrize("order", ORDERS)
def test_orders_do_not_depend_on_defaults(order, what):
    spec = TokenSpec(GRID, 5, text_first=True)
    expected = TokenLayout.build(spec, block=16, order=token_order(GRID, order))
    with default(what):
        found = TokenLayout.build(spec, block=16, order=token_order(GRID, order))
    assert torch.equal(found.index, expected.index) and torch.equal(found.inverse, expected.inverse)
    assert torch.equal(found.block_lengths, expected.block_lengths)
