"""The kernels in low precision, run by Triton's interpreter. Run by test_interpreter.py with TRITON_INTERPRET=1."""

import math
from dataclasses import replace

import pytest
import torch
from kernel_cases import CASES, Case, means_by_hand
from precision_cases import check_gathered, check_low_precision, unordered

from fastdit.attention.kernels import block_sparse_attention, choose_kernel
from fastdit.attention.kernels.options import Options
from fastdit.attention.kernels.quantize import quantize_blocks, quantize_channels, smooth_keys
from fastdit.attention.kernels.triton import int8 as triton_int8
from fastdit.attention.kernels.triton.int8 import int8_fwd
from fastdit.attention.kernels.triton.quantize import quantize_queries_keys, quantize_values
from fastdit.attention.kernels.triton.tiles import Config
from fastdit.mask import BlockMask

BF16, FP16 = torch.bfloat16, torch.float16
INT8 = [(CASES[i], FP16, None) for i in (1, 2, 3, 5, 6, 8, 9, 11)] + [(CASES[i], BF16, None) for i in (4, 7)]
INT8 += [(CASES[3], FP16, "mean"), (CASES[9], FP16, "mean"), (CASES[5], BF16, "mean")]
FP8 = [(CASES[i], FP16, None) for i in (1, 2, 6, 7, 9, 11)] + [(CASES[i], BF16, None) for i in (3, 4)]
FP8 += [(CASES[3], FP16, "mean"), (CASES[5], FP16, "mean"), (CASES[11], BF16, "mean")]
ODD = Case(heads=(2, 2), mask_heads=(1, 2), tokens=(90, 110), blocks=(16, 48), head_dim=72, padded=True)
LARGE = Case(heads=(2, 1), tokens=(70, 400), blocks=(64, 384), head_dim=16)


@pytest.fixture(autouse=True)
def poisoned_bytes(poisoned_empty, monkeypatch):
    """Fill uninitialised integers too, with what no rounded number is."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(-128) if out.dtype == torch.int8 else out

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.mark.parametrize(("case", "dtype", "compensate"), INT8, ids=str)
def test_int8(case, dtype, compensate):
    check_low_precision(case, dtype, "int8", compensate)


@pytest.mark.parametrize(("case", "dtype", "compensate"), FP8, ids=str)
def test_int8_fp8(case, dtype, compensate):
    check_low_precision(case, dtype, "int8_fp8", compensate)


@pytest.mark.parametrize(
    ("tiles", "precision", "compensate"),
    [
        ((16, 16), "int8", None),
        ((64, 128), "int8", "mean"),
        ((16, 64), "int8_fp8", None),
        ((32, 32), "int8_fp8", "mean"),
    ],
)
def test_blocks_larger_than_tiles(tiles, precision, compensate):
    """Scales are those of the mask's blocks, whatever the tiles are, so that results agree."""
    case = Case(heads=(2, 1), tokens=(66, 250), blocks=(64, 128), padded=True)
    mask, tensors = case.mask(), case.tensors(FP16)
    options = Options(0.1, compensate, precision)
    out, lse = int8_fwd(*tensors, mask, options, Config(*tiles, 4, 2))
    whole, whole_lse = int8_fwd(*tensors, mask, options, Config(64, 64, 4, 2))
    torch.testing.assert_close(lse, whole_lse)
    rounding = 2e-3 if precision == "int8" else 2e-2
    assert (out - whole).float().norm() <= rounding * whole.float().norm()


@pytest.mark.parametrize(
    ("head_dim", "precision", "compensate", "blocks", "dtype", "own"),
    [
        (64, "int8", None, (32, 32), BF16, True),
        (72, "int8", "mean", (16, 32), FP16, True),
        (128, "int8", "mean", (32, 16), BF16, False),
        (64, "int8_fp8", "mean", (96, 96), FP16, False),
        (72, "int8_fp8", None, (64, 64), BF16, True),
        (128, "int8_fp8", "mean", (32, 32), FP16, True),
    ],
    ids=str,
)
def test_gathered(head_dim, precision, compensate, blocks, dtype, own):
    check_gathered(head_dim, dtype, precision, compensate, own=own, blocks=blocks)


