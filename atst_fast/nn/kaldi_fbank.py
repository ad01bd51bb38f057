"""Kaldi's filterbank: the arguments of ``ops.kaldi_fbank`` once, its tables as buffers."""

from torch import Tensor

from atst_fast.nn.tables import Tables
from atst_fast.ops.kaldi_fbank import check_fixed, kaldi_fbank_with, make_tables, samples_of


class KaldiFbank(Tables):
    """``torchaudio.compliance.kaldi.fbank`` for batches: arguments, numbers and refusals of ``ops.kaldi_fbank``.

    SSAST and ASiT: ``KaldiFbank(htk_compat=True, window_type="hanning", num_mel_bins=128, sample_frequency=...)`` of
    ``waveform - waveform.mean(-1, keepdim=True)``; BEATs: ``KaldiFbank(num_mel_bins=128)`` of ``waveform * 2**15``.

    Buffers ``window [W]`` and ``fb [n_fft // 2 + 1, num_mel_bins]``, float32 whatever the module is cast to. They are
    not in the state dict, for torchaudio's function has none.
    """

    def __init__(
        self,
        blackman_coeff: float = 0.42,
        channel: int | None = None,
        dither: float = 0.0,
        energy_floor: float = 1.0,
        frame_length: float = 25.0,
        frame_shift: float = 10.0,
        high_freq: float = 0.0,
        htk_compat: bool = False,
        low_freq: float = 20.0,
        min_duration: float = 0.0,
        num_mel_bins: int = 23,
        preemphasis_coefficient: float = 0.97,
        raw_energy: bool = True,
        remove_dc_offset: bool = True,
        round_to_power_of_two: bool = True,
        sample_frequency: float = 16000.0,
        snip_edges: bool = True,
        subtract_mean: bool = False,
        use_energy: bool = False,
        use_log_fbank: bool = True,
        use_power: bool = True,
        vtln_high: float = -500.0,
        vtln_low: float = 100.0,
        vtln_warp: float = 1.0,
        window_type: str = "povey",
    ):
        check_fixed(
            dither=dither,
            min_duration=min_duration,
            round_to_power_of_two=round_to_power_of_two,
            snip_edges=snip_edges,
            subtract_mean=subtract_mean,
            use_energy=use_energy,
            use_log_fbank=use_log_fbank,
            use_power=use_power,
            vtln_warp=vtln_warp,
        )
        settings = (sample_frequency, frame_length, low_freq, high_freq, num_mel_bins, window_type)
        super().__init__(("window", "fb"), make_tables, *settings, persistent=False)
        self.channel, self.sample_frequency, self.num_mel_bins = channel, sample_frequency, num_mel_bins
        self.frame_shift = samples_of(sample_frequency, "frame_shift", frame_shift)
        self.preemphasis_coefficient, self.remove_dc_offset = preemphasis_coefficient, remove_dc_offset

    def forward(self, waveform: Tensor, lengths: Tensor | None = None) -> Tensor:
        """``[..., N]`` float32 or int16 to ``[..., T, num_mel_bins]``; zeros past the ``lengths [B]`` of clips."""
        return kaldi_fbank_with(
            waveform,
            self._window,
            self._fb,
            self.frame_shift,
            preemphasis=self.preemphasis_coefficient,
            remove_dc_offset=self.remove_dc_offset,
            channel=self.channel,
            lengths=lengths,
        )

    def extra_repr(self) -> str:
        frame = f"frame_length={self._window.shape[0]} samples, frame_shift={self.frame_shift} samples"
        return f"sample_frequency={self.sample_frequency}, {frame}, num_mel_bins={self.num_mel_bins}"
