"""Parts of the command line that need no pipeline: arguments, sizes, names, videos on disk, compare, info."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import imageio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from cli_runs import listing, run, run_json

import fastdit
from fastdit import metrics
from fastdit.cli.options import KernelOptions, MethodOptions, ScheduleOptions
from fastdit.cli.settings import read_value
from fastdit.generation import video
from fastdit.generation.errors import InputError
from fastdit.generation.report import mean_decibels
from fastdit.generation.sizes import SizeLimits


def waves(frames=9, height=48, width=64, shift=0.0):
    """Draw smooth moving waves in three colours, which H.264 keeps well."""
    y, x = np.mgrid[:height, :width]
    red = [0.5 + 0.4 * np.sin((x + 2 * f) / 9 + shift) for f in range(frames)]
    green = [0.5 + 0.4 * np.cos(y / 11 + f / 3) for f in range(frames)]
    return np.stack([np.stack([r, g, np.full_like(r, 0.2)], -1) for r, g in zip(red, green, strict=True)])


def read(path):
    with imageio.get_reader(path, format="FFMPEG") as reader:
        return np.stack(list(reader.iter_data())) / 255, reader.get_meta_data()


def settings(*, schedule=None, kernel=None, **changes):
    how = {"schedule": ScheduleOptions(**schedule or {}), "kernel": KernelOptions(kernel)}
    return MethodOptions(**how, **changes).read()


def test_help_imports_nothing_heavy():
    script = """
import sys
from fastdit.cli import app, main
names = [command.callback.__name__ for command in app.registered_commands]
for arguments in (["--help"], *([name, "--help"] for name in names), ["--version"]):
    try:
        main(arguments)
    except SystemExit as stop:
        assert stop.code == 0
heavy = {"torch", "diffusers", "transformers", "accelerate", "numpy", "imageio", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in ("generate", "search", "inspect")) and fastdit.__version__ in done.stdout


def test_main_says_usage_errors_in_one_line(capsys):
    from fastdit.cli import main

    for arguments, fragment in (
        (["generate", "cat", "--steps", "0"], "--steps"),
        (["generate", "cat", "--dtype", "int8"], "'int8'"),
        (["generate", "cat", "--no-such-option"], "--no-such-option"),
        (["no-such-command"], "no-such-command"),
        (["compare", "a.mp4"], "argument"),
        (["generate", "cat", "--seed", str(2**64)], f"got {2**64}"),
        (["generate", "cat", "--seed", str(-(2**63) - 1)], "in [-9223372036854775808, 18446744073709551615]"),
        (["generate", "cat", "--fps", "nan"], "got nan"),
        (["generate", "cat", "--guidance", "inf"], "got inf"),
        (["generate", "cat", "--frames", "1000000000"], "got 1000000000"),
        (["search", "--target-speedup", "inf"], "got inf"),
        (["search", "--max-error", "inf"], "got inf"),
        (["inspect", "plan.json", "--layer", "-1"], "got -1"),
        (["bench", "quality", "--seeds", "1000000000000"], "got 1000000000000"),
        (["bench", "kernels", "--repeats", "0"], "got 0"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and not out
        assert err.startswith("error: ") and fragment in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("12", int, 12),
        ("0.25", float, 0.25),
        ("12", int | float, 12),
        ("0.25", int | float, 0.25),
        ("true", bool, True),
        ("False", bool, False),
        ("1,8,16", tuple[int, int, int], (1, 8, 16)),
        ("(1, 8, 16)", tuple[int, int, int], (1, 8, 16)),
        ("0,-1", tuple[int, ...], (0, -1)),
        ("", tuple[int, ...], ()),
        ("5", int | tuple[int, ...], 5),
        ("2,5,8", int | tuple[int, ...], (2, 5, 8)),
        ("none", int | None, None),
        ("mean", Literal["mean", "max"], "mean"),
        ("any text", str, "any text"),
    ],
)
def test_values_are_read_by_type(text, kind, value):
    read_back = read_value("field", text, kind)
    assert read_back == value and type(read_back) is type(value)


@pytest.mark.parametrize(
    ("text", "kind", "rule"),
    [
        ("1.5", int, "a whole number"),
        ("yes", bool, "true or false"),
        ("1,2", tuple[int, int, int], "3 values"),
        ("min", Literal["mean", "max"], "one of mean, max"),
        ("x", int | float, "a whole number or a number"),
    ],
)
def test_values_of_another_type_are_refused(text, kind, rule):
    with pytest.raises(InputError, match=rule) as error:
        read_value("field", text, kind)
    assert repr(text) in str(error.value)


