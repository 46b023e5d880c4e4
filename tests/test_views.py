"""What is shown of a plan: short names, shares, block maps, and pictures that can be drawn of any plan."""

import sys

import numpy as np
import pytest
import torch
from test_plan import masks

from fastdit.attention import MethodState, get_method
from fastdit.plans import plots
from fastdit.plans.contents import bucket_names, chosen, head_choices, layers, shares, short_names
from fastdit.plans.head_maps import head_map, head_maps
from fastdit.plans.plan import Plan, TransformerPlan
from fastdit.tokens import AttentionCall, TokenSpec, VideoGrid

METHODS = (
    get_method("dense"),
    get_method("draft", density=0.1, tile=(1, 4, 4), compensate="mean"),
    get_method("draft", density=0.3, tile=(1, 4, 4)),
    get_method("radial", block_size=16),
    get_method("multi_diagonal", density=0.3, block_size=16),
    get_method("skip"),
)
GRID = VideoGrid(3, 5, 7)


def some_plan(choices, methods=METHODS, titles=("transformer",), tokens=None, **changes):
    choices = np.array(choices)
    names = ("errors", "densities", "seconds", "error_means", "error_stds")
    cells = {name: np.random.default_rng(seed).random(choices.shape) for seed, name in enumerate(names)}
    cells["recalls"] = np.where(choices == 5, None, 0.75 + 0 * choices)  # of a method without blocks it is unknown
    about = {"model_class": "WanTransformer3DModel", "config_hash": "0123456789abcdef", "head_dim": 16}
    about["frame_mass"] = np.random.default_rng(1).random((*choices.shape[1:], 3)) / 3
    edges = tuple((i + 1) / len(choices) for i in range(len(choices)))
    values = {
        "candidates": methods,
        "buckets": edges,
        "transformers": {title: TransformerPlan(choices=choices, **cells, **about) for title in titles},
        "tokens": TokenSpec(GRID) if tokens is None else tokens,
        "steps": 10,
        "scheduler": "UniPCMultistepScheduler",
        "density": 0.25,
        "speedup": 2.0,
        "error": 0.1,
        "curve": ((0.1, 0.5), (0.25, 0.1), (1, 0)),
    }
    return Plan(**(values | changes))


SMALL = [[[0, 1, 2], [3, 4, 5]], [[1, 1, 2], [3, 4, 5]]]


def test_names_are_short_and_all_different():
    assert short_names(METHODS) == [
        "dense",
        "draft density=0.1 compensate=mean",
        "draft density=0.3",
        "radial",
        "multi_diagonal density=0.3",
        "skip",
    ]
    twins = (get_method("paro", plan=masks()), get_method("paro", plan=masks()), get_method("radial"))
    assert short_names(twins) == ["paro #0", "paro #1", "radial"]
    tiles = [get_method("draft", density=1 / 3, tile=tile) for tile in ((1, 4, 4), (1, 8, 8))]
    assert short_names(tiles) == ["draft density=0.333 tile=1x4x4", "draft density=0.333 tile=1x8x8"]


def test_buckets_are_named_by_their_part_of_the_run():
    assert bucket_names((1.0,)) == ["all steps"]
    assert bucket_names((0.25, 1 / 3, 1)) == [
        "0 to 25 % of the steps",
        "25 to 33.3 % of the steps",
        "33.3 to 100 % of the steps",
    ]


