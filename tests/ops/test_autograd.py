"""What the operators do with automatic differentiation of other kinds, and with the modes a caller may be in."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from atst_fast import ops
from atst_fast.ops.log_mel import make_tables, tables
from tests.tolerances import MEL_OTHER_WAY

ROWS = torch.tensor([0, 5])
CALLS = {
    "bias_gelu": (lambda h: ops.bias_gelu(h, h[0]), (3, 4)),
    "add_branch": (lambda h: ops.add_branch(h, h, h[0], alpha=2.0), (3, 4)),
    "batch_norm_relu": (lambda h: ops.batch_norm_relu(h, h[0], h[0]), (3, 4)),
    "frame_attention": (lambda x: ops.frame_attention(x, 2), (1, 5, 24)),
    "frame_attention_packed": (lambda x: ops.frame_attention_packed(x[:, :8], x[:, 8:], ROWS, ROWS, 2), (5, 24)),
    "patch_embed": (lambda w: ops.patch_embed(torch.ones(1, 1, 8, 8), w, patch=(8, 2)), (4, 16)),
}


@pytest.mark.parametrize("op", CALLS)
def test_a_gradient_of_a_gradient_is_refused(op):
    call, shape = CALLS[op]
    x = torch.randn(shape, requires_grad=True)
    (grad,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"atst_fast.{op}_backward: gradients of gradients are not implemented"):
        torch.autograd.grad(grad.square().sum(), x)


@pytest.mark.parametrize("op", CALLS)
def test_float64_has_gradients_of_gradients_and_forward_mode(op):
    call, shape = CALLS[op]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(call, x)
    torch.func.jvp(call, (x.detach(),), (x.detach(),))


@pytest.mark.parametrize("op", CALLS)
def test_forward_mode_is_refused(op):
    call, shape = CALLS[op]
    x = torch.randn(shape)
    with pytest.raises(NotImplementedError, match=f"{op}: .* has a forward-mode tangent"):
        torch.func.jvp(call, (x,), (x,))


def test_tables_made_in_any_mode_are_ordinary():
    """The first caller's mode must not stay in the cache that all later ones share."""
    wave = torch.randn(4000, requires_grad=True)
    modes = (torch.inference_mode(), FakeTensorMode(), torch.device("meta"), _float64())
    for f_min, mode in zip((61.25, 62.25, 63.25, 64.25), modes):  # that nobody else asks for
        settings = (16000, 1024, None, f_min, 7800.0, 64)
        with mode:
            made = tables(*settings)
        assert all(torch.equal(a, b) for a, b in zip(made, make_tables(*settings)))
        ops.log_mel(wave, f_min=f_min).sum().backward()


class _float64:
    def __enter__(self):
        torch.set_default_dtype(torch.float64)

    def __exit__(self, *_):
        torch.set_default_dtype(torch.float32)


def test_differentiable_log_mel_under_autocast():
    wave = torch.randn(4000)
    want = ops.log_mel(wave)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.log_mel(wave.requires_grad_())
    torch.testing.assert_close(got.detach(), want, rtol=0, atol=MEL_OTHER_WAY)


def test_gradients_of_patch_embed_under_autocast():
    """The guard must hold in the backward as well, which runs wherever the caller's loss.backward() stands."""
    weight = torch.randn(8, 256, requires_grad=True)
    mel = torch.randn(2, 1, 64, 40)
    (want,) = torch.autograd.grad(ops.patch_embed(mel, weight).square().sum(), weight)
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = torch.autograd.grad(ops.patch_embed(mel, weight).square().sum(), weight)
    assert torch.equal(got, want)
