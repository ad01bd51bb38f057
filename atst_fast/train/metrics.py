"""Scores of clip-level tagging and of sound event detection, on events (label, onset, offset) in seconds.

Segment and event F1 count as sed_eval does: ``segment_based`` and ``event_based`` with optimal matching. Only times
that differ by the collar to the microsecond count as within it here, where sed_eval leaves them to float rounding.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

HOP = 0.04  # seconds: one token of a 64x4 patch
METRICS = {
    "clip_map": "clip mAP",
    "clip_top1": "clip top-1",
    "frame_map": "frame mAP",
    "segment_f1": "segment F1 (1 s)",
    "event_f1": "event F1 (200 ms)",
}
_SLACK = 1e-6  # of a frame or second: so that 0.28 / 0.04 is 7 and not 7.000000000000001


class Event(NamedTuple):
    """A sound with its label, from ``onset`` to ``offset`` in seconds."""

    label: str
    onset: float
    offset: float


@dataclass
class Counts:
    """Per label: matched, true and predicted items, summed over files."""

    hits: Counter = field(default_factory=Counter)
    true: Counter = field(default_factory=Counter)
    predicted: Counter = field(default_factory=Counter)

    def f1(self) -> dict[str, float]:
        """F1 of each label that is true or predicted anywhere."""
        total = self.true + self.predicted
        return {label: 2 * self.hits[label] / total[label] for label in sorted(total)}

    @property
    def micro(self) -> float:
        """F1 over all items; 0 when there are none."""
        return 2 * self.hits.total() / max(self.true.total() + self.predicted.total(), 1)

    @property
    def macro(self) -> float:
        """Mean of the labels' F1; 0 when there are none."""
        return float(np.mean(list(self.f1().values()) or [0.0]))


def segment_counts(files: Iterable[tuple[Sequence[Event], Sequence[Event]]], segment: float = 1.0) -> Counts:
    """Count active (segment, label) pairs of (true, predicted) events of each file.

    A label is active in a segment of ``segment`` seconds when any part of an event of it lies inside.
    """
    counts = Counts()
    for true, predicted in files:
        a, b = _active(true, segment), _active(predicted, segment)
        for counter, pairs in ((counts.hits, a & b), (counts.true, a), (counts.predicted, b)):
            counter.update(label for label, _ in pairs)
    return counts


def event_counts(
    files: Iterable[tuple[Sequence[Event], Sequence[Event]]], collar: float = 0.2, share: float = 0.2
) -> Counts:
    """Count events of (true, predicted) of each file that match one to one.

    A predicted event matches a true one of its label when the onsets differ by at most ``collar`` seconds and the
    offsets by at most ``collar`` or ``share`` of the true event's length, whichever is longer. As many as possible are
    matched.
    """
    counts = Counts()
    for true, predicted in files:
        counts.true.update(e.label for e in true)
        counts.predicted.update(e.label for e in predicted)
        counts.hits.update(true[i].label for i in _match(true, predicted, collar, share))
    return counts


def _active(events: Sequence[Event], segment: float) -> set[tuple[str, int]]:
    return {(e.label, i) for e in events for i in range(*frame_range(e, segment))}


def _match(true: Sequence[Event], predicted: Sequence[Event], collar: float, share: float) -> list[int]:
    """Indices of the true events in a largest one-to-one matching (augmenting paths)."""
    owner: dict[int, int] = {}

    def fits(a: Event, b: Event) -> bool:
        late = max(collar, share * (a.offset - a.onset)) + _SLACK
        return a.label == b.label and abs(a.onset - b.onset) <= collar + _SLACK and abs(a.offset - b.offset) <= late

    candidates = [[j for j, b in enumerate(predicted) if fits(a, b)] for a in true]
    taken: dict[int, int] = {}
    for i in range(len(true)):
        reached, searched = {}, [i]  # from which true event a prediction was reached; those whose candidates were
        free = None
        for a in searched:  # which grows: a path may be as long as there are events, too long for a recursion
            for j in candidates[a]:
                if j not in reached:
                    reached[j] = a
                    if j not in owner:
                        free = j
                        break
                    searched.append(owner[j])
            if free is not None:
                break
        while free is not None:  # back along the path: each event gives its prediction to the one before
            a = reached[free]
            owner[free] = a
            taken[a], free = free, taken.get(a)
    return sorted(taken)


def frame_range(event: Event, hop: float = HOP) -> tuple[int, int]:
    """First frame that the event touches, and the first one after it."""
    return math.floor(event.onset / hop + _SLACK), math.ceil(event.offset / hop - _SLACK)


