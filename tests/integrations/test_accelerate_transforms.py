# ruff: noqa: NPY002 (numpy's global generator is what the transforms draw from)
import copy
import pickle
import random

import numpy as np
import pytest
import torch
from torch import nn

from atst_fast import accelerate_transforms, restore_transforms
from atst_fast.nn import AmplitudeToDB, MelSpectrogram
from tests.golden import load
from tests.integrations.standins import audiossl_transforms as audiossl
from tests.tolerances import FRONT_END


def clips(count):
    g = torch.Generator().manual_seed(0)
    envelope = torch.linspace(0.01, 0.3, 24000)
    return [envelope * torch.randn(1, 24000, generator=g) for _ in range(count)]


def seeded(transform, wave, seed):
    np.random.seed(seed)
    random.seed(seed)
    out = transform(wave)
    return out, np.random.random(), random.random()


@pytest.mark.parametrize("lengths", [(0.64, 0.64), (0.9, 0.5)])
def test_the_same_views_from_the_same_draws(lengths):
    plain = audiossl.ATSTTrainTransform(*lengths)
    fast = copy.deepcopy(plain)
    numpy_state, python_state = np.random.get_state()[1].tolist(), random.getstate()
    report = accelerate_transforms(fast)
    assert np.random.get_state()[1].tolist() == numpy_state
    assert random.getstate() == python_state
    assert {(e.name, e.part, e.replaced) for e in report} == {
        ("mel_feature.transforms[0:3]", "log_mel", True),
        ("positive_transform1.transforms[0:2]", "views", True),
        ("positive_transform2.transforms[0:2]", "views", True),
    }
    for seed, wave in enumerate(clips(5)):
        want, got = seeded(plain, wave, seed), seeded(fast, wave, seed)
        assert got[1:] == want[1:]
        assert got[0][1] == want[0][1]
        torch.testing.assert_close(got[0][0], want[0][0], rtol=0, atol=FRONT_END)
        assert len(fast.positive_transform1.transforms[0].mixup.memory_bank) == seed + 1


def test_banks_of_other_widths_and_one_width():
    """Mixup alone over clips of changing width."""
    plain = audiossl.Compose([audiossl.Mixup(n_memory=3)])
    fast = copy.deepcopy(plain)
    assert accelerate_transforms(fast)[0].name == "transforms[0]"
    g = torch.Generator().manual_seed(1)
    for seed in range(8):
        x = torch.randn(1, 16, 20 + 4 * (seed % 3), generator=g)
        want, got = seeded(plain, x.clone(), seed), seeded(fast, x, seed)
        assert got[1:] == want[1:]
        torch.testing.assert_close(got[0], want[0], rtol=0, atol=FRONT_END)
    assert [z.shape for z in fast.transforms[0].mixup.memory_bank] == [z.shape for z in plain.transforms[0].memory_bank]


def test_again_restored_and_pickled():
    transform = audiossl.ATSTTrainTransform(0.64, 0.64)
    steps = [*transform.mel_feature.transforms, *transform.positive_transform1.transforms]
    lists = [id(transform.mel_feature.transforms), id(transform.positive_transform1.transforms)]
    assert len(accelerate_transforms(transform)) == 3
    assert not accelerate_transforms(transform)
    wave = clips(1)[0]
    want = seeded(transform, wave, 0)
    other = pickle.loads(pickle.dumps(transform))
    torch.testing.assert_close(seeded(other, wave, 0)[0][0][0].shape, want[0][0][0].shape)
    assert "FusedLogMel(MelSpectrogram, AmplitudeToDB, MinMax)" in repr(transform.mel_feature.transforms[0])
    assert restore_transforms(transform) == 3
    assert [*transform.mel_feature.transforms, *transform.positive_transform1.transforms] == steps
    assert lists == [id(transform.mel_feature.transforms), id(transform.positive_transform1.transforms)]
    assert restore_transforms(transform) == 0


class Noisy(audiossl.Mixup):
    def forward(self, x):
        return super().forward(x) + 0.1


class Greedy(audiossl.RandomResizeCrop):
    def forward(self, x):
        np.random.random()
        return super().forward(x)


class Louder(audiossl.AmplitudeToDB):
    def forward(self, x):
        return super().forward(x) + 1


