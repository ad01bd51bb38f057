"""FrameATST and ATST with their wrappers, losses and Lightning modules; one process needs no process group here."""

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from benchmarks.official import AdamW, groups
from tests.integrations.standins.audiossl_encoders import AST, FrameAST


def build_mlp(num_layers, input_dim, mlp_dim, output_dim):
    layers = []
    for i in range(num_layers):
        last = i == num_layers - 1
        layers.append(nn.Linear(mlp_dim if i else input_dim, output_dim if last else mlp_dim, bias=False))
        if not last:
            layers += [nn.BatchNorm1d(mlp_dim), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def compute_var(y):
    count, sums, squares = torch.tensor(len(y), device=y.device), y.sum(0), (y**2).sum(0)
    if dist.is_initialized():
        for x in (count, sums, squares):
            dist.all_reduce(x)
    return torch.sqrt(squares / (count - 1) - sums**2 / (count * (count - 1)) + 1e-6)


def byol_loss_func(p, z, simplified=True):
    if simplified:
        return 2 - 2 * F.cosine_similarity(p, z, dim=-1).mean()
    return 2 - 2 * (F.normalize(p, dim=-1) * F.normalize(z, dim=-1)).sum(1).mean()


def spreads(student, teacher):
    return [compute_var(F.normalize(x, dim=-1)).mean() for x in (student, teacher)]


class FrameByolLoss(nn.Module):
    def __init__(self, symmetric):
        super().__init__()
        self.symmetric = symmetric

    def forward(self, student, teacher):
        deviations = spreads(student, teacher)
        if not self.symmetric:
            return byol_loss_func(teacher, student), *deviations
        (s1, s2), (t1, t2) = student.chunk(2), teacher.chunk(2)
        loss = byol_loss_func(t1, s2, simplified=False) + byol_loss_func(t2, s1, simplified=False)
        return loss / 2, *deviations


class ClipByolLoss(nn.Module):
    def __init__(self, ncrops):
        super().__init__()
        self.ncrops = ncrops

    def forward(self, student, teacher):
        deviations = spreads(student, teacher)
        teachers, students = teacher.detach().chunk(2), student.chunk(self.ncrops)
        pairs = [(t, s) for i, t in enumerate(teachers) for j, s in enumerate(students) if i != j]
        return sum(byol_loss_func(t, s, simplified=False) for t, s in pairs) / len(pairs), *deviations


class MultiCropWrapper(nn.Module):
    """Runs of views of one width go through the encoder together, and everything through the heads."""

    def __init__(self, encoder, embed_dim, hidden, out, predictor):
        super().__init__()
        self.encoder = encoder
        self.projector = build_mlp(2, embed_dim, hidden, out)
        self.predictor = build_mlp(2, out, hidden, out) if predictor else nn.Identity()

    def forward(self, x, length, mask=None, mask_input=None):
        widths = torch.tensor([view.shape[-1] for view in x])
        ends = torch.unique_consecutive(widths, return_counts=True)[1].cumsum(0).tolist()
        output, start = torch.empty(0, device=x[0].device), 0
        for end in ends:
            masks = {} if mask is None else {"mask_index": torch.cat(mask[start:end]), "mask_input": mask_input}
            y = self.encoder(torch.cat(x[start:end]), length=torch.cat(length[start:end]), **masks)
            output, start = torch.cat((output, y)), end
        return self.predictor(self.projector(output))


class _System(nn.Module):
    encoder: type[nn.Module]

    def __init__(self, hidden=4096, out=256, **encoder):
        super().__init__()
        dim = encoder["embed_dim"]
        self.student = MultiCropWrapper(self.encoder(**encoder), dim, hidden, out, True)
        self.teacher = MultiCropWrapper(self.encoder(**encoder), dim, hidden, out, False)
        for p in self.teacher.parameters():
            p.requires_grad = False
        self.teacher.load_state_dict({k: v for k, v in self.student.state_dict().items() if "predictor" not in k})

    def update_teacher(self, m):
        with torch.no_grad():
            for part in ("encoder", "projector"):
                pairs = zip(getattr(self.student, part).parameters(), getattr(self.teacher, part).parameters())
                for of_student, of_teacher in pairs:
                    of_teacher.data.mul_(m).add_((1 - m) * of_student.detach().data)


class FrameATST(_System):
    encoder = FrameAST

    def __init__(self, symmetric=True, **kwargs):
        super().__init__(**kwargs)
        self.symmetric = symmetric
        self.loss_fn = FrameByolLoss(symmetric)

    def forward(self, x, length, mask):
        first, second = (slice(None), slice(None)) if self.symmetric else (slice(0, 1), slice(1, None))
        teacher = self.teacher(x[first], length[first], mask[first], mask_input=False)
        student = self.student(x[second], length[second], mask[second], mask_input=True)
        return self.loss_fn(student, teacher)


class ATST(_System):
    encoder = AST

    def __init__(self, ncrops=2, **kwargs):
        super().__init__(**kwargs)
        self.loss_fn = ClipByolLoss(ncrops)

    def forward(self, melspecs, lengths):
        teacher = self.teacher(melspecs[:2], lengths[:2])
        return self.loss_fn(self.student(melspecs, lengths), teacher)


def cosine(base, final, steps, warmup=0):
    i = np.arange(steps - warmup)
    falling = final + 0.5 * (base - final) * (1 + np.cos(np.pi * i / len(i)))
    return np.concatenate([np.linspace(0, base, warmup), falling])


class LightningShaped(nn.Module):
    """A LightningModule around a system, and the calls that a Trainer makes."""

    def __init__(self, model, learning_rate=1e-3, warmup_steps=4, max_steps=40, ema=0.99):
        super().__init__()
        self.model = model
        self.ema_scheduler = cosine(ema, 1, max_steps)
        self.wd_scheduler = cosine(0.04, 0.4, max_steps)
        self.mylr_scheduler = cosine(learning_rate, 1e-6, max_steps, warmup_steps)
        self.global_step = 0
        self.optimizer = self.configure_optimizers()

    def configure_optimizers(self):
        return AdamW(groups(self.model.student), 0.0, 0.0)

    def training_step(self, batch):
        for i, group in enumerate(self.optimizer.param_groups):
            group["lr"] = self.mylr_scheduler[self.global_step]
            if i == 0:
                group["weight_decay"] = self.wd_scheduler[self.global_step]
        return self.model(*batch)

    def fit_batch(self, batch):
        """One step of a Trainer: its counter has moved on when the teacher is updated."""
        outputs = self.training_step(batch)
        self.optimizer.zero_grad()
        outputs[0].backward()
        self.optimizer.step()
        self.global_step += 1
        self.model.update_teacher(self.ema_scheduler[min(self.global_step, len(self.ema_scheduler) - 1)])
        return [x.item() for x in outputs]
