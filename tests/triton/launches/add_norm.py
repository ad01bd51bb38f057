"""add_norm at the widths of the published sizes, with every configuration; kernels/partial_sums.py behind it."""

from functools import partial

import torch

from atst_fast.kernels import add_norm as kernels
from tests.triton.launches import NONE, SOME, Launch

SIZES = [
    (768, torch.bfloat16, (80, 90, 100)),
    (384, torch.bfloat16, (90,)),
    (768, torch.float16, (90,)),
    (768, torch.float32, (80, 90, 100)),
    (100, torch.bfloat16, (90,)),
]
CLIPS, TOKENS = 4, 250
# 16 bytes per access, of every row that is read (by way of shared memory, where it is loaded ahead) and written
WIDE = {"LDG.128+LDGSTS.128": (4, None), "STG.128": SOME, "LDG.U16": NONE, "STG.U16": NONE}


def call(width, dtype, *, scaled=True, branch=True, forward=None, backward=None):
    x, row = torch.empty(CLIPS, TOKENS, width, dtype=dtype), torch.empty(width, dtype=dtype)
    y, bias = (x, row) if branch else (None, None)
    scale = torch.empty(CLIPS) if scaled and branch else None
    if backward is None:
        kernels.add_norm(x, y, bias, scale, row, row, 1e-6, config=forward)
        return
    moment = torch.empty(CLIPS * TOKENS)
    d_sum = x if branch else None
    config = None if backward == "default" else backward
    kernels.add_norm_backward(d_sum, x, x, moment, moment, scale, row, True, branch, config=config)


def launches():
    found = []
    for width, dtype, archs in SIZES:
        opcodes = {} if width % 64 else WIDE
        for kernel, option in (("add_norm_fwd_kernel", {}), ("add_norm_bwd_kernel", {"backward": "default"})):
            name = f"{kernel} {width} {dtype}"
            run = partial(call, width, dtype, **option)
            # what the size of the persistent grid counts on
            registers = 80 if option and dtype != torch.float32 else 255
            found.append(Launch(name, run, opcodes=opcodes, archs=archs, only=kernel, registers=registers))
    for option in ({}, {"backward": "default"}):
        for kind in ({"branch": False}, {"scaled": False}):
            run = partial(call, 768, torch.bfloat16, **kind, **option)
            found.append(Launch(f"{'backward' if option else 'forward'} {kind}", run, archs=(90,)))
    for config in kernels.FORWARD_CONFIGS:
        run = partial(call, 768, torch.bfloat16, forward=config)
        found.append(Launch(f"forward {config}", run, archs=(90,), candidate=True))
    for config in kernels.BACKWARD_CONFIGS:
        run = partial(call, 768, torch.bfloat16, backward=config)
        found.append(Launch(f"backward {config}", run, archs=(90,), candidate=True))
    return found
