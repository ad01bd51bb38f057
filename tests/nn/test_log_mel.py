import copy
import pickle

import torch

from atst_fast import nn, ops
from tests.tolerances import MEL_SCALED_DB

WAVE = 0.1 * torch.sin(torch.arange(8000) ** 1.5 / 300)


def test_module_is_the_operator():
    assert torch.equal(nn.LogMelSpectrogram()(WAVE), ops.log_mel(WAVE))
    arguments = {"n_fft": 512, "win_length": 400, "hop_length": 128, "n_mels": 80, "f_max": 8000.0, "top_db": None}
    assert torch.equal(nn.LogMelSpectrogram(**arguments)(WAVE), ops.log_mel(WAVE, **arguments))
    lengths = torch.tensor([8000, 600])
    batch = WAVE.expand(2, -1)
    assert torch.equal(nn.LogMelSpectrogram()(batch, lengths), ops.log_mel(batch, lengths=lengths))


def test_buffers_have_torchaudios_names_and_are_what_is_computed_with():
    module = nn.LogMelSpectrogram(win_length=640)
    state = module.state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == {"spectrogram.window": (640,), "mel_scale.fb": (513, 64)}
    state["mel_scale.fb"] = 100 * state["mel_scale.fb"]
    other = nn.LogMelSpectrogram(win_length=640, minmax=None, top_db=None)
    before = other(WAVE)
    other.load_state_dict(state)
    loud = before > -60
    torch.testing.assert_close(other(WAVE)[loud], before[loud] + 20, rtol=0, atol=MEL_SCALED_DB)


def test_tables_stay_float32_and_the_cache_is_not_shared():
    module = nn.LogMelSpectrogram().bfloat16().half()
    assert torch.equal(module(WAVE), ops.log_mel(WAVE))
    module.mel_scale.fb.zero_()
    assert torch.equal(nn.LogMelSpectrogram()(WAVE), ops.log_mel(WAVE))


def test_copies_and_pickles():
    module = nn.LogMelSpectrogram(n_mels=80)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(WAVE), module(WAVE))
