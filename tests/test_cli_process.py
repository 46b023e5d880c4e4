"""The command line in processes of its own: exit codes, pure stdout, signals, several processes."""

import json
import os
import signal
import subprocess
import sys
from functools import partial

import pytest
from cli_runs import ENVIRONMENT, listing, small, spawn

# Port 0: the system chooses a free one, so that several tests can run at once.
LAUNCH = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
LAUNCHER = (*LAUNCH, "-m", "fastdit")


def test_json_is_all_there_is_on_stdout(tmp_path):
    done = spawn(*small("a cat", "-o", "cat.mp4", "--compare", "--json"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["clips"][0]["file"] == "cat.mp4"
    assert "denoising dense took" in done.stderr and "it/s" not in done.stderr and "Warning" not in done.stderr
    assert listing(tmp_path) == ["cat.compare.mp4", "cat.dense.mp4", "cat.mp4"]


def test_an_error_is_one_line_and_no_traceback(tmp_path):
    done = spawn(*small("a cat", "--method", "drft"), cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: unknown method 'drft'") and done.stderr.count("\n") == 1
    assert listing(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
@pytest.mark.parametrize(
    ("number", "code", "message"),
    [
        (signal.SIGINT, 130, "error: interrupted; no half-written file was left behind\n"),
        pytest.param(signal.SIGTERM, 143, "", marks=pytest.mark.slow),
    ],
    ids=["ctrl-c", "terminated"],
)
def test_stopped_while_denoising(tmp_path, number, code, message):
    arguments = small("a cat", "--steps", 100_000, "-o", "cat.mp4")
    command = [sys.executable, "-m", "fastdit", *arguments]
    environment = {**os.environ, **ENVIRONMENT}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # whoever started the tests in the background had Ctrl-C ignored, and children inherit that
    restore = partial(signal.signal, number, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=tmp_path, env=environment, preexec_fn=restore, **pipes) as process:
        for line in process.stderr:
            if line.startswith("encoding took"):
                break
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (code, "", message)
    assert listing(tmp_path) == []


@pytest.mark.slow
def test_processes_divide_the_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na bird\n")
    (tmp_path / "out").mkdir()
    arguments = small("--prompts", "prompts.txt", "-o", "out", "--report", "r.json", "--json", "--method", "radial")
    done = spawn(*arguments, cwd=tmp_path, launcher=LAUNCHER)
    assert done.returncode == 0, done.stderr
    value = json.loads(done.stdout)
    assert [clip["prompt"] for clip in value["clips"]] == ["a cat", "a dog", "a bird"]
    assert listing(tmp_path / "out") == ["a-bird.mp4", "a-cat.mp4", "a-dog.mp4"]
    assert json.loads((tmp_path / "r.json").read_text()) == value
    assert done.stderr.count("loading took") == 1

    alone = tmp_path / "alone"
    alone.mkdir()
    assert spawn(*small("a bird", "-o", alone, "--method", "radial"), cwd=tmp_path).returncode == 0
    assert (alone / "a-bird.mp4").read_bytes() == (tmp_path / "out" / "a-bird.mp4").read_bytes()


@pytest.mark.slow
def test_more_processes_than_prompts(tmp_path):
    done = spawn(*small("a cat", "-o", "cat.mp4"), cwd=tmp_path, launcher=LAUNCHER)
    assert done.returncode == 0, done.stderr
    assert listing(tmp_path) == ["cat.mp4"] and done.stdout.count("end to end") == 1


@pytest.mark.slow
def test_a_compiled_transformer(tmp_path):
    done = spawn(*small("a cat", "-o", "cat.mp4", "--compile", "--json"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["compile"] is True
