"""What the command line reads and writes: prompts, names of files, and what it leaves as it was."""

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from fastdit.cli.apart import check_apart
from fastdit.cli.console import json_text
from fastdit.generation import loading as models
from fastdit.generation import video
from fastdit.generation.errors import InputError
from fastdit.generation.jobs import plan_jobs, read_prompts


def test_names_come_from_the_prompts(tmp_path):
    prompts = ["A red ball!", "a red  ball", "über/../den Wolken", "x" * 300, "?!"]
    names = [job.output.name for job in plan_jobs(prompts, tmp_path, single=False)]
    assert names == ["a-red-ball.mp4", "a-red-ball-2.mp4", "über-den-wolken.mp4", "x" * 60 + ".mp4", "video.mp4"]
    (job,) = plan_jobs(["cat"], tmp_path / "clip.mkv", single=True)
    assert (job.output.name, job.dense_output.name) == ("clip.mkv", "clip.dense.mkv")
    assert job.pair_output == tmp_path / "clip.compare.mkv"


def test_prompts_are_lines_of_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffa cat\n\n  a dog  \r\n", encoding="utf-8")
    assert read_prompts(None, file) == ["a cat", "a dog"]


def test_prompts_end_at_line_feeds_and_carriage_returns_only(tmp_path):
    file = tmp_path / "prompts.txt"
    prompts = [f"a cat{end}runs" for end in "\v\f\x1c\x1d\x1e\x85\u2028\u2029"]
    for end in ("\n", "\r\n", "\r"):
        file.write_text(end.join(prompts) + end, encoding="utf-8-sig", newline="")
        assert read_prompts(None, file) == prompts


@pytest.mark.parametrize("data", ["a cat\n".encode("utf-16-le"), "a cat\n".encode("utf-16"), "ü".encode("latin-1")])
def test_prompts_of_another_encoding(tmp_path, data):
    (tmp_path / "prompts.txt").write_bytes(data)
    with pytest.raises(InputError, match="UTF-8"):
        read_prompts(None, tmp_path / "prompts.txt")


def test_a_prompt_with_bytes_that_are_no_letters():
    with pytest.raises(InputError, match="not valid UTF-8"):
        read_prompts("a cat\udcff", None)


def test_names_fit_in_bytes(tmp_path):
    jobs = plan_jobs(["𝒂𝒓𝒆𝒅𝒃𝒂𝒍𝒍" * 12, "𝒂𝒓𝒆𝒅𝒃𝒂𝒍𝒍" * 13, "猫" * 99], tmp_path, single=False)
    paths = [path for job in jobs for path in job.files(compare=True).values()]
    assert len(set(paths)) == 9
    for path in paths:
        video.write_video(np.zeros((1, 16, 16, 3)), path, fps=8)
    (job,) = plan_jobs(["cat"], tmp_path / ("x" * 251 + ".mp4"), single=True, compare=False)
    video.write_video(np.zeros((1, 16, 16, 3)), job.output, fps=8)
    for name, compare in (("x" * 252, False), ("x" * 244, True), ("猫" * 84, False)):
        with pytest.raises(InputError, match="bytes, and file systems allow 255"):
            plan_jobs(["cat"], tmp_path / f"{name}.mp4", single=True, compare=compare)


def test_names_from_prompts_are_those_of_no_file(tmp_path):
    (tmp_path / "a-cat.mp4").touch()
    (tmp_path / "a-dog.dense.mp4").touch()
    prompts = ["a cat!", "A dog", "cafe\u0301", "caf\u00e9", "stra\u00dfe", "strasse"]
    names = [job.output.name for job in plan_jobs(prompts, tmp_path, single=False)]
    assert names == ["a-cat-2.mp4", "a-dog-2.mp4", "café.mp4", "café-2.mp4", "straße.mp4", "strasse-2.mp4"]


@pytest.mark.parametrize("link", ["symlink", "hardlink", "folder", "relative"])
def test_files_that_are_read_are_not_written(tmp_path, monkeypatch, link):
    monkeypatch.chdir(tmp_path)
    file, folder = tmp_path / "plan.json", tmp_path / "folder"
    file.touch()
    folder.mkdir()
    other = tmp_path / "other"
    if link == "symlink":
        other.symlink_to(file)
    elif link == "hardlink":
        os.link(file, other)
    elif link == "folder":
        (folder / "here").symlink_to(tmp_path)
        other = folder / "here" / "plan.json"
    else:
        other = Path("folder") / ".." / "." / "plan.json"
    for written, read in ((other, file), (file, other)):
        with pytest.raises(InputError, match="--report and --plan are the same file"):
            check_apart([("--report", written)], [("--prompts", None), ("--plan", read)])
        with pytest.raises(InputError, match="--report and the video are the same file"):
            check_apart([("the video", written), ("--report", read)])
    check_apart([("--report", tmp_path / "new.json"), ("the video", tmp_path / "new.mp4")], [("--plan", file)])
    with pytest.raises(InputError, match="is inside --model"):
        check_apart([("--report", folder / "vae" / "r.json")], [("--model", folder)])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
def test_devices_and_pipes_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(os.devnull)):
        with pytest.raises(InputError, match="a device or a pipe"):
            video.check_target(path, None)


@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_libraries_are_left_as_they_were(shown, error):
    import diffusers
    import transformers
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    def state():
        logs = [library.utils.logging for library in (diffusers, transformers)]
        bars = [log.is_progress_bar_enabled() for log in logs]
        return (
            bars,
            [log.get_verbosity() for log in logs],
            are_progress_bars_disabled(),
            are_progress_bars_disabled("x"),
        )

    logs = [library.utils.logging for library in (diffusers, transformers)]
    try:
        for log in logs:
            (log.enable_progress_bar if shown else log.disable_progress_bar)()
        (disable_progress_bars if shown else enable_progress_bars)("x")
        before = state()
        with contextlib.suppress(KeyboardInterrupt), models.quiet_libraries():
            assert state()[0] == [False, False]
            if error is not None:
                raise error
        assert state() == before
    finally:
        enable_progress_bars()
        for log in logs:
            log.enable_progress_bar()


def test_json_has_escapes_where_letters_cannot_be_written():
    value = {"file": "ü", "path": "\udcff"}
    assert json_text({"file": "ü"}) == '{\n  "file": "ü"\n}'
    for encoding in (None, "ascii"):
        text = json_text(value, encoding)
        assert json.loads(text) == value and text.isascii()
