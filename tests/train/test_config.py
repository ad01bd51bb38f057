import dataclasses
import functools
import itertools
from pathlib import Path

import pytest

from atst_fast.train.config import PretrainConfig, UserError, check, conflicts, resolve
from atst_fast.train.masks import block_mask

CONFIG = PretrainConfig(data=Path("d"), out=Path("o"), arch="tiny", batch_size=3, lr=0.1, steps=10)


def made(**changes):
    return dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"epochs": 1.0}, "exclude each other"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"lr": float("nan")}, "--lr must be finite"),
        ({"momentum": 1.5}, "--momentum must be between 0 and 1"),
        ({"clip_seconds": 0.01}, "--clip-seconds must be between"),
        ({"mask_ratio": 1.0}, "--mask-ratio must be between"),
        ({"subset": 2}, "--subset must be at least batch_size"),
        ({"keep": 0}, "--keep must be at least 1"),
        ({"bank_size": 0}, "--bank-size must be at least 1, got 0"),
        ({"seed": 2**63}, r"--seed must be 0 or more and less than 2\^63"),
        ({"mask_len": 51, "clip_seconds": 2.0}, "--mask-len must be at most 50, the patches of a clip, got 51"),
        (
            {"clip_seconds": 0.21, "mask_ratio": 0.99, "mask_len": 1},
            "--mask-ratio and --mask-len ask for 5 spans; a clip of 5 patches has no room",
        ),
        ({"max_seconds": 9.0}, r"--max-seconds must be between 10.0 \(the longest crop\) and 600, got 9.0"),
        ({"win_length": 2048}, "--win-length must be between"),
        ({"method": "clip", "clip_seconds": 601.0}, "--clip-seconds must be between 0.2 and 600, got 601.0"),
        ({"method": "clip", "positive_seconds": 0.1}, "--positive-seconds must be between 0.2 and 600, got 0.1"),
        ({"positive_seconds": 6.0}, "--positive-seconds has no effect without --method clip: ATST-Frame makes"),
        ({"method": "clip", "mask_ratio": 0.5}, "--mask-ratio has no effect with --method clip: ATST-Clip masks"),
        ({"method": "clip", "mask_len": 4}, "--mask-len has no effect with --method clip"),
    ],
)
def test_values_that_make_no_sense(changes, message):
    with pytest.raises(UserError, match=message):
        check(made(**changes))


def test_what_is_accepted_can_be_masked():
    """The shortest and the most masked clips that check lets through, and none that it need not refuse."""
    accepted = 0
    for clip_seconds, mask_ratio, mask_len in itertools.product((0.2, 0.29, 0.5), (0.1, 0.65, 0.8, 0.99), (1, 2, 5, 6)):
        config = made(clip_seconds=clip_seconds, mask_ratio=mask_ratio, mask_len=mask_len)
        patches = (config.samples[0] // 160 + 1) // 4
        draw = functools.partial(block_mask, 200, patches, mask_ratio=mask_ratio, mask_len=mask_len)
        try:
            check(config)
        except UserError:
            if mask_len <= patches:
                with pytest.raises(ValueError, match="room"):
                    draw()
        else:
            accepted += 1
            draw()
    assert accepted > 20


def test_resolve_follows_the_recipes():
    small = resolve(made(arch="small", lr=None, steps=None, batch_size=1024), 195)
    assert small["steps"] == 58500
    assert small["warmup_steps"] == 1950
    assert small["peak_lr"] == pytest.approx(1.6e-3)
    assert small["momentum"] == 0.997
    base = resolve(made(arch="base", lr=None, steps=None, batch_size=1008), 1990)
    assert (base["steps"], base["warmup_steps"]) == (398000, 19900)
    assert base["peak_lr"] == pytest.approx(3.15e-4)
    clip = resolve(made(method="clip", arch="small", lr=None, steps=None, batch_size=1536), 130)
    assert (clip["steps"], clip["warmup_steps"], clip["momentum"]) == (39000, 1297, 0.99)  # 39,100 with 10 more steps
    assert clip["peak_lr"] == pytest.approx(3e-3)
    assert (clip["clip_seconds"], clip["positive_seconds"]) == (6.0, 6.0)
    base = resolve(made(method="clip", arch="base", lr=None, steps=None, batch_size=1536), 1953)
    assert (base["steps"], base["warmup_steps"], base["momentum"]) == (318000, 15860, 0.9995)
    assert base["peak_lr"] == pytest.approx(1.2e-3)
    with pytest.raises(UserError, match="--warmup-steps must be at most the number of steps"):
        resolve(made(warmup_steps=11), 4)


def test_crops_of_both_methods():
    assert made().samples == (160000,)
    assert made(clip_seconds=2.0).samples == (32000,)
    assert made(method="clip").samples == (96000, 96000)
    assert made(method="clip", clip_seconds=9.0).samples == (144000, 96000)
    assert made(method="clip", positive_seconds=1.5).samples == (96000, 24000)
    check(made(method="clip", clip_seconds=0.2))  # too short for masks, and it draws none


def test_a_run_from_before_there_were_methods_is_one_of_atst_frame():
    now = resolve(made(), 4)
    before = {k: v for k, v in now.items() if k not in ("method", "positive_seconds", "precision")}
    assert conflicts(now | {"precision": "float32"}, before) == []
    clip = resolve(made(method="clip"), 4) | {"precision": "float32"}
    assert "method: 'clip' now, 'frame' before" in conflicts(clip, before)


def test_conflicts_knows_every_field():
    assert conflicts({"a": 1, "seed": 1}, {"b": 2, "seed": 1}) == ["a: 1 now, None before", "b: None now, 2 before"]
