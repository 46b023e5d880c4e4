"""Low precision against a definition written out block by block, and against what rounding must cost."""

import math

import pytest
import torch
from kernel_cases import CASES, Case
from precision_cases import check_gathered, check_low_precision

from fastdit.attention.kernels import block_sparse_attention, choose_kernel, explain_kernels, list_precisions
from fastdit.attention.kernels.quantize import int8_products, quantize_blocks, quantize_channels, round_weights
from fastdit.attention.kernels.triton.tiles import choose_int8_config, int8_reason
from fastdit.mask import BlockMask

INT8_RMS = 1 / math.sqrt(12)  # of a step: an error spread evenly over it
E4M3_RMS = 2**-3 * INT8_RMS / math.sqrt(7 / 3)  # of the magnitude: 3 bits after the point, mantissas spread evenly


def attention(q, k, v, mask, **how):
    return block_sparse_attention(q, k, v, mask, kernel="reference", **how)


def by_hand(q, k, v, mask, precision, compensate):
    """One sample and head, fp64, one query block at a time."""
    real = torch.cat([torch.arange(mask.block_k) < n for n in mask.lengths_k[0, 0]])[: len(k)]
    scale, mean = q.shape[1] ** -0.5, k[real].mean(0)
    lost = q @ mean * scale
    k = k - mean
    k8, v8 = torch.zeros_like(k), v.clone()
    means_k, means_v = torch.zeros(2, mask.num_k, k.shape[1], dtype=k.dtype)
    for j, n in enumerate(mask.lengths_k[0, 0].tolist()):
        block = slice(j * mask.block_k, j * mask.block_k + n)
        if n:
            k8[block] = to_int8(k[block])
            means_k[j], means_v[j] = k[block].mean(0), v[block].mean(0)
    if precision == "int8_fp8":
        step = v[real].abs().amax(0) / 448
        v8 = to_e4m3(v / step) * step
    out, lse = torch.zeros_like(q), torch.full_like(q[:, 0], -torch.inf)
    for i, listed in enumerate(mask.to_dense()[0, 0]):
        rows = slice(i * mask.block_q, i * mask.block_q + int(mask.lengths_q[0, 0, i]))
        keys = listed.repeat_interleave(mask.block_k)[: len(k)] & real
        others = ~listed & (mask.lengths_k[0, 0] > 0) if compensate else torch.zeros_like(listed)
        exact, stand_in = to_int8(q[rows]) @ k8[keys].T * scale, q[rows] @ means_k[others].T * scale
        scores = torch.cat([exact, stand_in + mask.lengths_k[0, 0, others].double().log()], 1)
        if scores.shape[1]:
            lse[rows] = scores.logsumexp(1) + lost[rows]
            weights = (scores - scores.amax(1, keepdim=True)).exp()
            total = weights.sum(1, keepdim=True)
            if precision == "int8_fp8":
                weights[:, : exact.shape[1]] = to_e4m3(448 * weights[:, : exact.shape[1]]) / 448
            out[rows] = weights @ torch.cat([v8[keys], means_v[others]]) / total
    return out, lse


def to_int8(x):
    step = x.abs().max() / 127
    return (x / step).round() * step


def to_e4m3(x):
    """Keep four bits of each number; below 2**-6 steps stay those of 2**-6."""
    exponent = torch.frexp(x).exponent.clamp(min=-5)
    step = torch.ldexp(torch.ones_like(x), exponent - 4)
    return (x / step).round() * step


@pytest.mark.parametrize("compensate", [None, "mean"])
@pytest.mark.parametrize("precision", list_precisions())
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_definition(case, precision, compensate):
    mask, (q, k, v) = case.mask(), case.tensors(torch.float64)
    out, lse = attention(q, k, v, mask, precision=precision, compensate=compensate)
    for b in range(case.heads[0]):
        for h in range(case.heads[1]):
            expected, expected_lse = by_hand(q[b, h], k[b, h], v[b, h], one_head(mask, b, h), precision, compensate)
            torch.testing.assert_close(out[b, h], expected)
            torch.testing.assert_close(lse[b, h], expected_lse)


def one_head(mask, b, h):
    dense, lengths = mask.to_dense(), mask.lengths_k
    b_, h_ = (lambda x: b if x.shape[0] > 1 else 0), (lambda x: h if x.shape[1] > 1 else 0)
    made = BlockMask.from_dense(
        dense[b_(dense), h_(dense)],
        block_q=mask.block_q,
        block_k=mask.block_k,
        lengths_q=mask.lengths_q[0, 0],
        lengths_k=lengths[b_(lengths), h_(lengths)],
    )
    made.counts[...] = mask.counts[b_(mask.counts), h_(mask.counts)]  # rows that list nothing stay so
    return made


