"""Models as they are run: their outputs, and what stands at a path of them."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from natgrad_flax.arguments.arrays import batch_size, described
from natgrad_flax.losses import Heads
from natgrad_flax.models.layers import Conv, Dense
from natgrad_flax.signals.program import Path
from natgrad_flax.xla.convolution import conv_general_dilated


def dotted(path: Path) -> str:
    """A path in words."""
    return ".".join(map(str, path)) or "the root"


def with_fast_gradients(model: nnx.Module) -> nnx.Module:
    """A model whose layers are its own, changed so that gradients of convolutions are fast."""
    for _, layer in nnx.iter_modules(model):
        if not isinstance(layer, Conv | nnx.Conv):
            continue
        if layer.conv_general_dilated is lax.conv_general_dilated:
            layer.conv_general_dilated = conv_general_dilated
    return model


def put(copy: nnx.Module, values: dict[Path, Array]) -> None:
    """Sets variables of a copy."""
    for path, value in values.items():
        _inside(owner_of(copy, path), path[-1]).set_value(value)


def owner_of(model: nnx.Module, path: Path) -> Any:
    """The module, list or dictionary that holds what stands at a path."""
    return functools.reduce(_inside, path[:-1], model)


def place(model: nnx.Module, path: Path, value: Any) -> None:
    """Puts something at a path of a model."""
    owner = owner_of(model, path)
    if _has_items(owner, path[-1]):
        owner[path[-1]] = value
    else:
        setattr(owner, path[-1], value)


def _inside(owner: Any, key: Any) -> Any:
    return owner[key] if _has_items(owner, key) else getattr(owner, key)


def _has_items(owner: Any, key: Any) -> bool:
    return isinstance(owner, Mapping) or not isinstance(key, str)


_HEADS = "natgrad_heads"


class DoesNotRunError(ValueError):
    """A model that fails on the inputs that it gets."""


def with_heads(model: nnx.Module, x: Any, loss: Heads) -> tuple[nnx.Module, Heads]:
    """A copy of a model whose outputs are those of all heads side by side, and the heads' shapes.

    Args:
      model: the model, which returns a dictionary or a tuple of arrays (N, ..., C).
      x: inputs, a tree of arrays (N, ...).
      loss: that of the heads.

    Raises:
      DoesNotRunError: the model fails on these inputs.
      ValueError, TypeError: its outputs are not those of the heads.
    """
    graphdef, state = nnx.split(model)
    # through jit, so that only the first call of a shape is traced
    returned = jax.eval_shape(partial(_returned, graphdef=graphdef), state, x)
    loss = loss.bound(returned, batch_size(x))
    joined = nnx.merge(graphdef, state)
    setattr(joined, _HEADS, loss)
    return joined, loss


@jax.jit
def _returned(state: Any, x: Any, *, graphdef: Any) -> Any:
    return _run(nnx.merge(graphdef, state), x)


def outputs_of(model: nnx.Module, x: Any) -> Array:
    """The outputs (N, ..., C) of a model; what it sows is lost, what it perturbs stays as it is.

    Args:
      model: the model, or a copy of it; one of ``with_heads`` has outputs (N, C).
      x: inputs, a tree of arrays (N, ...).

    Raises:
      DoesNotRunError: the model fails on these inputs.
      ValueError, TypeError: it returns something other than one array (N, ..., C) of real
        floating numbers.
    """
    # to the bridge of linen all attributes are variables
    heads = vars(model).pop(_HEADS, None)
    outputs = _run(model, x)
    if heads is not None:
        vars(model)[_HEADS] = heads
        outputs = heads.joined(outputs)
    n = batch_size(x)
    what = _samples(n)
    if not isinstance(outputs, (Array, np.ndarray)):
        raise TypeError(
            f"the model returns {_kind(outputs)}; it must return one array (N, C): wrap it in a "
            "module that returns its logits, or its means, alone, or give a loss for each of them "
            "(ng.Heads)"
        )
    if outputs.ndim < 2 or outputs.shape[0] != n:
        raise ValueError(
            f"for {what} the model returns shape {outputs.shape}; it must return (N, C) with "
            f"N = {n}: one row of outputs a sample, or (N, ..., C), one for each position of it"
        )
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        also = "; return real and imaginary parts side by side" if jnp.iscomplexobj(outputs) else ""
        raise TypeError(
            f"the model returns outputs of dtype {outputs.dtype}, but a Fisher needs derivatives "
            f"of real floating outputs{also}"
        )
    return jnp.asarray(outputs)


def _run(model: nnx.Module, x: Any) -> Any:
    """What a model returns."""
    # the attribute by which flax knows that it captures is a variable to the bridge of linen
    bridged = any(isinstance(m, nnx.bridge.ToNNX) for _, m in nnx.iter_modules(model))
    run: Any = model if bridged else nnx.capture(model)
    try:
        return run(x)
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        raise DoesNotRunError(
            f"{type(model).__name__} does not run on {_samples(batch_size(x))}, model(x) with x of "
            f"{described(x)}: {type(error).__name__}: {text}"
        ) from error


def _samples(n: int) -> str:
    return "one sample" if n == 1 else f"{n} samples"


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {', '.join(map(repr, value))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"


def check_model(model: object) -> None:
    """Raises TypeError unless given a module of Flax nnx."""
    if isinstance(model, nnx.Module):
        return
    kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
    raise TypeError(
        f"model must be a flax.nnx.Module, got {kind}: make an instance of a class; a linen module "
        "becomes one by ng.from_linen(module, variables), a function f(params, x) or a module of "
        "Equinox by ng.from_function(function, params)"
    )


def hashable_filter(wrt: Any) -> Any:
    """A filter of Flax in a form by which a compiled program is found again.

    Raises:
      TypeError: it is no filter.
    """
    if isinstance(wrt, list | tuple):
        return tuple(map(hashable_filter, wrt))
    if not isinstance(wrt, Hashable):
        raise _no_filter(wrt)
    return wrt


def _no_filter(wrt: object) -> TypeError:
    return TypeError(
        f"wrt must be a filter of flax, such as nnx.Param or nnx.PathContains(name), got {wrt!r}"
    )


def dense_layers(model: nnx.Module) -> dict[Path, nnx.Module]:
    """The layers of a model that has no other layers with parameters than affine ones, by path.

    Raises:
      TypeError: a module of another type owns parameters or batch statistics.
    """
    check_model(model)
    found: dict[Path, nnx.Module] = {}
    for path, module in nnx.iter_modules(model):
        if type(module) in (Dense, nnx.Linear):
            found[tuple(path)] = module
            continue
        own = [v for v in vars(module).values() if isinstance(v, (nnx.Param, nnx.BatchStat))]
        if own:
            raise TypeError(
                f"{type(module).__name__} at {dotted(tuple(path))} owns parameters, but only "
                "networks of ng.Dense and nnx.Linear layers are served here"
            )
    if not found:
        raise TypeError(f"{type(model).__name__} has no ng.Dense or nnx.Linear layer")
    return found


def parameter_paths(model: nnx.Module, wrt: Any = nnx.Param) -> dict[Path, Any]:
    """The parameters that a filter chooses, by path.

    Raises:
      ValueError: the filter chooses none.
      TypeError: no model, no filter, or one that chooses something that is not floating.
    """
    check_model(model)
    try:
        state = nnx.state(model, wrt)
    except (TypeError, ValueError):
        raise _no_filter(wrt) from None
    found = {tuple(path): leaf for path, leaf in nnx.to_flat_state(state)}
    if not found:
        raise ValueError(f"{type(model).__name__} has no parameters for wrt={wrt!r}")
    for path, leaf in found.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"wrt={wrt!r} chooses {dotted(path)} of dtype {leaf.dtype}, but only floating "
                "parameters can move"
            )
    return found
