"""What a run computes from its timings, writes and prints."""

import json

import pytest

from atst_fast.bench import report
from benchmarks import report as kept
from tests.bench.fake import CPU, case, cpu_result, left_out


@pytest.fixture
def result():
    ours = case("atst_fast", 0.2, bytes=2e8, flops=1e11, parity={"error": 2e-7, "allowed": 2e-5}, runs="C++ (avx2)")
    return cpu_result(case("peer", 0.4, bytes=2e8), ours, case("peer", 1e-5, "tiny"))


def test_floors_shares_and_ratios(result):
    peer, ours, alone = result["cases"]
    assert (peer["floor_s"], ours["floor_s"], alone["floor_s"]) == (0.1, 0.1, None)
    assert (peer["floor_by"], ours["floor_by"], alone["floor_by"]) == ("bytes", "bytes", None)
    assert (peer["ratio_to_atst_fast"], ours["ratio_to_atst_fast"], alone["ratio_to_atst_fast"]) == (2.0, 1.0, None)
    assert (ours["share_of_copy"], ours["share_of_products"]) == (pytest.approx(1.0), pytest.approx(0.5))
    assert (peer["share_of_copy"], peer["share_of_products"]) == (pytest.approx(0.5), None)
    assert (alone["share_of_copy"], alone["share_of_products"]) == (None, None)


def test_a_case_has_the_rates_of_its_threads():
    slow = {**CPU["rates"], "sgemm_flops": 1e11}
    cases = [case("atst_fast", 1.0, flops=1e11, more={"threads": n}) for n in (1, 2)]
    one, two = cpu_result(*cases, rates_of_threads={"1": slow})["cases"]
    assert (one["floor_s"], two["floor_s"]) == (1.0, 0.1)
    assert (one["ratio_to_atst_fast"], two["ratio_to_atst_fast"]) == (1.0, 1.0)


def test_one_file_per_run(result, tmp_path, monkeypatch):
    monkeypatch.setattr(kept, "RESULTS", tmp_path)
    path = kept.save(result)
    assert [p.relative_to(tmp_path).parts[0] for p in tmp_path.rglob("*.*")] == ["some-cpu-2-cores"]
    assert path.name == "20300101T000000-abc-dirty.json"
    assert json.loads(path.read_text()) == result


def test_table(result):
    text = "\n".join(report.tables(result))
    assert "Some(R) CPU, 2 cores, avx2, 2 threads, torch 2, commit abc with changes" in text
    assert "op: C++ (avx2)" in text
    ours, peer, alone = (line.split() for line in text.splitlines()[-3:])
    assert ours == ["op", "base", "atst_fast", "200", "ms", "20", "ms", "1.0", "GB/s", "100%", "50%", "1.00", "2e-07"]
    assert peer == ["op", "base", "peer", "400", "ms", "40", "ms", "0.5", "GB/s", "50%", "2.00"]
    assert alone == ["op", "tiny", "peer", "10", "us", "1", "us"]


def test_rates_are_shown_in_the_unit_that_binds():
    (ours,) = report.tables(cpu_result(case("atst_fast", 0.1, flops=5e11, bytes=1)))[-1:]
    assert "5.0 TFLOP/s" in ours
    (ours,) = report.tables(cpu_result(case("atst_fast", 0.1, bytes=1e8, items=(3, "clips"), note="all")))[-1:]
    assert "1.0 GB/s" in ours
    assert ours.endswith("all, 30 clips/s")


def test_a_wide_spread_is_pointed_out():
    for spread, noisy in ((0.06, True), (0.05, False)):
        (line,) = report.tables(cpu_result(case("atst_fast", 0.1, iqr=spread)))[-1:]
        assert line.endswith("noisy") is noisy


def test_what_has_no_time_says_why():
    missing = [left_out("no parity: its error is 1", True, size=str(n)) for n in range(5)]
    missing.append(left_out("x is not installed (pip install x)", False))
    result = report.collect([case("atst_fast", 1.0)], {**CPU, "date": "2030"}, missing)
    assert report.tables(result)[-2:] == [
        "  FAILED: peer: no parity: its error is 1 (0; 1; 2 and 2 more)",
        "  not run: peer: x is not installed (pip install x)",
    ]
    assert len(json.loads(json.dumps(result))["left_out"]) == 6


def test_a_group_without_any_time_is_shown():
    result = report.collect([], CPU, [left_out("RuntimeError: no", True)])
    assert report.tables(result)[-2:] == ["op", "  FAILED: peer: RuntimeError: no (base)"]
