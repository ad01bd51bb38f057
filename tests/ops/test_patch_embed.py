import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from atst_fast import ops
from atst_fast.reference import patch_embed as reference
from tests import tolerances as tol
from tests.golden import load


def assert_near(actual, expected, rtol=tol.PATCH_EMBED):
    bound = rtol * max(expected.abs().max().item(), 1e-30) if expected.numel() else 0
    torch.testing.assert_close(actual, expected.to(actual.dtype), rtol=0, atol=bound)


@pytest.mark.parametrize("case", load("patch_embed")[1]["cases"], ids=lambda c: c["id"])
def test_golden_embeddings_and_patches(case):
    t, _ = load("patch_embed")
    patch = (case["ph"], case["pw"])
    weights = {k.split("/")[-1]: v for k, v in t.items() if k.startswith(f"in/{case['id']}/w/")}
    names = {k.rsplit(".", 1)[-1]: v for k, v in weights.items()}
    y = ops.patch_embed(t[case["x"]], names["weight"].flatten(1), names["bias"], patch=patch)
    assert_near(y, t[f"out/{case['id']}/embed"])
    if f"out/{case['id']}/patches" in t:
        cut = reference.patches(t[case["x"]], patch, patch)
        assert torch.equal(cut, t[f"out/{case['id']}/patches"])


TOKENS = [c for c in load("prepare_tokens")[1]["cases"] if c["id"].startswith("f") and c["pos"] == "cut"]
TOKENS = [c for c in TOKENS if f"out/{c['id']}/x" in load("prepare_tokens")[0]]  # upstream raises past its positions


def golden_tokens(case):
    """Arguments and options of ``ops.patch_embed``, and what FrameAST.prepare_tokens returns."""
    t, _ = load("prepare_tokens")
    w = {k.removeprefix(f"in/w_{case['w']}/"): v for k, v in t.items() if k.startswith(f"in/w_{case['w']}/")}
    expected = t[f"out/{case['id']}/x"]
    mask = t["in/mask"][:, : expected.shape[1]] if case["mask"] and case["use_mask"] else None
    arguments = t["in/x"][..., : case["T"]], w["patch_embed.patch_embed.weight"], w["patch_embed.patch_embed.bias"]
    options = {"patch": (case["ph"], case["pw"]), "mask": mask}
    return arguments, options | {"mask_embed": w["mask_embed"], "pos_embed": w["pos_embed"][:, 1:]}, expected


@pytest.mark.parametrize("case", TOKENS, ids=lambda c: c["id"])
def test_golden_tokens(case):
    """Patches, mask token and cut positions together."""
    arguments, options, expected = golden_tokens(case)
    assert_near(ops.patch_embed(*arguments, **options), expected)


def problem(batch, bins, frames, patch, stride, width, masked, dtype=torch.float32):
    stride = stride or patch
    tokens = max((bins - patch[0]) // stride[0] + 1, 0) * max((frames - patch[1]) // stride[1] + 1, 0)
    named = {
        "mel": torch.randn(batch, 1, bins, frames),
        "weight": torch.randn(width, patch[0] * patch[1]) / (patch[0] * patch[1]) ** 0.5,
        "bias": torch.randn(width),
        "mask_embed": torch.randn(1, 1, width),
        "pos_embed": torch.randn(1, tokens + 2, width),
    }
    mask = torch.rand(batch, tokens) < 0.5 if masked else None
    return {k: v.to(dtype).requires_grad_() for k, v in named.items()}, mask, tokens


def run(named, mask, patch, stride):
    return ops.patch_embed(
        named["mel"], named["weight"], named["bias"], patch=patch, stride=stride,
        mask=mask, mask_embed=named["mask_embed"], pos_embed=named["pos_embed"],
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 3), st.integers(1, 40), st.integers(1, 40), st.tuples(st.integers(1, 20), st.integers(1, 9)),
    st.one_of(st.none(), st.tuples(st.integers(1, 9), st.integers(1, 9))), st.integers(1, 33), st.booleans(),
    st.integers(0, 2**31),
)  # fmt: skip
def test_random_shapes_and_gradients_against_float64(batch, bins, frames, patch, stride, width, masked, seed):
    torch.manual_seed(seed)
    named, mask, tokens = problem(batch, bins, frames, patch, stride, width, masked)
    y = run(named, mask, patch, stride)
    assert y.shape == (batch, tokens, width)
    exact = {k: v.detach().double().requires_grad_() for k, v in named.items()}
    z = run(exact, mask, patch, stride)
    assert_near(y, z)
    grad = torch.randn_like(y)
    y.backward(grad)
    z.backward(grad.double())
    # the same sums without their signs: what the rounding of a sum that cancels is relative to
    sizes = {k: v.detach().abs().requires_grad_() for k, v in exact.items()}
    run(sizes, mask, patch, stride).backward(grad.double().abs())
    for k in named:
        mine, theirs, size = (torch.zeros_like(t[k]) if t[k].grad is None else t[k].grad for t in (named, exact, sizes))
        assert ((mine - theirs).abs() <= tol.ROW_SUM * size).all(), k


