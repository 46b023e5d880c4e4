"""Offsets past 2**31, in Triton's interpreter. Run by test_interpreter.py with TRITON_INTERPRET=1.

Inputs lie far apart, and results must be those of inputs that lie close. Contiguous inputs, results and workspaces
have more than 2**31 elements; there only the first and the last program run, nothing that large is read or written, and
every address must lie in a tensor.
"""

import inspect

import numpy as np
import pytest
import torch
from kernel_cases import Case
from triton.runtime import interpreter

from fastdit.attention.kernels.options import Options
from fastdit.attention.kernels.triton.backward import block_sparse_bwd
from fastdit.attention.kernels.triton.forward import block_sparse_fwd
from fastdit.attention.kernels.triton.int8 import int8_fwd
from fastdit.attention.kernels.triton.layout import triton_lay_out
from fastdit.attention.kernels.triton.lists import triton_lists
from fastdit.attention.kernels.triton.mass import triton_block_mass
from fastdit.attention.kernels.triton.means import triton_block_means
from fastdit.attention.kernels.triton.tiles import BackwardConfig, Config

LARGE = 64 << 20  # bytes of a tensor from which it is neither read nor written


def forward(q, k, v, mask):
    return block_sparse_fwd(q, k, v, mask, Options(0.2), config_of(mask))


def backward(q, k, v, mask):
    lse = torch.zeros(q.shape[:3])
    three = (config_of(mask),) * 3
    return block_sparse_bwd((q, k, v), (q, lse), v[:, :, : q.shape[2]], mask, Options(0.2), BackwardConfig(*three))


def backward_with_means(q, k, v, mask):
    lse = torch.zeros(q.shape[:3])
    three = (config_of(mask),) * 3
    return block_sparse_bwd((q, k, v), (q, lse), v, mask, Options(0.2, "mean"), BackwardConfig(*three))


def int8(q, k, v, mask):
    return int8_fwd(q, k, v, mask, Options(0.2, precision="int8"), config_of(mask))


def int8_fp8(q, k, v, mask):
    return int8_fwd(q, k, v, mask, Options(0.2, precision="int8_fp8"), config_of(mask))


def gathered(q, k, v, mask):
    index = torch.arange(k.shape[2]).flip(0)[None]
    return int8_fwd(q, k, v, mask, Options(0.2, "mean", "int8_fp8", index=index), config_of(mask))


def mass(q, k, v, mask):
    lengths = {"lengths_q": mask.lengths_q, "lengths_k": mask.lengths_k}
    return triton_block_mass(q, k, None, scale=0.2, block=mask.block_q, **lengths)


def means(q, k, v, mask):
    return triton_block_means(k, mask)


def lay_out(q, k, v, mask):
    return triton_lay_out(torch.arange(k.shape[2]).flip(0)[None], k, v)


def config_of(mask):
    return Config(min(128, mask.block_q), min(64, mask.block_k), 4, 2)


def launcher(places, seen):
    """Make what launches kernels: in the given programs of a grid, and without copies of what is there."""

    def launch(self, *args, **kwargs):
        kwargs = {name: value for name, value in kwargs.items() if name in inspect.getfullargspec(self.fn).args}
        given = inspect.getcallargs(self.fn, *args, **kwargs)
        seen.extend(x for x in given.values() if isinstance(x, torch.Tensor))
        given = {n: x if n in self.constexprs else interpreter._implicit_cvt(x) for n, x in given.items()}
        grid = (*self.grid, 1, 1)[:3]
        patch = interpreter._patch_lang(self.fn)
        try:
            interpreter.interpreter_builder.set_grid_dim(*grid)
            for place in places(grid):
                interpreter.interpreter_builder.set_grid_idx(*place)
                self.fn(**given)
        finally:
            patch.restore()

    return launch


@pytest.mark.parametrize(
    "run", [backward, backward_with_means, int8, int8_fp8, gathered, mass, means, lay_out], ids=lambda run: run.__name__
)
def test_inputs_far_apart(run, monkeypatch):
    block = 32 if run in (int8_fp8, gathered) else 16
    case = Case(heads=(1, 2), tokens=(3 * block, 3 * block), blocks=(block, block), head_dim=16)
    mask, tensors = case.mask(), case.tensors(torch.float16)
    far = []
    for x in tensors:
        strides = (2**20, 2**24, 2**30 // block, 1)  # a block spans 2**30, the last begins at 2**31
        size = 1 + sum(stride * (n - 1) for stride, n in zip(strides, x.shape, strict=True))
        whole = torch.empty(size, dtype=x.dtype)  # only what is written takes memory
        far.append(whole.as_strided(x.shape, strides).copy_(x))
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launcher(lambda grid: np.ndindex(*grid), []))
    torch.testing.assert_close(run(*far, mask), run(*tensors, mask), equal_nan=True)


@pytest.fixture
def ends_only(monkeypatch):
    """Run the first and the last program of each launch, and check addresses instead of touching large tensors."""
    seen = []

    def regions():
        for x in seen:
            span = 1 + sum(stride * (n - 1) for stride, n in zip(x.stride(), x.shape, strict=True))
            yield x.data_ptr(), x.data_ptr() + span * x.element_size()

    def large(pointers, mask):
        """Say whether active pointers go to a large tensor; all must go to one tensor."""
        found = np.broadcast_to(pointers.data, mask.data.shape)[mask.data].astype(np.int64)
        if not found.size:
            return True
        homes = [(start, end) for start, end in regions() if start <= found.min() and found.max() < end]
        assert homes, f"{len(found)} addresses are outside of all tensors"
        return min(end - start for start, end in homes) > LARGE

    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def checked_load(self, pointers, mask, other, *rest):
        if not large(pointers, mask):
            return load(self, pointers, mask, other, *rest)
        dtype = pointers.get_element_ty()
        return interpreter.TensorHandle(np.zeros(pointers.data.shape, interpreter._get_np_dtype(dtype)), dtype)

    def checked_store(self, pointers, value, mask, *rest):
        return None if large(pointers, mask) else store(self, pointers, value, mask, *rest)

    ends = launcher(lambda grid: ((0, 0, 0), tuple(n - 1 for n in grid)), seen)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", ends)
    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)


@pytest.mark.parametrize("heads", [(9, 512), (1, 4608)], ids=str)
@pytest.mark.parametrize(
    "run", [forward, backward, int8, int8_fp8, gathered, means, lay_out, mass], ids=lambda run: run.__name__
)
def test_large_tensors(run, heads, ends_only):
    x = torch.empty(*heads, 4096, 128, dtype=torch.float16)  # the last sample, and some heads, begin past 2**31
    mask = Case(tokens=(4096, 4096), blocks=(128, 128), rows="one").mask()
    made = run(x, x, x, mask)
    made = made if isinstance(made, tuple) else (made,)
    assert all(y.shape[:2] == heads for y in made)


def test_large_lists(ends_only):
    blocks = torch.ones(512, 512, dtype=torch.bool).expand(9, 1024, -1, -1)
    indices = triton_lists(blocks, torch.zeros(512, dtype=torch.bool), num_q=512, num_k=512, width=512)[0]
    assert indices.numel() > 2**31


def test_an_address_outside_is_found(ends_only, monkeypatch):
    from fastdit.attention.kernels.triton import means as triton_means

    monkeypatch.setattr(triton_means, "broadcast_strides", lambda x: (-(2**30), 0))
    with pytest.raises(AssertionError, match="outside of all tensors"):
        means(None, torch.zeros(2, 1, 512, 16), None, Case(heads=(2, 1), tokens=(512, 512), blocks=(16, 16)).mask())
