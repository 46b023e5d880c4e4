"""The plan file: stable, readable, and safe to load whoever wrote it; and a plan that runs a pipeline."""

import copy
import json
import re

import numpy as np
import pytest
import tiny
import torch

import fastdit
from fastdit.attention import MethodState, get_method
from fastdit.attention.methods.paro.masks import ParoPlan, pack
from fastdit.attention.per_head.table import Table
from fastdit.demo import load_pipeline
from fastdit.plans.plan import Plan, TransformerPlan, config_hash
from fastdit.plans.schema import PlanError
from fastdit.plans.shipped import find_shipped_plan
from fastdit.tokens import AttentionCall, TokenSpec, VideoGrid

CANDIDATES = (
    get_method("dense"),
    get_method("draft", density=1 / 3, tile=(1, 4, 4)),
    get_method("radial", block_size=16, compensate="mean"),
)


def transformer_plan(choices, seed=0, frames=3, **changes):
    rng = np.random.default_rng(seed)
    choices = np.array(choices)
    names = ("errors", "densities", "seconds", "error_means", "error_stds", "recalls")
    cells = {name: rng.random(choices.shape) for name in names}
    about = {"model_class": "WanTransformer3DModel", "config_hash": "0123456789abcdef", "head_dim": 16}
    about["frame_mass"] = rng.random((*choices.shape[1:], frames))
    return TransformerPlan(**(about | {"choices": choices} | cells | changes))


def plan(choices=(((0, 1), (1, 2)), ((1, 1), (2, 0))), **changes):
    values = {
        "candidates": CANDIDATES,
        "buckets": (0.4, 1.0),
        "transformers": {"transformer": transformer_plan(choices)},
        "tokens": TokenSpec(VideoGrid(3, 8, 8), 4, True),
        "steps": 4,
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "guidance": 5.0,
        "prompts": ("a cat", 'says "hé" \U0001f600\n'),
        "schedule": fastdit.Schedule(warmup_steps=0.25, dense_layers=(0,), refresh_steps=(1, 2)),
        "density": 0.123456789,
        "speedup": 2.5,
        "error": 0.01,
        "curve": ((0.1, 0.5), (1, 0)),
        "cost_model": {"device": "cpu", "seconds": {"a": 1.23456789012e-5, "runs": 3}, "fits": [True, None, [0.5]]},
    }
    return Plan(**(values | changes))


def masks(tokens=None, heads=2, layers=2):
    tokens = TokenSpec(VideoGrid(3, 8, 8)) if tokens is None else tokens
    blocks = torch.rand(2, layers, heads, 12, 12) < 0.4
    orders = [["fhw", "hwf"][:heads]] * layers
    return ParoPlan(tokens=tokens, block_size=16, density=0.4, orders=orders, edges=(0.5, 1.0), bits=pack(blocks))


def test_save_and_load_byte_for_byte(tmp_path):
    one = plan()
    one.save(tmp_path / "a.json")
    two = Plan.load(str(tmp_path / "a.json"))
    two.save(tmp_path / "b.json")
    assert two == one and two.candidates == CANDIDATES and two.schedule == one.schedule
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "b.json"]
    assert one.density == 0.123457 and one.cost_model["seconds"]["a"] == 1.23456789012e-5


def test_the_file_is_for_people(tmp_path):
    plan().save(tmp_path / "a.json")
    text = (tmp_path / "a.json").read_text()
    values = json.loads(text)
    assert list(values) == sorted(values) and values["fastdit_plan"] == 1
    assert values["video"] == {"grid": [3, 8, 8], "text_first": True, "text_tokens": 4}
    assert values["candidates"][1] == {
        "method": "draft",
        "fields": {"compensate": None, "density": 1 / 3, "parts": 1, "per_row": False, "tile": [1, 4, 4]},
    }
    assert values["transformers"]["transformer"]["choices"] == [[[0, 1], [1, 2]], [[1, 1], [2, 0]]]
    assert values["transformers"]["transformer"]["layers"] == 2
    assert "\n          [0, 1],\n" in text and max(map(len, text.splitlines())) < 120  # a layer in a line
    assert values["fastdit"] == fastdit.__version__


