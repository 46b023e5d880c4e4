"""The CPU kernel on several threads: the same bits as on one, and the caller's thread is left as it was."""

import json
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from kernel_cases import Case

from benches import busy
from fastdit.attention.kernels import block_sparse_attention
from fastdit.attention.kernels.cpu import kernel as cpu
from fastdit.attention.kernels.cpu.workers import run_jobs
from fastdit.bench.measuring import measure
from fastdit.mask import BlockMask

CASES = [
    Case(heads=(1, 1), tokens=(500, 400)),
    Case(heads=(2, 3), mask_heads=(2, 3), tokens=(230, 200), padded=True),
    Case(heads=(1, 3), mask_heads=(1, 3), tokens=(130, 70), rows="empty"),
    Case(heads=(2, 1), tokens=(300, 130), rows="all"),
    Case(heads=(2, 2), tokens=(100, 130), blocks=(16, 32), rows="text", head_dim=40),
]


@pytest.fixture(autouse=True)
def _tiny_calls_are_worth_threads(monkeypatch):
    monkeypatch.setattr(cpu, "_PRODUCTS", 1)
    monkeypatch.setattr(cpu, "_CHUNK_BYTES", 1)


@pytest.fixture
def threads():
    """Set how many threads the caller may use; it must be so at the end, here and in threads to come."""
    before, wanted = torch.get_num_threads(), [torch.get_num_threads()]

    def use(count):
        wanted[0] = count
        torch.set_num_threads(count)

    yield use
    found = torch.get_num_threads()
    with ThreadPoolExecutor(1) as pool:
        later = pool.submit(torch.get_num_threads).result()
    torch.set_num_threads(before)
    assert (found, later) == (wanted[0], wanted[0])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastdit-cpu")]


def results(tensors, mask, compensate=None):
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = block_sparse_attention(*leaves, mask, kernel="cpu", compensate=compensate)
    weights = torch.linspace(-1, 1, out.numel()).view_as(out).to(out)
    return [out.detach(), lse, *torch.autograd.grad(out, leaves, weights)]


def same(found, expected):
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def spy(monkeypatch, watch, name="_attention"):
    """Call ``watch`` before each operation of the kernel, in the thread that does it."""
    operation = getattr(cpu, name)

    def watched(*args, **kwargs):
        watch()
        return operation(*args, **kwargs)

    monkeypatch.setattr(cpu, name, watched)


