"""Attention of one layer over packed qkv in bfloat16: forward, and backward alone; full clips and ragged lengths.

The peers get qkv as the linear layer leaves it, as views, and their result as the next layer takes it: what permuting
costs is theirs. Their best way for ragged lengths: sequences laid end to end from the start for varlen_attn
(flash; nothing is charged for packing), a mask of whole blocks for FlexAttention, a boolean mask for the others.
"""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from atst_fast import ops
from benchmarks import bench_frame_attention as cpu
from benchmarks.gpu import timing

HEAD_DIM = 64
SIZES = {
    "tiny": (3, 2, 20),
    "base": (288, 12, 250),
    "small": (512, 6, 250),
    "clip": (48, 12, 1500),
}  # clips, heads, tokens
LENGTHS = ["full", "ragged"]


class Inputs(NamedTuple):
    """``qkv [B, L, 3*H*64]``; lengths int64 ``[B]`` or None, on its device, and as numbers."""

    qkv: Tensor
    heads: int
    lengths: Tensor | None
    numbers: list[int]

    def packed(self) -> Tensor:
        """The valid rows, end to end."""
        return torch.cat([x[:n] for x, n in zip(self.qkv, self.numbers)])

    def offsets(self, dtype: torch.dtype) -> Tensor:
        ends = torch.tensor([0, *self.numbers]).cumsum(0)
        return ends.to(self.qkv.device, dtype)


def make_inputs(size: str, lengths: str, device: str) -> Inputs:
    batch, heads, tokens = SIZES[size]
    qkv = torch.randn(batch, tokens, 3 * heads * HEAD_DIM, device=device).bfloat16()
    # from a quarter on; shuffled, as in a batch
    of_clips = torch.linspace(tokens // 4, tokens, batch).long()[torch.randperm(batch)]
    ragged = lengths == "ragged"
    return Inputs(
        qkv, heads, of_clips.to(device) if ragged else None, of_clips.tolist() if ragged else batch * [tokens]
    )


# what a provider makes of the inputs: the function to time, and the tensor it takes
Case = tuple[Callable[[Tensor], Tensor], Tensor]


def ours(given: Inputs) -> Case:
    return lambda qkv: ops.frame_attention(qkv, given.heads, lengths=given.lengths), given.qkv


def ours_packed(given: Inputs) -> Case:
    offsets, longest, width = given.offsets(torch.int64), max(given.numbers), given.heads * HEAD_DIM

    def call(rows):
        q, kv = rows.split((width, 2 * width), 1)
        longests = {"max_seqlen_q": longest, "max_seqlen_k": longest}
        return ops.frame_attention_packed(q, kv, offsets, offsets, given.heads, **longests)

    return call, given.packed()


def merged(x: Tensor) -> Tensor:
    """``[B, H, L, Dh]`` as the next linear layer takes it."""
    return x.transpose(1, 2).flatten(2)


def with_sdpa(backend: SDPBackend) -> Callable[[Inputs], Case]:
    def make(given):
        mask = None
        if given.lengths is not None:
            mask = torch.arange(given.qkv.shape[1], device=given.qkv.device) < given.lengths[:, None]
            mask = mask[:, None, None, :]

        def call(qkv):
            q, k, v = cpu.split(qkv, given.heads)
            with sdpa_kernel(backend):
                return merged(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))

        return call, given.qkv

    return make


def with_flash(given: Inputs) -> Case:
    """Flash of SDPA, which has no mask, and its form for sequences laid end to end."""
    if given.lengths is None:
        return with_sdpa(SDPBackend.FLASH_ATTENTION)(given)
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="this torch has no varlen_attn").varlen_attn
    offsets, longest = given.offsets(torch.int32), max(given.numbers)

    def call(rows):
        q, k, v = rows.unflatten(1, (3, given.heads, HEAD_DIM)).unbind(1)
        return varlen(q, k, v, offsets, offsets, longest, longest).flatten(1)

    return call, given.packed()


def with_flash_attn(given: Inputs) -> Case:
    """The package flash-attn on packed qkv."""
    flash = pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    offsets, longest = given.offsets(torch.int32), max(given.numbers)

    def call(rows):
        qkv = rows.unflatten(1, (3, given.heads, HEAD_DIM))
        return flash.flash_attn_varlen_qkvpacked_func(qkv, offsets, longest).flatten(1)

    return call, given.packed()


def with_flex(given: Inputs) -> Case:
    flex = pytest.importorskip("torch.nn.attention.flex_attention", reason="this torch has no FlexAttention")
    batch, tokens, _ = given.qkv.shape
    mask = None
    if (n := given.lengths) is not None:
        both = lambda b, h, q, k: (q < n[b]) & (k < n[b])  # noqa: E731
        mask = flex.create_block_mask(both, batch, None, tokens, tokens, device=given.qkv.device)
    attend = timing.compiled(flex.flex_attention)

    def call(qkv):
        q, k, v = cpu.split(qkv, given.heads)
        return merged(attend(q, k, v, block_mask=mask))

    return call, given.qkv


PROVIDERS: dict[str, Callable[[Inputs], Case]] = {
    "atst_fast": ours,
    "atst_fast_packed": ours_packed,
    "sdpa_flash": with_flash,
    "sdpa_cudnn": with_sdpa(SDPBackend.CUDNN_ATTENTION),
    "sdpa_efficient": with_sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "flex": with_flex,
    "flash_attn": with_flash_attn,
}


def work(given: Inputs, way: str) -> dict:
    """What has to be done: products of valid pairs; valid rows read, all rows written."""
    batch, tokens, width = given.qkv.shape
    row = width // 3 * given.qkv.element_size()
    valid, pairs = sum(given.numbers), sum(n * n for n in given.numbers)
    products, read, written = (2, 3, 1) if way == "forward" else (5, 5, 3)
    moved = row * (read * valid + written * batch * tokens)
    return {"bytes": moved, "flops": products * 2 * pairs * width // 3, "dtype": "bfloat16"}


def timed(case: Case, way: str) -> Callable:
    """The call of a case in one direction."""
    attend, x = case
    if way == "forward":
        return torch.no_grad()(lambda: attend(x))
    x = x.detach().requires_grad_()
    out = attend(x)
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, x, grad, retain_graph=True)


@contextlib.contextmanager
def whole_graphs():
    """Compiled functions whose backward may run more than once."""
    with torch._functorch.config.patch(donated_buffer=False):
        yield


@pytest.mark.benchmark(group="frame_attention")
@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("size", SIZES)
def test_frame_attention(measure, size, lengths, provider, way):
    given = make_inputs(size, lengths, "cuda")
    with whole_graphs():
        try:
            call = timed(PROVIDERS[provider](given), way)
            call()
        except (RuntimeError, NotImplementedError) as error:
            if provider.startswith("atst_fast"):
                raise
            pytest.skip(f"{provider} does not run here: {error}")
        measure(call, **work(given, way))
