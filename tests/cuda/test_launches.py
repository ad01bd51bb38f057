"""What the operators ask for when they launch a kernel is what its budget, and so the occupancy, was reckoned with."""

import pytest
import torch

from tests import cuda_shim
from tests.cuda import test_kaldi_fbank as fbank
from tests.cuda.budget import BUDGET
from tests.cuda.test_augment import make_case
from tests.cuda.test_log_mel import arguments

pytestmark = pytest.mark.skipif(cuda_shim.unavailable() is not None, reason=cuda_shim.unavailable() or "")


def log_mel(n_fft):
    return lambda ops: ops.log_mel(*arguments(torch.zeros(1, 3000), n_fft=n_fft))


def kaldi_fbank(n_fft):
    rate = {512: 16000, 1024: 32000, 2048: 48000}[n_fft]
    return lambda ops: ops.kaldi_fbank(*fbank.arguments(torch.zeros(1, 3000), rate=rate, shift=rate // 100))


def augment(ops):
    ops.augment(*make_case(0, 1, 128, 1001))


def ema(ops):
    ops.ema_update_([torch.zeros(5)], [torch.zeros(5)], torch.tensor(0.5))


def adamw(ops):
    p, none = torch.zeros(5), torch.empty(0)
    hyper = torch.tensor([[1e-3, 0.0, 0.9, 0.999, 1e-6]], dtype=torch.float64)
    ops.adamw_ema_(
        [p], [none], [none], [none], [none], [torch.zeros(5)], [], [], hyper, [1], torch.tensor(0.5), None, True
    )


def norm(ops):
    ops.grad_norm([torch.zeros(5)])


LAUNCHES = {
    "augment/augment_kernel": augment,
    "ema/ema_kernel": ema,
    "ema/adamw_kernel": adamw,
    "ema/norm_kernel": norm,
    **{f"kaldi_fbank/kaldi_fbank_kernel<{n_fft // 64}>": kaldi_fbank(n_fft) for n_fft in (512, 1024, 2048)},
    **{f"log_mel/log_mel_kernel<{n_fft // 64}>": log_mel(n_fft) for n_fft in (512, 1024, 2048)},
}


def test_every_budget_is_launched():
    assert LAUNCHES.keys() == BUDGET.keys()


@pytest.mark.parametrize("kernel", LAUNCHES)
def test_a_launch_keeps_its_budget(kernel):
    LAUNCHES[kernel](cuda_shim.load())
    name, threads, shared = cuda_shim.latest_launch()
    budget = BUDGET[kernel]
    assert name == kernel.partition("/")[2]
    assert threads == budget.threads
    assert 0.8 * budget.shared <= shared <= budget.shared
