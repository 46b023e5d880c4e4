"""What FlashAttention-4 is told: its lists against dense masks, and a stand-in for the package that obeys them."""

import re
import sys
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from kernel_cases import CASES, naive
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdit.attention.kernels import choose_kernel, explain_kernels, fa4, list_kernels
from fastdit.attention.kernels.options import Options
from fastdit.mask import BlockMask


class Blocks(NamedTuple):
    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor
    full_block_idx: torch.Tensor
    block_size: tuple


class Package:
    """Computes in fp64 what its arguments ask for, and keeps them."""

    def __init__(self):
        self.calls = []

    def flash_attn_func(self, q, k, v, **options):
        self.calls.append(options)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        blocks = options["block_sparse_tensors"]
        visible = self.visible(q, k, blocks, blocks.block_size, options)
        backward = options["block_sparse_tensors_bwd"]
        assert (backward is not None) == (torch.is_grad_enabled() and q.requires_grad)
        if backward is not None:
            turned = self.visible(k, q, backward, backward.block_size[::-1], options, of_keys=True)
            assert torch.equal(turned.mT, visible)
        scores = (q @ k.mT * options["softmax_scale"]).masked_fill(~visible, -torch.inf)
        out = scores.masked_fill(~visible.any(-1, keepdim=True), 0).softmax(-1)
        out = (out.masked_fill(~visible, 0) @ v).transpose(1, 2)
        assert options["return_lse"]
        return out, scores.logsumexp(-1)

    def visible(self, q, k, blocks, size, options, of_keys=False):
        """Expand lists of rows to tokens: whole blocks if full, else the keys that the mask lets through."""
        (rows, columns), block_q, block_k = (q.shape[2], k.shape[2]), *size
        shape = (*q.shape[:2], -(-rows // block_q))
        expanded = [x.expand(*shape, *x.shape[3:]) for x in blocks[:4]]
        assert all(x.dtype == torch.int32 for x in expanded)
        found = torch.zeros(*q.shape[:2], rows, columns, dtype=torch.bool)
        tensors, real_keys = options["aux_tensors"], options["mask_mod"]
        assert tensors[0].shape[:2] == q.shape[:2]
        for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in shape)).tolist():
            row = slice(i * block_q, min((i + 1) * block_q, rows))
            for counts, lists, full in ((*expanded[:2], False), (*expanded[2:], True)):
                for j in lists[b, h, i, : counts[b, h, i]].tolist():
                    column = slice(j * block_k, min((j + 1) * block_k, columns))
                    keys = torch.arange(row.start, row.stop) if of_keys else torch.arange(column.start, column.stop)
                    real = real_keys([b], [h], None, keys[None], None, tensors) | full
                    found[b, h, row, column] = real.T if of_keys else real
        return found


@pytest.fixture
def package(monkeypatch):
    stand_in, cute = Package(), ModuleType("flash_attn.cute")
    cute.flash_attn_func = stand_in.flash_attn_func
    for name, module in {
        "flash_attn.cute": cute,
        "flash_attn.cute.block_sparsity": SimpleNamespace(BlockSparseTensorsTorch=Blocks),
        "flash_attn.cute.utils": SimpleNamespace(scalar_to_ssa=lambda x, dtype: x),
        "cutlass": SimpleNamespace(Int32=torch.int32),
        "cutlass.cute": SimpleNamespace(jit=lambda function: function),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    fa4._real_keys.cache_clear()
    yield stand_in
    fa4._real_keys.cache_clear()


def listed(counts, lists, width):
    """Turn counts and lists into a map of blocks; lists must ascend."""
    blocks = torch.zeros(*counts.shape, width, dtype=torch.bool)
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
        row = lists[b, h, i, : counts[b, h, i]].long()
        assert (row.diff() > 0).all()
        blocks[b, h, i, row] = True
    return blocks


@pytest.mark.parametrize("case", CASES, ids=str)
def test_lists_are_the_mask(case):
    mask = case.mask()
    dense, ragged = mask.to_dense(), mask.ragged_blocks
    few, few_lists, full, full_lists = fa4.key_lists(mask)
    assert torch.equal(listed(few, few_lists, mask.num_k), dense & ragged)
    assert torch.equal(listed(full, full_lists, mask.num_k), dense & ~ragged)
    few, few_lists, full, full_lists = fa4.query_lists(mask)
    assert torch.equal(listed(few, few_lists, mask.num_q), dense.mT & ragged[:, None])
    assert torch.equal(listed(full, full_lists, mask.num_q), dense.mT & ~ragged[:, None])
    ends = fa4.key_ends(mask)
    assert torch.equal(ends - torch.arange(mask.num_k) * mask.block_k, mask.lengths_k)
    assert all(x.dtype == torch.int32 for x in (*fa4.key_lists(mask), *fa4.query_lists(mask), ends))


def test_lists_are_made_once_and_nothing_waits_for_the_device():
    mask = CASES[10].mask()
    assert mask.indices.shape[-1] < mask.num_k == mask.counts.max()
    assert fa4.key_lists(mask) is fa4.key_lists(mask) and fa4.query_lists(mask) is fa4.query_lists(mask)
    there = mask.to("meta")  # where nothing can be looked at
    assert [x.shape for x in fa4.key_lists(there)] == [x.shape for x in fa4.key_lists(mask)]
    assert [x.shape for x in fa4.query_lists(there)] == [x.shape for x in fa4.query_lists(mask)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_package_gets_the_mask(case, package):
    mask, (q, k, v) = case.mask(), case.tensors(torch.float64)
    out, lse = fa4.run(q, k, v, mask, Options(0.3))
    expected, expected_lse = naive(q, k, v, mask, scale=0.3)
    assert out.shape == q.shape
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert package.calls[0]["block_sparse_tensors"].block_size == (mask.block_q, mask.block_k)


def test_keys_of_every_launch_share_what_is_compiled(package):
    for case in (CASES[0], CASES[3], CASES[5]):
        fa4.run(*case.tensors(torch.float64), case.mask(), Options(1.0))
    first, second, third = (call["mask_mod"] for call in package.calls)
    assert first is second is third


@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[10]], ids=str)
def test_gradients_are_those_of_the_lists(case, package):
    mask, tensors = case.mask(), [x.requires_grad_() for x in case.tensors(torch.float64)]
    out, lse = fa4.run(*tensors, mask, Options(0.3))
    assert not lse.requires_grad
    weights = torch.randn_like(out)
    actual = torch.autograd.grad((out * weights).sum(), tensors)
    wanted = torch.autograd.grad((naive(*tensors, mask, scale=0.3)[0] * weights).sum(), tensors)
    torch.testing.assert_close(actual, wanted)
    with torch.no_grad():
        fa4.run(*tensors, mask, Options(0.3))
    assert [call["block_sparse_tensors_bwd"] is None for call in package.calls] == [False, True]


