"""``fastdit generate`` in this process, with a small untrained pipeline."""

import json
import os
import shutil

import imageio
import numpy as np
import pytest
import torch
from cli_runs import folder, listing, run, run_json, small

import fastdit
from fastdit import metrics
from fastdit.generation import loading as models
from fastdit.generation import studio as making
from fastdit.generation.video import write_video

DRAFT = ("--method", "draft", "--set", "tile=1,2,2", "--density", "0.3")


def read(path):
    with imageio.get_reader(path, format="FFMPEG") as reader:
        return np.stack(list(reader.iter_data())) / 255, reader.get_meta_data()


def closeness(a, b):
    return float(metrics.psnr(torch.from_numpy(a), torch.from_numpy(b)))


def stock_frames(**changes):
    """Make the video that the pipeline makes without fastdit's command line."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(folder())
    pipeline.set_progress_bar_config(disable=True)
    if changes:
        fastdit.enable_sparse_attention(pipeline, **changes)
    return pipeline(
        "a cat", height=32, width=48, num_frames=5, num_inference_steps=3, generator=torch.Generator().manual_seed(7)
    ).frames[0]


@pytest.fixture
def written(monkeypatch):
    """Collect the frames that are written, by file name; noise does not survive H.264 unharmed."""
    frames = {}

    def write(video, path, **options):
        frames[path.name] = video
        write_video(video, path, **options)

    monkeypatch.setattr(making, "write_video", write)
    return frames


def test_a_video_is_what_the_pipeline_makes(tmp_path, written):
    changes = {"method": "draft", "density": 0.3, "tile": (1, 2, 2), "schedule": fastdit.Schedule(warmup_steps=1)}
    out = tmp_path / "cat.mp4"
    schedule = ("--warmup-steps", 1, "--dense-layers", "")
    value = run_json(*small("a cat", *DRAFT, *schedule, "--seed", 7, "--fps", 12, "-o", out))
    frames, meta = read(out)
    assert frames.shape == (5, 32, 48, 3) and meta["fps"] == 12
    assert closeness(written["cat.mp4"], stock_frames(**changes)) > 60
    assert closeness(frames.mean(-1, keepdims=True), written["cat.mp4"].mean(-1, keepdims=True)) > 25
    assert listing(tmp_path) == ["cat.mp4"]
    assert value["method"] == "draft" and value["plan"] is None
    assert value["method_fields"] == {
        "density": 0.3,
        "tile": [1, 2, 2],
        "per_row": True,
        "parts": 8,
        "compensate": "mean",
    }
    assert value["steps"] == 3 and value["sparse_steps"] == [1, 2] and value["seed"] == 7
    assert 0.25 < value["density"] < 0.45
    assert value["sparse_call_density"] == pytest.approx(value["density"])
    assert value["overall_density"] == pytest.approx((1 + 2 * value["density"]) / 3)
    assert value["seconds"] > value["sparse_steps_seconds"] > 0 and value["attention_seconds"] > 0
    assert [value[name] for name in ("psnr", "ssim", "speedup", "speedup_attention")] == [None] * 4
    assert value["device"].startswith("cpu") and value["dtype"] == "float32"


def test_dense_layers_count_in_the_density_of_the_sparse_steps(tmp_path):
    schedule = ("--warmup-steps", 1, "--tail-steps", 1, "--dense-layers", "0,-1")
    value = run_json(*small("a cat", *DRAFT, *schedule, "-o", tmp_path / "cat.mp4"))
    assert value["sparse_steps"] == [1] and value["schedule"]["dense_layers"] == [0, -1]
    assert value["density"] == pytest.approx((2 + 4 * value["sparse_call_density"]) / 6)
    assert value["overall_density"] == pytest.approx((2 + value["density"]) / 3)
    assert value["sparse_call_density"] < 0.45


def test_compare_makes_the_dense_video_too(tmp_path, written):
    out, report = tmp_path / "cat.mp4", tmp_path / "numbers.json"
    value = run_json(*small("a cat", *DRAFT, "--seed", 7, "-o", out, "--compare", "--report", report))
    assert listing(tmp_path) == ["cat.compare.mp4", "cat.dense.mp4", "cat.mp4", "numbers.json"]
    assert json.loads(report.read_text()) == value
    sparse, dense, both = (read(tmp_path / name)[0] for name in ("cat.mp4", "cat.dense.mp4", "cat.compare.mp4"))
    assert closeness(written["cat.dense.mp4"], stock_frames()) > 60
    assert value["psnr"] == pytest.approx(closeness(written["cat.mp4"], written["cat.dense.mp4"]))
    assert both.shape == (5, 32, 2 * 48 + 8, 3)
    assert closeness(both[:, :, :48], dense) > 25 and closeness(both[:, :, -48:], sparse) > 25
    (clip,) = value["clips"]
    for name in ("speedup", "speedup_sparse_steps", "speedup_attention", "density", "overall_density", "psnr", "ssim"):
        assert value[name] > 0
    assert value["speedup"] == pytest.approx(clip["dense_seconds"] / clip["seconds"])
    parts = ("text_encoding_seconds", "denoising_seconds", "decoding_seconds")
    for run_name in ("", "dense_"):
        assert sum(clip[run_name + part] for part in parts) == pytest.approx(clip[f"{run_name}seconds"])
    assert clip["prompt"] == "a cat" and clip["dense_file"] == str(tmp_path / "cat.dense.mp4")
    assert value["versions"]["torch"] and len(clip["attention"]["layers"]) == 6


def test_dense_compared_with_dense_is_identical(tmp_path):
    value = run_json(*small("a cat", "--method", "dense", "-o", tmp_path / "cat.mp4", "--compare"))
    assert value["psnr"] == "inf" and value["ssim"] == pytest.approx(1)
    assert value["density"] is None and value["overall_density"] == 1 and value["sparse_steps"] == []


def test_no_sparse_step_is_no_error(tmp_path):
    value = run_json(*small("a cat", *DRAFT, "--warmup-steps", "1.0", "-o", tmp_path / "cat.mp4"))
    assert value["sparse_steps"] == [] and value["density"] is None and value["sparse_steps_seconds"] is None


def test_no_sparse_layer_is_no_error(tmp_path):
    layers = ("--warmup-steps", 0, "--tail-steps", 0, "--dense-layers", "0,1,2,3,4,5")
    result = run(*small("a cat", *DRAFT, *layers, "-o", tmp_path / "cat.mp4"))
    assert result.exit_code == 0, result.stderr
    assert "density, sparse steps (3)" in result.stdout and "density, sparse layers" not in result.stdout


def test_the_table_and_the_files_are_shown(tmp_path):
    result = run(*small("a cat", *DRAFT, "-o", tmp_path / "cat.mp4", "--compare"))
    assert result.exit_code == 0
    for text in ("density", "time, attention", "end to end", "PSNR to dense", "SSIM to dense", "speed-up"):
        assert text in result.stdout
    for name in ("cat.mp4", "cat.dense.mp4", "cat.compare.mp4"):
        assert f"wrote {tmp_path / name}" in result.stderr


@pytest.mark.skipif(not hasattr(os, "getloadavg"), reason="nobody tells the load here")
def test_times_on_a_busy_machine_are_called_into_question(tmp_path, monkeypatch):
    arguments = small("a cat", "-o", tmp_path / "cat.mp4", "--compare", "--device", "cpu")
    for load, warned in ((os.cpu_count() + 2.0, True), (float(os.cpu_count()), False)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert ("other programs were running" in run(*arguments).stderr) is warned
    assert run_json(*arguments)["clips"][0]["dense_load_average"] == os.cpu_count()


def test_quiet_shows_nothing(tmp_path):
    result = run(*small("a cat", "-o", tmp_path / "cat.mp4", "--quiet"))
    assert result.exit_code == 0 and result.output == ""


def test_prompts_of_a_file_get_one_video_each(tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a cat\n\na [bold] dog\na cat\n")
    result = run(*small("--prompts", prompts, *DRAFT, "-o", out, "--report", tmp_path / "r.json"))
    assert result.exit_code == 0, result.stderr
    assert listing(out) == ["a-bold-dog.mp4", "a-cat-2.mp4", "a-cat.mp4"]
    value = json.loads((tmp_path / "r.json").read_text())
    assert [clip["prompt"] for clip in value["clips"]] == ["a cat", "a [bold] dog", "a cat"]
    assert value["seconds"] == pytest.approx(sum(clip["seconds"] for clip in value["clips"]))
    assert (out / "a-cat.mp4").read_bytes() == (out / "a-cat-2.mp4").read_bytes()
    assert "3 videos" in result.stdout and "a-bold-dog.mp4" in result.stdout


def test_output_may_be_a_folder(tmp_path):
    assert run(*small("A cat, dancing", "-o", tmp_path)).exit_code == 0
    assert listing(tmp_path) == ["a-cat-dancing.mp4"]


def test_group_offload_and_bfloat16(tmp_path):
    value = run_json(*small("a cat", *DRAFT, "--offload", "group", "--dtype", "bfloat16", "-o", tmp_path / "cat.mp4"))
    assert value["dtype"] == "bfloat16" and value["offload"] == "group" and value["density"] < 0.5


@pytest.fixture
def no_loading(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("the model was loaded before the arguments were checked")

    monkeypatch.setattr(models, "load_model", load)


def refused(*arguments, code=2):
    result = run(*arguments)
    assert result.exit_code == code and result.stdout == "" and "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and result.stderr.rstrip().endswith(errors[0])
    return errors[0]


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ((), ("--prompts",)),
        (("a cat", "--prompts", "two.txt"), ("--prompts",)),
        ((" ",), ("prompt is empty",)),
        (("--prompts", "none.txt"), ("none.txt", "No such file")),
        (("--prompts", "empty.txt"), ("has no prompts", "empty.txt")),
        (("--prompts", "binary.txt"), ("binary.txt", "UTF-8")),
        (("--prompts", "two.txt", "-o", "none/out"), ("none does not exist", "mkdir -p none")),
        (("--prompts", "two.txt", "-o", "out.mp4"), ("out.mp4 names a file", "pass a folder")),
        (("--prompts", "two.txt", "-o", "out", "--method", "drft"), ("did you mean 'draft'",)),
        (("--prompts", "two.txt", "-o", "empty.txt"), ("is a file, not a folder",)),
        (("a cat", "-o", "none/cat.mp4"), ("none does not exist", "mkdir -p")),
        (("a cat", "-o", "cat.avi"), ("cat.avi", ".mp4")),
        (("a cat", "--report", "none/r.json"), ("none does not exist",)),
        (("a cat", "--report", "."), ("is a folder",)),
        (("a cat", "--report", "a-cat.mp4"), ("--report and the video are the same file",)),
        (("a cat", "-o", "c.mp4", "--compare", "--report", "c.dense.mp4"), ("--report and the dense video",)),
        (("--prompts", "two.txt", "--report", "./two.txt"), ("--report and --prompts",)),
        (("a cat", "--model", folder(), "--report", folder() / "model_index.json"), ("--report and --model",)),
        (("a cat", "--model", folder(), "-o", folder() / "vae" / "a.mp4"), ("is inside --model",)),
        (("a cat", "-o", "x" * 252 + ".mp4"), ("has 256 bytes",)),
        (("a cat", "--report", "x" * 256), ("has 256 bytes",)),
        (("a cat", "-o", "x/" * 3000 + "a.mp4"), ("does not exist",)),
        (("a cat", "--model", "x" * 300), ("no model",)),
        (("a\udcff",), ("not valid UTF-8",)),
        (("a cat", "--method", "drft"), ("did you mean 'draft'",)),
        (("a cat", "--density", "25"), ("(0, 1]",)),
        (("a cat", "--kernel", "fast"), ("unknown kernel",)),
        (("a cat", "--device", "gpu"), ("unknown device 'gpu'",)),
        (("a cat", "--offload", "model", "--device", "cpu"), ("--offload model",)),
        (("a cat", "--model", "nothing-here"), ("no model 'nothing-here'", "hub id")),
        (("a cat", "--model", "empty.txt"), ("is a file",)),
        (("a cat", "--model", "."), ("no model_index.json",)),
        (("a cat", "--model", "fastdit-tests/no-such-model"), ("there is no folder fastdit-tests/no-such-model",)),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, arguments, fragments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "two.txt").write_text("a cat\na dog\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    message = refused("generate", *arguments)
    assert all(fragment in message for fragment in fragments)
    assert listing(tmp_path) == ["binary.txt", "empty.txt", "two.txt"]


@pytest.mark.usefixtures("no_loading")
@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what is missing here")
def test_cuda_without_cuda(tmp_path):
    assert "no CUDA device" in refused(*small("a cat", "--device", "cuda", "-o", tmp_path / "cat.mp4"))


@pytest.mark.usefixtures("no_loading")
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    assert "cannot be written" in refused(*small("a cat", "-o", tmp_path / "cat.mp4"))


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (("--frames", 6), ("6 frames", "nearest is 5")),
        (("--height", 100), ("a height of 100", "multiple of 8", "nearest is 104")),
        (("--width", 4000), ("at most 512", "nearest is 512")),
        (("--dense-layers", "9"), ("6 self-attention layers",)),
    ],
)
def test_what_the_model_cannot_take(tmp_path, arguments, fragments):
    message = refused(*small("a cat", *arguments, "-o", tmp_path / "cat.mp4"))
    assert all(fragment in message for fragment in fragments)
    assert listing(tmp_path) == []


def damaged(path, kind):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder(), path)
    weights, index = path / "transformer" / "diffusion_pytorch_model.safetensors", path / "model_index.json"
    if kind == "cut off":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif kind == "missing":
        weights.unlink()
    elif kind == "foreign":
        renamed = {f"model.{name}": tensor for name, tensor in load_file(weights).items()}
        save_file(renamed, weights, metadata={"format": "pt"})
    elif kind == "not finite":
        save_file({n: t * float("nan") for n, t in load_file(weights).items()}, weights, metadata={"format": "pt"})
    elif kind == "index":
        index.write_text(index.read_text()[:40])
    else:
        parts = json.loads(index.read_text())
        name, value = kind
        parts[name] = value
        index.write_text(json.dumps(parts))
    return path


@pytest.mark.parametrize(
    ("kind", "fragments"),
    [
        ("cut off", ("cannot be loaded", "transformer")),
        ("missing", ("cannot be loaded",)),
        ("foreign", ("does not hold the weights of a WanTransformer3DModel", "missing")),
        ("not finite", ("NaN or Inf",)),
        ("index", ("model_index.json is damaged",)),
        (("_class_name", "NoSuchPipeline"), ("class NoSuchPipeline", "diffusers")),
        (("transformer", ["diffusers", "NoSuchTransformer"]), ("class NoSuchTransformer",)),
        (("transformer", ["diffusers", "SD3Transformer2DModel"]), ("SD3Transformer2DModel", "WanTransformer3DModel")),
        (("transformer", [None, None]), ("no transformer",)),
    ],
    ids=str,
)
def test_a_damaged_or_foreign_checkpoint(tmp_path, kind, fragments):
    model = damaged(tmp_path / "model", kind)
    message = refused(*small("a cat", "--model", model, "-o", tmp_path / "cat.mp4"))
    assert all(fragment in message for fragment in fragments)
    assert listing(tmp_path) == ["model"]


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (RuntimeError("two\nlines"), 1)], ids=str)
def test_a_failure_half_way_leaves_whole_files_only(tmp_path, monkeypatch, error, code):
    def fail(*args):
        raise error

    monkeypatch.setattr(making, "side_by_side", fail)
    message = refused(
        *small("a cat", "-o", tmp_path / "cat.mp4", "--compare", "--report", tmp_path / "r.json"), code=code
    )
    assert ("interrupted" if code == 130 else "RuntimeError: two lines") in message
    assert listing(tmp_path) == ["cat.dense.mp4", "cat.mp4"]
    assert all(len(read(tmp_path / name)[0]) == 5 for name in listing(tmp_path))


def test_debug_shows_where_an_error_came_from(tmp_path):
    result = run(*small("a cat", "--frames", 6, "-o", tmp_path / "cat.mp4", "--debug"))
    assert result.exit_code == 2 and "Traceback" in result.stderr and "sizes.py" in result.stderr