def test_each_part_may_be_left_out():
    named, _, tokens = problem(2, 64, 22, (64, 4), None, 24, True)
    x, w = named["mel"], named["weight"]
    plain = F.linear(reference.patches(x, (64, 4), (64, 4)), w)
    assert_near(ops.patch_embed(x, w), plain)
    assert_near(ops.patch_embed(x, w, named["bias"]), plain + named["bias"])
    ops.patch_embed(x.detach(), w, pos_embed=named["pos_embed"][0]).sum().backward()
    assert w.grad is not None
    assert x.grad is None
    assert_near(named["pos_embed"].grad[0, :tokens], torch.full((tokens, 24), 2.0))
    assert (named["pos_embed"].grad[0, tokens:] == 0).all()


def test_masked_patches_are_never_read():
    named, mask, _ = problem(2, 64, 40, (64, 4), None, 24, True)
    clean = run(named, mask, (64, 4), None)
    dirty = named["mel"].detach().clone()
    dirty[mask.repeat_interleave(4, 1)[:, None, None, :].expand_as(dirty)] = float("nan")
    y = run({**named, "mel": dirty.requires_grad_()}, mask, (64, 4), None)
    assert torch.equal(y, clean)
    y.sum().backward()
    assert torch.isfinite(named["weight"].grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_plain_pytorch(dtype):
    named, mask, _ = problem(2, 64, 40, (64, 4), None, 24, True, dtype)
    y = run(named, mask, (64, 4), None)
    args = [named[k].detach() for k in ("mel", "weight", "bias")]
    tail = mask, named["mask_embed"].reshape(-1), named["pos_embed"][0], (64, 4), (64, 4)
    exact = reference.patch_embed(*(a.double() for a in args), mask, *(x.double() for x in tail[1:3]), *tail[3:])
    plain = reference.patch_embed(*args, *tail)
    assert y.dtype == dtype
    assert ops.patch_embed(args[0].float(), args[1]).dtype == dtype  # of the weight, whatever mel is
    assert ops.patch_embed(args[0], args[1].float()).dtype == torch.float32
    assert (y - exact).abs().max() <= 2 * (plain - exact).abs().max()


def test_outputs_are_written_in_full_and_bits_do_not_depend_on_threads(threads):
    named, mask, _ = problem(3, 64, 403, (64, 4), None, 48, True)
    results = []
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        for n in (1, 2):
            threads(n)
            for v in named.values():
                v.grad = None
            y = run(named, mask, (64, 4), None)
            y.sum().backward()
            results.append([y.detach()] + [v.grad for v in named.values()])
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(*results):
        assert torch.isfinite(a).all()
        assert_near(a, b, 1e-6)  # the product is torch's own, whose threads may share out a sum


def test_reference_gradient():
    named, mask, _ = problem(2, 6, 7, (3, 2), (2, 1), 5, True, torch.float64)
    names = list(named)
    assert torch.autograd.gradcheck(lambda *v: run(dict(zip(names, v)), mask, (3, 2), (2, 1)), tuple(named.values()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shorter_than_a_patch(dtype):
    mel, weight, pos = (torch.zeros(s, dtype=dtype) for s in ((2, 1, 64, 3), (8, 256), (0, 8)))
    assert ops.patch_embed(mel, weight, pos_embed=pos).shape == (2, 0, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_mask_no_gradient_of_the_mask_token(dtype):
    """An optimizer decays what has a gradient, be it zero, and leaves alone what has none."""
    mel, weight, token = (torch.zeros(s, dtype=dtype, requires_grad=True) for s in ((1, 1, 64, 8), (8, 256), (8,)))
    ops.patch_embed(mel, weight, mask_embed=token).sum().backward()
    assert token.grad is None


def test_opcheck():
    named, mask, _ = problem(2, 16, 12, (8, 4), (4, 4), 6, True)
    args = (named["mel"], named["weight"], named["bias"], mask)
    embeds = (named["mask_embed"].reshape(-1), named["pos_embed"][0])
    leaves = tuple(x.detach().requires_grad_() for x in embeds)
    torch.library.opcheck(torch.ops.atst_fast.patch_embed.default, (*args, *leaves, [8, 4], [4, 4]))
    grad = torch.randn(2, mask.shape[1], 6)
    for needs_mel in (True, False):
        args = (grad, named["mel"].detach(), named["weight"].detach(), mask, 11, needs_mel, [8, 4], [4, 4])
        torch.library.opcheck(torch.ops.atst_fast.patch_embed_backward.default, args)


def test_compiles_without_a_graph_break():
    named, mask, _ = problem(2, 64, 22, (64, 4), None, 24, True)
    compiled = torch.compile(lambda: run(named, mask, (64, 4), None) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), run(named, mask, (64, 4), None) * 2)


MEL, WEIGHT = torch.zeros(2, 1, 64, 10), torch.zeros(8, 256)
ERRORS = [
    ({"mel": MEL[0]}, ValueError, r"mel must be \[B, 1, F, T\].*got float32 \[1, 64, 10\]"),
    ({"mel": MEL.expand(2, 3, 64, 10)}, ValueError, r"mel must be \[B, 1, F, T\]"),
    ({"mel": MEL.int()}, TypeError, "mel must be .* of dtype float32 or .*got int32"),
    ({"patch": (64, 0)}, ValueError, "patch must be two positive integers"),
    ({"stride": (1, 2, 3)}, ValueError, "stride must be two positive integers"),
    ({"weight": WEIGHT[:, :255]}, ValueError, r"weight must be \[D, ph\*pw\] = \[D, 256\].*got float32 \[8, 255\]"),
    ({"weight": WEIGHT[:0]}, ValueError, r"weight must be \[D, ph\*pw\]"),
    ({"bias": torch.zeros(7)}, ValueError, r"bias must be of D = 8 values, got float32 \[7\]"),
    ({"mask": torch.zeros(2, 3, dtype=torch.bool)}, ValueError, r"mask must be \[B, L\] = \[2, 2\].*got bool \[2, 3\]"),
    ({"mask": torch.zeros(2, 2)}, TypeError, r"mask must be \[B, L\] = \[2, 2\] of dtype bool"),
    (
        {"mask": torch.zeros(2, 2, dtype=torch.bool)},
        ValueError,
        "mask_embed must be a tensor of D = 8 values when mask",
    ),
    ({"mask_embed": torch.zeros(9)}, ValueError, "mask_embed must be of D = 8 values"),
    ({"pos_embed": torch.zeros(1, 1, 8)}, ValueError, r"pos_embed must be \[L', D\] or .* L = 2 and D = 8, got"),
    ({"pos_embed": torch.zeros(2, 7)}, ValueError, "pos_embed must be"),
]


@pytest.mark.parametrize("changed, error, message", ERRORS)
def test_errors(changed, error, message):
    arguments = {"mel": MEL, "weight": WEIGHT, **changed}
    with pytest.raises(error, match="patch_embed: " + message):
        ops.patch_embed(arguments.pop("mel"), arguments.pop("weight"), **arguments)


def test_a_direct_call_with_bad_input_is_refused_too():
    op = torch.ops.atst_fast.patch_embed
    for args in [
        (MEL.double(), WEIGHT, None, None, None, None, [64, 4], [64, 4]),
        (MEL, WEIGHT[:, :9].contiguous(), None, None, None, None, [64, 4], [64, 4]),
        (MEL, WEIGHT, torch.zeros(7), None, None, None, [64, 4], [64, 4]),
        (MEL, WEIGHT, torch.zeros(16), None, None, None, [64, 4], [64, 4]),
        (MEL, WEIGHT, None, torch.zeros(2, 2, dtype=torch.bool), None, None, [64, 4], [64, 4]),
        (MEL, WEIGHT, None, None, None, torch.zeros(1, 8), [64, 4], [64, 4]),
        (MEL, WEIGHT, None, None, None, None, [64], [64, 4]),
    ]:
        with pytest.raises(RuntimeError, match="patch_embed: "):
            op(*args)
