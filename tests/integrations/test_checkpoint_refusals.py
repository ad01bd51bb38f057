"""Every tensor that is wrong is listed, by the name that it has in the file; and what is no checkpoint is no error of
Python's."""

import argparse
import os
import pathlib

import pytest
import torch

from atst_fast import CheckpointError, inspect_checkpoint, load_checkpoint
from atst_fast.models import ATSTClip
from tests.integrations.layouts import HYPER, SIZE, lightning, prefixed

save_file = pytest.importorskip("safetensors.torch", reason="needs the extra train").save_file


def test_missing(bare):
    path = bare(lambda s: [s.pop(k) for k in ("pos_embed", "blocks.1.attn.qkv.weight", "norm_frame.bias")])
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path)
    assert str(error.value) == (
        f"{path}: it (FrameEncoder of width 64, 2 blocks): "
        "3 missing: pos_embed, blocks.1.attn.qkv.weight, norm_frame.bias"
    )
    assert error.value.missing == ("pos_embed", "blocks.1.attn.qkv.weight", "norm_frame.bias")


def test_a_missing_block(bare):
    path = bare(lambda s: s.update({k.replace("blocks.1.", "blocks.3."): v for k, v in s.items() if ".1." in k}))
    with pytest.raises(CheckpointError, match=r"11 missing: blocks\.2\.norm1\.weight, .* and 6 more") as error:
        load_checkpoint(path)
    assert len(error.value.missing) == 11


def test_extra(bare):
    path = bare(lambda s: s.update(prompt_embed=torch.zeros(1, 2, 64)))
    with pytest.raises(CheckpointError, match=r"1 extra: prompt_embed$") as error:
        load_checkpoint(path)
    assert error.value.extra == ("prompt_embed",)


@pytest.mark.parametrize("only", ["", "teacher."])
@pytest.mark.parametrize("key", ["model.teacher.colour", "model.colour", "colour"])
def test_extra_outside_of_the_encoder(system, tmp_path, key, only):
    state = {k: v for k, v in system.state_dict().items() if k.startswith(only)}
    state = prefixed("model.", state) | {key: torch.zeros(2)}
    lightning(tmp_path / "a.ckpt", state)
    with pytest.raises(CheckpointError, match=f"the teacher .*: 1 extra: {key}$"):
        load_checkpoint(tmp_path / "a.ckpt")


def test_a_frame_encoder_with_another_norm_is_no_clip_encoder(bare):
    path = bare(lambda s: s.update({"norm.weight": torch.ones(64)}))
    with pytest.raises(CheckpointError, match=r"it \(FrameEncoder .*\): 1 extra: norm\.weight$"):
        load_checkpoint(path)


def test_an_encoder_below_another_is_its_own(bare):
    path = bare(lambda s: s.update({f"old.{k}": v for k, v in s.items()}))
    with pytest.raises(CheckpointError, match=r"which='teacher' finds 2 encoders .* which holds: '', 'old\.'"):
        load_checkpoint(path)
    first, second = inspect_checkpoint(path).networks
    assert first.parameters == second.parameters
    assert first.fault is None


def test_misshapen(bare):
    def change(state):
        state["blocks.0.mlp.fc2.bias"] = torch.zeros(3)
        state["norm_frame.weight"] = torch.zeros(64, dtype=torch.int64)
        state["pos_embed"] = torch.zeros(1, 11, 32)

    with pytest.raises(CheckpointError) as error:
        load_checkpoint(bare(change))
    assert str(error.value).endswith(
        "3 misshapen: pos_embed [1, 11, 32], expected [1, 11, 64], blocks.0.mlp.fc2.bias [3], expected [64], "
        "norm_frame.weight int64, expected float32"
    )
    assert error.value.misshapen == ("pos_embed", "blocks.0.mlp.fc2.bias", "norm_frame.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(bare, value):
    path = bare(lambda s: s["blocks.0.norm1.bias"].__setitem__(3, value))
    with pytest.raises(CheckpointError, match=r"1 not finite: blocks\.0\.norm1\.bias$") as error:
        load_checkpoint(path)
    assert error.value.not_finite == ("blocks.0.norm1.bias",)


def test_not_finite_in_the_encoders_dtype(bare):
    """A number that float32 does not reach."""
    path = bare(lambda s: s.update({"norm_frame.bias": torch.full((64,), 1e300, dtype=torch.float64)}))
    with pytest.raises(CheckpointError, match=r"1 not finite: norm_frame\.bias$"):
        load_checkpoint(path)


def test_tensors_without_values(bare):
    path = bare(lambda s: s.update({"mask_embed": torch.empty(1, 1, 64, device="meta")}))
    with pytest.raises(CheckpointError, match=r"1 not finite: mask_embed$"):
        load_checkpoint(path)


def test_a_block_of_an_absurd_number(bare):
    """It is not built to find out that the others are missing."""
    path = bare(lambda s: s.update({"blocks.20000.norm1.weight": torch.ones(64)}))
    with pytest.raises(CheckpointError, match=r"1 extra: blocks\.20000\.norm1\.weight$"):
        load_checkpoint(path)


def test_what_only_the_other_network_has_is_missing(system, tmp_path):
    """A last block, or a class token, that the teacher lacks does not make it a smaller one of another kind."""
    prefix = "model.teacher.encoder."
    last = f"{prefix}blocks.{len(system.teacher.encoder.blocks) - 1}."
    state = {k: v for k, v in prefixed("model.", system.state_dict()).items() if not k.startswith(last)}
    lightning(tmp_path / "a.ckpt", state)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path / "a.ckpt")
    assert error.value.missing
    assert all(k.startswith(last) for k in error.value.missing)
    load_checkpoint(tmp_path / "a.ckpt", "student")
    clip = ATSTClip({"dim": 64, "depth": 1, "num_heads": 1}, hidden=8, out=4, max_frames=41)
    state = prefixed("model.", clip.state_dict())
    del state[prefix + "cls_token"]
    lightning(tmp_path / "b.ckpt", state)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path / "b.ckpt")
    assert error.value.missing == (prefix + "cls_token",)


