"""The last screen says what the numbers say."""

import json

import pytest

from atst_fast.train.summary import course, verdict


def _results(pretrained, random, std, seeds=3):
    rows = {"pretrained": pretrained, "random": random, "log-mel": 0.5}
    return {name: {"clip_map": {"mean": mean, "std": std, "values": [mean] * seeds}} for name, mean in rows.items()}


@pytest.mark.parametrize(
    "pretrained, std, said",
    [
        (0.9, 0.01, "pretraining helps"),
        (0.9, 0.1, "no clear difference"),
        (0.6, 0.01, "pretraining does not help yet"),
    ],
)
def test_verdict(pretrained, std, said):
    text = verdict(_results(pretrained, 0.8, std), "clip_map")
    assert said in text
    assert "random 0.800, log-mel 0.500" in text


def test_a_verdict_needs_a_spread_and_a_number():
    one = verdict(_results(0.9, 0.8, 0.0, seeds=1), "clip_map")
    assert "one seed has no spread" in one
    assert "helps" not in one
    assert "not measured" in verdict(_results(float("nan"), float("nan"), float("nan")), "clip_map")


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
