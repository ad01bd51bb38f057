"""The benchmarks of a GPU where there is none: each case's call on the CPU; timing, report and roofline with a fake."""

import functools
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import card, machine, report
from benchmarks.gpu import (
    bench_add_norm,
    bench_augment,
    bench_ema,
    bench_epilogue,
    bench_frame_attention,
    bench_heads,
    bench_kaldi_fbank,
    bench_log_mel,
    bench_patch_embed,
    bench_step,
    conftest,
    timing,
)
from tests import tolerances
from tests.cuda.test_augment import make_case


class Clock:
    """A GPU on which each call takes as long as it says."""

    def __init__(self):
        self.now, self.cleared = 0.0, 0

    def call(self, *seconds):
        left = list(seconds)

        def run():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run

    def clear_cache(self):
        self.cleared += 1
        self.now += 100.0

    def mark(self):
        return self.now

    def seconds(self, begin, end):
        return end - begin

    def captured(self, call, times):
        return lambda: [call() for _ in range(times)]


def test_only_the_call_is_timed_and_the_cache_is_cleared_before_it():
    clock = Clock()
    stats = timing.launched(clock.call(9.0, 8.0, 7.0, 0.25), clock)
    assert (stats.median, stats.iqr, stats.min, stats.rounds) == pytest.approx((0.25, 0, 0.25, 11))
    assert clock.cleared == 12


def test_a_graph_is_timed_per_call_and_leaves_the_cache_alone():
    clock = Clock()
    stats = timing.replayed(clock.call(1e-4), clock)
    assert (stats.median, stats.rounds) == (pytest.approx(1e-4), 200)
    assert clock.cleared == 0


@pytest.mark.parametrize("provider", [p for p in bench_log_mel.PROVIDERS if "compiled" not in p])
@pytest.mark.parametrize("dtype", ["int16", "float32"])
def test_log_mel_cases_compute_one_thing(provider, dtype):
    wave = bench_log_mel.make_wave("tiny", dtype, "cpu")
    ours = bench_log_mel.PROVIDERS["atst_fast"](wave)().flatten(0, 1)
    other = bench_log_mel.PROVIDERS[provider](wave)().reshape(ours.shape)
    assert (ours - other).abs().max() < 0.05  # torchaudio floors over the batch's first axes in its own way
    assert bench_log_mel.work("batch", dtype)["bytes"] == 144 * (160000 * wave.element_size() + 1001 * 64 * 4)


@pytest.mark.parametrize("provider", ["torch_batched", "torch_each_clip"])
@pytest.mark.parametrize("model, frame_bytes", [("ssast", 998 * 128 * 4), ("asit", 998 * 128 * 4)])
def test_kaldi_fbank_cases_compute_one_thing(provider, model, frame_bytes):
    arguments = bench_kaldi_fbank.make_wave("tiny", model, "float32", "cpu"), bench_kaldi_fbank.cpu.RATES[model]
    ours, other = (bench_kaldi_fbank.PROVIDERS[name](*arguments)() for name in ("atst_fast", provider))
    torch.testing.assert_close(ours, other, rtol=0, atol=tolerances.FBANK_OTHER_WAY)
    samples = 10 * bench_kaldi_fbank.cpu.RATES[model]
    assert bench_kaldi_fbank.work("batch", model, "int16")["bytes"] == 144 * (2 * samples + frame_bytes)


def test_augment_cases_compute_one_thing():
    arguments = bench_augment.make_arguments("tiny", "cpu")
    ours, plain = (bench_augment.PROVIDERS[p](*arguments)() for p in ("atst_fast", "plain PyTorch"))
    torch.testing.assert_close(ours, plain, rtol=0, atol=tolerances.AUGMENT)


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_cases_of_the_heads_compute_one_thing(way):
    norms, losses = bench_heads.norm_inputs("tiny", "cpu", torch.float32), bench_heads.loss_inputs("tiny", "cpu")
    for providers, inputs in ((bench_heads.NORMS, norms), (bench_heads.LOSSES, losses)):
        results = []
        for name in ("atst_fast", "torch"):
            torch.manual_seed(0)
            results.append(bench_heads.make(providers[name], name, way, inputs)())
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("bank_frames, canvas", [(50, None), (30, (20, 60)), (90, (16, 75))])
def test_the_peer_of_augment_takes_any_draws(seed, bank_frames, canvas):
    arguments = make_case(seed, 6, 16, 50, slots=3, bank_frames=bank_frames, canvas=canvas)
    plain = bench_augment.batched(*arguments)
    torch.testing.assert_close(plain, torch.ops.atst_fast.augment(*arguments), rtol=0, atol=tolerances.AUGMENT)


