from dataclasses import replace

import pytest
import torch
from kernel_cases import CASES, Case, check_against_reference

from fastdit.attention.kernels import block_sparse_attention


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0), reason="there is no such CUDA device"
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("variant", "tile"), [("tma", 32), ("warps", 64)])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_descriptors_on_a_gpu(case, variant, tile, dtype, poisoned_empty):
    if torch.cuda.get_device_capability() >= (12, 0):
        pytest.skip("no table has it there")
    wide = replace(case, blocks=tuple(-(-n // tile) * tile for n in case.blocks))
    check_against_reference(wide, dtype, "triton", "cuda", variant=variant)


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_kernels_without_variants_say_so(kernel):
    case = Case()
    with pytest.raises(RuntimeError, match="it has no variants, got variant='tma'"):
        block_sparse_attention(*case.tensors(torch.float32), case.mask(), kernel=kernel, variant="tma")


def test_unknown_variant():
    case = Case()
    with pytest.raises(ValueError, match="unknown variant 'tna'; variants are: loads, tma, warps"):
        block_sparse_attention(*case.tensors(torch.float32), case.mask(), variant="tna")
