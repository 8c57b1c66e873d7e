"""The Variables of a model that ``nnx.Optimizer`` hands on without them.

It strips its keyword arguments: every Variable becomes the array in it, and one that stands in two
places becomes two arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from types import FunctionType
from typing import Any

from flax import nnx

from natgrad_flax.signals.plan import check_model
from natgrad_flax.signals.recording import Path, dotted, owner_of, place

_WAY_OUT = (
    "nnx.Optimizer takes the Variables off a model that it hands on: pass module=lambda: model, "
    "which it leaves alone"
)
_KINDS: dict[tuple[type, str], type[nnx.Variable]] = {
    (nnx.RngStream, "key"): nnx.RngKey,
    (nnx.RngStream, "count"): nnx.RngCount,
    (nnx.BatchNorm, "mean"): nnx.BatchStat,
    (nnx.BatchNorm, "var"): nnx.BatchStat,
}


def whole_model(
    module: nnx.Module | Callable[[], nnx.Module], params: Collection[Path], wrt: Any
) -> tuple[nnx.Module, str]:
    """A model with its Variables, and what to add to an error where some may be missing.

    Of a stripped one the parameters become Variables again, and all that the layers of Flax hold.
    What a user's own module holds stays an array: it may have been one.

    Args:
      module: the model, stripped or not, or a function that returns it.
      params: paths of the parameters that move.
      wrt: filter of the parameters.

    Raises:
      TypeError: no model.
      ValueError: a stripped model without these parameters, or one in which another array may be
        tied to one of them.
    """
    model: Any = module() if isinstance(module, FunctionType) else module
    check_model(model)
    graphdef, state = nnx.split(model)
    flat = {tuple(path): leaf for path, leaf in nnx.to_flat_state(state)}
    if any(isinstance(leaf, nnx.Variable) for leaf in flat.values()):
        return model, ""
    for path in params:
        if path not in flat:
            raise ValueError(
                f"the updates move {dotted(path)}, which {type(model).__name__} does not have: "
                "module= must be the model that the optimizer was made for"
            )
    copy: Any = nnx.merge(graphdef, state, copy=True)
    moved = {id(flat[path]): path for path in params}
    kind = wrt if isinstance(wrt, type) and issubclass(wrt, nnx.Variable) else nnx.Param
    doubt = ""
    for path, leaf in flat.items():
        if path in params:
            place(copy, path, kind(leaf))
        elif id(leaf) in moved:
            raise ValueError(
                f"{dotted(path)} and {dotted(moved[id(leaf)])} are the same array, and whether "
                f"they are tied can no longer be seen. {_WAY_OUT}"
            )
        elif (other := _kind(owner_of(copy, path), path[-1])) is not None:
            place(copy, path, other(leaf))
        else:
            doubt = _WAY_OUT
    return copy, doubt


def _kind(owner: Any, name: Any) -> type[nnx.Variable] | None:
    """What a layer of Flax keeps its arrays in; None for containers and the modules of others."""
    if not type(owner).__module__.startswith("flax.nnx") or isinstance(owner, nnx.List | nnx.Dict):
        return None
    for (kind, attribute), variable in _KINDS.items():
        if isinstance(owner, kind) and name == attribute:
            return variable
    return nnx.Variable
