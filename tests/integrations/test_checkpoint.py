import pytest
import torch

import atst_fast
from atst_fast import CheckpointError, load_checkpoint
from atst_fast.models import FrameEncoder
from tests.integrations.layouts import (
    FRAMES,
    HYPER,
    SIZE,
    assert_same,
    dino,
    lightning,
    linear_head,
    prefixed,
)

save_file = pytest.importorskip("safetensors.torch", reason="needs the extra train").save_file
checkpoint = pytest.importorskip("atst_fast.train.checkpoint", reason="needs the extra train")


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_lightning_frame(system, tmp_path, which):
    path = tmp_path / "base.ckpt"
    lightning(path, prefixed("model.", system.state_dict()), HYPER | {"win_length": 640})
    loaded = load_checkpoint(path, which)
    network = getattr(system, which)
    assert_same(loaded.encoder.state_dict(), network.encoder.state_dict())
    heads = {k: v for k, v in network.state_dict().items() if not k.startswith("encoder.")}
    assert_same(loaded.heads, heads)
    assert ("predictor.0.weight" in loaded.heads) == (which == "student")
    assert (loaded.method, loaded.layout) == ("frame", "lightning")
    assert loaded.encoder.config == network.encoder.config
    assert loaded.front_end["win_length"] == 640
    assert loaded.front_end["minmax"] == (-79.6482, 50.6842)
    assert loaded.config["hyper_parameters"]["learning_rate"] == 1.6e-3
    assert loaded.config["global_step"] == 70


def test_the_encoder_is_ready_to_be_used(system, tmp_path):
    path = tmp_path / "base.ckpt"
    lightning(path, prefixed("model.", system.state_dict()))
    encoder = load_checkpoint(str(path)).encoder
    assert not encoder.training
    assert not any(p.requires_grad or p.is_meta for p in encoder.parameters())
    mel = torch.randn(2, 1, 64, 40)
    assert torch.equal(encoder(mel), system.teacher.encoder.eval()(mel))


def test_heads_are_no_views_of_the_file(system, tmp_path):
    both = torch.randn(10)
    arguments = {"scales": torch.arange(3), "one": torch.tensor(2)}
    state = system.teacher.encoder.state_dict() | {"head.a": both[:5], "head.b": both[5:]}
    torch.save({"state_dict": state, "hyper_parameters": arguments}, tmp_path / "a.pt")
    loaded = load_checkpoint(tmp_path / "a.pt")
    for name, want in (("head.a", both[:5]), ("head.b", both[5:])):
        assert torch.equal(loaded.heads[name], want)
        assert loaded.heads[name].untyped_storage().nbytes() == 5 * 4
    assert loaded.config["hyper_parameters"] == {"scales": "tensor([0, 1, 2])", "one": 2}
    assert atst_fast.inspect_checkpoint(tmp_path / "a.pt").container == "lightning"


def test_one_patch_of_frames(bare):
    encoder = load_checkpoint(bare(), pos_embed="cut", max_frames=4).encoder
    assert (encoder.max_frames, encoder.pos_embed.shape[1]) == (4, 2)


def test_weights_lie_in_memory_as_those_of_a_new_encoder(bare):
    """A file keeps the strides of what it was written from."""

    def transpose(state):
        state["blocks.0.mlp.fc1.weight"] = state["blocks.0.mlp.fc1.weight"].t().contiguous().t()

    path = bare(transpose)
    assert not torch.load(path)["blocks.0.mlp.fc1.weight"].is_contiguous()
    assert all(p.is_contiguous() for p in load_checkpoint(path).encoder.parameters())


def test_encoders_that_were_compiled_alone(system, tmp_path):
    """``torch.compile(student.encoder)`` inside of a module: the heads keep their names."""
    state = prefixed("model.", system.state_dict())
    lightning(tmp_path / "a.ckpt", {k.replace("encoder.", "encoder._orig_mod."): v for k, v in state.items()})
    loaded = load_checkpoint(tmp_path / "a.ckpt")
    assert_same(loaded.encoder.state_dict(), system.teacher.encoder.state_dict())
    assert_same(loaded.heads, prefixed("projector.", system.teacher.projector.state_dict()))
    encoder, head = system.teacher.encoder, linear_head(SIZE["dim"])
    torch.save(prefixed("encoder.encoder._orig_mod.", encoder.state_dict()) | head, tmp_path / "b.ckpt")
    assert_same(load_checkpoint(tmp_path / "b.ckpt").heads, head)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "encoder.", "model.teacher.encoder.", "module.model.teacher.encoder."]
)
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_bare_state_dicts(system, tmp_path, prefix, wrapper):
    state = prefixed(prefix, system.teacher.encoder.state_dict())
    torch.save({wrapper: state} if wrapper else state, tmp_path / "weights.pt")
    loaded = load_checkpoint(tmp_path / "weights.pt")
    assert_same(loaded.encoder.state_dict(), system.teacher.encoder.state_dict())
    assert loaded.encoder.config == system.teacher.encoder.config
    assert loaded.layout == ("lightning" if "teacher" in prefix else "bare")
    assert (loaded.heads, loaded.config) == ({}, {})
    assert loaded.front_end == {
        "sample_rate": 16000,
        "n_fft": 1024,
        "win_length": 1024,
        "hop_length": 160,
        "f_min": 60.0,
        "f_max": 7800.0,
        "n_mels": 64,
        "top_db": 80.0,
        "minmax": (-79.6482, 50.6842),
    }


