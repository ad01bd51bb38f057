"""Two processes on a CPU, half of the batch each, against one process with all of it."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from atst_fast import EMATeacher, ops
from atst_fast.models import ATSTFrame, LinearHead, frame_loss
from atst_fast.optim import AdamWEMA, param_groups
from tests.models import checks
from tests.processes import run_two

TINY = {"dim": 24, "depth": 2, "num_heads": 3}
ROWS = [9, 5]  # of either process in `norm`, the last two of each padding
FEW = [3, 0]  # valid rows where one process has none
CLIPPED = 0.05  # less than the norm of the gradients

assert_same = partial(checks.assert_same, least=1e-2)


def make_system():
    torch.manual_seed(0)
    system = ATSTFrame(TINY, hidden=40, out=16, mlp_ratio=2.0, drop_path_rate=0.0, max_frames=41)
    with torch.no_grad():
        for p in system.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    return system


def make_batch():
    """Ragged clips; every clip has as many valid masked tokens, so that both processes have as many rows."""
    torch.manual_seed(1)
    mask = torch.zeros(4, 10, dtype=torch.bool)
    mask[:, :5] = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 0, 1, 0], [0, 1, 1, 1, 0], [1, 0, 1, 1, 0]])
    return *torch.randn(2, 4, 1, 64, 41), torch.tensor([41, 23, 33, 20]), mask


def make_rows():
    """x of both processes, whose means differ, and everything else that `norm` takes."""
    torch.manual_seed(2)
    x = [torch.randn(n, 6, dtype=torch.float64) + 3 * i for i, n in enumerate(ROWS)]
    return x, *torch.randn(2, 6, dtype=torch.float64), [torch.randn_like(part) for part in x]


def norm(x, weight, bias, grad, **kwargs):
    """Result, gradients and running statistics."""
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    running = torch.ones(2, x.shape[1], dtype=x.dtype)
    out = ops.batch_norm_relu(*leaves, running_mean=running[0], running_var=running[1], **kwargs)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad), running]


def classify(x, grad, *, common=False):
    """Logits of a `LinearHead`, the gradient of x, and running statistics."""
    torch.manual_seed(4)
    head, x = LinearHead(6, 6).double(), x.clone().requires_grad_()
    if common:
        nn.SyncBatchNorm.convert_sync_batchnorm(head)
    out = head(x)
    return [out.detach(), *torch.autograd.grad(out, x, grad), head.norm.running_mean, head.norm.running_var]


def step(system, batch):
    """Loss and spreads, gradients and buffers."""
    out = system(*batch)
    out.loss.backward()
    grads = {n: p.grad for n, p in system.named_parameters() if p.grad is not None}
    return [x.detach() for x in out], grads, dict(system.named_buffers())


def optimizer_of(system, **kwargs):
    teacher = dict(zip(*system.teacher_pairs()))
    return AdamWEMA(param_groups(system, 0.04), lr=1e-3, teacher=teacher, momentum=0.9, **kwargs)


def train(module, system, batch, steps=2, **kwargs):
    """Losses, and what is in the system after some steps; ``module`` is what is called for them."""
    optimizer, losses = optimizer_of(system, **kwargs), []
    for _ in range(steps):
        loss = module(*batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), system.state_dict()


def replicated(batch):
    """DistributedDataParallel refuses SyncBatchNorm on a CPU, so the heads are converted within it."""
    replica = torch.nn.parallel.DistributedDataParallel(make_system())
    torch.nn.SyncBatchNorm.convert_sync_batchnorm(replica.module)
    return train(replica, replica.module, batch)


def shard(whole, *networks):
    """Each block a unit, the rest of each one."""
    mesh = init_device_mesh("cpu", (2,))
    for network in networks:
        for block in network.encoder.blocks:
            fully_shard(block, mesh=mesh)
    for module in whole:
        fully_shard(module, mesh=mesh)


def sharded(batch):
    """Gradients, and a teacher that was made before, sharded likewise."""
    system = torch.nn.SyncBatchNorm.convert_sync_batchnorm(make_system())
    teacher = EMATeacher(system.student, 0.75, include=("encoder", "projector"), buffers="skip")
    shard((teacher.module, system), system.student, system.teacher, teacher.module)
    loss = system(*batch).loss
    loss.backward()
    grads = {n: p.grad.full_tensor() for n, p in system.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for p in system.student.parameters():
            p.add_(0.5)
    teacher.update(system.student)
    return loss.detach(), grads, {n: p.full_tensor() for n, p in teacher.module.named_parameters()}


def trained_in_shards(batch):
    """Losses and weights after two steps of the optimizer, which clips."""
    system = torch.nn.SyncBatchNorm.convert_sync_batchnorm(make_system())
    shard((system,), system.student, system.teacher)
    weight = system.student.projector[0].weight
    with pytest.raises(ValueError, match=r"AdamWEMA: teacher\[0\] must be sharded as its counterpart .*, got not"):
        AdamWEMA([weight], teacher=[torch.zeros(weight.shape)])
    losses, state = train(system, system, batch, max_grad_norm=CLIPPED)
    return losses, {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in state.items()}


def one_of_two(rank, port, folder):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    half = [x.chunk(2)[rank] for x in make_batch()]
    alone = step(torch.nn.parallel.DistributedDataParallel(make_system()), half)
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(make_system())
    together = step(converted, half)
    x, weight, bias, grad = make_rows()
    rows = {}
    for name, counts in (("padded", [n - 2 for n in ROWS]), ("few", FEW)):
        kwargs = {"count": torch.tensor(counts[rank]), "group": dist.group.WORLD}
        padded = x[rank].clone()
        padded[counts[rank] :] = float("nan")
        rows[name] = norm(padded, weight, bias, grad[rank], **kwargs)
    rows["head"] = classify(x[rank], grad[rank], common=True)
    torch.manual_seed(3)
    student, teacher = torch.randn(2, 24, 8).chunk(2, 1)[rank]
    spreads = frame_loss(student, teacher, count=torch.tensor(6 if rank else 12))[1:]
    trained = trained_in_shards(half)
    torch.save((alone, together, rows, spreads, replicated(half), sharded(half), trained), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What `one_of_two` found, of both processes."""
    folder = tmp_path_factory.mktemp("processes")
    run_two(one_of_two, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_gradients_of_the_replicas_are_averaged(answers):
    """Statistics of each process alone; spreads are over the rows of both."""
    system = make_system()
    for half in range(2):
        system(*(x.chunk(2)[half] for x in make_batch())).loss.backward()
    for (_, grads, _), *_ in answers:
        for name, grad in grads.items():
            assert_same(grad, system.get_parameter(name.removeprefix("module.")).grad / 2, name)
    torch.manual_seed(3)
    rows = [x[:18] for x in torch.randn(2, 24, 8)]
    want = [x.item() for x in frame_loss(*rows, symmetric=False)[1:]]
    for _, _, _, spreads, *_ in answers:
        assert [x.item() for x in spreads] == pytest.approx(want, rel=1e-5)


def test_common_statistics_are_those_of_one_process(answers):
    """Loss, gradients as DDP averages them, and running statistics."""
    loss, grads, buffers = step(make_system(), make_batch())
    both = [together for _, together, *_ in answers]
    assert_same((both[0][0][0] + both[1][0][0]) / 2, loss[0], "loss")
    for name, grad in grads.items():
        assert_same((both[0][1][name] + both[1][1][name]) / 2, grad, name)
    for process in both:
        assert_same(torch.stack(process[0][1:]), torch.stack(loss[1:]), "spreads")
        for name, buffer in buffers.items():
            assert_same(process[2][name], buffer, name)


def test_replicas_train_as_one_process(answers):
    """Weights, teacher and running statistics after two steps of DistributedDataParallel with common statistics."""
    system = make_system()
    losses, state = train(system, system, make_batch())
    both = [replicas for *_, replicas, _, _ in answers]
    assert_same((both[0][0] + both[1][0]) / 2, losses, "losses")
    for _, found in both:
        assert found.keys() == state.keys()
        for name, value in state.items():
            assert_same(found[name].double(), value.double(), name)
    for name in state:
        assert torch.equal(both[0][1][name], both[1][1][name]), name


def test_sharded_system_is_one_process(answers):
    """FSDP2: loss, gradients and the update of a teacher, whose shards are averaged where they lie."""
    system = make_system()
    loss, grads, _ = step(system, make_batch())
    both = [shards for *_, shards, _ in answers]
    assert_same((both[0][0] + both[1][0]) / 2, loss[0], "loss")
    for _, found, teacher in both:
        assert found.keys() == grads.keys()
        for name, grad in grads.items():
            assert_same(found[name], grad, name)
        for name, value in teacher.items():
            assert_same(value, system.student.get_parameter(name).detach() + 0.125, name)


def test_the_optimizer_trains_shards(answers):
    """FSDP2: weights, teacher and clipped norm are those of one process; a shard may be empty."""
    system = make_system()
    losses, state = train(system, system, make_batch(), max_grad_norm=CLIPPED)
    both = [trained for *_, trained in answers]
    assert_same((both[0][0] + both[1][0]) / 2, losses, "losses")
    for _, found in both:
        assert found.keys() == state.keys()
        for name, value in state.items():
            assert_same(found[name].double(), value.double(), name)


@pytest.mark.parametrize("which, counts", [("padded", [n - 2 for n in ROWS]), ("few", FEW)])
def test_rows_of_processes_and_padding(answers, which, counts):
    """Different numbers of rows in either; one may have none."""
    x, weight, bias, grad = make_rows()
    x, grad = (torch.cat([part[:n] for part, n in zip(parts, counts)]) for parts in (x, grad))
    out, dx, dweight, dbias, running = norm(x, weight, bias, grad)
    found = [rows[which] for _, _, rows, *_ in answers]
    for i, whole in ((0, out), (1, dx)):
        torch.testing.assert_close(torch.cat([f[i][:n] for f, n in zip(found, counts)]), whole)
        assert not any(f[i][n:].any() for f, n in zip(found, counts))
    torch.testing.assert_close(found[0][2] + found[1][2], dweight)
    torch.testing.assert_close(found[0][3] + found[1][3], dbias)
    for f in found:
        torch.testing.assert_close(f[4], running)
    assert torch.equal(found[0][4], found[1][4])


def test_rows_of_a_classifier(answers):
    """Its statistics too are over the rows of both, of which one has more."""
    x, _, _, grad = make_rows()
    out, dx, *running = classify(torch.cat(x), torch.cat(grad))
    found = [rows["head"] for _, _, rows, *_ in answers]
    for i, whole in ((0, out), (1, dx)):
        torch.testing.assert_close(torch.cat([f[i] for f in found]), whole)
    for f in found:
        torch.testing.assert_close(f[2:], running)
        assert torch.equal(torch.stack(f[2:]), torch.stack(found[0][2:]))


def test_converting_keeps_the_keys():
    system = make_system()
    converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(system))
    assert list(converted.state_dict()) == list(system.state_dict())
    assert isinstance(converted.teacher.projector[1], torch.nn.SyncBatchNorm)
    batch = make_batch()
    assert torch.equal(converted(*batch).loss, system(*batch).loss)  # without processes it is a BatchNorm1d
