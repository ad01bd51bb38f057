"""Files as the official code writes them: the names and shapes of the specifications, small random weights."""

import argparse

import torch

from atst_fast.models import ATSTFrame

SIZE = {"dim": 64, "depth": 2, "num_heads": 1}
FRAMES = 41  # what the positions are for: 10 tokens
HYPER = {"arch": "small", "n_mels": 64, "patch_h": 64, "patch_w": 4, "pos_type": "cut", "learning_rate": 1.6e-3}


def frame_system(seed=0, **options):
    """A system whose two networks differ, and whose running statistics are not those that it begins with."""
    torch.manual_seed(seed)
    system = ATSTFrame(SIZE, hidden=32, out=16, max_frames=FRAMES, **options)
    with torch.no_grad():
        for tensor in system.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return system


def linear_head(width, classes=3):
    return {
        "head.norm.running_mean": torch.randn(width),
        "head.norm.running_var": torch.rand(width),
        "head.norm.num_batches_tracked": torch.tensor(7),
        "head.linear.weight": torch.randn(classes, width),
        "head.linear.bias": torch.randn(classes),
    }


def prefixed(prefix, state):
    return {prefix + k: v for k, v in state.items()}


def lightning(path, state_dict, hyper_parameters=HYPER):
    beside = {
        "epoch": 3,
        "global_step": 70,
        "pytorch-lightning_version": "1.9.0",
        "callbacks": {},
        "loops": {"a": None},
    }
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
    beside |= {"optimizer_states": [optimizer], "lr_schedulers": []}
    torch.save({**beside, "state_dict": state_dict, "hyper_parameters": dict(hyper_parameters)}, path)


def dino(path, networks, **arguments):
    """``networks``: "teacher" and "student" to the state of a backbone and of a head."""
    states = {
        name: prefixed("module.backbone.", backbone) | prefixed("module.head.", head)
        for name, (backbone, head) in networks.items()
    }
    args = argparse.Namespace(anchor_len=[6.0, 6.0], pos_type="cut", use_cls=True, **arguments)
    torch.save({**states, "args": args, "epoch": 12, "optimizer": {"state": {}}, "byol_loss": {}}, path)
