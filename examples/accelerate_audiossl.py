"""Speed up audiossl's own pretraining of ATST-Frame, without changing audiossl.

In audiossl/methods/atstframe/train.py it is a diff of three lines, and nothing else changes: neither checkpoints, nor
the optimizer, nor the loss curve.

     model = FrameATSTLightningModule(**dict_args)
     data = FrameATSTDataModule(**dict_args)
    +import atst_fast
    +print(atst_fast.accelerate(model))
    +print(atst_fast.accelerate_transforms(data.dataset.transform))
     trainer: Trainer = Trainer(...)

This script shows what that does. With audiossl installed it takes audiossl's model; without it, a small model of the
same structure from atst_fast's source tree stands in. It trains some steps, plain and accelerated, from the same state
and with the same draws, prints the table of what was replaced, both losses and both times:

    python examples/accelerate_audiossl.py [--steps 20] [--clips 8]
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import torch

import atst_fast


def official_model():
    """audiossl's FrameATST ("small"), or None where audiossl or what it imports is missing."""
    try:
        from audiossl.methods.atstframe.model import FrameATST
    except ImportError as error:
        print(f"audiossl cannot be imported ({error}): a small model of the same structure stands in\n")
        return None
    return FrameATST("small", spec_h=64, spec_w=1001, patch_h=64, patch_w=4)


def stand_in():
    root = Path(__file__).resolve().parent.parent
    if not (root / "tests" / "integrations" / "standins").is_dir():
        sys.exit(
            "accelerate_audiossl: install audiossl, or run this file in a checkout of atst_fast, which has a stand-in"
        )
    sys.path.insert(0, str(root))
    from tests.integrations.standins.audiossl_systems import FrameATST

    return FrameATST(embed_dim=128, depth=4, num_heads=2, spec_w=1001, hidden=512, out=128)


def batches(steps, clips):
    """Noise with the shapes of the real thing: 10 s, half of the patches masked."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        views = [torch.randn(clips, 1, 64, 1001, generator=generator) for _ in range(2)]
        mask = torch.rand(clips, 250, generator=generator) < 0.5
        yield views, [torch.full((clips,), 1001)] * 2, [mask] * 2


def train(model, steps, clips, device):
    """Losses, and seconds per step after the first two."""
    model.to(device)
    optimizer = torch.optim.AdamW(model.student.parameters(), lr=1e-4, eps=1e-6)  # audiossl's epsilon
    torch.manual_seed(1)
    losses, started = [], 0.0
    for step, batch in enumerate(batches(steps, clips)):
        if step == min(2, steps - 1):
            synchronize(device)
            started = time.perf_counter()
        views, lengths, masks = ([x.to(device) for x in part] for part in batch)
        loss, *_ = model(views, lengths, masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.update_teacher(0.99)
        losses.append(loss.detach())
    synchronize(device)
    return [float(x) for x in losses], (time.perf_counter() - started) / max(steps - 2, 1)


def synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()


def one_process_group(device):
    """The diagnostics of audiossl's loss ask for one."""
    if torch.distributed.is_initialized():
        return
    store = torch.distributed.HashStore()
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--clips", type=int, default=8)
    args = parser.parse_args()
    if args.steps < 1 or args.clips < 2:
        parser.error("--steps must be at least 1 and --clips at least 2")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = official_model()
    if model is not None and device == "cpu":
        print("audiossl's loss needs a GPU (it calls .cuda()): a small model of the same structure stands in\n")
        model = None
    if model is not None:
        one_process_group(device)
    plain = model or stand_in()
    fast = copy.deepcopy(plain)
    print(atst_fast.accelerate(fast))
    of_plain, of_fast = (train(m, args.steps, args.clips, device) for m in (plain, fast))
    print(f"\n{'step':>4}  {'plain':>9}  {'accelerated':>11}")
    shown = sorted({*range(0, args.steps, max(args.steps // 5, 1)), args.steps - 1})
    for step in shown:
        print(f"{step:4}  {of_plain[0][step]:9.6f}  {of_fast[0][step]:11.6f}")
    apart = max(abs(a - b) / abs(a) for a, b in zip(of_plain[0], of_fast[0]))
    print(f"\nlargest relative difference of a loss: {apart:.1e}")
    print(f"seconds per step on {device}: plain {of_plain[1]:.3f}, accelerated {of_fast[1]:.3f}")
    print(f"restored: {atst_fast.restore(fast)} modules have their own classes back")


if __name__ == "__main__":
    main()
