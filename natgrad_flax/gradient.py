"""The natural gradient of a model on a batch, and the learning rate that theory gives it."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from natgrad_flax.activations import ACTIVATIONS
from natgrad_flax.capture import Path, jacobian_signals, layer_paths
from natgrad_flax.checks import (
    check_batch,
    check_damping,
    check_fits,
    check_inputs,
    check_settings,
    check_structure,
    is_concrete,
)
from natgrad_flax.damping import LevenbergMarquardt, RelativeDamping
from natgrad_flax.fisher import FisherKind, fisher_signals
from natgrad_flax.losses import Loss
from natgrad_flax.signals import LayerUpdate, Residual, Signals
from natgrad_flax.structures import Geometry, Structure

Damping = float | Array | RelativeDamping


def natural_gradient(
    model: nnx.Module,
    x: Array,
    y: Array,
    *,
    structure: Structure,
    loss: Loss,
    damping: Damping = 0.0,
    fisher: FisherKind = "exact",
    key: Array | None = None,
    mc_samples: int = 1,
) -> nnx.State:
    """G^{-1} dL, the natural gradient of the loss (Karakida & Osawa 2020, Eq. 7).

    Works eagerly (compiled once a shape) and inside ``jax.jit``, ``nnx.jit`` and ``lax.scan``.

    Args:
      model: any module built of ng.Dense and nnx.Linear layers, each called once.
      x: inputs, shape (N, M_0).
      y: targets, shape (N, C).
      structure: the Fisher approximation.
      loss: the loss; its mean over the N samples is differentiated.
      damping: rho, added to the Fisher in the 1/N convention; 0 means the pseudo-inverse.
      fisher: "exact" (expectation over targets), "mc" (sampled targets) or "empirical".
      key: a jax.random key, for "mc".
      mc_samples: targets drawn a sample, for "mc".

    Returns:
      The update with the tree of ``nnx.state(model, nnx.Param)``; theta - eta * update is the step.

    Raises:
      ValueError, TypeError: bad settings or a bad batch, before any work.
    """
    check_settings(structure, loss, fisher, damping, mc_samples)
    if callable(damping) or isinstance(damping, LevenbergMarquardt):
        raise TypeError(
            "schedules and adaptive damping need the step count: use natural_gradient_descent"
        )
    if fisher == "mc" and key is None:
        raise ValueError('fisher="mc" draws targets: pass key=jax.random.key(seed)')
    x, y = check_batch(model, x, y, loss)
    prepare(structure, model, x, y, loss, fisher, mc_samples, damping)
    static: float | RelativeDamping | None = None
    if isinstance(damping, RelativeDamping):
        static = damping
    elif is_concrete(damping) and np.ndim(damping) == 0 and damping == 0:
        static = 0.0
    graphdef, state = nnx.split(model)
    updates = _compiled(
        state,
        x,
        y,
        None if static is not None else jnp.asarray(damping),
        key,
        graphdef=graphdef,
        structure=structure,
        loss=loss,
        fisher=fisher,
        mc_samples=mc_samples,
        static_damping=static,
    )
    return as_state(nnx.state(model, nnx.Param), updates)


def compute(
    model: nnx.Module,
    x: Array,
    y: Array,
    *,
    structure: Structure,
    loss: Loss,
    damping: Damping,
    fisher: FisherKind,
    key: Array | None,
    mc_samples: int,
) -> tuple[dict[Path, LayerUpdate], Signals, Residual]:
    """The natural gradient by path of the layer, without checks; to be traced."""
    signals, residual = fisher_signals(
        model, x, y, loss=loss, fisher=fisher, key=key, num_samples=mc_samples
    )
    solved = structure.solve(signals, residual, resolve_damping(structure, signals, damping))
    paths = [layer.path for layer in signals.layers]
    return dict(zip(paths, solved, strict=True)), signals, residual


def resolve_damping(structure: Structure, signals: Signals, damping: Damping) -> Array | float:
    """The damping in the 1/N convention; a relative one is scaled by the structure's Gram."""
    if isinstance(damping, RelativeDamping):
        return damping.ratio * structure.damping_scale(signals)
    return damping


@partial(
    jax.jit,
    static_argnames=("graphdef", "structure", "loss", "fisher", "mc_samples", "static_damping"),
)
def _compiled(
    state: Any,
    x: Array,
    y: Array,
    damping: Array | None,
    key: Array | None,
    *,
    graphdef: Any,
    structure: Structure,
    loss: Loss,
    fisher: FisherKind,
    mc_samples: int,
    static_damping: float | RelativeDamping | None,
) -> dict[Path, LayerUpdate]:
    chosen = static_damping if damping is None else damping
    assert chosen is not None
    return compute(
        nnx.merge(graphdef, state),
        x,
        y,
        structure=structure,
        loss=loss,
        damping=chosen,
        fisher=fisher,
        key=key,
        mc_samples=mc_samples,
    )[0]


