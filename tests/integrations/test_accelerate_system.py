"""Heads, loss, teacher update and the wrappers around a model."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from atst_fast import accelerate, restore
from atst_fast.optim import AdamWEMA
from tests.integrations.standins.audiossl_systems import ATST, ClipByolLoss, FrameATST, FrameByolLoss, build_mlp
from tests.integrations.test_accelerate import assert_same, batch, make, run
from tests.tolerances import NETWORK_RTOL


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


@pytest.fixture
def outputs():
    torch.manual_seed(0)
    return torch.randn(12, 16, requires_grad=True), torch.randn(12, 16)


LOSSES = {
    "frame": lambda: FrameByolLoss(True),
    "frame, not symmetric": lambda: FrameByolLoss(False),
    "clip": lambda: ClipByolLoss(2),
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_the_gradients_of_all_its_outputs(name, outputs):
    """Nothing trains on the deviations in the official code, but who does gets the official gradient."""
    loss, (student, teacher) = LOSSES[name](), outputs
    want = loss(student, teacher)
    grads = [torch.autograd.grad(x, student)[0] for x in want[:2]]
    assert accelerate(loss).replaced
    for _ in range(2):  # the first call compares
        got = loss(student, teacher)
        assert type(got) is tuple
        torch.testing.assert_close(got, want, rtol=NETWORK_RTOL, atol=0)
    for x, grad in zip(loss(student, teacher), grads):
        torch.testing.assert_close(torch.autograd.grad(x, student)[0], grad, rtol=NETWORK_RTOL, atol=1e-7)


class Weighted(FrameByolLoss):
    """The same settings, another loss."""

    def forward(self, student, teacher):
        loss, *rest = super().forward(student, teacher)
        return 1.01 * loss, *rest


class Impossible(FrameByolLoss):
    """As the official one where there is neither a GPU nor a process group."""

    def forward(self, student, teacher):
        raise RuntimeError("Default process group has not been initialized")


def test_a_loss_that_differs_on_the_first_batch_is_kept(outputs):
    loss = Weighted(True)
    want = loss(*outputs)
    assert accelerate(loss).replaced
    for _ in range(2):
        torch.testing.assert_close(loss(*outputs), want, rtol=0, atol=0)
    assert type(loss).agreed is False


def test_losses_of_other_settings_are_compared_on_their_own(outputs):
    """Also where the settings are private, as nothing here reads them."""

    class Scaled(FrameByolLoss):
        _scale = 1.0

        def forward(self, student, teacher):
            loss, *rest = super().forward(student, teacher)
            return self._scale * loss, *rest

    one, two = Scaled(True), Scaled(True)
    two._scale = 2.0
    want = two(*outputs)
    for loss in (one, two):
        assert accelerate(loss).replaced
        got = loss(*outputs)
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=0)
    assert (type(one).agreed, type(two).agreed) == (True, False)


def test_a_loss_that_cannot_run_is_replaced(outputs):
    loss = Impossible(True)
    accelerate(loss)
    torch.testing.assert_close(loss(*outputs), FrameByolLoss(True)(*outputs), rtol=NETWORK_RTOL, atol=0)


def test_unusual_outputs_get_the_original_loss(outputs):
    student, teacher = outputs
    loss = FrameByolLoss(True)
    want = loss(student, teacher.clone().requires_grad_())
    accelerate(loss)
    got = loss(student, teacher.clone().requires_grad_())
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    assert got[2].requires_grad  # the teacher's deviation too
    with pytest.raises(RuntimeError):
        loss(student[:5], teacher[:5])  # views of different sizes
    (entry,) = accelerate(ClipByolLoss(4))
    assert entry.note == "it compares 4 crops, and two are expected"


def test_heads():
    torch.manual_seed(0)
    head, x = build_mlp(2, 6, 10, 4), torch.randn(7, 6)
    plain = copy.deepcopy(head)
    assert accelerate(head).replaced
    for training in (True, False):
        for h in (head, plain):
            h.train(training)
        torch.testing.assert_close(head(x), plain(x), rtol=NETWORK_RTOL, atol=NETWORK_RTOL)
    for (name, a), b in zip(head.named_buffers(), plain.buffers()):
        torch.testing.assert_close(a, b, rtol=NETWORK_RTOL, atol=NETWORK_RTOL, msg=name)
    calls = []
    head.train()[1].register_forward_hook(lambda *_: calls.append(1))
    head(x)
    assert calls
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(head)
    assert isinstance(converted[1], nn.SyncBatchNorm)
    with pytest.raises(ValueError, match="more than 1 value"):
        plain.train()(x[:1])
    for odd, why in (
        (nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, affine=False), nn.ReLU(), nn.Linear(5, 2)), "has no weight"),
        (nn.Sequential(nn.Tanh(), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)), "its layer 0 is Tanh"),
    ):
        assert why in accelerate(odd)[0].note


class Doubled(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_head_with_a_forward_of_its_own_is_left():
    head = Doubled(*build_mlp(2, 6, 10, 4))
    assert accelerate(head)[0].note == "it has a forward of its own"


@pytest.mark.parametrize("kind", [FrameATST, ATST])
def test_update_teacher(kind):
    model = make("frame" if kind is FrameATST else "clip")
    other = make("frame" if kind is FrameATST else "clip", seed=3)
    model.student.load_state_dict(other.student.state_dict())
    plain = copy.deepcopy(model)
    accelerate(model)
    versions = [p._version for p in model.teacher.parameters()]
    model.update_teacher(0.7)
    plain.update_teacher(0.7)
    for (name, a), b in zip(model.state_dict().items(), plain.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-7, msg=name)
    assert all(p.grad_fn is None for p in model.teacher.parameters())
    assert versions != [p._version for p in model.teacher.parameters()]
    for m in (model.double(), plain.double()):  # which the operator does not take
        m.update_teacher(torch.tensor(0.5))
    torch.testing.assert_close(list(model.parameters()), list(plain.parameters()), rtol=0, atol=1e-6)


class WithBuffers(FrameATST):
    def update_teacher(self, m):
        super().update_teacher(m)
        for a, b in zip(self.student.buffers(), self.teacher.buffers()):
            b.copy_(a + 1)


class Reversed(FrameATST):
    def update_teacher(self, m):
        super().update_teacher(1 - m)


@pytest.mark.parametrize("kind", [WithBuffers, Reversed])
def test_another_teacher_update_is_left(kind):
    model = kind(embed_dim=24, depth=1, num_heads=2, hidden=8, out=4, spec_w=41)
    (entry,) = (e for e in accelerate(model) if e.part == "teacher")
    assert entry.note == "its update_teacher is not the average of encoder and projector"
    model.update_teacher = lambda m: None
    (entry,) = (e for e in accelerate(model) if e.part == "teacher")
    assert "has been replaced on the instance" in entry.note


@pytest.mark.long
@pytest.mark.parametrize("kind", ["frame", "clip"])
@pytest.mark.parametrize("first", ["compile", "accelerate"])
def test_compiled_models(kind, first):
    torch._dynamo.reset()
    model, data = make(kind), batch(kind)
    want = run(model, data)
    compiled = torch.compile(model, backend="eager")
    if first == "compile":
        assert_same(run(compiled, data), _named(want, "_orig_mod."))
    assert len(accelerate(compiled).replaced) == 11
    assert_same(run(compiled, data), _named(want, "_orig_mod."))
    restore(compiled)
    assert_same(run(compiled, data), _named(want, "_orig_mod."))


def _named(outcome, prefix):
    return outcome[0], {prefix + name: grad for name, grad in outcome[1].items()}


def test_a_block_compiles_to_one_graph():
    torch._dynamo.reset()
    model = make("frame")
    accelerate(model)
    block, plain = model.student.encoder.blocks[1], make("frame").student.encoder.blocks[1]
    compiled = torch.compile(block, backend="eager", fullgraph=True, dynamic=True)
    for clips in (3, 5):
        x, length = torch.randn(clips, 7, 24), torch.tensor([7, 3, 1, 2, 5])[:clips]
        for training in (True, False):
            results = []
            for b in (compiled, plain):
                b.train(training)
                torch.manual_seed(0)
                results.append(b(x, length))
            torch.testing.assert_close(*results, rtol=NETWORK_RTOL, atol=NETWORK_RTOL)
            results[0].sum().backward()


@pytest.mark.parametrize("first", ["DDP", "accelerate"])
@pytest.mark.parametrize("kind", ["frame", "clip"])
def test_ddp(kind, first):
    """DDP reduces the gradients of the same parameters, whichever comes first."""
    model, data = make(kind), batch(kind)
    want = run(model, data)
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        if first == "accelerate":
            accelerate(model)
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        assert len(accelerate(wrapped).replaced) == 11
        assert_same(run(wrapped, data), _named(want, "module."))
    finally:
        dist.destroy_process_group()


def test_checkpointed_blocks():
    from torch.utils.checkpoint import checkpoint

    model = make("frame").student.encoder
    x, length = torch.randn(5, 7, 24), torch.tensor([7, 3, 1, 2, 5])
    accelerate(model)

    def gradient(through):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(0)
        y = leaf
        for block in model.blocks:
            y = through(block, y, length)
        y.square().sum().backward()
        return leaf.grad

    want = gradient(lambda block, *args: block(*args))
    torch.testing.assert_close(gradient(lambda *args: checkpoint(*args, use_reentrant=False)), want)


class HFAdamW(torch.optim.Optimizer):
    """transformers' AdamW: its settings, its state and its form."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0, correct_bias=True):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            (b1, b2), lr = group["betas"], group["lr"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                state["exp_avg"].lerp_(p.grad, 1 - b1)
                state["exp_avg_sq"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                size = lr * (1 - b2 ** state["step"]) ** 0.5 / (1 - b1 ** state["step"])
                p.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-size)
                p.mul_(1 - lr * group["weight_decay"])


