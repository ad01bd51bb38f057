"""A GPU's share of the base model and of the small one: a batch's masked rows, there and back."""

import torch

from atst_fast.kernels import rows
from tests.triton.launches import SOME, Launch

# bytes of a thread's access: all of them 16 where the width is a multiple of 8
WIDE = {"LDG.128": SOME, "STG.128": SOME}


def call(config, width, dtype):
    x, index, inverse = torch.empty(2000, width, dtype=dtype), torch.empty(1088).long(), torch.empty(2000).long()
    return lambda: rows.select_rows(x, index, inverse, config)


def launches():
    cases = [(config, 768, torch.bfloat16) for config in rows.CONFIGS]
    cases += [(rows.choose(width), width, dtype) for width, dtype in [(384, torch.float16), (768, torch.float32)]]
    cases += [(rows.choose(300), 300, torch.bfloat16)]
    return [
        Launch(
            f"{dtype} {width} {tuple(config)}",
            call(config, width, dtype),
            opcodes=WIDE if width % 8 == 0 else {},
            candidate=config != rows.choose(width),
        )
        for config, width, dtype in cases
    ]
