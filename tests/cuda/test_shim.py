"""The shim that the CUDA kernels are trusted by: it finds planted bugs, and lets right kernels pass."""

import re
from pathlib import Path

import pytest
import torch

from tests import cuda_shim

SOURCE = Path(__file__).parent / "shim_kernels.cu"
ORDERS = [("forward", 0), ("reverse", 0), ("shuffled", 1), ("shuffled", 2)]

# the bug in shim_kernels.cu: what the message says about it
BUGS = {
    "kNoBarrier": r"thread \(\d+,0,0\): (reads|writes) 4 bytes of shared memory at \d+ that were (read|written) by",
    "kDivergent": "__syncthreads that others never reach.*and 39 more waits.*and 23 more waits",
    "kShuffleLeft": r"a shuffle that others never reach.*thread \(5,0,0\) has returned",
    "kUnwritten": r"thread \(54,0,0\): reads 4 bytes of shared memory at 36 that nobody wrote",
    "kSharedEnd": "writes 4 bytes of shared memory at 256, outside of its 256 bytes",
    "kReadEnd": r"thread \(63,0,0\): reads 4 bytes, 4 bytes past the end of .*\(in, 256 bytes\)",
    "kWriteEnd": r"thread \(63,0,0\): writes 4 bytes, 4 bytes past the end of .*\(out, 256 bytes\)",
    "kWriteIn": r"writes 4 bytes of .*\(in, 256 bytes\)",
    "kPartial": r"4 bytes of .*\(out, 256 bytes\) were never written, the first at 48",
    "kMisaligned": "address that is not a multiple of 16",
    "kBlockRace": "writes 4 bytes of .* that another block of this launch wrote",
    "kReadOut": r"reads 4 bytes of .*\(out, 256 bytes\) at \d+ that nobody wrote",
    "kHalfWarpRace": "of shared memory at .* with no barrier between",
    "kOtherMask": "shuffles the value of lane 0, which is not in the mask 0xffff0000",
    "kOutside": "reads 4 bytes outside of all memory that the kernel was given",
    "kEarlyExit": r"thread \(63,0,0\) has returned",
    "kReverseRace": "of shared memory at .* with no barrier between",
    "kSpin": "does not end",
    "kMisalignedRead": "address that is not a multiple of 8",
    "kBefore": r"reads 4 bytes, 8 bytes before the start of .*\(in, 256 bytes\)",
    "kLocalEnd": "uses an index outside of an array",
    "kMemcpyEnd": r"reads 260 bytes, 4 bytes past the end of argument 1 \(in, 256 bytes\)",
    "kGlobalRace": r"of argument 2 \(out, 256 bytes\) at \d+ that were (read|written) by",
    "kConstantLoad": "that this launch wrote: __ldg is for what nobody writes",
    "kScratch": r"reads 4 bytes of argument 4 \(scratch, 256 bytes\) at 20 that nobody wrote",
    "kConversion": "converts a float to an integer type that it does not fit",
    "kBlockRead": "another block of this launch",
}


@pytest.fixture(params=ORDERS, ids=lambda o: f"{o[0]}{o[1] or ''}")
def kernels(request):
    if reason := cuda_shim.unavailable():
        pytest.skip(reason)
    module = cuda_shim.load_module("atst_shim_test", str(SOURCE))
    with cuda_shim.nothing_left():
        cuda_shim.schedule(*request.param)
        yield module


def cases(enum):
    """The names of an enum of shim_kernels.cu, in the order of their numbers."""
    return re.findall(r"\bk\w+", re.search(rf"enum {enum} {{(.*?)}}", SOURCE.read_text(), re.DOTALL)[1])


@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_found(kernels, bug):
    with pytest.raises(RuntimeError, match=BUGS[bug]) as error:
        kernels.bugs(torch.randn(64), cases("Bug").index(bug))
    assert str(error.value).startswith("bugs: ")
    if bug != "kPartial":  # noticed when the operator ends
        assert "shim_kernels.cu:" in str(error.value)


def test_every_bug_is_tried():
    assert {*BUGS, "kNone"} == set(cases("Bug"))


def test_right_kernels_pass(kernels):
    x = torch.randn(64)
    assert torch.equal(kernels.bugs(x, 0), x.flip(0))
    x = torch.randn(3, 1000)
    torch.testing.assert_close(kernels.block_sum(x), x.sum(1), rtol=1e-4, atol=1e-4)
    x = torch.randn(3, 32, 32)
    assert torch.equal(kernels.transpose(x), x.mT)


@pytest.mark.parametrize("how", ["kRight", "kRightInOneWarp", "kRightOfOtherLane"])
def test_the_last_block_may_read_what_others_wrote(kernels, how):
    x = torch.randn(50, 32)
    got = kernels.last_block_sums(x, cases("Last").index(how))
    torch.testing.assert_close(got, x.sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["kNoFence", "kFenceFirst", "kPlainRead", "kNoBarrierHere", "kNoFenceHere"])
def test_the_last_block_reads_too_early(kernels, how):
    wrong = "not through __ldcg" if how == "kPlainRead" else "with no __threadfence and atomic there"
    if how == "kNoBarrierHere":  # takes the last in the grid for the last to run
        cuda_shim.schedule("forward")
    with pytest.raises(RuntimeError, match=f"argument 2 .* that another block of this launch wrote, {wrong}"):
        kernels.last_block_sums(torch.randn(50, 32), cases("Last").index(how))


def test_half_warps(kernels):
    x = torch.randn(64)
    rows = x.view(4, 16)
    low, high = rows[0::2].sum(1, keepdim=True).expand(2, 16), rows[1::2] - rows[1::2, :1]
    high = high.view(2, 8, 2).flip(2).reshape(2, 16)
    want = torch.stack([low, high], 1).flatten()
    torch.testing.assert_close(kernels.half_warps(x), want)
