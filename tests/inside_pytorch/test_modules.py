"""Activation checkpointing, deepcopy, pickle and construction on the meta device, of every module and model."""

import copy
import io
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from atst_fast.nn import LogMelSpectrogram
from atst_fast.reference import log_mel as reference
from tests.inside_pytorch.cases import CASES, FRONT_ENDS, NAMES, WaveformEncoder, first, inputs, loss, make

TRAINED = [n for n in NAMES if n not in FRONT_ENDS]


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("name", TRAINED)
def test_activation_checkpointing(name, reentrant):
    """The second forward draws the paths that the first one dropped: the gradients are the same bits."""
    module, args = make(name, drop_path=0.5).train(), inputs(name)
    # without an input that needs a gradient the reentrant form has none
    args = (args[0].requires_grad_(name != "WaveformEncoder"), *args[1:])
    anchor = torch.zeros((), requires_grad=True)
    gradients = []
    for saves in (True, False):
        twin = copy.deepcopy(module)
        torch.manual_seed(1)

        def forward(_, *given, twin=twin):
            return first(twin(*given))

        out = forward(anchor, *args) if saves else checkpoint(forward, anchor, *args, use_reentrant=reentrant)
        loss(out).backward()
        gradients.append({n: p.grad for n, p in twin.named_parameters() if p.grad is not None})
    assert gradients[0]
    assert gradients[0].keys() == gradients[1].keys()
    for key, grad in gradients[0].items():
        assert torch.equal(grad, gradients[1][key]), key


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_a_file(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("twin", [copy.deepcopy, through_pickle, through_a_file])
@pytest.mark.parametrize("name", NAMES)
def test_copies(name, twin):
    """Same numbers and keys, nothing shared; also of a module that has run."""
    module, args = make(name).eval(), inputs(name)
    want = first(module(*args))
    copied = twin(module)
    assert torch.equal(first(copied(*args)), want)
    state = copied.state_dict()
    assert list(state) == list(module.state_dict())
    for key, value in module.state_dict().items():
        assert torch.equal(state[key], value)
        assert not value.numel() or state[key].data_ptr() != value.data_ptr(), key


@pytest.mark.parametrize("name", NAMES)
def test_meta_device(name):
    """Made without memory; filled by a state dict that is copied into it, or taken over."""
    module, args = make(name).eval(), inputs(name)
    for assign in (False, True):
        with torch.device("meta"):
            empty = CASES[name].make().eval()
            assert first(empty(*(x.to("meta") for x in args))).is_meta
        assert all(x.is_meta for x in empty.state_dict().values())
        if not assign or not module.state_dict():  # buffers that are in no state dict are filled by the move
            empty.to_empty(device="cpu")
        empty.load_state_dict(module.state_dict(), assign=assign)
        assert torch.equal(first(empty(*args)), first(module(*args)))


def test_front_end_has_its_tables_when_it_leaves_the_meta_device():
    """Nothing has to be loaded into it: they follow from its arguments, also within another module and in half."""
    made = LogMelSpectrogram(n_mels=128, f_min=50.0)
    for half in (False, True):
        with torch.device("meta"):
            empty = torch.nn.Sequential(LogMelSpectrogram(n_mels=128, f_min=50.0))
        moved = (empty.half() if half else empty).to_empty(device="cpu")[0]
        for key, value in made.state_dict().items():
            assert torch.equal(moved.state_dict()[key], value), key
    with torch.no_grad():
        made.spectrogram.window.zero_()
        made.mel_scale.fb.zero_()
    made.reset_parameters()
    assert torch.equal(made.mel_scale.fb, reference.filterbank(1024, 16000, 50.0, 7800.0, 128))
    assert torch.equal(made.spectrogram.window, moved.spectrogram.window)


def test_front_end_is_made_on_the_default_device():
    with torch.device("meta"):
        assert LogMelSpectrogram().spectrogram.window.is_meta
    assert not LogMelSpectrogram().spectrogram.window.is_meta


def test_encoder_starts_anew_after_the_meta_device():
    """``reset_parameters`` of the modules that have one leaves nothing as it was allocated."""
    with torch.device("meta"):
        empty = WaveformEncoder()
    empty.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in empty.parameters():
            parameter.fill_(torch.nan)
    for module in empty.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(x.isfinite().all() for x in empty.state_dict().values())


def test_functional_call():
    """Weights from outside, as torch.func passes them."""
    module, args = make("FrameEncoder").eval(), inputs("FrameEncoder")
    weights = {k: v + 0.01 for k, v in module.state_dict().items()}
    got = torch.func.functional_call(module, weights, args)
    module.load_state_dict(weights)
    assert torch.equal(got, module(*args))