def test_tables_average_what_was_chosen():
    plan = some_plan(SMALL, titles=("transformer", "transformer_2"))
    assert (
        shares(plan)
        == shares(plan, "transformer")
        == {1: 3 / 12, 2: 2 / 12, 3: 2 / 12, 4: 2 / 12, 5: 2 / 12, 0: 1 / 12}
    )
    found = plan.transformers["transformer"]
    errors, densities = np.array(found.errors), np.array(found.densities)
    first = chosen(plan)[0]
    here = np.array(SMALL) == 1
    assert (first["index"], first["method"], first["fields"]["density"]) == (1, "draft", 0.1)
    assert first["density"] == pytest.approx(densities[here].mean())
    assert first["error"] == pytest.approx(np.sqrt((errors[here] ** 2).mean()))
    rows = layers(plan, "transformer")
    assert [row["layer"] for row in rows] == [0, 1]
    assert rows[0]["methods"] == {"draft": 5 / 6, "dense": 1 / 6}
    assert rows[0]["same_frame"] == pytest.approx(np.mean([row[0] for row in found.frame_mass[0]]))
    assert rows[1]["density"] == pytest.approx(densities[:, 1].mean())
    assert rows[0]["error"] == pytest.approx(np.sqrt((errors[:, 0] ** 2).sum(1).mean()))
    for name, of_heads in (("error_mean", found.error_means), ("error_std", found.error_stds)):
        assert rows[1][name] == pytest.approx(np.sqrt((np.array(of_heads)[:, 1] ** 2).sum(1).mean()))
    assert [row["recall"] for row in rows] == [0.75, 0.75]
    head = head_choices(plan, "transformer", 0, 0)
    assert [row["error_std"] for row in head] == [bucket[0][0] for bucket in found.error_stds]
    assert [row["recall"] for row in head_choices(plan, "transformer", 1, 2)] == [None, None]
    assert [row["name"] for row in head] == ["dense", "draft density=0.1 compensate=mean"]
    assert [row["error"] for row in head] == [bucket[0][0] for bucket in found.errors]


@pytest.mark.parametrize("text", [(0, False), (6, True), (6, False)], ids=str)
@pytest.mark.parametrize("index", [0, 3, 4, 5])
def test_maps_show_what_a_head_computes(index, text):
    tokens = TokenSpec(GRID, *text)
    plan = some_plan([[[index]]], tokens=tokens)
    found = head_map(plan, "transformer", 0, 0, 0)
    call = AttentionCall(tokens)
    nothing = torch.zeros(1, 1, tokens.num_tokens, 8)
    pattern = METHODS[index].pattern(nothing, nothing, call, MethodState())
    assert torch.equal(found.blocks, pattern.mask.to_dense()[0, 0])
    # token by token, in the model's own order
    place = pattern.layout.index[0]
    kept = pattern.mask.to_tokens(len(place), len(place))[0, 0]
    pairs = torch.zeros(tokens.num_tokens, tokens.num_tokens, dtype=torch.float64)
    real = place >= 0
    pairs[place[real][:, None], place[real]] = kept[real][:, real].double()
    video = pairs[tokens.video, tokens.video].view(3, 35, 3, 35).mean((1, 3))
    torch.testing.assert_close(found.frames, video)
    assert index != 5 or not found.frames.any()


def test_calibrated_masks_are_shown_head_by_head_and_bucket_by_bucket():
    paro = masks()
    plan = some_plan([[[1, 1], [1, 0]]] * 2, methods=(METHODS[0], get_method("paro", plan=paro)), tokens=paro.tokens)
    for bucket, layer, head in ((0, 0, 1), (1, 0, 1), (0, 1, 0)):
        found = head_map(plan, "transformer", bucket, layer, head)
        assert torch.equal(found.blocks, paro.blocks(bucket, layer)[head])
    assert not torch.equal(*(head_map(plan, "transformer", bucket, 0, 1).blocks for bucket in (0, 1)))


def test_buckets_with_one_method_share_a_map():
    plan = some_plan([[[3]], [[3]], [[1]], [[4]]])
    spans = [(first, last, found is None) for first, last, found in head_maps(plan, "transformer", 0, 0)]
    assert spans == [(0, 1, False), (2, 2, True), (3, 3, False)]


