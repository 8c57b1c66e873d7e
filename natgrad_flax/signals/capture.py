"""From a model and a batch to signals: one forward and one batched backward pass.

The model runs sample by sample under ``vmap``, so whatever it does with its inputs, the first axis
of all that is recorded counts samples. Every supported layer of a copy of the model tells its
inputs and perturbs its outputs; the derivative with respect to the perturbations is D. A parameter
that is used in any other way too gets its explicit Jacobian. The user's own model object is left
as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from natgrad_flax.arguments.arrays import batch_size, own_promotion, solve_dtype
from natgrad_flax.signals.base import LayerSignals
from natgrad_flax.signals.dense import DenseSignals, Signals
from natgrad_flax.signals.independence import check_samples_alone
from natgrad_flax.signals.plan import LayerPlan, parameter_paths, plan_layers
from natgrad_flax.signals.recording import Call, Path, Tape, make_recording, put, recorded_pass
from natgrad_flax.signals.shared import ExplicitSignals, SharedSignals


def linearise(
    model: nnx.Module, x: Any, wrt: Any = nnx.Param
) -> tuple[Array, Callable[[Array], Signals]]:
    """One forward pass, and the function that runs the batched backward pass.

    Args:
      model: any module; the output of a sample must not depend on the other samples.
      x: inputs, an array (N, ...) or a tree of them.
      wrt: filter of the parameters, as ``nnx.Optimizer`` takes it; the others are held.

    Returns:
      The outputs (N, C), and a function from output directions (N, S, C), the cotangents to
      carry back for each sample, to their signals. All of it has ``solve_dtype`` of the outputs and
      parameters, whatever the layers compute in.

    Raises:
      ValueError, TypeError: as in ``plan_layers``.
    """
    plans, calls = plan_layers(model, x, wrt)
    graphdef, state = nnx.split(model)
    chosen = parameter_paths(model, wrt)
    loose = [(*p.path, p.kernel.name) for p in plans if p.kind == "parameter"]

    def forward(perturbations: list[Array], free: dict[Path, Array], sample: Any) -> Any:
        copy = nnx.merge(graphdef, state, copy=True)
        names = make_recording(copy)
        put(copy, free)
        tape = Tape(names, {}, {}, perturbations)
        outputs = recorded_pass(copy, sample, tape)
        return outputs[0], tape.inputs

    n = batch_size(x)
    zeros = [jnp.zeros((n, *call.outputs.shape), call.outputs.dtype) for call in calls]
    free = {path: jnp.broadcast_to(value := chosen[path][...], (n, *value.shape)) for path in loose}

    def batch(perturbations: list[Array], free: dict[Path, Array]) -> Any:
        return jax.vmap(forward)(perturbations, free, x)

    computed, backward, inputs = jax.vjp(batch, zeros, free, has_aux=True)
    dtype = solve_dtype(computed.dtype, *(chosen[path].dtype for path in chosen))
    outputs = computed.astype(dtype)

    def signals(directions: Array) -> Signals:
        found = jax.vmap(backward, in_axes=1, out_axes=1)(directions.astype(computed.dtype))
        recorded, carried, blocks = jax.tree.map(lambda leaf: _cast(leaf, dtype), (inputs, *found))
        layers = tuple(_signals(plan, calls, recorded, carried, blocks) for plan in plans)
        return Signals(layers, outputs)

    return outputs, signals


def _cast(array: Array, dtype: Any) -> Array:
    return array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _signals(
    plan: LayerPlan,
    calls: list[Call],
    recorded: list[Array],
    carried: list[Array],
    blocks: dict[Path, Array],
) -> LayerSignals:
    """The signals of one layer from what was recorded."""
    if plan.kind == "parameter":
        block = blocks[(*plan.path, plan.kernel.name)]
        shape = (*block.shape[:2], *plan.kernel.split)
        return ExplicitSignals(block.reshape(shape), None, plan.path, plan.kernel, None)
    own = [number for number, call in enumerate(calls) if call.path == plan.path]
    inputs = [recorded[number] for number in own]
    derivatives = [carried[number] for number in own]
    if plan.is_norm:
        rows = []
        for name in [form.name for form in (plan.kernel, plan.bias) if form]:
            parts = [
                _over_positions(d, a if name == "scale" else None)
                for a, d in zip(inputs, derivatives, strict=True)
            ]
            rows.append(sum(parts[1:], start=parts[0]))
        scale = None if plan.bias is None else 1.0
        return ExplicitSignals(jnp.stack(rows, axis=2), scale, plan.path, plan.kernel, plan.bias)
    arranged = [form.inputs(a) for form, a in zip(plan.affine, inputs, strict=True)]
    turned = [form.derivatives(d) for form, d in zip(plan.affine, derivatives, strict=True)]
    a, d = jnp.concatenate(arranged, axis=1), jnp.concatenate(turned, axis=2)
    a = a.astype(d.dtype)  # numbers of pixels, masks, rows of an embedding
    first = plan.affine[0]
    a = jnp.asarray(first.weight_scale, a.dtype) * a if first.weight_scale != 1 else a
    scale = None if plan.bias is None else first.bias_scale
    rest = (scale, plan.path, plan.kernel, plan.bias)
    if a.shape[1:3] == (1, 1):
        return DenseSignals(a[:, 0, 0], d[:, :, 0, 0], *rest)
    return SharedSignals(a, d, *rest)


def _over_positions(derivatives: Array, inputs: Array | None) -> Array:
    """sum over positions of D, times a where given: (N, S, features)."""
    n, s, features = *derivatives.shape[:2], derivatives.shape[-1]
    flat = derivatives.reshape(n, s, -1, features)
    if inputs is None:
        return jnp.sum(flat, axis=2)
    return jnp.einsum("nsti,nti->nsi", flat, inputs.reshape(n, -1, features))


def plain_directions(outputs: Array) -> Array:
    """The output directions (N, C, C) of the plain outputs: the identity."""
    n, c = outputs.shape
    return jnp.broadcast_to(jnp.eye(c, dtype=outputs.dtype), (n, c, c))


@own_promotion()
def jacobian_signals(
    model: nnx.Module, x: Any, wrt: Any = nnx.Param, *, check_samples: bool = True
) -> Signals:
    """Signals of the plain outputs: S = C, J = df/dtheta.

    Args:
      model: any module; the output of a sample must not depend on the other samples.
      x: inputs, an array (N, ...) or a tree of them.
      wrt: filter of the parameters.
      check_samples: as in ``natural_gradient``.

    Raises:
      ValueError, TypeError: as in ``linearise``; outputs that depend on other samples.
    """
    outputs, backward = linearise(model, x, wrt)
    if check_samples:
        check_samples_alone(model, x)
    return backward(plain_directions(outputs))
