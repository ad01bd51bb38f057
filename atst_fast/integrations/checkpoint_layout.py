"""Which network a checkpoint holds where: the layouts in use, told apart by the names of their tensors."""

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from atst_fast.integrations.checkpoint_file import Content
from atst_fast.models.weights import CheckpointError

# every encoder has it in every block, under whatever prefix
_ENCODER = re.compile(r"(.*?)blocks\.\d+\.norm1\.weight")
# what DistributedDataParallel, torch.compile and Lightning put before names
_WRAPPERS = re.compile(r"(^|\.)((module|_orig_mod)\.)+")
# the last part of a prefix, which the encoder's network does not share with its heads
_OWN_PART = re.compile(r"(encoder|backbone)\.((module|_orig_mod)\.)*$")
# first parts of names beside a bare encoder that are heads, not weights that the encoder lacks
_HEADS = {"head", "linear", "projector", "predictor", "project_linear"}
# heads that a pre-trained network may have; with anything else in it the file is not what it seems
_PRETRAINED_HEADS = {"projector", "predictor", "head"}
# layouts all of whose tensors are known: what is more is refused
STRICT = ("lightning", "safetensors", "dino")

LAYOUTS = {
    "lightning": "pre-training (model.teacher.encoder.*, model.student.encoder.*)",
    "safetensors": "pre-training by atst-fast (names of the official files, in safetensors)",
    "dino": "pre-training in a dict with args (teacher: module.backbone.*)",
    "finetuned": "fine-tuned encoder and head (encoder.encoder.*)",
    "distilled": "ATST-C2F: fine-tuned teacher, distilled student (model.teacher.encoder.*, model.student.*)",
    "pretrained": "folder of save_pretrained",
    "bare": "state dict of an encoder",
}


class Network(NamedTuple):
    """One encoder of a file: ``role`` "teacher", "student" or "" where it is the only one, ``prefix`` before the names
    of its tensors, ``keys`` all of these without it, ``heads`` by their name without what the network has in common
    (name -> full name), ``extra`` full names of tensors in it that are neither."""

    role: str
    prefix: str
    keys: tuple[str, ...]
    heads: dict[str, str]
    extra: tuple[str, ...]


class Layout(NamedTuple):
    """``name`` in `LAYOUTS`, the networks, and full names of tensors outside all of them."""

    name: str
    networks: tuple[Network, ...]
    others: tuple[str, ...]

    def network(self, which: str, source: object) -> Network:
        """The only network, or the one whose role is ``which``."""
        found = [n for n in self.networks if n.role in (which, "")]
        if len(found) == 1:
            return found[0]
        roles = ", ".join(n.role or repr(n.prefix) for n in self.networks)
        raise CheckpointError(
            f"{source}: which={which!r} finds {len(found)} encoders in this file, which holds: {roles}"
        )


def recognise(content: Content, source: object) -> Layout:
    """The layout of a file's tensors. ``CheckpointError`` where there is no encoder in it."""
    prefixes = sorted({m[1] for key in content.tensors if (m := _ENCODER.fullmatch(key))})
    if not prefixes:
        raise CheckpointError(f"{source} holds no encoder: {_some_names(content.tensors)}")
    roles = {p: _role(p) for p in prefixes}
    name = _name(content, [_unwrapped(p) for p in prefixes])
    networks, claimed = [], set()
    for prefix in prefixes:
        others = [p for p in prefixes if p != prefix]
        network = _network(content.tensors, prefix, roles[prefix], others, name)
        networks.append(network)
        claimed |= {prefix + k for k in network.keys} | set(network.heads.values()) | set(network.extra)
    rest = tuple(k for k in content.tensors if k not in claimed)
    if len(networks) == 1 and name not in STRICT:
        networks[0].heads.update({k: k for k in rest})
        rest = ()
    return Layout(name, tuple(networks), rest)


def _unwrapped(prefix: str) -> str:
    """The prefix without what wrappers add: "model.teacher.encoder." and "module.model.teacher.encoder." are one."""
    return _WRAPPERS.sub(r"\1", prefix).removeprefix("model.")


def _role(prefix: str) -> str:
    parts = prefix.split(".")
    return next((role for role in ("teacher", "student") if role in parts), "")


def _name(content: Content, prefixes: list[str]) -> str:
    if any(p.endswith("backbone.") for p in prefixes):
        return "dino"
    if {"student.", "teacher.encoder."} <= set(prefixes):
        return "distilled"
    root = prefixes[0].removesuffix("encoder.")
    heads = [k for k in content.tensors if _unwrapped(k).startswith(f"{root}head.")]
    if any(p.endswith("encoder.encoder.") for p in prefixes) or (prefixes == ["encoder."] and heads):
        return "finetuned"
    if any(p in ("teacher.encoder.", "student.encoder.") for p in prefixes):
        return "safetensors" if content.container == "safetensors" else "lightning"
    return "pretrained" if content.container == "pretrained" else "bare"


def _network(tensors: Mapping[str, Tensor], prefix: str, role: str, others: list[str], layout: str) -> Network:
    # everything under the prefix is the encoder's, but for another encoder below it and heads beside a bare one
    below = tuple(o for o in others if o.startswith(prefix))
    inside = [k for k in tensors if k.startswith(prefix) and not k.startswith(below)]
    beside = {k for k in inside if layout == "bare" and k[len(prefix) :].split(".")[0] in _HEADS}
    keys = tuple(k[len(prefix) :] for k in inside if k not in beside)
    scope = _scope(prefix, layout, role)
    around = [k for k in tensors if k.startswith(scope) and k not in inside and not _in_other(k, others)]
    heads = {k[len(scope) :]: k for k in (*around, *sorted(beside))}
    if layout == "dino":  # the name that the projector had before
        heads = {re.sub(r"^head\.", "projector.", k): full for k, full in heads.items()}
    extra: tuple[str, ...] = ()
    if layout in STRICT:
        extra = tuple(full for k, full in heads.items() if k.split(".")[0] not in _PRETRAINED_HEADS)
        heads = {k: full for k, full in heads.items() if full not in extra}
    return Network(role, prefix, keys, heads, extra)


def _scope(prefix: str, layout: str, role: str) -> str:
    """What the names of a network's heads begin with."""
    if layout == "finetuned":
        return _OWN_PART.sub("", _OWN_PART.sub("", prefix))
    if layout == "distilled" and role == "student":
        return prefix.removesuffix("student.")
    return _OWN_PART.sub("", prefix)


def _in_other(key: str, others: list[str]) -> bool:
    """Whether a tensor is of another network: below its encoder, or beside it."""
    return key.startswith(tuple(_OWN_PART.sub("", o) for o in others))


def _some_names(tensors: Mapping[str, Tensor]) -> str:
    names = sorted(tensors)
    if not names:
        return "it has no tensors"
    shown = f"{', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
    return f"none of its {len(names)} tensors ({shown}) is blocks.*.norm1.weight"
