"""Errors before any work: one clear sentence for each kind of bad input."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from natgrad_flax.arguments.arrays import (
    as_array,
    batch_size,
    check_finite,
    check_real,
    is_concrete,
    solve_dtype,
)
from natgrad_flax.arguments.instances import check_instance
from natgrad_flax.arguments.scalars import as_number, check_integer, check_number, is_real, shown
from natgrad_flax.damping import LevenbergMarquardt, RelativeDamping, is_zero
from natgrad_flax.losses import AnyLoss, Loss, check_losses
from natgrad_flax.losses.by_head import check_all_values, checked_targets, checked_weights
from natgrad_flax.losses.targets import check_shape
from natgrad_flax.models import MLP, NETWORKS, Autoencoder
from natgrad_flax.optimizer.momentum import SPRING
from natgrad_flax.signals.fisher import Batch, Fisher, check_kind
from natgrad_flax.signals.model import check_model, hashable_filter
from natgrad_flax.structures import Structure


def check_structure(structure: object) -> Structure:
    """The structure; raises TypeError unless given an instance of one."""
    return check_instance("structure", structure, Structure)  # type: ignore[type-abstract]


def check_settings(
    structure: object,
    loss: object,
    fisher: Any,
    damping: object,
    mc_samples: object = 1,
    wrt: Any = nnx.Param,
) -> Fisher:
    """Which Fisher is meant; raises TypeError or ValueError where settings do not fit together."""
    wrt = hashable_filter(wrt)
    check_structure(structure)
    loss = check_losses(loss)
    check_kind(fisher)
    check_damping(damping)
    if fisher == "mc" and is_zero(damping):
        raise ValueError(
            "a Monte-Carlo Fisher needs a positive damping: the gradient does not lie in the range "
            "of the sampled Fisher"
        )
    if fisher == "exact" and not loss.in_span and is_zero(damping):
        raise ValueError(
            f"ng.{type(loss).__name__} needs a positive damping: the gradient need not lie in the "
            "range of the Hessian of any function"
        )
    return Fisher(loss, fisher, check_integer("mc_samples", mc_samples, 1), wrt)


def check_damping(damping: object) -> None:
    """Refuses a damping that is no damping, or negative or not finite where it is known.

    Raises:
      ValueError: a number or an entry that is negative or not finite, or no entries.
      TypeError: neither a real number or array, nor a relative or adaptive damping or a schedule.
    """
    if isinstance(damping, (RelativeDamping, LevenbergMarquardt)) or callable(damping):
        return
    number = as_number(damping)
    if number is None and not (isinstance(damping, (np.ndarray, Array)) and is_real(damping)):
        raise TypeError(
            "damping must be a number, an ng.RelativeDamping, or in the optimizer a schedule or an "
            f"ng.LevenbergMarquardt, got {shown(damping)}"
        )
    if not is_concrete(damping):
        return
    values = np.asarray(damping, np.float64)
    if not values.size or not np.isfinite(values).all() or (values < 0).any():
        raise ValueError(f"damping must be 0 or positive and finite, got {shown(damping)}")
    check_normal(damping, np.float64)


def check_one_damping(damping: object) -> None:
    """As ``check_damping`` where nothing counts steps.

    Raises:
      TypeError: a schedule or an adaptive damping, besides.
      ValueError: as ``check_damping``.
    """
    check_damping(damping)
    if callable(damping) or isinstance(damping, LevenbergMarquardt):
        raise TypeError(
            "damping must be one number or an ng.RelativeDamping here: schedules and adaptive "
            "damping need the step count, which natural_gradient_descent has"
        )


def check_normal(damping: object, dtype: Any) -> None:
    """Raises ValueError on a positive damping that the arithmetic of a dtype takes for 0."""
    if isinstance(damping, RelativeDamping) or not is_concrete(damping):
        return
    # what float16 cannot hold is computed in float32
    smallest = float(jnp.finfo(solve_dtype(dtype)).tiny)
    values = np.asarray(damping, np.float64)
    if ((values > 0) & (values < smallest)).any():
        raise ValueError(
            f"damping {shown(damping)} is below {smallest:.2g}, the smallest normal number here, "
            "and would count as 0: pass 0 for the pseudo-inverse, or a larger damping"
        )


def check_inputs(x: Any, model: nnx.Module | None = None, name: str = "x") -> Any:
    """Inputs as arrays (N, ...): one, or a tree (dictionary, tuple, ...) of them.

    Arrays of any dtype: what it takes decides the model. A list is one array, as for NumPy, and so
    are nested tuples of numbers. Shapes (``jax.ShapeDtypeStruct``) stay as they are.

    Raises:
      ValueError: no samples, arrays without an axis of samples or with different numbers of them,
        NaN or infinite values.
      TypeError: something else than real numbers, or a model that is none.
    """
    if model is not None:
        check_model(model)
    numbers = (bool, int, float, complex, np.generic)
    if all(isinstance(leaf, numbers) for leaf in jax.tree.leaves(x)):
        x = as_array(x, name)

    def convert(path: Any, leaf: Any) -> Any:
        where = name + jax.tree_util.keystr(path)
        array = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else as_array(leaf, where)
        if not array.shape:
            raise ValueError(f"{where} must have an axis of N samples first, got a single number")
        check_real(array, where)
        check_finite(array, where)
        return array

    x = jax.tree_util.tree_map_with_path(convert, x, is_leaf=lambda node: isinstance(node, list))
    sizes = {leaf.shape[0] for leaf in jax.tree.leaves(x)}
    if sizes == {0}:
        raise ValueError(f"the batch is empty: {name} has shape {_shapes(x)}")
    if len(sizes) > 1:
        raise ValueError(
            f"all arrays of {name} must have the same number of samples along their first axes, "
            f"got shapes {_shapes(x)}"
        )
    return x


def check_array(x: Any, name: str = "x") -> Array:
    """Inputs of a theory that has no model, or whose model takes one real array (N, ...).

    Raises:
      ValueError: as ``check_inputs``; no feature axis.
      TypeError: not one array of floating numbers.
    """
    x = check_inputs(x, name=name)
    if not hasattr(x, "ndim"):
        raise TypeError(f"{name} must be one array (N, features), got a {type(x).__name__}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be a floating array, got dtype {x.dtype}; convert it first")
    if x.ndim < 2:
        raise ValueError(
            f"{name} must have shape (N, features), got {x.shape}; for one sample, {name}[None]"
        )
    return x


def _shapes(x: Any, skip: int = 0) -> Any:
    return jax.tree.map(lambda leaf: tuple(leaf.shape[skip:]), x)


def _sizes_of(model: Any) -> tuple[tuple[int, ...], int] | None:
    """The shape of a sample and the number of outputs of a network of ours, None of others.

    A user's attributes may have the same names and mean something else.
    """
    if type(model) in (MLP, Autoencoder):
        return model.widths[:1], model.widths[-1]
    if type(model) in NETWORKS:
        return model.input_shape, model.outputs
    return None


def check_input_shape(model: nnx.Module, x: Any, name: str = "x") -> None:
    """Raises ValueError on inputs that a network of ours does not take; others say so when run."""
    sizes = _sizes_of(model)
    if sizes is None:
        return
    if not hasattr(x, "shape"):
        raise ValueError(f"the model takes one array, got {name} as a {type(x).__name__} of arrays")
    wanted, shape = sizes[0], tuple(x.shape)
    if shape[1:] == wanted:
        return
    if shape == wanted:
        raise ValueError(
            f"{name} must have shape (N, features), got {shape}; for one sample, {name}[None]"
        )
    raise ValueError(
        f"the model takes {'inputs' if len(wanted) == 1 else 'images'} of shape "
        f"(N, {', '.join(map(str, wanted))}), got {name} of {shape}"
    )


def check_model_inputs(model: nnx.Module, x: Any, name: str = "x") -> Any:
    """Inputs that a model takes, and its parameters, after every check that needs no forward pass.

    Raises:
      ValueError: as ``check_inputs``; a shape that does not fit, NaN or infinity in parameters.
      TypeError: as ``check_inputs``.
    """
    x = check_inputs(x, model, name)
    check_input_shape(model, x, name)
    for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(model, nnx.Param)):
        where = "the parameters at " + jax.tree_util.keystr(path)
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(f"{where} are a shape without values, as nnx.eval_shape makes them")
        check_finite(leaf, where)
    return x


def check_batch(
    model: nnx.Module, x: Any, y: Any, loss: AnyLoss, weights: Any = None
) -> tuple[Any, Any]:
    """The batch as arrays, after every check that needs no forward pass.

    Targets whose weight is 0 may have any values.

    Raises:
      ValueError: shapes that do not fit, an empty batch, NaN or infinity in data or parameters,
        targets of the wrong form.
      TypeError: inputs that are no numbers, targets of a dtype that the loss does not take, or no
        model.
    """
    x = check_model_inputs(model, x)
    n, sizes = batch_size(x), _sizes_of(model)
    y = checked_targets(loss, y, n)
    if sizes is not None and isinstance(loss, Loss):
        check_shape(loss, y, (n, sizes[1]), f"the model has {sizes[1]} outputs")
    check_all_values(loss, y, weights)
    return x, y


def check_needed_batch(
    model: nnx.Module, x: Any, y: Any, weights: Any, loss: AnyLoss, needed: bool
) -> tuple[Any, Any, Any]:
    """As ``check_batch``; targets that are not needed are not looked at, and None comes of them.

    Raises:
      ValueError, TypeError: as ``check_batch`` and ``check_weights``.
    """
    x = check_model_inputs(model, x)
    weights = checked_weights(loss, weights, batch_size(x))
    return x, check_batch(model, x, y, loss, weights)[1] if needed else None, weights


def check_arrays(model: nnx.Module, fisher: Fisher, batch: Batch) -> Batch:
    """The arrays of a step, after every check that needs no forward pass.

    Raises:
      ValueError, TypeError: as ``check_batch`` and ``check_fisher_batch``.
    """
    x, y, weights = check_needed_batch(
        model, batch.x, batch.y, batch.weights, fisher.loss, fisher.needs_targets(batch)
    )
    return check_fisher_batch(fisher, batch._replace(x=x, y=y, weights=weights))


def check_fisher_batch(fisher: Fisher, batch: Batch) -> Batch:
    """With the batch of the Fisher as arrays, where it has one of its own.

    Raises:
      ValueError: targets where none are needed, or none where they are; shapes that do not fit;
        NaN or infinity.
      TypeError: inputs that are no numbers, or targets that are not floating.
    """
    x, y, _, fisher_x, fisher_y, fisher_weights = batch[:6]
    if fisher_x is None:
        for name, value in (("fisher_y", fisher_y), ("fisher_weights", fisher_weights)):
            if value is not None:
                raise ValueError(f"{name} belongs to a fisher_x: pass both, or neither")
        return batch
    fisher_x = check_inputs(fisher_x, name="fisher_x")
    if _shapes(fisher_x, 1) != _shapes(x, 1):
        raise ValueError(
            f"fisher_x must have shape (N', ...) like x of {_shapes(x)}, got {_shapes(fisher_x)}"
        )
    n = batch_size(fisher_x)
    fisher_weights = checked_weights(fisher.loss, fisher_weights, n, "fisher_weights")
    batch = batch._replace(fisher_x=fisher_x, fisher_weights=fisher_weights)
    if not fisher.made_of_targets:
        if fisher_y is not None:
            raise ValueError(
                f'fisher="{fisher.kind}" takes no targets from data: pass fisher_y for fisher='
                '"empirical" and "improved" only'
            )
        return batch
    if fisher_y is None:
        raise ValueError(f'fisher="{fisher.kind}" is made of targets: pass fisher_y with fisher_x')
    fisher_y = checked_targets(fisher.loss, fisher_y, n, "fisher_y")
    if y is not None:
        for own, target in zip(jax.tree.leaves(fisher_y), jax.tree.leaves(y), strict=True):
            if own.shape[1:] != target.shape[1:]:
                raise ValueError(
                    f"fisher_y must be targets of shape {(n, *target.shape[1:])} like y, got "
                    f"{own.dtype} of {own.shape}"
                )
    check_all_values(fisher.loss, fisher_y, fisher_weights, "fisher_y")
    return batch._replace(fisher_y=fisher_y)


def check_microbatches(microbatches: object, *batches: Any) -> int:
    """The number of parts; raises ValueError unless positive and a divisor of every batch."""
    parts = check_integer("microbatches", microbatches, 1)
    for size in (batch_size(batch) for batch in batches if batch is not None):
        if size % parts:
            near = next(d for d in range(min(parts, size), 0, -1) if size % d == 0)
            raise ValueError(
                f"a batch of {size} samples has no {parts} equal parts; use "
                f"microbatches={near} or another batch size"
            )
    return parts


def check_momentum(momentum: object, structure: Structure, damping: object) -> SPRING | None:
    """Settings of momentum; raises ValueError or TypeError where projected momentum is no use.

    A number is mu alone, without a bias correction, and 0 is none. The structure must solve blocks
    of the Fisher itself, with a damping that is positive and does not adapt.
    """
    if not isinstance(momentum, SPRING):
        decay = check_number("momentum", momentum, positive=False)
        if decay >= 1:
            raise ValueError(f"momentum must be below 1, got {momentum!r}")
        if decay == 0:
            return None
        momentum = SPRING(decay, bias_correction=False)
    if not structure.plain.takes_momentum:
        raise TypeError(
            "momentum= projects the previous step by blocks of the Fisher itself, which "
            f"ng.Exact() and ng.BlockDiagonal() have; behind {structure.name} put optax.trace: "
            "optax.chain(ng.natural_gradient_descent(...), optax.trace(decay))"
        )
    if isinstance(damping, LevenbergMarquardt):
        raise TypeError(
            "ng.LevenbergMarquardt predicts the loss of a step without momentum: give momentum= a "
            "number, a schedule or an ng.RelativeDamping as damping"
        )
    if is_zero(damping):
        raise ValueError("momentum= needs a positive damping, which weighs the previous step")
    return momentum
