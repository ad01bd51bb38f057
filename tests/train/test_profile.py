import json
import sys

import pytest

from atst_fast.train import cli, trace

profile = pytest.importorskip("atst_fast.train.profile", reason="needs the extra train")


def span(name, begin, duration, cat="kernel", tid=1):
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": duration, "tid": tid}


def test_kernels_are_sorted_into_the_parts_of_a_step():
    names = {
        "frame_attention_fwd_kernel": "attention",
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma": "attention",
        "nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_TNT": "matrix products",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": "matrix products",
        "add_norm_bwd_kernel": "add_norm",
        "void at::native::vectorized_layer_norm_kernel<float>": "add_norm",
        "bias_gelu_fwd_kernel": "gelu",
        "patch_embed_bwd_kernel": "patch_embed",
        "batch_norm_relu_bwd_kernel": "heads",
        "frame_loss_fwd_kernel": "loss",
        "void atst::adamw_kernel(atst::Launch)": "optimizer",
        "void atst::log_mel_kernel<16>(atst::Args)": "front end",
        "Memcpy HtoD (Pinned -> Device)": "copies",
        "aten::addmm": "matrix products",
        "aten::copy_": "copies",
        "atst_fast::bias_gelu_backward": "gelu",
        "autograd::engine::evaluate_function: ViewBackward0": "other",
    }
    assert {name: trace.part_of(name) for name in names} == names


def test_a_gpu_is_summed_up_by_its_kernels():
    """Two steps on two streams: 100 us with 20 us of nothing, an overlap of 10."""
    events = [
        span("nvjet_a", 1000, 30),
        span("nvjet_a", 1050, 30),
        span("frame_attention_fwd_kernel", 1020, 20, tid=2),
        span("Memcpy HtoD", 1090, 10, cat="gpu_memcpy", tid=2),
        span("aten::mm", 0, 5000, cat="cpu_op"),
        {"ph": "i", "name": "an instant", "ts": 3},
    ]
    found = trace.breakdown(events, steps=2)
    assert found.seconds == pytest.approx(50e-6)
    nonzero = {name: seconds for name, seconds in found.parts.items() if seconds}
    assert nonzero == pytest.approx({"attention": 10e-6, "matrix products": 30e-6, "copies": 5e-6, "idle": 10e-6})
    assert found.items[0] == ("nvjet_a", "matrix products", 1, pytest.approx(30e-6))


def test_a_cpu_is_summed_up_by_its_operators_without_what_they_call():
    events = [
        span(trace.WINDOW, 100, 200, cat="user_annotation"),
        span("aten::linear", 110, 60, cat="cpu_op"),
        span("aten::matmul", 115, 50, cat="cpu_op"),
        span("aten::copy_", 115, 10, cat="cpu_op"),
        span("aten::mm", 130, 30, cat="cpu_op"),
        span("aten::gelu", 200, 40, cat="cpu_op"),
        span("aten::gelu", 210, 40, cat="cpu_op", tid=2),
        span("aten::gelu", 500, 40, cat="cpu_op"),
    ]
    found = trace.breakdown(events, steps=1)
    assert found.seconds == pytest.approx(200e-6)
    nonzero = {name: seconds for name, seconds in found.parts.items() if seconds}
    assert nonzero == pytest.approx({"gelu": 80e-6, "matrix products": 50e-6, "copies": 10e-6, "idle": 90e-6})


@pytest.mark.parametrize("method, title", [("frame", "ATST-Frame"), ("clip", "ATST-Clip")])
def test_profile_of_a_step(tmp_path, capsys, method, title):
    pytest.importorskip("matplotlib", reason="needs the extra eval")
    options = [
        "--method",
        method,
        "--arch",
        "tiny",
        "--batch-size",
        "2",
        "--clip-seconds",
        "1",
        "--steps",
        "1",
        "--warmup",
        "1",
    ]
    assert cli.main(["profile", "--out", str(tmp_path / "p"), "--device", "cpu", *options]) == 0
    said = capsys.readouterr().out
    assert f"{title} tiny, 2 clips, float32, CPU" in said
    shares = {line[:18].strip(): line.split()[-1] for line in said.splitlines() if line[:18].strip() in trace.PARTS}
    assert set(shares) == set(trace.PARTS)
    for part in ("matrix products", "attention", "add_norm", "gelu", "patch_embed", "heads", "optimizer", "front end"):
        assert float(shares[part].rstrip("%")) > 0, part
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["profile.png", "trace.json.gz"]
    assert (tmp_path / "p" / "profile.png").stat().st_size > 10_000
    assert any(e.get("name") == trace.WINDOW for e in trace.read(tmp_path / "p" / "trace.json.gz"))


def test_crops_are_those_of_pretraining(tmp_path):
    of = {method: profile.ProfileConfig(out=tmp_path, method=method) for method in ("frame", "clip")}
    assert of["frame"].samples == (160000,)
    assert of["clip"].samples == (96000, 96000)
    assert profile.ProfileConfig(out=tmp_path, method="clip", clip_seconds=2.0).samples == (32000, 32000)


def test_a_trace_need_not_be_compressed(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": [span("nvjet", 0, 1)]}))
    assert trace.read(tmp_path / "t.json") == [span("nvjet", 0, 1)]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--warmup", "0"], "--warmup must be at least 1, got 0"),
        (["--clip-seconds", "0.1"], "--clip-seconds must be between 1 and 600, got 0.1"),
        (["--device", "tpu"], "--device"),
    ],
)
def test_errors_of_the_user(tmp_path, capsys, options, message):
    pytest.importorskip("matplotlib", reason="needs the extra eval")
    assert cli.main(["profile", "--out", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_nothing_is_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(profile, "run", lambda *_: pytest.fail("ran"))
    assert cli.main(["profile", "--out", str(tmp_path)]) == 2
    assert "matplotlib" in capsys.readouterr().err
