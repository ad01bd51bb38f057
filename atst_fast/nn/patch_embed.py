"""Mel frames to tokens: the parameters of ``ops.patch_embed``."""

from torch import Tensor, nn

from atst_fast import ops


class PatchEmbed(nn.Module):
    """Non-overlapping patches of a mel spectrogram, each through one linear layer.

    Same keys as audiossl's two classes (``audiossl/methods/atstframe/audio_transformer.py``): ``kind="Linear"`` holds
    ``patch_embed.{weight [D, ph*pw], bias [D]}`` (``PatchEmbed_v2``), ``kind="CNN"`` holds
    ``proj.{weight [D, 1, ph, pw], bias [D]}`` (``PatchEmbed``). The maths is the same.

    Args: ``patch_height`` mel bins and ``patch_width`` frames of a patch; ``embed_dim`` D; ``input_dim`` must be 1.
    """

    def __init__(
        self,
        patch_height: int = 64,
        patch_width: int = 4,
        embed_dim: int = 768,
        input_dim: int = 1,
        *,
        kind: str = "Linear",
    ):
        super().__init__()
        if input_dim != 1:
            raise ValueError(f"PatchEmbed: input_dim must be 1 (one mel channel), got {input_dim}")
        if kind not in ("Linear", "CNN"):
            raise ValueError(f"PatchEmbed: kind must be 'Linear' or 'CNN', got {kind!r}")
        self.patch_height, self.patch_width = patch_height, patch_width
        patch = (patch_height, patch_width)
        if kind == "Linear":
            self.patch_embed = nn.Linear(patch_height * patch_width, embed_dim)
        else:
            self.proj = nn.Conv2d(1, embed_dim, kernel_size=patch, stride=patch)

    def forward(
        self,
        mel: Tensor,
        *,
        mask: Tensor | None = None,
        mask_embed: Tensor | None = None,
        pos_embed: Tensor | None = None,
    ) -> Tensor:
        """Mel ``[B, 1, F, T]`` to tokens ``[B, L, D]``, time-major; the other arguments are those of
        ``ops.patch_embed``."""
        layer = self.patch_embed if hasattr(self, "patch_embed") else self.proj
        return ops.patch_embed(
            mel,
            layer.weight.flatten(1),
            layer.bias,
            patch=(self.patch_height, self.patch_width),
            mask=mask,
            mask_embed=mask_embed,
            pos_embed=pos_embed,
        )

    def tokens(self, length: Tensor | int, n_mels: int):
        """Number of tokens of that many mel frames (an int or a tensor of them)."""
        return (n_mels // self.patch_height) * (length // self.patch_width)

    def extra_repr(self) -> str:
        return f"patch=({self.patch_height}, {self.patch_width})"
