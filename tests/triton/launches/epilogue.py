"""bias_gelu and add_branch at the widths of the published sizes, with every configuration."""

from functools import partial

import torch

from atst_fast.kernels import epilogue as kernels
from tests.triton.launches import NONE, SOME, Launch

SIZES = [
    (768, torch.bfloat16, (80, 90, 100)),
    (768, torch.float16, (90,)),
    (768, torch.float32, (80, 90, 100)),
    (100, torch.bfloat16, (90,)),
]
# 16 bytes per access, by way of shared memory where it is loaded ahead
WIDE = {"LDG.128+LDGSTS.128": SOME, "STG.128": SOME, "LDG.U16": NONE, "STG.U16": NONE}


def gelu(width, dtype, backward=False, config=None):
    h, bias = torch.empty(1000, width, dtype=dtype), torch.empty(width, dtype=dtype)
    if backward:
        kernels.bias_gelu_backward(h, h, bias, config=config)
    else:
        kernels.bias_gelu(h, bias, config=config)


def branch(width, dtype, backward=False, config=None, kept=False):
    x, bias, scale = torch.empty(4, 250, width, dtype=dtype), torch.empty(width, dtype=dtype), torch.empty(4)
    kept = torch.arange(4) if kept else None
    if backward:
        kernels.add_branch_backward(x, 1.5, kept, scale, config=config)
    else:
        kernels.add_branch(x, x, bias, 1.5, kept, scale, config=config)


def launches():
    found = []
    for call, stem in ((gelu, "bias_gelu"), (branch, "add_branch")):
        for backward in (False, True):
            kernel = f"{stem}_{'bwd' if backward else 'fwd'}_kernel"
            for width, dtype, archs in SIZES:
                opcodes = {} if width % 64 else WIDE
                run = partial(call, 4 * width if call is gelu else width, dtype, backward)
                # backward, what the size of the persistent grid counts on
                limits = {"opcodes": opcodes, "registers": 64 if backward else 255}
                found.append(Launch(f"{kernel} {width} {dtype}", run, archs=archs, only=kernel, **limits))
            for config in kernels.BACKWARD_CONFIGS if backward else kernels.FORWARD_CONFIGS:
                run = partial(call, 768 if call is branch else 3072, torch.bfloat16, backward, config)
                found.append(Launch(f"{kernel} {config}", run, archs=(90,), candidate=True))
            if call is branch:
                run = partial(call, 768, torch.bfloat16, backward, kept=True)
                found.append(Launch(f"{kernel} kept", run, archs=(90,)))
    return found
