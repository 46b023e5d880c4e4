import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_cases import CASES, Case, check_against_reference, naive

from fastdit.attention.kernels import block_sparse_attention, choose_kernel, explain_kernels, list_kernels
from fastdit.attention.kernels import dispatch as kernels
from fastdit.mask import BlockMask

HERE = Path(__file__).parent
TORCH_KERNELS = ("reference", "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("kernel", TORCH_KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_fp64(case, dtype, kernel, poisoned_empty):
    check_against_reference(case, dtype, kernel)


@pytest.mark.parametrize("kernel", TORCH_KERNELS)
@pytest.mark.parametrize("compensate", [None, "mean"])
def test_the_default_device_of_torch_does_not_matter(kernel, compensate):
    case = Case(tokens=(512, 520), blocks=(128, 128), head_dim=256, rows="some")
    mask, tensors = case.mask(), case.tensors(torch.float32)
    expected = block_sparse_attention(*tensors, mask, kernel=kernel, compensate=compensate)
    with torch.device("meta"):
        found = block_sparse_attention(*tensors, mask, kernel=kernel, compensate=compensate)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("compensate", [None, "mean"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_on_a_gpu(case, dtype, compensate, poisoned_empty):
    check_against_reference(case, dtype, "triton", "cuda", compensate)


def test_reference_is_plain_masked_attention():
    case = Case(heads=(2, 2), mask_heads=(2, 1), padded=True)
    mask, tensors = case.mask(), case.tensors(torch.float64)
    out, lse = block_sparse_attention(*tensors, mask, kernel="reference", scale=0.3)
    expected, expected_lse = naive(*tensors, mask, scale=0.3)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("kernel", TORCH_KERNELS)
def test_all_blocks_is_dense_attention(kernel):
    q, k, v = (torch.randn(1, 2, 100, 32) for _ in range(3))
    mask = BlockMask.from_dense(torch.ones(4, 4, dtype=torch.bool), block_q=32, block_k=32, tokens_q=100, tokens_k=100)
    out, _ = block_sparse_attention(q, k, v, mask, kernel=kernel)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("kernel", TORCH_KERNELS)
def test_any_memory_order(kernel):
    case = Case(heads=(2, 3), tokens=(90, 90))
    mask = case.mask()
    q, k, v = case.tensors(torch.float32)
    expected = block_sparse_attention(q, k, v, mask, kernel=kernel)[0]
    tokens_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    fused = torch.stack([q, k, v], 3).unbind(3)
    torch.testing.assert_close(block_sparse_attention(*tokens_first, mask, kernel=kernel)[0], expected)
    torch.testing.assert_close(block_sparse_attention(*fused, mask, kernel=kernel)[0], expected)


@pytest.mark.parametrize("kernel", TORCH_KERNELS)
@pytest.mark.parametrize("scale", [-0.2, 0.0, 1.5])
def test_any_scale(kernel, scale):
    case = Case()
    mask, tensors = case.mask(), case.tensors(torch.float32)
    out, _ = block_sparse_attention(*tensors, mask, scale=scale, kernel=kernel)
    torch.testing.assert_close(out, naive(*tensors, mask, scale=scale)[0])


@pytest.mark.parametrize("kernel", TORCH_KERNELS)
@pytest.mark.parametrize("case", [c for c in CASES if c.rows != "empty"], ids=str)
def test_gradients(case, kernel):
    mask = case.mask()
    tensors = [x.requires_grad_() for x in case.tensors(torch.float64)]
    out, _ = block_sparse_attention(*tensors, mask, kernel=kernel)
    visible = mask.to_tokens(*case.tokens)
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=visible)
    weights = torch.randn_like(out) * (visible.any(-1)[..., None])
    actual = torch.autograd.grad((out * weights).sum(), tensors)
    wanted = torch.autograd.grad((expected.nan_to_num(0) * weights).sum(), tensors)
    torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("kernel", TORCH_KERNELS)
@pytest.mark.parametrize("rows", ["some", "empty"])
def test_gradcheck(kernel, rows):
    case = Case(heads=(2, 1), tokens=(10, 9), blocks=(4, 4), head_dim=3, rows=rows, padded=True)
    mask = case.mask()
    tensors = [x.requires_grad_() for x in case.tensors(torch.float64)]
    outputs = slice(0, 1 if kernel == "cpu" or rows == "empty" else 2)
    assert torch.autograd.gradcheck(lambda *x: block_sparse_attention(*x, mask, kernel=kernel)[outputs], tensors)


def test_cpu_backward_in_low_precision():
    case = Case(tokens=(100, 100))
    mask = case.mask()
    tensors = [x.requires_grad_() for x in case.tensors(torch.bfloat16)]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    block_sparse_attention(*tensors, mask, kernel="cpu")[0].sum().backward()
    block_sparse_attention(*exact, mask, kernel="reference")[0].sum().backward()
    for x, y in zip(tensors, exact, strict=True):
        assert x.grad.dtype == torch.bfloat16
        assert (x.grad - y.grad).abs().max() <= 0.02 * y.grad.abs().max()


def test_cpu_runs_in_chunks(monkeypatch):
    from fastdit.attention.kernels.cpu import kernel as cpu

    monkeypatch.setattr(cpu, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(cpu, "_SLICE", 64)
    for case in (Case(tokens=(500, 400)), Case(heads=(2, 1), tokens=(500, 400), padded=True)):
        check_against_reference(case, torch.float32, "cpu")


def test_cpu_lists_shared_by_rows():
    case = Case(tokens=(512, 300))
    blocks = case.mask().to_dense()
    blocks[:, :, 1::2] = blocks[:, :, ::2]
    blocks[:, :, -3] = True
    mask = BlockMask.from_dense(blocks, block_q=32, block_k=32, tokens_q=512, tokens_k=300)
    tensors = case.tensors(torch.float32)
    torch.testing.assert_close(block_sparse_attention(*tensors, mask, kernel="cpu")[0], naive(*tensors, mask)[0])


def test_unlisted_entries_are_never_read():
    case = Case()
    mask, tensors = case.mask(), case.tensors(torch.float32)
    expected = block_sparse_attention(*tensors, mask, kernel="cpu")[0]
    padding = torch.full((*mask.indices.shape[:3], 3), 10**6, dtype=torch.int32)
    longer = replace(mask, indices=torch.cat([mask.indices, padding], -1))
    assert torch.equal(block_sparse_attention(*tensors, longer, kernel="cpu")[0], expected)


def test_choice_and_reasons():
    case = Case()
    mask, tensors = case.mask(), case.tensors(torch.float32)
    assert list_kernels() == ("triton", "cpu", "fa4", "reference")
    assert choose_kernel(*tensors, mask) == "cpu"
    assert choose_kernel(*tensors, mask, "reference") == "reference"
    reasons = explain_kernels(*tensors, mask)
    assert reasons["cpu"] is None and reasons["reference"] is None
    assert reasons["triton"]
    assert explain_kernels().keys() == reasons.keys()
    with pytest.raises(ValueError, match="or none of them"):
        explain_kernels(tensors[0])
    with pytest.raises(RuntimeError, match="kernel 'triton' cannot run: "):
        block_sparse_attention(*tensors, mask, kernel="triton")
    with pytest.raises(ValueError, match=r"unknown kernel 'tritn'.*triton, cpu, fa4, reference"):
        block_sparse_attention(*tensors, mask, kernel="tritn")


def test_reference_is_never_chosen_by_itself():
    case = Case()
    mask, tensors = case.mask().to("meta"), [x.to("meta") for x in case.tensors(torch.float32)]
    with pytest.raises(RuntimeError, match=r"no kernel can run.*cpu: it needs CPU tensors, got meta.*'reference'"):
        block_sparse_attention(*tensors, mask)


def test_importing_the_door_does_not_import_triton():
    code = "import sys; from fastdit.attention import kernels as k; k.explain_kernels(); print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE.parent, capture_output=True, text=True)
    assert done.stdout.strip() == "False"


Q = torch.zeros(1, 2, 128, 16)


@pytest.mark.parametrize(
    ("q", "k", "v", "error", "message"),
    [
        (Q[0], Q, Q, ValueError, r"must be \(B, H, S, D\), got q \(2, 128, 16\)"),
        (Q, Q, Q[:, :, :64], ValueError, "k and v in S"),
        (Q, Q[:, :1], Q[:, :1], ValueError, "agree in B, H and D"),
        (Q, Q.half(), Q, TypeError, "one dtype, got torch.float32, torch.float16"),
        (Q.int(), Q.int(), Q.int(), TypeError, "floating point, got torch.int32"),
        (Q[:, :, :96], Q, Q, ValueError, "4 blocks of 32 queries, which is 97 to 128 queries, got 96"),
        (Q, Q[:, :, :90], Q[:, :, :90], ValueError, "4 blocks of 32 keys, which is 97 to 128 keys, got 90"),
        (Q, Q[:, :, :100], Q[:, :, :100], ValueError, "holds 32 keys, but k ends after 4.*tokens_k=100"),
        (Q[:, :, :0], Q, Q, ValueError, "must not be empty"),
        (Q.to("meta"), Q, Q, ValueError, "one device, got meta, cpu, cpu, cpu"),
    ],
)
def test_bad_tensors(q, k, v, error, message):
    with pytest.raises(error, match=message):
        block_sparse_attention(q, k, v, Case().mask())


@pytest.mark.parametrize("mask_heads", [(1, 3), (2, 1)])
def test_mask_of_another_batch_or_heads(mask_heads):
    with pytest.raises(
        ValueError, match=f"batch {mask_heads[0]} and {mask_heads[1]} heads; batch must be 1 or 1, heads"
    ):
        block_sparse_attention(Q, Q, Q, Case(mask_heads=mask_heads).mask())


def test_bad_scale():
    with pytest.raises(ValueError, match="scale must be finite, got nan"):
        block_sparse_attention(Q, Q, Q, Case().mask(), scale=float("nan"))


def test_the_plan_is_made_once_per_mask(monkeypatch):
    from fastdit.attention.kernels.cpu import grouping as cpu_plan

    made = []
    monkeypatch.setattr(cpu_plan, "_plan_head", lambda *args, plan=cpu_plan._plan_head: made.append(1) or plan(*args))
    mask = Case().mask()
    for _ in range(3):
        block_sparse_attention(Q, Q, Q, mask)
    assert len(made) == 1
    assert kernels.choose_kernel(Q, Q, Q, mask) == "cpu"
