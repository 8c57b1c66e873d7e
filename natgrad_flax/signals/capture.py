"""From a model and a batch to signals: one forward and one batched backward pass.

The model is traced on one sample, and its program runs under ``vmap``, so whatever it does with its
inputs, the first axis of all that is recorded counts samples. Where a parameter acts affinely, the
other operand is recorded and the result perturbed; the derivative with respect to the perturbation
is D. A parameter that is used in any other way gets its explicit Jacobian. The model is left as it
was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from natgrad_flax.arguments.arrays import batch_size, own_promotion, solve_dtype
from natgrad_flax.signals.base import LayerSignals
from natgrad_flax.signals.dense import DenseSignals, Signals
from natgrad_flax.signals.independence import check_samples_alone
from natgrad_flax.signals.lookup import LookupSignals, OneHot
from natgrad_flax.signals.plan import LayerPlan, plan_layers
from natgrad_flax.signals.program import Path, Tape
from natgrad_flax.signals.shared import ExplicitSignals, SharedSignals
from natgrad_flax.signals.stacked import StackedSignals, arranged
from natgrad_flax.signals.tied import TiedSignals
from natgrad_flax.signals.views import Steps


def linearise(
    model: nnx.Module, x: Any, wrt: Any = nnx.Param
) -> tuple[Array, Callable[[Array], Signals]]:
    """One forward pass, and the function that runs the batched backward pass.

    Args:
      model: any module; the output of a sample must not depend on the other samples.
      x: inputs, an array (N, ...) or a tree of them.
      wrt: filter of the parameters, as ``nnx.Optimizer`` takes it; the others are held.

    Returns:
      The outputs (N, ..., C), and a function from output directions (N, S, ..., C), the cotangents
      to carry back for each sample, to their signals. All of it has ``solve_dtype`` of the
      outputs and parameters, whatever the layers compute in. Layers of a loop are stacked
      (``StackedSignals``).

    Raises:
      ValueError, TypeError: as in ``plan_layers``; a program that can't be differentiated, such as
        one with host callbacks on what depends on parameters.
    """
    plan = plan_layers(model, x, wrt)
    n = batch_size(x)
    zeros = {
        number: jnp.zeros((n, *place.loops, *place.outputs.shape), place.outputs.dtype)
        for number, place in plan.places.items()
    }
    loose = [path for layer in plan.layers if layer.is_explicit for path in layer.parameters]
    free = {path: jnp.broadcast_to(value := plan.values[path], (n, *value.shape)) for path in loose}

    def batch(perturbations: Tape, free: dict[Path, Array]) -> Any:
        return jax.vmap(plan.run)(perturbations, free, x)

    with _derivatives_of(model):
        computed, backward, tape = jax.vjp(batch, zeros, free, has_aux=True)
    dtype = solve_dtype(computed.dtype, *(value.dtype for value in plan.values.values()))
    outputs = computed.astype(dtype)

    def signals(directions: Array) -> Signals:
        with _derivatives_of(model):
            found = jax.vmap(backward, in_axes=1, out_axes=1)(directions.astype(computed.dtype))
        recorded, carried, blocks = jax.tree.map(lambda leaf: _cast(leaf, dtype), (tape, *found))
        layers = tuple(
            _signals(plan.layers[places[0]], recorded, carried, blocks)
            if plan.layers[places[0]].kernel.part is None
            else _stacked(plan.layers, places, recorded, carried, blocks)
            for places in _families(plan.layers)
        )
        return Signals(layers, outputs)

    return outputs, signals


@contextmanager
def _derivatives_of(model: nnx.Module) -> Iterator[None]:
    """Says in one sentence why JAX can't differentiate a model."""
    try:
        yield
    except (TypeError, ValueError, NotImplementedError) as error:
        text = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"the outputs of {type(model).__name__} have no derivatives that JAX finds by reverse "
            f"mode for each sample alone: {type(error).__name__}: {text}"
        ) from error


def _cast(array: Array, dtype: Any) -> Array:
    return array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _families(layers: list[LayerPlan]) -> list[list[int]]:
    """The places of layers that hold parts of the same parameters, in the order of the first."""
    found: dict[Any, list[int]] = {}
    for place, layer in enumerate(layers):
        whole = layer.kernel.part is None
        found.setdefault(place if whole else (layer.path, layer.kernel.name), []).append(place)
    return list(found.values())


def _stacked(
    layers: list[LayerPlan],
    places: list[int],
    recorded: Tape,
    carried: Tape,
    blocks: dict[Path, Array],
) -> StackedSignals:
    """The signals of all steps of the loops that take another part of some parameters at each."""
    first = layers[places[0]]
    one = replace(
        first,
        kernel=first.kernel._replace(part=None),
        bias=first.bias and first.bias._replace(part=None),
    )
    arrays: list[Any] = [
        {
            place.number: _parts_at(lead, tape[place.number], len(place.loops), affine.view.steps)
            for place, affine in one.places
        }
        for lead, tape in ((1, recorded), (2, carried))
    ]
    own = one.parameters if one.is_explicit else []
    count = len(one.kernel.lead)
    arrays.append({path: _joined(2, blocks[path], count) for path in own})
    along = jax.vmap(partial(_signals, one), in_axes=(1, 2, 2), out_axes=1)

    def step_of(place: int) -> int:
        return layers[place].kernel.part or 0

    return StackedSignals(along(*arrays), tuple(sorted(places, key=step_of)))