def test_masks_lie_beside_the_plan(tmp_path):
    candidates = (CANDIDATES[0], get_method("paro", plan=masks()), get_method("paro", plan=masks()))
    one = plan(candidates=candidates)
    one.save(tmp_path / "my plan.json")
    two = Plan.load(tmp_path / "my plan.json")
    assert two == one and two.candidates[1].plan == candidates[1].plan != candidates[2].plan
    two.save(tmp_path / "my plan.json")
    files = sorted(file.name for file in tmp_path.iterdir())
    assert len(files) == 3 and all(re.fullmatch(r"my plan(-[0-9a-f]{16}\.safetensors|\.json)", f) for f in files)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (tmp_path / "my plan.json").rename(moved / "my plan.json")
    with pytest.raises(PlanError, match=r"candidates\[1\].fields.plan names my plan-.*, which is not beside the plan"):
        Plan.load(moved / "my plan.json")
    for file in tmp_path.glob("*.safetensors"):
        file.rename(moved / file.name)
    assert Plan.load(moved / "my plan.json") == one
    for file in moved.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(PlanError, match="has changed since the plan was written"):
        Plan.load(moved / "my plan.json")


def test_a_plan_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(PlanError, match=r"ends in .json, got 'plan.txt'"):
        plan().save(tmp_path / "plan.txt")
    with pytest.raises(FileNotFoundError):
        plan().save(tmp_path / "nowhere" / "plan.json")
    with pytest.raises(PlanError, match=r"candidates\[1\].fields.plan must match .* got 'elsewhere/masks"):
        paths = get_method("paro")
        object.__setattr__(paths, "plan", "elsewhere/masks.safetensors")
        plan(candidates=(CANDIDATES[0], paths, paths)).save(tmp_path / "plan.json")
    plan().save(tmp_path / "plan.json")
    before = (tmp_path / "plan.json").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        plan(steps=7).save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": ()}, r"candidates\[0\] must be dense, got none at all"),
        ({"candidates": ("dense",)}, r"candidates\[0\] must be a method, got 'dense'"),
        ({"speedup": float("nan")}, r"expected.speedup must be a finite number, got nan"),
        ({"density": -0.1}, "expected.density"),
        ({"buckets": (1.0,)}, "must be a list of 1"),
        ({"cost_model": {"a": object()}}, "cost_model.a must be a number"),
        ({"precision": "fp4"}, "run.precision must be"),
        ({"transformers": {}}, "transformers must have at least 1 item"),
        ({"transformers": {"transformer": transformer_plan([[[0], [9]], [[0], [0]]])}}, r"choices\[0\]\[1\]\[0\]"),
    ],
)
def test_plans_that_make_no_sense_cannot_be_made(change, message):
    with pytest.raises(PlanError, match=message):
        plan(**change)


def test_what_fits():
    model = tiny.transformer("wan")
    mark = config_hash(model.config)
    fitting = plan(transformers={"transformer": transformer_plan([[[0, 1]] * 2] * 2, config_hash=mark)})
    about = {"model_class": "WanTransformer3DModel", "config_hash": mark, "layers": 2, "heads": 2}
    assert fitting.fits("transformer", **about) is None
    assert "another configuration" in fitting.fits("transformer", **(about | {"config_hash": "0" * 16}))
    assert "has 3 layers of 2" in fitting.fits("transformer", **(about | {"layers": 3}))
    assert "the transformer is a Mochi" in fitting.fits("transformer", **(about | {"model_class": "Mochi"}))
    assert "nothing for the pipeline's transformer_2" in fitting.fits("transformer_2", **about)
    with pytest.raises(PlanError, match="nothing for 'transformer_2'; it has: transformer"):
        fitting.method("transformer_2")
    assert mark == config_hash(dict(model.config) | {"_name_or_path": "x", "new_option": None, "other": False})
    assert mark != config_hash(dict(model.config) | {"num_layers": 9})
    for name, value in {
        "quantization_config": {"quant_method": "torchao", "quant_type": "int8wo"},
        "_pre_quantization_dtype": torch.bfloat16,
        "dtype": "bfloat16",
        "torch_dtype": "float16",
    }.items():
        assert mark == config_hash(dict(model.config) | {name: value}), name


