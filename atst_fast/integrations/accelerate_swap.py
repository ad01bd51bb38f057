"""Another class for one object: how a module of somebody else gets a fused forward, and its own one back.

The class of the instance is replaced by one made at run time, ``class Fused<Name>(<mixin>, <the original class>)``, as
torch's parametrisations do. Nothing is added to the object, and nothing to its class. So hooks, state dicts,
``isinstance``, ``copy.deepcopy``, pickle, ``torch.save`` of whole models and the replicas of DataParallel work as they
did, and ``torch.compile``, which guards on classes, notices.
"""

import copyreg
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:

    class _Host(nn.Module):
        """What a mixin finds in the module that it is mixed into."""

        def __getattr__(self, name: str) -> Any: ...
        def __iter__(self) -> Any: ...
        def prepare_tokens(self, *args: Any) -> Any: ...
        def update_teacher(self, m: Any) -> Any: ...

else:
    _Host = object


class Fused(_Host):
    """Base of the mixins. ``plan``: what is known about the module, hashable, a constant of its new class."""

    plan: Any = None
    original: Any = None
    mixin: Any = None

    def __reduce_ex__(self, protocol):
        # The new class cannot be found by its name; what it is made of can.
        reduced: Any = super().__reduce_ex__(max(int(protocol), 2))
        made, args, *rest = reduced
        if made is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return (made, args, *rest)
        cls = type(self)
        return (_new, (cls.original, cls.mixin, cls.plan, *args[1:]), *rest)


_made: dict[tuple, type] = {}


def fused_class(original: type, mixin: type[Fused], plan: Any) -> type:
    """The class of the modules of ``original`` that ``mixin`` runs by ``plan``: the same one each time."""
    key = (original, mixin, plan)
    if key not in _made:
        members = {"plan": plan, "original": original, "mixin": mixin, "__module__": __name__, "__doc__": mixin.__doc__}
        _made[key] = type(original)(f"Fused{original.__name__}", (mixin, original), members)
    return _made[key]


def _new(original: type, mixin: type[Fused], plan: Any, *args):
    cls = fused_class(original, mixin, plan)
    return cls.__new__(cls, *args)


def swap(module: nn.Module, mixin: type[Fused], plan: Any) -> None:
    """Give ``module`` the fused forward."""
    module.__class__ = fused_class(type(module), mixin, plan)


def obstacle(module: nn.Module) -> str | None:
    """Why the class of this module cannot be replaced, or None."""
    if "forward" in vars(module):
        return "its forward has been replaced on the instance"
    return None


def is_fused(module: nn.Module) -> bool:
    """Whether its class was made here."""
    return isinstance(module, Fused) and "original" in vars(type(module))


def unswap(module: nn.Module) -> bool:
    """Give the module its class back; whether it had been replaced. Raises RuntimeError where another library has
    replaced the class since (FSDP2, a parametrisation)."""
    if not isinstance(module, Fused):
        return False
    if not is_fused(module):
        name = type(module).__name__
        raise RuntimeError(
            f"restore: the class of a fused module was replaced again, by {name}: undo what did that first"
        )
    module.__class__ = type(module).original
    return True