def test_a_bare_safetensors_file(system, tmp_path):
    save_file(system.student.encoder.state_dict(), tmp_path / "a.safetensors")
    loaded = load_checkpoint(tmp_path / "a.safetensors")
    assert_same(loaded.encoder.state_dict(), system.student.encoder.state_dict())
    assert loaded.layout == "bare"


def test_files_before_torch_wrote_zip_archives(system, tmp_path):
    state = system.teacher.encoder.state_dict()
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same(load_checkpoint(tmp_path / "old.pt").encoder.state_dict(), state)


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_a_run_of_pretrain(system, tmp_path, which):
    config = {"model": system.config, "front_end": {"n_mels": 64, "win_length": 800}, "settings": {"seed": 1}}
    path = checkpoint.save(tmp_path, 7, system.state_dict(), {}, config, 1)
    loaded = load_checkpoint(path, which)
    assert_same(loaded.encoder.state_dict(), getattr(system, which).encoder.state_dict())
    assert loaded.encoder.config == system.student.encoder.config
    assert (loaded.layout, loaded.config["settings"], loaded.config["step"]) == ("safetensors", {"seed": 1}, 7)
    assert loaded.front_end["win_length"] == 800
    assert loaded.heads.keys() >= {"projector.0.weight", "projector.1.running_mean"}


def test_dino_of_frame(system, tmp_path):
    networks = {
        name: (net.encoder.state_dict(), net.projector.state_dict())
        for name, net in (("teacher", system.teacher), ("student", system.student))
    }
    dino(tmp_path / "base.ckpt", networks, arch="ast_base")
    for which in networks:
        loaded = load_checkpoint(tmp_path / "base.ckpt", which)
        assert_same(loaded.encoder.state_dict(), networks[which][0])
        assert_same(loaded.heads, prefixed("projector.", networks[which][1]))
        assert loaded.layout == "dino"
        assert loaded.config["args"]["anchor_len"] == [6.0, 6.0]


def test_fine_tuned_frame(system, tmp_path):
    head = linear_head(SIZE["dim"])
    lightning(tmp_path / "last.ckpt", prefixed("encoder.encoder.", system.teacher.encoder.state_dict()) | head, {})
    for which in ("teacher", "student"):  # there is only one
        loaded = load_checkpoint(tmp_path / "last.ckpt", which)
        assert_same(loaded.encoder.state_dict(), system.teacher.encoder.state_dict())
        assert_same(loaded.heads, head)
        assert loaded.layout == "finetuned"


def test_a_bare_encoder_with_a_head_beside_it(system, tmp_path):
    head = linear_head(SIZE["dim"])
    torch.save(system.teacher.encoder.state_dict() | head, tmp_path / "a.pt")
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert_same(loaded.heads, head)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"patch_embed": "CNN"}, {}),
        ({"qkv_bias": True, "mlp_ratio": 2.0}, {}),
        ({"n_mels": 128, "patch": (128, 4)}, {}),
        ({"n_mels": 128, "patch": (64, 4)}, {"n_mels": 128}),
        ({"n_mels": 80, "patch": (16, 16), "patch_embed": "CNN"}, {"n_mels": 80}),
        ({"n_mels": 64, "patch": (64, 2)}, {"patch_w": 2}),
        ({"max_frames": 43}, {"spec_w": 43}),
        ({}, {"spec_w": 1001}),  # of the input, and not what the positions are for
        ({"pos_type": "interpolate"}, {"pos_type": "interpolate"}),
        ({"drop_path_rate": 0.2}, {"drop_path_rate": 0.2}),
    ],
)
def test_the_architecture_is_inferred(tmp_path, options, said):
    encoder = FrameEncoder(SIZE, **({"max_frames": 4 * 16 + 1} | options))
    expected = encoder.config
    lightning(tmp_path / "a.ckpt", prefixed("model.teacher.encoder.", encoder.state_dict()), said)
    loaded = load_checkpoint(tmp_path / "a.ckpt")
    assert loaded.encoder.config == expected
    assert loaded.front_end["n_mels"] == expected["n_mels"]
    assert_same(loaded.encoder.state_dict(), encoder.state_dict())


