import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atst_fast import ops
from atst_fast.reference import frame_attention as reference
from tests import tolerances as tol
from tests.golden import load

GOLDEN = ["attention_d48_h3_t37", "attention_d48_h3_t37_bias", "attention_d128_h2_t250", "attention_d192_h3_t64"]


def parts(name, case):
    """Projections of a golden attention layer around the operator; case names the lengths ("none": without)."""
    t, _ = load(name)
    heads = int(name.split("_h")[1].split("_")[0])
    w = {k.removeprefix("in/w/"): v.clone().requires_grad_() for k, v in t.items() if k.startswith("in/w/")}
    x = t["in/x"].clone().requires_grad_()
    lengths = t.get(f"in/{case}")
    return t, w, x, lengths, heads


def layer(x, w, lengths, heads, padded_queries):
    qkv = torch.nn.functional.linear(x, w["qkv.weight"], w.get("qkv.bias"))
    y = ops.frame_attention(qkv, heads, lengths=lengths, padded_queries=padded_queries)
    return torch.nn.functional.linear(y, w["proj.weight"], w["proj.bias"])


def golden_cases():
    for name in GOLDEN:
        t, _ = load(name)
        for case in sorted({k.split("/")[1] for k in t if k.startswith("out/") and k.endswith("/y")}):
            yield name, case


