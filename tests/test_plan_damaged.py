"""Plans that are damaged or hostile: each gives one clear error."""

import json
import warnings

import pytest
from test_plan import plan

from fastdit.plans import schema
from fastdit.plans.plan import Plan
from fastdit.plans.schema import PlanError


def at(*keys, to):
    """Change one value of a plan's JSON; ``to`` is a value, or ``del`` to take it out."""

    def change(values):
        *path, last = keys
        for key in path:
            values = values[key]
        if to is KeyError:
            del values[last]
        else:
            values[last] = to

    return change


MODEL = ("transformers", "transformer")
DAMAGED = {
    "no version": (at("fastdit_plan", to=KeyError), "it is no plan"),
    "next version": (at("fastdit_plan", to=2), "a plan of version 2, and this fastdit reads 1; search again"),
    "version as text": (at("fastdit_plan", to="1"), "a plan of version '1'"),
    "version true": (at("fastdit_plan", to=True), "a plan of version True"),
    "missing part": (at("run", to=KeyError), "run is missing"),
    "unknown part": (at("scripts", to=[]), "scripts is unknown; remove it"),
    "candidates missing": (at("candidates", to=KeyError), "candidates is missing"),
    "no candidates": (at("candidates", to=[]), "candidates must have at least 1 item, got a list of 0"),
    "dense is not first": (at("candidates", 0, "method", to="radial"), "candidates[0] must be dense, got radial"),
    "candidate is text": (at("candidates", 1, to="draft"), "candidates[1] must be an object, got 'draft'"),
    "unknown method": (at("candidates", 1, "method", to="drift"), "unknown method 'drift' (did you mean 'draft'?)"),
    "method as path": (
        at("candidates", 1, "method", to="os.system"),
        "candidates[1].method must match pattern '^[a-z]",
    ),
    "unknown field": (
        at("candidates", 1, "fields", "speed", to=1),
        "candidates[1] makes no sense: method 'draft' has no",
    ),
    "field out of range": (at("candidates", 1, "fields", "density", to=2), "density must be in (0, 1]"),
    "field of a wrong type": (at("candidates", 1, "fields", "tile", to="big"), "candidates[1] makes no sense"),
    "field too large": (
        at("candidates", 1, "fields", "density", to=10**40),
        "fields.density must be a number, got a number",
    ),
    "field is deep": (at("candidates", 1, "fields", "tile", to=[[[1]]]), "fields.tile[0][0] must be less deep"),
    "field is a path": (
        at("candidates", 1, "fields", "tile", to="../x.safetensors"),
        "fields.tile must match pattern '[a-z0-9_]{1,32}', got '../x.safetensors'",
    ),
    "paths in a field": (
        at("candidates", 1, "fields", "tile", to=["/etc/x", 1, 1]),
        "fields.tile[0] must match pattern '[a-z0-9_]{1,32}', got '/etc/x'",
    ),
    "masks elsewhere": (
        at("candidates", 1, "fields", "plan", to={"file": "../a.safetensors", "sha256": "0" * 64}),
        "candidates[1].fields.plan.file must match pattern",
    ),
    "masks at a root": (
        at("candidates", 1, "fields", "plan", to={"file": "/etc/a.safetensors", "sha256": "0" * 64}),
        "fields.plan.file must match pattern",
    ),
    "masks on a drive": (
        at("candidates", 1, "fields", "plan", to={"file": "C:a.safetensors", "sha256": "0" * 64}),
        "fields.plan.file must match pattern",
    ),
    "masks of another kind": (
        at("candidates", 1, "fields", "plan", to={"file": "a.pkl", "sha256": "0" * 64}),
        "fields.plan.file must match pattern",
    ),
    "masks missing": (
        at("candidates", 1, "fields", "plan", to={"file": "a.safetensors", "sha256": "0" * 64}),
        "names a.safetensors, which is not beside the plan; copy it there",
    ),
    "masks without hash": (
        at("candidates", 1, "fields", "plan", to={"file": "a.safetensors"}),
        "plan.sha256 is missing",
    ),
    "buckets descend": (at("buckets", to=[0.6, 0.4]), "buckets must be fractions of the run, ascending to 1"),
    "buckets end early": (at("buckets", to=[0.4, 0.9]), "ascending to 1"),
    "bucket missing": (
        at("buckets", to=[1.0]),
        "transformers.transformer.choices must be a list of 1, got a list of 2",
    ),
    "bucket is text": (at("buckets", 0, to="0.4"), "buckets[0] must be a valid number, got '0.4'"),
    "no transformers": (at("transformers", to={}), "transformers must have at least 1 item, got an object of 0"),
    "transformers listed": (at("transformers", to=[]), "transformers must be an object, got a list of 0"),
    "odd title": (at("transformers", "../x", to={}), "transformers.../x must match pattern '^[a-z]"),
    "choice out of range": (
        at(*MODEL, "choices", 0, 1, 1, to=3),
        "choices[0][1][1] must be less than 3, the number of candidates, got 3",
    ),
    "choice negative": (
        at(*MODEL, "choices", 1, 0, 0, to=-1),
        "choices[1][0][0] must be greater than or equal to 0, got -1",
    ),
    "choice is no whole number": (at(*MODEL, "choices", 1, 0, 0, to=1.0), "choices[1][0][0] must be a valid integer"),
    "choice is true": (at(*MODEL, "choices", 1, 0, 0, to=True), "choices[1][0][0] must be a valid integer"),
    "choice is huge": (at(*MODEL, "choices", 1, 0, 0, to=10**300), "got a number of 997 bits"),
    "head missing": (at(*MODEL, "choices", 0, 1, to=[0]), "choices[0][1] must be a list of 2, got a list of 1"),
    "layers do not match": (at(*MODEL, "layers", to=3), "must be a list of 3, got a list of 2"),
    "no heads": (at(*MODEL, "heads", to=0), "heads must be greater than or equal to 1, got 0"),
    "errors missing": (at(*MODEL, "errors", to=KeyError), "transformers.transformer.errors is missing"),
    "error negative": (
        at(*MODEL, "errors", 0, 0, 0, to=-0.1),
        "errors[0][0][0] must be greater than or equal to 0, got -0.1",
    ),
    "density above 1": (
        at(*MODEL, "densities", 0, 0, 0, to=1.1),
        "densities[0][0][0] must be less than or equal to 1, got 1.1",
    ),
    "seconds are null": (at(*MODEL, "seconds", 0, 0, 0, to=None), "seconds[0][0][0] must be a valid number, got None"),
    "spread negative": (
        at(*MODEL, "error_stds", 0, 0, 0, to=-1),
        "error_stds[0][0][0] must be greater than or equal to 0",
    ),
    "mean is null": (at(*MODEL, "error_means", 0, 0, 0, to=None), "error_means[0][0][0] must be a valid number"),
    "recall above 1": (
        at(*MODEL, "recalls", 0, 0, 0, to=1.5),
        "recalls[0][0][0] must be less than or equal to 1, got 1.5",
    ),
    "recall of one layer": (
        at(*MODEL, "recalls", 0, to=[[None, 1]]),
        "recalls[0] must be a list of 2, got a list of 1",
    ),
    "class is code": (at(*MODEL, "model_class", to="__import__('os')"), "model_class must match pattern '^[A-Za-z_]"),
    "hash is no hash": (
        at(*MODEL, "config_hash", to="xyz"),
        "config_hash must match pattern '^[0-9a-f]{8,64}$', got 'xyz'",
    ),
    "head dim": (at(*MODEL, "head_dim", to="16"), "head_dim must be a valid integer, got '16'"),
    "grid of two": (at("video", "grid", to=[3, 8]), "video.grid[2] is missing"),
    "grid of zero": (at("video", "grid", 0, to=0), "video.grid[0] must be greater than or equal to 1, got 0"),
    "text negative": (at("video", "text_tokens", to=-1), "video.text_tokens must be"),
    "text first is 1": (at("video", "text_first", to=1), "video.text_first must be a valid boolean, got 1"),
    "no steps": (at("run", "steps", to=0), "run.steps must be greater than or equal to 1, got 0"),
    "guidance is text": (at("run", "guidance", to="high"), "run.guidance must be a valid number, got 'high'"),
    "prompt is a number": (at("run", "prompts", 0, to=7), "run.prompts[0] must be a valid string, got 7"),
    "prompt is endless": (
        at("run", "prompts", 0, to="a" * 10_001),
        "run.prompts[0] must have at most 10000 characters",
    ),
    "prompt cannot be written": (
        at("run", "prompts", 0, to="\ud800"),
        "run.prompts[0] must be a valid string, unable to parse raw data as a unicode string",
    ),
    "unknown precision": (at("run", "precision", to="int4"), "run.precision must be null or one of int8, int8_fp8"),
    "schedule out of range": (at("schedule", "warmup_steps", to=-1), "schedule makes no sense: warmup_steps must be"),
    "schedule unknown": (
        at("schedule", "cooldown", to=1),
        "schedule makes no sense: Schedule.__init__() got an unexpected keyword argument 'cooldown'",
    ),
    "schedule of texts": (at("schedule", "dense_layers", to=["a"]), "schedule makes no sense: dense_layers"),
    "density of the whole": (
        at("expected", "density", to=2),
        "expected.density must be less than or equal to 1, got 2",
    ),
    "mass of two frames": (
        at("transformers", "transformer", "frame_mass", 0, 1, to=[0.5, 0.5]),
        "transformer.frame_mass[0][1] must be a list of 3, got a list of 2",
    ),
    "mass above 1": (
        at("transformers", "transformer", "frame_mass", 1, 0, 2, to=2),
        "frame_mass[1][0][2] must be less than or equal to 1",
    ),
    "curve of three": (at("curve", 0, to=[1, 2, 3]), "curve[0] must have at most 2 items, got a list of 3"),
    "curve of something else": (at("curve_unit", to="steps"), "curve_unit must be 'density' or 'seconds', got 'steps'"),
    "cost model is deep": (
        at("cost_model", to=json.loads('{"a":' * 40 + "1" + "}" * 40)),
        "must be less deep, got an object of 1",
    ),
    "version of fastdit": (
        at("fastdit", to="1.0; rm"),
        "fastdit must match pattern '^[A-Za-z0-9.+_-]{1,64}$', got '1.0; rm'",
    ),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    plan().save(file)
    return file.read_text()


def check_refused(file, message):
    """Loading fails with one error, in one line that names file and place, and nothing else."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PlanError) as found:
            Plan.load(file)
    text = str(found.value)
    assert str(file) in text and message in text, text
    assert len(text) < 600 and "\n" not in text
    assert isinstance(found.value, ValueError)


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_plans(case, written, tmp_path):
    change, message = DAMAGED[case]
    values = json.loads(written)
    change(values)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(values))
    check_refused(file, message)


TEXTS = {
    "empty": ("", "is no JSON"),
    "half": (lambda text: text[: len(text) // 2], "is no JSON"),
    "binary": (b"\x80\x04\x95\x00", "is no JSON"),
    "a list": ("[]", "it is no plan"),
    "null": ("null", "it is no plan"),
    "NaN": (lambda text: text.replace('"speedup": 2.5', '"speedup": NaN'), "NaN is no number"),
    "Infinity": (lambda text: text.replace('"speedup": 2.5', '"speedup": -Infinity'), "-Infinity is no number"),
    "overflow": (lambda text: text.replace('"speedup": 2.5', '"speedup": 1e999'), "1e999 is too large a number"),
    "ten thousand digits": (lambda text: text.replace('"speedup": 2.5', f'"speedup": {"9" * 10_000}'), "is no JSON"),
    "twice": (lambda text: text.replace('"steps": 4', '"steps": 4, "steps": 5'), "'steps' is there twice"),
    "a million levels": ("[" * 1_000_000, "is no JSON"),
    "a million objects": ('{"a":' * 1_000_000, "is no JSON"),
    "comma": (lambda text: text.replace("}\n", "},\n"), "is no JSON"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_hostile_texts(case, written, tmp_path):
    text, message = TEXTS[case]
    text = text(written) if callable(text) else text
    file = tmp_path / "plan.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    check_refused(file, message)


def test_no_file_or_too_large_a_one(written, tmp_path, monkeypatch):
    check_refused(tmp_path / "none.json", "there is no file")
    check_refused(tmp_path, "is no file")
    file = tmp_path / "plan.json"
    file.write_text(written)
    assert Plan.load(file).steps == 4
    monkeypatch.setattr(schema, "MAX_BYTES", len(written) - 1)
    check_refused(file, "which is no plan")
