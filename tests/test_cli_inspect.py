"""``fastdit inspect``, and plans given to ``fastdit generate``."""

import json
import shutil
import sys

import pytest
from cli_runs import folder, listing, run, run_json, small
from test_plan import masks
from test_views import SMALL, some_plan

from fastdit.attention import get_method
from fastdit.plans.plan import Plan, TransformerPlan, config_hash
from fastdit.tokens import TokenSpec, VideoGrid


def refused(*arguments):
    result = run(*arguments)
    assert result.exit_code == 2 and result.stdout == "" and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "plan.json"
    some_plan(SMALL).save(path)
    return path


def test_tables_and_pictures_of_a_plan(file, tmp_path):
    out = tmp_path / "out"
    result = run("inspect", file, "-o", out)
    assert result.exit_code == 0, result.stderr
    assert listing(out) == ["curve.png", "density.png", "distance.png", "error.png", "methods.png"]
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in listing(out))
    assert f"wrote {out / 'curve.png'}" in result.stderr
    for text in (
        "2 layers of 3 heads",
        "3 x 5 x 7",
        "draft density=0.3",
        "2.00x",
        "0.250",
        "10.0%",
        "33% multi_diagonal",
    ):
        assert text in result.stdout
    value = run_json("inspect", file)
    assert (value["density"], value["speedup_attention"], value["error"]) == (0.25, 2.0, 0.1)
    assert sum(found["share"] for found in value["methods"]) == pytest.approx(1)
    assert len(value["layers"]["transformer"]) == 2 and value["head"] is None and value["pictures"] == []
    assert run("inspect", file, "--quiet").output == ""


def test_errors_have_their_spread_and_recall_beside_them(file, tmp_path):
    found = Plan.load(file).transformers["transformer"]
    for where in ((), ("--layer", 0, "--head", 0)):
        text = run("inspect", file, *where).stdout
        assert "of samples" in text and "recall" in text and "75%" in text
    mean, std = (100 * values[0][0][0] for values in (found.error_means, found.error_stds))
    assert f"{mean:.1f}% ± {std:.1f}%" in text
    # plans of earlier versions have neither
    values = json.loads(file.read_text())
    for name in ("error_means", "error_stds", "recalls"):
        del values["transformers"]["transformer"][name]
    file.write_text(json.dumps(values))
    assert "of samples" not in run("inspect", file).stdout
    assert run_json("inspect", file)["layers"]["transformer"][0]["recall"] is None


def test_one_head(file, tmp_path):
    value = run_json("inspect", file, "--layer", 0, "--head", 0, "-o", tmp_path)
    assert [row["method"] for row in value["head"]["buckets"]] == ["dense", "draft"]
    assert value["pictures"] == [str(tmp_path / "layer-0-head-0.png")] and value["layers"] is None
    result = run("inspect", file, "--layer", 0, "--head", 2, "-o", tmp_path)
    assert "depend on the video" in result.stderr and "draft density=0.3" in result.stdout
    assert listing(tmp_path) == ["layer-0-head-0.png", "plan.json"]


