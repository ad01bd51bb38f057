"""Layouts with an ATST-Clip encoder in them, and those of ATST-C2F, as the official code writes them."""

import pytest
import torch

from atst_fast import CheckpointError, load_checkpoint
from atst_fast.models import ClipEncoder, Distilled, FineTuned, FrameEncoder
from tests.integrations.layouts import (
    FRAMES,
    SIZE,
    assert_same,
    clip_system,
    dino,
    distilled,
    fine_tuned,
    lightning,
    linear_head,
    moved,
    prefixed,
)

pytest.importorskip("safetensors", reason="needs the extra train")
checkpoint = pytest.importorskip("atst_fast.train.checkpoint", reason="needs the extra train")


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_lightning(tmp_path, which):
    system = clip_system()
    lightning(tmp_path / "small.ckpt", prefixed("model.", system.state_dict()), {"arch": "small", "ema": 0.99})
    loaded = load_checkpoint(tmp_path / "small.ckpt", which)
    network = getattr(system, which)
    assert (loaded.method, loaded.layout) == ("clip", "lightning")
    assert_same(loaded.encoder.state_dict(), network.encoder.state_dict())
    assert loaded.encoder.config == network.encoder.config
    assert ("predictor.3.weight" in loaded.heads) == (which == "student")
    mel = torch.randn(2, 1, 64, 40)
    assert torch.equal(loaded.encoder(mel), network.encoder.eval()(mel))


@pytest.mark.parametrize("wrapper", ["module.", ""])
@pytest.mark.parametrize("which", ["teacher", "student"])
def test_the_dict_of_the_first_base_model(tmp_path, which, wrapper):
    system = clip_system()
    networks = {
        name: (network.encoder.state_dict(), network.projector.state_dict())
        for name, network in (("teacher", system.teacher), ("student", system.student))
    }
    dino(tmp_path / "base.ckpt", networks, wrapper=wrapper, arch="ast_base")
    loaded = load_checkpoint(tmp_path / "base.ckpt", which)
    assert (loaded.method, loaded.layout) == ("clip", "dino")
    assert_same(loaded.encoder.state_dict(), networks[which][0])
    assert_same(loaded.heads, prefixed("projector.", networks[which][1]))
    assert loaded.config["args"] == {"anchor_len": [6.0, 6.0], "arch": "ast_base", "pos_type": "cut", "use_cls": True}
    assert loaded.config["epoch"] == 12


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_bare(tmp_path, kind):
    from safetensors.torch import save_file

    encoder = moved(ClipEncoder(SIZE, max_frames=FRAMES))
    write = save_file if kind == "safetensors" else torch.save
    write(encoder.state_dict(), tmp_path / f"a.{kind}")
    loaded = load_checkpoint(tmp_path / f"a.{kind}")
    assert (loaded.method, loaded.layout) == ("clip", "bare")
    assert_same(loaded.encoder.state_dict(), encoder.state_dict())


def test_without_a_class_token(tmp_path):
    encoder = moved(ClipEncoder(SIZE, max_frames=FRAMES, use_cls=False))
    torch.save(encoder.state_dict(), tmp_path / "a.pt")
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert (loaded.method, loaded.encoder.config) == ("clip", encoder.config)
    assert_same(loaded.encoder.state_dict(), encoder.state_dict())


def test_fine_tuned(tmp_path):
    """``encoder.encoder.*`` of audiossl's FineTuningPLModule, and its head."""
    encoder, head = moved(ClipEncoder(SIZE, max_frames=FRAMES)), linear_head(2 * SIZE["dim"])
    lightning(tmp_path / "last.ckpt", prefixed("encoder.encoder.", encoder.state_dict()) | head, {"num_labels": 3})
    loaded = load_checkpoint(tmp_path / "last.ckpt")
    assert (loaded.method, loaded.layout) == ("clip", "finetuned")
    assert_same(loaded.encoder.state_dict(), encoder.state_dict())
    assert_same(loaded.heads, head)
    assert loaded.config["hyper_parameters"] == {"num_labels": 3}


def test_what_this_package_fine_tunes(tmp_path):
    model = fine_tuned()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert loaded.layout == "finetuned"
    assert_same(loaded.encoder.state_dict(), model.encoder.state_dict())
    assert_same(loaded.heads, prefixed("head.", model.head.state_dict()))


@pytest.mark.parametrize("options", [{}, {"project": 16}])
def test_distilled(tmp_path, options):
    """``model.teacher.encoder.*`` and ``model.student.*`` of audiossl's DistillLightningModule."""
    model = distilled(**options)
    state = model.state_dict()
    lightning(tmp_path / "last.ckpt", prefixed("model.", state), {})
    teacher, student = (load_checkpoint(tmp_path / "last.ckpt", which) for which in ("teacher", "student"))
    assert (teacher.method, student.method, teacher.layout, student.layout) == ("clip", "frame", *["distilled"] * 2)
    assert_same(teacher.encoder.state_dict(), model.teacher.encoder.state_dict())
    assert_same(teacher.heads, prefixed("head.", model.teacher.head.state_dict()))
    assert_same(student.encoder.state_dict(), model.student.state_dict())
    assert_same(student.heads, {k: v for k, v in state.items() if not k.startswith(("teacher.", "student."))})
    assert ("project_linear.linear.weight" in student.heads) == bool(options)


