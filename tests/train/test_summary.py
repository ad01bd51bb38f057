"""The last screen says what the numbers say."""

import json
import math

import pytest

from atst_fast.train.summary import course, verdict


def _results(pretrained, random):
    rows = {"pretrained": pretrained, "random": random, "log-mel": [0.5] * len(random)}
    return {name: {"clip_map": {"mean": sum(values) / len(values), "values": values}} for name, values in rows.items()}


@pytest.mark.parametrize(
    "pretrained, random, said",
    [
        ([0.9, 0.91, 0.89], [0.8, 0.8, 0.8], "pretraining helps (clip_map, +0.100 ± 0.010)"),
        ([0.9, 0.9, 0.9], [0.8, 0.95, 0.65], "no clear difference (clip_map, +0.100 ± 0.150)"),  # random ones differ
        ([0.9, 1.0, 0.75], [0.8, 0.9, 0.66], "pretraining helps (clip_map, +0.097 ± 0.006)"),  # both move together
        ([0.6, 0.61, 0.59], [0.8, 0.8, 0.8], "pretraining does not help yet"),
    ],
)
def test_verdict(pretrained, random, said):
    text = verdict(_results(pretrained, random), "clip_map")
    assert said in text
    assert f"random {sum(random) / 3:.3f}, log-mel 0.500" in text


def test_a_verdict_needs_a_spread_and_a_number():
    one = verdict(_results([0.9], [0.8]), "clip_map")
    assert "one seed has no spread" in one
    assert "helps" not in one
    assert "not measured" in verdict(_results([math.nan] * 2, [math.nan] * 2), "clip_map")


def test_course(tmp_path):
    log = tmp_path / "log.jsonl"
    assert course(log) == []
    rows = [
        {"step": s, "loss": 1 / s, "std_student": 0.05, "std_teacher": 0.06, "clips_per_s": float(s)} for s in (1, 2, 4)
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "lo')  # a power cut
    lines = dict(course(log))
    assert lines["loss"] == "1.000 at step 1, 0.250 at step 4"
    assert lines["speed"] == "2.0 clips/s"
