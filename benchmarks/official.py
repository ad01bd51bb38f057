"""The ATST-Frame step as its authors structured it, in plain PyTorch: what the benchmarks and the tests compare with.

Written from the description of the system, with the same state-dict keys as ``atst_fast.models.ATSTFrame``: one dense
additive mask per block, attention matrices in memory, separate queries, keys and values, all rows through the last
block, a boolean gather behind it, DropPath as a multiplication, the AdamW of HuggingFace and the teacher update as
Python loops over parameters.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, mask):
        clips, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(clips, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * (dim // self.heads) ** -0.5
        if mask is not None:
            scores += mask
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(clips, tokens, dim))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, heads, mlp_ratio, drop_path):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.rate = drop_path

    def forward(self, x, length):
        mask = None
        if length is not None:
            clips, tokens, _ = x.shape
            padded = torch.arange(tokens, device=x.device).expand(clips, tokens) >= length[:, None]
            mask = (-10000.0 * padded[:, None, None]).expand(clips, 1, tokens, tokens)
        x = x + self.drop_path(self.attn(self.norm1(x), mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def drop_path(self, x):
        if not self.training or not self.rate:
            return x
        keep = 1 - self.rate
        return x.div(keep) * (keep + torch.rand(len(x), 1, 1, device=x.device)).floor_()


class PatchEmbed(nn.Module):
    def __init__(self, patch, dim):
        super().__init__()
        self.patch = patch
        self.patch_embed = nn.Linear(patch[0] * patch[1], dim)

    def forward(self, mel):
        clips, _, bins, frames = mel.shape
        high, wide = self.patch
        rows, columns = bins // high, frames // wide
        mel = mel[:, 0, : rows * high, : columns * wide].reshape(clips, rows, high, columns, wide)
        return self.patch_embed(mel.permute(0, 3, 1, 2, 4).reshape(clips, rows * columns, high * wide))


class Encoder(nn.Module):
    block = Block

    def __init__(self, dim, depth, num_heads, *, mlp_ratio=4.0, drop_path_rate=0.1, patch=(64, 4), positions=250):
        super().__init__()
        self.patch_embed = PatchEmbed(patch, dim)
        self.mask_embed = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, positions + 1, dim))
        rates = torch.linspace(0, drop_path_rate, depth).tolist()
        self.blocks = nn.ModuleList(self.block(dim, num_heads, mlp_ratio, rate) for rate in rates)
        self.norm_frame = nn.LayerNorm(dim, eps=1e-6)

    def tokens(self, mel, length, mask=None):
        """All tokens after the last norm, and how many of each clip are valid."""
        x = self.patch_embed(mel)
        if mask is not None:
            replaced = mask.unsqueeze(2).expand(x.shape).float()
            x = (1 - replaced) * x + replaced * self.mask_embed.expand(x.shape)
        x = x + self.pos_embed[:, 1 : x.shape[1] + 1].expand(len(x), -1, -1)
        valid = None if length is None else length // self.patch_embed.patch[1]
        for block in self.blocks:
            x = block(x, valid)
        return self.norm_frame(x), valid

    def forward(self, mel, length, mask, replace):
        x, valid = self.tokens(mel, length, mask if replace else None)
        return x[mask & (torch.arange(x.shape[1], device=x.device) < valid.unsqueeze(1))]


def head(dim, hidden, out):
    first, last = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, out, bias=False)
    return nn.Sequential(first, nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), last)


class Network(nn.Module):
    def __init__(self, encoder, dim, hidden, out, predictor):
        super().__init__()
        self.encoder = encoder
        self.projector = head(dim, hidden, out)
        self.predictor = head(out, hidden, out) if predictor else nn.Identity()

    def forward(self, views, lengths, masks, replace):
        rows = self.encoder(torch.cat(views), torch.cat(lengths), torch.cat(masks), replace)
        return self.predictor(self.projector(torch.cat([rows.new_empty(0), rows])))


def spread(y):
    count = len(y)
    variance = (y**2).sum(0) / (count - 1) - y.sum(0) ** 2 / (count * (count - 1))
    return torch.sqrt(variance + 1e-6).mean()


def distance(p, z):
    return 2 - 2 * (F.normalize(p, dim=-1) * F.normalize(z, dim=-1)).sum(1).mean()


class System(nn.Module):
    """Student and teacher; ``sizes`` as the values of ``atst_fast.models.ARCHS``."""

    encoder = Encoder
    network = Network

    def __init__(self, sizes, *, hidden=4096, out=256, symmetric=True, **encoder):
        super().__init__()
        self.symmetric = symmetric
        self.student = self.network(self.encoder(**sizes, **encoder), sizes["dim"], hidden, out, True)
        self.teacher = self.network(self.encoder(**sizes, **encoder), sizes["dim"], hidden, out, False)
        self.teacher.requires_grad_(False)
        self.teacher.load_state_dict({k: v for k, v in self.student.state_dict().items() if "predictor" not in k})

    def forward(self, view1, view2, lengths, mask):
        if self.symmetric:
            batch = [view1, view2], [lengths] * 2, [mask] * 2
            teacher, student = self.teacher(*batch, False), self.student(*batch, True)
        else:
            teacher = self.teacher([view1], [lengths], [mask], False)
            student = self.student([view2], [lengths], [mask], True)
        spreads = spread(F.normalize(student, dim=-1)), spread(F.normalize(teacher, dim=-1))
        if not self.symmetric:
            return distance(teacher, student), *spreads
        (s1, s2), (t1, t2) = student.chunk(2), teacher.chunk(2)
        return (distance(t1, s2) + distance(t2, s1)) / 2, *spreads

    @torch.no_grad()
    def update_teacher(self, momentum):
        for part in ("encoder", "projector"):
            pairs = zip(getattr(self.student, part).parameters(), getattr(self.teacher, part).parameters())
            for student, teacher in pairs:
                teacher.mul_(momentum).add_((1 - momentum) * student.detach())


def groups(student):
    """The optimizer's two groups: decayed and not."""
    plain = [p for n, p in student.named_parameters() if n.endswith(".bias") or p.ndim == 1]
    decayed = [p for n, p in student.named_parameters() if not (n.endswith(".bias") or p.ndim == 1)]
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]


class AdamW(torch.optim.Optimizer):
    """HuggingFace's form: epsilon beside the uncorrected root, decay on the updated weight."""

    def __init__(self, params, lr, weight_decay, betas=(0.9, 0.999), eps=1e-6):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, first=torch.zeros_like(p), second=torch.zeros_like(p))
                state["step"] += 1
                state["first"].mul_(beta1).add_(p.grad, alpha=1 - beta1)
                state["second"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                size = group["lr"] * math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
                p.addcdiv_(state["first"], state["second"].sqrt().add_(group["eps"]), value=-size)
                if group["weight_decay"]:
                    p.add_(p, alpha=-group["lr"] * group["weight_decay"])


def train_step(system, optimizer, batch, momentum):
    """One whole step; returns the loss."""
    loss, *_ = system(*batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    system.update_teacher(momentum)
    return loss.item()