def test_the_method_of_a_plan():
    found = plan().method("transformer")
    assert isinstance(found, Table) and found.methods == CANDIDATES and found.edges == (0.4, 1.0)
    assert found.choices == (((0, 1), (1, 2)), ((1, 1), (2, 0)))
    assert "WanTransformer" not in repr(plan()) and len(repr(plan())) < 200


def test_analytic_methods_carry_over_and_calibrated_masks_say_why_not():
    spec, other = TokenSpec(VideoGrid(3, 8, 8)), TokenSpec(VideoGrid(2, 9, 5))
    x = torch.randn(3, 1, 2, spec.num_tokens, 8)
    y = torch.randn(3, 1, 2, other.num_tokens, 8)
    analytic = plan().method("transformer")
    calibrated = plan(candidates=(*CANDIDATES[:2], get_method("paro", plan=masks()))).method("transformer")
    for method in (analytic, calibrated):
        assert method.forward(*x, AttentionCall(spec, 1, 2, 0, 4), MethodState()).isfinite().all()
    # step 7 of 10 is in the second bucket, as step 3 of 4 is
    assert analytic.forward(*y, AttentionCall(other, 1, 2, 7, 10), MethodState()).isfinite().all()
    with pytest.raises(ValueError, match=r"the plan of method 'paro' is for a video of 3x8x8 tokens, got .* 2x9x5"):
        calibrated.forward(*y, AttentionCall(other, 1, 2, 7, 10), MethodState())


def test_calibrated_masks_are_those_of_the_heads_that_have_them():
    spec = TokenSpec(VideoGrid(3, 8, 8))
    q, k, v = torch.randn(3, 1, 2, spec.num_tokens, 8)
    paro = get_method("paro", plan=masks())
    method = Table(edges=(1.0,), methods=(CANDIDATES[0], paro), choices=(((0, 1), (1, 0)),))
    for layer, head in ((0, 1), (1, 0)):
        call = AttentionCall(spec, layer, 2, 1, 4)
        whole = paro.forward(q, k, v, call, MethodState())
        out = method.forward(q, k, v, call, MethodState())
        torch.testing.assert_close(out[:, head], whole[:, head])
        assert not torch.allclose(out[:, 1 - head], whole[:, 1 - head])


def searched(pipe, rows=((0, 1), (1, 2)), **changes):
    """A plan for a tiny pipeline, with two buckets that differ."""
    found = {
        title: transformer_plan(
            [rows, rows[::-1]], config_hash=config_hash(part.config), model_class=type(part).__name__
        )
        for title in ("transformer", "transformer_2")
        if (part := getattr(pipe, title, None)) is not None
    }
    return plan(transformers=found, **{"schedule": fastdit.Schedule(warmup_steps=1), **changes})


