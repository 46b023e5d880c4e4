"""The Triton kernels, run by Triton's interpreter. Run by test_interpreter.py with TRITON_INTERPRET=1."""

import pytest
import torch
from kernel_cases import CASES, Case, check_against_reference

from fastdit.attention.kernels import block_sparse_attention, choose_kernel
from fastdit.attention.kernels.means import block_means
from fastdit.attention.kernels.options import Options
from fastdit.attention.kernels.triton import forward as triton_fwd
from fastdit.attention.kernels.triton.forward import block_sparse_fwd
from fastdit.attention.kernels.triton.means import triton_block_means
from fastdit.attention.kernels.triton.primitives import MEANS_TILE, _add_some
from fastdit.attention.kernels.triton.tiles import Config

RUNS = [(case, dtype) for case in CASES for dtype in (torch.float32, torch.bfloat16)]
RUNS += [(case, torch.float16) for case in CASES[:4]]
COMPENSATED = [(CASES[i], torch.float32) for i in (1, 3, 9, 10)] + [(CASES[i], torch.bfloat16) for i in (2, 5, 10)]


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=str)
def test_agrees_with_fp64(case, dtype, poisoned_empty):
    check_against_reference(case, dtype, "triton")


@pytest.mark.parametrize(("case", "dtype"), COMPENSATED, ids=str)
def test_compensation_agrees_with_fp64(case, dtype, poisoned_empty):
    check_against_reference(case, dtype, "triton", compensate="mean")


@pytest.mark.parametrize(
    ("tiles", "compensate"), [((16, 16), None), ((16, 64), None), ((64, 32), None), ((32, 16), "mean")], ids=str
)
def test_blocks_larger_than_tiles(tiles, compensate):
    case = Case(heads=(2, 1), tokens=(66, 250), blocks=(64, 128), padded=True)
    mask = case.mask()
    q, k, v = case.tensors(torch.float32)
    out, lse = block_sparse_fwd(q, k, v, mask, Options(0.1, compensate), Config(*tiles, 4, 2))
    expected, expected_lse = block_sparse_attention(q, k, v, mask, scale=0.1, kernel="reference", compensate=compensate)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


def test_tiles_without_keys_are_left_out(monkeypatch):
    case = Case(heads=(1, 1), tokens=(64, 384), blocks=(64, 128), rows="all")
    lengths = torch.tensor([24, 128, 97], dtype=torch.int32)
    mask = case.mask().with_lengths_k(lengths.view(1, 1, -1))
    seen = []
    add = _add_some

    def counted(scores, *rest):
        seen.append(scores.shape)
        return add(scores, *rest)

    monkeypatch.setattr(triton_fwd, "_add_some", counted)
    q, k, v = case.tensors(torch.float32)
    out, _ = block_sparse_fwd(q, k, v, mask, Options(0.1), Config(64, 64, 4, 2))
    assert len(seen) == 1 + 4, "tiles of 32 with a key in them"
    torch.testing.assert_close(out, block_sparse_attention(q, k, v, mask, scale=0.1, kernel="reference")[0])


@pytest.mark.parametrize(("scale", "compensate"), [(-0.2, None), (0.0, None), (1.5, None), (-0.2, "mean")])
def test_any_scale_and_memory_order(scale, compensate):
    case = Case(heads=(2, 2), tokens=(90, 70))
    mask = case.mask()
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.tensors(torch.float32))
    out, _ = block_sparse_attention(q, k, v, mask, scale=scale, kernel="triton", compensate=compensate)
    expected = block_sparse_attention(q, k, v, mask, scale=scale, kernel="reference", compensate=compensate)[0]
    torch.testing.assert_close(out, expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_means(dtype, poisoned_empty):
    case = Case(heads=(2, 2), mask_heads=(1, 2), tokens=(96, 110), blocks=(16, 48), head_dim=72, padded=True)
    mask = case.mask()
    x = case.tensors(dtype)[1].transpose(1, 2).contiguous().transpose(1, 2)
    means = triton_block_means(x, mask)
    torch.testing.assert_close(means[:, :, : mask.num_k], block_means(x, mask))
    assert means.shape[2] % MEANS_TILE == 0 and (means[:, :, mask.num_k :] == 0).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x.double(), "bf16, fp16 and fp32, got torch.float64"),
        (lambda x: x.repeat(1, 1, 1, 4), r"multiples of 8 in \[16, 128\], got 256"),
        (lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), "contiguous last axis"),
    ],
)
def test_reasons(change, reason):
    case = Case()
    mask, tensors = case.mask(), [change(x) for x in case.tensors(torch.float32)]
    with pytest.raises(RuntimeError, match=f"kernel 'triton' cannot run: .*{reason}"):
        choose_kernel(*tensors, mask, "triton")


def test_blocks_that_tiles_cannot_divide():
    case = Case(blocks=(32, 24))
    with pytest.raises(RuntimeError, match="multiple of 16 tokens, got 32 and 24"):
        choose_kernel(*case.tensors(torch.float32), case.mask(), "triton")
