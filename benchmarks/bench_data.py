"""Batches of int16 crops: from a pack in mapped memory, and from folders that are decoded, everything page-cached."""

import os

import numpy as np
import pytest
import torch

soundfile = pytest.importorskip("soundfile", reason="needs the extra train")
from atst_fast.train.data import Batches, Prefetcher, open_source  # noqa: E402
from atst_fast.train.pack import PackConfig, pack  # noqa: E402

RATE, SECONDS = 16000, 10.0
# clips per folder, batch size, seconds of the crop
SIZES = {"tiny": (8, 4, 1.0), "crop_6s": (128, 64, 6.0), "crop_10s": (128, 64, 10.0)}
KINDS = ("pack", "wav", "flac", "flac_44k_stereo")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function (kind, clips) -> path of that many clips of 10 s; made once each."""
    made = {}

    def write(folder, kind, clips):
        folder.mkdir()
        rate, channels = (44100, 2) if kind == "flac_44k_stereo" else (RATE, 1)
        rng = np.random.default_rng(0)
        # sound that compresses about as music does: low-pass noise over a tone
        n = int(SECONDS * rate)
        noise = np.cumsum(rng.standard_normal((n, channels)), axis=0)
        noise -= np.linspace(0, 1, n)[:, None] * noise[-1]
        sound = 0.3 * noise / np.abs(noise).max() + 0.02 * rng.standard_normal((n, channels))
        for i in range(clips):
            soundfile.write(folder / f"{i:04d}.{'wav' if kind == 'wav' else 'flac'}", np.roll(sound, 997 * i, 0), rate)

    def get(kind, clips):
        if (kind, clips) not in made:
            folder = tmp_path_factory.mktemp("data") / kind
            if kind == "pack":
                pack(PackConfig(src=get("wav", clips), dst=folder))
            else:
                write(folder, kind, clips)
            made[kind, clips] = folder
        return made[kind, clips]

    return get


@pytest.mark.benchmark(group="data")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("provider", ["atst_fast", *KINDS[1:]])
def test_batches(benchmark, folders, provider, size):
    """Four batches, prepared ahead by one thread; folders are decoded by one thread per core."""
    clips, batch_size, seconds = SIZES[size]
    kind = "pack" if provider == "atst_fast" else provider
    data = Batches(open_source(folders(kind, clips)), batch_size, int(seconds * RATE), seed=0)
    steps = 4

    def run():
        with Prefetcher(data, 0, steps, ahead=2) as batches:
            return [batch.step for batch in batches]

    assert run() == list(range(steps))
    samples = steps * batch_size * int(seconds * RATE)
    benchmark.extra_info.update(bytes=4 * samples, items=(steps * batch_size, "clips"), note=f"{os.cpu_count()} cores")
    benchmark(run)


@pytest.mark.benchmark(group="data: one batch in one thread")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("provider", ["atst_fast", *KINDS[1:]])
def test_one_batch(benchmark, folders, provider, size):
    """A batch without prefetching; folders are decoded by a single thread."""
    clips, batch_size, seconds = SIZES[size]
    kind = "pack" if provider == "atst_fast" else provider
    data = Batches(open_source(folders(kind, clips), workers=1), batch_size, int(seconds * RATE), seed=0)
    assert data.batch(0).waveform.dtype == torch.int16
    samples = batch_size * int(seconds * RATE)
    benchmark.extra_info.update(bytes=4 * samples, items=(batch_size, "clips"))
    benchmark(data.batch, 0)