@pytest.mark.parametrize(("precision", "copied"), [("int8", [1]), ("int8_fp8", [])])
def test_only_values_in_16_bits_are_copied(precision, copied, monkeypatch):
    """With a negative scale, and one order for all heads."""
    tensors, layout, mask = unordered(64, BF16, own=False, blocks=(64, 64))
    seen, lay_out = [], triton_int8.triton_lay_out
    how = {"kernel": "triton", "precision": precision, "compensate": "mean", "scale": -0.2}
    expected = block_sparse_attention(*(layout.apply(x[:, :, : layout.num_tokens]) for x in tensors), mask, **how)
    monkeypatch.setattr(triton_int8, "triton_lay_out", lambda i, *x: seen.append(len(x)) or lay_out(i, *x))
    out, lse = block_sparse_attention(*tensors, mask, index=layout.index, **how)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1]) and seen == copied


def test_an_index_needs_low_precision():
    tensors, layout, mask = unordered(64, FP16, own=False)
    with pytest.raises(
        RuntimeError, match=r"kernel 'triton' cannot run: it gathers .* only in low precision; put them"
    ):
        block_sparse_attention(*tensors, mask, kernel="triton", index=layout.index)


@pytest.mark.parametrize(("scale", "precision"), [(-0.2, "int8"), (-0.2, "int8_fp8"), (0.0, "int8"), (1.5, "int8_fp8")])
def test_any_scale_and_memory_order(scale, precision):
    case = Case(heads=(2, 2), tokens=(90, 70))
    mask, tensors = case.mask(), case.tensors(FP16)
    how = {"scale": scale, "precision": precision, "compensate": "mean"}
    first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    out, lse = block_sparse_attention(*first, mask, kernel="triton", **how)
    again, again_lse = block_sparse_attention(*tensors, mask, kernel="triton", **how)
    assert torch.equal(out, again) and torch.equal(lse, again_lse) and out.stride() == first[0].stride()
    exact = block_sparse_attention(*(x.double() for x in tensors), mask, kernel="reference", **how)[0]
    assert (out - exact).norm() <= (0.01 if precision == "int8" else 0.05) * exact.norm()


def test_what_all_keys_share_costs_nothing():
    """In the output; the log-sum-exp has it back."""
    case = Case(heads=(1, 2), tokens=(64, 128))
    mask, (q, k, v) = case.mask(), case.tensors(FP16)
    shift = torch.randint(-8, 8, (1, 2, 1, 64)).half()
    k = (k * 64).round() / 64  # so that the sum is exact
    out, lse = block_sparse_attention(q, k, v, mask, kernel="triton", precision="int8")
    moved, moved_lse = block_sparse_attention(q, k + shift, v, mask, kernel="triton", precision="int8")
    assert (moved - out).norm() <= 2e-3 * out.norm()
    torch.testing.assert_close(moved_lse, lse + (q.float() * shift).sum(-1) / 8, atol=2e-3, rtol=0)


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_is_seen(where):
    case = Case(heads=(1, 2), tokens=(64, 64), rows="all")
    mask, tensors = case.mask(), dict(zip("qkv", case.tensors(FP16), strict=True))
    tensors[where][0, 1, 40, 5] = torch.nan
    out, _ = block_sparse_attention(*tensors.values(), mask, kernel="triton", precision="int8_fp8")
    assert out[0, 0].isfinite().all()
    hit = out[0, 1, 32:] if where == "q" else out[0, 1, :, 5] if where == "v" else out[0, 1]
    assert hit.isnan().all()


@pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
@pytest.mark.parametrize("compensate", [None, "mean"])
def test_a_sample_without_keys(precision, compensate):
    case = Case(heads=(2, 1))
    mask = case.mask()
    mask = mask.with_lengths_k(torch.stack([torch.zeros(1, 4), mask.lengths_k[0]]))
    how = {"kernel": "triton", "precision": precision, "compensate": compensate}
    out, lse = block_sparse_attention(*case.tensors(FP16), mask, **how)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all() and lse[1].isfinite().all() and out[1].any()


