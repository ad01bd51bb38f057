"""The numbers of the shim: conversions, warp collectives, integer and rounding functions."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests import cuda_shim

SOURCE = Path(__file__).parent / "shim_numbers.cu"
DTYPES = {"bfloat16": torch.bfloat16, "half": torch.float16}


@pytest.fixture
def numbers():
    if reason := cuda_shim.unavailable():
        pytest.skip(reason)
    with cuda_shim.nothing_left():
        yield cuda_shim.load_module("atst_shim_numbers", str(SOURCE))


@pytest.mark.parametrize("name", DTYPES)
def test_every_pattern_widens_as_in_torch(numbers, name):
    dtype = DTYPES[name]
    bits = torch.arange(-(2**15), 2**15).short()
    got = getattr(numbers, f"from_{name}")(bits)
    want = bits.view(dtype).float()
    finite = ~want.isnan()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[finite].view(torch.int32), want[finite].view(torch.int32))


@pytest.mark.parametrize("name", DTYPES)
def test_floats_round_as_in_torch(numbers, name):
    dtype = DTYPES[name]
    every = torch.arange(-(2**15), 2**15).short().view(dtype).float()  # and what lies half-way, and next to that
    around = torch.arange(-(2**31), 2**31, 65521).int().view(torch.float32)
    bits = every.view(torch.int32)
    halves = [(bits + d).view(torch.float32) for step in (1 << 15, 1 << 12) for d in (step - 1, step, step + 1)]
    x = torch.cat([every, around, *halves])
    x = x[: x.numel() // 2 * 2]
    got, want = getattr(numbers, f"to_{name}")(x).view(dtype), x.to(dtype)
    assert torch.equal(got.isnan(), want.isnan())
    finite = ~want.isnan()
    assert torch.equal(got[finite].view(torch.int16), want[finite].view(torch.int16))


def test_subnormal_halves_round_to_even(numbers):
    x = torch.arange(0, 4096).float() * 2.0**-26
    assert torch.equal(numbers.to_half(x), x.half().view(torch.int16))


def signed(x, bits=32):
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


@pytest.mark.parametrize("order", ["forward", "reverse", "shuffled"])
def test_collectives(numbers, order):
    cuda_shim.schedule(order, 3)
    x = torch.randint(-(2**31), 2**31, (32,))
    v, lanes = x.tolist(), range(32)
    want = [
        [v[3] for i in lanes],
        [v[i // 8 * 8 + (i + 1) % 8] for i in lanes],
        [v[i - 2] if i >= 2 else v[i] for i in lanes],
        [v[i - 3] if i % 16 >= 3 else v[i] for i in lanes],
        [v[i + 5] if i + 5 < 32 else v[i] for i in lanes],
        [v[i + 1] if i % 4 < 3 else v[i] for i in lanes],
        [v[i ^ 9] for i in lanes],
        [v[i ^ 5] if i & 4 else v[i] for i in lanes],
        [sum((v[i] > 0) << i for i in lanes)] * 32,
        [1] * 32,
        [1] * 32,
        [0] * 32,
        [0] * 32,
        [sum((v[i] & 3 == v[j] & 3) << j for j in lanes) for i in lanes],
        [signed(sum(v))] * 32,
        [min(v)] * 32,
        [max(v)] * 32,
        [max(i & 0xFFFFFFFF for i in v)] * 32,
        [int(np.bitwise_xor.reduce([i & 0xFFFFFFFF for i in v]))] * 32,
        [sum(i > 0 for i in v)] * 32,
    ]
    assert numbers.collectives(x).tolist() == want


def test_integer_functions(numbers):
    x = torch.randint(-(2**63), 2**63 - 1, (500,))
    x[:6] = torch.tensor([0, 1, -1, 2**63 - 1, 0x7FC000007FC00000, 0x4F8000004F000000])
    got = numbers.integers(x).T.tolist()
    for value, row in zip(x.tolist(), got):
        v = value & (2**64 - 1)
        low, high = v & 0xFFFFFFFF, v >> 32
        data = v.to_bytes(8, "little")
        floats = torch.tensor([signed(low), signed(high)], dtype=torch.int32).view(torch.float32).double().tolist()
        saturate = [0 if f != f else f for f in floats]
        want = [
            v.bit_count(),
            64 - v.bit_length(),
            (low & -low).bit_length(),
            int(f"{low:032b}"[::-1], 2),
            int.from_bytes(bytes([data[0], data[6], 255 * (data[3] >> 7), data[2]]), "little"),
            (v << 8 >> 32) & 0xFFFFFFFF,
            v >> 7 & 0xFFFFFFFF,
            low * high >> 32,
            signed(low) * signed(high) >> 32,
            round(min(max(saturate[0], -(2**31)), 2**31 - 1)),
            int(min(max(saturate[1], 0), 2**32 - 1)),
        ]
        assert row == want, value


def test_products_and_sums_round_when_told_to(numbers):
    x = torch.randn(3, 4000)
    a, b, c = x.numpy()
    got = numbers.roundings(x).numpy()
    for row in got[:3]:
        np.testing.assert_array_equal(row, a * b + c)
    exact = a.astype(np.longdouble) * b + c
    np.testing.assert_array_equal(got[3], exact.astype(np.float32))
    np.testing.assert_allclose(got[4], np.cos(np.pi * a.astype(float)), rtol=0, atol=6e-8)
    np.testing.assert_allclose(got[5], np.sin(np.pi * a.astype(float)), rtol=0, atol=6e-8)


def test_multiples_of_a_half_turn_are_exact(numbers):
    x = torch.arange(-8.0, 8.5, 0.5).repeat(3, 1)
    got = numbers.roundings(x)
    quarter = (torch.arange(-16, 17) % 4).long()
    assert torch.equal(got[4], torch.tensor([1.0, 0, -1, 0])[quarter])
    assert torch.equal(got[5], torch.tensor([0.0, 1, 0, -1])[quarter])
