import pytest
import torch

from atst_fast import ops
from atst_fast.reference import patch_embed as reference
from tests import tolerances as tol
from tests.golden import load
from tests.ops.test_patch_embed import TOKENS, assert_near, golden_tokens, problem, run

CASES = [  # clips, bins, frames, patch, stride, width
    (2, 64, 41, (64, 4), None, 48),
    (1, 64, 1001, (64, 4), None, 8),
    (3, 32, 20, (16, 16), (10, 3), 17),
    (1, 20, 9, (3, 5), (2, 1), 33),
    (2, 7, 30, (7, 1), None, 5),
    (1, 5, 70, (5, 70), None, 3),
    (2, 64, 3, (64, 4), None, 8),
    (0, 64, 8, (64, 4), None, 8),
]


def on(triton_ops, named):
    return {k: triton_ops.to(v.detach()).requires_grad_() for k, v in named.items()}


def gradients(named, mask, patch, stride, grad):
    y = run(named, mask, patch, stride)
    y.backward(grad.to(y.dtype))
    none = {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in named.items()}
    return y.detach().cpu(), {k: v.cpu() for k, v in none.items()}


def in_float64(named, mask, patch, stride, grad):
    """Results and gradients, and the gradients' sums without their signs, which their rounding is relative to."""
    exact = {k: v.detach().cpu().double().requires_grad_() for k, v in named.items()}
    sizes = {k: v.detach().abs().requires_grad_() for k, v in exact.items()}
    z, right = gradients(exact, mask, patch, stride, grad.double())
    return z, right, gradients(sizes, mask, patch, stride, grad.double().abs())[1]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("clips, bins, frames, patch, stride, width", CASES)
def test_float32_and_gradients_against_float64(triton_ops, clips, bins, frames, patch, stride, width, masked):
    named, mask, tokens = problem(clips, bins, frames, patch, stride, width, masked)
    grad = torch.randn(clips, tokens, width)
    z, right, sizes = in_float64(named, mask, patch, stride, grad)
    with triton_ops.poison():
        device_mask = None if mask is None else triton_ops.to(mask)
        y, mine = gradients(on(triton_ops, named), device_mask, patch, stride, triton_ops.to(grad))
    assert y.dtype == torch.float32
    assert y.shape == z.shape
    assert_near(y, z)
    for k in named:
        assert ((mine[k] - right[k]).abs() <= tol.ROW_SUM * sizes[k]).all(), k


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("block_k", [32, 256])
@pytest.mark.parametrize("patch", [(64, 4), (16, 3)])
def test_small_blocks_and_few_programs(triton_ops, monkeypatch, block_k, patch, masked):
    """Several blocks of columns, rows, clips and values to a program, as at the sizes of a training. The last patch
    ends where the memory does: what its tile has beyond is not read."""
    forward = pytest.importorskip("atst_fast.kernels.patch_embed")
    backward = pytest.importorskip("atst_fast.kernels.patch_embed_backward")
    monkeypatch.setattr(forward, "choose", lambda weight, patch: forward.Config(16, 16, block_k, 4, 2))
    monkeypatch.setattr(backward, "choose", lambda weight: backward.Config(16, 16, block_k, 1, 4, 2))
    monkeypatch.setattr(backward, "_SUMS", (4, 16, 18, 4))
    named, mask, tokens = problem(5, 64, 24, patch, None, 40, masked)
    grad = torch.randn(5, tokens, 40)
    z, right, sizes = in_float64(named, mask, patch, patch, grad)
    device_mask = None if mask is None else triton_ops.to(mask)
    with triton_ops.poison():
        y, mine = gradients(on(triton_ops, named), device_mask, patch, patch, triton_ops.to(grad))
    assert_near(y, z)
    for k in named:
        assert ((mine[k] - right[k]).abs() <= tol.ROW_SUM * sizes[k]).all(), k


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mel_dtype", ["float32", "same"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_plain_pytorch(triton_ops, dtype, mel_dtype, masked):
    """Twice the largest error of unfold, linear, where and add in the same dtype, forward and backward."""
    patch = (64, 4)
    named, mask, tokens = problem(3, 64, 123, patch, None, 48, masked)
    named = {
        k: v.detach().to(torch.float32 if (k, mel_dtype) == ("mel", "float32") else dtype) for k, v in named.items()
    }
    grad = torch.randn(3, tokens, 48).to(dtype)
    z, right, _ = in_float64(named, mask, patch, patch, grad)
    plain = {k: v.clone().requires_grad_() for k, v in named.items()}
    tokens_of = lambda v: reference.patch_embed(  # noqa: E731
        v["mel"].to(dtype), v["weight"], v["bias"], mask, v["mask_embed"].flatten(), v["pos_embed"][0], patch, patch
    )
    theirs = tokens_of(plain)
    theirs.backward(grad)
    device_mask = None if mask is None else triton_ops.to(mask)
    with triton_ops.poison():
        y, mine = gradients(on(triton_ops, named), device_mask, patch, patch, triton_ops.to(grad))
    assert y.dtype == dtype
    assert (y - z).abs().max() <= 2 * (theirs - z).abs().max()
    for k in named:
        assert mine[k].dtype == named[k].dtype
        if masked or k != "mask_embed":
            assert (mine[k] - right[k]).abs().max() <= 2 * (plain[k].grad - right[k]).abs().max(), k