@pytest.mark.parametrize("arch", ["tiny", "small"])
def test_published_sizes_are_named(tmp_path, arch):
    torch.save(FrameEncoder(arch).state_dict(), tmp_path / "a.pt")
    loaded = load_checkpoint(tmp_path / "a.pt")
    assert loaded.encoder.config == FrameEncoder(arch).config


def test_heads_of_another_width(tmp_path):
    encoder = FrameEncoder({"dim": 48, "depth": 1, "num_heads": 3}, max_frames=FRAMES)
    torch.save(encoder.state_dict(), tmp_path / "a.pt")
    with pytest.raises(
        CheckpointError, match=r"a\.pt: no tensor shows the number of heads, .* 48 is no multiple of 64"
    ):
        load_checkpoint(tmp_path / "a.pt")
    assert load_checkpoint(tmp_path / "a.pt", num_heads=3).encoder.config == encoder.config
    with pytest.raises(CheckpointError, match=r"its configuration describes no encoder .*num_heads"):
        load_checkpoint(tmp_path / "a.pt", num_heads=5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
def test_other_precisions_become_float32(bare, dtype):
    loaded = load_checkpoint(bare(lambda s: s.update({k: v.to(dtype) for k, v in s.items()})))
    assert {p.dtype for p in loaded.encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"which": "both"}, "load_checkpoint: which must be one of teacher, student, got 'both'"),
        ({"pos_embed": "stretch"}, "pos_embed must be one of exact, cut, interpolate, got 'stretch'"),
        ({"pos_embed": "cut"}, "max_frames must be given with pos_embed='cut'"),
        ({"max_frames": 0}, "max_frames must be at least 1, or None, got int 0"),
        ({"max_frames": 3, "pos_embed": "cut"}, "max_frames must be at least 4, the frames of a patch, got 3"),
        ({"num_heads": 1.5}, "num_heads must be at least 1, or None, got float 1.5"),
        ({"num_heads": True}, "num_heads must be at least 1, or None, got bool True"),
    ],
)
def test_wrong_arguments(bare, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_checkpoint(bare(), **arguments)


class TestPositions:
    def test_cut(self, bare, system):
        loaded = load_checkpoint(bare(), pos_embed="cut", max_frames=21)
        assert torch.equal(loaded.encoder.pos_embed, system.teacher.encoder.pos_embed[:, :6])
        assert loaded.encoder.max_frames == 21
        mel = torch.randn(1, 1, 64, 20)
        assert torch.equal(loaded.encoder(mel), system.teacher.encoder.eval()(mel))

    @pytest.mark.parametrize("frames", [17, 60, 83])
    def test_interpolate(self, bare, system, frames):
        """As the encoder itself does for an input of that length (and it leaves the sampling points' shift in)."""
        loaded = load_checkpoint(bare(), pos_embed="interpolate", max_frames=frames)
        assert loaded.encoder.pos_type == "cut"
        same = FrameEncoder(SIZE, max_frames=FRAMES, pos_type="interpolate").eval()
        same.load_state_dict(system.teacher.encoder.state_dict())
        mel = torch.randn(1, 1, 64, frames)
        assert torch.equal(loaded.encoder(mel), same(mel))
        assert torch.equal(loaded.encoder.pos_embed[:, 0], system.teacher.encoder.pos_embed[:, 0])

    def test_the_same_number_of_tokens_changes_nothing(self, bare, system):
        for how in ("exact", "cut", "interpolate"):
            loaded = load_checkpoint(bare(), pos_embed=how, max_frames=43)
            assert torch.equal(loaded.encoder.pos_embed, system.teacher.encoder.pos_embed)
            assert loaded.encoder.max_frames == 43

    def test_only_on_request(self, bare):
        with pytest.raises(
            CheckpointError, match=r"positions for 41 frames, max_frames is 61: choose pos_embed='cut' or"
        ):
            load_checkpoint(bare(), max_frames=61)
        with pytest.raises(
            CheckpointError, match="for 41 frames, too few to be cut to 61: use pos_embed='interpolate'"
        ):
            load_checkpoint(bare(), pos_embed="cut", max_frames=61)


def test_without_safetensors(bare, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    load_checkpoint(bare())
    (tmp_path / "a.safetensors").write_bytes(b"\0" * 8 + b"{" + b" " * 20)
    with pytest.raises(ImportError, match=r"pip install 'atst_fast\[train\]'"):
        load_checkpoint(tmp_path / "a.safetensors")


def test_it_is_a_part_of_the_package():
    assert {"load_checkpoint", "Checkpoint", "CheckpointError"} <= set(dir(atst_fast)) | set(atst_fast.__all__)
    assert atst_fast.load_checkpoint is load_checkpoint
    assert issubclass(CheckpointError, ValueError)
