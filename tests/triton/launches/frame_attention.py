"""Every configuration of the forward of frame_attention, at the head dims and dtypes that it is for."""

from functools import partial

import torch

from atst_fast.kernels import frame_attention as kernels
from tests.triton.launches import NONE, OLD_TENSOR_CORES, SOME, TENSOR_CORES, Launch

_WIDE = {"LDG.128": SOME, "STG.128": SOME, "STL": NONE, "LDL": NONE}


def padded(dtype, head_dim, tokens, config, precision="highest"):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        qkv, lengths = torch.empty(8, tokens, 3 * 768 // head_dim * head_dim, dtype=dtype), torch.full((8,), tokens)
        kernels.frame_attention(qkv, lengths, 768 // head_dim, 0.125, False, config=config)
    finally:
        torch.set_float32_matmul_precision(before)


def packed(dtype, config):
    q, kv = torch.empty(1000, 768, dtype=dtype), torch.empty(2000, 1536, dtype=dtype)
    offsets = torch.zeros(9, dtype=torch.int64)
    kernels.frame_attention_packed(q, kv, offsets, offsets, 250, 250, 12, 0.125, config=config)


def products(config, dtype, precision):
    """Tiles of less than 64 rows are too small for the newer instruction, and float32 has none."""
    if dtype == torch.float32 and precision == "highest":
        return None
    return TENSOR_CORES if config.block_q >= 64 else OLD_TENSOR_CORES


def used(configs):
    """Those that a launch may be made with; the others are there to be timed."""
    limits = [(keys, arch) for keys in (64, 128, 256, 1500) for arch in (80, 86, 90, 100)]
    return {next(c for c in configs if kernels.takes(c, keys, arch)) for keys, arch in limits}


def launch(dtype, head_dim, config, precision="highest", candidate=False):
    tokens = 250 if config.single_pass else 1500
    name = " ".join(map(str, (dtype, head_dim, *config[:5], precision)))
    call = partial(padded, dtype, head_dim, min(tokens, config.block_k) if config.single_pass else tokens, config)
    call = partial(call, precision)
    needed = products(config, dtype, precision)
    return Launch(name, call, needed, _WIDE, archs=config.archs, candidate=candidate)


def launches():
    made = []
    for (how, head_dim), configs in kernels._CONFIGS.items():
        dtype = torch.bfloat16 if how == "half" else torch.float32
        precision = "high" if how == "tf32" else "highest"
        made += [launch(dtype, head_dim, c, precision, c not in used(configs)) for c in configs]
    for head_dim, arch in ((48, 90), (96, 90), (96, 100)):  # columns that are masked
        made.append(launch(torch.bfloat16, head_dim, kernels.candidates(head_dim, torch.bfloat16, 128, arch)[0]))
    for config in kernels.candidates(64, torch.bfloat16, 250, 90)[:2]:
        made.append(launch(torch.float16, 64, config))
        call = partial(packed, torch.bfloat16, config)
        made.append(Launch(f"packed {config[:5]}", call, TENSOR_CORES, _WIDE, archs=config.archs))
    return made
