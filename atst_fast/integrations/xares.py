"""The interface of X-ARES, the eXtensive Audio Representation and Evaluation Suite."""

import torch
from torch import Tensor, nn

from atst_fast.integrations.embedding import Embedder


class ATSTEncoder(nn.Module):
    """An `Embedder` as X-ARES calls an audio encoder; its weights are frozen and in eval mode, also after ``train()``.

    Attributes: ``sampling_rate`` (Hz), ``output_dim`` (n_blocks * D), ``hop_size_in_ms`` (40).
    """

    def __init__(self, embedder: Embedder):
        super().__init__()
        if not isinstance(embedder, Embedder):
            raise TypeError(f"ATSTEncoder: embedder must be an Embedder, got {type(embedder).__name__}")
        self.embedder = embedder.eval().requires_grad_(False)
        self.sampling_rate = embedder.sample_rate
        self.output_dim = embedder.timestamp_embedding_size
        self.hop_size_in_ms = embedder.hop_ms

    def forward(self, audio: Tensor) -> Tensor:
        """Waveforms ``[B, N]`` or ``[N]`` at ``sampling_rate`` to float32 ``[B, T, output_dim]``, T = ceil(N / 640)."""
        one = isinstance(audio, Tensor) and audio.dim() == 1
        with torch.no_grad():  # no inference tensors: a head is trained on what comes out
            return self.embedder.timestamps(audio[None] if one else audio)[0]

    def train(self, mode: bool = True) -> "ATSTEncoder":
        return super().train(False)
