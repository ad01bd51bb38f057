"""``atst-fast bench``: what it prints, writes and draws, and what it says to a user's mistakes."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from atst_fast.bench import machine
from atst_fast.bench.cases import OPERATORS
from atst_fast.bench.operator import OURS, Provider
from atst_fast.train import bench, cli
from tests.bench.fake import CPU


@pytest.fixture(autouse=True)
def _here(monkeypatch, threads):
    """Rates that nobody has to measure, and no wait for a second core."""
    threads(1)
    monkeypatch.setattr(machine, "describe", lambda counts: {**CPU, "counts": sorted(counts)})


def run(*arguments):
    return cli.main(["bench", "--device", "cpu", "--seconds", "0.001", *map(str, arguments)])


def test_a_table_and_a_file(tmp_path, capsys):
    path = tmp_path / "new" / "r.json"
    assert run("add_branch", "bias_gelu", "--size", "tiny", "--json", path) == 0
    said = capsys.readouterr().out
    for words in ("Some(R) CPU", "add_branch: C++", "bias_gelu tiny backward", "torch", f"written to {path}"):
        assert words in said
    result = json.loads(path.read_text())
    assert [c["params"]["provider"] for c in result["cases"]] == 4 * [OURS, "torch"]
    assert all(c["extra_info"]["parity"]["error"] <= 2e-5 for c in result["cases"])
    assert result["left_out"] == []
    assert set(result["cases"][0]) >= {"median_s", "iqr_s", "min_s", "rounds", "floor_s", "share_of_copy", "name"}


def test_an_earlier_result_is_compared_with(tmp_path, capsys):
    path = tmp_path / "r.json"
    assert run("add_branch", "--size", "tiny", "--json", path) == 0
    result = json.loads(path.read_text())
    for case in result["cases"]:
        case["median_s"] *= 1000
        case["iqr_s"] = 0
    path.write_text(json.dumps(result))
    capsys.readouterr()
    assert run("add_branch", "--size", "tiny", "--compare", path) == 0
    rows = capsys.readouterr().out.partition("now / before")[2]
    assert rows.count("faster") + rows.count("same") == 4
    assert "±" in rows


def test_pictures(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    short = replace(OPERATORS["frame_loss"], curves={"cpu": ("tiny", {"tokens": (10, 20)})})
    monkeypatch.setitem(OPERATORS, "frame_loss", short)
    assert run("frame_loss", "--size", "small", "--out", tmp_path, "--curves", "tokens", "--providers", "torch") == 0
    names = {"times.png", "roofline.png", "scaling-frame_loss.png"}
    assert {p.name for p in tmp_path.iterdir()} == names
    said = capsys.readouterr().out
    assert all(f"drawn to {tmp_path / name}" in said for name in names)
    assert "frame_loss over tokens" in said


def test_providers_are_chosen_and_ours_is_always_among_them():
    config = bench.BenchConfig(ops=("frame_attention",), providers=("sdpa",), size=("small",))
    assert {c.provider for c in bench.chosen(config, "cpu")} == {OURS, "sdpa"}
    assert {c.size for c in bench.chosen(bench.BenchConfig(), "cpu")} == {"clip", "batch", "small", "base"}
    assert {c.operator.name for c in bench.chosen(bench.BenchConfig(), "cuda")} == {*OPERATORS}
    over = bench.chosen(replace(config, curves=("threads", "batch")), "cpu")
    assert {c.kind for c in over} == {"", "over threads", "over batch"}


def test_wrong_results_end_with_code_1(monkeypatch, capsys):
    operator = OPERATORS["select_rows"]
    wrong = {**operator.providers, "index_select": Provider(lambda i: lambda: 2 * i.x[i.listed])}
    monkeypatch.setitem(OPERATORS, "select_rows", replace(operator, providers=wrong))
    assert run("select_rows", "--size", "tiny") == 1
    assert "FAILED: index_select: no parity: its error is 1.0e+00" in capsys.readouterr().out


def test_what_was_measured_before_an_interruption_is_shown(monkeypatch, capsys, tmp_path):
    def stop(x):
        raise KeyboardInterrupt

    operator = OPERATORS["select_rows"]
    providers = {**operator.providers, "index_select": Provider(stop)}
    monkeypatch.setitem(OPERATORS, "select_rows", replace(operator, providers=providers))
    assert run("select_rows", "--size", "tiny", "--json", tmp_path / "r.json") == 130
    assert "select_rows tiny" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "r.json").read_text())["cases"]) == 1


def test_threads_of_the_cases_have_rates_of_their_own():
    cases = bench.chosen(bench.BenchConfig(ops=("log_mel",)), "cpu")
    assert bench.describe("cpu", cases)["counts"] == [1, 2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["log_mell"], "the operator must be one of log_mel, kaldi_fbank, augment_views, "),
        (["log_mel", "--size", "base"], "--size must be one of tiny, clip, batch, got 'base'"),
        (["log_mel", "--providers", "flex"], "--providers must be one of atst_fast, torch_stft, "),
        (["--curves", "height"], "--curves must be one of frames, tokens, batch, depth, threads, got 'height'"),
        (["--seconds", "0"], "--seconds must be positive and at most 60, got 0.0"),
        (["--compare", "/nowhere.json"], "[Errno 2] No such file or directory: '/nowhere.json'"),
        (["--out", "/proc/nowhere"], "cannot make the folder /proc/nowhere: "),
        (["--json", "/proc/nowhere/r.json"], "cannot make the folder /proc/nowhere: "),
        (["--json", "/tmp"], "--json must be a file, got the folder /tmp"),
        (["ema_update_", "--curves", "tokens"], "--curves must be one of depth, threads, got 'tokens'"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert cli.main(["bench", "--device", "cpu", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"atst-fast bench: {message}")
    assert said.count("\n") == 1


def test_a_file_that_is_no_result_is_one_line(tmp_path, capsys):
    (tmp_path / "r.json").write_text("{}")
    assert run("--compare", tmp_path / "r.json") == 2
    said = capsys.readouterr().err
    assert said == f"atst-fast bench: {tmp_path}/r.json is no result of a benchmark: it lacks 'cases'\n"


def test_matplotlib_is_missed_before_anything_is_measured(monkeypatch, tmp_path, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert run("--out", tmp_path / "pictures") == 2
    said = capsys.readouterr()
    assert said.err == ("atst-fast bench: --out needs the package matplotlib: pip install 'atst_fast[train,bench]'\n")
    assert said.out == ""
    assert not (tmp_path / "pictures").exists()


def test_operators_are_listed(capsys):
    assert run("--list") == 0
    said = capsys.readouterr().out
    assert all(name in said for name in OPERATORS)
    assert "sdpa_math" in said


def test_a_build_without_cuda_kernels_is_told(monkeypatch, capsys):
    monkeypatch.setattr(bench, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(bench, "build_info", lambda: {"cuda": "none: nvcc was not found"})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert bench.check(bench.BenchConfig()) == "cuda"
    assert "this build has no CUDA kernels (none: nvcc was not found)" in capsys.readouterr().err


def test_it_needs_neither_pytest_nor_matplotlib():
    """Nor any peer; they are imported where they are measured."""
    blocked = ("pytest", "pytest_benchmark", "matplotlib", "librosa", "torchaudio", "soundfile", "benchmarks")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
    code += "from atst_fast.bench import machine\nfrom atst_fast.train import cli\n"
    code += f"machine.rates = lambda: {CPU['rates']}\n"
    code += "sys.exit(cli.main('bench frame_loss --device cpu --size tiny --seconds 0.001'.split()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=machine.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "frame_loss tiny forward" in done.stdout