def _parts_at(place: int, array: Array, loops: int, steps: Steps) -> Array:
    """An array with the axes of loops from a place on, and the parts of their steps as one there.

    Where parts are taken several times, the times stand behind the loops.
    """
    for step in steps:
        if step.order:
            axis, rounds = place + step.loop.depth, step.rounds
            # zero for a part that no step takes
            taken = jnp.take(array, rounds.ravel(), axis, mode="fill", fill_value=0)
            taken = taken.reshape(*array.shape[:axis], *rounds.shape, *array.shape[axis + 1 :])
            array = jnp.moveaxis(taken, axis + 1, place + loops)
    axes = [place + step.loop.depth for step in steps]
    return _joined(place, jnp.moveaxis(array, axes, range(place, place + len(axes))), len(axes))


def _joined(place: int, array: Array, count: int) -> Array:
    """An array with some axes that follow each other as one."""
    return array.reshape(*array.shape[:place], -1, *array.shape[place + count :])


def _signals(
    plan: LayerPlan, recorded: Tape, carried: Tape, blocks: dict[Path, Array]
) -> LayerSignals:
    """The signals of one layer from what was recorded."""
    if plan.is_explicit:
        rows = [blocks[path] for path in plan.parameters]
        forms = (plan.path, plan.kernel, plan.bias)
        if plan.bias is not None:
            return ExplicitSignals(jnp.stack(rows, axis=2), 1.0, *forms)
        shape = (*rows[0].shape[:2], *plan.kernel.split)
        return ExplicitSignals(rows[0].reshape(shape), None, *forms)
    rest = (None if plan.bias is None else plan.bias_scale, plan.path, plan.kernel, plan.bias)
    a, d = _of_uses(plan, recorded, carried, turned=False)
    if any(affine.turned for _, affine in plan.places):
        both = _of_uses(plan, recorded, carried, turned=True)
        return TiedSignals(a, d, *rest, turned=SharedSignals(*both, None, plan.path))
    if isinstance(a, OneHot):
        return LookupSignals(a, d, *rest)
    if a.shape[1:3] == (1, 1):
        return DenseSignals(a[:, 0, 0], d[:, :, 0, 0], *rest)
    return SharedSignals(a, d, *rest)


def _of_uses(plan: LayerPlan, recorded: Tape, carried: Tape, *, turned: bool) -> tuple[Any, Array]:
    """Inputs and derivatives of all places that take the weights as they stand, or transposed."""
    places = [both for both in plan.places if both[1].turned == turned]
    inputs: list[Any] = []
    derivatives = []
    for place, affine in places:
        a, d = recorded[place.number], carried[place.number]
        inputs.append(affine.inputs(a))
        derivatives.append(affine.derivatives(d))
    d = jnp.concatenate(derivatives, axis=2)
    scales = [affine.view.scale for _, affine in places]
    looked_up = plan.bias is None and not turned and len(set(scales)) == 1
    if looked_up and all(isinstance(a, OneHot) for a in inputs):
        indices = jnp.concatenate([a.indices for a in inputs], axis=1)
        return OneHot(indices, inputs[0].num_rows, scales[0]), d
    # numbers of pixels, masks
    arrays = [a.dense(d.dtype) if isinstance(a, OneHot) else a.astype(d.dtype) for a in inputs]
    scaled = [
        a if scale == 1 else jnp.asarray(scale, d.dtype) * a
        for a, scale in zip(arrays, scales, strict=True)
    ]
    return jnp.concatenate(scaled, axis=1), d


def plain_directions(outputs: Array) -> Array:
    """The output directions (N, S, ..., C) of the S plain outputs of a sample: the identity."""
    n, *shape = outputs.shape
    count = math.prod(shape)
    eye = jnp.eye(count, dtype=outputs.dtype).reshape(count, *shape)
    return jnp.broadcast_to(eye, (n, count, *shape))


@own_promotion()
def jacobian_signals(
    model: nnx.Module, x: Any, wrt: Any = nnx.Param, *, check_samples: bool = True
) -> Signals:
    """Signals of the plain outputs, from which the Jacobian J = df/dtheta follows; none is formed.

    One backward pass an output: S = C directions a sample, or T C for outputs with T positions.

    Args:
      model: any module; the output of a sample must not depend on the other samples.
      x: inputs, an array (N, ...) or a tree of them.
      wrt: filter of the parameters.
      check_samples: as in ``natural_gradient``.

    Raises:
      ValueError, TypeError: as in ``linearise``; outputs that depend on other samples.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model, x = ng.MLP((4, 8, 2), rngs=nnx.Rngs(0)), jnp.eye(4)
      >>> signals = ng.jacobian_signals(model, x)
      >>> [(layer.inputs.shape, layer.derivatives.shape) for layer in signals.layers]
      [((4, 4), (4, 2, 8)), ((4, 8), (4, 2, 2))]
      >>> signals.outputs.shape
      (4, 2)
    """
    outputs, backward = linearise(model, x, wrt)
    if check_samples:
        check_samples_alone(model, x)
    return arranged(backward(plain_directions(outputs)), None, "none")[0]
