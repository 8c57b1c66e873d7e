"""Layers that tell what goes into them and let their outputs be perturbed.

A copy of the model gets layers of subclasses; the user's own model object is left as it was.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.extend.core import get_opaque_trace_state

from natgrad_flax.arguments.arrays import batch_size, described, shapes_of
from natgrad_flax.models.layers import Conv
from natgrad_flax.signals.affine import LAYER_KINDS, NORM_KINDS, by_features
from natgrad_flax.xla.convolution import conv_general_dilated

Path = tuple[Any, ...]
"""Where a layer stands in a model: names of attributes and numbers in lists."""

_RECORDED = ("kernel", "bias", "scale", "embedding")


class Call(NamedTuple):
    """One call of a layer: where it stands, and the shapes of its inputs and outputs."""

    path: Path
    inputs: jax.ShapeDtypeStruct
    outputs: jax.ShapeDtypeStruct


@dataclass
class Tape:
    """What happens to the layers in one forward pass.

    All of it stands here and nothing in the model, so no name of a user's can collide with it.

    Attributes:
      names: path of a layer by the id of its object.
      candidates: values of parameters that the recording may account for, by path.
      held: what stands for them inside of the layers while uses outside are looked for.
      perturbations: what is added to the outputs of each call, in the order of the calls.
      calls: of the layers, in their order.
      inputs: of each call.
      strange: parameters that a layer was called with in a way that no formula covers, and why.
      level: where the model is traced; inside of a transformation nothing can be recorded.
    """

    names: dict[int, Path]
    candidates: dict[Path, Any]
    held: dict[Path, Any]
    perturbations: Sequence[Array] | None = None
    calls: list[Call] = field(default_factory=list)
    inputs: list[Array] = field(default_factory=list)
    strange: dict[Path, str] = field(default_factory=dict)
    level: Any = field(default_factory=partial(get_opaque_trace_state, convention="nnx"))


_TAPE: ContextVar[Tape] = ContextVar("tape")


@functools.cache
def _recording_class(kind: type[nnx.Module]) -> type[nnx.Module]:
    """A subclass of a layer type that records its inputs and perturbs its outputs."""

    class Recording(kind):  # type: ignore[misc, valid-type]
        def __call__(self, *called: Any, **kwargs: Any) -> Array:
            tape = _TAPE.get()
            path = tape.names.get(id(self))
            if isinstance(self, nnx.BatchNorm):
                _check_held(self, path, called[1:], kwargs)
            top_level = tape.level == get_opaque_trace_state(convention="nnx")
            if path is None or not top_level or not called:
                # the parameters count as used outside of the layer
                return super().__call__(*called, **kwargs)
            x, *args = called
            own = {
                (*path, name): variable
                for name in _RECORDED
                if isinstance(variable := getattr(self, name, None), nnx.Variable)
            }
            plain = not args and all(v is None for v in kwargs.values())
            if not (plain or isinstance(self, nnx.BatchNorm)):
                tape.strange.update(dict.fromkeys(own, "called with more than its inputs"))
            features = isinstance(self, NORM_KINDS) and by_features(self, x.ndim)
            before = {name: variable.get_value() for name, variable in own.items()}
            for name, variable in own.items():
                if name not in tape.candidates or name in tape.strange:
                    continue
                if variable.get_value() is not tape.candidates[name]:
                    tape.strange[name] = "changed on its way to the layer"
                elif name in tape.held:
                    variable.set_value(tape.held[name])
            if features:
                inputs, outputs = self._normalised(x, own, args, kwargs)
            else:
                inputs, outputs = x, super().__call__(x, *args, **kwargs)
            for name, variable in own.items():
                variable.set_value(before[name])
            if jnp.iscomplexobj(inputs) or jnp.iscomplexobj(outputs):
                tape.strange.update(dict.fromkeys(own, "its layer works on complex numbers"))
            number = len(tape.calls)
            tape.calls.append(Call(path, *shapes_of((inputs, outputs))))
            tape.inputs.append(inputs)
            return outputs if tape.perturbations is None else outputs + tape.perturbations[number]

        def _normalised(
            self, x: Array, own: dict[Path, nnx.Variable], args: list[Any], kwargs: Any
        ) -> tuple[Array, Array]:
            """The normalised inputs, and what scale and bias make of them."""
            values = {path[-1]: (variable, variable.get_value()) for path, variable in own.items()}
            for name, (variable, value) in values.items():
                fill = jnp.ones_like(value) if name == "scale" else jnp.zeros_like(value)
                variable.set_value(fill)
            inputs = outputs = super().__call__(x, *args, **kwargs)
            if "scale" in values:
                outputs = outputs * values["scale"][1]
            if "bias" in values:
                outputs = outputs + values["bias"][1]
            return inputs, outputs

    Recording.__name__ = f"Recording{kind.__name__}"
    return Recording


class HeldStatisticsError(ValueError):
    """A normalisation that mixes the samples of a batch."""


def _check_held(layer: nnx.BatchNorm, path: Path | None, args: Any, kwargs: Any) -> None:
    """Refuses batch statistics, by which the output of a sample depends on the others."""
    chosen = args[0] if args else kwargs.get("use_running_average")
    if not (layer.use_running_average if chosen is None else chosen):
        where = "inside of a transformation" if path is None else f"at {dotted(path)}"
        asked = "is in training mode" if chosen is None else "is called with its statistics open"
        raise HeldStatisticsError(
            f"BatchNorm {where} {asked}: its outputs mix the samples of a batch, so no sample has "
            "a Jacobian, and no Fisher, of its own. Hold the statistics: call model.eval(), or "
            "pass nnx.view(model, use_running_average=True); to train with batch statistics, take "
            'their gradient yourself and precondition it with gradient="incoming"'
        )


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


def make_recording(copy: nnx.Module) -> dict[int, Path]:
    """Changes the classes of a copy's layers; the paths of layers by the ids of their objects."""
    names = {}
    with_fast_gradients(copy)
    for path, layer in list(nnx.iter_modules(copy)):
        if type(layer) in LAYER_KINDS or type(layer) in NORM_KINDS:
            layer.__class__ = _recording_class(type(layer))
            names[id(layer)] = tuple(path)
    return names


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


