"""Fine-tuned encoders and ATST-C2F against the official training step, and what their options do."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from atst_fast.models import (
    ClipEncoder,
    Distilled,
    DistilledLogits,
    FineTuned,
    FrameEncoder,
    LinearHead,
    distill_loss,
    layer_scales,
    tagging_loss,
)
from atst_fast.models.heads import Head
from atst_fast.train.schedule import cosine_schedule
from tests.golden import assert_golden, load
from tests.tolerances import OTHER_ORDER, SCHEDULE_RTOL

CASES = {case["id"]: case for case in load("c2f")[1]["cases"]}
SIZE = {"dim": 24, "depth": 2, "num_heads": 3}


def golden_system(case, **options):
    """The `Distilled` of a golden case, as it is trained there: the teacher too."""
    t, meta = load("c2f")
    c = meta["cfg"]
    state = {k.removeprefix("in/state/"): v for k, v in t.items() if k.startswith("in/state/")}
    project, classes = None, meta["nclasses"]
    if case["state"] == "in/state527/":
        state |= {k.removeprefix("in/state527/"): v for k, v in t.items() if k.startswith("in/state527/")}
        classes, project = 527, len(state["projector.1.weight"])
    size = {"dim": c["dim"], "depth": c["depth"], "num_heads": c["heads"]}
    encoder = {
        "max_frames": c["spec_w"],
        "drop_path_rate": 0.0,
        "mlp_ratio": len(state["student.blocks.0.mlp.fc1.bias"]) / c["dim"],
    }
    teacher = FineTuned(ClipEncoder(size, **encoder), classes, chunk_frames=601)
    system = Distilled(teacher, FrameEncoder(size, **encoder), project=project, chunk_frames=1001, **options)
    system.load_state_dict(state)
    return system.train()


def golden_input(case):
    t, _ = load("c2f")
    mel = t["in/mel"].repeat(1, 1, 1, 4)[..., : case["T"]]
    return mel, t["in/len"].clamp(max=case["T"]), t[case["y"]]


@pytest.mark.parametrize("name", CASES)
def test_golden_step(name):
    case = CASES[name]
    system = golden_system(case)
    mel, lengths, y = golden_input(case)
    options = case["kw"]
    kind = "bce" if case["mod"] == "as2m" or options.get("multi_label") or options.get("mixup_training") else "ce"
    features = []
    system.linear.register_forward_pre_hook(lambda _, x: features.append(x[0]))
    logits = system(mel, lengths)
    out = distill_loss(logits, y, kind, options["lambda_d"])
    out.loss.backward()
    assert_golden("c2f", f"out/{name}/teacher_logits", logits.teacher)
    assert_golden("c2f", f"out/{name}/student_feature", features[0])
    assert_golden("c2f", f"out/{name}/student_logits", logits.label)
    for key, value in (("loss", out.loss), ("loss_c", out.label), ("loss_d", out.distillation)):
        assert_golden("c2f", f"out/{name}/{key}", value[None])
    state = system.state_dict()
    for key in ("linear.norm.running_mean", "linear.norm.running_var", "teacher.head.norm.running_mean"):
        assert_golden("c2f", f"out/{name}/{key}", state[key])
    if case["grads"]:
        for key, parameter in system.named_parameters():
            wanted = f"grad/{name}/{key}" in load("c2f")[0]
            assert wanted == (parameter.grad is not None and bool(parameter.grad.any())), key
            if wanted:
                assert_golden("c2f", f"grad/{name}/{key}", parameter.grad)


@pytest.mark.parametrize("name", CASES)
def test_golden_rates(name):
    case = CASES[name]
    scales = layer_scales(golden_system(case), 0.75, depth=12)
    assert list(scales) == case["param_order"]
    assert list(scales.values()) == pytest.approx(case["lr_scale"], rel=SCHEDULE_RTOL)
    options = case["kw"]
    if "max_steps" in options:
        steps, warmup = options["max_steps"], options["warmup_steps"]
    else:
        steps, warmup = (options[k] * options["niter_per_epoch"] for k in ("max_epochs", "warmup_epochs"))
    rate = cosine_schedule(options["learning_rate"], 1e-6, steps, warmup)[case["step"]]
    assert [rate * scale for scale in scales.values()] == pytest.approx(case["lr"], rel=SCHEDULE_RTOL)


def test_golden_head():
    t, meta = load("c2f")
    head = LinearHead(meta["head_dim"], meta["head_n"])
    assert not head.linear.bias.any()
    assert 0.005 < head.linear.weight.std() < 0.02
    head.load_state_dict({k.removeprefix("in/head/"): v for k, v in t.items() if k.startswith("in/head/")})
    x = t["in/head_x"].clone().requires_grad_()
    y = head(x)
    y.backward(t["in/head_dy"])
    assert_golden("c2f", "out/head/train", y)
    assert_golden("c2f", "out/head/running_mean", head.norm.running_mean)
    assert_golden("c2f", "out/head/running_var", head.norm.running_var)
    for key, value in (("x", x), ("weight", head.linear.weight), ("bias", head.linear.bias)):
        assert_golden("c2f", f"grad/head/{key}", value.grad)
    assert_golden("c2f", "out/head/eval", head.eval()(x))


def test_a_teacher_in_eval_mode_answers_as_it_does_when_tested():
    system = golden_system(CASES["ce"], teacher_eval=True)
    mel, lengths, _ = golden_input(CASES["ce"])
    before = {k: v.clone() for k, v in system.teacher.state_dict().items()}
    trained = system(mel, lengths).teacher
    assert all(torch.equal(v, before[k]) for k, v in system.teacher.state_dict().items())
    assert torch.equal(trained, system.eval()(mel, lengths).teacher)
    assert not torch.allclose(trained, golden_system(CASES["ce"])(mel, lengths).teacher)


def test_the_tagger_is_the_student():
    system = golden_system(CASES["ce"]).eval()
    mel, lengths, _ = golden_input(CASES["ce"])
    tagger = system.tagger
    assert tagger.head.linear.weight is system.linear.linear.weight
    assert torch.equal(tagger(mel, lengths), system(mel, lengths).label)
    assert not tagger.training


@pytest.mark.parametrize("kind", [FrameEncoder, ClipEncoder])
def test_frame_level(kind):
    encoder = kind(SIZE, max_frames=101).eval()
    model = FineTuned(encoder, 5, level="frame").eval()
    assert set(dict(model.head.named_parameters())) == {"linear.weight", "linear.bias"}
    logits = model(torch.randn(2, 1, 64, 246), torch.tensor([246, 130]))
    assert logits.shape == (2, 61, 5)
    student = Distilled(FineTuned(ClipEncoder(SIZE), 5, level="frame"), FrameEncoder(SIZE), chunk_frames=101)
    assert student(torch.randn(2, 1, 64, 246)).label.shape == (2, 61, 5)


def test_no_graph_leads_to_the_teacher():
    system = Distilled(FineTuned(ClipEncoder(SIZE), 3), FrameEncoder(SIZE))
    out = system(torch.randn(2, 1, 64, 100, requires_grad=True))
    assert (out.teacher.requires_grad, out.label.requires_grad) == (False, True)
    assert not any(p.requires_grad for p in system.teacher.parameters())
    logits = DistilledLogits(*(torch.randn(2, 3, requires_grad=True) for _ in range(3)))
    distill_loss(logits, torch.rand(2, 3)).loss.backward()  # nor does the loss train one that has a graph
    assert [x.grad is not None for x in logits] == [True, True, False]


def test_what_is_configured_is_used():
    """The scale of long clips' means, and the student's chunks."""
    encoder, mel = ClipEncoder(SIZE, max_frames=101).eval(), torch.randn(1, 1, 64, 180)
    lengths = torch.tensor([180])
    models = [FineTuned(encoder, 3, scale_bug=bug).eval() for bug in (True, False)]
    models[1].head.load_state_dict(models[0].head.state_dict())
    assert not torch.allclose(*(model(mel, lengths) for model in models))
    config = {"classes": 3, "level": "clip", "chunk_frames": 101, "scale_bug": False}
    assert models[1].config == config
    again = FineTuned(encoder, **config).eval()
    again.load_state_dict(models[1].state_dict())
    assert torch.equal(again(mel, lengths), models[1](mel, lengths))
    student = FrameEncoder(SIZE)
    system = Distilled(FineTuned(ClipEncoder(SIZE), 3), student, chunk_frames=101).eval()
    assert system.tagger.chunk_frames == 101
    assert torch.equal(system(mel, lengths).label, system.tagger(mel, lengths))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves(dtype):
    teacher = FineTuned(ClipEncoder(SIZE, max_frames=101), 3)
    system = Distilled(teacher, FrameEncoder(SIZE), project=16).to(dtype)
    out = system(torch.randn(2, 1, 64, 100).to(dtype))
    assert all(x.dtype == dtype and x.isfinite().all() for x in out)


def test_default_chunks():
    assert FineTuned(ClipEncoder(SIZE), 2).chunk_frames == 601
    assert FineTuned(ClipEncoder(SIZE, max_frames=201), 2).chunk_frames == 201
    assert FineTuned(FrameEncoder(SIZE), 2).chunk_frames == 1001
    assert FineTuned(ClipEncoder(SIZE), 2, level="frame").chunk_frames == 1001


def test_layer_scales():
    deep = FineTuned(FrameEncoder({**SIZE, "depth": 3}), 2)
    scales = layer_scales(deep, 0.5)
    groups = {
        "mask_embed": 1 / 8,
        "blocks.0.norm1.weight": 1 / 8,
        "blocks.2.norm1.weight": 1 / 2,
        "norm_frame.bias": 1 / 2,
    }
    assert {k: scales[f"encoder.{k}"] for k in groups} == groups
    assert scales["head.linear.bias"] == 1
    frame = layer_scales(deep, 0.5, level="frame")
    groups |= {"mask_embed": 1 / 16, "norm_frame.bias": 1}
    assert {k: frame[f"encoder.{k}"] for k in groups} == groups
    assert layer_scales(FineTuned(ClipEncoder(SIZE), 2), 0.5)["encoder.cls_token"] == 1 / 4
    assert set(layer_scales(deep, 1.0).values()) == {1.0}


def test_layer_scales_of_what_is_wrapped():
    """The names are the wrapper's, the scales the same: not 1 for all of them."""
    for model in (FineTuned(FrameEncoder(SIZE), 2), Distilled(FineTuned(ClipEncoder(SIZE), 2), FrameEncoder(SIZE))):
        want = layer_scales(model, 0.5)
        assert list(want) == [name for name, p in model.named_parameters() if p.requires_grad]
        assert len(set(want.values())) > 2
        for wrapped, name in ((torch.compile(model), "_orig_mod"), (nn.ModuleDict({"module": model}), "module")):
            assert layer_scales(wrapped, 0.5) == {f"{name}.{key}": value for key, value in want.items()}


