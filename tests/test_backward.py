"""Gradients of the Triton kernel, and the lists turned round that keys and values need for theirs."""

import pytest
import torch
from backward_cases import check_gradients
from kernel_cases import CASES, Case
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdit.attention.kernels.transposed import transposed_lists
from fastdit.attention.kernels.triton.tiles import choose_backward
from fastdit.mask import BlockMask


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("compensate", [None, "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton_on_a_gpu(case, dtype, compensate, poisoned_empty):
    check_gradients(case, dtype, "cuda", compensate=compensate)


def written_out(mask: BlockMask) -> torch.Tensor:
    """Turn the transposed lists into a map of blocks, one entry at a time; every list has to be ascending."""
    lists = transposed_lists(mask)
    batch, heads = lists.queries.shape[:2]
    blocks = torch.zeros(batch, heads, mask.num_q, mask.num_k, dtype=torch.bool)
    for b, h in torch.cartesian_prod(torch.arange(batch), torch.arange(heads)).tolist():
        queries, starts = lists.queries[b, h].tolist(), lists.starts[b, h].tolist()
        every = queries[lists.every_start :][: int(lists.every_counts[b, h])]
        for j in range(mask.num_k):
            own = queries[starts[j] : starts[j + 1]]
            assert own == sorted(set(own)) and every == sorted(set(every)) and not set(own) & set(every)
            blocks[b, h, [*own, *every], j] = True
    return blocks


@pytest.mark.parametrize("case", CASES, ids=str)
def test_transposed_lists(case):
    mask = case.mask()
    assert torch.equal(written_out(mask), mask.to_dense())
    assert transposed_lists(mask) is transposed_lists(mask)


def test_transposed_lists_do_not_read_past_the_count():
    mask = Case(rows="text", tokens=(100, 230)).mask()
    expected = mask.to_dense()
    mask.indices[torch.arange(mask.indices.shape[-1]) >= mask.counts[..., None]] = 2**30
    assert torch.equal(written_out(mask), expected)


def test_transposing_does_not_wait_for_the_device():
    mask = Case(heads=(2, 2), mask_heads=(2, 2), rows="text").mask()
    expected = transposed_lists(mask)
    with FakeTensorMode() as mode:
        names = ("indices", "counts", "full_counts", "every", "lengths_q", "lengths_k")
        fake = BlockMask(*(mode.from_tensor(getattr(mask, name)) for name in names), mask.block_q, mask.block_k)
        lists = transposed_lists(fake)
    assert lists.queries.shape == expected.queries.shape and lists.starts.shape == expected.starts.shape
    assert lists.every_start == expected.every_start


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (11, 0), (12, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_some_tiles_fit_any_block(capability, dtype):
    for dim in (16, 32, 72, 128):
        for block in (16, 32, 48, 64, 128, 256, 384):
            for blocks in ((block, 16), (16, block), (block, block)):
                config = choose_backward(capability, dim, dtype, *blocks)
                for tiles in (config.dq, config.dkdv, config.means):
                    assert blocks[0] % tiles.tile_q == 0 and blocks[1] % tiles.tile_k == 0