@pytest.mark.parametrize(
    ("capability", "sizes", "backward", "reason"),
    [
        ((9, 0), (128, 1000, 128, 128), True, None),
        ((9, 0), (64, 1000, 64, 64), False, None),
        ((9, 0), (64, 1000, 192, 128), False, None),
        ((10, 3), (96, 1000, 256, 256), True, None),
        ((10, 0), (128, 100, 128, 128), False, None),
        ((8, 9), (128, 1000, 128, 128), False, "capability 9.0 or 10.x, this is 8.9"),
        ((12, 0), (128, 1000, 128, 128), False, "capability 9.0 or 10.x, this is 12.0"),
        ((9, 0), (136, 1000, 128, 128), False, "multiples of 8 up to 128, got 136"),
        ((9, 0), (60, 1000, 128, 128), False, "multiples of 8 up to 128, got 60"),
        ((9, 0), (64, 1000, 64, 128), True, "multiple of 128 tokens with gradients on compute capability 9.0, got 64"),
        ((9, 0), (64, 1000, 32, 128), False, "multiple of 64 tokens without gradients on .* 9.0, got 32"),
        ((9, 0), (64, 1000, 128, 64), True, "key blocks of 128 tokens with gradients .*, got 64"),
        ((9, 0), (64, 1000, 128, 256), False, "key blocks of 64 or 128 tokens without gradients .*, got 256"),
        ((10, 0), (64, 1000, 128, 128), False, "multiple of 256 tokens without gradients on .* 10.0, got 128"),
        ((10, 0), (64, 1000, 256, 64), False, "key blocks of a multiple of 128 tokens .*, got 64"),
    ],
)
def test_sizes(capability, sizes, backward, reason):
    found = fa4.shape_reason(capability, *sizes, backward=backward)
    assert found is None if reason is None else re.search(reason, found)


HALF = {"dtype": torch.bfloat16, "device": "cuda"}


@pytest.mark.parametrize(
    ("make", "options", "reason"),
    [
        (HALF, {}, None),
        (HALF | {"dtype": torch.float32}, {}, "bf16 and fp16, got torch.float32"),
        (HALF | {"device": "cpu"}, {}, "needs CUDA tensors, got cpu"),
        (HALF | {"size": (1, 2, 256, 136)}, {}, "multiples of 8 up to 128, got 136"),
        (HALF, {"scale": -1.0}, "positive scales, got -1.0"),
        (HALF, {"precision": "int8"}, "precision='int8'; set precision=None"),
        (HALF, {"compensate": "mean"}, "compensate='mean'; set compensate=None"),
        (HALF, {"variant": "tma"}, "variant='tma'; set variant=None"),
    ],
)
def test_reasons_of_a_call(monkeypatch, make, options, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    mask = BlockMask.from_dense(torch.ones(2, 2, dtype=torch.bool), block_q=128, block_k=128)
    with FakeTensorMode():  # there need be no GPU for tensors that only say they are there
        x = torch.empty(**{"size": (1, 2, 256, 128), **make})
        turned = torch.empty(1, 2, 128, 256, **HALF).mT
        found = fa4.check(x, x, x, mask, Options(**{"scale": 1.0, **options}))
        assert "contiguous last axis" in fa4.check(*[torch.empty(1, 2, 256, 128, **HALF)] * 2, turned, mask, Options(1))
    assert found is None if reason is None else reason in found


def test_it_runs_on_request_only_and_says_what_is_missing(monkeypatch):
    assert "fa4" in list_kernels() and list_kernels().index("fa4") > list_kernels().index("cpu")
    case = CASES[0]
    arguments = (*case.tensors(torch.bfloat16), case.mask())
    monkeypatch.setattr(fa4, "_installed", lambda: False)
    assert "pip install 'fastdit[fa4]'" in explain_kernels()["fa4"]
    with pytest.raises(RuntimeError, match="kernel 'fa4' cannot run: the package flash-attn-4 is not installed"):
        choose_kernel(*arguments, "fa4")
    monkeypatch.setattr(fa4, "_installed", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert explain_kernels()["fa4"] == "torch finds no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert fa4.available() is None
