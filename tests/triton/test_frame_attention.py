"""The forward of frame_attention in Triton, through the public functions. Gradients: test_frame_attention_backward."""

from itertools import pairwise

import pytest
import torch

from atst_fast import ops
from atst_fast.reference import frame_attention as reference
from tests import tolerances as tol
from tests.ops.test_frame_attention import assert_near, golden_cases, layer, parts

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# lengths that fill a tile, miss it by one either way, or leave whole tiles out
TOKENS = [1, 7, 64, 130, 250, 257]


def ragged(tokens):
    return torch.tensor([tokens, 0, 1, tokens // 2 + 1])


def near_float64(y, z, plain):
    """Within what float32 rounds, and for halves at most twice the error of plain PyTorch in the same dtype."""
    error = (y.double().cpu() - z).abs().max().item()
    limit = tol.ATTENTION_FORWARD if y.dtype == torch.float32 else 2 * (plain.double() - z).abs().max().item()
    assert error <= limit, f"{error} > {limit}"


def plain_attention(q, k, v):
    """``[L, H, Dh]`` each, by PyTorch in their dtype."""
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1)


def padded_plain(qkv, lengths, heads, attend):
    batch, tokens, width = qkv.shape
    out = torch.zeros(batch, tokens, width // 3, dtype=qkv.dtype)
    for b, n in enumerate(lengths.tolist()):
        rows = tokens if attend and n else n
        q, k, v = qkv[b].reshape(tokens, 3, heads, -1).unbind(1)
        if n:
            out[b, :rows] = plain_attention(q[:rows], k[:n], v[:n]).flatten(1)
    return out


def check_padded(triton_ops, qkv, lengths, heads, attend):
    given = torch.full((len(qkv),), qkv.shape[1]) if lengths is None else lengths
    x, n = triton_ops.to(qkv), None if lengths is None else triton_ops.to(lengths)
    with triton_ops.poison():
        y = ops.frame_attention(x, heads, lengths=n, padded_queries="attend" if attend else "zero")
    assert y.dtype == qkv.dtype
    scale = (qkv.shape[2] // 3 // heads) ** -0.5
    clean = qkv.double().nan_to_num()
    z, _ = reference.frame_attention(clean, given, heads, scale, attend)
    near_float64(y, z, padded_plain(qkv.nan_to_num(), given, heads, attend))
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_ragged_clips_against_float64(triton_ops, tokens, dtype):
    qkv, lengths = torch.randn(4, tokens, 3 * 64).to(dtype), ragged(tokens)
    y = check_padded(triton_ops, qkv, lengths, 1, False)
    dead = torch.arange(tokens) >= lengths[:, None]
    assert torch.equal(y.cpu()[dead], torch.zeros_like(y.cpu()[dead]))


@pytest.mark.parametrize("tokens", [7, 130])
def test_padded_queries_attend(triton_ops, tokens):
    check_padded(triton_ops, torch.randn(4, tokens, 3 * 64).bfloat16(), ragged(tokens), 1, True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [5, 32, 48, 96, 128, 200])
def test_head_dims(triton_ops, head_dim, dtype):
    check_padded(triton_ops, torch.randn(2, 70, 3 * 2 * head_dim).to(dtype), torch.tensor([70, 33]), 2, False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_clip(triton_ops, dtype):
    """In an online softmax; one key less than whole tiles of them."""
    check_padded(triton_ops, torch.randn(1, 319, 3 * 32).to(dtype), None, 1, False)


@pytest.mark.parametrize("attend", [False, True])
def test_what_is_padded_is_never_read(triton_ops, attend):
    qkv = torch.randn(3, 70, 3 * 32).bfloat16()
    qkv[1, 65:, 32:], qkv[2, :, 32:] = float("nan"), float("nan")
    if not attend:
        qkv[1, 65:] = qkv[2] = float("nan")
    check_padded(triton_ops, qkv, torch.tensor([70, 65, 0]), 1, attend)


def test_columns_of_a_wider_tensor(triton_ops):
    wide = torch.randn(2, 20, 300).half()
    for x in (wide[..., 1:97], wide[..., 16:208:2], wide[1:, :1, :96]):
        check_padded(triton_ops, x, None, 2, False)
    check_padded(triton_ops, torch.randn(20, 2, 96).transpose(0, 1), None, 2, False)


@pytest.mark.parametrize("shape", [(0, 4, 24), (4, 0, 24), (4, 1, 24), (1, 4, 24)])
def test_axes_of_one_or_none(triton_ops, shape):
    x = torch.randn(shape[1], shape[0], 24).transpose(0, 1)
    y = ops.frame_attention(triton_ops.to(x), 2)
    z, _ = reference.frame_attention(x.double(), None, 2, 4**-0.5, False)
    torch.testing.assert_close(y.double().cpu(), z, rtol=0, atol=tol.ATTENTION_FORWARD)


def test_large_scores_do_not_overflow(triton_ops):
    qkv, lengths = 30 * torch.randn(2, 70, 3 * 32), torch.tensor([70, 7])
    y = ops.frame_attention(triton_ops.to(qkv), 1, lengths=triton_ops.to(lengths)).cpu()
    z, _ = reference.frame_attention(qkv.double(), lengths, 1, 32**-0.5, False)
    torch.testing.assert_close(y.double(), z, rtol=0, atol=30 * tol.ATTENTION_LARGE)


@pytest.mark.parametrize("dtype, tokens", [(torch.float32, 70), (torch.bfloat16, 250), (torch.bfloat16, 300)])
def test_log_sum_exp(triton_ops, dtype, tokens):
    """float32 whatever the dtype; -inf in dead rows."""
    qkv, lengths = torch.randn(3, tokens, 3 * 2 * 16).to(dtype), torch.tensor([tokens, 5, 0])
    args = triton_ops.to(qkv), triton_ops.to(lengths), 2, 0.25, False
    with triton_ops.poison():
        lse = torch.ops.atst_fast.frame_attention(*args)[1].cpu()
    expected = reference.frame_attention(qkv.double(), lengths, 2, 0.25, False)[1]
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), expected, rtol=0, atol=tol.ATTENTION_LOG_SUM)


PACKED = [
    ([(13, 40), (0, 9), (70, 130), (5, 0)], 0),
    ([(3, 257), (65, 64)], 4),
    ([(1, 1)], 70),
    ([], 5),
]  # queries and keys of each sequence, rows past the last one


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes, past", PACKED)
@pytest.mark.parametrize("bounded", [False, True])
def test_sequences_end_to_end(triton_ops, sizes, past, dtype, bounded):
    """Empty ones, different numbers of queries and keys, rows of no sequence (NaN), with and without the longest."""
    cu_q, cu_k = (torch.tensor([0, *(s[i] for s in sizes)]).cumsum(0) for i in (0, 1))
    q, kv = torch.randn(int(cu_q[-1]) + past, 64).to(dtype), torch.randn(int(cu_k[-1]) + past, 128).to(dtype)
    q[cu_q[-1] :], kv[cu_k[-1] :] = float("nan"), float("nan")
    longest = {f"max_seqlen_{n}": max((s[i] for s in sizes), default=0) for i, n in enumerate("qk")} if bounded else {}
    with triton_ops.poison():
        y = ops.frame_attention_packed(*map(triton_ops.to, (q, kv, cu_q.int(), cu_k)), 2, **longest)
    z, _ = reference.frame_attention_packed(q.double(), kv.double(), cu_q, cu_k, 0, 0, 2, 32**-0.5)
    plain = torch.zeros_like(q)
    for (i, j), (a, b) in zip(pairwise(cu_q), pairwise(cu_k)):
        if b > a:
            k, v = kv[a:b].unflatten(1, (2, 2, -1)).unbind(1)
            plain[i:j] = plain_attention(q[i:j].unflatten(1, (2, -1)), k, v).flatten(1)
    near_float64(y, z, plain)
    assert torch.equal(y[cu_q[-1] :].cpu(), torch.zeros(past, 64, dtype=dtype))


def test_packed_equals_padded(triton_ops):
    """Views of one qkv at different row strides give the same bits, whatever the grid."""
    lengths = torch.tensor([40, 1, 0, 33])
    qkv = torch.randn(4, 40, 3 * 64).bfloat16()
    valid = torch.arange(40) < lengths[:, None]
    rows, offsets = triton_ops.to(qkv[valid]), triton_ops.to(torch.cat([torch.zeros(1).long(), lengths.cumsum(0)]))
    padded = ops.frame_attention(triton_ops.to(qkv), 2, lengths=triton_ops.to(lengths)).cpu()
    packed = ops.frame_attention_packed(
        rows[:, :64], rows[:, 64:], offsets, offsets, 2, max_seqlen_q=40, max_seqlen_k=40
    )
    assert torch.equal(packed.cpu(), padded[valid])


@pytest.mark.parametrize("length", [-1, 41, 2**40])
def test_what_cannot_be_refused_is_nan(triton_ops, length):
    """On a GPU no host looks at the lengths: a clip of an impossible one is NaN, and no other clip is touched."""
    qkv, lengths = torch.randn(3, 40, 3 * 32), torch.tensor([40, length, 7])
    op = torch.ops.atst_fast.frame_attention
    y = op(triton_ops.to(qkv), triton_ops.to(lengths), 1, 0.2, False)[0].cpu()
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def test_a_sequence_longer_than_promised_is_nan(triton_ops):
    q, kv, offsets = torch.randn(90, 64).bfloat16(), torch.randn(90, 128).bfloat16(), torch.tensor([0, 20, 90])
    op = torch.ops.atst_fast.frame_attention_packed
    y = op(*map(triton_ops.to, (q, kv, offsets, offsets)), 64, 64, 1, 0.2)[0].cpu()
    assert y[:20].isfinite().all()
    assert y[20:].isnan().all()


def test_offsets_past_the_rows_end_with_them(triton_ops):
    q, kv, op = torch.randn(10, 64), torch.randn(10, 128), torch.ops.atst_fast.frame_attention_packed
    past, end = torch.tensor([0, 6, 15, 20]), torch.tensor([0, 6, 10, 10])
    y, z = (op(*map(triton_ops.to, (q, kv, n, n)), 20, 20, 1, 0.2)[0] for n in (past, end))
    assert torch.equal(y, z)


def test_rows_far_apart(triton_ops):
    """More than 2^31 elements from the first row of a tile to its last (in memory of which little is touched)."""
    far, width = 3 * 2**23, 3 * 16
    memory = torch.empty(127 * far + width, dtype=torch.bfloat16, device=triton_ops.device)
    qkv = memory.as_strided((1, 128, width), (0, far, 1)).copy_(torch.randn(1, 128, width))
    near = qkv.clone(memory_format=torch.contiguous_format)
    assert torch.equal(ops.frame_attention(qkv, 1), ops.frame_attention(near, 1))


@pytest.mark.parametrize("tokens", [130, 260])
def test_the_same_bits_twice_and_for_any_grid(triton_ops, monkeypatch, tokens):
    """A row's result depends neither on the other clips nor on whether one program walks over the tiles of a head."""
    kernels = pytest.importorskip("atst_fast.kernels.frame_attention")
    qkv = triton_ops.to(torch.randn(3, tokens, 3 * 32).bfloat16())
    args = triton_ops.to(torch.tensor([tokens, 70, 0])), 1, 0.2, True
    results = [*kernels.frame_attention(qkv, *args), *kernels.frame_attention(qkv[1:2], args[0][1:2], *args[1:])]
    monkeypatch.setattr(kernels, "_MANY", 1)
    again = [*kernels.frame_attention(qkv, *args), *kernels.frame_attention(qkv[1:2], args[0][1:2], *args[1:])]
    for a, b in zip(results, again):
        assert torch.equal(a, b)
    assert torch.equal(results[0][1:2], results[2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(triton_ops, dtype):
    """What the fake kernels promise of dtypes and shapes, halves included."""
    checks = ("test_schema", "test_faketensor")
    qkv, lengths = triton_ops.to(torch.randn(2, 9, 96).to(dtype)), triton_ops.to(torch.tensor([9, 4]))
    torch.library.opcheck(torch.ops.atst_fast.frame_attention.default, (qkv, lengths, 2, 0.3, False), test_utils=checks)
    args = (
        qkv[0, :, :32],
        qkv[1, :, 32:],
        triton_ops.to(torch.tensor([0, 9])),
        triton_ops.to(torch.tensor([0, 8])),
        9,
        8,
    )
    torch.library.opcheck(torch.ops.atst_fast.frame_attention_packed.default, (*args, 2, 0.3), test_utils=checks)


@pytest.mark.parametrize("name, case", list(golden_cases()))
def test_golden_layer(triton_ops, name, case):
    t, w, x, lengths, heads = parts(name, case)
    w = {key: triton_ops.to(value.detach()) for key, value in w.items()}
    x, lengths = triton_ops.to(x.detach()), None if lengths is None else triton_ops.to(lengths)
    y = layer(x, w, lengths, heads, "attend").cpu()
    alive = torch.ones(x.shape[0], dtype=torch.bool) if lengths is None else lengths.cpu() > 0
    assert_near(y[alive], t[f"out/{case}/y"][alive], tol.ATTENTION_GOLDEN)
