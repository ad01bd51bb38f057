"""Scores: cases counted by hand, and sed_eval as an independent check (extra eval-check)."""

import inspect
import sys
from functools import partial

import numpy as np
import pytest

from atst_fast.train.metrics import (
    Event,
    best_thresholds,
    clip_map,
    event_counts,
    events_of,
    frame_values,
    median_filter,
    roll,
    segment_counts,
    top1,
)

LABELS = ["bell", "dog", "rain"]


def test_segments_counted_by_hand():
    true = [Event("dog", 0.5, 2.2), Event("rain", 4.0, 5.0)]  # dog: seconds 0, 1, 2; rain: second 4
    predicted = [Event("dog", 1.1, 3.5), Event("bell", 0.0, 0.1)]  # dog: seconds 1, 2, 3; bell: second 0
    counts = segment_counts([(true, predicted)])
    assert (counts.hits, counts.true, counts.predicted) == ({"dog": 2}, {"dog": 3, "rain": 1}, {"dog": 3, "bell": 1})
    assert counts.micro == 2 * 2 / (4 + 4)
    assert counts.f1() == {"bell": 0.0, "dog": 2 * 2 / 6, "rain": 0.0}
    assert counts.macro == pytest.approx(2 / 9)


@pytest.mark.parametrize(
    "predicted, hits",
    [
        (Event("dog", 1.2, 2.0), 1),  # onset at the collar
        (Event("dog", 1.21, 2.0), 0),
        (Event("dog", 1.0, 1.8), 1),  # offset at the collar
        (Event("dog", 1.0, 1.79), 0),
        (Event("dog", 1.25, 2.0), 0),
        (Event("bell", 1.0, 2.0), 0),
    ],
)
def test_collars(predicted, hits):
    assert event_counts([([Event("dog", 1.0, 2.0)], [predicted])]).hits.total() == hits


def test_offset_collar_grows_with_the_event():
    long = Event("dog", 0.0, 5.0)
    assert event_counts([([long], [Event("dog", 0.0, 6.0)])]).micro == 1
    assert event_counts([([long], [Event("dog", 0.0, 6.01)])]).micro == 0
    assert event_counts([([long], [Event("dog", 0.5, 5.0)])]).micro == 0  # that of the onset does not
    assert event_counts([([Event("dog", 0.0, 2.0)], [Event("dog", 0.0, 2.45)])]).micro == 0  # of the true event


def test_events_match_one_to_one_and_as_many_as_possible():
    true = [Event("dog", 1.0, 2.0), Event("dog", 1.2, 2.2)]
    # The first prediction fits both, the second only the first: taking them in order would lose one.
    predicted = [Event("dog", 1.1, 2.1), Event("dog", 0.9, 1.9)]
    assert event_counts([(true, predicted)]).micro == 1
    assert event_counts([(true, predicted[:1] * 1)]).hits.total() == 1
    assert event_counts([(true[:1], predicted)]).micro == 2 / 3


@pytest.mark.parametrize("order", [1, -1])
def test_a_long_chain_of_events_that_give_way_to_one_another(order, request):
    true = [Event("dog", 0.2 * i, 0.2 * i + 0.15) for i in range(200)][::order]
    predicted = [Event("dog", 0.2 * i + 0.1, 0.2 * i + 0.25) for i in range(200)]
    request.addfinalizer(partial(sys.setrecursionlimit, sys.getrecursionlimit()))
    sys.setrecursionlimit(len(inspect.stack()) + 100)  # so that 200 are many
    hits = [event_counts([(true, p)]).hits.total() for p in (predicted, predicted[1:] + predicted[:1])]
    assert hits == [200, 200]


def test_nothing_true_and_nothing_predicted():
    for counts in (segment_counts([([], [])]), event_counts([([], [])])):
        assert counts.micro == counts.macro == 0


def test_frames_and_events():
    active = roll([Event("dog", 0.28, 0.40), Event("rain", 0.05, 0.0801)], LABELS, 12)
    assert np.flatnonzero(active[:, 1]).tolist() == [7, 8, 9]  # frame 7 starts at 0.28 s
    assert np.flatnonzero(active[:, 2]).tolist() == [1, 2]
    events = events_of(active, LABELS)
    assert [(e.label, round(e.onset, 6), round(e.offset, 6)) for e in events] == [
        ("rain", 0.04, 0.12),
        ("dog", 0.28, 0.4),
    ]
    assert np.array_equal(roll(events, LABELS, 12), active)
    borders = [(i, roll([Event("dog", round(0.04 * i, 2), round(0.04 * i + 0.04, 2))], LABELS, 80)) for i in range(80)]
    assert all(np.flatnonzero(active[:, 1]).tolist() == [i] for i, active in borders)
    before = roll([Event("dog", -0.2, 0.05), Event("rain", -3.0, -1.0)], LABELS, 80)
    assert (np.flatnonzero(before[:, 1]).tolist(), before[:, 2].any()) == ([0, 1], False)
    with pytest.raises(ValueError, match=r"labels among bell, dog, rain, got 'cat'"):
        roll([Event("cat", 0, 1)], LABELS, 12)
    with pytest.raises(ValueError, match=r"active must be \[frames, 2\]"):
        events_of(active, LABELS[:2])


def test_median_filter():
    from scipy.ndimage import median_filter as reference

    active = np.random.default_rng(0).random((50, 3)) < 0.5
    for width in (1, 3, 7):
        expected = reference(active.astype(int), size=(width, 1), mode="constant") > 0
        assert np.array_equal(median_filter(active, width), expected)
    for width in (4, -1):
        with pytest.raises(ValueError, match=r"width must be an odd number"):
            median_filter(active, width)


