"""The benchmarks' own machinery: what a run computes from its timings, writes and prints."""

import json
from types import SimpleNamespace

import pytest

from benchmarks import report

RATES = {"copy_bytes_per_s": 1e9, "add_bytes_per_s": 2e9, "scale_bytes_per_s": 1e9, "sgemm_flops": 1e12}
MACHINE = {
    "device": {"name": "Some(R) CPU", "cores": 2, "isa": "avx2"},
    "commit": {"id": "abc", "dirty": True},
    "versions": {"torch": "2"},
    "threads": 1,
    "rates": RATES,
}


def bench(provider, median, size="base", **extra):
    stats = SimpleNamespace(median=median, iqr=median / 10, min=median, rounds=5)
    params = {"provider": provider, "size": size}
    name = f"test_op[{provider}-{size}]"
    return SimpleNamespace(group="op", name=name, params=params, extra_info=extra, stats=stats)


@pytest.fixture
def result():
    cases = [bench("peer", 0.4, bytes=2e8), bench("atst_fast", 0.2, bytes=2e8, flops=1e11), bench("peer", 1e-5, "tiny")]
    return report.collect(cases, MACHINE)


def test_floors_and_ratios(result):
    peer, ours, alone = result["cases"]
    assert (peer["floor_s"], ours["floor_s"], alone["floor_s"]) == (0.1, 0.1, None)
    assert (peer["ratio_to_atst_fast"], ours["ratio_to_atst_fast"], alone["ratio_to_atst_fast"]) == (2.0, 1.0, None)


def test_one_file_per_run(result, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    path = report.save(result)
    assert [p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*.*")] == ["some-cpu-2-cores"]
    assert path.name.endswith("-abc-dirty.json")
    assert json.loads(path.read_text()) == result


def test_table(result):
    text = "\n".join(report.tables(result))
    assert "op base  atst_fast  200 ms  20 ms  500.0 GFLOP/s       50%         1.00" in text
    assert "op base  peer       400 ms  40 ms       0.5 GB/s       25%         2.00" in text
    assert "op tiny  peer        10 us   1 us" in text


def test_picture(result, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    plot.draw(result | {"date": "2020-01-01"}, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 1000