HFAdamW.__name__ = "AdamW"


@pytest.mark.parametrize("kind", [HFAdamW, torch.optim.AdamW])
@pytest.mark.parametrize("started", [True, False])
def test_adamw_ema_goes_on_from_an_optimizer(kind, started):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5))]
    grads = [[torch.randn_like(p) for p in params] for _ in range(6)]
    old = kind([{"params": params[:1], "name": "a"}, {"params": params[1:], "lr": 0.1, "weight_decay": 0.0}], lr=0.01)

    def steps(optimizer, these):
        for step in these:
            for p, g in zip(params, step):
                p.grad = g.clone()
            optimizer.step()

    if started:
        steps(old, grads[:3])
    before = [p.detach().clone() for p in params]
    new = AdamWEMA.from_optimizer(old)
    assert new.form == ("hf" if kind is HFAdamW else "torch")
    assert [g["lr"] for g in new.param_groups] == [0.01, 0.1]
    assert new.param_groups[0]["name"] == "a"
    assert all(a is b for a, b in zip(params, (p for g in new.param_groups for p in g["params"])))
    new.param_groups[0]["mark"] = 1
    assert "mark" not in old.param_groups[0]
    steps(new, grads[3:])
    got = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p, b in zip(params, before):
            p.copy_(b)
    steps(old, grads[3:])
    torch.testing.assert_close(got, [p.detach() for p in params], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "make_optimizer, error, message",
    [
        (torch.optim.SGD, TypeError, "optimizer must be torch's or transformers' AdamW, got SGD"),
        (torch.optim.Adam, TypeError, "optimizer must be torch's or transformers' AdamW, got Adam"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), ValueError, "amsgrad of group 0 must be False, got bool True"),
        (lambda p: torch.optim.AdamW(p, maximize=True), ValueError, "maximize of group 0 must be False"),
        (lambda p: HFAdamW(p, correct_bias=False), ValueError, "correct_bias of group 0 must be True, got bool False"),
        (lambda p: None, TypeError, "optimizer must be torch's or transformers' AdamW, got NoneType None"),
    ],
)
def test_optimizers_that_cannot_be_continued(make_optimizer, error, message):
    with pytest.raises(error, match="AdamWEMA.from_optimizer: " + message):
        AdamWEMA.from_optimizer(make_optimizer([nn.Parameter(torch.zeros(2))]))
