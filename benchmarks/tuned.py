"""The ATST-Frame step as one writes it who knows PyTorch well and stays within it: what ours has to beat on a GPU.

Weights and state-dict keys are those of official.py. Autocast to bfloat16, with the residual stream in bfloat16 too;
attention by whichever backend of ``F.scaled_dot_product_attention`` is the fastest, without a mask, since all frames of
a batch are valid; both networks and the loss compiled as one graph (max-autotune: tuned products, CUDA graphs); fused
AdamW; the teacher by one foreach call. Behind the last attention only masked rows are computed, in a list of fixed
length, and a gather puts gradients back, where autograd would add them with atomics. DropPath is a factor per clip.

It differs from ours in numbers where PyTorch has no other: ``torch.optim.AdamW`` adds epsilon to the corrected root and
decays the weight before the update, where the HuggingFace form of the official training adds it to the uncorrected one
and decays afterwards.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from atst_fast.bench import timing
from benchmarks import official

BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


class TakeRows(torch.autograd.Function):
    """Rows ``[V, C, D]`` of ``[V, R, D]`` by ``rows [C]``, no two of them the same but for padding, whose gradient is
    zero; ``inverse [R]`` is each row's place, or -1."""

    @staticmethod
    def forward(ctx, x, rows, inverse):
        ctx.save_for_backward(inverse)
        return x[:, rows]

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return torch.where((inverse >= 0)[:, None], grad[:, inverse.clamp(min=0)], 0), None, None