def test_settings_hold_what_was_asked():
    asked = settings(
        method="draft",
        density=0.3,
        assignments=["tile=1,4,8"],
        schedule={"warmup_steps": "0.25", "dense_layers": "0,-1", "refresh_steps": "2,4", "tail_steps": None},
        kernel="cpu",
    )
    assert asked.fields == {"density": 0.3, "tile": (1, 4, 8)}
    assert asked.schedule == {"warmup_steps": 0.25, "dense_layers": (0, -1), "refresh_steps": (2, 4)}
    assert (asked.method, asked.computing) == ("draft", {"kernel": "cpu", "precision": None})


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"method": "drft"}, "did you mean 'draft'"),
        ({"method": "draft", "assignments": ["densty=0.2"]}, "did you mean 'density'"),
        ({"method": "draft", "assignments": ["density"]}, "name=value"),
        ({"method": "draft", "assignments": ["tile=1,99,99"]}, "256"),
        ({"method": "radial", "density": 0.5}, "no field 'density'"),
        ({"assignments": ["density=0.2"]}, "--method"),
        ({"density": 25.0}, "0.25"),
        ({"density": 0.0}, r"\(0, 1\]"),
        ({"density": float("nan")}, r"\(0, 1\]"),
        ({"schedule": {"warmup_steps": "1.5"}}, "quarter"),
        ({"schedule": {"warmup_steps": "-1"}}, "at least 0"),
        ({"schedule": {"refresh_steps": "0"}}, "at least 1"),
        ({"schedule": {"dense_layers": "first"}}, "'first'"),
        ({"kernel": "fast"}, "cpu"),
    ],
)
def test_settings_refuse_before_a_model_is_there(changes, fragment):
    with pytest.raises(InputError, match=fragment):
        settings(**changes)


@pytest.mark.parametrize(
    ("name", "asked", "nearest"),
    [
        ("height", 1, 16),
        ("height", 100, 96),
        ("height", 104, 112),
        ("height", 9999, 512),
        ("width", 40, 32),
        ("width", 48, 64),
        ("frames", 1, 1),
        ("frames", 2, 1),
        ("frames", 3, 5),
        ("frames", 48, 49),
        ("frames", 400, 125),
    ],
)
def test_sizes_name_the_nearest_that_the_model_takes(name, asked, nearest):
    limits = SizeLimits(height_step=16, width_step=32, frame_step=4, longest_axis=32)
    assert limits.nearest(name, asked) == nearest
    limits.check(name, nearest)
    if asked != nearest:
        with pytest.raises(InputError, match=f"nearest is {nearest}$"):
            limits.check(name, asked)


@pytest.mark.parametrize(
    ("kind", "limits"),
    [
        ("wan", SizeLimits(16, 16, 4, longest_axis=64)),
        ("cogvideox", SizeLimits(16, 16, 4)),
        ("hunyuan_video", SizeLimits(16, 16, 4)),
        ("mochi", SizeLimits(16, 16, 6)),
        ("ltx", SizeLimits(4, 4, 4)),
    ],
)
def test_sizes_come_from_the_pipeline(kind, limits):
    import tiny

    assert SizeLimits.of(tiny.pipeline(kind)) == limits


@pytest.mark.parametrize("suffix", video.SUFFIXES)
@pytest.mark.parametrize("size", [(48, 64), (47, 63)], ids=str)
def test_a_video_is_read_back_as_it_was_written(tmp_path, suffix, size):
    frames = waves(9, *size)
    path = tmp_path / f"clip{suffix}"
    counted = []
    video.write_video(frames, path, fps=12, advance=lambda: counted.append(1))
    back, meta = read(path)
    assert back.shape == frames.shape and len(counted) == 9
    assert meta["fps"] == 12
    assert float(metrics.psnr(torch.from_numpy(back), torch.from_numpy(frames))) > 35
    assert listing(tmp_path) == [path.name]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_video_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"old")
    count = 0

    def stop():
        nonlocal count
        count += 1
        if count == 5:
            raise error

    with pytest.raises(error):
        video.write_video(waves(), path, fps=8, advance=stop)
    assert path.read_bytes() == b"old"
    assert listing(tmp_path) == ["clip.mp4"]


def test_two_videos_side_by_side():
    left, right = waves(3), waves(3, shift=1.0)
    both = video.side_by_side(left, right, gap=8)
    assert both.shape == (3, 48, 136, 3)
    assert (both[:, :, :64] == left).all() and (both[:, :, 72:] == right).all() and (both[:, :, 64:72] == 1).all()


def test_psnr_of_several_videos_is_that_of_their_mean_error():
    assert mean_decibels([20.0, 20.0]) == pytest.approx(20)
    assert mean_decibels([20.0, "inf"]) == pytest.approx(23.0103)
    assert mean_decibels(["inf", "inf"]) == "inf"


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clips")
    noise = np.random.default_rng(0).normal(0, 0.03, waves().shape)
    video.write_video(waves(), path / "a.mp4", fps=8)
    video.write_video(waves() + noise * np.linspace(0, 1, 9)[:, None, None, None], path / "b.mp4", fps=8)
    video.write_video(waves(7), path / "short.mp4", fps=8)
    video.write_video(waves(height=32), path / "low.mp4", fps=8)
    (path / "text.mp4").write_text("no video")
    (path / "cut.mp4").write_bytes((path / "a.mp4").read_bytes()[:1500])
    return path