def test_a_pipeline_runs_a_plan(tmp_path):
    pipe = tiny.pipeline("wan")
    found = searched(pipe)
    found.save(tmp_path / "plan.json")
    handle = pipe.enable_sparse_attention(tmp_path / "plan.json")
    assert handle.schedule == found.schedule and handle.method == found.method("transformer")
    once = tiny.run(pipe, steps=4)
    report = json.loads(json.dumps(handle.report()))
    assert report["method"]["name"] == "plan" and report["method"]["layers"] == 2
    assert [layer["sparse_calls"] for layer in report["layers"]] == [6, 6]  # of 8: one of four steps is warm-up
    assert 0 < handle.density < 1 and "plan" in handle.summary() and "draft(density=" in handle.summary()
    pipe.enable_sparse_attention(found, schedule=tiny.EVERY_STEP)
    assert pipe.sparse_attention.schedule == tiny.EVERY_STEP
    assert not torch.equal(tiny.run(pipe, steps=4), once)
    pipe.enable_sparse_attention(str(tmp_path / "plan.json"))
    assert torch.equal(tiny.run(pipe, steps=4), once)
    tiny.run(pipe, steps=7, size=(17, 96, 128))  # another grid, another number of steps
    pipe.disable_sparse_attention()
    stock = tiny.run(pipe, steps=4)
    assert not torch.equal(stock, once)
    pipe.enable_sparse_attention(searched(pipe, rows=((0, 0), (0, 0))))
    torch.testing.assert_close(tiny.run(pipe, steps=4), stock, rtol=1e-4, atol=1e-4)


def test_both_transformers_run_their_own():
    pipe = tiny.pipeline("wan22")
    found = searched(pipe)
    assert set(found.transformers) == {"transformer", "transformer_2"}
    handle = pipe.enable_sparse_attention(found, schedule=tiny.EVERY_STEP)
    methods = {title: {"name": "plan", **found.method(title).describe()} for title in found.transformers}
    assert handle.report()["methods"] == methods
    tiny.run(pipe, steps=4)
    assert {layer["transformer"] for layer in handle.report()["layers"] if layer["sparse_calls"]} == set(
        found.transformers
    )


def test_a_plan_that_does_not_fit_changes_nothing(tmp_path):
    pipe = tiny.pipeline("wan")
    found = searched(pipe)
    other = tiny.pipeline("wan", layers=4)
    stock = tiny.run(other, steps=2)
    with pytest.raises(
        ValueError, match="the plan does not fit: it was searched for 2 layers of 2 heads, and the transf"
    ):
        other.enable_sparse_attention(found)
    assert other.sparse_attention is None and torch.equal(tiny.run(other, steps=2), stock)
    with pytest.raises(ValueError, match="nothing for the pipeline's transformer_2"):
        tiny.pipeline("wan22").enable_sparse_attention(found)
    with pytest.raises(TypeError, match="density"):
        pipe.enable_sparse_attention(found, density=0.2)
    with pytest.raises(PlanError, match="there is no file"):
        pipe.enable_sparse_attention(str(tmp_path / "none.json"))
    assert pipe.sparse_attention is None


def test_wan_at_its_real_size(tmp_path):
    """30 layers of 12 heads in three buckets: 1,080 cells in a file of some 100 kB."""
    choices = np.random.default_rng(0).integers(0, 3, (3, 30, 12))
    one = plan(
        buckets=(0.2, 0.6, 1.0),
        tokens=TokenSpec(VideoGrid(21, 30, 52)),
        transformers={"transformer": transformer_plan(choices, head_dim=128, frames=21)},
    )
    one.save(tmp_path / "wan.json")
    two = Plan.load(tmp_path / "wan.json")
    assert two == one and (tmp_path / "wan.json").stat().st_size < 200_000
    assert two.method("transformer").choices[2][29] == tuple(choices[2, 29].tolist())
    assert copy.deepcopy(two) == one


def test_it_is_public():
    assert fastdit.Plan is Plan


def test_the_demo_comes_with_a_plan_that_fields_replace():
    pipe = load_pipeline()
    handle = pipe.enable_sparse_attention()
    shipped = find_shipped_plan(config_hash(pipe.transformer.config))
    assert handle.method == shipped.method("transformer") and handle.schedule == shipped.schedule
    assert shipped.density <= 0.2 and shipped.prompts
    assert pipe.enable_sparse_attention(density=0.3).method.name == "profiled"
    assert fastdit.enable_sparse_attention(pipe.transformer).method.name == "profiled"


def test_no_plan_comes_with_other_models():
    assert find_shipped_plan("0" * 16) is None