def test_clip_scores():
    targets = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]], bool)
    scores = np.array([[0.9, 0.2, 0.5], [0.8, 0.3, 0.1], [0.1, 0.2, 0.0]])
    # label 0: clips in order 0, 1, 2: precision 1 at the first hit, 2/3 at the second; label 1: 1, then 2/2 or 2/3
    # (two tied scores enter together: 2/3); label 2 is nowhere.
    assert clip_map(scores, targets) == pytest.approx(((1 + 2 / 3) / 2 + (1 + 2 / 3) / 2) / 2)
    assert top1(scores, targets) == pytest.approx(2 / 3)
    assert np.isnan(clip_map(scores, np.zeros((3, 3), bool)))


def test_best_thresholds():
    scores = np.array([[0.1, 0.3], [0.4, 0.2], [0.35, 0.1], [0.8, 0.0]])
    targets = np.array([[0, 0], [0, 0], [1, 0], [1, 0]], bool)
    assert best_thresholds(scores, targets).tolist() == [0.35, np.inf]
    # one of four equal scores cannot be taken alone: F1 is 2 / 5 there and 4 / 7 with all
    equal = np.array([[0.5], [0.5], [0.5], [0.5], [0.4]])
    assert best_thresholds(equal, np.array([[1], [0], [0], [0], [1]], bool)).tolist() == [0.4]
    rng = np.random.default_rng(0)
    scores, targets = rng.integers(0, 6, (40, 8)).astype(float), rng.random((40, 8)) < 0.3
    f1 = [[2 * (targets[:, k] & (scores[:, k] >= t)).sum() / (targets[:, k].sum() + (scores[:, k] >= t).sum())
           for t in range(6)] for k in range(8)]  # fmt: skip
    assert best_thresholds(scores, targets).tolist() == [max(np.flatnonzero(row == np.max(row))) for row in f1]


def test_frame_values():
    """Two files with tokens of 0.5 s: what reaches its threshold, without runs of one token, against the events."""
    scores = [np.full((12, 2), 0.1), np.full((8, 2), 0.1)]
    scores[0][2:8, 0] = 0.6
    scores[0][4, 0] = 0.5  # a gap that the threshold leaves, and the filter fills
    scores[0][10, 0] = 0.9
    scores[1][:4, 1] = 0.3
    events = [[Event("a", 1.0, 4.0)], [Event("b", 0.0, 1.0)]]
    active, values = frame_values(scores, events, ["a", "b"], np.array([0.6, 0.3]), 3, 0.5)
    assert [np.flatnonzero(a[:, k]).tolist() for a, k in zip(active, (0, 1))] == [[2, 3, 4, 5, 6, 7], [0, 1, 2, 3]]
    assert not active[0][:, 1].any()
    assert values["segment_f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert values["event_f1"] == 0.5  # b ends a second late
    events[1].append(Event("b", 3.5, 4.0))
    assert frame_values(scores, events, ["a", "b"], np.array([0.6, 0.3]), 3, 0.5)[1]["event_f1"] == 0.5  # of labels
    assert values["frame_map"] == pytest.approx((_precision(scores[0][:, 0], 2, 8) + 0.5) / 2)


def _precision(scores, first, last):
    from sklearn.metrics import average_precision_score

    truth = np.zeros(20, bool)
    truth[first:last] = True
    return average_precision_score(truth, np.concatenate([scores, np.full(8, 0.1)]))


def _random_events(rng, n):
    onsets = np.sort(rng.uniform(0, 28, n))
    return [Event(str(rng.choice(LABELS)), float(t), float(t + rng.uniform(0.1, 4))) for t in onsets]


def test_against_sed_eval():
    sed_eval = pytest.importorskip("sed_eval", reason="needs the extra eval-check", exc_type=ImportError)
    rng, files = np.random.default_rng(0), []
    for _ in range(30):
        true = _random_events(rng, rng.integers(0, 12))
        near = [Event(e.label, e.onset + rng.normal(0, 0.15), e.offset + rng.normal(0, 0.3)) for e in true]
        near = [Event(e.label, max(e.onset, 0.0), max(e.offset, e.onset + 0.05, 0.05)) for e in near]
        files.append((true, [e for e in near if rng.random() < 0.8] + _random_events(rng, rng.integers(0, 4))))
    segments = sed_eval.sound_event.SegmentBasedMetrics(LABELS, time_resolution=1.0)
    events = sed_eval.sound_event.EventBasedMetrics(LABELS, t_collar=0.2, percentage_of_length=0.2)
    for i, (true, predicted) in enumerate(files):
        lists = [
            sed_eval.util.event_list.dcase_util.containers.MetaDataContainer(
                [{"file": f"{i}", "event_label": e.label, "onset": e.onset, "offset": e.offset} for e in side]
            )
            for side in (true, predicted)
        ]
        segments.evaluate(*lists)
        events.evaluate(*lists)
    for theirs, ours in ((segments, segment_counts(files)), (events, event_counts(files))):
        overall = theirs.results_overall_metrics()["f_measure"]["f_measure"]
        per_class = theirs.results_class_wise_metrics()
        assert ours.micro == pytest.approx(overall, abs=1e-12)
        for label, f1 in ours.f1().items():
            assert f1 == pytest.approx(per_class[label]["f_measure"]["f_measure"], abs=1e-12)
