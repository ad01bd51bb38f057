"""Stand-ins of the official classes, plain and accelerated, against the golden cases and against each other."""

import pytest
import torch

from atst_fast.integrations.accelerate import accelerate
from tests.golden import assert_golden, load
from tests.integrations.standins.audiossl_systems import ATST, FrameATST, LightningShaped
from tests.models.checks import assert_golden_end, assert_golden_update
from tests.tolerances import GOLDEN_LOSS_RTOL

KINDS = {"frame": FrameATST, "clip": ATST}


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def golden_module(kind, **options):
    """The official Lightning module of ``<kind>_step``, written anew, in its state before the step."""
    t, meta = load(f"{kind}_step")
    c = meta["cfg"]
    sizes = {"embed_dim": c["dim"], "depth": c["depth"], "num_heads": c["heads"], "mlp_ratio": c["mlp_ratio"]}
    model = KINDS[kind](hidden=c["hid"], out=c["proj"], spec_w=c["spec_w"], drop_path_rate=0.0, **sizes, **options)
    model.load_state_dict({k.removeprefix("in/state/"): v for k, v in t.items() if k.startswith("in/state/")})
    return LightningShaped(model, c["lr"], c["warm"], c["maxs"], c["ema"])


def golden_batch(t, kind, prefix="in/"):
    names = ["mel", "len", "mask"] if kind == "frame" else ["mel", "len"]
    return [[t[f"{prefix}{name}{view}"] for view in (0, 1)] for name in names]


def check_gradients(kind, module):
    t, meta = load(f"{kind}_step")
    module.global_step = meta["step"]
    outputs = []
    for network in (module.model.student, module.model.teacher):
        network.register_forward_hook(lambda _, __, y: outputs.append(y))
    loss, std_student, std_teacher = module.training_step(golden_batch(t, kind))
    for key, value in (("loss", loss), ("std_stu", std_student), ("std_tea", std_teacher)):
        assert_golden(f"{kind}_step", f"out/{key}", value[None])
    assert_golden(f"{kind}_step", "out/teacher_output", outputs[0])
    assert_golden(f"{kind}_step", "out/student_output", outputs[1])
    loss.backward()
    for key in (k for k in t if k.startswith("grad/") and "asym" not in k):
        assert_golden(f"{kind}_step", key, module.model.student.get_parameter(key.removeprefix("grad/")).grad)
    without = {n for n, p in module.model.student.named_parameters() if p.grad is None}
    assert without == set(meta.get("no_grad", []))


def check_step(kind, module):
    _, meta = load(f"{kind}_step")
    check_gradients(kind, module)
    module.optimizer.step()
    module.model.update_teacher(meta["ema_used"])
    assert_golden_update(f"{kind}_step", module.model.state_dict())


@pytest.mark.parametrize("how", ["plain", "accelerated"])
@pytest.mark.parametrize("kind", KINDS)
def test_golden_step(kind, how):
    module = golden_module(kind)
    if how == "accelerated":
        assert not accelerate(module).left
    check_step(kind, module)


@pytest.mark.parametrize("kind", KINDS)
def test_golden_gradients_of_the_path_of_a_gpu(kind):
    module = golden_module(kind)
    accelerate(module)
    fix_shapes(module)
    check_gradients(kind, module)


def fix_shapes(model):
    """Let what is fused run as it does on a GPU."""
    for module in model.modules():
        if hasattr(type(module), "fixed_shapes"):
            module.fixed_shapes = True


def test_golden_step_that_is_not_symmetric():
    t, _ = load("frame_step")
    module = golden_module("frame", symmetric=False)
    accelerate(module)
    loss, std_student, std_teacher = module.training_step(golden_batch(t, "frame"))
    for key, value in (("loss", loss), ("std_stu", std_student), ("std_tea", std_teacher)):
        assert_golden("frame_step", f"out/asym/{key}", value[None])
    loss.backward()
    for key in (k for k in t if k.startswith("grad/asym/")):
        parameter = module.model.student.get_parameter(key.removeprefix("grad/asym/"))
        assert_golden("frame_step", key, parameter.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_golden_five_steps(kind):
    name = f"{kind}_step5"
    t, _ = load(name)
    module = golden_module(kind)
    accelerate(module)
    got = torch.tensor([module.fit_batch(golden_batch(t, kind, f"in/step{i}/")) for i in range(5)]).double()
    for column, key in enumerate(("loss", "std_stu", "std_tea")):
        torch.testing.assert_close(got[:, column], t[f"out/{key}"], rtol=GOLDEN_LOSS_RTOL, atol=0, msg=key)
    assert_golden_end(name, module.model.state_dict())


@pytest.mark.long
def test_through_the_triton_kernels(triton_ops):
    """What a GPU would run, interpreted."""
    t, _ = load("clip_step")
    module = golden_module("clip")
    accelerate(module)
    fix_shapes(module)
    loss, *_ = module.training_step(golden_batch(t, "clip"))
    assert_golden("clip_step", "out/loss", loss[None])
    loss.backward()
    for key in ("student.encoder.blocks.0.attn.qkv.weight", "student.encoder.cls_token"):
        assert_golden("clip_step", f"grad/{key.removeprefix('student.')}", module.model.get_parameter(key).grad)