def test_a_peer_is_compiled_for_its_own_sizes():
    shapes = []

    def backend(graph, inputs):
        shapes.extend(tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor))
        return graph

    for n in (3, 5):
        call = functools.partial(torch.compile, backend=backend)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", call)
            timing.compiled(lambda x: x + 1)(torch.zeros(n))
    assert shapes == [(3,), (5,)]


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_cases_of_a_block_compute_one_thing(way):
    norm, epilogue = bench_add_norm, bench_epilogue
    cases = [(norm.PROVIDERS, norm.make, norm.make_inputs("tiny", "cpu", torch.float32))]
    for providers, branch in ((epilogue.GELUS, False), (epilogue.BRANCHES, True)):
        cases.append(
            (providers, epilogue.make, epilogue.make_inputs("tiny", "cpu", branch=branch, dtype=torch.float32))
        )
    for providers, make, inputs in cases:
        results = []
        for name in ("atst_fast", "torch"):
            torch.manual_seed(0)  # of the gradients that are sent
            results.append(make(providers[name], name, way, inputs)())
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["teacher", "student", "step"])
def test_cases_of_the_mlp_compute_one_thing(way):
    torch.manual_seed(0)
    inputs = bench_epilogue.make_mlp_inputs("tiny", "cpu", dtype=torch.float32)
    results = []
    for name in ("atst_fast", "atst_fast_unfused", "torch"):
        torch.manual_seed(0)  # of the gradient that is sent
        results.append(bench_epilogue.make_mlp(bench_epilogue.MLPS[name], name, way, inputs)())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_patch_embed_cases_compute_one_thing(masked):
    torch.manual_seed(0)
    arguments = bench_patch_embed.make("tiny", masked, "cpu")
    ours = bench_patch_embed.ours(*arguments)
    for peer in (bench_patch_embed.windows, bench_patch_embed.convolution):
        theirs = peer(*arguments)
        assert theirs.dtype == ours.dtype
        assert (theirs - ours).abs().max() <= tolerances.BF16_RTOL * ours.abs().max()
    base = bench_patch_embed.work("base", masked, False)
    assert base["bytes"] == pytest.approx(148e6 if masked else 185e6, rel=0.01)
    x, select = bench_patch_embed.make_rows("tiny", "cpu")
    assert (len(x), x.shape[1]) == (20, 48)
    assert 0 < int(select.count) <= len(select.rows)


@pytest.mark.parametrize("lengths", bench_frame_attention.LENGTHS)
def test_attention_cases_compute_one_thing(monkeypatch, lengths):
    """What runs on a CPU: SDPA with its mask, FlexAttention with its own, forward and not compiled, flash with none."""
    bench = bench_frame_attention
    monkeypatch.setattr(timing, "compiled", lambda call: call)
    given = bench.make_inputs("tiny", lengths, "cpu")
    valid = torch.arange(20) < torch.tensor(given.numbers)[:, None]
    makers = {"ours": bench.ours, "packed": bench.ours_packed, "math": bench.with_sdpa(bench.SDPBackend.MATH)}
    makers |= {"flex": bench.with_flex} | ({} if lengths == "ragged" else {"flash": bench.with_flash})
    results, grads = {}, {}
    for name, make in makers.items():
        attend, x = make(given)
        x = x.detach().requires_grad_(name != "flex")
        y = attend(x)
        results[name] = (y[valid] if y.dim() == 3 else y).detach().float()
        if name != "flex":
            (dx,) = torch.autograd.grad(y if y.dim() == 2 else y[valid], x, results[name].bfloat16())
            grads[name] = (dx[valid] if dx.dim() == 3 else dx).float()
    for others in (results, grads):
        for other in others.values():
            scale = others["ours"].abs().max().item()
            torch.testing.assert_close(other, others["ours"], rtol=0, atol=tolerances.BF16_RTOL * scale)


