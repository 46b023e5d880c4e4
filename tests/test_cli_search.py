"""``fastdit search`` with a small untrained pipeline: plans, scores that are kept, bad input, interruptions."""

import json
import shutil

import pytest
from cli_runs import folder, listing, run, run_json, small
from test_decide import cost_of

from fastdit.cli.search import DEMO_PROMPTS
from fastdit.demo.captions import is_held_out, parse_caption
from fastdit.generation import loading as models
from fastdit.plans.plan import Plan
from fastdit.search import stages as task
from fastdit.search.candidates import make_candidates, split_candidates

CANDIDATES = "draft(density=0.1, tile=(1, 2, 2)), draft(density=0.4, tile=(1, 2, 2))"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder to work in, with prompts and the times of a machine on which time is density."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    model = cost_of(make_candidates(split_candidates(CANDIDATES)))
    (tmp_path / "times.json").write_text(json.dumps(model.record()))
    return tmp_path


def command(*arguments, candidates=("--candidates", CANDIDATES, "--cost-model", "times.json")):
    video = small()[1:]
    return ["search", *video, "--prompts", "prompts.txt", *candidates, *map(str, arguments)]


def refused(*arguments, code=2):
    result = run(*arguments)
    assert result.exit_code == code and result.stdout == "" and "Traceback" not in result.stderr
    *before, message = result.stderr.rstrip().splitlines()
    assert message.startswith("error: ") and not any(line.startswith("error: ") for line in before)
    return message, "\n".join(before)


FILES = ["prompts.txt", "times.json"]


def test_a_plan_is_found_written_and_run(place):
    result = run(*command("--budget", 0.4, "--buckets", 2, "--warmup-steps", 1, "-o", "wan.json"))
    assert result.exit_code == 0, result.stderr
    assert listing(place) == ["prompts.txt", "times.json", "wan.json", "wan.scores"]
    assert len(listing(place / "wan.scores")) == 2
    for text in ("loading took", "scoring took", "solving took", "wrote wan.json"):
        assert text in result.stderr
    for text in (
        "wan.json",
        "density of sparse calls",
        "dense over sparse time",
        "relative error of a layer's output",
    ):
        assert text in result.stdout
    plan = Plan.load("wan.json")
    assert plan.prompts == ("a cat", "a dog") and plan.steps == 3 and plan.schedule.warmup_steps == 1
    assert plan.buckets == pytest.approx((2 / 3, 1)) and 0.1 <= plan.density <= 0.4
    assert {method.name for method in plan.candidates} == {"dense", "draft"}
    value = run_json(*small("a cat", "--plan", "wan.json", "-o", "cat.mp4"))
    assert value["sparse_call_density"] == pytest.approx(plan.density, abs=0.1)


def test_another_limit_takes_no_new_scores(place, monkeypatch):
    all_sparse = command("--warmup-steps", 0, "--tail-steps", 0, "--folder", "plan.scores")
    first = run_json(*all_sparse, "--budget", 0.4)
    assert (first["plan"], first["scores"], first["prompts"]) == ("plan.json", "plan.scores", ["a cat", "a dog"])
    assert first["density"] <= 0.4 and sum(method["share"] for method in first["methods"]) == pytest.approx(1)

    def fail(*args, **options):
        raise AssertionError("scores that were there were taken again")

    monkeypatch.setattr(task, "capturing", fail)
    second = run_json(*all_sparse, "--target-speedup", 5, "-o", "fast.json")
    assert second["speedup_attention"] >= 5 > first["speedup_attention"]
    assert second["error"] > first["error"]
    third = run_json(*all_sparse, "--max-error", first["error"], "-o", "good.json")
    assert third["error"] <= first["error"] * 1.001
    assert run(*all_sparse, "--budget", 0.3, "-o", "good.json", "--quiet").output == ""
    message, before = refused(*all_sparse, "--budget", 0.01)
    assert "budget 0.01 is impossible: it must be at least 0.1" in message
    assert "the scores so far are in plan.scores" in before
    assert listing(place) == ["fast.json", "good.json", "plan.json", "plan.scores", "prompts.txt", "times.json"]


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (OSError("the disk is full"), 1)], ids=str)
def test_what_is_interrupted_goes_on(place, monkeypatch, error, code):
    capturing, started = task.capturing, []

    def stop(*args, **options):
        started.append(1)
        if len(started) == 2:
            raise error
        return capturing(*args, **options)

    monkeypatch.setattr(task, "capturing", stop)
    message, before = refused(*command("--budget", 0.4), code=code)
    assert ("interrupted" if code == 130 else "the disk is full") in message
    assert "scores so far are in plan.scores; run the same command" in before
    assert listing(place) == ["plan.scores", *FILES] and len(listing(place / "plan.scores")) == 1
    assert run(*command("--budget", 0.4)).exit_code == 0
    assert len(started) == 3


