"""Batch norm and ReLU at the width of the heads, 4096: all configurations in bfloat16, the chosen one in all dtypes."""

import torch

from atst_fast.kernels import batch_norm_relu as kernels
from tests.triton.launches import NONE, SOME, Launch

ROWS, DIM = 9000, 4096
# every access of rows is 16 bytes wide
WIDE = {"LDG.128+LDGSTS.128": SOME, "LDG.U16": NONE, "STG.U16": NONE}


def run(config, dtype, parameters, counted):
    x, grad = torch.empty(2, ROWS, DIM, dtype=dtype)
    weight, bias = torch.empty(2, DIM, dtype=parameters)
    moments, sums = torch.empty(3, DIM), torch.empty(2, DIM)
    count = torch.tensor(ROWS - 5) if counted else None
    rest = weight, bias, count, 1e-5
    kernels.column_moments(x, count, config=config)
    kernels.batch_norm_relu_apply(x, moments, *rest, config=config)
    kernels.batch_norm_relu_sums(grad, x, moments, *rest, config=config)
    kernels.batch_norm_relu_input_grad(grad, x, moments, sums, *rest, config=config)


def launch(name, config, *arguments):
    candidate = config is not None
    return Launch(name, lambda: run(config, *arguments), opcodes=WIDE, registers=128, candidate=candidate)


def launches():
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    found = [launch(f"bf16 {config}", config, bf16, bf16, True) for config in kernels.CONFIGS]
    for dtype, parameters, counted in ((bf16, bf16, True), (fp32, fp32, True), (fp16, fp32, True), (bf16, fp32, False)):
        name = f"{dtype}, parameters {parameters}, {'padded' if counted else 'full'}"
        found.append(launch(name, None, dtype, parameters, counted))
    return found
