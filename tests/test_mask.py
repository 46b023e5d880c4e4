import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdit.mask import BlockMask, keep_some

SHAPES = [(1, 1, 1, 1), (1, 1, 3, 5), (1, 3, 4, 4), (2, 1, 5, 3), (2, 3, 7, 6)]


def random_blocks(shape, density=0.4):
    blocks = torch.rand(shape) < density
    blocks[..., 0] |= ~blocks.any(-1)
    return blocks


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.01, 0.4, 1.0])
def test_lists_and_map_agree(shape, density):
    blocks = random_blocks(shape, density)
    num_q, num_k = shape[2:]
    mask = BlockMask.from_dense(blocks, block_q=8, block_k=4, tokens_q=num_q * 8 - 3, tokens_k=num_k * 4 - 1)
    assert torch.equal(mask.to_dense(), blocks)
    lists, valid = mask.lists()
    assert torch.equal(valid.sum(-1, dtype=torch.int32), mask.counts)
    for index, count, full, row in zip(
        lists.flatten(0, 2), mask.counts.flatten(), mask.full_counts.flatten(), blocks.flatten(0, 2), strict=True
    ):
        listed = index[:count].tolist()
        assert sorted(listed) == row.nonzero().flatten().tolist()
        assert listed[:full] == sorted(listed[:full]) and num_k - 1 not in listed[:full]
        assert listed[full:] == ([num_k - 1] if row[-1] else [])


def test_ragged_blocks_come_last_wherever_they_are():
    lengths = torch.tensor([4, 2, 4, 1, 4])
    mask = BlockMask.from_dense(torch.ones(2, 5, dtype=torch.bool), block_q=4, block_k=4, lengths_k=lengths)
    assert mask.lists()[0][0, 0].tolist() == [[0, 2, 4, 1, 3]] * 2 and mask.every.tolist() == [0, 2, 4, 1, 3]
    assert mask.full_counts.flatten().tolist() == [3, 3] and mask.counts.flatten().tolist() == [5, 5]
    assert mask.ragged_blocks.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_density_counts_real_pairs(shape):
    blocks = random_blocks(shape)
    batch, heads, num_q, num_k = shape
    lengths_q = torch.randint(1, 9, (batch, heads, num_q))
    lengths_k = torch.randint(0, 5, (batch, heads, num_k))
    lengths_k[..., 0] = 4
    mask = BlockMask.from_dense(blocks, block_q=8, block_k=4, lengths_q=lengths_q, lengths_k=lengths_k)
    pairs = lengths_q[..., :, None] * lengths_k[..., None, :]
    expected = ((pairs * blocks).sum((-1, -2)) / pairs.sum((-1, -2))).mean()
    assert mask.density == pytest.approx(float(expected), rel=1e-6)


class FewBytes(TorchDispatchMode):
    """Refuse results of eight bytes an entry that have as many entries as the lists."""

    def __init__(self, entries):
        super().__init__()
        self.entries = entries

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        assert not isinstance(out, torch.Tensor) or out.numel() < self.entries or out.element_size() < 8, func
        return out


@pytest.mark.parametrize("lengths", [(1, 1), (2, 1), (2, 3)], ids=str)
def test_density_is_counted_without_wide_copies_of_the_lists(lengths):
    blocks = torch.rand(2, 3, 9, 40) < 0.5
    sizes = torch.randint(1, 5, (*lengths, 40))
    mask = BlockMask.from_dense(blocks, block_q=4, block_k=4, lengths_k=sizes)
    with FewBytes(mask.indices.numel()):
        kept = mask.kept_by_head
    torch.testing.assert_close(kept, ((blocks * sizes[:, :, None]).sum((-1, -2)) / 9 / sizes.sum(-1)).double())


def test_density_of_everything_is_one_whatever_the_padding():
    mask = BlockMask.from_dense(torch.ones(3, 3, dtype=torch.bool), block_q=8, block_k=8, tokens_q=17, tokens_k=23)
    assert mask.density == 1


