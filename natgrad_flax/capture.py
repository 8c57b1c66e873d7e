"""From a model and a batch to signals: one forward and one batched backward pass.

The passes go through flax's own capture: every supported layer of a copy of the model sows its
inputs and perturbs its outputs, and the derivative with respect to the perturbations is D. The
user's own model object is left as it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from natgrad_flax.layers import Dense
from natgrad_flax.signals import DenseSignals, Signals

Path = tuple[Any, ...]
"""Where a layer stands in a model: names of attributes and numbers in lists."""


@dataclass(frozen=True)
class LayerKind:
    """How signals are read off one type of layer.

    Attributes:
      weight_scale: the factor that the layer puts in front of its weights.
      bias_scale: the factor in front of its bias, None where this layer has none.
    """

    weight_scale: Callable[[Any], float]
    bias_scale: Callable[[Any], float | None]


LAYER_KINDS: dict[type[nnx.Module], LayerKind] = {
    Dense: LayerKind(lambda layer: layer.weight_scale, lambda layer: layer.bias_scale),
    nnx.Linear: LayerKind(lambda layer: 1.0, lambda layer: None if layer.bias is None else 1.0),
}
"""The layer types that have signals: NTK-parametrised Dense and the standard nnx.Linear."""


_CALLED: ContextVar[list[int]] = ContextVar("called_layers")


@functools.cache
def _tapped(kind: type[nnx.Module]) -> type[nnx.Module]:
    """A subclass of a layer type that sows its inputs and perturbs its outputs."""

    class Tapped(kind):  # type: ignore[misc, valid-type]
        def __call__(self, x: Array) -> Array:
            _CALLED.get().append(id(self))
            self.sow(nnx.Intermediate, "inputs", x)
            return self.perturb("outputs", super().__call__(x))

    Tapped.__name__ = f"Tapped{kind.__name__}"
    return Tapped


def layer_paths(model: nnx.Module) -> dict[Path, nnx.Module]:
    """The layers of a model that have signals, by path.

    Raises:
      TypeError: a module that owns parameters or batch statistics has no signals.
    """
    found: dict[Path, nnx.Module] = {}
    for path, module in _modules(model):
        if type(module) in LAYER_KINDS:
            found[path] = module
            continue
        own = [v for v in vars(module).values() if isinstance(v, (nnx.Param, nnx.BatchStat))]
        if own:
            name = ".".join(map(str, path)) or "the model itself"
            known = ", ".join(kind.__name__ for kind in LAYER_KINDS)
            raise TypeError(
                f"{type(module).__name__} at {name} owns parameters but has no signals; "
                f"layers with signals: {known}"
            )
    if not found:
        raise TypeError(f"{type(model).__name__} has no layer with signals (Dense, nnx.Linear)")
    return found


def _modules(model: nnx.Module) -> list[tuple[Path, nnx.Module]]:
    return [(tuple(path), module) for path, module in nnx.iter_modules(model)]


def _dig(state: Any, path: Path) -> Any:
    return functools.reduce(lambda node, key: node[key], path, state)


def linearise(model: nnx.Module, x: Array) -> tuple[Array, Callable[[Array], Signals]]:
    """One forward pass, and the function that runs the batched backward pass.

    Args:
      model: any module built of layers with signals.
      x: inputs, shape (N, ...).

    Returns:
      The outputs (N, C), and a function from seeds (N, S, C), the cotangents to carry back for
      each sample, to the signals with derivatives (N, S, M_l).

    Raises:
      TypeError: a layer type without signals.
      ValueError: a layer that is called more than once or never, or that sees inputs which are
        not (N, K); outputs that are not (N, C).
    """
    graphdef, state = nnx.split(model)
    layers = layer_paths(model)
    kinds = {path: LAYER_KINDS[type(layer)] for path, layer in layers.items()}

    def forward(perturbations: Any) -> tuple[Array, tuple[Any, Any]]:
        # the merge makes a copy, whose classes may be changed
        copy = nnx.merge(graphdef, state)
        for path, layer in _modules(copy):
            if path in kinds:
                layer.__class__ = _tapped(type(layer))
                names[id(layer)] = path
        captured = nnx.capture(copy, nnx.Perturbation, nnx.Intermediate, init=perturbations)
        result: Any = captured(x)
        outputs, used, intermediates = result
        return outputs, (used, intermediates)

    names: dict[int, Path] = {}
    calls: list[int] = []
    token = _CALLED.set(calls)
    try:
        shape, (perturbed, sown) = jax.eval_shape(forward, None)
        order = [names[call] for call in calls]
        _check_calls(layers, order, sown, shape, x.shape[0])
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), perturbed)
        outputs, backward, (_, intermediates) = jax.vjp(forward, zeros, has_aux=True)
    finally:
        _CALLED.reset(token)

    def signals(seeds: Array) -> Signals:
        (carried,) = jax.vmap(backward, in_axes=1, out_axes=1)(seeds)
        found = []
        for path in order:
            inputs = _dig(intermediates, path)["inputs"][0]
            scale = jnp.asarray(kinds[path].weight_scale(layers[path]), inputs.dtype)
            found.append(
                DenseSignals(
                    inputs=scale * inputs,
                    derivatives=_dig(carried, path)["outputs"][...],
                    bias_scale=kinds[path].bias_scale(layers[path]),
                    path=path,
                )
            )
        return Signals(tuple(found), outputs)

    return outputs, signals


def _check_calls(
    layers: dict[Path, nnx.Module], order: list[Path], sown: Any, outputs: Any, num_samples: int
) -> None:
    for path, layer in layers.items():
        name = f"{type(layer).__name__} at {'.'.join(map(str, path)) or 'the root'}"
        if order.count(path) != 1:
            raise ValueError(
                f"{name} is called {order.count(path)} times in one forward pass; signals need "
                "every layer with parameters to be called exactly once"
            )
        shape = _dig(sown, path)["inputs"][0].shape
        if len(shape) != 2 or shape[0] != num_samples:
            raise ValueError(
                f"{name} sees inputs of shape {shape}; signals need (N, features) with "
                f"N = {num_samples}: flatten the inputs"
            )
    if len(outputs.shape) != 2 or outputs.shape[0] != num_samples:
        raise ValueError(
            f"the model returns shape {outputs.shape}; it must return (N, C) with N = {num_samples}"
        )


def output_seeds(outputs: Array) -> Array:
    """The seeds (N, C, C) that give derivatives of the plain outputs: the identity."""
    n, c = outputs.shape
    return jnp.broadcast_to(jnp.eye(c, dtype=outputs.dtype), (n, c, c))


def jacobian_signals(model: nnx.Module, x: Array) -> Signals:
    """Signals of the plain outputs: S = C, J = df/dtheta.

    Args:
      model: any module built of layers with signals.
      x: inputs, shape (N, ...).

    Raises:
      TypeError, ValueError: as in ``linearise``.
    """
    outputs, backward = linearise(model, x)
    return backward(output_seeds(outputs))