@pytest.mark.parametrize("common", [0.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_costs_what_rounding_must(dtype, common):
    """Errors of half a step at most, evenly spread, add up over the head dim; what all keys share costs nothing."""
    case = Case(heads=(1, 2), tokens=(250, 500), blocks=(64, 128), head_dim=64)
    mask, (q, k, v) = case.mask(), case.tensors(torch.float64)
    q, k, v = (x.to(dtype).double() for x in (q, k + common * torch.randn(1, 2, 1, 64), v))
    exact, exact_lse = attention(q, k, v, mask)
    out, lse = attention(q.to(dtype), k.to(dtype), v.to(dtype), mask, precision="int8")
    smooth = k - k.mean(2, keepdim=True)
    steps_q = steps(q, mask.block_q) * smooth.square().sum(-1).mean(-1, keepdim=True).sqrt()
    steps_k = steps(smooth, mask.block_k) * q.square().sum(-1).mean(-1, keepdim=True).sqrt()
    expected = INT8_RMS * 64**-0.5 * (steps_q.square().mean() + steps_k.square().mean()).sqrt()
    error = (out - exact).norm() / exact.norm()
    rounding = torch.finfo(dtype).eps
    assert 0.7 * expected < error < 1.3 * expected + rounding, (error, expected)
    assert (lse - exact_lse).abs().max() < 5 * expected + 1e-6 * exact_lse.abs().max()


def steps(x, block):
    return torch.stack([part.abs().amax((2, 3)) / 127 for part in x.split(block, 2)], -1)


def test_int8_fp8_costs_what_rounding_must():
    case = Case(heads=(1, 2), tokens=(250, 500), blocks=(64, 128), head_dim=64)
    mask, tensors = case.mask(), case.tensors(torch.float32)
    exact = attention(*(x.double() for x in tensors), mask)[0]
    coarse, fine = (attention(*tensors, mask, precision=p)[0] for p in ("int8", "int8_fp8"))
    error, of_int8 = ((x - exact).norm() / exact.norm() for x in (fine, coarse))
    expected = (of_int8**2 + 2 * E4M3_RMS**2) ** 0.5
    assert 0.7 * expected < error < 1.3 * expected, (error, expected)


def test_smoothing_is_what_helps():
    case = Case(tokens=(128, 128))
    mask, (q, k, _) = case.mask(), case.tensors(torch.float64)
    k = k + 30
    rough = int8_products(q, k, mask)
    smooth = int8_products(q, k - k.mean(2, keepdim=True), mask) + q @ k.mean(2, keepdim=True).mT
    exact = q @ k.mT
    assert (smooth - exact).norm() < 0.2 * (rough - exact).norm()


@pytest.mark.parametrize("precision", list_precisions())
@pytest.mark.parametrize("compensate", [None, "mean"])
def test_padding_never_counts(precision, compensate):
    case = Case(heads=(2, 2), tokens=(90, 110), padded=True)
    mask, (q, k, v) = case.mask(), case.tensors(torch.float32)
    real = (torch.arange(32) < mask.lengths_k[..., None]).flatten(2)[..., :110, None]
    once = attention(q, k, v, mask, precision=precision, compensate=compensate)
    again = attention(q, k.where(real, 1e4), v.where(real, -1e4), mask, precision=precision, compensate=compensate)
    torch.testing.assert_close(again, once, rtol=0, atol=0)


def test_queries_that_are_padding_never_count():
    lengths = torch.tensor([16, 5, 0])
    q, k, v = (torch.randn(1, 1, 48, 16) for _ in range(3))
    mask = BlockMask.from_dense(torch.ones(3, 3, dtype=torch.bool), block_q=16, block_k=16, lengths_q=lengths)
    out, lse = attention(q, k, v, mask, precision="int8")
    q[:, :, 21:] = 1e4
    again, again_lse = attention(q, k, v, mask, precision="int8")
    assert torch.equal(again[:, :, :21], out[:, :, :21]) and torch.equal(again_lse[:, :, :21], lse[:, :, :21])
    assert again.isfinite().all()


def test_rounding_of_blocks():
    x = torch.tensor([127.0, 0.5, 1.5, -2.5, -127.0, 3.0, 0, 0])[None, None, :, None]
    rounded, scales = quantize_blocks(x, torch.tensor([[[5, 2]]]), 5)
    assert rounded.flatten().tolist() == [127, 0, 2, -2, -127, 127, 0, 0]
    assert scales.flatten().tolist() == [1, torch.tensor(3.0) / 127]
    nothing, ones = quantize_blocks(torch.zeros(1, 1, 8, 4), torch.tensor([[[4, 0]]]), 4)
    assert not nothing.any() and (ones == 1).all()


def test_rounding_to_e4m3():
    x = torch.rand(2000, dtype=torch.float64)
    x[0], x[1] = 0, 1
    assert torch.equal(round_weights(x), to_e4m3(448 * x) / 448)
    mask = BlockMask.from_dense(torch.ones(1, 1, dtype=torch.bool), block_q=16, block_k=16, tokens_q=16, tokens_k=12)
    v = torch.randn(1, 1, 12, 4)
    v[..., 0] = 0
    rounded, scales = quantize_channels(v, mask)
    assert rounded.dtype == torch.float8_e4m3fn and scales[0, 0, 0, 0] == 1
    assert (rounded.float().abs().amax(2)[..., 1:] == 448).all()


def test_no_kernel_for_cpus_and_errors_say_so():
    case = Case()
    mask, tensors = case.mask(), case.tensors(torch.float32)
    with pytest.raises(RuntimeError, match=r"no kernel can run\..*cpu: .*int8 is not faster.*kernel='reference' runs"):
        block_sparse_attention(*tensors, mask, precision="int8")
    with pytest.raises(RuntimeError, match=r"kernel 'cpu' cannot run: .*int8_fp8"):
        choose_kernel(*tensors, mask, "cpu", precision="int8_fp8")
    reasons = explain_kernels(*tensors, mask, precision="int8")
    assert reasons["reference"] is None and reasons["cpu"] and reasons["triton"]
    with pytest.raises(ValueError, match="unknown precision 'int4'; precisions are: int8, int8_fp8, or None"):
        block_sparse_attention(*tensors, mask, precision="int4")


@pytest.mark.parametrize("kernel", [None, "reference"])
def test_no_backward(kernel):
    case = Case()
    mask, tensors = case.mask(), [x.requires_grad_() for x in case.tensors(torch.float32)]
    with pytest.raises(RuntimeError, match=r"precision='int8' has no backward; use torch.no_grad\(\)"):
        block_sparse_attention(*tensors, mask, kernel=kernel, precision="int8")
    with torch.no_grad():
        assert attention(*tensors, mask, precision="int8")[0].isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("compensate", [None, "mean"])
@pytest.mark.parametrize("precision", list_precisions())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_on_a_gpu(case, dtype, precision, compensate, poisoned_empty):
    capability = torch.cuda.get_device_capability()
    reason = int8_reason(capability, dtype, precision, case.blocks[1])
    if reason is not None:
        pytest.skip(reason)
    check_low_precision(case, dtype, precision, compensate, "cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("compensate", [None, "mean"])
@pytest.mark.parametrize("precision", list_precisions())
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_gathered_on_a_gpu(head_dim, own, precision, compensate, poisoned_empty):
    reason = int8_reason(torch.cuda.get_device_capability(), torch.bfloat16, precision, 64)
    if reason is not None:
        pytest.skip(reason)
    check_gathered(head_dim, torch.bfloat16, precision, compensate, own=own, blocks=(64, 64), device="cuda")


@pytest.mark.parametrize(
    ("capability", "dtype", "precision", "block", "reason"),
    [
        ((9, 0), torch.bfloat16, "int8_fp8", 32, None),
        ((8, 0), torch.float16, "int8", 16, None),
        ((8, 9), torch.float16, "int8_fp8", 96, None),
        ((12, 0), torch.bfloat16, "int8_fp8", 64, None),
        ((8, 6), torch.bfloat16, "int8_fp8", 64, "capability 8.9 or later, this is 8.6; precision='int8' can run"),
        ((10, 0), torch.bfloat16, "int8", 64, "slower than bf16 on compute capability 10.0; leave precision out"),
        ((11, 0), torch.bfloat16, "int8_fp8", 64, "slower than bf16 on compute capability 11.0"),
        ((9, 0), torch.float32, "int8", 64, "for bf16 and fp16, got torch.float32; cast"),
        ((9, 0), torch.float16, "int8_fp8", 48, "multiple of 32 tokens, got 48"),
    ],
)
def test_where_it_runs(capability, dtype, precision, block, reason):
    found = int8_reason(capability, dtype, precision, block)
    if reason is None:
        assert found is None
        for dim in (16, 64, 72, 128):
            config = choose_int8_config(capability, dim, precision, 16 * block, block)
            assert block % config.tile_k == 0 and config.tile_k >= (32 if precision == "int8_fp8" else 16)
    else:
        assert reason in found


def test_best_tiles():
    """Those that divide the blocks of the mask, the widest first."""
    tiles = [choose_int8_config((9, 0), 128, "int8_fp8", *blocks) for blocks in ((128, 128), (64, 64), (16, 96))]
    assert [(config.tile_q, config.tile_k) for config in tiles] == [(128, 64), (64, 64), (16, 32)]
