"""The steps of a GPU where there is none: each provider on the CPU; and what a run on a GPU writes and says."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from atst_fast.bench import machine, report, timing
from atst_fast.bench.session import Measured
from benchmarks import card, conftest
from benchmarks import report as kept
from benchmarks.gpu import bench_step
from tests.bench.fake import GPU, LOG_MEL, gpu_result


@pytest.mark.parametrize("provider", bench_step.PROVIDERS)
def test_a_training_step_runs(provider):
    step = bench_step.PROVIDERS[provider]("tiny", 2, torch.device("cpu"))
    assert all(0 < float(step()) < 4 for _ in range(2))


def test_the_official_step_stays_on_the_device_of_its_batch():
    frames = bench_step.cpu.SIZES["tiny"][2]
    mask = bench_step.cpu.make_mask(2, frames // 4)
    step = bench_step.cpu.make_step("official_structure", "tiny")
    batch = *torch.randn(2, 2, 1, 64, frames), torch.full((2,), frames), mask
    with torch.device("meta"):  # where a tensor is made that is not told where
        assert 0 < step(batch) < 4


def test_what_a_step_counts():
    """Of base, 1,200 clips/s and 45 % of the peak are one target, within some per cent."""
    extra = bench_step.work("atst_fast", "base", 144)
    assert 1200 / 144 * extra["flops"] / extra["peak_flops"] == pytest.approx(0.45, abs=0.03)
    assert extra["items"] == (144, "clips")


def test_a_batch_that_does_not_fit_is_halved():
    tried = []

    def make(clips):
        tried.append(clips)
        if clips > 40:
            raise torch.OutOfMemoryError("no")
        return "step"

    assert bench_step.fitting(make, 144) == ("step", 32)
    assert tried == [144, 128, 64, 32]
    with pytest.raises(torch.OutOfMemoryError):
        bench_step.fitting(lambda _: make(99), 4)


def test_a_case_of_its_own_process(monkeypatch):
    answer = SimpleNamespace(returncode=0, stdout='compiling ...\n{"stats": 1}\nbye\n', stderr="a warning")
    monkeypatch.setattr(bench_step.subprocess, "run", lambda *_, **__: answer)
    assert bench_step.run_apart("atst_fast", "base") == {"stats": 1}
    answer.returncode, answer.stderr = 1, "out of memory"
    with pytest.raises(pytest.fail.Exception, match=r"(?s)atst_fast: .*out of memory"):
        bench_step.run_apart("atst_fast", "base")
    assert sum(bench_step.LIMITS.values()) < 600


def test_steps_and_profile_need_nothing_that_decodes_audio():
    """A machine with a GPU may have torch, matplotlib and rich alone."""
    code = "import sys; sys.modules.update(dict.fromkeys(('soundfile', 'soxr', 'tyro', 'librosa', 'tensorboard')))"
    imports = "import benchmarks.gpu.bench_step, atst_fast.train.profile"
    subprocess.run([sys.executable, "-c", f"{code}; {imports}"], cwd=machine.ROOT, check=True)


def test_a_run_on_a_gpu_is_one_file_under_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "RESULTS", tmp_path)
    result = gpu_result()
    path = kept.save(result)
    assert path.parent == tmp_path / "some-gpu"
    assert json.loads(path.read_text())["device"]["clocks_sm"] == "1980"
    text = "\n".join(report.tables(result))
    assert "Some GPU, 132 multiprocessors, sm_90, SM clock 1980 MHz" in text
    assert "bfloat16 700 TFLOP/s" in text
    assert [c["ratio_to_atst_fast"] for c in result["cases"]] == [1.0, 6.0]


def test_cases_of_different_batches_are_compared_per_item():
    """Four clips in 2 ms beside sixteen in 4 ms, and what a step says of itself."""
    cases = []
    for provider, clips, seconds in (("atst_fast", 16, 4e-3), ("official_structure", 4, 2e-3)):
        extra = {"items": (clips, "clips"), "flops": 1e12 * clips, "peak_flops": 989e12, "dtype": "bfloat16"}
        extra |= {"reserved_bytes": 3 << 30, "note": f"{clips} clips"}
        case = {"group": "step", "name": f"test_step[base-{provider}]", "extra_info": extra}
        case["params"] = {"size": "base", "provider": provider}
        cases.append(SimpleNamespace(**case, stats=timing.Stats(seconds, 0.0, seconds, 11)))
    result = report.collect(cases, GPU)
    assert [c["ratio_to_atst_fast"] for c in result["cases"]] == [1.0, 2.0]
    assert result["cases"][0]["floor_s"] == pytest.approx(16e12 / 7e14)  # by the rate of bfloat16 products
    text = "\n".join(report.tables(result))
    assert "2,000 clips/s" in text
    assert "16 clips, 4,000 clips/s, 4000 TFLOP/s, 404.4% of peak, 3.0 GiB" in text


def test_every_case_is_written_when_it_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "RESULTS", tmp_path)
    stash = pytest.Stash()
    stash[conftest.GPU_MACHINE] = {
        key: value for key, value in gpu_result().items() if key not in ("cases", "left_out")
    }
    for n, provider in enumerate(("atst_fast", "torch_stft"), 1):
        params, stats = {"size": "batch", "provider": provider}, timing.Stats(n * 1e-3, 0.0, 1e-3, 11)
        conftest.keep(stash, "cuda", Measured("log_mel", f"test_log_mel[{provider}]", params, LOG_MEL, stats))
        (path,) = tmp_path.rglob("*.*")
        assert len(json.loads(path.read_text())["cases"]) == n
    command = [sys.executable, "-m", "benchmarks.report", path]
    said = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, check=True).stdout
    assert "torch_stft    2 ms" in said


def test_a_machine_without_a_gpu_is_told_what_it_lacks(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeError, match="built without CUDA"):
        card.archs()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="no GPU that it can use"):
        card.archs()


def test_the_gpus_of_a_machine(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", [(9, 0), (8, 0), (9, 0)].__getitem__)
    assert card.archs() == "8.0;9.0"
