"""Examples that no other test runs, from their first line to their last, with fewer steps."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_a_mixture_of_experts(tmp_path):
    """Kills: a function of the demo's that the example still calls as it was."""
    options = ["--cache", str(tmp_path), "--base-steps", "20", "--steps", "12", "--rounds", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": ""}  # without apt-get the text is Python's own
    command = [sys.executable, str(EXAMPLES / "moe.py"), *options]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "every adapter is fused: ok" in run.stdout
    assert (tmp_path / "moe.png").is_file()
