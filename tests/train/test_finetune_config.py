"""Options of fine-tuning and distillation: what is refused, and what is chosen where the user gave none."""

import pytest

from atst_fast.train.config import UserError
from atst_fast.train.finetune_config import DistillConfig, FinetuneConfig, check, resolve


@pytest.mark.parametrize(
    "options, message",
    [
        ({"epochs": 0}, "--epochs must be at least 1, got 0"),
        ({"warmup_epochs": 9}, "--warmup-epochs must be between 0 and the epochs"),
        ({"batch_size": 1}, "--batch-size must be at least 2"),
        ({"lr": -1.0}, "--lr must be finite"),
        ({"layer_decay": 0.0}, "--layer-decay must be more than 0"),
        ({"momentum": 1.0}, "--momentum must be 0 or more and less than 1"),
        ({"clip_norm": 0.0}, "--clip-norm must be positive"),
        ({"alpha": 0.0}, "--alpha must be positive"),
        ({"mixup_prob": 0.0}, "--mixup-prob must be more than 0 and at most 1"),
        ({"freq_mask": -1}, "--freq-mask must be 0 or more"),
        ({"time_mask": -1}, "--time-mask must be 0 or more"),
        ({"validation": 1.0}, "--validation must be 0 or more and less than 1"),
        ({"median": 2}, "--median must be odd"),
        ({"seconds": 0.1}, "--seconds must be between 0.2 and 600"),
        ({"chunk_seconds": 0.1}, "--chunk-seconds must be between"),
        ({"level": "frame", "mixup": True}, "--mixup is for clips alone"),
        ({"weight": 1.5}, "--weight must be between 0 and 1"),
        ({"level": "frame", "project": 8}, "--project is for clips alone"),
        ({"project": 0}, "--project must be at least 1"),
        ({"level": "frame", "alpha": 1.0}, "--alpha has no effect at --level frame"),
        ({"level": "frame", "bank_size": 9}, "--bank-size has no effect at --level frame"),
        ({"mixup": False, "alpha": 1.0}, "--alpha has no effect without mixup"),
        ({"mixup": False, "bank_size": 9}, "--bank-size has no effect without mixup"),
        ({"mixup_partner": "file", "bank_size": 9}, "--bank-size has no effect with --mixup-partner file, which remem"),
        ({"median": 3}, "--median has no effect at --level clip"),
        ({"validation": 0, "eval_every": 3}, "--eval-every has no effect without files held out: --validation is 0"),
        ({"scale_bug": False}, "--no-scale-bug has no effect on an ATST-Frame; the teacher has that of its own"),
    ],
)
def test_values_that_make_no_sense(options, message):
    with pytest.raises(UserError, match=message):
        check(DistillConfig(checkpoint="a", teacher="b", out="c", **{"epochs": 6, "warmup_epochs": 1, **options}))


def test_what_only_some_levels_use():
    def made(**options):
        return FinetuneConfig(checkpoint="a", out="c", **options)

    check(made(alpha=1.0, bank_size=9, scale_bug=False))
    check(made(level="frame", median=3, validation=0))
    check(made(mixup=False))
    with pytest.raises(UserError, match="--no-scale-bug has no effect at --level frame"):
        check(made(level="frame", scale_bug=False))


def test_what_is_left_to_us():
    def of(single=False, kind=FinetuneConfig, **options):
        more = {"teacher": "b"} if kind is DistillConfig else {}
        return resolve(kind(checkpoint="a", out="c", **more, **options), 10, single)

    s = of()
    assert (s["lr"], s["peak_lr"], s["mixup"], s["loss"], s["seconds"]) == (1.0, 0.125, True, "bce", 12.0)
    assert (s["steps"], s["warmup_steps"]) == (500, 50)
    s = of(level="frame")
    assert (s["lr"], s["mixup"], s["loss"], s["seconds"]) == (0.5, False, "bce", 10.0)
    assert of(single=True)["loss"] == "bce"  # with mixup
    assert of(single=True, mixup=False)["loss"] == "ce"
    assert of(kind=DistillConfig)["lr"] == 2.0
    assert of(kind=DistillConfig)["teacher_mode"] == "train"
    assert of(kind=DistillConfig, level="frame")["teacher_mode"] == "eval"
    for options, reason in (
        ({}, "mixed labels"),
        ({"mixup": False}, "files of several"),
        ({"level": "frame"}, "--level"),
    ):
        with pytest.raises(UserError, match=f"--loss ce asks for exactly one label per clip, which excludes {reason}"):
            of(loss="ce", **options)
    for options in ({"mixup": False, "mixup_partner": "file"}, {"level": "frame", "mixup_prob": 0.5}):
        with pytest.raises(UserError, match="--mixup-partner and --mixup-prob say how clips are mixed, and here"):
            of(**options)