@pytest.mark.parametrize("kind", ["bce", "ce"])
def test_what_is_in_rows_that_do_not_count_has_no_gradient(kind):
    logits, valid = torch.randn(2, 3, 4), torch.tensor([[True, True, False], [True, False, False]])
    other = torch.where(valid[..., None], logits, torch.nan).requires_grad_()
    tagging_loss(other, torch.rand(2, 3, 4), kind, valid).backward()
    assert other.grad[valid].all()
    assert not other.grad[~valid].any()


def test_targets_and_valid_rows():
    logits, y = torch.randn(2, 6, 3), torch.rand(2, 6, 3)
    valid = torch.arange(6) < torch.tensor([[6], [2]])
    rows = torch.cat([logits[0], logits[1, :2]]), torch.cat([y[0], y[1, :2]])
    for kind in ("bce", "ce"):
        torch.testing.assert_close(
            tagging_loss(logits, y, kind, valid), tagging_loss(*rows, kind), rtol=0, atol=OTHER_ORDER
        )
    assert tagging_loss(logits, y, "bce", torch.zeros(2, 6, dtype=torch.bool)) == 0
    assert tagging_loss(logits, y.half(), "ce").dtype == tagging_loss(logits, y.half()).dtype == torch.float32
    soft = DistilledLogits(*(torch.randn(4, 3) for _ in range(3)))
    y = torch.rand(4, 3)
    assert distill_loss(soft, y, "ce").label == distill_loss(soft, y.argmax(-1), "ce").label
    assert distill_loss(soft, y, "ce", hard_labels=False).label == tagging_loss(soft.label, y, "ce")
    for weight in (0.0, 0.25, 1.0):
        out = distill_loss(soft, y, weight=weight)
        torch.testing.assert_close(out.loss, weight * out.distillation + (1 - weight) * out.label)
    assert distill_loss(soft, y, weight=0.0).loss == tagging_loss(soft.label, y)
    valid = torch.tensor([True, False, True, False])
    for kind in ("bce", "ce"):
        some = distill_loss(soft, y, kind, valid=valid)
        torch.testing.assert_close(some, distill_loss(DistilledLogits(*(x[::2] for x in soft)), y[::2], kind))
    wanted = F.binary_cross_entropy_with_logits(soft.label, F.one_hot(y.argmax(-1), 3).float())
    torch.testing.assert_close(tagging_loss(soft.label, y.argmax(-1)), wanted)