def test_empty_rows_get_the_block_at_their_position():
    blocks = torch.zeros(4, 8, dtype=torch.bool)
    blocks[1, 7] = True
    dense = BlockMask.from_dense(blocks, block_q=8, block_k=4).to_dense()[0, 0]
    assert dense.nonzero().tolist() == [[0, 0], [1, 7], [2, 4], [3, 6]]
    assert not blocks[0].any(), "the caller's map is left alone"


def test_tokens():
    blocks = torch.tensor([[True, False, True], [False, True, True]])
    mask = BlockMask.from_dense(blocks, block_q=2, block_k=2, tokens_q=3, tokens_k=5)
    expected = [[1, 1, 0, 0, 1], [1, 1, 0, 0, 1], [0, 0, 1, 1, 1]]
    assert mask.to_tokens(3, 5)[0, 0].int().tolist() == expected
    shorter = mask.with_lengths_k(torch.tensor([[[2, 1, 0]], [[2, 2, 1]]]))
    assert shorter.to_tokens(3, 5)[0, 0].int().tolist() == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0]]
    assert shorter.to_tokens(3, 5)[1, 0].int().tolist() == expected


def test_rows_that_list_everything_do_not_make_all_lists_long():
    blocks = torch.eye(6, dtype=torch.bool)
    blocks[4] = blocks[:, 5] = True
    lengths = torch.tensor([2, 2, 1, 2, 2, 2])
    for max_count in (None, 2):
        mask = BlockMask.from_dense(blocks, block_q=2, block_k=2, lengths_k=lengths, max_count=max_count)
        assert mask.indices.shape[-1] == 2 and torch.equal(mask.to_dense()[0, 0], blocks)
        assert mask.lists()[0][0, 0, 4].tolist() == [0, 1, 3, 4, 5, 2]
        assert mask.density == pytest.approx((blocks * lengths).sum() / (6 * lengths.sum()))
        shorter = mask.with_lengths_k(torch.tensor([[[1, 2, 1, 2, 2, 2]]]))
        assert torch.equal(shorter.to_dense()[0, 0], blocks) and shorter.every.tolist() == [1, 3, 4, 5, 0, 2]


def test_max_count_bounds_the_lists():
    blocks = torch.eye(6, dtype=torch.bool)
    assert BlockMask.from_dense(blocks, block_q=2, block_k=2).indices.shape[-1] == 1
    mask = BlockMask.from_dense(blocks, block_q=2, block_k=2, max_count=3)
    assert mask.indices.shape[-1] == 3 and torch.equal(mask.to_dense()[0, 0], blocks)


@pytest.mark.parametrize(
    ("blocks", "sizes", "error", "message"),
    [
        (torch.ones(2, 2), {}, TypeError, "bool"),
        (torch.ones(2, dtype=torch.bool), {}, ValueError, "Nq, Nk"),
        (torch.ones(0, 2, dtype=torch.bool), {}, ValueError, "not empty"),
        (torch.ones(2, 2, dtype=torch.bool), {"block_q": 0}, ValueError, "at least 1"),
        (torch.ones(2, 2, dtype=torch.bool), {"tokens_q": 17}, ValueError, "tokens_q=17"),
        (torch.ones(2, 2, dtype=torch.bool), {"tokens_k": 8}, ValueError, "tokens_k=8"),
        (torch.ones(2, 2, dtype=torch.bool), {"lengths_k": torch.ones(3)}, ValueError, "lengths_k"),
        (torch.ones(2, 2, dtype=torch.bool), {"lengths_k": torch.ones(2), "tokens_k": 9}, ValueError, "not both"),
    ],
)
def test_bad_masks(blocks, sizes, error, message):
    with pytest.raises(error, match=message):
        BlockMask.from_dense(blocks, **{"block_q": 8, "block_k": 8, **sizes})


