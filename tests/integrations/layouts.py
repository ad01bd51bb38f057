"""Files as the official code writes them: the names and shapes of the specifications, small random weights."""

import argparse

import torch

from atst_fast.models import ATSTClip, ATSTFrame, ClipEncoder, Distilled, FineTuned, FrameEncoder

SIZE = {"dim": 64, "depth": 2, "num_heads": 1}
FRAMES = 41  # what the positions are for: 10 tokens
HYPER = {"arch": "small", "n_mels": 64, "patch_h": 64, "patch_w": 4, "pos_type": "cut", "learning_rate": 1.6e-3}


def moved(module):
    """No tensor of it is what a new one begins with, and no two networks are equal."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return module


def frame_system(**options):
    return moved(ATSTFrame(SIZE, hidden=32, out=16, max_frames=FRAMES, **options))


def clip_system(**options):
    return moved(ATSTClip(SIZE, hidden=32, out=16, max_frames=FRAMES, **options))


def fine_tuned(kind=ClipEncoder, classes=3):
    return moved(FineTuned(kind(SIZE, max_frames=FRAMES), classes))


def distilled(classes=3, **options):
    return moved(Distilled(fine_tuned(classes=classes), FrameEncoder(SIZE, max_frames=FRAMES), **options))


def linear_head(width, classes=3):
    return {
        "head.norm.running_mean": torch.randn(width),
        "head.norm.running_var": torch.rand(width),
        "head.norm.num_batches_tracked": torch.tensor(7),
        "head.linear.weight": torch.randn(classes, width),
        "head.linear.bias": torch.randn(classes),
    }


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


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


def dino(path, networks, wrapper="module.", **arguments):
    """``networks``: "teacher" and "student" to the state of a backbone and of a head."""
    states = {
        name: prefixed(f"{wrapper}backbone.", backbone) | prefixed(f"{wrapper}head.", head)
        for name, (backbone, head) in networks.items()
    }
    args = argparse.Namespace(anchor_len=[6.0, 6.0], pos_type="cut", use_cls=True, **arguments)
    torch.save({**states, "args": args, "epoch": 12, "optimizer": {"state": {}}, "byol_loss": {}}, path)
