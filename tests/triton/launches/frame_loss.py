"""The loss at the width of the heads' output, 256: every configuration in bfloat16, the chosen one in all dtypes."""

from functools import partial

import torch

from atst_fast.kernels import frame_loss as kernels
from tests.triton.launches import NONE, SOME, Launch

ROWS, DIM = 72000, 256
# every access of rows is 16 bytes wide
WIDE = {"LDG.128+LDGSTS.128": SOME, "LDG.U16": NONE, "STG.U16": NONE}


def run(config, dtype, symmetric, counted, dim):
    student, teacher = torch.empty(2, ROWS, dim, dtype=dtype)
    count = torch.tensor(ROWS - 4) if counted else None
    kernels.frame_loss(student, teacher, count, symmetric, config=config)
    kernels.frame_loss_backward(torch.empty(()), student, teacher, count, symmetric, config=config)


def launch(name, config, dtype, symmetric=True, counted=True, dim=DIM, opcodes=WIDE):
    candidate = config is not None
    call = partial(run, config, dtype, symmetric, counted, dim)
    return Launch(name, call, opcodes=opcodes, registers=128, candidate=candidate)


def launches():
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    found = [launch(f"bf16 {config}", config, bf16) for config in kernels.CONFIGS]
    found += [
        launch("bf16", None, bf16),
        launch("fp32", None, fp32),
        launch("fp16, one view", None, fp16, symmetric=False),
    ]
    found += [launch("bf16, full", None, bf16, counted=False)]
    return [*found, launch("bf16, 1000 columns", None, bf16, dim=1000, opcodes={})]