@pytest.mark.parametrize("lengths", [[-1, 8], [9, 8], [4.5, 8.0], [float("nan"), 8.0]], ids=str)
@pytest.mark.parametrize("side", ["q", "k"])
def test_lengths_beyond_a_block_are_refused(side, lengths):
    blocks, sizes = torch.ones(2, 2, dtype=torch.bool), {"block_q": 8, "block_k": 8}
    message = rf"lengths_{side} must be whole numbers in \[0, 8\]"
    with pytest.raises(ValueError, match=message):
        BlockMask.from_dense(blocks, **sizes, **{f"lengths_{side}": torch.tensor(lengths)})
    if side == "k":
        with pytest.raises(ValueError, match=message):
            BlockMask.from_dense(blocks, **sizes).with_lengths_k(torch.tensor(lengths))


@pytest.mark.parametrize("shape", [(3,), (2, 2), (3, 1, 2), (1, 4, 2)], ids=str)
def test_lengths_of_another_shape_are_refused(shape):
    blocks = torch.ones(2, 3, 2, 2, dtype=torch.bool)
    for side in "qk":
        with pytest.raises(ValueError, match=rf"lengths_{side} must be .* batch 2 and 3 heads"):
            BlockMask.from_dense(blocks, block_q=8, block_k=8, **{f"lengths_{side}": torch.ones(shape)})
    with pytest.raises(ValueError, match="lengths_k must be"):
        BlockMask.from_dense(blocks, block_q=8, block_k=8).with_lengths_k(torch.ones(shape))


def test_shorter_blocks_on_both_sides():
    blocks = torch.tensor([[True, False], [True, True]])
    mask = BlockMask.from_dense(blocks, block_q=4, block_k=4)
    shorter = mask.shortened(torch.tensor([[[4, 1]]]), torch.tensor([[[2, 4]], [[4, 0]]], dtype=torch.int32))
    assert torch.equal(shorter.to_dense()[0, 0], blocks)
    # of 5 queries 4 see the first keys and one sees all: 2 of 6 keys in the first sample, all 4 in the second
    assert shorter.kept_by_head.flatten().tolist() == pytest.approx([(4 * 2 + 6) / 30, 1])


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (4, 9), (2, 3, 9, 4)], ids=str)
def test_only_empty_rows_get_a_block(shape):
    blocks = torch.rand(shape) < 0.2
    kept = keep_some(blocks)
    empty = ~blocks.any(-1)
    assert torch.equal(kept[~empty], blocks[~empty]) and (kept[empty].sum(-1) == 1).all()
    own = torch.arange(shape[-2]) * shape[-1] // shape[-2]
    assert kept.gather(-1, own.view(-1, 1).expand(*shape[:-1], 1))[..., 0][empty].all()


def test_derived_data_stays_with_its_own_mask():
    mask = BlockMask.from_dense(torch.ones(2, 2, dtype=torch.bool), block_q=4, block_k=4)
    mask.derived["kernel"] = object()
    assert mask.to("cpu").derived == {}
    assert mask.with_lengths_k(mask.lengths_k).derived == {}


@pytest.mark.parametrize("shape", [(1, 1, 5, 9), (2, 3, 9, 9), (1, 2, 4, 30)], ids=str)
def test_shorter_blocks_are_listed_as_from_the_start(shape):
    """Lists put in order again, with rows that list everything, are those of a map with the lengths from the start."""
    blocks = torch.rand(shape) < torch.tensor([0.2, 0.6, 1])[torch.arange(shape[2]) % 3, None]
    sizes = {"block_q": 4, "block_k": 4}
    mask = BlockMask.from_dense(blocks, **sizes, lengths_k=torch.randint(2, 5, (shape[3],)))
    lengths = torch.randint(0, 5, (2, 1, shape[3])).clamp(min=3 * (torch.arange(shape[3]) % 2)[None, None])
    found, expected = mask.with_lengths_k(lengths), BlockMask.from_dense(blocks, **sizes, lengths_k=lengths)
    for name in ("counts", "full_counts", "every", "lengths_k"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for one, two in zip(found.lists(), expected.lists(), strict=True):
        assert torch.equal(one, two)
