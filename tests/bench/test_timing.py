"""Stopwatches, with a clock that goes as it is told."""

import functools

import pytest
import torch

from atst_fast.bench import timing
from tests.bench.fake import Clock


def test_only_the_call_is_timed_and_the_cache_is_cleared_before_it():
    clock = Clock()
    stats = timing.launched(clock.call(9.0, 8.0, 7.0, 0.25), clock)
    assert (stats.median, stats.iqr, stats.min, stats.rounds) == pytest.approx((0.25, 0, 0.25, 11))
    assert clock.cleared == 12


def test_a_graph_is_timed_per_call_and_leaves_the_cache_alone():
    clock = Clock()
    stats = timing.replayed(clock.call(1e-4), clock)
    assert (stats.median, stats.rounds) == (pytest.approx(1e-4), 200)
    assert clock.cleared == 0


def test_a_peer_is_compiled_for_its_own_sizes():
    shapes = []

    def backend(graph, inputs):
        shapes.extend(tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor))
        return graph

    for n in (3, 5):
        call = functools.partial(torch.compile, backend=backend)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "compile", call)
            timing.compiled(lambda x: x + 1)(torch.zeros(n))
    assert shapes == [(3,), (5,)]


def test_spreads_are_quartile_distances_of_one_call():
    """Also where several calls are timed at once."""
    times = [1.0, 1.0, 2.0, 3.0, 3.0, 3.0, 4.0, 8.0, 8.0]
    assert timing.Stats.of(times) == timing.Stats(3.0, 2.0, 1.0, 9)
    for way, calls in ((timing.repeated, 100), (timing.replayed, timing.REPLAYED)):
        clock = Clock()
        turns = [1e-6] * timing.WARM_UP * (way is timing.repeated) + [1e-6] * calls
        turns += [(1 + (i // calls) % 5) * 1e-6 for i in range(calls * 300)]
        stats = way(clock.call(*turns), clock, budget=1e-9)
        assert (stats.rounds, stats.median, stats.iqr) == (11, pytest.approx(3e-6), pytest.approx(2.5e-6))


def test_short_calls_are_timed_several_at_once():
    clock = Clock()
    calls = []

    def call():
        calls.append(1)
        clock.now += 1e-6

    stats = timing.repeated(call, clock, budget=1e-2)
    assert (stats.median, stats.min, stats.rounds) == (pytest.approx(1e-6), pytest.approx(1e-6), 100)
    assert len(calls) == timing.WARM_UP + 101 * 100


def test_a_call_that_takes_no_time_ends():
    assert timing.repeated(lambda: None, Clock()).rounds == timing.ROUNDS[1]


def test_threads_are_as_before_afterwards():
    before = torch.get_num_threads()
    seen = []

    def fail():
        with timing.on_threads(before + 1):
            seen.append(torch.get_num_threads())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (seen, torch.get_num_threads()) == ([before + 1], before)
