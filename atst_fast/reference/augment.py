"""Log-mixup-exp and random resize crop, one clip at a time."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = torch.finfo(torch.float32).eps


def log_mixup_exp(x: Tensor, z: Tensor, alpha: float | Tensor, start: int = 0) -> Tensor:
    """``log((1 - alpha) e^x + alpha e^z + eps)`` over ``[..., T]`` and ``[..., Tz]``: a shorter z is laid over x from
    ``start`` on, a longer one is read from there. Source: audiossl/transforms/byol_a.py (log_mixup_exp)."""
    frames, width = x.shape[-1], z.shape[-1]
    if width >= frames:
        return torch.log((1 - alpha) * x.exp() + alpha * z[..., start : start + frames].exp() + EPS)
    middle = (1 - alpha) * x[..., start : start + width].exp() + alpha * z.exp()
    parts = [x[..., :start].exp(), middle, x[..., start + width :].exp()]
    return torch.log(torch.cat(parts, -1) + EPS)


def resize_crop(x: Tensor, crop: Sequence[int], canvas: tuple[int, int]) -> Tensor:
    """``[F, T]``: laid into the middle of a canvas of zeros, cut to (first bin, first frame, height, width), resized to
    ``[F, T]``, bicubic with aligned corners. Source: audiossl/transforms/byol_a.py (RandomResizeCrop)."""
    bins, frames = x.shape
    top, left = (canvas[0] - bins) // 2, (canvas[1] - frames) // 2
    whole = F.pad(x, (left, canvas[1] - frames - left, top, canvas[0] - bins - top))
    i, j, h, w = crop
    cut = whole[None, None, i : i + h, j : j + w]
    return F.interpolate(cut, (bins, frames), mode="bicubic", align_corners=True)[0, 0]


def augment(
    mel: Tensor,
    bank: Tensor,
    bank_lengths: Tensor,
    partner: Tensor,
    start: Tensor,
    alpha: Tensor,
    crop: Tensor,
    canvas: tuple[int, int],
) -> Tensor:
    """``[B, 1, F, T]`` to one view of the same shape. ``partner [B]``: -1 none, 0 to C - 1 a row of ``bank [C, F, Tb]``
    (its first ``bank_lengths`` columns), C + b clip b of ``mel``; ``start``, ``alpha [B]``; ``crop [B, 4]``."""
    widths, starts, weights = bank_lengths.tolist(), start.tolist(), alpha.tolist()
    views = [mel.new_empty(0, *mel.shape[2:])]
    for b, (who, box) in enumerate(zip(partner.tolist(), crop.tolist())):
        x = mel[b, 0]
        if who >= len(widths):
            x = log_mixup_exp(x, mel[who - len(widths), 0], weights[b])
        elif who >= 0:
            x = log_mixup_exp(x, bank[who, :, : widths[who]].to(x.dtype), weights[b], starts[b])
        views.append(resize_crop(x, box, (canvas[0], canvas[1]))[None])
    return torch.cat(views)[:, None]
