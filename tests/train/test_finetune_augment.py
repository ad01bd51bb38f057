"""What fine-tuning draws and adds to clips, as the options say it, up to the step."""

import pytest
import torch
from rich.console import Console

from atst_fast.train import checkpoint, mixup
from atst_fast.train.config import UserError
from atst_fast.train.distributed import World
from atst_fast.train.finetune import FinetuneRun, finetune
from atst_fast.train.finetune_config import FORMER
from tests.train.test_finetune import AUDIOSET, settings, starting_points


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Do not change it."""
    return starting_points(tmp_path_factory.mktemp("augment"))


def test_what_is_drawn_reaches_the_step(folder, tmp_path, monkeypatch):
    """With files to mix with and masks; masks alone; and with the bank."""
    cpu = World(torch.device("cpu"))
    monkeypatch.setattr(mixup, "resize_crop", lambda mel, lengths, seed: mel)

    def prepared(**options):
        run = FinetuneRun(settings(folder / "data", folder / "frame", tmp_path, **options), cpu, Console(quiet=True))
        batch = run.batches.batch(3)
        return batch, *run.prepare(batch)

    batch, mel, lengths, targets, _ = prepared(**AUDIOSET)
    _, whole, *_ = prepared(**AUDIOSET | {"freq_mask": 0, "time_mask": 0})
    of = batch.partner_of.tolist()
    assert len(mel) == len(lengths) == len(targets) == 4
    assert len(batch.waveform) == 4 + len(of) > 4
    assert [k for k in range(4) if not torch.equal(targets[k], batch.targets[k])] == of
    masked = (mel == 0) & (whole != 0)
    assert masked.flatten(1).any(1).sum() >= 3
    assert torch.equal(mel[~masked], whole[~masked])
    for options in ({"mixup": False}, {"level": "frame"}, {}):
        plain, masked = (prepared(**options, freq_mask=n)[1] for n in (0, 30))
        bands = ((masked == 0) & (plain != 0)).all(3).sum((1, 2))
        assert torch.equal(masked[masked != 0], plain[masked != 0])
        assert bands.max() > 3


def test_the_sampler_is_the_one_asked_for(folder, tmp_path):
    cpu = World(torch.device("cpu"))

    def drawn(name):
        config = settings(folder / "data", folder / "frame", tmp_path, sampler=name)
        batches = FinetuneRun(config, cpu, Console(quiet=True)).batches
        return [number for step in range(batches.per_epoch) for number in batches.numbers(step)]

    for name, repeats in (("shuffle", False), ("balanced", True)):
        numbers = drawn(name)
        assert (len(set(numbers)) < len(numbers)) == repeats


def test_a_run_from_before_there_was_a_choice_goes_on(folder, tmp_path):
    config = settings(folder / "data", folder / "frame", tmp_path / "run", epochs=1)
    assert finetune(config) == 0
    path = checkpoint.find(config.out)
    loaded, state = checkpoint.load(path), checkpoint.load_state(path)
    for name in ("precision", "processes", *FORMER):
        del loaded.config["settings"][name]
    state.pop("step")
    for name in ("older", "other"):
        weights = {k: v.clone() for k, v in loaded.weights.items()}
        checkpoint.save(tmp_path / name, 2, weights, state, loaded.config, keep=1, prefix="")
    assert finetune(settings(folder / "data", folder / "frame", tmp_path / "older", epochs=1)) == 0
    other = settings(folder / "data", folder / "frame", tmp_path / "other", epochs=1, **AUDIOSET)
    with pytest.raises(UserError, match="mixup_partner: 'file' now, 'bank' before") as error:
        finetune(other)
    for name in FORMER:
        assert f"  {name}: {getattr(other, name)!r} now, {FORMER[name]!r} before" in str(error.value)
