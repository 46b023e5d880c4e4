"""Threads that share one cache get what each would get alone."""

import copy
import gc
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from test_methods import qkv, small

from fastdit.attention import MethodState, PatternCache, get_method, list_methods
from fastdit.attention.ordered import OrderedMethod
from fastdit.attention.pattern import pattern_of
from fastdit.attention.per_head.head_groups import SharedPatterns
from fastdit.attention.per_head.table import Table
from fastdit.tokens import AttentionCall, TokenSpec, VideoGrid

THREADS = 4


@pytest.fixture(autouse=True)
def _frequent_switches():
    """Let threads take turns far more often than by default, so that races show."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def together(*functions):
    """Start functions at the same time and return what they return."""
    barrier = threading.Barrier(len(functions))

    def run(function):
        barrier.wait()
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(run, functions))


def calls():
    """Calls of a few sizes, with padding of their own, more sizes than a table keeps."""
    for grid in (VideoGrid(1, 6, 10), VideoGrid(2, 5, 7), VideoGrid(3, 4, 5)):
        spec = TokenSpec(grid, 5)
        for real in (2, 4):
            padding = torch.arange(spec.num_tokens)[None] >= grid.num_tokens + real
            yield AttentionCall(spec, num_steps=1, key_padding=padding)


def check_threads(method, heads=3, rounds=2):
    work = [(call, tuple(qkv(call.tokens, heads=heads))) for call in calls()]
    expected = [method.forward(*tensors, call, MethodState()) for call, tensors in work]
    cache = PatternCache()

    def run(shift):
        for i in range(rounds * len(work)):
            place = (i + shift) % len(work)
            call, tensors = work[place]
            out = method.forward(*tensors, call, MethodState(cache=cache))
            torch.testing.assert_close(out, expected[place], rtol=1e-4, atol=1e-5)
            if shift == 0 and i % 5 == 4:
                cache.clear()

    together(*(lambda shift=shift: run(shift) for shift in range(THREADS)))


@pytest.mark.parametrize("name", [name for name in list_methods() if name != "paro"])
def test_methods(name):
    call = next(calls())
    q, k, _ = qkv(call.tokens)
    check_threads(small(name, q, k, call))


def test_tables():
    fields = ({"order": "hwf"}, {"density": 0.5}, {"order": "tile"}, {"density": 0.1, "order": "curve"})
    static = [get_method("diagonal", block_size=16, **own) for own in fields]
    methods = (*static, get_method("draft", tile=(1, 4, 4), density=0.4), get_method("skip"))
    check_threads(Table(edges=(1.0,), methods=methods, choices=(((0, 1, 2, 3, 0, 1, 4, 5),),)), heads=8)


def test_each_entry_is_built_once_and_whole():
    built, cache = [], PatternCache(limit=3)

    def build(key):
        built.append(key)
        inner = cache.static((key, "part"), lambda: [key] * 50)
        return list(inner)

    def run():
        for key in range(40):
            assert cache.static(key % 2, lambda key=key: build(key % 2)) == [key % 2] * 50

    together(*[run] * THREADS)
    assert len(cache.entries) <= 3

    everything, made = PatternCache(limit=None), []
    together(*[lambda: [everything.static(key, lambda key=key: made.append(key)) for key in range(60)]] * THREADS)
    assert sorted(made) == list(range(60))


@dataclass(frozen=True, kw_only=True)
class Ranked(OrderedMethod):
    """Keep a block of each row; the layout is made anew in each call."""

    name: ClassVar[str] = "ranked"

    def pattern(self, q, k, call, state):
        layout = self._build(call, q.device)
        return pattern_of(layout, torch.eye(layout.video_blocks, dtype=torch.bool))


def test_orders_that_come_and_go_get_numbers_of_their_own():
    call, shared = AttentionCall(TokenSpec(VideoGrid(3, 4, 5))), SharedPatterns()
    orders = ("raster", "hwf", "tile", "curve", "whf")
    q = torch.zeros(1, 1, 60, 1)
    keep = {order: Ranked(order=order, block_size=16).pattern(q, q, call, MethodState()) for order in orders[:3]}
    numbers = {order: shared.kind(pattern) for order, pattern in keep.items()}
    assert len(set(numbers.values())) == 3

    def run():
        for i in range(60):
            order = orders[i % 5]
            kind = shared.kind(Ranked(order=order, block_size=16).pattern(q, q, call, MethodState()))
            assert numbers.get(order, kind) == kind and (order in numbers) == (kind in numbers.values())

    together(*[run] * THREADS)
    gc.collect()
    assert len(shared.numbers) == 3


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("cache", [PatternCache(limit=7), SharedPatterns()])
def test_a_copy_starts_empty(cache, again):
    cache.static("key", lambda: torch.ones(1))
    other = again(cache)
    assert type(other) is type(cache) and other.limit == cache.limit and not other.entries
    assert other.static("key", lambda: 2) == 2 and other.lock is not cache.lock
    cache.clear()


def test_padding_is_taken_out_in_inference_mode_for_calls_that_are_not():
    """A mask that a thread makes without gradients serves one that trains."""
    call = next(calls())
    q, k, v = (x.requires_grad_() for x in qkv(call.tokens))
    cache, method = PatternCache(), get_method("diagonal", block_size=16, compensate="mean")
    with torch.inference_mode():
        method.forward(q, k, v, call, MethodState(cache=cache))
    assert not any(mask.lengths_k.is_inference() for known in cache.shortened.values() for mask in known.values())
    method.forward(q, k, v, call, MethodState(cache=cache)).sum().backward()
    assert q.grad.isfinite().all()