def test_bits_are_the_same_each_time_and_strides_do_not_matter(triton_ops):
    patch = (64, 4)
    named, mask, tokens = problem(3, 64, 41, patch, None, 40, True)
    grad, mask = triton_ops.to(torch.randn(3, tokens, 40)), triton_ops.to(mask)
    named = {k: v.detach() for k, v in named.items()}
    strided = {**named, "mel": named["mel"].permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)}
    results = []
    for given in (named, named, strided):
        y, mine = gradients(on(triton_ops, given), mask, patch, patch, grad)
        results.append([y, *mine.values()])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again))


def test_frames_that_lie_far_apart(triton_ops):
    """More than 2^31 elements from the first frame of a patch to its last (in memory of which little is touched)."""
    far, frames = 2**26, 40
    mel = torch.empty(1, dtype=torch.bfloat16, device=triton_ops.device).new_empty((frames - 1) * far + 1)
    mel = mel.as_strided((1, 1, 1, frames), (1, 1, 1, far)).copy_(torch.randn(1, 1, 1, frames))
    weight = triton_ops.to(torch.randn(3, frames)).requires_grad_()
    y = ops.patch_embed(mel, weight, patch=(1, frames))
    y.sum().backward()
    near = mel.contiguous().double().view(1, 1, frames)
    assert_near(y.detach().cpu(), (near @ weight.double().t()).detach().cpu())
    assert_near(weight.grad.cpu(), near[0].expand(3, frames).cpu())


def test_the_gradient_of_no_tokens_lies_as_promised(triton_ops):
    """Contiguous, as the fake kernel says, whatever the strides of mel."""
    mel = triton_ops.to(torch.randn(2, 1, 3, 64).transpose(2, 3))
    grad, weight = triton_ops.to(torch.empty(2, 0, 8)), triton_ops.to(torch.randn(8, 256))
    backward = torch.ops.atst_fast.patch_embed_backward
    dmel = backward(grad, mel, weight, None, 0, True, [64, 4], [64, 4])[4]
    assert dmel.is_contiguous()
    assert torch.equal(dmel.cpu(), torch.zeros(2, 1, 64, 3))


@pytest.mark.parametrize("all_masked", [False, True])
def test_masked_patches_are_never_read(triton_ops, all_masked):
    patch = (64, 4)
    named, mask, tokens = problem(2, 64, 40, patch, None, 24, True)
    mask = mask | all_masked
    dirty = named["mel"].detach().clone()
    dirty[mask.repeat_interleave(4, 1)[:, None, None, :].expand_as(dirty)] = float("nan")
    grad = torch.randn(2, tokens, 24)
    z, right, sizes = in_float64({**named, "mel": dirty.nan_to_num()}, mask, patch, patch, grad)
    given = on(triton_ops, {**named, "mel": dirty})
    y, mine = gradients(given, triton_ops.to(mask), patch, patch, triton_ops.to(grad))
    assert_near(y, z)
    for k in named:
        assert ((mine[k] - right[k]).abs() <= tol.ROW_SUM * sizes[k]).all(), k


@pytest.mark.parametrize("clips, tokens", [(1, 1), (5, 17), (3, 4097), (40, 250)])
def test_order(triton_ops, clips, tokens):
    """Live rows ascending, then the masked ones descending."""
    patches = pytest.importorskip("atst_fast.kernels.patches")
    mask = torch.rand(clips, tokens) < 0.5
    order, count = patches.order_of(triton_ops.to(mask))
    live, masked = (~mask).flatten().nonzero().squeeze(1), mask.flatten().nonzero().squeeze(1)
    assert count.item() == len(live)
    assert torch.equal(order.cpu().long(), torch.cat([live, masked.flip(0)]))


@pytest.mark.parametrize("case", load("patch_embed")[1]["cases"], ids=lambda c: c["id"])
def test_golden_embeddings(triton_ops, case):
    t, _ = load("patch_embed")
    weights = {k.split("/")[-1]: v for k, v in t.items() if k.startswith(f"in/{case['id']}/w/")}
    names = {k.rsplit(".", 1)[-1]: triton_ops.to(v) for k, v in weights.items()}
    patch = (case["ph"], case["pw"])
    y = ops.patch_embed(triton_ops.to(t[case["x"]]), names["weight"].flatten(1), names["bias"], patch=patch)
    assert_near(y.cpu(), t[f"out/{case['id']}/embed"])


@pytest.mark.parametrize("case", TOKENS, ids=lambda c: c["id"])
def test_golden_tokens(triton_ops, case):
    arguments, options, expected = golden_tokens(case)
    arguments = [triton_ops.to(x) for x in arguments]
    options = {k: triton_ops.to(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    assert_near(ops.patch_embed(*arguments, **options).cpu(), expected)
