"""The learning rate that theory gives a structure on a network."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from natgrad_flax.arguments.arrays import check_concrete, own_promotion
from natgrad_flax.arguments.scalars import check_integer
from natgrad_flax.linalg.dense import full_products
from natgrad_flax.models.activations import active_fraction
from natgrad_flax.optimizer.checks import (
    check_input_shape,
    check_inputs,
    check_model_inputs,
    check_one_damping,
    check_structure,
)
from natgrad_flax.optimizer.gradient import Damping, resolve_damping
from natgrad_flax.optimizer.spectrum import largest_eigenvalue, rate_of_alpha, rate_of_largest
from natgrad_flax.signals.capture import jacobian_signals
from natgrad_flax.signals.model import Path, dense_layers
from natgrad_flax.structures import Geometry, Structure
from natgrad_flax.structures.weight_sharing import (
    SharedGeometry,
    geometry_at,
    shared_failures,
    traced_geometry,
)


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
    ``natgrad_flax.structures.weight_sharing``.

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
      ValueError: the sizes violate the conditions of the theory (which one, and where), the
        structure has no alpha, or no step moves the outputs (all inputs 0, dead units).
      TypeError: layers that are not fully connected, and no shape of the inputs.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0))
      >>> # by theory: 1 / alpha = 1 / L
      >>> ng.optimal_learning_rate(ng.BlockDiagonal(), model, 4)
      0.5
      >>> # measured
      >>> round(ng.optimal_learning_rate(ng.BlockDiagonal(), model, x=jnp.eye(4)), 3)
      0.5
    """
    check_structure(structure)
    check_one_damping(damping)
    if x is not None:
        x = check_inputs(x, model)
        check_input_shape(model, x)
    if x is not None and num_samples is None:
        x = check_model_inputs(model, x)
        check_concrete((x, nnx.state(model, nnx.Param)), "x and the parameters")
        signals = jacobian_signals(model, x)
        with full_products():
            rho = resolve_damping(structure, signals, damping)
            matrix = np.asarray(structure.coefficient(signals, signals, rho))
        return rate_of_largest(largest_eigenvalue(matrix, structure.name), structure.name)
    num_samples = check_integer("num_samples", num_samples, 1)
    geometry = _geometry(model, num_samples, x)
    if isinstance(geometry, SharedGeometry):
        alpha, failures = structure.shared_alpha(geometry), shared_failures(structure, geometry)
    else:
        alpha, failures = structure.alpha(geometry), structure.failed_conditions(geometry)
    if failures:
        raise ValueError(
            f"{structure.name} is not isotropic here, so 1 / alpha is not its learning rate: "
            + "; ".join(failures)
            + ". Use wider layers or fewer samples, or pass inputs as x= without num_samples="
        )
    return rate_of_alpha(alpha, structure.name)


def _geometry(model: nnx.Module, num_samples: int, x: Any) -> Geometry:
    """The sizes of a model, by tracing it where the shape of its inputs is known."""
    if x is not None:
        return geometry_at(model, x, num_samples)
    shape = getattr(model, "input_shape", None)
    if isinstance(shape, tuple):
        return traced_geometry(model, shape, jnp.float32, num_samples)
    return model_geometry(model, num_samples)
