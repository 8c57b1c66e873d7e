"""Layers that tell what goes into them and let their outputs be perturbed.

A copy of the model gets layers of subclasses; the user's own model object is left as it was.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.extend.core import get_opaque_trace_state

from natgrad_flax.convolution import with_fast_gradients
from natgrad_flax.layer_kinds import LAYER_KINDS, NORM_KINDS, Shape, by_features

Path = tuple[Any, ...]
"""Where a layer stands in a model: names of attributes and numbers in lists."""

_TAPPED = ("kernel", "bias", "scale", "embedding")


@dataclass
class Tape:
    """What happens to the layers in one forward pass.

    Attributes:
      names: path of a layer by the id of its object.
      candidates: values of parameters that the taps may account for, by path.
      held: what stands for them inside of the layers while uses outside are looked for.
      calls: layers in the order of their calls, with the shapes of inputs and outputs.
      strange: parameters that a layer was called with in a way that no formula covers, and why.
      level: where the model is traced; inside of a transformation nothing can be recorded.
    """

    names: dict[int, Path]
    candidates: dict[Path, Any]
    held: dict[Path, Any]
    calls: list[tuple[Path, Shape, Shape]] = field(default_factory=list)
    strange: dict[Path, str] = field(default_factory=dict)
    level: Any = field(default_factory=partial(get_opaque_trace_state, convention="nnx"))


_TAPE: ContextVar[Tape] = ContextVar("tape")


@functools.cache
def _tapped(kind: type[nnx.Module]) -> type[nnx.Module]:
    """A subclass of a layer type that sows its inputs and perturbs its outputs."""

    class Tapped(kind):  # type: ignore[misc, valid-type]
        def __call__(self, *called: Any, **kwargs: Any) -> Array:
            tape = _TAPE.get()
            path = tape.names.get(id(self))
            if isinstance(self, nnx.BatchNorm):
                _check_held(self, path, called[1:], kwargs)
            here = tape.level == get_opaque_trace_state(convention="nnx")
            if path is None or not here or not called:
                # the parameters count as used outside of the layer
                return super().__call__(*called, **kwargs)
            x, *args = called
            own = {
                (*path, name): variable
                for name in _TAPPED
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
            number = sum(1 for called, *_ in tape.calls if called == path)
            if features:
                inputs, outputs = self._normalised(x, own, args, kwargs)
            else:
                inputs, outputs = x, super().__call__(x, *args, **kwargs)
            for name, variable in own.items():
                variable.set_value(before[name])
            tape.calls.append((path, inputs.shape, outputs.shape))
            self.sow(nnx.Intermediate, "inputs", inputs)
            return self.perturb(f"outputs{number}", outputs)

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

    Tapped.__name__ = f"Tapped{kind.__name__}"
    return Tapped


def _check_held(layer: nnx.BatchNorm, path: Path | None, args: Any, kwargs: Any) -> None:
    """Refuses batch statistics, by which the output of a sample depends on the others."""
    chosen = args[0] if args else kwargs.get("use_running_average")
    if not (layer.use_running_average if chosen is None else chosen):
        where = "inside of a transformation" if path is None else f"at {dotted(path)}"
        asked = "is in training mode" if chosen is None else "is called with its statistics open"
        raise ValueError(
            f"BatchNorm {where} {asked}: its outputs mix the samples of a batch, so no sample has "
            "a Jacobian, and no Fisher, of its own. Hold the statistics: call model.eval(), or "
            "pass nnx.view(model, use_running_average=True); to train with batch statistics, take "
            'their gradient yourself and precondition it with gradient="incoming"'
        )


def dotted(path: Path) -> str:
    """A path in words."""
    return ".".join(map(str, path)) or "the root"


def tap(copy: nnx.Module) -> dict[int, Path]:
    """Changes the classes of a copy's layers; the paths of layers by the ids of their objects."""
    names = {}
    with_fast_gradients(copy)
    for path, layer in list(nnx.iter_modules(copy)):
        if type(layer) in LAYER_KINDS or type(layer) in NORM_KINDS:
            layer.__class__ = _tapped(type(layer))
            names[id(layer)] = tuple(path)
    return names


def put(copy: nnx.Module, values: dict[Path, Array]) -> None:
    """Sets variables of a copy."""
    for path, value in values.items():
        variable: Any = copy
        for key in path:
            plain = isinstance(variable, Mapping) or not isinstance(key, str)
            variable = variable[key] if plain else getattr(variable, key)
        variable.set_value(value)


def captured_pass(
    copy: nnx.Module, sample: Array, perturbations: Any, tape: Tape
) -> tuple[Array, Any, Any]:
    """One pass of a tapped copy on one sample: outputs, perturbations, and what was sown."""
    captured: Any = nnx.capture(copy, nnx.Perturbation, nnx.Intermediate, init=perturbations)
    token = _TAPE.set(tape)
    try:
        outputs, used, intermediates = captured(sample[None])
    finally:
        _TAPE.reset(token)
    return outputs, used, intermediates