@pytest.mark.parametrize("case", [ODD, LARGE, CASES[8]], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_rounded_queries_and_keys(case, dtype):
    mask, (q, k, _) = case.mask(), case.tensors(dtype)
    lengths_q = mask.lengths_q.clone()
    lengths_q[..., 1:2] = 5
    mask, k = replace(mask, lengths_q=lengths_q), k + 2
    k[:, :, : mask.block_k] = 2  # a block that smoothing does not leave zeros in, and one that is zeros
    q[:, :, : mask.block_q] = 0
    found = quantize_queries_keys(q, k, mask, 0.3, pool=True)
    smooth, mean = smooth_keys(k.float(), mask)
    for rounded, scales, x, lengths, block, factor in (
        (found.q, found.q_scales, q.float(), mask.lengths_q, mask.block_q, 0.3 * math.log2(math.e)),
        (found.k, found.k_scales, smooth, mask.lengths_k, mask.block_k, 1),
    ):
        expected, steps = quantize_blocks(x, lengths, block)
        torch.testing.assert_close(scales, steps * factor)
        near = rounded[:, :, : x.shape[2], : x.shape[3]].int() - expected
        assert near.abs().max() <= 1 and near.count_nonzero() <= 1e-3 * near.numel()
        assert (rounded[:, :, x.shape[2] :] == 0).all() and (rounded[..., x.shape[3] :] == 0).all()
    real = (torch.arange(mask.block_q) < mask.lengths_q[..., None]).flatten(2)[..., : q.shape[2]].expand(q.shape[:3])
    lost = (q.float() @ mean.mT * 0.3)[..., 0]
    torch.testing.assert_close(found.lost[real], lost[real], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.k_mean, mean[:, :, 0])
    torch.testing.assert_close(found.k_means[:, :, : mask.num_k], means_by_hand(k.double(), mask).float())
    queries = replace(mask, lengths_k=mask.lengths_q, block_k=mask.block_q)
    torch.testing.assert_close(found.q_means, means_by_hand(q.double(), queries).float())


@pytest.mark.parametrize("case", [replace(ODD, blocks=(16, 96)), LARGE], ids=str)
def test_rounded_values(case):
    mask, (_, _, v) = case.mask(), case.tensors(BF16)
    v[..., 3] = 0
    rounded, scales = quantize_values(v, mask)
    expected, steps = quantize_channels(v.float(), mask)
    torch.testing.assert_close(scales, steps[:, :, 0])
    by_token = rounded.mT.flatten(2, 3)
    assert (by_token[..., v.shape[3] :].float() == 0).all() and (by_token[:, :, v.shape[2] :].float() == 0).all()
    found, expected = by_token[:, :, : v.shape[2], : v.shape[3]].float(), expected.float()
    assert (found - expected).abs().max() <= 32 and (found != expected).sum() <= 2e-3 * found.numel()


@pytest.mark.parametrize(
    ("dtype", "block", "precision", "reason"),
    [
        (torch.float32, 32, "int8", "int8 is for bf16 and fp16, got torch.float32; cast"),
        (BF16, 48, "int8_fp8", "multiple of 32 tokens, got 48; precision='int8' can run"),
        (BF16, 24, "int8", "multiple of 16 tokens, got 32 and 24"),
    ],
)
def test_reasons(dtype, block, precision, reason):
    case = Case(blocks=(32, block))
    with pytest.raises(RuntimeError, match=f"kernel 'triton' cannot run: .*{reason}"):
        choose_kernel(*case.tensors(dtype), case.mask(), "triton", precision=precision)


def test_there_are_no_variants():
    case = Case()
    with pytest.raises(RuntimeError, match="precision='int8' has no variants, got variant='loads'"):
        block_sparse_attention(*case.tensors(FP16), case.mask(), kernel="triton", precision="int8", variant="loads")


@pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
def test_offsets_do_not_overflow(precision, tmp_path):
    """Keys and values whose tokens lie so far apart that the last one is 2**32 elements away, in a file with holes."""
    q, k, v = (torch.randn(1, 1, 64, 32).half() for _ in range(3))
    mask = BlockMask.from_dense(torch.ones(2, 2, dtype=torch.bool), block_q=32, block_k=32)
    file = str(tmp_path / "far")
    far = torch.from_file(file, shared=True, size=2**32, dtype=FP16).as_strided((2, 1, 1, 64, 32), (32, 0, 0, 2**26, 1))
    far.copy_(torch.stack([k, v]))
    out, lse = block_sparse_attention(q, far[0], far[1], mask, kernel="triton", precision=precision)
    expected, expected_lse = block_sparse_attention(q, k, v, mask, kernel="triton", precision=precision)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