def test_two_transformers(tmp_path):
    file = tmp_path / "plan.json"
    some_plan(SMALL, titles=("transformer", "transformer_2"), curve=()).save(file)
    value = run_json("inspect", file, "--transformer", "transformer_2", "-o", tmp_path)
    assert list(value["layers"]) == ["transformer_2"]
    assert listing(tmp_path) == [
        "plan.json",
        *(f"transformer_2-{name}.png" for name in ("density", "distance", "error", "methods")),
    ]
    assert list(run_json("inspect", file)["layers"]) == ["transformer", "transformer_2"]
    assert "--transformer" in refused("inspect", file, "--layer", 0, "--head", 0)
    assert "it covers: transformer, transformer_2" in refused("inspect", file, "--transformer", "vae")


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (("none.json",), ("there is no file none.json",)),
        (("text.json",), ("text.json is no JSON",)),
        (("plan.json", "-o", "none/out"), ("none does not exist", "mkdir -p none")),
        (("plan.json", "-o", "text.json"), ("is a file, not a folder",)),
        (("plan.json", "--layer", 0), ("--layer and --head", "pass both")),
        (("plan.json", "--layer", 2, "--head", 0), ("no layer 2", "the plan has 2, counted from 0")),
        (("plan.json", "--layer", 0, "--head", 3), ("no head 3", "the plan has 3")),
    ],
)
@pytest.mark.usefixtures("file")
def test_bad_input(tmp_path, monkeypatch, arguments, fragments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.json").write_text("a plan")
    message = refused("inspect", *arguments)
    assert all(fragment in message for fragment in fragments)
    assert listing(tmp_path) == ["plan.json", "text.json"]


def test_pictures_without_matplotlib(file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in refused("inspect", file, "-o", tmp_path / "none" / "out")
    assert run("inspect", file).exit_code == 0


def untrained_plan(path, **changes):
    """Write a plan for the untrained pipeline: half of all heads dense, half sparse."""
    from diffusers import WanTransformer3DModel

    config = WanTransformer3DModel.load_config(folder() / "transformer")
    config = WanTransformer3DModel.from_config(config).config
    shape = (2, config["num_layers"], config["num_attention_heads"])
    choices = [[[head % 2 for head in range(shape[2])]] * shape[1]] * shape[0]
    cells = {name: [[[0.5] * shape[2]] * shape[1]] * shape[0] for name in ("errors", "densities", "seconds")}
    found = TransformerPlan(
        model_class="WanTransformer3DModel",
        config_hash=config_hash(dict(config)),
        head_dim=config["attention_head_dim"],
        choices=choices,
        **cells,
    )
    methods = (get_method("dense"), get_method("draft", density=0.3, tile=(1, 2, 2)))
    some_plan(choices, **({"methods": methods, "transformers": {"transformer": found}} | changes)).save(path)
    return path


def test_a_plan_makes_a_video(tmp_path):
    plan = untrained_plan(tmp_path / "half.json")
    report = tmp_path / "numbers.json"
    result = run(*small("a cat", "--plan", plan, "--warmup-steps", 1, "-o", tmp_path / "cat.mp4", "--report", report))
    assert result.exit_code == 0, result.stderr
    assert f"{plan.name} on " in result.stdout.replace("\n", "")
    value = json.loads(report.read_text())
    assert value["method"] == "plan" and value["plan"] == str(plan) and value["sparse_steps"] == [1, 2]
    assert 0.6 < value["density"] < 0.7 and value["method_fields"]["heads"] == 2
    assert value["schedule"]["warmup_steps"] == 1


def test_plans_that_cannot_run(tmp_path):
    plan = untrained_plan(tmp_path / "half.json")
    target = ("-o", tmp_path / "cat.mp4")
    assert "--density" in refused(*small("a cat", "--plan", plan, "--density", 0.2, *target))
    assert "pass a plan with --plan" in refused(*small("a cat", "--method", plan, *target))
    assert "there is no file" in refused(*small("a cat", "--plan", tmp_path / "none.json", *target))
    some_plan(SMALL).save(tmp_path / "other.json")
    result = run(*small("a cat", "--plan", tmp_path / "other.json", *target))
    assert result.exit_code == 2 and "the plan does not fit: it was searched for 2 layers of 3 heads" in result.stderr
    assert listing(tmp_path) == ["half.json", "other.json"]


def test_calibrated_masks_travel_with_their_plan(tmp_path):
    tokens = TokenSpec(VideoGrid(3, 8, 8))
    methods = (get_method("dense"), get_method("paro", plan=masks(tokens)))
    some_plan([[[1, 0], [1, 1]]], methods=methods, tokens=tokens).save(tmp_path / "plan.json")
    assert len(listing(tmp_path)) == 2 and len(Plan.load(tmp_path / "plan.json").candidates) == 2
    value = run_json("inspect", tmp_path / "plan.json", "--layer", 1, "--head", 0, "-o", tmp_path)
    assert value["head"]["buckets"][0]["method"] == "paro" and len(value["pictures"]) == 1
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(tmp_path / "plan.json", moved)
    assert "not beside the plan" in refused("inspect", moved / "plan.json")