def roll(events: Iterable[Event], labels: Sequence[str], frames: int, hop: float = HOP) -> np.ndarray:
    """Events as bool ``[frames, labels]``. ValueError for a label that is not among ``labels``."""
    active, column = np.zeros((frames, len(labels)), bool), {label: k for k, label in enumerate(labels)}
    for event in events:
        if event.label not in column:
            raise ValueError(f"roll: events must have labels among {', '.join(labels)}, got {event.label!r}")
        first, last = frame_range(event, hop)
        active[max(first, 0) : max(last, 0), column[event.label]] = True
    return active


def events_of(active: np.ndarray, labels: Sequence[str], hop: float = HOP) -> list[Event]:
    """Runs of True in bool ``[frames, labels]`` as events, in order of onset."""
    if active.ndim != 2 or active.shape[1] != len(labels):
        raise ValueError(f"events_of: active must be [frames, {len(labels)}] (frames, labels), got {active.shape}")
    steps = np.diff(np.pad(active.astype(np.int8), ((1, 1), (0, 0))), axis=0)
    events = []
    for k, label in enumerate(labels):
        starts, ends = np.flatnonzero(steps[:, k] == 1), np.flatnonzero(steps[:, k] == -1)
        events += [Event(label, float(a * hop), float(b * hop)) for a, b in zip(starts, ends, strict=True)]
    return sorted(events, key=lambda e: (e.onset, e.label))


def median_filter(active: np.ndarray, width: int) -> np.ndarray:
    """Majority of ``width`` (odd) frames around each one, for bool ``[frames, labels]``; outside is False."""
    if width < 1 or width % 2 == 0:
        raise ValueError(f"median_filter: width must be an odd number of frames, at least 1, got {width!r}")
    half = width // 2
    sums = np.cumsum(np.pad(active.astype(np.int64), ((half + 1, half), (0, 0))), axis=0)
    return (sums[width:] - sums[:-width]) > half


def clip_map(scores: np.ndarray, targets: np.ndarray) -> float:
    """Mean over labels of the average precision of ``scores`` ``[clips, labels]`` for bool ``targets``.

    Labels that no clip has are left out; nan when that leaves none.
    """
    from sklearn.metrics import average_precision_score

    present = targets.any(axis=0)
    if not present.any():
        return float("nan")
    return float(average_precision_score(targets[:, present], scores[:, present], average="macro"))


def top1(scores: np.ndarray, targets: np.ndarray) -> float:
    """Share of the clips whose highest score is at a label they have: plain accuracy where each has one label."""
    return float(targets[np.arange(len(targets)), scores.argmax(axis=1)].mean())


def best_thresholds(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """For each label that of its ``scores`` ``[n, labels]`` which is the threshold of the highest F1 (score >=
    threshold is positive), the highest of several; infinity for a label without a positive.
    """
    thresholds = np.full(scores.shape[1], np.inf)
    for k in range(scores.shape[1]):
        if targets[:, k].any():
            order = np.argsort(-scores[:, k], kind="stable")
            hits, taken = np.cumsum(targets[order, k]), np.arange(1, len(order) + 1)
            ranked = scores[order, k]
            last = np.append(ranked[1:] != ranked[:-1], True)  # equal scores are taken together or not at all
            thresholds[k] = ranked[np.argmax(np.where(last, 2 * hits / (taken + hits[-1]), -1))]
    return thresholds


def frame_values(
    scores: Sequence[np.ndarray],
    events: Sequence[Sequence[Event]],
    labels: Sequence[str],
    thresholds: np.ndarray,
    median: int,
    hop: float = HOP,
) -> tuple[list[np.ndarray], dict[str, float]]:
    """What is active in each file, and the values of a detector: mAP over frames, and the labels' mean F1 of segments
    of 1 s and of events (200 ms, 20 %).

    ``scores``: of each file ``[frames, labels]``; ``events``: those that are there. Active, bool ``[frames, labels]``,
    is what reaches its label's threshold, after a median filter.
    """
    active = [median_filter(s >= thresholds, median) for s in scores]
    pairs = [(true, events_of(a, labels, hop)) for true, a in zip(events, active, strict=True)]
    truth = [roll(true, labels, len(a), hop) for true, a in zip(events, active, strict=True)]
    return active, {
        "frame_map": clip_map(np.concatenate(scores), np.concatenate(truth)),
        "segment_f1": segment_counts(pairs).macro,
        "event_f1": event_counts(pairs).macro,
    }