@pytest.mark.parametrize("block", [0, 1])
def test_the_first_norm_of_a_block(system, tmp_path, block):
    """What encoders are found by may be what is missing."""
    state = prefixed("model.", system.state_dict())
    name = f"model.teacher.encoder.blocks.{block}.norm1.weight"
    del state[name]
    lightning(tmp_path / "a.ckpt", state)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path / "a.ckpt")
    assert error.value.missing == (name,)


def test_heads_that_are_not_finite(system, tmp_path):
    with torch.no_grad():
        system.teacher.projector[1].running_var[0] = float("nan")
    lightning(tmp_path / "a.ckpt", prefixed("model.", system.state_dict()))
    with pytest.raises(CheckpointError, match=r"its heads: 1 not finite: model\.teacher\.projector\.1\.running_var"):
        load_checkpoint(tmp_path / "a.ckpt")
    load_checkpoint(tmp_path / "a.ckpt", "student")


def test_all_kinds_at_once_and_under_their_full_names(system, tmp_path):
    state = prefixed("model.", system.state_dict())
    prefix = "model.teacher.encoder."
    del state[prefix + "mask_embed"]
    state[prefix + "colour"] = torch.zeros(1)
    state[prefix + "norm_frame.bias"] = torch.full((5,), float("nan"))
    lightning(tmp_path / "a.ckpt", state)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path / "a.ckpt")
    e = error.value
    assert (e.missing, e.extra) == ((prefix + "mask_embed",), (prefix + "colour",))
    assert e.misshapen == e.not_finite == (prefix + "norm_frame.bias",)
    again = e.__reduce__()[0](*e.__reduce__()[1])
    assert (str(again), again.missing, again.not_finite) == (str(e), e.missing, e.not_finite)