def test_compare_measures_what_the_metrics_say(clips):
    value = run_json("compare", clips / "a.mp4", clips / "b.mp4")
    a, b = (torch.from_numpy(read(clips / name)[0]) for name in ("a.mp4", "b.mp4"))
    psnr, ssim = metrics.psnr(a, b, per_frame=True), metrics.ssim(a, b, per_frame=True)
    assert value["psnr"] == pytest.approx(float(metrics.psnr(a, b)), abs=1e-3)
    assert value["ssim"] == pytest.approx(float(metrics.ssim(a, b)), abs=1e-5)
    assert value["worst_frame"]["psnr"]["frame"] == int(psnr.argmin()) and int(psnr.argmin()) > 4
    assert value["worst_frame"]["ssim"]["value"] == pytest.approx(float(ssim.min()), abs=1e-5)
    assert (value["frames"], value["width"], value["height"], value["fps"]) == (9, 64, 48, [8, 8])


def test_compare_of_a_video_with_itself(clips):
    value = run_json("compare", clips / "a.mp4", clips / "a.mp4")
    assert value["psnr"] == "inf" and value["ssim"] == pytest.approx(1)
    table = run("compare", clips / "a.mp4", clips / "a.mp4").stdout
    assert "PSNR" in table and "inf" in table and "9 frames of 64 x 48" in table
    assert run("compare", clips / "a.mp4", clips / "a.mp4", "--quiet").output == ""


@pytest.mark.parametrize(
    ("names", "fragments"),
    [
        (("a.mp4", "short.mp4"), ("differ in length", "short.mp4 has 7 frames")),
        (("short.mp4", "a.mp4"), ("differ in length", "short.mp4 has 7 frames")),
        (("a.mp4", "low.mp4"), ("differ in size", "64 x 48", "64 x 32")),
        (("a.mp4", "none.mp4"), ("no video", "none.mp4")),
        (("text.mp4", "a.mp4"), ("text.mp4 cannot be read as a video",)),
        (("a.mp4", "cut.mp4"), ("cut.mp4 cannot be read as a video",)),
    ],
)
def test_compare_refuses(clips, names, fragments):
    result = run("compare", *(clips / name for name in names))
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.count("error: ") == 1 and "Traceback" not in result.stderr
    assert all(fragment in result.stderr for fragment in fragments)


def test_without_ffmpeg(monkeypatch, clips, tmp_path):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "no-ffmpeg"))
    for arguments in (("compare", clips / "a.mp4", clips / "b.mp4"), ("generate", "a cat", "-o", tmp_path / "x.mp4")):
        result = run(*arguments)
        assert result.exit_code == 2 and "ffmpeg" in result.stderr and "IMAGEIO_FFMPEG_EXE" in result.stderr
    assert run_json("info")["ffmpeg"] is None


@pytest.mark.skipif(os.name == "nt", reason="the stand-in is a shell script")
def test_an_encoder_that_is_missing_is_found_before_the_work(monkeypatch, clips, tmp_path):
    real, fake = imageio_ffmpeg.get_ffmpeg_exe(), tmp_path / "ffmpeg"
    fake.write_text(f'''#!/bin/sh
for a in "$@"; do [ "$a" = libx264 ] && {{ echo "Unknown encoder" >&2; exit 1; }}; done
exec "{real}" "$@"
''')
    fake.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(fake))
    commands = (("generate", "a cat", "-o", tmp_path / "x.mp4"), ("bench", "quality", "-o", tmp_path / "x.jsonl"))
    for arguments in commands:
        result = run(*arguments)
        assert result.exit_code == 2 and "cannot write H.264" in result.stderr and "Unknown encoder" in result.stderr
    assert run_json("compare", clips / "a.mp4", clips / "a.mp4")["psnr"] == "inf"  # which only reads


def test_info_lists_what_there_is():
    value = run_json("info")
    assert value["versions"]["fastdit"] == fastdit.__version__ and value["versions"]["torch"]
    assert value["devices"][0]["device"] == "cpu"
    assert set(value["kernels"]) == set(fastdit.list_kernels())
    assert value["kernels"]["reference"] is None
    assert value["families"] == list(fastdit.list_families())
    assert list(value["methods"]) == list(fastdit.list_methods())
    fields = {field["name"]: field for field in value["methods"]["draft"]}
    assert fields["density"] == {"name": "density", "type": "float", "default": 0.25}
    table = run("info").stdout
    for text in (*value["kernels"], *value["families"], *value["methods"], "tuple[int, int, int]", "can run"):
        assert text in table


def test_none_is_no_text():
    assert settings(method="draft", assignments=["compensate=none"]).fields == {"compensate": None}
    assert settings(method="draft", assignments=["compensate=mean"]).fields == {"compensate": "mean"}