def test_attention_cases_run_both_ways():
    given = bench_frame_attention.make_inputs("tiny", "ragged", "cpu")
    for way, products, rows in (("forward", 2, 3 * 37 + 60), ("backward", 5, 5 * 37 + 3 * 60)):
        bench_frame_attention.timed(bench_frame_attention.ours(given), way)()
        work = bench_frame_attention.work(given, way)
        assert sorted(given.numbers) == [5, 12, 20]
        flops = products * 2 * 128 * (25 + 144 + 400)
        assert work == {"bytes": 2 * 128 * rows, "flops": flops, "dtype": "bfloat16"}


def test_teacher_updates_compute_one_thing():
    moved = {}
    for provider in bench_ema.cpu.UPDATES:
        torch.manual_seed(0)
        student, teacher = bench_ema.tensors("tiny", "cpu")
        teacher = [t + 1 for t in teacher]
        bench_ema.updates(provider)(teacher, student)()
        moved[provider] = torch.cat([t.flatten() for t in teacher])
    for other in moved.values():
        torch.testing.assert_close(other, moved["atst_fast"])


@pytest.mark.parametrize("provider", ["atst_fast", "torch_fused", "torch_foreach"])
@pytest.mark.parametrize("clip", [False, True])
def test_optimizer_steps_run(provider, clip):
    step, parameters = bench_ema.make_step(provider, "tiny", clip, "cpu")
    step()
    assert parameters > 50_000


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


def gpu_result():
    rates = {"copy_bytes_per_s": 4e12, "add_bytes_per_s": 4.2e12, "scale_bytes_per_s": 4.1e12}
    rates |= {"sgemm_flops": 5e13, "bf16_flops": 7e14}
    device = {"name": "Some GPU", "cores": 132, "isa": "sm_90", "kernels": "sm_90", "clocks_sm": "1980"}
    here = {"device": device, "commit": {"id": "abc", "dirty": False}, "versions": {"torch": "2"}, "threads": 8}
    cases = []
    for provider, factor in (("atst_fast", 1.5), ("torch_stft", 9.0)):
        extra = bench_log_mel.work("batch", "float32")
        params = {"size": "batch", "provider": provider}
        stats = timing.Stats(factor * extra["bytes"] / 4e12, 1e-6, 1e-5, 20)
        name = f"test_log_mel[batch-{provider}]"
        cases.append(SimpleNamespace(group="log_mel", name=name, params=params, extra_info=extra, stats=stats))
    return report.collect(cases, {**here, "rates": rates})


def test_a_run_on_a_gpu_is_one_file_under_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    result = gpu_result()
    path = report.save(result)
    assert path.parent == tmp_path / "some-gpu"
    assert json.loads(path.read_text())["device"]["clocks_sm"] == "1980"
    text = "\n".join(report.tables(result))
    assert "Some GPU, 132 multiprocessors, sm_90, SM clock 1980 MHz" in text
    assert "bfloat16 700 TFLOP/s" in text
    assert [c["ratio_to_atst_fast"] for c in result["cases"]] == [1.0, 6.0]


def test_cases_of_different_batches_are_compared_per_item():
    """Four clips in 2 ms beside sixteen in 4 ms, and what a step says of itself."""
    here = {key: value for key, value in gpu_result().items() if key != "cases"}
    cases = []
    for provider, clips, seconds in (("atst_fast", 16, 4e-3), ("official_structure", 4, 2e-3)):
        extra = {"items": (clips, "clips"), "flops": 1e12 * clips, "peak_flops": 989e12, "dtype": "bfloat16"}
        extra |= {"reserved_bytes": 3 << 30, "note": f"{clips} clips"}
        case = {"group": "step", "name": f"test_step[base-{provider}]", "extra_info": extra}
        case["params"] = {"size": "base", "provider": provider}
        cases.append(SimpleNamespace(**case, stats=timing.Stats(seconds, 0.0, seconds, 11)))
    result = report.collect(cases, here)
    assert [c["ratio_to_atst_fast"] for c in result["cases"]] == [1.0, 2.0]
    assert result["cases"][0]["floor_s"] == pytest.approx(16e12 / 7e14)  # by the rate of bfloat16 products
    text = "\n".join(report.tables(result))
    assert "4,000 clips/s" in text
    assert "16 clips, 4000 TFLOP/s, 404.4% of peak, 3.0 GiB" in text


