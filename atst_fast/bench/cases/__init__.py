"""The operators that are measured, each defined in the file of its name (that of ``atst_fast/ops``).

A new operator: an ``Operator`` in a file here, and its entry below. ``atst-fast bench``, ``pytest benchmarks`` and
``make gpu-bench-*`` then have it.
"""

from atst_fast.bench.cases import (
    add_norm,
    augment,
    batch_norm_relu,
    ema,
    epilogue,
    frame_attention,
    frame_loss,
    kaldi_fbank,
    log_mel,
    mlp,
    patch_embed,
)
from atst_fast.bench.operator import Operator

OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        log_mel.OPERATOR,
        kaldi_fbank.OPERATOR,
        augment.OPERATOR,
        patch_embed.OPERATOR,
        patch_embed.SELECT_ROWS,
        frame_attention.OPERATOR,
        add_norm.OPERATOR,
        epilogue.BIAS_GELU,
        epilogue.ADD_BRANCH,
        mlp.OPERATOR,
        batch_norm_relu.OPERATOR,
        frame_loss.OPERATOR,
        ema.EMA_UPDATE,
        ema.ADAMW_EMA,
    )
}
