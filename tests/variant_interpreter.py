"""Variants of the forward kernel, run by Triton's interpreter. Run by test_interpreter.py with TRITON_INTERPRET=1."""

from dataclasses import replace

import pytest
import torch
from kernel_cases import CASES, Case, check_against_reference

from fastdit.attention.kernels import block_sparse_attention
from fastdit.attention.kernels.options import Options
from fastdit.attention.kernels.triton.forward import block_sparse_fwd, longest_first
from fastdit.attention.kernels.triton.tiles import Config, choose_config

DESCRIPTORS = ("tma", "warps")


@pytest.mark.parametrize("variant", DESCRIPTORS)
@pytest.mark.parametrize("case", [CASES[i] for i in (1, 2, 3, 4, 6, 7, 9, 11)], ids=str)
def test_descriptors_agree_with_fp64(case, variant, poisoned_empty):
    # No table lists fp32 tiles for descriptors, and blocks of 16 or of 48 tokens have none.
    tile = min(32, *(block & -block for block in case.blocks))
    mask, tensors = case.mask(), case.tensors(torch.float32)
    options = Options(case.head_dim**-0.5)
    out, lse = block_sparse_fwd(*tensors, mask, options, Config(tile, tile, 4, 2, variant))
    expected, expected_lse = block_sparse_attention(*tensors, mask, kernel="reference")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize(
    ("case", "compensate", "variant"),
    [
        (CASES[0], None, "tma"),
        (CASES[10], "mean", "tma"),
        (CASES[6], None, "tma"),
        (CASES[6], None, "warps"),
        (CASES[7], None, "warps"),
    ],
    ids=str,
)
def test_the_door_forces_a_variant(case, compensate, variant, poisoned_empty):
    check_against_reference(case, torch.bfloat16, "triton", compensate=compensate, variant=variant)


def test_specialised_warps_know_no_compensation():
    case = CASES[6]
    with pytest.raises(RuntimeError, match="variant 'warps' does not support compensation; use variant='tma'"):
        block_sparse_attention(
            *case.tensors(torch.bfloat16), case.mask(), kernel="triton", compensate="mean", variant="warps"
        )


@pytest.mark.parametrize("variant", DESCRIPTORS)
def test_descriptors_take_any_memory_order(variant, poisoned_empty):
    case = Case(heads=(2, 3), tokens=(90, 90), blocks=(64, 64))
    mask, tensors = case.mask(), case.tensors(torch.float16)
    expected = block_sparse_attention(*tensors, mask, kernel="reference")[0]
    tokens_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    fused = torch.stack(tensors, 3).unbind(3)
    for ordered in (tokens_first, fused):
        out = block_sparse_attention(*ordered, mask, kernel="triton", variant=variant)[0]
        torch.testing.assert_close(out, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x.new_empty(1, 2, 128, 66)[..., :64].normal_(), "multiples of 16 bytes, got .*66 elements of 2"),
        (lambda x: x.new_empty(x.numel() + 1)[1:].view_as(x).normal_(), "begin at a multiple of 16 bytes"),
        (lambda x: x[:, :1].expand(-1, 2, -1, -1), "must not be expanded"),
    ],
)
def test_descriptors_that_cannot_be_made(change, reason):
    case = Case()
    mask, (q, k, v) = case.mask(), case.tensors(torch.bfloat16)
    k = change(k)
    with pytest.raises(RuntimeError, match=f"variant 'tma' cannot read k: .*{reason}"):
        block_sparse_attention(q, k, v, mask, kernel="triton", variant="tma")
    with pytest.raises(ValueError, match=f"variant 'tma' cannot read k: .*{reason}"):
        block_sparse_fwd(q, k, v, mask, Options(0.1), Config(32, 32, 4, 2, "tma"))
    assert block_sparse_attention(q, k, v, mask, kernel="triton")[0].isfinite().all()
    with pytest.raises(RuntimeError, match=f"variant 'warps' cannot read q: .*{reason}"):
        block_sparse_attention(change(q), v, v, mask, kernel="triton", variant="warps")


def test_no_settings_for_a_variant():
    with pytest.raises(
        ValueError, match=r"no settings of variant 'tma' for compute capability 8.0.*use variant 'loads'"
    ):
        choose_config((8, 0), 128, torch.bfloat16, 128, 128, variant="tma")


def test_longest_rows_first():
    case = Case(heads=(2, 2), mask_heads=(2, 2), tokens=(200, 230), blocks=(16, 32), rows="text")
    mask = case.mask()
    order = longest_first(mask)
    counts = mask.counts.gather(-1, order.long())
    assert (counts.diff(dim=-1) <= 0).all() and (order.sort(-1).values == torch.arange(mask.num_q)).all()
    assert (order[..., 0] == mask.num_q - 1).all()
    equal = Case(tokens=(200, 230), blocks=(16, 32)).mask()
    assert (longest_first(equal) == torch.arange(equal.num_q)).all()


def test_offsets_beyond_32_bits(tmp_path):
    """Keeps tensors apart by more than 2**31 elements in sparse files; a 32-bit product would fail the interpreter."""
    case = Case(heads=(2, 2), tokens=(48, 48), blocks=(16, 16), head_dim=16, padded=True)
    mask, tensors = case.mask(), case.tensors(torch.float16)
    far = []
    for name, x in zip("qkv", tensors, strict=True):
        strides = (2**20, 2**24, 2**26, 1)  # a tile of 16 tokens spans 2**30, the last begins at 2**31
        size = 1 + sum(stride * (n - 1) for stride, n in zip(strides, x.shape, strict=True))
        whole = torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=x.dtype)
        far.append(whole.as_strided(x.shape, strides).copy_(x))
    config = Config(16, 16, 4, 2)
    expected = block_sparse_fwd(*tensors, mask, Options(0.2), config)
    for variant in ("loads", *DESCRIPTORS):
        actual = block_sparse_fwd(*far, mask, Options(0.2), replace(config, variant=variant))
        torch.testing.assert_close(actual, expected, equal_nan=True)
