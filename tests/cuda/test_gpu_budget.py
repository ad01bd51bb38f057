"""The model behind docs/gpu_budget.md, and that the page shows what it says."""

import json

import pytest

from benchmarks import gpu_budget
from tests.cuda import static

PLAIN = static.Code(0, 0x40, {"LDG.E.128": 2, "FFMA": 8, "IADD3": 2})
SHORT = static.Code(0x50, 0x60, {"LDG.E.128": 2, "FFMA": 4})
OUTER = static.Code(0, 0x80, {"LDG.E.128": 4, "FFMA": 12, "IADD3": 2})
RECORD = static.Record("k", 90, 32, 0, 0, 0, 0, loops=(PLAIN, SHORT, OUTER))


def test_the_loop_that_does_the_work_is_found_by_what_it_holds():
    assert gpu_budget.loop(RECORD, LDG_128=2) == PLAIN
    assert gpu_budget.per(4, LDG_128=2)(RECORD, "all") == 3
    assert gpu_budget.per(4, LDG_128=2, FFMA=4)(RECORD, "FFMA") == 1
    with pytest.raises(LookupError, match="no longer fits the kernel"):
        gpu_budget.loop(RECORD, LDG_128=3)


def test_how_long_each_resource_is_busy():
    work = gpu_budget.Work("x/k", "", 4_300_000, 1000, gpu_budget.per(4, LDG_128=2), wavefronts=132)
    busy = gpu_budget.times(work, RECORD)
    assert busy["memory"] == pytest.approx(1e-3)
    assert busy["float32"] == pytest.approx(4.3e6 * 2 / (132 * 128 * 1.98e9))
    assert busy["issue"] == pytest.approx(4.3e6 * 3 / 32 / (132 * 4 * 1.98e9))
    assert busy["shared"] == pytest.approx(4.3e6 / 1.98e9)


def test_a_measurement_is_shown_as_soon_as_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_budget, "RESULTS", tmp_path)
    work = next(w for w in gpu_budget.WORK if w.kernel == "ema/ema_kernel")
    assert gpu_budget.measured(work) == "not measured"
    case = {"group": "ema_update_", "name": "test_ema_update[base-atst_fast]", "median_s": 3e-4}
    case["params"] = {"size": "base", "provider": "atst_fast"}
    (tmp_path / "nvidia-h200").mkdir()
    (tmp_path / "nvidia-h200" / "20300101T000000-abc.json").write_text(json.dumps({"cases": [case]}))
    assert gpu_budget.measured(work) == "0.300 ms"
    step = {"group": "step", "name": "test_step[base-atst_fast]", "median_s": 1.0, "params": case["params"]}
    (tmp_path / "nvidia-h200" / "20300101T000001-abc.json").write_text(json.dumps({"cases": [step]}))
    assert gpu_budget.measured(work) == "0.300 ms"
    assert gpu_budget.measured(gpu_budget.WORK[-1]) == "not measured"


def predicted(lines):
    return [line.split(" | ")[:8] for line in lines]


@pytest.mark.skipif(static.missing() is not None, reason=static.missing() or "")
def test_the_page_shows_what_the_model_says():
    if "release 13.0" not in static.nvcc_version():
        pytest.skip("another nvcc makes other code; the page is about that of CUDA 13.0")
    shown = gpu_budget.DOC.read_text().partition(gpu_budget.MARKS[0])[2].partition(gpu_budget.MARKS[1])[0]
    # but for the last column: whoever measures here has not yet written the page
    assert predicted(shown.splitlines()) == predicted(gpu_budget.table()), "run python -m benchmarks.gpu_budget --write"
