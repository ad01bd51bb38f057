"""A small matrix product, on which the harness itself is tested."""

import torch
import triton
import triton.language as tl

from tests.triton.launches import TENSOR_CORES, Launch


@triton.jit
def product(a, b, c, K, N: tl.constexpr):
    i, j = tl.arange(0, 128), tl.arange(0, N)
    total = tl.zeros((128, N), tl.float32)
    for k in range(0, K, 64):
        inner = k + tl.arange(0, 64)
        total = tl.dot(tl.load(a + i[:, None] * K + inner[None]), tl.load(b + inner[:, None] * N + j[None]), total)
    tl.store(c + i[:, None] * N + j[None], total)


def call():
    a, b, c = torch.empty(128, 256).bfloat16(), torch.empty(256, 64).bfloat16(), torch.empty(128, 64)
    product[(1,)](a, b, c, 256, N=64, num_warps=8)


def launches():
    return [Launch("small", call, products=TENSOR_CORES)]
