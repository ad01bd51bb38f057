"""The roles of the layers of a pre-norm transformer block, found by their kinds, shapes and order."""

import inspect
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import nn

from atst_fast.integrations.accelerate_probe import hooked

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
_SCALES = ("scale", "scaling", "softmax_scale")
_LENGTHS = ("length", "lengths")


class Unknown(Exception):
    """A part that looks like one of a kind but is not used as such; says why."""


class Call(NamedTuple):
    """How a forward is called: the ``names`` of its parameters, which of them is the number of valid tokens."""

    names: tuple[str, ...]
    length: str | None

    @classmethod
    def of(cls, module: nn.Module) -> "Call":
        """Of the module's forward: every parameter but the first and the length must have None or False as default, or
        be one that can be left out so."""
        names: list[str] = []
        length = None
        for p in list(inspect.signature(type(module).forward).parameters.values())[1:]:
            if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
                continue
            if names and p.name in _LENGTHS:
                length = p.name
            elif names and p.default is not None and p.default is not False and p.default is not p.empty:
                raise Unknown(f"its forward takes {p.name}={p.default!r}")
            elif names and p.default is p.empty and "mask" not in p.name:
                raise Unknown(f"its forward needs {p.name}")
            names.append(p.name)
        if not names:
            raise Unknown("its forward takes no tensor")
        return cls(tuple(names), length)

    def bind(self, args: tuple, kwargs: dict) -> dict | None:
        """The arguments that say something, by name; None if there are more than the forward has."""
        if len(args) > len(self.names):
            return None
        given = dict(zip(self.names, args)) | kwargs
        return {name: value for name, value in given.items() if value is not None and value is not False}


class Roles(NamedTuple):
    """Dotted names within a block, or within an attention module, of what does what."""

    dim: int
    qkv: tuple[str, ...]  # one layer, or those of queries, keys and values
    owner: str  # who knows the number of heads
    heads: str  # under which name
    scale: str | None
    proj: str
    norm1: str
    norm2: str
    fc1: str
    act: str | None  # None: a function, the exact GELU
    gelu: bool  # whether it is the exact GELU
    fc2: str
    drops: tuple[str, ...]  # the stochastic depth of both branches
    dropouts: tuple[str, ...]
    watched: tuple[tuple[str, type[nn.Module]], ...]  # modules that are not called as they were: none may have a hook


def at(module: nn.Module, path: str) -> Any:
    """The module of that dotted name; "" is ``module`` itself."""
    for name in path.split(".") if path else ():
        module = getattr(module, name)
    return module


class _Leaves:
    """The layers below a module by kind, in order of registration."""

    def __init__(self, module: nn.Module):
        self.linears: list[tuple[str, nn.Module]] = []
        self.norms: list[tuple[str, nn.LayerNorm]] = []
        self.acts: list[tuple[str, nn.Module]] = []
        self.drops: list[str] = []
        self.dropouts: list[tuple[str, nn.Dropout]] = []
        self.containers: list[str] = []
        self.identities: list[str] = []
        self._visit("", module)

    def _visit(self, path: str, module: nn.Module) -> None:
        for name, child in module.named_children():
            where = f"{path}.{name}" if path else name
            own = [*child._parameters, *child._buffers]
            if isinstance(getattr(child, "in_features", None), int) and hasattr(child, "out_features"):
                self.linears.append((where, child))
            elif isinstance(child, nn.LayerNorm):
                self.norms.append((where, child))
            elif isinstance(child, nn.Dropout):
                self.dropouts.append((where, child))
            elif isinstance(child, nn.Identity):
                self.identities.append(where)
            elif own:
                _refuse(where, child, f"with {own[0]} of its own")
            elif list(child.children()):
                self.containers.append(where)
                self._visit(where, child)
            elif hasattr(child, "drop_prob"):
                self.drops.append(where)
            else:
                self.acts.append((where, child))

    @property
    def watched(self) -> list[str]:
        """What does nothing by itself, or is called with something else: whether it is still that must be looked at."""
        return [*self.containers, *self.identities, *self.drops, *(path for path, _ in self.dropouts)]


def _refuse(where: str, child: nn.Module, what: str = "") -> NoReturn:
    raise Unknown(f"{where} is {type(child).__name__} {what}".rstrip())


def looks_like_block(module: nn.Module) -> bool:
    """Two LayerNorms and, further down, four linear layers: worth saying why it is none."""
    norms = [c for c in module.children() if isinstance(c, nn.LayerNorm)]
    return len(norms) == 2 and sum(hasattr(c, "in_features") for c in module.modules()) >= 4


def looks_like_attention(module: nn.Module) -> bool:
    """A layer for queries, keys and values, and a number of heads."""
    names = {name for name, child in module.named_children() if hasattr(child, "in_features")}
    return any(isinstance(getattr(module, h, None), int) for h in _HEADS) and (
        "qkv" in names or {"q", "k", "v"} <= {name[0] for name in names}
    )


