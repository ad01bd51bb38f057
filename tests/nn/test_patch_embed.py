import pytest
import torch
import torch.nn.functional as F

from atst_fast.nn import PatchEmbed
from tests.tolerances import OTHER_ORDER


@pytest.mark.parametrize("patch, frames", [((64, 4), 41), ((16, 16), 70), ((32, 8), 8)])
def test_both_layouts_are_one_convolution(patch, frames):
    mel = torch.randn(2, 1, 64, frames)
    cnn = PatchEmbed(*patch, 24, kind="CNN")
    linear = PatchEmbed(*patch, 24)
    linear.load_state_dict({"patch_embed.weight": cnn.proj.weight.flatten(1), "patch_embed.bias": cnn.proj.bias})
    want = F.conv2d(mel, cnn.proj.weight, cnn.proj.bias, stride=patch).transpose(2, 3).flatten(2).transpose(1, 2)
    for module in (cnn, linear):
        torch.testing.assert_close(module(mel), want, rtol=OTHER_ORDER, atol=OTHER_ORDER)
        assert module.tokens(frames, 64) == want.shape[1]


def test_keys():
    assert set(PatchEmbed(embed_dim=8).state_dict()) == {"patch_embed.weight", "patch_embed.bias"}
    assert set(PatchEmbed(embed_dim=8, kind="CNN").state_dict()) == {"proj.weight", "proj.bias"}


def test_gradients_reach_the_convolution():
    cnn = PatchEmbed(64, 4, 8, kind="CNN")
    cnn(torch.randn(1, 1, 64, 9)).sum().backward()
    assert cnn.proj.weight.grad.abs().max() > 0
    assert cnn.proj.bias.grad.shape == (8,)


def test_errors():
    with pytest.raises(ValueError, match="PatchEmbed: kind must be"):
        PatchEmbed(kind="conv")
    with pytest.raises(ValueError, match="PatchEmbed: input_dim must be 1"):
        PatchEmbed(input_dim=2)