def _set(thing, name, value):
    setattr(thing, name, value)
    return thing


@pytest.mark.parametrize(
    "steps, why",
    [
        (lambda: [audiossl.MelSpectrogram()], "no AmplitudeToDB follows"),
        (lambda: [audiossl.MelSpectrogram(), Louder()], "what it computes differs"),
        (lambda: [audiossl.MelSpectrogram(), _set(audiossl.AmplitudeToDB(), "amin", 1e-5)], "amin=1e-05, not 1e-10"),
        (lambda: [Noisy()], "what it computes, or draws, differs"),
        (lambda: [Greedy()], "what it computes, or draws, differs"),
        (lambda: [_set(audiossl.Mixup(), "log_mixup_exp", False)], "log_mixup_exp=False, not True"),
        (lambda: [_set(audiossl.RandomResizeCrop(), "interpolation", "nearest")], "interpolation='nearest'"),
    ],
)
def test_what_is_left_and_why(steps, why):
    transform = audiossl.Compose(steps())
    before = list(transform.transforms)
    (entry,) = accelerate_transforms(transform)
    assert not entry.replaced
    assert why in entry.note
    assert transform.transforms == before


def test_other_input_runs_the_originals():
    transform = audiossl.ATSTTrainTransform(0.64, 0.64)
    plain = copy.deepcopy(transform)
    accelerate_transforms(transform)
    wave = clips(1)[0].double()
    spectrogram = plain.mel_feature.transforms[0].spectrogram
    for t in (transform.mel_feature.transforms[0].originals[0], plain.mel_feature.transforms[0]):
        t.double()
    assert spectrogram.window.dtype == torch.float64
    assert torch.equal(transform.mel_feature(wave), plain.mel_feature(wave))
    two = torch.randn(2, 64, 30)
    got, want = (seeded(t.positive_transform1, two.clone(), 0)[0] for t in (transform, plain))
    assert torch.equal(got, want)


def test_nothing_is_found_in_other_things():
    assert not accelerate_transforms(nn.Linear(2, 2))
    assert not accelerate_transforms(audiossl.Compose([torch.abs, audiossl.MinMax(0.0, 1.0)]))
    assert restore_transforms(None) == 0


def test_golden_views():
    """The official transform, its draws replayed."""
    t, meta = load("transform")
    (case,) = (c for c in meta["cases"] if c["kind"] == "clip")
    transform = audiossl.ATSTTrainTransform(case["kw"]["anchor_len"][0], case["kw"]["positive_len"][0])
    assert len(accelerate_transforms(transform).replaced) == 3
    for call, tape in enumerate(case["tape"]):
        drawn = iter(tape)

        def replay(wanted, drawn=drawn):
            kind, value = next(drawn)
            assert kind == wanted
            return value

        with pytest.MonkeyPatch.context() as patch:
            for module, names in ((np.random, ("randint", "random", "uniform")), (random, ("randint",))):
                for name in names:
                    patch.setattr(module, name, lambda *_, name=name, replay=replay: replay(name))
            crops, lengths = transform(t[case["x"]][None].float() / 32768)
        assert not list(drawn)
        for i, crop in enumerate(crops):
            torch.testing.assert_close(crop, t[f"out/clip/call{call}/crop{i}"], rtol=0, atol=FRONT_END)
        assert lengths == t[f"out/clip/call{call}/lengths"].tolist()


def test_steps_of_this_package_and_of_other_versions():
    """The drop-ins say what torchaudio's modules say; where something is not said, the steps stay."""
    transform = audiossl.Compose([MelSpectrogram(n_fft=1024, hop_length=160), AmplitudeToDB(top_db=80.0)])
    wave = clips(1)[0]
    want = transform(wave)
    assert accelerate_transforms(transform)[0].replaced
    torch.testing.assert_close(transform(wave), want, rtol=0, atol=FRONT_END)
    old = audiossl.MelSpectrogram()
    del old.spectrogram.center
    (entry,) = accelerate_transforms(audiossl.Compose([old, audiossl.AmplitudeToDB()]))
    assert (entry.replaced, entry.note) == (False, f"{type(old.spectrogram).__name__} does not say its center")
