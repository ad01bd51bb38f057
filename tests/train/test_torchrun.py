"""``torchrun -m atst_fast.train.cli pretrain`` with two processes on a CPU, one of which stops or dies."""

import json
import subprocess
import sys

import pytest
import torch

from atst_fast.train import checkpoint
from atst_fast.train.config import UserError
from atst_fast.train.distributed import World, join
from tests.train.conftest import write_clips
from tests.train.test_pretrain import PROGRAM, STEPS, assert_same_run, but, command, final, settings
from tests.train.tiny import assert_equal

# Process 1 gets a signal after the fourth step, and kills itself after the seventh, once.
BROKEN = """
import os, signal, sys
from pathlib import Path
from atst_fast.train import pretrain

real = pretrain.Stepper.__call__

def once(name):
    marker = Path(sys.argv.pop() if False else os.environ["MARKERS"]) / name
    first = os.environ["RANK"] == "1" and not marker.exists()
    if first:
        marker.touch()
    return first

def step(self, waveform, number):
    out = real(self, waveform, number)
    if number == 3 and once("asked"):
        os.kill(os.getpid(), signal.SIGTERM)
    if number == 6 and once("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    return out

pretrain.Stepper.__call__ = step
"""