def assert_near(actual, expected, rtol):
    """Within rtol of the largest expected magnitude."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=rtol * max(expected.abs().max().item(), 1e-30))


@pytest.mark.parametrize("name, case", list(golden_cases()))
def test_golden_layer(isa, name, case):
    """Output and gradients of the official layer, padded query rows included (clips of length 0 left out: there the
    official mask cancels and the layer attends to the padding)."""
    t, w, x, lengths, heads = parts(name, case)
    y = layer(x, w, lengths, heads, "attend")
    alive = torch.ones(x.shape[0], dtype=torch.bool) if lengths is None else lengths > 0
    assert_near(y[alive], t[f"out/{case}/y"][alive], tol.ATTENTION_GOLDEN)
    if not alive.all():
        return
    y.backward(t["in/dy"])
    assert_near(x.grad, t[f"grad/{case}/x"], tol.ATTENTION_GOLDEN)
    for key in w:
        if f"grad/{case}/w/{key}" in t:
            assert_near(w[key].grad, t[f"grad/{case}/w/{key}"], tol.ATTENTION_GOLDEN)


@pytest.mark.parametrize("name, case", list(golden_cases()))
def test_golden_valid_rows_with_zero_padded_queries(name, case):
    t, w, x, lengths, heads = parts(name, case)
    if lengths is None:
        return
    y = layer(x, w, lengths, heads, "zero")
    valid = torch.arange(x.shape[1]) < lengths[:, None]
    assert_near(y[valid], t[f"out/{case}/y"][valid], tol.ATTENTION_GOLDEN)
    assert torch.equal(y[~valid], w["proj.bias"].expand_as(y[~valid]))


def compare(qkv, lengths, heads, mode, dtype=torch.float32):
    """Our output and gradient and the float64 reference's."""
    grad = torch.randn(*qkv.shape[:2], qkv.shape[2] // 3)
    a = qkv.to(dtype).detach().requires_grad_()
    y = ops.frame_attention(a, heads, lengths=lengths, padded_queries=mode)
    y.backward(grad.to(dtype))
    b = a.detach().double().requires_grad_()
    scale = (qkv.shape[2] // 3 // heads) ** -0.5
    z, _ = reference.frame_attention(b, lengths, heads, scale, mode == "attend")
    z.backward(grad.to(dtype).double())
    return y, a.grad, z, b.grad


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 3),
    st.integers(0, 70),
    st.integers(1, 4),
    st.sampled_from([1, 5, 8, 16, 32, 64, 80, 128]),
    st.sampled_from(["zero", "attend"]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_random_shapes_against_float64(batch, tokens, heads, head_dim, mode, ragged, seed):
    torch.manual_seed(seed)
    qkv = torch.randn(batch, tokens, 3 * heads * head_dim)
    lengths = torch.randint(0, tokens + 1, (batch,)) if ragged else None
    y, dy, z, dz = compare(qkv, lengths, heads, mode)
    assert (y - z).abs().max() <= tol.ATTENTION_FORWARD if y.numel() else True
    if dz.numel():
        assert_near(dy.double(), dz, tol.ATTENTION_GRADIENT)


@pytest.mark.parametrize("mode", ["zero", "attend"])
@pytest.mark.parametrize("tokens", [0, 1, 2, 47, 48, 49, 250])
def test_every_instruction_set_against_float64(isa, tokens, mode):
    y, dy, z, dz = compare(torch.randn(3, tokens, 3 * 128), torch.tensor([tokens, tokens // 2, 0]), 2, mode)
    if tokens:
        assert (y - z).abs().max() <= tol.ATTENTION_FORWARD
        assert_near(dy.double(), dz, tol.ATTENTION_GRADIENT)


def test_long_sequences():
    y, dy, z, dz = compare(torch.randn(1, 1500, 3 * 64), None, 1, "zero")
    assert (y - z).abs().max() <= tol.ATTENTION_FORWARD
    assert_near(dy.double(), dz, tol.ATTENTION_GRADIENT)


def test_large_scores_do_not_overflow(isa):
    y, dy, z, _ = compare(30 * torch.randn(2, 40, 3 * 32), torch.tensor([40, 7]), 1, "zero")
    assert torch.isfinite(y).all()
    assert torch.isfinite(dy).all()
    # scores of about 5,000 are rounded to 2^-11, which the exponential passes on
    torch.testing.assert_close(y.double(), z, rtol=0, atol=30 * tol.ATTENTION_LARGE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_plain_pytorch(dtype):
    """At most twice the error of SDPA in the same dtype, both against float64; ours accumulates in float32."""
    qkv, lengths = torch.randn(2, 60, 3 * 64).to(dtype), torch.tensor([60, 33])
    y, dy, z, _ = compare(qkv, lengths, 2, "zero", dtype)
    b = qkv.clone().requires_grad_()
    q, k, v = b.reshape(2, 60, 3, 2, 32).permute(2, 0, 3, 1, 4)
    valid = torch.arange(60) < lengths[:, None]
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None])
    plain = plain.transpose(1, 2).flatten(2) * valid[..., None]
    assert (y - z).abs().max() <= 2 * (plain - z).abs().max()
    assert y.dtype == dtype
    assert dy.dtype == dtype


@pytest.mark.parametrize("mode", ["zero", "attend"])
def test_padding_is_never_read(isa, mode):
    """NaN in padded keys and values reaches neither output nor gradient; NaN in one clip stays there."""
    clean = torch.randn(3, 20, 3 * 32)
    lengths = torch.tensor([20, 11, 0])
    dirty = clean.clone()
    dirty[1, 11:, 32:] = float("nan")
    dirty[2, :, 32:] = float("nan")
    if mode == "zero":
        dirty[1, 11:] = dirty[2] = float("nan")
    results = []
    for x in (clean, dirty):
        x = x.clone().requires_grad_()
        y = ops.frame_attention(x, 2, lengths=lengths, padded_queries=mode)
        y.sum().backward()
        results.append((y.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    poisoned = clean.clone()
    poisoned[0, 3] = float("nan")
    y = ops.frame_attention(poisoned, 2, lengths=lengths)
    assert torch.isfinite(y[1:]).all()
    assert torch.isnan(y[0]).any()


def test_outputs_are_written_in_full(isa):
    """Fresh memory is filled with NaN by torch's deterministic mode; none of it may remain."""
    torch.use_deterministic_algorithms(True)
    try:
        x = torch.randn(3, 21, 3 * 24, requires_grad=True)
        y = ops.frame_attention(x, 3, lengths=torch.tensor([21, 6, 0]))
        y.sum().backward()
        q, kv = torch.randn(5, 24, requires_grad=True), torch.randn(9, 48, requires_grad=True)
        z = ops.frame_attention_packed(q, kv, torch.tensor([0, 2, 5, 5]), torch.tensor([0, 0, 4, 9]), 3)
        z.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    for t in (y, x.grad, z, q.grad, kv.grad):
        assert torch.isfinite(t).all()


def test_packed_equals_padded(isa):
    """Sequences end to end as views of one packed qkv: no copy, the same numbers, gradients included."""
    lengths = [13, 1, 0, 7]
    tokens = torch.randn(sum(lengths), 3 * 48, requires_grad=True)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    packed = ops.frame_attention_packed(tokens[:, :48], tokens[:, 48:], offsets, offsets, 3)
    padded = torch.nn.utils.rnn.pad_sequence(tokens.detach().split(lengths), batch_first=True).requires_grad_()
    full = ops.frame_attention(padded, 3, lengths=torch.tensor(lengths))
    valid = torch.arange(13) < torch.tensor(lengths)[:, None]
    assert torch.equal(packed, full[valid])
    grad = torch.randn_like(packed)
    packed.backward(grad)
    full.backward(torch.zeros_like(full).masked_scatter(valid[..., None], grad))
    assert torch.equal(tokens.grad, padded.grad[valid])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 60)), max_size=4), st.integers(0, 2**31))
def test_packed_against_float64(sizes, seed):
    torch.manual_seed(seed)
    cu_q = torch.tensor([0, *torch.tensor([a for a, _ in sizes], dtype=torch.int64).cumsum(0).tolist()])
    cu_k = torch.tensor([0, *torch.tensor([b for _, b in sizes], dtype=torch.int64).cumsum(0).tolist()])
    q, kv = torch.randn(cu_q[-1], 32), torch.randn(cu_k[-1], 64)
    grad = torch.randn_like(q)
    q32, kv32 = q.clone().requires_grad_(), kv.clone().requires_grad_()
    y = ops.frame_attention_packed(q32, kv32, cu_q.int(), cu_k.int(), 2)
    y.backward(grad)
    q64, kv64 = q.double().requires_grad_(), kv.double().requires_grad_()
    z = ops.frame_attention_packed(q64, kv64, cu_q, cu_k, 2)
    z.backward(grad.double())
    if z.numel():
        assert (y - z).abs().max() <= tol.ATTENTION_FORWARD
        assert (q32.grad - q64.grad).abs().max() <= tol.ATTENTION_GRADIENT * max(q64.grad.abs().max().item(), 1)
    if kv64.numel():
        assert (kv32.grad - kv64.grad).abs().max() <= tol.ATTENTION_GRADIENT * max(kv64.grad.abs().max().item(), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_past_the_last_offset_belong_to_no_sequence(dtype):
    """They may be anything, give zeros and get no gradient; the others are as without them."""
    offsets = torch.tensor([0, 2, 5]), torch.tensor([0, 4, 9])
    results = []
    for past in (0, 3):
        q, kv = (torch.cat([x, torch.full_like(x[:past], float("nan"))]).to(dtype) for x in _packed_rows())
        q, kv = q.requires_grad_(), kv.requires_grad_()
        y = ops.frame_attention_packed(q, kv, *offsets, 3, max_seqlen_q=3, max_seqlen_k=5)
        y[:5].square().sum().backward()
        for x, rows in ((y, 5), (q.grad, 5), (kv.grad, 9)):
            assert torch.equal(x[rows:], torch.zeros_like(x[rows:]))
        results.append((y[:5].detach(), q.grad[:5], kv.grad[:9]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def _packed_rows():
    torch.manual_seed(3)
    return torch.randn(5, 24), torch.randn(9, 48)


def test_same_bits_on_one_thread_and_two_and_twice(threads):
    qkv, grad = torch.randn(4, 130, 3 * 96), torch.randn(4, 130, 96)
    results = []
    for n in (1, 2, 2):
        threads(n)
        x = qkv.clone().requires_grad_()
        y = ops.frame_attention(x, 3, lengths=torch.tensor([130, 50, 1, 128]))
        y.backward(grad)
        results.append((y.detach(), x.grad))
    for y, dx in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(dx, results[0][1])


@pytest.mark.parametrize("attend", [False, True])
def test_reference_gradients(attend):
    qkv = torch.randn(3, 5, 3 * 4, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([5, 2, 0])
    assert torch.autograd.gradcheck(lambda x: reference.frame_attention(x, lengths, 2, 0.7, attend)[0], (qkv,))
    q, kv = torch.randn(4, 6, dtype=torch.float64), torch.randn(5, 12, dtype=torch.float64)
    args = (torch.tensor([0, 3, 4]), torch.tensor([0, 2, 5]), 3, 3, 3, 0.7)
    inputs = (q.requires_grad_(), kv.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: reference.frame_attention_packed(a, b, *args)[0], inputs)


def test_opcheck():
    qkv, lengths = torch.randn(2, 9, 3 * 16, requires_grad=True), torch.tensor([9, 4])
    torch.library.opcheck(torch.ops.atst_fast.frame_attention.default, (qkv, lengths, 2, 0.3, False))
    out, lse = torch.ops.atst_fast.frame_attention(qkv.detach(), lengths, 2, 0.3, False)
    args = (torch.randn_like(out), qkv.detach(), out, lse, lengths, 2, 0.3, False)
    torch.library.opcheck(torch.ops.atst_fast.frame_attention_backward.default, args)
    q, kv = torch.randn(4, 16, requires_grad=True), torch.randn(6, 32, requires_grad=True)
    offsets = (torch.tensor([0, 1, 4]), torch.tensor([0, 4, 6]))
    torch.library.opcheck(torch.ops.atst_fast.frame_attention_packed.default, (q, kv, *offsets, 3, 4, 2, 0.3))
    out, lse = torch.ops.atst_fast.frame_attention_packed(q.detach(), kv.detach(), *offsets, 3, 4, 2, 0.3)
    args = (torch.randn_like(out), q.detach(), kv.detach(), out, lse, *offsets, 3, 4, 2, 0.3)
    torch.library.opcheck(torch.ops.atst_fast.frame_attention_packed_backward.default, args)


def test_compiles_without_a_graph_break():
    compiled = torch.compile(
        lambda x, n: ops.frame_attention(x, 2, lengths=n).relu(), fullgraph=True, backend="aot_eager"
    )
    x, n = torch.randn(2, 9, 3 * 16, requires_grad=True), torch.tensor([9, 4])
    y = compiled(x, n)
    assert torch.equal(y, ops.frame_attention(x, 2, lengths=n).relu())
    y.sum().backward()
    assert x.grad is not None


def qkv(*shape, **kw):
    return torch.zeros(*(shape or (2, 4, 24)), **kw)


ERRORS = [
    (lambda: ops.frame_attention([1], 2), TypeError, r"frame_attention: qkv must be a tensor .*got list"),
    (lambda: ops.frame_attention(qkv(dtype=torch.int64), 2), TypeError, "of dtype float32 or .*got int64"),
    (lambda: ops.frame_attention(qkv(4, 24), 2), ValueError, r"qkv must be \[B, L, 3\*H\*Dh\].*got float32 \[4, 24\]"),
    (lambda: ops.frame_attention(qkv(), 5), ValueError, r"qkv must be as wide as a multiple of 3 x num_heads \(5\)"),
    (lambda: ops.frame_attention(qkv(), 0), ValueError, "num_heads must be an integer of at least 1, got int 0"),
    (lambda: ops.frame_attention(qkv(1, 1, 3 * 320), 1), ValueError, r"head dimension of at most 256 \(here 320\)"),
    (lambda: ops.frame_attention(qkv(), 2, scale=0.0), ValueError, "scale must be positive and finite, got float 0.0"),
    (lambda: ops.frame_attention(qkv(), 2, padded_queries="skip"), ValueError, "must be 'zero' or 'attend'"),
    (lambda: ops.frame_attention(qkv(), 2, lengths=[4, 4]), TypeError, r"lengths must be a tensor \[B\] = \[2\]"),
    (lambda: ops.frame_attention(qkv(), 2, lengths=torch.tensor([4])), ValueError, r"must be \[B\].*int64 \[1\]"),
    (lambda: ops.frame_attention(qkv(), 2, lengths=torch.tensor([4, 5])), ValueError, r"lengths\[1\] must be .* L = 4"),
    (lambda: ops.frame_attention(qkv(), 2, lengths=torch.tensor([-1, 4])), ValueError, r"lengths\[0\] .*got -1"),
    (lambda: ops.frame_attention(qkv(), 2, lengths=torch.tensor([4.0, 4])), TypeError, "of dtype int64 or int32"),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", ERRORS)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def packed(q=(4, 8), kv=(6, 16), cu_q=(0, 4), cu_k=(0, 6), heads=2, **longest):
    q, kv, cu_q, cu_k = torch.zeros(q), torch.zeros(kv), torch.tensor(cu_q), torch.tensor(cu_k)
    return ops.frame_attention_packed(q, kv, cu_q, cu_k, heads, **longest)


PACKED_ERRORS = [
    ({"q": (4,)}, r"q must be \[Mq, H\*Dh\]"),
    ({"kv": (6, 8)}, r"kv must be \[Mk, 16\], twice as wide as q"),
    ({"heads": 3}, "q must be as wide as a multiple of 1 x num_heads"),
    ({"cu_q": (0, 5)}, r"cu_seqlens_q must be \[S \+ 1\] ascending from 0 to at most the 4 rows of q, got \[0, 5\]"),
    ({"cu_q": (1, 4)}, "cu_seqlens_q must be .* from 0"),
    ({"cu_k": (0, 7)}, "cu_seqlens_k must be .* at most the 6 rows of kv"),
    ({"cu_q": (0, 5, 4), "cu_k": (0, 1, 6)}, "cu_seqlens_q must be .*ascending"),
    ({"cu_k": (0, 1, 6)}, r"cu_seqlens_k must be as long as cu_seqlens_q \(2\)"),
    ({"max_seqlen_q": 3}, "max_seqlen_q must be at least the 4 rows of the longest sequence, got int 3"),
    ({"max_seqlen_k": -1}, "max_seqlen_k must be an integer of at least 0, or None, got int -1"),
]


@pytest.mark.parametrize("changed, message", PACKED_ERRORS)
def test_packed_errors(changed, message):
    with pytest.raises(ValueError, match="frame_attention_packed: " + message):
        packed(**changed)


def test_a_direct_call_with_bad_input_is_refused_too():
    op = torch.ops.atst_fast.frame_attention
    for args in [
        (qkv(dtype=torch.float64), None, 2, 1.0, False),
        (qkv().transpose(1, 2), None, 2, 1.0, False),
        (qkv(), torch.tensor([9, 4]), 2, 1.0, False),
        (qkv(), None, 7, 1.0, False),
    ]:
        with pytest.raises(RuntimeError, match="frame_attention: "):
            op(*args)


@pytest.mark.parametrize("shape", [(4, 1, 24), (1, 4, 24), (0, 4, 24), (4, 0, 24)])
def test_an_axis_of_one_or_none_may_have_any_stride(shape):
    x = torch.randn(shape[1], shape[0], 24).transpose(0, 1).requires_grad_()
    want = x.detach().clone(memory_format=torch.contiguous_format).double().requires_grad_()
    ops.frame_attention(x, 2).sum().backward()
    ops.frame_attention(want, 2).sum().backward()
    torch.testing.assert_close(x.grad, want.grad.float())


def test_packed_without_queries_has_a_gradient():
    q, kv = torch.zeros(0, 8, requires_grad=True), torch.randn(5, 16, requires_grad=True)
    ops.frame_attention_packed(q, kv, torch.tensor([0, 0]), torch.tensor([0, 5]), 2).sum().backward()
    assert torch.equal(kv.grad, torch.zeros(5, 16))


@pytest.mark.parametrize("padded_queries", ["zero", "attend"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_padded_reaches_no_gradient(dtype, value, padded_queries):
    x = torch.randn(2, 6, 24, dtype=dtype)
    lengths = torch.tensor([6, 4])
    x[1, 4:, 8:] = value  # keys and values
    if padded_queries == "zero":
        x[1, 4:] = value
    x.requires_grad_()
    ops.frame_attention(x, 2, lengths=lengths, padded_queries=padded_queries)[:, :4].sum().backward()
    assert x.grad[0].isfinite().all()
    assert x.grad[1, :4].isfinite().all()


def test_columns_of_a_wider_tensor():
    wide = torch.randn(2, 5, 40)
    for x in (wide[..., :24], wide[..., ::2][..., :18], wide.transpose(0, 1)[:, :, :24]):
        torch.testing.assert_close(ops.frame_attention(x, 2), ops.frame_attention(x.double(), 2).float())
