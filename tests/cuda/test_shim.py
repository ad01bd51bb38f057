"""The shim that the CUDA kernels are trusted by: it finds planted bugs, and lets right kernels pass."""

from pathlib import Path

import pytest
import torch

from tests import cuda_shim

SOURCE = Path(__file__).parent / "shim_kernels.cu"
ORDERS = [("forward", 0), ("reverse", 0), ("shuffled", 1), ("shuffled", 2)]

# case: (name of the bug in shim_kernels.cu, what the message says about it)
BUGS = {
    1: ("no barrier", r"thread \(\d+,0,0\): (reads|writes) 4 bytes of shared memory at \d+ that was (read|written) by"),
    2: ("divergent barrier", "__syncthreads that others never reach.*and 39 more waits.*and 23 more waits"),
    3: ("shuffle with a lane that left", r"a shuffle that others never reach.*thread \(5,0,0\) has returned"),
    4: ("unwritten shared memory", r"thread \(54,0,0\): reads 4 bytes of shared memory at 36 that nobody wrote"),
    5: ("shared memory past its end", "writes 4 bytes of shared memory at 256, outside of its 256 bytes"),
    6: ("read past the end", r"thread \(63,0,0\): reads 4 bytes, 4 bytes past the end of .*\(in, 256 bytes\)"),
    7: ("write past the end", r"thread \(63,0,0\): writes 4 bytes, 4 bytes past the end of .*\(out, 256 bytes\)"),
    8: ("write to an input", r"writes 4 bytes of .*\(in, 256 bytes\)"),
    9: ("output not written in full", r"4 bytes of .*\(out, 256 bytes\) were never written, the first at 48"),
    10: ("misaligned write", "address that is not a multiple of 16"),
    11: ("two blocks write the same", "writes 4 bytes of .* that another block of this launch wrote"),
    12: ("output read before it is written", r"reads 4 bytes of .*\(out, 256 bytes\) at \d+ that nobody wrote"),
    13: ("race between half-warps", "of shared memory at .* with no barrier between"),
    14: ("shuffle from outside of the mask", "shuffles the value of lane 0, which is not in the mask 0xffff0000"),
    15: ("a stray pointer", "reads 4 bytes outside of all memory that the kernel was given"),
    16: ("barrier after an early exit", r"thread \(63,0,0\) has returned"),
    18: ("read before a barrier", "of shared memory at .* with no barrier between"),
    19: ("endless wait", "does not end"),
    20: ("misaligned read", "address that is not a multiple of 8"),
    21: ("read before the start", r"reads 4 bytes, 8 bytes before the start of .*\(in, 256 bytes\)"),
    22: ("plain read of another block's result", "another block of this launch"),
}


@pytest.fixture(params=ORDERS, ids=lambda o: f"{o[0]}{o[1] or ''}")
def kernels(request):
    if reason := cuda_shim.unavailable():
        pytest.skip(reason)
    module = cuda_shim.load_module("atst_shim_test", str(SOURCE))
    with cuda_shim.nothing_left():
        cuda_shim.schedule(*request.param)
        yield module


@pytest.mark.parametrize("bug", BUGS, ids=lambda b: BUGS[b][0].replace(" ", "-"))
def test_bug_is_found(kernels, bug):
    with pytest.raises(RuntimeError, match=BUGS[bug][1]) as error:
        kernels.bugs(torch.randn(64), bug)
    assert str(error.value).startswith("bugs: ")
    if BUGS[bug][0] != "output not written in full":
        assert "shim_kernels.cu:" in str(error.value)


def test_right_kernels_pass(kernels):
    x = torch.randn(64)
    assert torch.equal(kernels.bugs(x, 0), x.flip(0))
    x = torch.randn(3, 1000)
    torch.testing.assert_close(kernels.block_sum(x), x.sum(1), rtol=1e-4, atol=1e-4)
    x = torch.randn(3, 32, 32)
    assert torch.equal(kernels.transpose(x), x.mT)
    x = torch.randn(50, 32)
    torch.testing.assert_close(kernels.last_block_sums(x, True), x.sum(), rtol=1e-4, atol=1e-4)


def test_half_warps(kernels):
    x = torch.randn(64)
    rows = x.view(4, 16)
    low, high = rows[0::2].sum(1, keepdim=True).expand(2, 16), rows[1::2] - rows[1::2, :1]
    high = high.view(2, 8, 2).flip(2).reshape(2, 16)
    want = torch.stack([low, high], 1).flatten()
    torch.testing.assert_close(kernels.half_warps(x), want)


def test_a_missing_fence_is_found(kernels):
    with pytest.raises(RuntimeError, match="without __threadfence"):
        kernels.last_block_sums(torch.randn(50, 32), False)
