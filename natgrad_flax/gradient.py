"""The natural gradient of a model on a batch, and the learning rate that theory gives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from natgrad_flax.activations import active_fraction
from natgrad_flax.arrays import own_promotion, solve_dtype
from natgrad_flax.capture import jacobian_signals
from natgrad_flax.checks import (
    check_batch,
    check_damping,
    check_fisher_batch,
    check_input_shape,
    check_inputs,
    check_microbatches,
    check_settings,
    check_structure,
    is_concrete,
)
from natgrad_flax.convolution import with_fast_gradients
from natgrad_flax.damping import LevenbergMarquardt, RelativeDamping, damping_as
from natgrad_flax.fisher import FisherKind, fisher_signals, in_range, population_signals
from natgrad_flax.independence import check_samples_alone
from natgrad_flax.layer_signals import LayerUpdate, layer_updates, named_updates
from natgrad_flax.linalg import full_products
from natgrad_flax.losses import Loss
from natgrad_flax.momentum import Momentum
from natgrad_flax.parts import Passes, in_parts
from natgrad_flax.plans import dense_layers, hashable_filter
from natgrad_flax.preparation import prepare
from natgrad_flax.signals import Residual, Signals
from natgrad_flax.structures import Geometry, Structure
from natgrad_flax.taps import Path, outputs_of
from natgrad_flax.weight_sharing import (
    SharedGeometry,
    geometry_at,
    shared_alpha,
    shared_failures,
    traced_geometry,
)

Damping = float | Array | RelativeDamping


@own_promotion()
def natural_gradient(
    model: nnx.Module,
    x: Any,
    y: Array,
    *,
    structure: Structure,
    loss: Loss,
    damping: Damping = 0.0,
    fisher: FisherKind = "exact",
    key: Array | None = None,
    mc_samples: int = 1,
    wrt: Any = nnx.Param,
    fisher_x: Any = None,
    fisher_y: Array | None = None,
    microbatches: int = 1,
    check_samples: bool = True,
) -> nnx.State:
    """G^{-1} dL, the natural gradient of the loss (Karakida & Osawa 2020, Eq. 7).

    Works eagerly (compiled once a shape) and inside ``jax.jit``, ``nnx.jit`` and ``lax.scan``.

    Args:
      model: any nnx module whose outputs for a sample do not depend on the other samples.
        ``ng.describe`` tells which formula serves which of its layers.
      x: inputs, an array (N, ...) of any dtype that the model takes, or a tree (dictionary, tuple,
        ...) of such arrays, which the model gets as its one argument.
      y: targets, shape (N, C).
      structure: the Fisher approximation.
      loss: the loss; its mean over the N samples is differentiated.
      damping: rho, added to the Fisher in the 1/N convention; 0 means the pseudo-inverse.
      fisher: "exact" (expectation over targets), "mc" (sampled targets) or "empirical".
      key: a jax.random key, for "mc".
      mc_samples: targets drawn a sample, for "mc".
      wrt: the parameters to move, as ``nnx.Optimizer`` takes it; the Fisher is that of these.
      fisher_x: inputs (N', ...) of a batch of its own for the Fisher, so that G is that of the
        population or of more samples than the gradient's; None for the Fisher at x.
      fisher_y: targets (N', C) of that batch, for "empirical".
      microbatches: parts, a divisor of N and of N', in which the model runs one after the other.
        Only one part's activations are held; the result is that of the whole batch.
      check_samples: whether to try, at the first batch of a shape whose values are known, that the
        model makes of a batch what it makes of its samples one by one. Inside ``jit`` nothing can
        be tried. Without it the result is that of the samples one by one.

    Returns:
      The update with the tree of ``nnx.state(model, wrt)``; theta - eta * update is the step.

    Raises:
      ValueError, TypeError: bad settings or a bad batch, before any work.
    """
    wrt = hashable_filter(wrt)
    check_settings(structure, loss, fisher, damping, mc_samples)
    if callable(damping) or isinstance(damping, LevenbergMarquardt):
        raise TypeError(
            "schedules and adaptive damping need the step count: use natural_gradient_descent"
        )
    if fisher == "mc" and key is None:
        raise ValueError('fisher="mc" draws targets: pass key=jax.random.key(seed)')
    x, y = check_batch(model, x, y, loss)
    fisher_x, fisher_y = check_fisher_batch(model, fisher, x, y, fisher_x, fisher_y)
    check_microbatches(microbatches, x, fisher_x)
    at = (x, y) if fisher_x is None else (fisher_x, fisher_y)
    prepare(structure, model, *at, loss, fisher, mc_samples, damping, wrt)
    if check_samples:
        check_samples_alone(model, x)
    static = static_damping(damping)
    graphdef, state = nnx.split(model)
    updates = _compiled(
        state,
        x,
        y,
        None if static is not None else jnp.asarray(damping),
        key,
        fisher_x,
        fisher_y,
        graphdef=graphdef,
        structure=structure,
        loss=loss,
        fisher=fisher,
        mc_samples=mc_samples,
        static_damping=static,
        wrt=wrt,
        microbatches=microbatches,
    )
    return as_state(nnx.state(model, wrt), updates)


class AtBatch(NamedTuple):
    """What adaptive damping asks of the batch.

    Attributes:
      outputs: f, shape (N, C).
      inner: the product of the gradient of the loss with the step that was found.
    """

    outputs: Array
    inner: Callable[[], Array]


def compute(
    model: nnx.Module,
    x: Any,
    y: Array,
    *,
    structure: Structure,
    loss: Loss,
    damping: Damping,
    fisher: FisherKind,
    key: Array | None,
    mc_samples: int,
    wrt: Any = nnx.Param,
    fisher_x: Any = None,
    fisher_y: Array | None = None,
    microbatches: int = 1,
    momentum: Momentum | None = None,
) -> tuple[tuple[LayerUpdate, ...], Signals, AtBatch]:
    """The natural gradient layer by layer, without checks; to be traced.

    The arguments are those of ``natural_gradient``, and the momentum, where there is one.
    """
    settings: dict[str, Any] = {
        "loss": loss,
        "fisher": fisher,
        "key": key,
        "num_samples": mc_samples,
        "wrt": wrt,
        "microbatches": microbatches,
    }
    null: dict[str, Any] = {"loss": loss, "fisher": fisher, "damping": damping}
    if fisher_x is None:
        signals, residual = fisher_signals(model, x, y, **settings)
        signals, residual = in_range(signals, residual, **null)
        with full_products():
            rho = resolve_damping(structure, signals, damping)
            if momentum is None:
                solved = structure.solve(signals, residual, rho)
            else:
                solved = momentum.solve(structure, signals, residual, rho)
        return solved, signals, AtBatch(signals.outputs, lambda: _slope(signals, residual, solved))
    signals = population_signals(model, fisher_x, fisher_y, **settings)
    signals, _ = in_range(signals, None, **null)
    found, outputs = loss_gradient(model, x, y, loss=loss, wrt=wrt, microbatches=microbatches)
    slope = layer_updates(signals.layers, found)
    with full_products():
        rho = resolve_damping(structure, signals, damping)
        if momentum is None:
            solved = structure.precondition(signals, slope, rho)
        else:
            solved = momentum.precondition(structure, signals, slope, rho)
    return solved, signals, AtBatch(outputs, lambda: inner_product(slope, solved))


def _slope(signals: Signals, residual: Residual, solved: tuple[LayerUpdate, ...]) -> Array:
    """<gradient, step> without the gradient."""
    total = jnp.zeros((), signals.outputs.dtype)
    for index, (layer, update) in enumerate(zip(signals.layers, solved, strict=True)):
        pushed = layer.push_forward(update)
        total = total + jnp.sum(pushed * residual.direction(layer, index))
    return total / signals.num_samples


def inner_product(left: tuple[LayerUpdate, ...], right: tuple[LayerUpdate, ...]) -> Array:
    """The sum over all parameters of the products of two updates."""
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, left, right)), start=jnp.zeros(()))


def loss_gradient(
    model: nnx.Module,
    x: Any,
    y: Array,
    *,
    loss: Loss,
    wrt: Any,
    microbatches: int = 1,
    passes: Passes = in_parts,
) -> tuple[dict[Path, Array], Array]:
    """J^T r / N by the paths of the parameters, and the outputs (N, C); plain backpropagation."""
    graphdef, chosen, rest = nnx.split(model, wrt, ...)  # type: ignore[misc]

    def run(first: Array | int, x: Any, y: Array) -> tuple[dict[Path, Array], Array]:
        del first

        def forward(state: Any) -> Array:
            return outputs_of(with_fast_gradients(nnx.merge(graphdef, state, rest)), x)

        computed, backward = jax.vjp(forward, chosen)
        leaves = jax.tree.leaves(chosen)
        dtype = solve_dtype(computed.dtype, *(leaf.dtype for leaf in leaves))
        outputs = computed.astype(dtype)
        residual = loss.residual(outputs, y.astype(dtype)) / len(y)
        (gradient,) = backward(residual.astype(computed.dtype))
        return by_path(jax.tree.map(lambda leaf: leaf.astype(dtype), gradient)), outputs

    return passes(run, (x, y), microbatches)


def static_damping(damping: Damping) -> float | RelativeDamping | None:
    """What of a damping decides how a step is compiled; None for a number that is an argument."""
    if isinstance(damping, RelativeDamping):
        return damping
    zero = is_concrete(damping) and np.ndim(damping) == 0 and damping == 0
    return 0.0 if zero else None


def resolve_damping(structure: Structure, signals: Signals, damping: Damping) -> Array | float:
    """The damping in the 1/N convention; a relative one is scaled by the structure's Gram."""
    if isinstance(damping, RelativeDamping):
        damping = damping.times(structure.damping_scale(signals))
    return damping_as(damping, signals.outputs.dtype)


@partial(
    jax.jit,
    static_argnames=(
        *("structure", "loss", "fisher", "mc_samples", "static_damping", "wrt", "microbatches"),
    ),
)
def _compiled(
    state: Any,
    x: Any,
    y: Array,
    damping: Array | None,
    key: Array | None,
    fisher_x: Any,
    fisher_y: Array | None,
    *,
    graphdef: Any,
    structure: Structure,
    loss: Loss,
    fisher: FisherKind,
    mc_samples: int,
    static_damping: float | RelativeDamping | None,
    wrt: Any,
    microbatches: int,
) -> dict[Path, dict[str, Array]]:
    chosen = static_damping if damping is None else damping
    assert chosen is not None
    solved, signals, _ = compute(
        nnx.merge(graphdef, state),
        x,
        y,
        structure=structure,
        loss=loss,
        damping=chosen,
        fisher=fisher,
        key=key,
        mc_samples=mc_samples,
        wrt=wrt,
        fisher_x=fisher_x,
        fisher_y=fisher_y,
        microbatches=microbatches,
    )
    return named_updates(signals.layers, solved)


def as_state(params: Any, updates: Mapping[Path, Mapping[str, Array]]) -> Any:
    """Updates by path and name in the tree of the parameters, with their dtypes."""
    flat = {(*path, name): leaf for path, layer in updates.items() for name, leaf in layer.items()}

    def pick(path: tuple[Any, ...], leaf: Any) -> Any:
        return flat[leaf_names(path)].astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(pick, params)


def by_path(tree: Any) -> dict[Path, Array]:
    """The leaves of a pytree of parameters by their paths."""
    return {leaf_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def leaf_names(path: tuple[Any, ...]) -> Path:
    """The path of a parameter in a pytree, whether its leaves are Variables or plain arrays."""
    names: list[str | int] = []
    for entry in path:
        if isinstance(entry, jax.tree_util.DictKey | jax.tree_util.FlattenedIndexKey):
            names.append(entry.key)
        elif isinstance(entry, jax.tree_util.SequenceKey):
            names.append(entry.idx)
        elif entry.name != "value":
            names.append(entry.name)
    return tuple(names)


def model_geometry(model: nnx.Module, num_samples: int) -> Geometry:
    """The sizes of a fully connected model as the theory needs them.

    Layers are taken in the order in which the model holds them.

    Raises:
      TypeError: the model has other layers.
    """
    layers = []
    for _, layer in sorted(dense_layers(model).items(), key=lambda item: _sort_key(item[0])):
        fan_in, units = layer.kernel.shape  # type: ignore[attr-defined]
        layers.append((fan_in + (layer.bias is not None), units))  # type: ignore[attr-defined]
    return Geometry(tuple(layers), num_samples, layers[-1][1], active_fraction(model))


def _sort_key(path: Path) -> tuple[tuple[int, int, str], ...]:
    return tuple((0, p, "") if isinstance(p, int) else (1, 0, p) for p in path)


@own_promotion()
def optimal_learning_rate(
    structure: Structure,
    model: nnx.Module,
    num_samples: int | None = None,
    *,
    x: Any = None,
    damping: Damping = 0.0,
) -> float:
    """1 / alpha, which makes the linearised network converge in one step (Corollary 4.2).

    Where positions share weights (convolutions, tokens) alpha is that of
    ``natgrad_flax.weight_sharing``.

    Args:
      structure: the Fisher approximation.
      model: the network; its sizes count, and the name of its activation for UnitWise.
      num_samples: N, the size of the batch, for 1 / alpha.
      x: inputs (N', ...). Beside ``num_samples`` their shape alone counts: how many positions share
        weights depends on it, and only models with an ``input_shape`` tell without. Alone, they
        give 1 / lambda_max of the coefficient matrix of the mean squared error at these inputs,
        for any structure and model.
      damping: for the coefficient matrix at x.

    Raises:
      ValueError: the sizes violate the conditions of the theory (which one, and where), or the
        structure has no alpha.
      TypeError: layers that are not fully connected, and no shape of the inputs.
    """
    check_structure(structure)
    check_damping(damping)
    if callable(damping) or isinstance(damping, LevenbergMarquardt):
        raise TypeError("a learning rate needs one damping: a number or an ng.RelativeDamping")
    if x is not None:
        x = check_inputs(x, model)
        check_input_shape(model, x)
    if x is not None and num_samples is None:
        signals = jacobian_signals(model, x)
        with full_products():
            rho = resolve_damping(structure, signals, damping)
            matrix = np.asarray(structure.coefficient(signals, signals, rho))
        return float(1 / np.linalg.eigvals(matrix).real.max())
    if not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"num_samples must be a positive integer, got {num_samples!r}")
    geometry = _geometry(model, num_samples, x)
    if isinstance(geometry, SharedGeometry):
        alpha, failures = shared_alpha(structure, geometry), shared_failures(structure, geometry)
    else:
        alpha, failures = structure.alpha(geometry), structure.failed_conditions(geometry)
    if failures:
        raise ValueError(
            f"{structure.name} is not isotropic here, so 1 / alpha is not its learning rate: "
            + "; ".join(failures)
            + ". Use wider layers or fewer samples, or pass inputs as x= without num_samples="
        )
    return 1 / alpha


def _geometry(model: nnx.Module, num_samples: int, x: Any) -> Geometry:
    """The sizes of a model, by tracing it where the shape of its inputs is known."""
    if x is not None:
        return geometry_at(model, x, num_samples)
    shape = getattr(model, "input_shape", None)
    if isinstance(shape, tuple):
        return traced_geometry(model, shape, jnp.float32, num_samples)
    return model_geometry(model, num_samples)
