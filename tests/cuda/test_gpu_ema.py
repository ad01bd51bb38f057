"""The teacher update and AdamWEMA where only a GPU can tell: graphs, streams, devices, and that nobody waits."""

import contextlib
import re

import pytest
import torch

from atst_fast import ops
from atst_fast.ops.ema import grad_norm
from atst_fast.optim import AdamWEMA
from tests import tolerances
from tests.conftest import needs_gpu
from tests.ops.test_adamw_ema import two_parameters
from tests.ops.test_ema import randn
from tests.test_optim import make

pytestmark = needs_gpu
SHAPES = [(300, 1000), (129,), (), (0, 4)]


@contextlib.contextmanager
def nobody_waits():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu(shapes=SHAPES):
    params, teacher = make(shapes)
    params = [torch.nn.Parameter(p.detach().cuda()) for p in params]
    for p in params:
        p.grad = torch.randn(p.shape, device="cuda")
    return params, [t.cuda() for t in teacher]


def capture(step):
    """A graph of a step, which is not run."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def test_public_functions():
    teacher, student = [randn((1000,)), randn((3, 5))], [randn((1000,)).bfloat16(), randn((3, 5))]
    ours, same = [t.cuda() for t in teacher], [s.cuda() for s in student]
    ops.ema_update_(teacher, student, 0.9)
    with nobody_waits():
        ops.ema_update_(ours, same, 0.9)  # the number travels with the launch
        norm = grad_norm(ours)
    assert norm.is_cuda
    assert norm.item() == pytest.approx(grad_norm(teacher).item(), rel=tolerances.GRAD_NORM_RTOL)
    for a, b in zip(ours, teacher):
        torch.testing.assert_close(a.cpu(), b, rtol=tolerances.NO_FMA_RTOL, atol=tolerances.NO_FMA_ATOL)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_step_waits_for_nothing(clip):
    params, teacher = on_gpu()
    optimizer = AdamWEMA(params, teacher=teacher, max_grad_norm=clip)
    scale = torch.tensor(0.5, device="cuda")
    with nobody_waits():
        for k in range(3):
            optimizer.param_groups[0]["lr"] = 1e-3 * k
            optimizer.step(momentum=0.9 + 0.01 * k, grad_scale=scale)
    assert all(optimizer.state[p]["step"].item() == 3 for p in params)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_graph_follows_the_schedule(clip):
    results = []
    for captured in (False, True):
        torch.manual_seed(1)
        params, teacher = on_gpu()
        optimizer = AdamWEMA(params, teacher=teacher, max_grad_norm=clip)
        optimizer.step()
        graph = capture(optimizer.step) if captured else None
        for k in range(4):
            optimizer.param_groups[0].update(lr=1e-3 * (k + 1), weight_decay=0.1 * k)
            optimizer.momentum = 1 - 0.1 / (k + 1)
            for p in params:
                p.grad.copy_(torch.randn(p.shape, device="cuda"))
            if graph is None:
                optimizer.step()
            else:
                optimizer.refresh()
                graph.replay()
        results.append([*params, *teacher, *(s["step"] for s in optimizer.state.values())])
        assert all(s["step"].item() == 5 for s in optimizer.state.values())
        if clip:
            results[-1].append(optimizer.grad_norm)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_graph_reads_a_rate_that_is_a_tensor():
    params, _ = on_gpu([(64,)])
    lr = torch.zeros((), device="cuda")
    optimizer = AdamWEMA(params, lr=lr)
    optimizer.step()
    graph = capture(optimizer.step)
    before = params[0].detach().clone()
    graph.replay()
    assert torch.equal(params[0], before)
    lr.fill_(0.5)
    graph.replay()
    assert not torch.equal(params[0], before)


def test_a_graph_of_the_update_reads_its_momentum():
    teacher, student = torch.zeros(100, device="cuda"), torch.ones(100, device="cuda")
    momentum = torch.ones((), device="cuda")
    ops.ema_update_([teacher], [student], momentum)
    graph = capture(lambda: ops.ema_update_([teacher], [student], momentum))
    graph.replay()
    assert (teacher == 0).all()
    momentum.fill_(0.75)
    graph.replay()
    assert (teacher == 0.25).all()


def test_what_has_to_happen_before_a_capture():
    params, _ = on_gpu([(64,)])
    optimizer = AdamWEMA(params)
    with pytest.raises(RuntimeError, match="AdamWEMA: a step must be taken before one is captured"):
        capture(optimizer.step)
    optimizer.step()
    with pytest.raises(ValueError, match="AdamWEMA: momentum must be a tensor on the GPU"):
        capture(lambda: optimizer.step(momentum=0.5))


def test_side_stream():
    """A step runs on the current stream, and its scratch memory is not given away too early."""
    results = []
    for side in (False, True):
        torch.manual_seed(1)
        params, teacher = on_gpu()
        optimizer = AdamWEMA(params, teacher=teacher, max_grad_norm=0.1)
        stream = torch.cuda.Stream() if side else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                torch.cuda._sleep(1_000_000)
                for p in params:
                    p.grad = p.detach() * 2
                optimizer.step()
        stream.synchronize()
        results.append([*params, *teacher])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_large_and_repeated():
    """Enough blocks to fill any GPU several times: the same bits twice."""
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        p, g, t = (torch.randn(20_000_003, device="cuda") for _ in range(3))
        p = torch.nn.Parameter(p)
        p.grad = g
        optimizer = AdamWEMA([p], teacher=[t], max_grad_norm=1.0)
        optimizer.step()
        results.append([p.detach(), t, optimizer.grad_norm])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_more_than_2_to_the_31_elements():
    n = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 7 * n:
        pytest.skip("needs 14 GB of GPU memory")
    teacher, student = torch.zeros(n, device="cuda"), torch.ones(n, device="cuda", dtype=torch.bfloat16)
    ops.ema_update_([teacher], [student], 0.75)
    assert (teacher[-9:] == 0.25).all()
    assert torch.equal(teacher.aminmax().min, teacher.aminmax().max)
    assert grad_norm([teacher]).item() == pytest.approx(0.25 * n**0.5, rel=tolerances.GRAD_NORM_RTOL)


@pytest.mark.parametrize(
    "position, value, message",
    [
        (0, lambda a: [a[0], a[1].cpu()], "params[1] must be on CUDA device 0, as params[0] is"),
        (4, lambda a: [a[0].cpu(), a[1]], "steps[0] must be on CUDA device 0, as params[0] is"),
        (5, lambda a: [a[0].cpu(), a[1]], "teachers[0] must be on CUDA device 0, as params[0] is"),
        (8, lambda a: a.cpu(), "hyper must be on a CUDA device"),
        (10, lambda a: torch.tensor(2.0), "momentum must be between 0 and 1, got 2"),
    ],
)
def test_errors_of_the_step(position, value, message):
    arguments = two_parameters()
    arguments[:8] = [[t.cuda() for t in tensors] for tensors in arguments[:8]]
    arguments[8], arguments[10] = arguments[8].cuda(), arguments[10].cuda()
    arguments[position] = value(arguments[position])
    with pytest.raises(RuntimeError, match=re.escape(f"adamw_ema_: {message}")):
        torch.ops.atst_fast.adamw_ema_(*arguments)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda t, c: ops.ema_update_([t, c], [t, c], 0.5), "ema_update_: teacher[1] must be on cuda:0, as teacher[0]"),
        (lambda t, c: ops.ema_update_([t], [c], 0.5), "ema_update_: student[0] must be of shape [3] on cuda:0"),
        (lambda t, c: ops.ema_update_([c], [c], t[0]), "ema_update_: momentum must be on cpu, as teacher[0] is"),
        (lambda t, c: grad_norm([t, c]), "grad_norm: grads[1] must be on cuda:0, as grads[0] is"),
    ],
)
def test_errors_of_public_functions(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(torch.zeros(3, device="cuda"), torch.zeros(3))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one():
    teacher, student = torch.zeros(9, device="cuda:1"), torch.ones(9, device="cuda:1")
    ops.ema_update_([teacher], [student], 0.75)
    assert (teacher == 0.25).all()
    with pytest.raises(ValueError, match="student\\[0\\] must be of shape"):
        ops.ema_update_([teacher], [student.to("cuda:0")], 0.5)
