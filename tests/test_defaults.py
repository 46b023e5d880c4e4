"""What a model gets and why: presets, plans, what the caller gives; and what the command line says of it."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from cli_runs import listing, run, run_json

import fastdit
from fastdit.defaults import PRESETS, choose
from fastdit.generation.loading import outline
from fastdit.generation.sources import find_model
from fastdit.plans.plan import Plan

SHIPPED = next((Path(fastdit.__file__).parent / "plans" / "data").glob("demo-*.json"))


@pytest.fixture(scope="module")
def demo():
    return outline(find_model("demo"))


def same(target, *args, **fields):
    """Choose, then enable, and check that both come to the same and that only enabling changes the target."""
    found = choose(target, *args, **fields)
    assert fastdit.find_sparse_attention(target) is None
    with fastdit.sparse_attention(target, *args, **fields) as handle:
        report = handle.report()
        assert handle.method == next(iter(found.methods.values())) and handle.schedule == found.schedule
        assert report["precision"] == found.precision
        assert report["methods"] == {t: {"name": m.name, **m.describe()} for t, m in found.methods.items()}
    return found


@pytest.mark.parametrize("kind", tiny.PIPELINES)
def test_pipelines_get_what_is_chosen(kind):
    pipe = tiny.pipeline(kind)
    for args, fields in (((), {}), ((), {"density": 0.3}), (("radial",), {}), ((fastdit.get_method("sla"),), {})):
        found = same(pipe, *args, **fields)
        assert found.reason.endswith(".") and found.source


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_transformers_get_what_is_chosen(kind):
    found = same(tiny.transformer(kind))
    assert found.schedule == tiny.EVERY_STEP and "every call is sparse" in found.reason


def test_reasons(demo):
    plan = Plan.load(SHIPPED)
    expected = {
        "fastdit ships a plan for this configuration of WanTransformer3DModel.": choose(demo),
        "The plan of the caller fits the model.": choose(demo, plan),
        "profiled is the default method of a WanTransformer3DModel of width 128, with density as given.": choose(
            demo, density=0.3
        ),
        "The caller asks for radial.": choose(demo, "radial"),
        "The caller asks for radial, with decay, sink as given.": choose(demo, "radial", decay=0.5, sink=False),
        "profiled is the default method of a WanTransformer3DModel of width 128; every call is sparse, because a bare "
        "transformer does not know the number of steps.": choose(demo.transformer),
    }
    assert [found.reason for found in expected.values()] == list(expected)
    shipped, given, *_, named, _, _ = expected.values()
    assert shipped.methods == given.methods == {"transformer": plan.method("transformer")}
    assert shipped.schedule == given.schedule == plan.schedule
    assert shipped.source == f"search with fastdit {plan.fastdit}"
    assert choose(demo, SHIPPED) == choose(demo, str(SHIPPED)) and choose(demo, SHIPPED).source == str(SHIPPED)
    assert named.source == "Radial Attention, inference scripts" and given.source == "caller"
    assert choose(demo, named.methods["transformer"]).source == "caller"
    assert choose(demo, "vertical_stripe").source == "defaults of the method; schedule of fastdit"


@pytest.mark.parametrize(
    ("args", "fields", "error", "message"),
    [
        (("nothing",), {}, ValueError, "unknown method 'nothing'"),
        (("draft",), {"density": 2}, ValueError, "density must be in"),
        (("draft",), {"decay": 2}, TypeError, "decay"),
        ((fastdit.get_method("draft"),), {"density": 0.3}, TypeError, "give the name 'draft'"),
        ((SHIPPED,), {"density": 0.3}, TypeError, "cannot be combined with a plan"),
        ((SHIPPED,), {}, ValueError, "the plan does not fit: it was searched for"),
        (("none.json",), {}, ValueError, "there is no file"),
        ((3,), {}, TypeError, "must be a name, a method, a plan or None, got int"),
    ],
)
def test_bad_input_is_refused_as_by_enabling(args, fields, error, message):
    pipe = tiny.pipeline("wan")
    texts = []
    for what in (choose, fastdit.enable_sparse_attention):
        with pytest.raises(error, match=message) as caught:
            what(pipe, *args, **fields)
        texts.append(str(caught.value))
        assert pipe.sparse_attention is None and "_fastdit" not in pipe.transformer.__dict__
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("target", "message"), [(SimpleNamespace(), "Namespace has no transformer"), (torch.nn.Linear(2, 2), "Linear")]
)
def test_targets_that_are_no_model(target, message):
    for what in (choose, fastdit.enable_sparse_attention):
        with pytest.raises(ValueError, match=message):
            what(target)


def test_preset_of_a_pipeline():
    pipe = tiny.pipeline("cogvideox")
    handle = pipe.enable_sparse_attention(tile=(1, 4, 4))
    assert handle.method.name == "draft" and handle.method.density == 0.4 and handle.method.tile == (1, 4, 4)
    assert handle.schedule == fastdit.Schedule(warmup_steps=0.25, dense_layers=(0,))
    tiny.run(pipe, steps=4)
    assert handle.report()["totals"]["dense"] == {"dense layer": 4, "warm-up step": 1}


@pytest.mark.parametrize(
    ("kind", "width", "method", "experts", "fields"),
    [
        ("wan", 5120, None, 1, {"density": 0.25, "compensate": "mean"}),
        ("wan", 1536, None, 1, {"density": 0.4, "compensate": "mean"}),
        ("wan", 128, "profiled", 1, {"density": 0.17, "compensate": "mean"}),
        (
            "wan",
            128,
            "draft",
            1,
            {"density": 0.17, "tile": (4, 4, 4), "per_row": True, "parts": 8, "compensate": "mean"},
        ),
        ("hunyuan_video", 3072, None, 1, {"density": 0.1, "compensate": "mean"}),
        ("ltx", 2048, None, 1, {"density": 0.4, "compensate": "mean"}),
        ("hunyuan_video", 3072, "radial", 1, {"decay": 0.95, "sink": False}),
        ("wan", 5120, "radial", 2, {"decay": 0.8}),
        ("wan", 5120, "radial", 1, {"decay": 0.2}),
        ("mochi", 3072, "radial", 1, {}),
    ],
)
def test_presets_follow_family_size_and_method(kind, width, method, experts, fields):
    with torch.device("meta"):
        model = tiny.transformer(kind, head_dim=128, num_attention_heads=width // 128)
    target = SimpleNamespace(**dict.fromkeys(("transformer", "transformer_2")[:experts], model))
    found = choose(target, method)
    assert set(found.methods.values()) == {fastdit.get_method(method or "draft", **fields)} and found.source


def test_small_models_are_profiled():
    found = choose(tiny.pipeline("wan", num_attention_heads=2, head_dim=64))
    assert found.methods["transformer"].name == "profiled"


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: f"{preset.family}-{preset.method}-{preset.width}")
def test_presets_are_methods(preset):
    assert fastdit.get_method(preset.method, **preset.fields).name == preset.method


def test_published_fields_are_taken_unless_others_are_given():
    pipe = tiny.pipeline("hunyuan_video")
    handle = pipe.enable_sparse_attention("radial", decay=0.5)
    assert handle.method == fastdit.get_method("radial", decay=0.5, sink=False)
    assert handle.schedule == fastdit.Schedule(warmup_steps=0.24)


def test_a_plan_that_does_not_know_the_second_transformer_is_not_taken(demo):
    target = SimpleNamespace(transformer=demo.transformer, transformer_2=copy.deepcopy(demo.transformer))
    assert {method.name for method in choose(target).methods.values()} == {"profiled"}


def test_info_says_what_the_demo_gets(demo):
    value, found = run_json("info", "--model", "demo"), choose(demo)
    method = found.methods["transformer"]
    assert value["methods"] == {"transformer": {"name": "plan", **method.describe()}} and value["model"] == "demo"
    assert value["schedule"]["warmup_steps"] == found.schedule.warmup_steps and value["precision"] is None
    assert (value["reason"], value["source"]) == (found.reason, found.source)


def test_info_reads_no_weights(tmp_path):
    tiny.pipeline("wan22").save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    table = run("info", "--model", tmp_path)
    assert table.exit_code == 0, table.stderr
    for text in ("transformer_2", "profiled", "0.17", "warmup_steps", "of the model", "width 32"):
        assert text in table.stdout
    (tmp_path / "transformer_2" / "config.json").write_text("{")
    broken = run("info", "--model", tmp_path)
    assert broken.exit_code == 2 and "configuration of" in broken.stderr and not broken.stdout


def test_info_of_no_model(tmp_path):
    for name, message in ((tmp_path, "has no model_index.json"), ("nowhere", "no model 'nowhere' was found")):
        missing = run("info", "--model", name)
        assert missing.exit_code == 2 and message in " ".join(missing.stderr.split()) and not missing.stdout
    assert not listing(tmp_path)
