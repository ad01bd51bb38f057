"""Clips of 10 s through the layer of the base and of the small model, half of the tokens masked or none."""

import contextlib

import torch

from atst_fast.kernels import patch_embed
from tests.triton.launches import TENSOR_CORES, Launch


def arguments(width, dtype, masked, patch=(64, 4), clips=4, frames=1001):
    bins = max(patch[0], 64)
    tokens = bins // patch[0] * (frames // patch[1])
    mel, weight = torch.empty(clips, 1, bins, frames), torch.empty(width, patch[0] * patch[1], dtype=dtype)
    row, pos = torch.empty(width, dtype=dtype), torch.empty(tokens, width, dtype=dtype)
    mask = torch.empty(clips, tokens, dtype=torch.bool) if masked else None
    return mel, weight, row, mask, row if masked else None, pos, list(patch), list(patch)


@contextlib.contextmanager
def float32_products(precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def launch(dtype, config, masked=True, patch=(64, 4), width=768, precision="highest"):
    given = arguments(width, dtype, masked, patch)

    def call():
        with float32_products(precision):
            patch_embed.patch_embed(*given, config)

    name = f"{dtype} {precision} {patch} {width} {'masked' if masked else 'whole'} {tuple(config)}"
    whole = config in patch_embed.CONFIGS and config != patch_embed.SMALL_CONFIG
    products = None if (dtype, precision) == (torch.float32, "highest") else TENSOR_CORES
    return Launch(
        name,
        call,
        products=products,
        only="patch_embed_fwd_kernel",
        archs=(80, 90, 100) if whole else (80, 86, 90, 100),
    )


def launches():
    made = [launch(torch.bfloat16, config) for config in patch_embed.CONFIGS]
    made += [launch(torch.float32, config) for config in patch_embed.FULL_CONFIGS]
    made += [launch(torch.float32, config, precision="high") for config in patch_embed.TF32_CONFIGS]
    made += [launch(torch.bfloat16, config, patch=(64, 5)) for config in patch_embed.PIECES_CONFIGS]
    first = patch_embed.CONFIGS[0]
    return [*made, launch(torch.float16, first, False, width=384), launch(torch.bfloat16, first, patch=(16, 16))]
