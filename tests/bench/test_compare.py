"""Two results beside each other."""

import json
import math

import pytest

from atst_fast.bench import compare
from tests.bench.fake import case, cpu_result


@pytest.mark.parametrize(
    "now, spread, ratio, verdict",
    [
        (1.0, 0.0, "1.00", "same"),
        (1.015, 0.0, "1.01", "same"),  # within what two runs always differ by
        (1.03, 0.0, "1.03", "slower"),
        (0.97, 0.0, "0.97", "faster"),
        (1.2, 0.1, "1.20", "same"),  # by the spreads of both
        (0.84, 0.1, "0.84", "same"),
        (1.25, 0.1, "1.25", "slower"),
        (0.81, 0.1, "0.81", "faster"),
    ],
)
def test_a_change_is_told_from_noise(now, spread, ratio, verdict):
    before = cpu_result(case("atst_fast", 1.0, iqr=spread))
    after = cpu_result(case("atst_fast", now, iqr=spread * now))
    (change,) = compare.changes(after, before)
    assert change.band == pytest.approx(max(2 * spread, 0.02))
    line = compare.lines(after, before)[-1]
    assert line.split()[-4:] == [ratio, "±", f"{change.band:.0%}", verdict]


def test_only_the_same_case_is_compared():
    before = cpu_result(case("peer", 1.0), case("atst_fast", 1.0, "tiny"), case("atst_fast", 1.0, more={"threads": 1}))
    after = cpu_result(case("atst_fast", 2.0), case("atst_fast", 2.0, "tiny"))
    assert [c.case["params"]["size"] for c in compare.changes(after, before)] == ["tiny"]
    assert compare.lines(after, before)[-1] == "  1 cases are not in the earlier result"
    assert compare.lines(cpu_result(), before)[-1] == "  no case is in both"


def test_what_else_differs_is_said():
    before = cpu_result(case("atst_fast", 1.0), threads=16, versions={"torch": "1"})
    text = "\n".join(compare.lines(cpu_result(case("atst_fast", 1.0)), before))
    assert "now (abc with changes) beside 2030-01-01T00:00:00+00:00 (abc with changes)" in text
    assert "another number of threads: 2, before 16" in text
    assert "another torch: 2, before 1" in text
    assert "another device" not in text


def test_a_result_survives_its_file(tmp_path):
    path, result = tmp_path / "r.json", cpu_result(case("atst_fast", 1.0, more={"push": True}))
    path.write_text(json.dumps(result))
    assert len(compare.changes(result, compare.load(path))) == 1


def written(**changes):
    result = cpu_result(case("atst_fast", 1.0))
    result["cases"][0].update(changes)
    return json.dumps(result)


@pytest.mark.parametrize(
    "text, why",
    [
        ("{", "it is not JSON"),
        ("{}", "it lacks 'cases'"),
        ('{"cases": [{"group": "op"}]}', "it lacks 'params'"),
        ('{"cases": []}', "it lacks 'device'"),
        ("[]", "it has another form"),
        ("[" * 10**5, "it is not JSON"),
        (written(median_s=0), "its test_op has the median 0 and the spread 0.1"),
        (written(median_s=None), "its test_op has the median None and"),
        (written(iqr_s=-1), "its test_op has the median 1.0 and the spread -1"),
        (written(median_s=math.nan), "its test_op has the median nan and"),
    ],
)
def test_a_file_that_is_no_result(tmp_path, text, why):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError, match=f"bench: .*r.json is no result of a benchmark: {why}"):
        compare.load(tmp_path / "r.json")
