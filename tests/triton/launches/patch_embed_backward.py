"""The gradients of the launches of patch_embed."""

import torch

from atst_fast.kernels import patch_embed_backward as kernels
from tests.triton.launches import TENSOR_CORES, Launch
from tests.triton.launches.patch_embed import arguments, float32_products


def launch(dtype, config, masked=True, patch=(64, 4), archs=(80, 86, 90, 100), precision="highest"):
    mel, weight, _, mask, _, pos, patch, stride = arguments(768, dtype, masked, patch)
    grad = torch.empty(len(mel), len(pos), 768, dtype=dtype)

    def call():
        with float32_products(precision):
            kernels.patch_embed_backward(grad, mel, weight, mask, len(pos), False, patch, stride, config)

    name = f"{dtype} {precision} {patch} {'masked' if masked else 'whole'} {tuple(config)}"
    products = None if (dtype, precision) == (torch.float32, "highest") else TENSOR_CORES
    return Launch(name, call, products=products, only="patch_embed_bwd_kernel", archs=archs)


def launches():
    made = [launch(torch.bfloat16, config, archs=(90, 100)) for config in kernels.CONFIGS]
    made += [launch(torch.bfloat16, config, archs=(80, 86)) for config in kernels.SMALL_CONFIGS]
    made += [launch(torch.float32, config, precision=p) for config in kernels.FULL_CONFIGS for p in ("highest", "high")]
    made += [launch(torch.float16, kernels.CONFIGS[0], False, (16, 16), archs=(90,))]
    return made