class Rows:
    """The masked rows of a view ``[B, L]`` as a list of ``capacity`` places, the last of which are padding."""

    def __init__(self, mask, capacity):
        self.tokens, flat = mask.shape[1], mask.flatten()
        seen, places = flat.cumsum(0), torch.arange(capacity, device=mask.device)
        self.rows = torch.searchsorted(seen, places + 1).clamp(max=len(flat) - 1)
        self.inverse = torch.where(flat & (seen <= capacity), seen - 1, -1)
        self.count = seen[-1]
        self.valid = (places < self.count)[:, None]
        self.fits = self.count <= capacity

    def take(self, x):
        """``[V, C, D]`` of ``[V * B, L, D]``."""
        return TakeRows.apply(x.reshape(-1, len(self.inverse), x.shape[-1]), self.rows, self.inverse)

    def per_row(self, factors):
        """``[V, C, 1]`` of ``[V * B, 1, 1]``."""
        return factors.view(-1, len(self.inverse) // self.tokens)[:, self.rows // self.tokens, None]


class Block(official.Block):
    def forward(self, x, rows=None):
        clips, tokens, dim = x.shape
        qkv = self.attn.qkv(self.norm1(x)).view(clips, tokens, 3, self.attn.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv.unbind()).transpose(1, 2).reshape(clips, tokens, dim)
        factors = self.factors(x)
        if rows is not None:
            x, y = rows.take(x), rows.take(y)
            factors = factors and [rows.per_row(f) for f in factors]
        x = self.add(x, self.attn.proj(y), factors, 0)
        return self.add(x, self.mlp(self.norm2(x)), factors, 1)

    def factors(self, x):
        """Of the attention and of the MLP, for each clip: 0 or 1 / keep."""
        if not self.training or not self.rate:
            return None
        keep = 1 - self.rate
        return ((keep + torch.rand(2, len(x), 1, 1, device=x.device)).floor() / keep).unbind()

    def add(self, x, y, factors, which):
        return x + y if factors is None else (x + factors[which] * y).to(x.dtype)


class Encoder(official.Encoder):
    block = Block

    def forward(self, mel, mask, rows, replace):
        """``[V, C, D]``: the masked rows of views ``[V * B, 1, F, T]``; their mask ``[B, L]`` is the same."""
        x = self.patch_embed(mel)
        if replace:
            x = torch.where(mask.repeat(len(mel) // len(mask), 1)[:, :, None], self.mask_embed.to(x.dtype), x)
        x = x + self.pos_embed[:, 1 : x.shape[1] + 1].to(x.dtype)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.norm_frame(self.blocks[-1](x, rows))


def batch_norm_relu(x, norm, rows):
    """``[V, C, H]`` by the statistics of the rows that are not padding, in one reading of them."""
    h, count = x.float(), len(x) * rows.count
    total, squares = torch.where(rows.valid, h, 0).sum((0, 1)), torch.where(rows.valid, h * h, 0).sum((0, 1))
    mean = total / count
    variance = squares / count - mean * mean
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
        norm.num_batches_tracked.add_(1)
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return F.relu((h - mean) * scale + norm.bias).to(x.dtype)


def head(parts, x, rows):
    return x if isinstance(parts, torch.nn.Identity) else parts[3](batch_norm_relu(parts[0](x), parts[1], rows))


class System(official.System):
    encoder = Encoder

    def forward(self, view1, view2, mask, capacity):
        """Loss and spreads, as official.System's; ``capacity`` places for the masked rows of a view. More of them than
        that make the loss NaN."""
        rows = Rows(mask, capacity)
        both = torch.cat([view1, view2]) if self.symmetric else None
        with torch.no_grad():
            teacher = self.run(self.teacher, view1 if both is None else both, mask, rows, False)
        student = self.run(self.student, view2 if both is None else both, mask, rows, True)
        cosines = (student * teacher.flip(0)).sum(-1, keepdim=True)
        count = len(student) * rows.count
        loss = 2 - 2 * torch.where(rows.valid, cosines, 0).sum() / count
        spreads = [spread(y.detach(), rows.valid, count) for y in (student, teacher)]
        return torch.where(rows.fits, loss, torch.nan), *spreads

    def run(self, network, mel, mask, rows, replace):
        """Normalised outputs ``[V, C, out]`` in float32."""
        x = network.encoder(mel, mask, rows, replace)
        y = head(network.predictor, head(network.projector, x, rows), rows)
        return F.normalize(y.float(), dim=-1)


def spread(y, valid, count):
    y = torch.where(valid, y, 0)
    variance = (y * y).sum((0, 1)) / (count - 1) - y.sum((0, 1)) ** 2 / (count * (count - 1))
    return torch.sqrt(variance + 1e-6).mean()


def fastest_attention(clips, tokens, heads, width=64):
    """The backend that takes the least time forward and backward here."""
    qkv = torch.randn(clips, tokens, 3, heads, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    parts = qkv.permute(2, 0, 3, 1, 4).unbind()
    gradient = torch.randn_like(parts[0])
    gpu, times = timing.Cuda(), {}
    for backend in BACKENDS:

        def call(backend=backend):
            with sdpa_kernel(backend):
                y = F.scaled_dot_product_attention(*parts)
            torch.autograd.grad(y, parts, gradient)

        try:
            times[backend] = timing.launched(call, gpu, budget=0.1).median
        except RuntimeError:  # this GPU or this build does not have it
            continue
    return min(times, key=times.__getitem__)


class Step:
    """A whole step from waveforms ``[B, N]`` on the device of ``system``; returns the loss, which nobody waits for.

    ``tuned``: compiled and in bfloat16, as it is measured; otherwise plain float32, as it is tested.
    """

    def __init__(self, system, front_end, capacity, *, lr, weight_decay, momentum, tuned=True, attention=None):
        self.front_end, self.networks, self.capacity, self.momentum = front_end, system, capacity, momentum
        self.device = next(system.parameters()).device.type
        self.tuned, self.attention = tuned, attention
        if tuned:
            # the transform of the waveforms does not go into CUDA graphs: cuFFT's plans own memory of their own
            self.front_end = compiled(front_end, "max-autotune-no-cudagraphs")
            self.networks = compiled(system, "max-autotune")
        self.optimizer = torch.optim.AdamW(
            official.groups(system.student), lr=lr, weight_decay=weight_decay, eps=1e-6, fused=True
        )
        parts = "encoder", "projector"
        self.student, self.teacher = (
            [p.detach() for part in parts for p in getattr(network, part).parameters()]
            for network in (system.student, system.teacher)
        )

    def __call__(self, waveform):
        torch.compiler.cudagraph_mark_step_begin()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            views = self.front_end(waveform)
        chosen = nullcontext() if self.attention is None else sdpa_kernel(self.attention)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.tuned), chosen:
            loss, *_ = self.networks(*views, self.capacity)
        loss.backward()
        self.optimizer.step()
        torch._foreach_lerp_(self.teacher, self.student, 1 - self.momentum)
        return loss.detach().clone()  # the graph writes its own anew in the next step


def compiled(module, mode):
    return torch.compile(module, mode=mode, fullgraph=True, dynamic=False)