def test_a_plan_that_cannot_be_written_is_not_left_half(place, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    message, _ = refused(*command("--budget", 0.4), code=1)
    assert "No space left" in message
    assert listing(place) == ["plan.scores", *FILES]


def test_times_of_another_device_come_with_its_plan(place):
    first = run_json(*command("--budget", 0.4))
    again = run_json(
        *command(
            "--budget", 0.4, "-o", "again.json", candidates=("--candidates", CANDIDATES, "--cost-model", "plan.json")
        )
    )
    assert (again["speedup_attention"], again["device"]) == (first["speedup_attention"], "a device")


def test_what_a_search_reads_is_not_written(place):
    for arguments in (("--cost-model", "times.json", "-o", "times.json"), ("--prompts", "a.json", "-o", "a.json")):
        (place / "a.json").write_text("a cat\n")
        before = (place / arguments[1]).read_bytes()
        message, _ = refused("search", *arguments)
        assert f"--output and {arguments[0]} are the same file" in message
        assert (place / arguments[1]).read_bytes() == before


def test_a_preset(place):
    value = run_json(*command("--preset", "sparse-vdit", candidates=()))
    assert value["buckets"] == ["all steps"]
    assert {found["method"] for found in value["methods"]} <= {
        "dense", "skip", "diagonal", "multi_diagonal", "vertical_stripe",
    }  # fmt: skip


def test_what_is_left_open_is_as_the_preset_has_it(place, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "fastdit.search.search.search", lambda *about, **options: asked.append(options["sampling"]) or 1 / 0
    )
    preset = ("--preset", "sparse-vdit")
    for changes in (preset, (*preset, "--warmup-steps", 2), (*preset, "--samples", 1), (*preset, "--budget", 0.4), ()):
        assert run(*command(*changes, candidates=())).exit_code == 1
    found = [(each.schedule.warmup_steps, each.buckets, each.per_bucket) for each in asked]
    kept = found[0][0]
    assert found == [(kept, 1, 3), (2, 1, 3), (kept, 1, 1), (kept, 3, 1), (kept, 3, 1)] and kept != 2


def test_paro_keeps_no_scores(place):
    value = run_json(*command("--preset", "paro", candidates=()))
    assert value["scores"] is None and "paro" in {found["method"] for found in value["methods"]}
    assert [name for name in listing(place) if name.endswith(".scores")] == []


def test_lists_of_candidates_are_split_outside_of_brackets():
    assert split_candidates(" radial ,draft(density=0.1, tile=(1, 8, 8)),, dense") == [
        "radial",
        "draft(density=0.1, tile=(1, 8, 8))",
        "dense",
    ]


def test_the_demo_is_searched_with_what_it_knows():
    shown = [parse_caption(prompt) for prompt in DEMO_PROMPTS]
    assert all(a.color and a.shape and a.motion and a.background for a in shown)
    assert not any(map(is_held_out, shown)) and len({a.motion for a in shown}) == len(shown)


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (("--prompts", "none.txt"), ("none.txt", "No such file")),
        (("--prompts", "empty.txt"), ("has no prompts", "empty.txt")),
        (("--candidates", "drft"), ("unknown method 'drft'", "did you mean 'draft'")),
        (("--candidates", "draft(densty=0.2)"), ("no field 'densty'",)),
        (("--candidates", "draft(0.2)"), ("cannot read",)),
        (("--candidates", " , "), ("no candidates",)),
        (("--candidates", "draft", "--preset", "paro"), ("--preset or --candidates",)),
        (("--preset", "paro", "--cost-model", "empty.txt"), ("leave the cost model out",)),
        (("--preset", "paro", "--folder", "scores"), ("keeps no scores", "leave the folder out")),
        (("--preset", "paro", "--max-error", "0.1"), ("give a budget",)),
        (("--preset", "paro", "--target-speedup", "2"), ("give a budget",)),
        (("--budget", "25"), ("(0, 1]", "0.25")),
        (("--budget", "0"), ("(0, 1]",)),
        (("--budget", "nan"), ("(0, 1]",)),
        (("--budget", "0.2", "--max-error", "0.1"), ("one of budget",)),
        (("--target-speedup", "-2"), ("above 0",)),
        (("--end-to-end",), ("one of budget",)),
        (("--cost-model", "empty.txt"), ("cannot read a cost model", "empty.txt")),
        (("--warmup-steps", "1.5"), ("quarter",)),
        (("--kernel", "fast"), ("unknown kernel",)),
        (("--device", "gpu"), ("unknown device",)),
        (("--model", "nothing-here"), ("no model 'nothing-here'",)),
        (("-o", "none/plan.json"), ("none does not exist", "mkdir -p")),
        (("-o", "plan.txt"), ("plan.txt", "end with .json")),
        (("-o", "."), ("it is a folder",)),
        (("--folder", "none/scores"), ("none does not exist",)),
        (("--folder", "empty.txt"), ("is a file, not a folder", "another path to --folder")),
        (("--folder", "plan.json"), ("--folder and --output are the same file",)),
        (("--seed", str(2**64 - 2)), (f"got {2**64 - 2} to {2**64 + 1}",)),
        (("--preset", "paro", "-o", ":.json"), ("a plain name",)),
        (("--preset", "paro", "-o", "x" * 240 + ".json"), ("too long",)),
        (("-o", "x" * 251 + ".json"), ("has 256 bytes",)),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, arguments, fragments):
    def load(*args, **kwargs):
        raise AssertionError("the model was loaded before the arguments were checked")

    monkeypatch.setattr(models, "load_model", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n  \n")
    message, _ = refused("search", *arguments)
    assert all(fragment in message for fragment in fragments), message
    assert listing(tmp_path) == ["empty.txt"]


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (("--frames", 6), ("6 frames", "nearest is 5")),
        (("--warmup-steps", 3), ("all 3 steps dense",)),
    ],
)
def test_what_the_model_cannot_take(place, arguments, fragments):
    message, _ = refused(*command(*arguments))
    assert all(fragment in message for fragment in fragments), message
    assert listing(place) == FILES


def test_a_damaged_model(place):
    model = place / "model"
    shutil.copytree(folder(), model)
    weights = model / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    message, _ = refused(*command("--model", model))
    assert "cannot be loaded" in message and listing(place) == ["model", *FILES]
