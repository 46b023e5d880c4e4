from dataclasses import replace

import pytest
import torch
from kernel_cases import CASES, Case

from fastdit.attention.kernels import block_sparse_attention
from fastdit.attention.kernels.checks import SWITCH, check_lists


@pytest.mark.parametrize("case", CASES, ids=str)
def test_good_lists_pass(case):
    mask = case.mask()
    check_lists(mask)
    assert mask.counts.min() >= 0


def changed(name, index, value):
    """Make a mask with ragged blocks, and set one number of it."""
    mask = Case(tokens=(128, 250), padded=True, heads=(2, 2), mask_heads=(1, 2)).mask()
    tensor = getattr(mask, name).clone()
    tensor[index] = value
    return replace(mask, **{name: tensor})


BAD = [
    ("counts", (0, 1, 2), 9, r"counts are not in \[0, 8\].*in 1 rows; the first is batch 0, head 1, row 2: count 9"),
    ("counts", (0, 0, 0), -1, r"counts are not in \[0, 8\]"),
    ("full_counts", (0, 0, 1), 7, r"full_counts are not in \[0, count\]"),
    ("counts", (0, 0, 1), 7, r"counts are beyond the 4 entries"),
    ("indices", (0, 1, 3, 0), 8, r"key blocks are not in \[0, 8\).*head 1, row 3"),
    ("indices", (0, 1, 3, 0), -1, r"key blocks are not in \[0, 8\)"),
    ("full_counts", (0, slice(None), slice(None)), 4, "do not ascend|hold padding"),
    ("every", 0, 5, "must hold each of the 8 key blocks once"),
]


@pytest.mark.parametrize(("name", "index", "value", "message"), BAD, ids=str)
def test_bad_lists_are_refused_before_they_are_read(name, index, value, message, monkeypatch):
    mask = changed(name, index, value)
    tensors = [torch.randn(2, 2, n, 16) for n in (128, 250, 250)]
    monkeypatch.setenv(SWITCH, "1")
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(*tensors, mask)


def test_twice_the_same_block():
    mask = Case(tokens=(128, 256)).mask()
    mask.indices[0, 0, 0, 1] = mask.indices[0, 0, 0, 0]
    with pytest.raises(ValueError, match=r"do not ascend.*row 0: count 4, 4 of it full, list \["):
        check_lists(mask)


def test_a_row_of_all_blocks_needs_no_list():
    mask = Case(tokens=(128, 256), rows="text").mask()
    assert (mask.counts == mask.num_k).any()
    mask.indices[mask.counts == mask.num_k] = 10**6
    check_lists(mask)
    mask.counts[0, 0, 0] = mask.num_k - 1
    with pytest.raises(ValueError, match=r"beyond|full_counts|not in|ascend"):
        check_lists(mask)


def test_lists_are_trusted_by_default(monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    mask = changed("every", 0, 5)
    tensors = [torch.randn(2, 2, n, 16) for n in (128, 250, 250)]
    assert block_sparse_attention(*tensors, mask)[0].isfinite().all()
