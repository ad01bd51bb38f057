"""The backward of frame_attention in Triton, through the public functions and autograd, and every form by itself."""

import pytest
import torch

from atst_fast import ops
from atst_fast.reference import frame_attention as reference
from tests import tolerances as tol
from tests.triton import interpreter

kernels = pytest.importorskip("atst_fast.kernels.frame_attention_backward", reason="needs triton")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")
# (one program, own, other): both forms, dS from the rounded P, tiles that do and do not divide the numbers below
FORMS = [
    kernels.Config(True, 128, 64, 4, 2),
    kernels.Config(True, 256, 32, 4, 2, True),
    kernels.Config(False, 64, 32, 4, 2),
    kernels.Config(False, 32, 64, 4, 1),
]


def ragged(tokens):
    return torch.tensor([tokens, 0, 1, tokens // 2 + 1])


def near_float64(grads, wanted, plain):
    """Of the largest gradient, what float32 rounds; for halves, twice the error of plain PyTorch in the same dtype."""
    for grad, want, by_torch in zip(grads, wanted, plain, strict=True):
        limit = tol.ATTENTION_GRADIENT * want.abs().max().item()
        if grad.dtype != torch.float32:
            limit += 2 * (by_torch.double() - want).abs().max().item()
        error = (grad.double().cpu() - want).abs().max().item()
        assert error <= limit, f"{error} > {limit}"


def gradients(function, grad, *inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*inputs), inputs, grad, allow_unused=True, materialize_grads=True)


def padded_case(batch, tokens, heads, head_dim, dtype, lengths, attend):
    """qkv and the gradient, NaN where nothing may be read; and both without."""
    clean = torch.randn(batch, tokens, 3 * heads * head_dim).to(dtype)
    clean_grad = torch.randn(batch, tokens, heads * head_dim).to(dtype)
    qkv, grad = clean.clone(), clean_grad.clone()
    if lengths is not None:
        padded = torch.arange(tokens) >= lengths[:, None]
        qkv[..., heads * head_dim :][padded] = NAN
        dead = (lengths == 0)[:, None] & padded if attend else padded
        qkv[dead], grad[dead] = NAN, NAN
        clean_grad[dead] = 0
    return qkv, grad, clean, clean_grad


def wanted(clean, clean_grad, lengths, heads, attend):
    """The gradient in float64 and by PyTorch in the dtype of the inputs."""
    scale = (clean.shape[2] // 3 // heads) ** -0.5
    function = lambda x: reference.frame_attention(x, lengths, heads, scale, attend)[0]  # noqa: E731
    return gradients(function, clean_grad.double(), clean.double()), gradients(function, clean_grad, clean)


def check_padded(triton_ops, shape, dtype, lengths=None, attend=False):
    qkv, grad, *clean = padded_case(*shape, dtype, lengths, attend)
    n = None if lengths is None else triton_ops.to(lengths)
    mode = "attend" if attend else "zero"
    function = lambda x: ops.frame_attention(x, shape[2], lengths=n, padded_queries=mode)  # noqa: E731
    with triton_ops.poison():
        grads = gradients(function, triton_ops.to(grad), triton_ops.to(qkv))
    assert grads[0].dtype == dtype
    near_float64(grads, *wanted(*clean, lengths, shape[2], attend))


RAGGED = {torch.float32: (1, 7, 64, 130, 250, 257), torch.bfloat16: (1, 64, 250, 257), torch.float16: (7, 250)}


@pytest.mark.parametrize("dtype, tokens", [(dtype, n) for dtype, numbers in RAGGED.items() for n in numbers])
def test_ragged_clips_against_float64(triton_ops, tokens, dtype):
    check_padded(triton_ops, (4, tokens, 1, 64), dtype, ragged(tokens))


@pytest.mark.parametrize("tokens", [7, 130])
def test_padded_queries_attend(triton_ops, tokens):
    check_padded(triton_ops, (4, tokens, 1, 32), torch.bfloat16, ragged(tokens), attend=True)


@pytest.mark.parametrize(
    "head_dim, dtype", [*((n, torch.bfloat16) for n in (5, 48, 96, 128, 200)), (96, torch.float32)]
)
def test_head_dims(triton_ops, head_dim, dtype):
    check_padded(triton_ops, (2, 40, 2, head_dim), dtype, torch.tensor([40, 33]))


def test_a_long_clip(triton_ops):
    check_padded(triton_ops, (1, 330, 1, 32), torch.bfloat16)


@pytest.mark.parametrize("dtype, attend", [(torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("config", FORMS)
def test_every_form_against_float64(triton_ops, config, attend, dtype):
    """Of its own, on the forward of the reference: 100 of 128 or 256 queries, tiles of keys that do not divide 70."""
    lengths = torch.tensor([100, 70, 0])
    qkv, grad, *clean = padded_case(3, 100, 2, 24, dtype, lengths, attend)
    out, lse = reference.frame_attention(clean[0], lengths, 2, 24**-0.5, attend)
    args = map(triton_ops.to, (grad, qkv, out, lse.float(), lengths))
    with triton_ops.poison():
        result = kernels.frame_attention_backward(*args, 2, 24**-0.5, attend, config=config)
    near_float64([result], *wanted(*clean, lengths, 2, attend))


# queries and keys of each sequence, rows of q and of kv past the last one
PACKED = [
    ([(13, 40), (0, 9), (70, 130), (5, 0)], 0, 0),
    ([(3, 130), (65, 64)], 4, 140),
    ([(140, 20), (1, 1)], 270, 3),
    ([], 5, 6),
]


def packed_case(sizes, past_q, past_k, dtype):
    cu_q, cu_k = (torch.tensor([0, *(s[i] for s in sizes)]).cumsum(0) for i in (0, 1))
    q, kv = torch.randn(int(cu_q[-1]) + past_q, 64).to(dtype), torch.randn(int(cu_k[-1]) + past_k, 128).to(dtype)
    grad = torch.randn_like(q)
    for x, end in ((q, cu_q[-1]), (grad, cu_q[-1]), (kv, cu_k[-1])):
        x[end:] = NAN
    return q, kv, grad, cu_q, cu_k


PACKED_CASES = [*((*case, torch.float32, True) for case in PACKED), (*PACKED[1], torch.bfloat16, True)]
PACKED_CASES += [(*PACKED[0], torch.float16, False)]


@pytest.mark.parametrize("sizes, past_q, past_k, dtype, bounded", PACKED_CASES)
def test_sequences_end_to_end(triton_ops, sizes, past_q, past_k, dtype, bounded):
    """Empty ones, different numbers of queries and keys, rows of no sequence, with and without the longest."""
    q, kv, grad, cu_q, cu_k = packed_case(sizes, past_q, past_k, dtype)
    longest = {f"max_seqlen_{n}": max((s[i] for s in sizes), default=0) for i, n in enumerate("qk")} if bounded else {}
    offsets = triton_ops.to(cu_q.int()), triton_ops.to(cu_k)
    with triton_ops.poison():
        function = lambda a, b: ops.frame_attention_packed(a, b, *offsets, 2, **longest)  # noqa: E731
        grads = gradients(function, triton_ops.to(grad), triton_ops.to(q), triton_ops.to(kv))
    function = lambda a, b: reference.frame_attention_packed(a, b, cu_q, cu_k, 0, 0, 2, 32**-0.5)[0]  # noqa: E731
    ends = cu_q[-1], cu_k[-1]
    want = gradients(function, grad.double(), q.double(), kv.double())
    plain = gradients(function, grad, q, kv)
    cut = lambda tensors: [x[:n] for x, n in zip(tensors, ends)]  # noqa: E731
    if sizes:
        near_float64(cut(grads), cut(want), cut(plain))
    for g, n in zip(grads, ends):
        assert torch.equal(g[n:].cpu(), torch.zeros_like(g[n:].cpu()))


@pytest.mark.parametrize("config", FORMS)
def test_every_form_end_to_end(triton_ops, config):
    """More rows of no sequence than a program has; sequences shorter than the longest one."""
    q, kv, grad, cu_q, cu_k = packed_case([(13, 40), (0, 9), (100, 70), (5, 0)], 300, 90, torch.float32)
    function = lambda a, b: reference.frame_attention_packed(a, b, cu_q, cu_k, 0, 0, 2, 32**-0.5)  # noqa: E731
    out, lse = function(q, kv)
    args = map(triton_ops.to, (grad, q, kv, out, lse, cu_q, cu_k))
    with triton_ops.poison():
        grads = kernels.frame_attention_packed_backward(*args, 100, 70, 2, 32**-0.5, config=config)
    want = gradients(lambda a, b: function(a, b)[0], grad.double(), q.double(), kv.double())
    for g, x, n in zip(grads, want, (cu_q[-1], cu_k[-1])):
        near_float64([g[:n]], [x[:n]], [None])
        assert torch.equal(g[n:].cpu(), torch.zeros_like(g[n:].cpu()))


@pytest.mark.parametrize("config, length", [(FORMS[0], -1), (FORMS[0], 2**40), (FORMS[2], 41)])
def test_what_cannot_be_refused_is_nan(triton_ops, config, length):
    """On a GPU no host looks at the lengths: a clip of an impossible one is NaN, and no other clip is touched."""
    qkv, grad = torch.randn(3, 40, 3 * 32), torch.randn(3, 40, 32)
    out, lse = reference.frame_attention(qkv, None, 1, 0.2, False)
    args = map(triton_ops.to, (grad, qkv, out, lse, torch.tensor([40, length, 7])))
    result = kernels.frame_attention_backward(*args, 1, 0.2, False, config=config).cpu()
    assert result[1].isnan().all()
    assert result[[0, 2]].isfinite().all()


@pytest.mark.parametrize("config", [FORMS[0], FORMS[2]])
def test_a_sequence_longer_than_promised_is_nan(triton_ops, config):
    q, kv, grad = torch.randn(180, 32), torch.randn(180, 64), torch.randn(180, 32)
    offsets = torch.tensor([0, 20, 180])
    out, lse = reference.frame_attention_packed(q, kv, offsets, offsets, 160, 160, 1, 0.2)
    args = map(triton_ops.to, (grad, q, kv, out, lse, offsets, offsets))
    dq, dkv = kernels.frame_attention_packed_backward(*args, 64, 64, 1, 0.2, config=config)
    assert dq[:20].isfinite().all()
    assert dkv[:20].isfinite().all()
    assert dq[20 + config.own :].isnan().all()


@pytest.mark.parametrize("config", FORMS)
def test_the_same_bits_twice_and_in_any_order_of_programs(triton_ops, monkeypatch, config):
    lengths = torch.tensor([70, 50, 0])
    qkv, grad = torch.randn(3, 70, 3 * 32).bfloat16(), torch.randn(3, 70, 32).bfloat16()
    out, lse = reference.frame_attention(qkv, lengths, 1, 0.2, True)
    args = *map(triton_ops.to, (grad, qkv, out, lse.float(), lengths)), 1, 0.2, True
    results = [kernels.frame_attention_backward(*args, config=config) for _ in range(2)]
    if interpreter.enabled():
        from triton.runtime.interpreter import InterpreterBuilder

        def reversed_index(self, x, y, z):
            self.grid_idx = self.grid_dim[0] - 1 - x, y, z

        monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", reversed_index)
        results.append(kernels.frame_attention_backward(*args, config=config))
    for other in results[1:]:
        assert torch.equal(other, results[0])


def test_columns_of_a_wider_tensor(triton_ops):
    wide = torch.randn(2, 20, 300)
    for x in (wide[..., 1:97], wide[..., 16:208:2], wide[1:, :1, :96], wide[:, :3, :96].transpose(0, 1)):
        cotangent = torch.randn(*x.shape[:2], 32)
        function = lambda y: ops.frame_attention(y, 2)  # noqa: E731
        grads = gradients(function, triton_ops.to(cotangent), triton_ops.to(x))
        near_float64(grads, *wanted(x, cotangent, None, 2, False))


@pytest.mark.parametrize("shape", [(0, 4, 24), (4, 0, 24), (4, 1, 24), (1, 4, 24)])
def test_axes_of_one_or_none(triton_ops, shape):
    x, grad = torch.randn(shape), torch.randn(*shape[:2], 8)
    result = gradients(lambda y: ops.frame_attention(y, 2), triton_ops.to(grad), triton_ops.to(x))
    assert result[0].shape == x.shape
    if x.numel():
        near_float64(result, *wanted(x, grad, None, 2, False))


def test_large_scores_do_not_overflow(triton_ops):
    qkv, grad, lengths = 30 * torch.randn(2, 70, 3 * 32), torch.randn(2, 70, 32), torch.tensor([70, 7])
    function = lambda x: ops.frame_attention(x, 1, lengths=triton_ops.to(lengths))  # noqa: E731
    (result,) = gradients(function, triton_ops.to(grad), triton_ops.to(qkv))
    assert result.isfinite().all()
