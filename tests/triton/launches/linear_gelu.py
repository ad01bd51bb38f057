"""Products and GELU of the MLP at the width of the base model, and at one that no block divides."""

import torch

from atst_fast.kernels import linear_gelu as kernels
from tests.triton.launches import SOME, TENSOR_CORES, Launch
from tests.triton.launches.patch_embed import float32_products

# 16 bytes per access, on their way to shared memory and to the result
WIDE = {"LDGSTS.128": SOME, "STG.128": SOME}


def launch(dtype, config, way, *, width=768, precision="highest", archs=(80, 90, 100), candidate=False):
    x, weight = torch.empty(1000, width, dtype=dtype), torch.empty(4 * width, width, dtype=dtype)
    h, bias = torch.empty(1000, 4 * width, dtype=dtype), torch.empty(4 * width, dtype=dtype)

    def call():
        with float32_products(precision):
            if way == "backward":
                kernels.linear_gelu_backward(x, weight.view(width, -1), h, bias, config=config)
            else:
                kernels.linear_gelu(x, weight, bias, way == "forward with h", config=config)

    return Launch(
        f"{way} {dtype} {precision} {width} {tuple(config)}",
        call,
        products=None if (dtype, precision) == (torch.float32, "highest") else TENSOR_CORES,
        opcodes=WIDE if width % 8 == 0 else {},
        archs=archs,
        only="linear_gelu_bwd_kernel" if way == "backward" else "linear_gelu_fwd_kernel",
        candidate=candidate,
    )


def launches():
    found = []
    for way in ("forward", "forward with h", "backward"):
        found += [launch(torch.bfloat16, c, way, candidate=c is not kernels.CONFIGS[0]) for c in kernels.CONFIGS]
    for way in ("forward with h", "backward"):
        found.append(launch(torch.float16, kernels.CONFIGS[0], way, archs=(90,)))
        found.append(launch(torch.bfloat16, kernels.ODD_CONFIGS[0], way, width=100, archs=(90,)))
        found += [launch(torch.float32, config, way) for config in kernels.FULL_CONFIGS]
        found += [launch(torch.float32, config, way, precision="high") for config in kernels.TF32_CONFIGS]
    return found