def test_a_head_without_weights_of_its_norm():
    """Somebody has replaced it: torch's own computes it."""
    head, x = Head(4, 6, 2), torch.randn(5, 4)
    for norm in (nn.BatchNorm1d(6, affine=False), nn.BatchNorm1d(6, momentum=None), nn.LayerNorm(6)):
        head[1] = norm
        want = head[3](copy.deepcopy(norm)(head[0](x)).relu())
        torch.testing.assert_close(head(x), want, rtol=0, atol=OTHER_ORDER)
        with pytest.raises(ValueError, match=r"Head: .*Norm.* takes no count: its statistics"):
            head(x, torch.tensor(3))
    untracked = nn.BatchNorm1d(6, track_running_stats=False)
    head[1] = untracked
    torch.testing.assert_close(head(x), head[3](untracked(head[0](x)).relu()), rtol=0, atol=OTHER_ORDER)


def test_errors():
    with pytest.raises(ValueError, match="FineTuned: level must be 'clip' or 'frame', got str 'word'"):
        FineTuned(FrameEncoder(SIZE), 2, level="word")
    with pytest.raises(TypeError, match="FineTuned: encoder must be a FrameEncoder or a ClipEncoder"):
        FineTuned(LinearHead(2, 2), 2)
    with pytest.raises(ValueError, match="LinearHead: classes must be at least 1"):
        LinearHead(3, 0)
    with pytest.raises(ValueError, match=r"LinearHead: x must be \[..., 3\]"):
        LinearHead(3, 2)(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="Distilled: project must be None"):
        Distilled(FineTuned(ClipEncoder(SIZE), 2, level="frame"), FrameEncoder(SIZE), project=8)
    with pytest.raises(TypeError, match="Distilled: teacher must be a FineTuned"):
        Distilled(ClipEncoder(SIZE), FrameEncoder(SIZE))
    with pytest.raises(TypeError, match="Distilled: student must be a FrameEncoder"):
        Distilled(FineTuned(ClipEncoder(SIZE), 2), ClipEncoder(SIZE))
    with pytest.raises(ValueError, match="layer_scales: level must be 'clip' or 'frame'"):
        layer_scales(FineTuned(FrameEncoder(SIZE), 2), 0.5, level="word")
    with pytest.raises(TypeError, match="layer_scales: model must be a FineTuned or a Distilled"):
        layer_scales(FrameEncoder(SIZE), 0.5)
    for decay in (0, 1.5):
        with pytest.raises(ValueError, match="layer_scales: decay must be more than 0"):
            layer_scales(FineTuned(FrameEncoder(SIZE), 2), decay)
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="tagging_loss: kind must be"):
        tagging_loss(x, x, "mse")
    with pytest.raises(ValueError, match="tagging_loss: targets must be class numbers"):
        tagging_loss(x, torch.zeros(3))
    for kind in ("bce", "ce"):  # torch leaves a class of -100 out, and counts it
        with pytest.raises(
            ValueError, match=r"tagging_loss: targets must be class numbers from 0 to 2, got list \[1, -"
        ):
            tagging_loss(x, torch.tensor([1, -100]), kind)
    with pytest.raises(TypeError, match="tagging_loss: targets must be int64 class numbers or float values, got int32"):
        tagging_loss(x, torch.zeros(2, dtype=torch.int32))
    with pytest.raises(TypeError, match="tagging_loss: targets must be a tensor"):
        tagging_loss(x, [0, 1])
    with pytest.raises(ValueError, match="tagging_loss: targets must be class numbers from 0 to 2, got"):
        tagging_loss(x, torch.tensor([1, 3]))
    with pytest.raises(ValueError, match="tagging_loss: valid must be"):
        tagging_loss(x, x, "bce", torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"tagging_loss: valid must be \[2\], as logits .* of dtype bool, got int64"):
        tagging_loss(x, x, "bce", torch.ones(2, dtype=torch.int64))
    for weight in (1.5, -0.5):
        with pytest.raises(ValueError, match="distill_loss: weight must be between 0 and 1"):
            distill_loss(DistilledLogits(x, x, x), x, weight=weight)