def texts(figure):
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def test_the_picture_of_methods_says_what_is_where(tmp_path):
    figure = plots.draw_methods(some_plan(SMALL), "transformer")
    first, second = figure.axes
    for axes, bucket in ((first, SMALL[0]), (second, SMALL[1])):
        assert np.array_equal(axes.collections[0].get_array(), np.array(bucket).T)
        written = {text.get_position(): text.get_text() for text in axes.texts}
        assert written == {(i, j): str(bucket[i][j]) for i in range(2) for j in range(3)}
    assert second.get_xlabel() == "layer" and first.get_ylabel() == "head"
    assert first.get_title(loc="left") == "0 to 50 % of the steps"
    assert "1: draft density=0.1 compensate=mean (25% of heads)" in texts(figure)
    colors = plots._colors(some_plan(SMALL))
    assert len(set(colors)) == len(METHODS)
    plots.save(figure, tmp_path / "methods.png")
    assert (tmp_path / "methods.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["densities", "errors"])
def test_the_pictures_of_numbers_are_in_percent(name):
    plan = some_plan(SMALL)
    figure = plots.draw_numbers(plan, "transformer", name)
    values = np.array(getattr(plan.transformers["transformer"], name))
    shown = np.stack([axes.collections[0].get_array() for axes in figure.axes[:2]])
    np.testing.assert_allclose(shown, 100 * values.swapaxes(1, 2))
    assert any(text.startswith("% of ") for text in texts(figure))


def test_the_picture_of_distances_has_a_row_for_each_head():
    plan = some_plan(SMALL)
    axes, _ = plots.draw_distances(plan, "transformer").axes
    mass = np.array(plan.transformers["transformer"].frame_mass)
    np.testing.assert_allclose(axes.collections[0].get_array(), 100 * mass.reshape(6, 3))
    assert axes.get_ylim() == (1.5, -0.5) and axes.get_xlabel() == "frames apart"
    assert axes.get_ylabel() == "layer, with a row for each of 3 heads"


@pytest.mark.parametrize("unit", ["density", "seconds"])
def test_the_chosen_point_is_shown_beside_the_curve(unit):
    axes = plots.draw_curve(some_plan(SMALL, curve_unit=unit)).axes[0]
    curve, star = axes.lines
    assert curve.get_xdata().tolist() == [10, 25, 100] and curve.get_ydata().tolist() == [50, 10, 0]
    assert (star.get_xdata()[0], star.get_ydata()[0]) == pytest.approx((25 if unit == "density" else 50, 10))
    assert axes.get_xlabel().startswith("% of pairs" if unit == "density" else "time of attention")


def test_the_picture_of_a_head_leaves_out_what_depends_on_the_video():
    plan = some_plan([[[1, 3]], [[4, 1]]])
    axes = plots.draw_head(plan, "transformer", 0, 0).axes
    assert axes[0].get_title(loc="left") == "multi_diagonal density=0.3, 50 to 100 % of the steps"
    found = head_map(plan, "transformer", 1, 0, 0)
    assert np.array_equal(axes[0].images[0].get_array(), found.blocks.double())
    assert np.array_equal(axes[1].images[0].get_array(), found.frames)
    assert plots.draw_head(some_plan([[[1]]]), "transformer", 0, 0) is None


@pytest.mark.parametrize(("layers", "heads", "buckets"), [(1, 1, 1), (60, 12, 1), (3, 40, 1)])
def test_text_is_drawn_where_it_fits_and_nowhere_else(layers, heads, buckets):
    plan = some_plan(np.random.default_rng(0).integers(0, len(METHODS), (buckets, layers, heads)))
    figures = (plots.draw_methods(plan, "transformer"), plots.draw_numbers(plan, "transformer", "errors"))
    for figure, fits in zip(figures, (True, layers < 60), strict=True):
        figure.draw_without_rendering()
        assert figure.get_size_inches()[1] < 16
        for axes in figure.axes[:buckets]:
            cell = axes.get_window_extent().width / layers, axes.get_window_extent().height / heads
            boxes = [text.get_window_extent() for text in axes.texts]
            assert all(box.width <= cell[0] and box.height <= 1.6 * cell[1] for box in boxes)
            assert bool(boxes) is fits


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (plots.check_matplotlib, lambda: plots.draw_curve(some_plan(SMALL))):
        with pytest.raises(ImportError, match="pip install matplotlib"):
            draw()
