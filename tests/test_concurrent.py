"""Several threads over one transformer: each video is what a fresh pipeline makes, and nothing is kept of it."""

import copy
import gc
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch

import fastdit
from fastdit.pipelines.interception.installation import installed

METHODS = {
    "draft": {"method": "draft", "density": 0.4, "tile": (1, 4, 4), "compensate": "mean"},
    "radial": {"method": "radial", "order": "curve", "block_size": 16, "min_band": 1},
    "profiled": {"method": "profiled", "density": 0.4},
}
PASSES = 2
WARM = 10
"""Videos after which every size was there."""
SCHEDULE = fastdit.Schedule(warmup_steps=0.25, refresh_steps=2)


class Broken(Exception):
    """What ends a video in the middle."""


def view(pipe):
    """Another pipeline over the same parts, with a scheduler of its own, as servers make one for each request."""
    other = type(pipe)(**pipe.components | {"scheduler": copy.deepcopy(pipe.scheduler)})
    other.set_progress_bar_config(disable=True)
    return other


def make(pipe, seed):
    """Make the video of a seed, with random size, steps and guidance; ``None`` where it is ended in the middle."""
    choose = random.Random(seed)
    size = choose.choice([(5, 64, 64), (9, 64, 96), (9, 96, 64)])
    steps, guidance, end = choose.randint(1, 4), choose.choice([1.0, 5.0]), choose.choice([None, None, 0, 1])

    def stop(pipe, step, timestep, tensors):
        if step == end:
            raise Broken
        return tensors

    try:
        noise = torch.Generator().manual_seed(seed)
        return tiny.run(pipe, steps, size, guidance, generator=noise, callback_on_step_end=stop)
    except Broken:
        return None


def held(pipe):
    runtime = installed(pipe.transformer).runtime
    return sum(len(layer.memories) for layer in runtime.layers), len(runtime.cache.entries)


def check(kind, name, videos, threads, keep_views):
    """Make many videos on some threads, and the same one after the other by pipelines that made no other."""
    pipe = tiny.pipeline(kind)
    pipe.enable_sparse_attention(**METHODS[name], schedule=SCHEDULE)
    local, memory, lock = threading.local(), [], threading.Lock()

    def work(seed):
        if not keep_views or not hasattr(local, "view"):
            local.view = view(pipe)
        video = make(local.view, seed)
        with lock:
            memory.append(held(pipe))
        return video

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(work, range(videos)))
    for seed in range(videos):
        fresh = tiny.pipeline(kind)
        fresh.enable_sparse_attention(**METHODS[name], schedule=SCHEDULE)
        expected = make(fresh, seed)
        assert (found[seed] is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(found[seed], expected, rtol=1e-4, atol=1e-5)
    gc.collect()
    layers = len(installed(pipe.transformer).runtime.layers)
    assert max(memories for memories, _ in memory) <= layers * threads * PASSES
    entries = [entries for _, entries in memory]
    assert max(entries[WARM:], default=0) <= max(entries[:WARM])


@pytest.mark.parametrize(
    ("kind", "name", "keep_views"),
    [
        ("wan", "draft", False),
        ("wan", "radial", True),
        ("wan", "profiled", False),
        ("ltx", "draft", True),
        ("hunyuan_video", "profiled", False),
    ],
)
def test_threads_over_one_transformer(kind, name, keep_views):
    check(kind, name, videos=10, threads=2, keep_views=keep_views)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_hundred_videos_on_two_threads(name):
    check("wan", name, videos=200, threads=2, keep_views=False)


def test_one_pipeline_under_a_lock_on_many_threads():
    """What servers do: a lock around each video, and whichever thread is free."""
    pipe = tiny.pipeline("wan")
    pipe.enable_sparse_attention(**METHODS["draft"], schedule=SCHEDULE)
    expected = [make(pipe, seed) for seed in range(8)]
    lock = threading.Lock()

    def work(seed):
        with lock:
            return make(pipe, seed)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(work, range(8)))
    for a, b in zip(found, expected, strict=True):
        assert (a is b is None) or torch.equal(a, b)


def test_loops_of_two_threads_have_steps_of_their_own():
    model = tiny.transformer("wan")
    fastdit.enable_sparse_attention(model, **METHODS["draft"], schedule=fastdit.Schedule(warmup_steps=1))
    barrier = threading.Barrier(2)

    def loop(seed, meet):
        outputs = []
        for timestep in (900.0, 600.0, 300.0):
            if meet:
                barrier.wait()
            with torch.no_grad():
                arguments = tiny.arguments("wan", seed=seed) | {"timestep": torch.full((1,), timestep)}
                outputs.append(model(**arguments).sample)
        return torch.stack(outputs)

    expected = [loop(seed, meet=False) for seed in range(2)]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda seed: loop(seed, meet=True), range(2)))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    totals = fastdit.find_sparse_attention(model).report()["totals"]
    assert totals["calls"] == 24 and totals["dense"] == {"warm-up step": 8}
