"""The shim says that a random program has a race exactly when it has one, in whatever order its threads run."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import cuda_shim

SOURCE = Path(__file__).parent / "shim_programs.cu"
NOTHING, READ, WRITE, ATOMIC, SYNC_WARP, SYNC_BLOCK = range(6)
THREADS = 64


def random_program(rng):
    """Steps of one kind each: accesses of a few threads, a warp barrier for some sets of lanes, a block barrier."""
    program = np.zeros((rng.randint(4, 14), THREADS, 3), np.int64)
    for step in program:
        kind = rng.choices(["access", "warp", "block"], [8, 8, 2])[0]
        if kind == "block":
            step[:, 0] = SYNC_BLOCK
        elif kind == "warp":
            for warp in range(0, THREADS, 32):
                sets = rng.choice([1, 2, 4])
                lanes = (
                    np.array([rng.randrange(sets) for _ in range(32)]) if rng.random() < 0.3 else np.arange(32) % sets
                )
                for s in range(sets):
                    if rng.random() < 0.8:
                        mask = int(sum(1 << lane for lane in np.flatnonzero(lanes == s).tolist()))
                        step[warp : warp + 32][lanes == s] = SYNC_WARP, mask, 0
        else:
            who = range(THREADS) if rng.random() < 0.05 else rng.sample(range(THREADS), rng.randint(1, 2))
            kinds = rng.choice([[READ], [READ], [WRITE], [ATOMIC], [READ, WRITE]])
            for thread in who:
                size = rng.choice([1, 2, 4, 4])
                what = rng.choice(kinds)
                size = 4 if what == ATOMIC else size
                step[thread] = what, rng.randrange(8 // size) * size, size
    return program


def has_race(program):
    """By vector clocks of all threads, and all pairs of accesses."""
    known = np.zeros((THREADS, THREADS), int)  # known[t, u]: as many steps of u as t knows to be over
    past = []  # (thread, its step, what, offset, end)
    for now, step in enumerate(program, 1):
        for t, (what, offset, size) in enumerate(step.tolist()):
            if what not in (READ, WRITE, ATOMIC):
                continue
            for u, then, other, start, end in past:
                apart = start >= offset + size or offset >= end
                harmless = what == other and what in (READ, ATOMIC)
                if u != t and not apart and not harmless and known[t, u] < then:
                    return True
            past.append((t, now, what, offset, offset + size))
        groups = {}
        for t, (what, mask, _) in enumerate(step.tolist()):
            if what == SYNC_BLOCK or (what == SYNC_WARP and mask):
                groups.setdefault((what, t // 32 if what == SYNC_WARP else 0, mask), []).append(t)
        for members in groups.values():
            known[members] = known[members].max(0)
            known[np.ix_(members, members)] = now
    return False


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
def test_random_programs(order):
    if reason := cuda_shim.unavailable():
        pytest.skip(reason)
    run = cuda_shim.load_module("atst_shim_programs", str(SOURCE)).interpret
    rng = random.Random(order)
    races = 0
    with cuda_shim.nothing_left():
        cuda_shim.schedule(order, 5)
        for number in range(400):
            program = random_program(rng)
            found = ""
            try:
                run(torch.from_numpy(program))
            except RuntimeError as error:
                found = str(error)
            assert not found or "with no barrier between" in found, found
            assert bool(found) == has_race(program), f"program {number}: {found or 'a race was not found'}"
            races += bool(found)
    assert 100 < races < 350  # both are tried