@pytest.mark.parametrize("compensate", [None, "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_many_threads_as_you_like_give_the_same_bits(case, dtype, compensate, threads, monkeypatch):
    monkeypatch.setattr(cpu, "_QUERIES", 64)
    mask, tensors = case.mask(), case.tensors(dtype)
    expected = results(tensors, mask, compensate)
    for count in (2, 5):
        threads(count)
        assert same(results(tensors, mask, compensate), expected)


@pytest.mark.parametrize("operation", ["_attention", "_attention_backward"])
@pytest.mark.parametrize("heads", [(1, 1), (1, 2), (2, 3)])
def test_threads_work_at_the_same_time_on_one_head_or_many(heads, operation, threads, monkeypatch):
    case = Case(heads=heads, tokens=(256, 256), blocks=(32, 32))
    mask, tensors = case.mask(), case.tensors(torch.float32)
    expected = results(tensors, mask)
    together = threading.Barrier(2, timeout=60)  # broken if one thread does all
    first = [threading.Lock(), threading.Lock()]
    spy(monkeypatch, lambda: any(lock.acquire(blocking=False) for lock in first) and together.wait(), operation)
    threads(2)
    assert same(results(tensors, mask), expected)


def test_sums_keep_their_order_when_the_first_chunk_comes_last(threads, monkeypatch):
    case = Case(heads=(1, 1), tokens=(512, 256))
    mask, tensors = case.mask(), case.tensors(torch.float32)
    expected = results(tensors, mask)
    calls, others = [], threading.Event()

    def watch():
        calls.append(None)
        if len(calls) == 1:
            assert others.wait(60)
        elif len(calls) == 5:
            others.set()

    spy(monkeypatch, watch, "_attention_backward")
    threads(2)
    assert same(results(tensors, mask), expected)


def test_workers_run_in_the_modes_of_the_caller_and_on_one_thread_each(threads, monkeypatch):
    case = Case(heads=(1, 4))
    mask, tensors = case.mask(), case.tensors(torch.float32)
    expected = block_sparse_attention(*tensors, mask, kernel="cpu")[0]
    seen = []

    def modes():
        autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast

    spy(monkeypatch, lambda: seen.append((threading.current_thread().name, torch.get_num_threads(), *modes())))
    threads(3)
    with torch.inference_mode(), torch.autocast("cpu", torch.float16):
        inferred = block_sparse_attention(*tensors, mask, kernel="cpu")[0]
    assert inferred.is_inference() and torch.equal(inferred, expected)
    assert all(name.startswith("fastdit-cpu") for name, *_ in seen)
    assert {tuple(rest) for _, *rest in seen} == {(1, False, True, True, torch.float16)}
    seen.clear()
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.equal(block_sparse_attention(*leaves, mask, kernel="cpu")[0], expected)
    assert {tuple(rest[:4]) for _, *rest in seen} == {(1, False, False, False)}


@pytest.mark.parametrize("default", [torch.float64, torch.float16], ids=str)
def test_the_default_dtype_does_not_matter(default, threads):
    case = Case(heads=(1, 2), tokens=(100, 90))
    mask, tensors = case.mask(), case.tensors(torch.float32)
    expected = results(tensors, mask, "mean")
    threads(2)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        leaves = [x.requires_grad_() for x in tensors]
        out, lse = block_sparse_attention(*leaves, mask, kernel="cpu", compensate="mean")
    finally:
        torch.set_default_dtype(before)
    assert same([out, lse], expected[:2])


def test_one_thread_is_the_callers_own(threads, monkeypatch):
    """Processes that share a machine, as launchers start them, run on one thread each."""
    case = Case(heads=(1, 4))
    seen = set()
    for operation in ("_attention", "_attention_backward"):
        spy(monkeypatch, lambda: seen.add(threading.get_ident()), operation)
    threads(1)
    results(case.tensors(torch.float32), case.mask())
    assert seen == {threading.get_ident()}


def test_small_calls_are_not_worth_a_thread(threads, monkeypatch):
    case = Case(heads=(1, 4))
    seen = set()
    spy(monkeypatch, lambda: seen.add((threading.get_ident(), torch.get_num_threads())))
    monkeypatch.setattr(cpu, "_PRODUCTS", 10**9)
    threads(2)
    block_sparse_attention(*case.tensors(torch.float32), case.mask(), kernel="cpu")
    assert seen == {(threading.get_ident(), 2)}


def test_a_mode_that_sees_operations_sees_them_all(threads):
    class Names(torch.utils._python_dispatch.TorchDispatchMode):
        names: tuple[str, ...] = ()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names += (func.overloadpacket.__name__,)
            return func(*args, **(kwargs or {}))

    case = Case(heads=(1, 2))
    threads(2)
    with Names() as mode:
        block_sparse_attention(*case.tensors(torch.float32), case.mask(), kernel="cpu")
    assert mode.names.count("_scaled_dot_product_flash_attention_for_cpu") >= 8


@pytest.mark.parametrize("operation", ["_attention", "_attention_backward"])
def test_an_error_in_one_thread_is_the_callers_and_stops_the_others(operation, threads, monkeypatch):
    case = Case(heads=(2, 4), tokens=(512, 128))
    mask, tensors = case.mask(), case.tensors(torch.float32)
    calls, lock, failed = [], threading.Lock(), threading.Event()

    def watch():
        with lock:
            calls.append(None)
            number = len(calls)
        if number == 3:
            failed.set()
            raise ArithmeticError("third")
        if number > 3:
            assert failed.wait(60)

    spy(monkeypatch, watch, operation)
    threads(3)
    with pytest.raises(ArithmeticError, match="third"):
        results(tensors, mask)
    assert len(calls) < 2 * 4 * 512 // 32 // 2


def test_a_thread_that_cannot_start_ends_the_call(threads, monkeypatch):
    case = Case(heads=(1, 4))
    start, calls = threading.Thread.start, []

    def limited(thread):
        if thread.name == "fastdit-cpu-2":
            raise RuntimeError("can't start new thread")
        start(thread)

    spy(monkeypatch, lambda: calls.append(None))
    monkeypatch.setattr(threading.Thread, "start", limited)
    threads(4)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        block_sparse_attention(*case.tensors(torch.float32), case.mask(), kernel="cpu")
    assert not calls
    monkeypatch.setattr(threading.Thread, "start", start)


@pytest.mark.skipif(os.name != "posix", reason="a signal to one thread")
def test_an_interrupt_ends_the_call(threads, monkeypatch):
    case = Case(heads=(2, 4), tokens=(512, 128))
    calls = []
    interrupted = threading.Event()

    def watch():
        calls.append(None)
        if len(calls) == 3:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        if len(calls) >= 3:
            interrupted.wait(0.05)

    spy(monkeypatch, watch)
    threads(2)
    with pytest.raises(KeyboardInterrupt):
        block_sparse_attention(*case.tensors(torch.float32), case.mask(), kernel="cpu")
    assert len(calls) < 2 * 4 * 512 // 32 // 2


def test_calls_of_several_threads_at_once(threads):
    case = Case(heads=(1, 2), tokens=(200, 150))
    problems = [(case.tensors(torch.float32), case.mask()) for _ in range(4)]
    shared = problems[0][1]
    expected = [(results(x, mask), results(x, shared, "mean")) for x, mask in problems]
    shared.derived.clear()

    def run(i):
        torch.get_num_threads()  # or else the thread's first parallel operation resets its count
        torch.set_num_threads(2 + i % 2)
        found = []
        for _ in range(2):
            found.append((results(*problems[i]), results(problems[i][0], shared, "mean")))
        return found, torch.get_num_threads()

    with ThreadPoolExecutor(4) as pool:
        for i, (found, count) in enumerate(pool.map(run, range(4))):
            assert count == 2 + i % 2
            assert all(same(x, expected[i][0]) and same(y, expected[i][1]) for x, y in found)
    threads(1)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs fork and a list of native threads")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_after_a_call(threads, monkeypatch):
    case = Case(heads=(1, 2))
    native = set()
    for operation in ("_attention", "_attention_backward"):
        spy(monkeypatch, lambda: native.add(threading.get_native_id()), operation)
    mask, tensors = case.mask(), case.tensors(torch.float32)
    threads(2)
    expected = results(tensors, mask)
    native.discard(threading.get_native_id())
    deadline = time.monotonic() + 60
    while any((Path("/proc/self/task") / str(n)).exists() for n in native) and time.monotonic() < deadline:
        time.sleep(0.001)  # before Python 3.13 threads are joined a moment before the system has ended them
    child = multiprocessing.get_context("fork").Process(target=_exit_if_same, args=(tensors, mask, expected))
    child.start()
    child.join(60)
    if child.exitcode is None:
        child.kill()
    assert child.exitcode == 7


def _exit_if_same(tensors, mask, expected):
    os._exit(7 if same(results(tensors, mask), expected) else 1)


def test_rows_that_share_a_list_are_split(threads, monkeypatch):
    """Dense rows are one list: without a split one thread would do a whole head."""
    monkeypatch.setattr(cpu, "_QUERIES", 64)
    mask = BlockMask.from_dense(torch.ones(8, 4, dtype=torch.bool), block_q=32, block_k=32, tokens_q=250, tokens_k=128)
    seen = []
    spy(monkeypatch, lambda: seen.append(None))
    q, k, v = torch.randn(1, 1, 250, 16), torch.randn(1, 1, 128, 16), torch.randn(1, 1, 128, 16)
    threads(2)
    out, _ = block_sparse_attention(q, k, v, mask, kernel="cpu")
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert len(seen) == 4


class Sum:
    """Job that adds numbers up."""

    def __init__(self, numbers):
        self.numbers, self.log, self.lock = numbers, [], threading.Lock()

    def start(self):
        self.log.append("start")
        return iter(self.numbers)

    def step(self, step):
        with self.lock:
            self.log.append(step)

    def finish(self):
        self.log.append("finish")


@pytest.mark.parametrize("count", [1, 2, 7])
def test_jobs_start_once_and_finish_after_their_last_step(count, threads):
    threads(2)
    jobs = [Sum(range(n)) for n in (0, 300, 1, 20)]
    run_jobs(jobs, count)
    for job in jobs:
        assert job.log[0] == "start" and job.log[-1] == "finish"
        assert sorted(job.log[1:-1]) == list(job.numbers)


def test_the_benchmark_beside_busy_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    busy.main(256, 1, 16, 0.5, 64, "float32", 1, 1, tmp_path / "busy.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "busy.jsonl").read_text().splitlines()]
    assert [(row["setting"]["backward"], row["setting"]["busy"]) for row in rows] == [
        (False, 0),
        (False, 1),
        (True, 0),
        (True, 1),
    ]
    assert all(row["speedup"] > 0 and row["density"] == 0.5 for row in rows)
