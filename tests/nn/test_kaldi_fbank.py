import copy
import inspect
import pickle

import pytest
import torch

from atst_fast import nn, ops
from tests.ops.test_kaldi_fbank import MODELS, ONLY
from tests.ops.test_log_mel import speech_like

WAVE = speech_like(2 * 8000).reshape(2, 8000)


@pytest.mark.parametrize("model", MODELS)
def test_module_is_the_operator(model):
    lengths = torch.tensor([8000, 3000])
    module = nn.KaldiFbank(**MODELS[model])
    assert torch.equal(module(WAVE), ops.kaldi_fbank(WAVE, **MODELS[model]))
    assert torch.equal(module(WAVE, lengths), ops.kaldi_fbank(WAVE, **MODELS[model], lengths=lengths))
    options = {"channel": 1, "remove_dc_offset": False, "preemphasis_coefficient": 0.5, "frame_shift": 7.0}
    own = nn.KaldiFbank(**MODELS[model] | options)
    assert torch.equal(own(WAVE), ops.kaldi_fbank(WAVE, **MODELS[model] | options))


def test_arguments_and_defaults_are_the_operators():
    def parameters(function):
        named = inspect.signature(function).parameters.values()
        return {p.name: p.default for p in named if p.name not in ("waveform", "lengths")}

    assert parameters(nn.KaldiFbank) == parameters(ops.kaldi_fbank)


@pytest.mark.parametrize("name", ONLY)
def test_what_is_not_supported_is_refused_when_the_module_is_made(name):
    got, only = ONLY[name]
    with pytest.raises(ValueError, match=f"kaldi_fbank: {name} must be {only}"):
        nn.KaldiFbank(**{name: got})


def test_state_dict_is_empty_and_tables_stay_float32():
    module = nn.KaldiFbank().bfloat16().half()
    assert not module.state_dict()
    assert torch.equal(module(WAVE), ops.kaldi_fbank(WAVE))


def test_copies_pickles_and_leaving_the_meta_device():
    module = nn.KaldiFbank(**MODELS["ssast"])
    with torch.device("meta"):
        empty = nn.KaldiFbank(**MODELS["ssast"])
    assert empty.window.is_meta
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), empty.to_empty(device="cpu")):
        assert torch.equal(other(WAVE), module(WAVE))


def test_compiles_without_a_graph_break_for_any_batch():
    module = nn.KaldiFbank()
    compiled = torch.compile(lambda x: module(x) * 2, fullgraph=True, backend="aot_eager", dynamic=True)
    function = torch.compile(lambda x: ops.kaldi_fbank(x) * 2, fullgraph=True, backend="aot_eager")
    for batch in (1, 2, 3):
        x = WAVE[:1].expand(batch, -1)
        assert torch.equal(compiled(x), module(x) * 2)
        assert torch.equal(function(x), module(x) * 2)