@partial(jax.jit, static_argnames=("graphdef", "loss", "fisher", "mc_samples"))
def _signals(
    state: Any,
    x: Array,
    y: Array,
    *,
    graphdef: Any,
    loss: Loss,
    fisher: FisherKind,
    mc_samples: int,
) -> Signals:
    return fisher_signals(
        nnx.merge(graphdef, state),
        x,
        y,
        loss=loss,
        fisher=fisher,
        key=jax.random.key(0),
        num_samples=mc_samples,
    )[0]


def as_state(params: Any, updates: dict[Path, LayerUpdate]) -> Any:
    """Updates by path in the tree of the parameters, with their dtypes."""
    flat = {(*path, name): leaf for path, layer in updates.items() for name, leaf in layer.items()}

    def pick(path: tuple[Any, ...], leaf: Any) -> Any:
        return flat[leaf_names(path)].astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(pick, params)


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


def prepare(
    structure: Structure,
    model: nnx.Module,
    x: Array,
    y: Array,
    loss: Loss,
    fisher: FisherKind,
    mc_samples: int,
    damping: object,
) -> None:
    """Checks that need shapes: sizes that cannot fit, couplings that do not match the depth."""
    graphdef, state = nnx.split(model)
    # through jit, so that only the first call of a shape is traced
    signals = jax.eval_shape(
        partial(_signals, graphdef=graphdef, loss=loss, fisher=fisher, mc_samples=mc_samples),
        state,
        x,
        y,
    )
    itemsize = signals.outputs.dtype.itemsize
    check_fits(structure.gram_size(signals), itemsize, f"the system that {structure.name} solves")
    structure.check(signals, damping)


def model_geometry(model: nnx.Module, num_samples: int) -> Geometry:
    """The sizes of a model as the theory needs them.

    Layers are taken in the order in which the model holds them.
    """
    layers = []
    for _, layer in sorted(layer_paths(model).items(), key=lambda item: _sort_key(item[0])):
        fan_in, units = layer.kernel.shape  # type: ignore[attr-defined]
        layers.append((fan_in + (layer.bias is not None), units))  # type: ignore[attr-defined]
    name = getattr(model, "activation", None)
    fraction = ACTIVATIONS[name].active_fraction if name in ACTIVATIONS else None
    return Geometry(tuple(layers), num_samples, layers[-1][1], fraction)


def _sort_key(path: Path) -> tuple[tuple[int, int, str], ...]:
    return tuple((0, p, "") if isinstance(p, int) else (1, 0, p) for p in path)


def optimal_learning_rate(
    structure: Structure,
    model: nnx.Module,
    num_samples: int | None = None,
    *,
    x: Array | None = None,
    damping: Damping = 0.0,
) -> float:
    """1 / alpha, which makes the linearised network converge in one step (Corollary 4.2).

    Args:
      structure: the Fisher approximation.
      model: the network; its sizes count, and the name of its activation for UnitWise.
      num_samples: N, the size of the batch.
      x: instead of the sizes, inputs (N, M_0): then 1 / lambda_max of the coefficient matrix of
        the mean squared error at these inputs, which also serves the entry-wise structures.
      damping: for the coefficient matrix at x.

    Raises:
      ValueError: the sizes violate the conditions of the theory (which one, and where), or the
        structure has no alpha.
    """
    check_structure(structure)
    check_damping(damping)
    if callable(damping) or isinstance(damping, LevenbergMarquardt):
        raise TypeError("a learning rate needs one damping: a number or an ng.RelativeDamping")
    if x is not None:
        x = check_inputs(x)
        signals = jacobian_signals(model, x)
        rho = resolve_damping(structure, signals, damping)
        matrix = np.asarray(structure.coefficient(signals, signals, rho))
        return float(1 / np.linalg.eigvals(matrix).real.max())
    if not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"num_samples must be a positive integer, got {num_samples!r}")
    geometry = model_geometry(model, num_samples)
    alpha = structure.alpha(geometry)
    failures = structure.failed_conditions(geometry)
    if failures:
        raise ValueError(
            f"{structure.name} is not isotropic here, so 1 / alpha is not its learning rate: "
            + "; ".join(failures)
            + ". Use wider layers or fewer samples, or pass inputs as x="
        )
    return 1 / alpha