def test_every_case_is_written_when_it_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    stash = pytest.Stash()
    stash[report.GPU_MACHINE] = {key: value for key, value in gpu_result().items() if key != "cases"}
    for n, provider in enumerate(("atst_fast", "torch_stft"), 1):
        item = SimpleNamespace(name=f"test_log_mel[{provider}]", config=SimpleNamespace(stash=stash))
        item.callspec = SimpleNamespace(params={"provider": provider})
        item.get_closest_marker = lambda name: SimpleNamespace(kwargs={"group": "log_mel"})
        conftest.keep(item, timing.Stats(n * 1e-3, 0.0, 1e-3, 11), bench_log_mel.work("batch", "float32"))
        (path,) = tmp_path.rglob("*.*")
        assert len(json.loads(path.read_text())["cases"]) == n
    command = [sys.executable, "-m", "benchmarks.report", path]
    said = subprocess.run(command, cwd=machine.ROOT, capture_output=True, text=True, check=True).stdout
    assert "torch_stft    2 ms" in said


def test_a_copy_without_git_is_known_by_its_files(monkeypatch):
    def no_git(*_):
        raise FileNotFoundError

    monkeypatch.setattr(machine, "_named", "")
    monkeypatch.setattr(machine, "_git", no_git)
    assert machine._commit() == {"id": f"files-{machine._hash()}", "dirty": False}
    machine.name_commit("abc")
    assert machine._commit() == {"id": "abc", "dirty": False}


def test_roofline(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    result = gpu_result() | {"date": "2020-01-01"}
    assert plot.roofline(result, tmp_path / "r.png")
    assert (tmp_path / "r.png").stat().st_size > 10000
    for case in result["cases"]:
        del case["extra_info"]["flops"]
    assert not plot.roofline(result, tmp_path / "none.png")


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


def test_what_nvidia_smi_says(monkeypatch):
    said = "580.159.04, 1980, 1980, 3201, 3201, 700.00\n"
    monkeypatch.setattr(machine.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=said))
    assert machine.nvidia_smi()["driver_version"] == "580.159.04"
    assert machine.nvidia_smi()["clocks_max_mem"] == "3201"

    def absent(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(machine.subprocess, "run", absent)
    assert machine.nvidia_smi() == {}


def test_what_a_gpu_run_says_of_its_machine(monkeypatch):
    properties = SimpleNamespace(name="Some GPU", multi_processor_count=132, major=9, minor=0, L2_cache_size=1 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(timing, "Cuda", Clock)
    asked = []
    monkeypatch.setattr(machine, "nvidia_smi", lambda: {"driver_version": "580", "clocks_sm": str(len(asked))})
    monkeypatch.setattr(machine, "bandwidths", lambda *a: asked.append(a[1]) or {"copy_bytes_per_s": 4e12})
    monkeypatch.setattr(machine, "sgemm_rate", lambda n, device, median, *dtype: asked.append((device, *dtype)) or 1.0)
    says = machine.describe_gpu()
    assert says["device"]["name"] == "Some GPU"
    assert says["device"]["isa"] == "sm_90"
    assert says["device"]["clocks_sm"] == "3"  # read after the products, which keep the GPU from idling
    assert says["versions"]["driver"] == "580"
    assert asked == ["cuda", ("cuda",), ("cuda", torch.bfloat16)]


def test_rates_come_from_whoever_measures_them():
    assert machine.bandwidths(1 << 10, median=lambda call: 1.0)["add_bytes_per_s"] == 12 << 10
    assert machine.sgemm_rate(16, median=lambda call: 2.0, dtype=torch.bfloat16) == 16**3