def recorded_pass(copy: nnx.Module, sample: Any, tape: Tape) -> Array:
    """The outputs (1, C) of a recording copy on one sample."""
    token = _TAPE.set(tape)
    try:
        return outputs_of(copy, jax.tree.map(lambda leaf: leaf[None], sample))
    finally:
        _TAPE.reset(token)


class DoesNotRunError(ValueError):
    """A model that fails on the inputs that it gets."""


def outputs_of(model: nnx.Module, x: Any) -> Array:
    """The outputs (N, C) of a model; what it sows goes nowhere, what it perturbs stays as it is.

    Args:
      model: the model, or a copy of it.
      x: inputs, a tree of arrays (N, ...).

    Raises:
      DoesNotRunError: the model fails on these inputs.
      ValueError, TypeError: it returns something other than one array (N, C) of real floating
        numbers.
    """
    n = batch_size(x)
    what = "one sample" if n == 1 else f"{n} samples"
    # the attribute by which flax knows that it captures is a variable to the bridge of linen
    bridged = any(isinstance(m, nnx.bridge.ToNNX) for _, m in nnx.iter_modules(model))
    run: Any = model if bridged else nnx.capture(model)
    try:
        outputs = run(x)
    except HeldStatisticsError:
        raise
    except Exception as error:
        text = str(error).strip().partition("\n")[0]
        raise DoesNotRunError(
            f"{type(model).__name__} does not run on {what}, model(x) with x of {described(x)}: "
            f"{type(error).__name__}: {text}"
        ) from error
    if not isinstance(outputs, (Array, np.ndarray)):
        raise TypeError(
            f"the model returns {_kind(outputs)}; it must return one array (N, C): wrap it in a "
            "module that returns its logits, or its means, alone"
        )
    if outputs.ndim != 2 or outputs.shape[0] != n:
        raise ValueError(
            f"for {what} the model returns shape {outputs.shape}; it must return (N, C) with "
            f"N = {n}: one row of outputs a sample"
        )
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        also = "; return real and imaginary parts side by side" if jnp.iscomplexobj(outputs) else ""
        raise TypeError(
            f"the model returns outputs of dtype {outputs.dtype}, but a Fisher needs derivatives "
            f"of real floating outputs{also}"
        )
    return jnp.asarray(outputs)


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} of {', '.join(map(repr, value))}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