def test_no_encoder(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt holds no encoder: none of its 1 tensors \(a\) is blocks"):
        load_checkpoint(tmp_path / "a.pt")
    torch.save({"a": 3}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt holds no encoder: it has no tensors"):
        load_checkpoint(tmp_path / "a.pt")


def test_a_network_that_the_file_lacks(system, tmp_path):
    lightning(tmp_path / "a.ckpt", prefixed("model.teacher.", system.teacher.state_dict()))
    with pytest.raises(CheckpointError, match=r"which='student' finds 0 encoders .* which holds: teacher"):
        load_checkpoint(tmp_path / "a.ckpt", "student")
    state = system.teacher.encoder.state_dict()
    torch.save(prefixed("a.", state) | prefixed("b.", state), tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match=r"which='teacher' finds 2 encoders .* which holds: 'a\.', 'b\.'"):
        load_checkpoint(tmp_path / "b.pt")


@pytest.mark.parametrize("value", [os.system, pathlib.PurePosixPath("x"), argparse.Namespace(f=os.system)])
def test_code(system, tmp_path, value):
    torch.save({"state_dict": system.state_dict(), "hyper_parameters": {"a": value}}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"is refused: it holds objects \(\w+\.\w+\), and to load them would"):
        load_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_damaged_files(system, tmp_path, share, kind):
    state, path = system.teacher.encoder.state_dict(), tmp_path / "a.bin"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"a\.bin is damaged"):
        load_checkpoint(path)


def test_files_that_are_none(tmp_path):
    (tmp_path / "a.txt").write_text("a text that is no checkpoint at all")
    with pytest.raises(CheckpointError, match=r"a\.txt is damaged or was written neither by torch\.save nor"):
        load_checkpoint(tmp_path / "a.txt")
    with pytest.raises(CheckpointError, match=r"cannot read .*nowhere: No such file"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(
        CheckpointError, match=r"has no config\.json and no model\.safetensors, which save_pretrained writes"
    ):
        load_checkpoint(tmp_path)
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"list\.pt holds a list, expected a dict of tensors"):
        load_checkpoint(tmp_path / "list.pt")


@pytest.mark.parametrize(
    "text, message",
    [("[]", "is no JSON object but '\\[\\]'"), ("{", "is no JSON: "), ("[" * 10**5, "is no JSON: maximum recursion")],
)
def test_configurations_that_are_none(system, tmp_path, text, message):
    save_file(system.teacher.encoder.state_dict(), tmp_path / "a.safetensors", {"config": text})
    with pytest.raises(CheckpointError, match=rf"a\.safetensors: its configuration {message}"):
        load_checkpoint(tmp_path / "a.safetensors")


def test_sparse_tensors(bare):
    """Their indices may point anywhere in a damaged file, so that nobody may read them."""
    path = bare(lambda s: s.update({"blocks.0.mlp.fc1.weight": s["blocks.0.mlp.fc1.weight"].to_sparse()}))
    with pytest.raises(CheckpointError, match=r"fc1\.weight sparse_coo, expected strided$") as error:
        load_checkpoint(path)
    assert error.value.misshapen == ("blocks.0.mlp.fc1.weight",)


def test_complex_tensors(bare):
    path = bare(lambda s: s.update({"norm_frame.bias": s["norm_frame.bias"].to(torch.complex64)}))
    with pytest.raises(CheckpointError, match=r"norm_frame\.bias complex64, expected float32"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "model, message",
    [
        ({"arch": {**SIZE, "depth": 10**9}}, "describes no encoder .*1000000000 blocks, and 28 tensors"),
        ({"patch": [64, -4]}, "describes no encoder"),
        ({"patch": 4}, "describes no encoder"),
        ({"arch": None}, "describes no encoder"),
        ({"n_mels": "many"}, "describes no encoder"),
        ({"n_mels": 128}, "pos_embed"),
    ],
)
def test_configurations_that_describe_no_encoder(system, tmp_path, model, message):
    """Nor one that it would take forever to build."""
    encoder = system.teacher.encoder
    content = {"state_dict": encoder.state_dict(), "atst_fast": {"model": {**encoder.config, **model}}}
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=rf"a\.pt: .*{message}"):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("front_end", [3, {"n_mels": 10**9}, {"minmax": 1}, {"hop_length": "x"}, {"n_fft": 7}])
def test_front_ends_that_are_none(system, tmp_path, front_end):
    torch.save(
        {"state_dict": system.teacher.encoder.state_dict(), "atst_fast": {"front_end": front_end}},
        tmp_path / "a.pt",
    )
    with pytest.raises(CheckpointError, match=r"a\.pt: its configuration (describes no front end|contradicts)"):
        load_checkpoint(tmp_path / "a.pt")


def test_a_front_end_of_other_bands(system, tmp_path):
    own = {"front_end": {"n_mels": 128}}
    torch.save({"state_dict": system.teacher.encoder.state_dict(), "atst_fast": own}, tmp_path / "a.pt")
    message = r"its configuration contradicts itself: 64 mel bands in the encoder, 128 in the front end"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "a.pt")


def test_a_front_end_that_is_none(system, tmp_path):
    lightning(tmp_path / "a.ckpt", prefixed("model.", system.state_dict()), HYPER | {"win_length": 5000})
    with pytest.raises(CheckpointError, match=r"a\.ckpt: its configuration describes no front end .*win_length"):
        load_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize("name", ["blocks.0.mlp.fc1.weight", "head.weight"])
def test_a_tensor_that_claims_more_than_the_file_has(bare, name):
    """By strides of 0: nobody has the memory to look whether its values are finite."""
    path = bare(lambda s: s.update({name: torch.zeros(1).expand(10**6, 10**7)}))
    for read in (load_checkpoint, inspect_checkpoint):
        with pytest.raises(CheckpointError, match=rf"is damaged: {name} of shape \[1000000, 10000000\] is larger than"):
            read(path)


def test_a_configuration_that_contains_itself(system, tmp_path):
    endless = {}
    endless["a"] = endless
    torch.save({"state_dict": system.teacher.encoder.state_dict(), "args": endless}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt is damaged .*\(what it says besides its tensors has no end\)"):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("step, read", [("17", 17), ("\u00b2", None), ("9" * 5000, None)])
def test_steps_that_are_no_numbers(system, tmp_path, step, read):
    save_file(system.teacher.encoder.state_dict(), tmp_path / "a.safetensors", {"step": step})
    assert load_checkpoint(tmp_path / "a.safetensors").config.get("step") == read
