"""frame_attention of one layer over packed qkv: full clips and ragged lengths, in bfloat16 on a GPU.

The peers get qkv as the linear layer leaves it, as views, and give their result as the next layer takes it: what
permuting costs is theirs. Their best way for ragged lengths: sequences laid end to end from the start for varlen_attn
(flash; nothing is charged for packing), a mask of whole blocks for FlexAttention, a boolean mask for the others. Their
gradients at padded queries are zero, as those of a loss that does not read them. ``naive`` is the official layer, with
its matrix in memory.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from atst_fast import ops
from atst_fast.bench import timing
from atst_fast.bench.differentiable import WAYS
from atst_fast.bench.operator import CPU, CUDA, OURS, Operator, Provider, installed
from atst_fast.reference import frame_attention as reference

HEAD_DIM = 64
_CHUNK = 1 << 25  # scores that the definition has in memory at a time


class Inputs(NamedTuple):
    """``qkv [B, L, 3*H*64]``; lengths int64 ``[B]`` or None, on its device, and as numbers; ``grad [B, L, H*64]``."""

    qkv: Tensor
    grad: Tensor
    heads: int
    lengths: Tensor | None
    numbers: list[int]
    way: str

    def valid(self, x: Tensor) -> Tensor:
        """The valid rows of ``[B, L, ...]``, end to end; of what has them already, itself."""
        return x if x.dim() == 2 else torch.cat([row[:n] for row, n in zip(x, self.numbers)])

    def offsets(self, dtype: torch.dtype) -> Tensor:
        ends = torch.tensor([0, *self.numbers]).cumsum(0)
        return ends.to(self.qkv.device, dtype)


def make(device: str, batch: int, heads: int, tokens: int, lengths: str, way: str) -> Inputs:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    qkv = torch.randn(batch, tokens, 3 * heads * HEAD_DIM, device=device).to(dtype)
    grad = torch.randn(batch, tokens, heads * HEAD_DIM, device=device).to(dtype)
    if lengths == "full":
        return Inputs(qkv, grad, heads, None, batch * [tokens], way)
    # from a quarter on; shuffled, as in a batch
    of_clips = torch.linspace(tokens // 4, tokens, batch).long().clamp(min=1)[torch.randperm(batch)]
    padded = torch.arange(tokens) >= of_clips[:, None]
    grad.masked_fill_(padded.to(device)[:, :, None], 0)
    return Inputs(qkv, grad, heads, of_clips.to(device), of_clips.tolist(), way)


# what a provider makes of the inputs: the function to time, and the tensor it takes
Attention = tuple[Callable[[Tensor], Tensor], Tensor]


def timed(attention: Callable[[Inputs], Attention]) -> Callable[[Inputs], Callable[[], Tensor]]:
    """A provider of it, in the direction that the inputs ask for."""

    def provider(given: Inputs):
        attend, x = attention(given)
        if given.way == "forward":
            return torch.no_grad()(lambda: attend(x))
        x = x.detach().requires_grad_()
        out = attend(x)
        grad = given.grad if out.dim() == 3 else given.valid(given.grad)
        return lambda: torch.autograd.grad(out, x, grad, retain_graph=True)[0]

    return provider


def ours(given: Inputs) -> Attention:
    return lambda qkv: ops.frame_attention(qkv, given.heads, lengths=given.lengths), given.qkv


def ours_packed(given: Inputs) -> Attention:
    offsets, longest, width = given.offsets(torch.int64), max(given.numbers), given.heads * HEAD_DIM

    def call(rows):
        q, kv = rows.split((width, 2 * width), 1)
        longests = {"max_seqlen_q": longest, "max_seqlen_k": longest}
        return ops.frame_attention_packed(q, kv, offsets, offsets, given.heads, **longests)

    return call, given.valid(given.qkv)


def split(qkv: Tensor, heads: int) -> Tensor:
    """``[3, B, H, L, Dh]``, a view."""
    batch, tokens, width = qkv.shape
    return qkv.view(batch, tokens, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4)


def merged(x: Tensor) -> Tensor:
    """``[B, H, L, Dh]`` as the next linear layer takes it."""
    return x.transpose(1, 2).flatten(2)


def naive(given: Inputs) -> Attention:
    """-10000 is added on padded keys."""

    def call(qkv):
        q, k, v = split(qkv, given.heads)
        scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
        if given.lengths is not None:
            padded = torch.arange(qkv.shape[1], device=qkv.device) >= given.lengths[:, None]
            scores = scores + (padded * -10000.0).to(scores.dtype)[:, None, None, :]
        return merged(scores.softmax(-1) @ v)

    return call, given.qkv


def with_sdpa(*backends: SDPBackend) -> Callable[[Inputs], Attention]:
    """By one of these; without any, by the one that torch chooses."""

    def attention(given):
        mask = None
        if given.lengths is not None:
            mask = torch.arange(given.qkv.shape[1], device=given.qkv.device) < given.lengths[:, None]
            mask = mask[:, None, None, :]

        def call(qkv):
            q, k, v = split(qkv, given.heads)
            if not backends:
                return merged(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
            with sdpa_kernel(list(backends)):
                return merged(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))

        return call, given.qkv

    return attention


def with_flash(given: Inputs) -> Attention:
    """Flash of SDPA, which has no mask, and its form for sequences laid end to end."""
    if given.lengths is None:
        return with_sdpa(SDPBackend.FLASH_ATTENTION)(given)
    varlen = installed("torch.nn.attention.varlen", "a torch with varlen_attn").varlen_attn
    offsets, longest = given.offsets(torch.int32), max(given.numbers)

    def call(rows):
        q, k, v = rows.unflatten(1, (3, given.heads, HEAD_DIM)).unbind(1)
        return varlen(q, k, v, offsets, offsets, longest, longest).flatten(1)

    return call, given.valid(given.qkv)


def with_flash_attn(given: Inputs) -> Attention:
    """The package flash-attn on packed qkv."""
    flash = installed("flash_attn", "pip install flash-attn")
    offsets, longest = given.offsets(torch.int32), max(given.numbers)

    def call(rows):
        qkv = rows.unflatten(1, (3, given.heads, HEAD_DIM))
        return flash.flash_attn_varlen_qkvpacked_func(qkv, offsets, longest).flatten(1)

    return call, given.valid(given.qkv)


def with_flex(given: Inputs) -> Attention:
    flex = installed("torch.nn.attention.flex_attention", "a torch with FlexAttention")
    batch, tokens, _ = given.qkv.shape
    mask = None
    if (n := given.lengths) is not None:
        both = lambda b, h, q, k: (q < n[b]) & (k < n[b])  # noqa: E731
        mask = flex.create_block_mask(both, batch, None, tokens, tokens, device=given.qkv.device)
    attend = timing.compiled(flex.flex_attention)

    def call(qkv):
        q, k, v = split(qkv, given.heads)
        return merged(attend(q, k, v, block_mask=mask))

    return call, given.qkv


def truth(given: Inputs) -> list[Tensor]:
    """Some clips at a time: the matrix of all of them in float64 would be too large."""
    batch, tokens, _ = given.qkv.shape
    clips = max(_CHUNK // (given.heads * tokens**2), 1)
    parts = []
    for i in range(0, batch, clips):
        qkv = given.qkv[i : i + clips].double().requires_grad_(given.way == "backward")
        lengths = None if given.lengths is None else given.lengths[i : i + clips]
        out, _ = reference.frame_attention(qkv, lengths, given.heads, HEAD_DIM**-0.5, False)
        if given.way == "backward":
            (out,) = torch.autograd.grad(out, qkv, given.grad[i : i + clips].double())
        parts.append(out)
    return [given.valid(torch.cat(parts))]


def work(given: Inputs) -> dict:
    """What has to be done: products of valid pairs; valid rows read, all rows written."""
    batch, tokens, width = given.qkv.shape
    row = width // 3 * given.qkv.element_size()
    valid, pairs = sum(given.numbers), sum(n * n for n in given.numbers)
    products, read, written = (2, 3, 1) if given.way == "forward" else (5, 5, 3)
    moved = row * (read * valid + written * batch * tokens)
    dtype = str(given.qkv.dtype).removeprefix("torch.")
    return {"bytes": moved, "flops": products * 2 * pairs * width // 3, "dtype": dtype}


OPERATOR = Operator(
    "frame_attention",
    sizes={
        "cpu": {
            "tiny": {"batch": 2, "heads": 2, "tokens": 20},
            "small": {"batch": 8, "heads": 6, "tokens": 250},
            "base": {"batch": 4, "heads": 12, "tokens": 250},
        },
        "cuda": {
            "tiny": {"batch": 3, "heads": 2, "tokens": 20},
            "base": {"batch": 288, "heads": 12, "tokens": 250},
            "small": {"batch": 512, "heads": 6, "tokens": 250},
            "clip": {"batch": 48, "heads": 12, "tokens": 1500},
        },
    },
    options={device: {"lengths": ("full", "ragged"), "way": WAYS} for device in ("cpu", "cuda")},
    make=make,
    providers={
        OURS: Provider(timed(ours)),
        "atst_fast_packed": Provider(timed(ours_packed)),
        "sdpa": Provider(timed(with_sdpa()), CPU),
        "sdpa_flash": Provider(timed(with_flash), CUDA),
        "sdpa_cudnn": Provider(timed(with_sdpa(SDPBackend.CUDNN_ATTENTION)), CUDA),
        "sdpa_efficient": Provider(timed(with_sdpa(SDPBackend.EFFICIENT_ATTENTION)), CUDA),
        "sdpa_math": Provider(timed(with_sdpa(SDPBackend.MATH))),
        "flex": Provider(timed(with_flex), CUDA),
        "flash_attn": Provider(timed(with_flash_attn), CUDA),
        "naive": Provider(timed(naive)),
    },
    truth=truth,
    results=lambda given, returned: given.valid(returned),
    work=work,
    curves={
        "cpu": ("small", {"tokens": (25, 63, 125, 250, 500, 1000), "batch": (1, 2, 4, 8, 16)}),
        "cuda": ("base", {"tokens": (63, 125, 250, 500, 1000, 1500), "batch": (1, 4, 16, 64, 288)}),
    },
)
