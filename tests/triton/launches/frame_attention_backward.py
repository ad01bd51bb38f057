"""Every configuration of the backward of frame_attention, at the head dims and dtypes that it is for."""

from functools import partial

import torch

from atst_fast.kernels import frame_attention_backward as kernels
from tests.triton.launches import NONE, OLD_TENSOR_CORES, SOME, TENSOR_CORES, Launch

WIDTH = 768
_WIDE = {"LDG.128": SOME, "STG.128": SOME, "STL": NONE, "LDL": NONE}
# Of a Hopper GPU's products: one each, not one for every instruction, which then waits for the one before
_IN_FLIGHT = {"WARPGROUP.ARRIVE": (0, 5)}


def padded(dtype, head_dim, tokens, config, precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        heads = WIDTH // head_dim
        qkv, lengths = torch.empty(8, tokens, 3 * heads * head_dim, dtype=dtype), torch.full((8,), tokens)
        out, lse = torch.empty(8, tokens, heads * head_dim, dtype=dtype), torch.empty(heads, 8 * tokens)
        kernels.frame_attention_backward(out, qkv, out, lse, lengths, heads, 0.125, False, config=config)
    finally:
        torch.set_float32_matmul_precision(before)


def packed(dtype, config):
    q, kv, lse = torch.empty(1000, WIDTH, dtype=dtype), torch.empty(2000, 2 * WIDTH, dtype=dtype), torch.empty(12, 1000)
    offsets = torch.zeros(9, dtype=torch.int64)
    arguments = q, q, kv, q, lse, offsets, offsets, 250, 250, 12, 0.125
    kernels.frame_attention_packed_backward(*arguments, config=config)


def products(config, dtype, precision):
    """Tiles of less than 64 rows are too small for the newer instruction, and float32 has none."""
    if dtype == torch.float32 and precision == "highest":
        return None
    return TENSOR_CORES if config.own >= 64 else OLD_TENSOR_CORES


def launch(dtype, head_dim, config, precision="highest"):
    name = " ".join(map(str, (dtype, head_dim, *config[:6], precision)))
    call = partial(padded, dtype, head_dim, config.own if config.one_program else 1500, config, precision)
    # a warp of 16 rows of its own: other shapes of products share rows among warps, and wait
    own_rows = config.own >= 16 * config.num_warps and config.other >= 32
    counts = _WIDE | (_IN_FLIGHT if own_rows else {})
    chosen = products(config, dtype, precision)
    return Launch(name, call, chosen, counts, archs=config.archs, candidate=not used(config, dtype, head_dim))


def used(config, dtype, head_dim):
    """Whether some length on some GPU has it without being told."""
    choices = (kernels.candidates(head_dim, dtype, n, a)[0] for a in config.archs for n in (64, 128, 256, 1500))
    return config in choices


def launches():
    made = []
    for (size, head_dim), configs in kernels._CONFIGS.items():
        for config in configs:
            dtype = torch.bfloat16 if size == 2 else torch.float32
            made.append(launch(dtype, head_dim, config))
            if size == 4:
                made.append(launch(dtype, head_dim, config, "high"))
    for config in kernels.candidates(64, torch.float16, 250, 90)[:1]:
        made.append(launch(torch.float16, 64, config))
        made.append(launch(torch.bfloat16, 48, config))  # columns that are masked
    for config in kernels.candidates(64, torch.bfloat16, 250, 90)[::2]:
        name = f"end to end {config}"
        call, rare = partial(packed, torch.bfloat16, config), not used(config, torch.bfloat16, 64)
        made.append(Launch(name, call, TENSOR_CORES, archs=config.archs, candidate=rare))
    return made