def block_roles(module: nn.Module) -> Roles:
    """Of a block; `Unknown` where it is another kind of one."""
    if own := [*module._parameters, *module._buffers]:
        raise Unknown(f"it has {own[0]} of its own")
    leaves = _Leaves(module)
    if [path for path, _ in leaves.norms if "." in path]:
        raise Unknown("it has norms within attention or MLP")
    dim = leaves.norms[0][1].normalized_shape[-1]
    qkv, others = _queries(leaves.linears, dim)
    shapes = [_shape(linear) for _, linear in others]
    if len(others) != 3 or shapes[0] != (dim, dim) or shapes[1] != (dim, shapes[2][0]) or shapes[2][1] != dim:
        raise Unknown(f"after queries, keys and values its linear layers are {shapes}")
    if len(leaves.acts) > 1:
        _refuse(*leaves.acts[1], "and one activation is expected")
    act = leaves.acts[0] if leaves.acts else None
    _check_drops(leaves)
    (proj, fc1, fc2), (norm1, norm2) = [p for p, _ in others], [p for p, _ in leaves.norms]
    gelu = act is None or _is_gelu(act[1])
    watched = leaves.watched + ([act[0]] if act and gelu else [])
    return Roles(
        dim, qkv, *_heads(module, qkv, dim), proj, norm1, norm2, fc1, act and act[0], gelu, fc2,
        _twice(leaves.drops), tuple(p for p, _ in leaves.dropouts), _kinds(module, watched),
    )  # fmt: skip


def attention_roles(module: nn.Module) -> Roles:
    """Of an attention module, with an output layer or without one (``proj`` is "" then)."""
    if own := [*module._parameters, *module._buffers]:
        raise Unknown(f"it has {own[0]} of its own")
    leaves = _Leaves(module)
    for where, child in [*leaves.norms, *leaves.acts]:
        _refuse(where, child)
    if leaves.drops or leaves.containers:
        raise Unknown(f"it has {(leaves.drops + leaves.containers)[0]}")
    dim = _shape(leaves.linears[0][1])[0]
    qkv, others = _queries(leaves.linears, dim)
    if len(others) > 1 or (others and _shape(others[0][1]) != (dim, dim)):
        raise Unknown(f"it has {others[-1][0]} after queries, keys and values")
    _check_drops(leaves)
    proj = others[0][0] if others else ""
    dropouts = tuple(p for p, _ in leaves.dropouts)
    watched = _kinds(module, leaves.watched)
    return Roles(dim, qkv, *_heads(module, qkv, dim), proj, "", "", "", None, False, "", (), dropouts, watched)


def _kinds(module: nn.Module, paths: list[str]) -> tuple[tuple[str, type[nn.Module]], ...]:
    return tuple((path, type(at(module, path))) for path in paths)


def changed(module: nn.Module, roles: Roles) -> str | None:
    """The first of the watched modules that has a hook or a forward of its own, or is another kind than it was."""
    child: Any
    for path, kind in roles.watched:
        try:
            child = at(module, path)
        except AttributeError:
            return path
        if type(child) is not kind or hooked(child):
            return path
    return None


def _shape(linear: nn.Module) -> tuple[int, int]:
    return int(linear.in_features), int(linear.out_features)  # type: ignore[arg-type]


def _queries(linears: list[tuple[str, nn.Module]], dim: int) -> tuple[tuple[str, ...], list[tuple[str, nn.Module]]]:
    """The layers of queries, keys and values, and those that follow."""
    if linears and _shape(linears[0][1]) == (dim, 3 * dim):
        return (linears[0][0],), linears[1:]
    first = {path.rsplit(".", 1)[-1][0]: path for path, _ in linears[:3]}
    if set(first) != {"q", "k", "v"} or any(_shape(linear) != (dim, dim) for _, linear in linears[:3]):
        raise Unknown(f"its first linear layers are {[(p, *_shape(x)) for p, x in linears[:3]]}, not q, k and v")
    return tuple(first[name] for name in "qkv"), linears[3:]


def _heads(module: nn.Module, qkv: tuple[str, ...], dim: int) -> tuple[str, str, str | None]:
    """Who knows the number of heads, and under which names it and the scale are known there."""
    path = qkv[0].rpartition(".")[0]
    owner = at(module, path)
    heads = next((name for name in _HEADS if isinstance(getattr(owner, name, None), int)), None)
    if heads is None or getattr(owner, heads) < 1 or dim % getattr(owner, heads):
        raise Unknown(f"{path or 'it'} does not say how many heads it has")
    scale = next((name for name in _SCALES if isinstance(getattr(owner, name, None), (int, float))), None)
    return path, heads, scale


def _check_drops(leaves: _Leaves) -> None:
    for path, dropout in leaves.dropouts:
        if dropout.p > 0:
            raise Unknown(f"{path} drops out {dropout.p:g} of its input in training")
    if len(leaves.drops) > 2:
        raise Unknown(f"it has {len(leaves.drops)} modules of stochastic depth")


def _twice(drops: list[str]) -> tuple[str, ...]:
    """Those of attention and MLP: one module may serve both."""
    return tuple(drops * 2 if len(drops) == 1 else drops)


def _is_gelu(act: nn.Module) -> bool:
    if type(act) is nn.GELU:
        return act.approximate == "none"
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    try:
        with torch.no_grad():
            return bool(torch.allclose(act(x), F.gelu(x), rtol=0, atol=1e-12))
    except Exception:
        return False
