"""Spectrogram to tokens: patches, linear layer, mask token and position in one operator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from atst_fast.ops import _autocast, _checks
from atst_fast.ops._registry import differentiable_once, register, takes_halves
from atst_fast.reference import patch_embed as reference

_OP = "patch_embed"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def patch_embed(
    mel: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    patch: tuple[int, int] = (64, 4),
    stride: tuple[int, int] | None = None,
    mask: Tensor | None = None,
    mask_embed: Tensor | None = None,
    pos_embed: Tensor | None = None,
) -> Tensor:
    """Patches of ``mel`` through a linear layer, masked tokens replaced, positions added; masked ones cost no product.

    Args:
        mel: ``[B, 1, F, T]`` of any dtype and strides.
        weight: ``[D, ph*pw]``, a patch flattened with its mel bins outside and its frames inside; float32, bfloat16 or
            float16. On a CPU they are computed with in float32; on a GPU the patches are rounded to the weight's dtype
            and all sums are float32 (TF32 products if ``torch.get_float32_matmul_precision()`` allows them). float64
            runs the PyTorch reference. bias: ``[D]``.
        patch: (ph, pw) mel bins and frames. stride: by default the same; less overlaps. What does not fill a patch
            at the end of either axis is cut off.
        mask: bool ``[B, L]``; True replaces the token by ``mask_embed`` (any shape of D values).
        pos_embed: ``[L', D]`` or ``[1, L', D]`` with L' >= L; its first L rows are added, to masked tokens too.

    Returns:
        ``[B, L, D]`` in the dtype of weight; L = rows x columns, token ``column * rows + row`` (with one row, token t
        starts at frame ``t * pw``). L is 0 if mel is shorter than a patch.

    Differentiable in mel, weight, bias, mask_embed and pos_embed; deterministic. Largest error against float64, input
    of unit variance: 1e-5 of the largest value, gradients too.
    Matches audiossl/methods/atstframe/audio_transformer.py (PatchEmbed_v2, PatchEmbed with its weight flattened, and
    prepare_tokens with pos_type="cut").

    Raises:
        TypeError: another dtype. ValueError: a shape that does not fit, or mask without mask_embed.
    """
    _checks.tensor(_OP, "mel", mel, "[B, 1, F, T] (clips, 1, mel bins, frames)", dim=4, dtypes=_DTYPES)
    if mel.shape[1] != 1:
        _checks.fail(_OP, "mel", "[B, 1, F, T] (clips, 1, mel bins, frames)", mel)
    ph, pw = patch = _pair("patch", patch)
    stride = patch if stride is None else _pair("stride", stride)
    _checks.tensor(_OP, "weight", weight, f"[D, ph*pw] = [D, {ph * pw}]", dim=2, dtypes=_DTYPES)
    if weight.shape[1] != ph * pw or weight.shape[0] == 0:
        _checks.fail(_OP, "weight", f"[D, ph*pw] = [D, {ph * pw}]", weight)
    width = weight.shape[0]
    tokens = _count(mel.shape[2], ph, stride[0]) * _count(mel.shape[3], pw, stride[1])
    if mask is not None:
        expected = _checks.Later("[B, L] = [{}, {}]", mel.shape[0], tokens)
        _checks.tensor(_OP, "mask", mask, expected, dim=2, dtypes=(torch.bool,))
        if mask.shape != (mel.shape[0], tokens):
            _checks.fail(_OP, "mask", expected, mask)
        if mask_embed is None:
            _checks.fail(_OP, "mask_embed", f"a tensor of D = {width} values when mask is given", mask_embed)
    bias = _vector("bias", bias, width)
    mask_embed = _vector("mask_embed", mask_embed, width)
    pos_embed = _positions(pos_embed, tokens, width)
    _checks.same_device(
        _OP, "mel", mel, weight=weight, bias=bias, mask=mask, mask_embed=mask_embed, pos_embed=pos_embed
    )
    native = takes_halves(mel) or weight.dtype == torch.float64
    dtype = weight.dtype if native else torch.float32
    asked, weight = weight.dtype, weight.to(dtype).contiguous()
    others = (bias, mask_embed, pos_embed)
    bias, mask_embed, pos_embed = (None if x is None else x.to(dtype).contiguous() for x in others)
    if dtype == torch.float64:
        return reference.patch_embed(mel.double(), weight, bias, mask, mask_embed, pos_embed, patch, stride)
    if not native or mel.dtype == torch.float64:
        mel = mel.float().contiguous()
    mask = None if mask is None else mask.contiguous()
    with _autocast.off(mel.device):  # the operator calls a matrix product of torch
        out = torch.ops.atst_fast.patch_embed(mel, weight, bias, mask, mask_embed, pos_embed, patch, stride)
    return out.to(asked)


def _pair(name: str, value) -> tuple[int, int]:
    if isinstance(value, int):
        value = (value, value)
    if not isinstance(value, Sequence) or len(value) != 2 or not all(isinstance(v, int) and v > 0 for v in value):
        _checks.fail(_OP, name, "two positive integers (mel bins, frames)", value)
    return tuple(value)


def _count(size: int, patch: int, stride: int) -> int:
    return 0 if size < patch else (size - patch) // stride + 1


def _vector(name: str, value: Tensor | None, width: int) -> Tensor | None:
    if value is None:
        return None
    _checks.tensor(_OP, name, value, f"of D = {width} values", dtypes=_DTYPES)
    if value.numel() != width:
        _checks.fail(_OP, name, f"of D = {width} values", value)
    return value.reshape(width)


def _positions(value: Tensor | None, tokens: int, width: int) -> Tensor | None:
    if value is None:
        return None
    expected = _checks.Later("[L', D] or [1, L', D] with L' >= L = {} and D = {}", tokens, width)
    _checks.tensor(_OP, "pos_embed", value, expected, dtypes=_DTYPES)
    if value.dim() == 3 and value.shape[0] == 1:
        value = value[0]
    if value.dim() != 2 or value.shape[0] < tokens or value.shape[1] != width:
        _checks.fail(_OP, "pos_embed", expected, value)
    return value


def _reference_backward(grad, mel, weight, mask, pos_rows, needs_mel, patch, stride):
    """Gradients of weight, bias, mask_embed, pos_embed and mel through the reference."""
    width = weight.shape[0]
    tokens = grad.shape[1]
    inputs = (
        mel.to(weight.dtype),
        weight,
        grad.new_zeros(width),
        grad.new_zeros(width),
        grad.new_zeros(max(pos_rows, tokens), width),
    )

    def run(m, w, b, e, p):
        return reference.patch_embed(m, w, b, mask, e, p, patch, stride)

    dmel, dweight, dbias, dmask_embed, dpos = torch.func.vjp(run, *inputs)[1](grad)
    empty = grad.new_empty(0)
    dmel = dmel.to(mel.dtype) if needs_mel else mel.new_empty(0)
    return dweight, dbias, dmask_embed, dpos if pos_rows else empty, dmel


def _reference_forward(mel, weight, *others):
    return reference.patch_embed(mel.to(weight.dtype), weight, *others)


register(_OP, CUDA=_reference_forward, triton=_OP)
register("patch_embed_backward", CUDA=_reference_backward, triton="patch_embed_backward")


@torch.library.register_fake("atst_fast::patch_embed")
def _(mel, weight, bias, mask, mask_embed, pos_embed, patch, stride):
    tokens = _count(mel.shape[2], patch[0], stride[0]) * _count(mel.shape[3], patch[1], stride[1])
    return weight.new_empty(mel.shape[0], tokens, weight.shape[0])


@torch.library.register_fake("atst_fast::patch_embed_backward")
def _(grad, mel, weight, mask, pos_rows, needs_mel, patch, stride):
    width = weight.shape[0]
    dpos = grad.new_empty(pos_rows, width) if pos_rows else grad.new_empty(0)
    dmel = mel.new_empty(mel.shape) if needs_mel else mel.new_empty(0)
    return weight.new_empty(weight.shape), grad.new_empty(width), grad.new_empty(width), dpos, dmel


def _save(ctx, inputs, output):
    mel, weight, bias, mask, _, pos_embed, ctx.patch, ctx.stride = inputs
    ctx.has_bias, ctx.has_mask = bias is not None, mask is not None
    ctx.pos_rows = 0 if pos_embed is None else pos_embed.shape[0]
    ctx.save_for_backward(mel, weight, mask)


def _backward(ctx, grad):
    mel, weight, mask = ctx.saved_tensors
    needs_mel = ctx.needs_input_grad[0]
    with _autocast.off(grad.device):
        dweight, dbias, dmask_embed, dpos, dmel = torch.ops.atst_fast.patch_embed_backward(
            grad.contiguous(), mel, weight, mask, ctx.pos_rows, needs_mel, ctx.patch, ctx.stride
        )
    return (
        dmel if needs_mel else None,
        dweight,
        dbias if ctx.has_bias else None,
        None,
        dmask_embed if ctx.has_mask else None,
        dpos if ctx.pos_rows else None,
        None,
        None,
    )


torch.library.register_autograd("atst_fast::patch_embed", _backward, setup_context=_save)
differentiable_once("patch_embed_backward")
