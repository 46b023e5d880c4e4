import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_offsets_in_the_interpreter():
    """Runs tests/far_interpreter.py in its own process: the interpreter is chosen when Triton is imported."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", HERE / "far_interpreter.py"]
    done = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
