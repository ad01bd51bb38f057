import dataclasses
from pathlib import Path

import pytest

from atst_fast.train.config import PretrainConfig, UserError, check, conflicts, resolve

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
        ({"win_length": 2048}, "--win-length must be between"),
    ],
)
def test_values_that_make_no_sense(changes, message):
    with pytest.raises(UserError, match=message):
        check(made(**changes))


def test_resolve_follows_the_recipes():
    small = resolve(made(arch="small", lr=None, steps=None, batch_size=1024), 195)
    assert small["steps"] == 58500
    assert small["warmup_steps"] == 1950
    assert small["peak_lr"] == pytest.approx(1.6e-3)
    assert small["momentum"] == 0.997
    base = resolve(made(arch="base", lr=None, steps=None, batch_size=1008), 1990)
    assert (base["steps"], base["warmup_steps"]) == (398000, 19900)
    assert base["peak_lr"] == pytest.approx(3.15e-4)
    with pytest.raises(UserError, match="--warmup-steps must be at most the number of steps"):
        resolve(made(warmup_steps=11), 4)


def test_conflicts_knows_every_field():
    assert conflicts({"a": 1, "seed": 1}, {"b": 2, "seed": 1}) == ["a: 1 now, None before", "b: None now, 2 before"]