@pytest.mark.parametrize("missing", ["cls_token", "norm.weight", "norm.bias"])
def test_what_makes_it_one_is_missing(tmp_path, missing):
    state = ClipEncoder(SIZE, max_frames=FRAMES).state_dict()
    del state[missing]
    state["blocks.0.norm1.bias"].fill_(float("nan"))
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"ClipEncoder of width 64, 2 blocks\)") as error:
        load_checkpoint(tmp_path / "a.pt")
    if missing != "cls_token":  # without one it is an encoder that needs none
        assert error.value.missing == (missing,)
    assert error.value.not_finite == ("blocks.0.norm1.bias",)


def test_positions(tmp_path):
    """The class token keeps its own; the others are those that the encoder itself takes for such an input."""
    encoder = moved(ClipEncoder(SIZE, max_frames=FRAMES))
    torch.save(encoder.state_dict(), tmp_path / "a.pt")
    cut = load_checkpoint(tmp_path / "a.pt", pos_embed="cut", max_frames=21).encoder
    assert torch.equal(cut.pos_embed, encoder.pos_embed[:, :6])
    longer = load_checkpoint(tmp_path / "a.pt", pos_embed="interpolate", max_frames=60).encoder
    same = ClipEncoder(SIZE, max_frames=FRAMES, pos_type="interpolate").eval()
    same.load_state_dict(encoder.state_dict())
    mel = torch.randn(1, 1, 64, 60)
    assert torch.equal(longer(mel), same(mel))
    assert torch.equal(longer.pos_embed[:, 0], encoder.pos_embed[:, 0])


_OTHER_SIZES = {
    "arch": ({"dim": 128, "depth": 3, "num_heads": 2}, {}),
    "frames": (SIZE, {"max_frames": 61}),
    "patches of another width": (SIZE, {"patch": (64, 2)}),
    "square patches": (SIZE, {"patch": (16, 16), "patch_embed": "CNN", "max_frames": 49}),
    "convolution": (SIZE, {"patch_embed": "CNN"}),
    "feed-forward": (SIZE, {"mlp_ratio": 2.0, "qkv_bias": True}),
}


@pytest.mark.parametrize("said", ["by us", "of the student", "of the teacher", "nothing"])
@pytest.mark.parametrize("other", _OTHER_SIZES)
def test_a_teacher_of_other_sizes_than_the_student(tmp_path, other, said):
    """Whatever the file says, and of whichever network: each is read with its own sizes."""
    size, options = _OTHER_SIZES[other]
    teacher = ClipEncoder(size, **({"max_frames": FRAMES} | options))
    model = moved(Distilled(FineTuned(teacher, 3), FrameEncoder(SIZE, max_frames=FRAMES)))
    if said == "by us":  # as `atst-fast distill` writes it
        config = {"model": model.student.config, "head": model.tagger.config, "front_end": {"n_mels": 64}}
        path = checkpoint.save(tmp_path, 7, prefixed("model.", model.state_dict()), {}, config, 1, prefix="")
    else:
        sizes = {"of the student": model.student.config, "of the teacher": teacher.config}.get(said)
        words = {} if sizes is None else {"n_mels": 64, "spec_h": 64, "spec_w": sizes["max_frames"]}
        words |= dict(zip(("patch_h", "patch_w"), sizes["patch"] if sizes else ()))
        path = tmp_path / "last.ckpt"
        lightning(path, prefixed("model.", model.state_dict()), words)
    for which, expected in (("teacher", teacher), ("student", model.student)):
        loaded = load_checkpoint(path, which)
        assert loaded.encoder.config == expected.config
        assert_same(loaded.encoder.state_dict(), expected.state_dict())
        assert loaded.front_end["n_mels"] == 64


def test_patches_that_only_the_file_can_tell_apart(tmp_path):
    """16 x 16 values in a row are 64 x 4 as well, and the number of positions does not always say which."""
    teacher = ClipEncoder(SIZE, patch=(16, 16), max_frames=33)
    model = moved(Distilled(FineTuned(teacher, 3), FrameEncoder(SIZE, max_frames=FRAMES)))
    words = {"n_mels": 64, "patch_h": 16, "patch_w": 16, "spec_w": 33}
    lightning(tmp_path / "last.ckpt", prefixed("model.", model.state_dict()), words)
    assert load_checkpoint(tmp_path / "last.ckpt").encoder.config == teacher.config
    # the student's 10 positions are not of four rows
    assert load_checkpoint(tmp_path / "last.ckpt", "student").encoder.config == model.student.config
