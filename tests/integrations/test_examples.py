import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_accelerate_audiossl(tmp_path):
    """The example runs without audiossl, from anywhere, and its two losses agree."""
    command = [sys.executable, ROOT / "examples" / "accelerate_audiossl.py", "--steps", "2", "--clips", "2"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=_environment())
    assert run.returncode == 0, run.stderr
    assert "update_teacher by ops.ema_update_" in run.stdout
    assert "15 of 15 parts replaced" in run.stdout
    apart = float(run.stdout.split("difference of a loss: ")[1].split()[0])
    assert apart < 1e-5
    assert "restored: 15 modules" in run.stdout


def test_its_arguments():
    command = [sys.executable, ROOT / "examples" / "accelerate_audiossl.py", "--clips", "1"]
    run = subprocess.run(command, capture_output=True, text=True, env=_environment())
    assert run.returncode == 2
    assert "--steps must be at least 1 and --clips at least 2" in run.stderr


def _environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
