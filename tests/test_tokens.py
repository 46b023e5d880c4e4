import pytest

from fastdit.tokens import TokenSpec, VideoGrid


def test_grid_counts():
    grid = VideoGrid(21, 30, 52)
    assert (grid.frame_tokens, grid.num_tokens, str(grid)) == (1560, 32760, "21x30x52")


@pytest.mark.parametrize("text_first", [True, False])
def test_slices_cover_the_sequence_once(text_first):
    spec = TokenSpec(VideoGrid(2, 3, 4), 5, text_first)
    tokens = list(range(spec.num_tokens))
    assert sorted(tokens[spec.video] + tokens[spec.text]) == tokens
    assert len(tokens[spec.text]) == 5 and (tokens[spec.text][0] == 0) is text_first


def test_no_text():
    spec = TokenSpec(VideoGrid(2, 3, 4))
    assert spec.video == slice(0, 24) and spec.num_tokens == 24 and list(range(24))[spec.text] == []


@pytest.mark.parametrize("shape", [(0, 1, 1), (1, -2, 1), (1, 1, 0)])
def test_empty_grids_are_refused(shape):
    with pytest.raises(ValueError, match="at least one token"):
        VideoGrid(*shape)


def test_negative_text_is_refused():
    with pytest.raises(ValueError, match="text_tokens"):
        TokenSpec(VideoGrid(1, 1, 1), -1)
