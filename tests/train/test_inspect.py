import pytest
import torch

from atst_fast import CheckpointError, inspect_checkpoint
from atst_fast.models import FrameEncoder
from atst_fast.train import checkpoint
from atst_fast.train.cli import main
from tests.integrations.layouts import (
    FRAMES,
    HYPER,
    SIZE,
    clip_system,
    distilled,
    frame_system,
    lightning,
    prefixed,
)


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def words(text):
    """A printed table without its lines and the space between its columns."""
    return " ".join("".join(" " if c in "│┃┏━┓└─┘┡┩╇┳┴├┤┼" else c for c in text).split())


def test_a_lightning_file(tmp_path, capsys):
    system = clip_system()
    path = tmp_path / "small.ckpt"
    lightning(path, prefixed("model.", system.state_dict()), HYPER | {"win_length": 640})
    assert main(["inspect", str(path)]) == 0
    text = words(capsys.readouterr().out)
    for part in (
        "layout lightning: pre-training (model.teacher.encoder.*, model.student.encoder.*)",
        f"tensors {len(system.state_dict())} with",
        "names model.teacher.encoder.*",
        "encoder ATST-Clip, ",
        "max_frames 41",
        "win_length=640",
        "heads projector (7 tensors), predictor (7 tensors)",
        "usable yes",
        "hyper_parameters.learning_rate 0.0016",
        "global_step 70",
    ):
        assert part in text, part
    assert "blocks.0.attn.qkv.weight" not in text


def test_every_tensor(tmp_path, capsys):
    torch.save(FrameEncoder(SIZE, max_frames=FRAMES).state_dict(), tmp_path / "a.pt")
    assert main(["inspect", str(tmp_path / "a.pt"), "--tensors"]) == 0
    text = words(capsys.readouterr().out)
    assert "blocks.1.attn.qkv.weight [192, 64] float32" in text
    assert "names without a prefix" in text
    assert "heads none" in text


def test_both_networks_of_a_distilled_file(tmp_path):
    torch.save(prefixed("model.", distilled().state_dict()), tmp_path / "a.pt")
    found = inspect_checkpoint(tmp_path / "a.pt")
    assert (found.layout, found.others, found.not_finite) == ("distilled", (), ())
    student, teacher = found.networks
    assert (teacher.role, teacher.method, teacher.heads) == ("teacher", "clip", {"head": 5})
    assert (student.role, student.method, student.heads) == ("student", "frame", {"linear": 5})
    assert teacher.config["use_cls"]
    assert student.parameters == sum(p.numel() for p in FrameEncoder(SIZE, max_frames=FRAMES).parameters())
    assert found.size == (tmp_path / "a.pt").stat().st_size
    assert found.dtypes["int64"] == 2


def test_what_is_wrong_is_shown_and_not_raised(tmp_path, capsys):
    state = prefixed("model.", frame_system().state_dict())
    gone = [k for k in state if k.startswith("model.teacher.encoder.blocks.1.")]
    for key in gone[1:]:
        del state[key]
    state["model.student.encoder.norm_frame.bias"][0] = float("nan")
    state["model.colour"] = torch.ones(1)
    lightning(tmp_path / "a.ckpt", state)
    assert main(["inspect", str(tmp_path / "a.ckpt")]) == 1
    text = words(capsys.readouterr().out)
    for key in gone[1:]:
        assert key in text
    assert "not finite 1: model.student.encoder.norm_frame.bias" in text
    assert "in no network 1: model.colour" in text
    assert text.count("usable no") == 2


def test_a_run_and_a_folder_of_save_pretrained(tmp_path, capsys):
    system = frame_system()
    config = {"model": system.config, "front_end": {"n_mels": 64}, "settings": {"seed": 1, "clips": list(range(99))}}
    path = checkpoint.save(tmp_path / "run", 7, system.state_dict(), {}, config, 1)
    (tmp_path / "run" / "config.json").write_text("{}")
    assert main(["inspect", str(tmp_path / "run")]) == 0
    text = words(capsys.readouterr().out)
    assert f"file {path} (" in text
    assert "layout safetensors: pre-training by atst-fast" in text
    assert "settings.seed 1" in text
    assert "..." in text
    system.student.encoder.save_pretrained(tmp_path / "folder")
    assert main(["inspect", str(tmp_path / "folder")]) == 0
    assert "layout pretrained: folder of save_pretrained" in words(capsys.readouterr().out)


def test_the_number_of_heads(tmp_path, capsys):
    torch.save(FrameEncoder({"dim": 24, "depth": 1, "num_heads": 3}).state_dict(), tmp_path / "a.pt")
    assert main(["inspect", str(tmp_path / "a.pt")]) == 1
    assert "give num_heads" in words(capsys.readouterr().out)
    assert main(["inspect", str(tmp_path / "a.pt"), "--num-heads", "3"]) == 0
    assert "arch {'dim': 24, 'depth': 1, 'num_heads': 3}" in words(capsys.readouterr().out)


def test_files_without_an_encoder(tmp_path, capsys):
    torch.save({"fc.weight": torch.ones(3, 2)}, tmp_path / "a.pt")
    assert main(["inspect", str(tmp_path / "a.pt"), "--tensors"]) == 1
    text = words(capsys.readouterr().out)
    assert "holds no encoder: none of its 1 tensors (fc.weight) is blocks.*.norm1.weight" in text
    assert "fc.weight [3, 2] float32" in text
    found = inspect_checkpoint(tmp_path / "a.pt")
    assert (found.layout, found.networks, found.others) == ("", [], ("fc.weight",))


def test_files_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "a.pt").write_text("no checkpoint, but a text")
    with pytest.raises(CheckpointError, match=r"a\.pt is damaged"):
        inspect_checkpoint(tmp_path / "a.pt")
    assert main(["inspect", str(tmp_path / "a.pt")]) == 2
    assert capsys.readouterr().err.startswith(f"atst-fast inspect: {tmp_path}/a.pt is damaged")
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: No such file" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["inspect", str(tmp_path / "empty")]) == 2
    assert "no checkpoint in" in capsys.readouterr().err


@pytest.mark.parametrize("size, text", [(12, "12 bytes"), (41_270, "41.3 kB"), (411e6, "411.0 MB"), (1.4e9, "1.40 GB")])
def test_sizes(size, text):
    from atst_fast.train.inspect import _bytes

    assert _bytes(size) == text
