"""Exact natural-gradient descent of deep linear networks as an optax transformation."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from natgrad_flax.arguments.arrays import solve_dtype
from natgrad_flax.arguments.scalars import check_learning_rate, check_number
from natgrad_flax.damping import LevenbergMarquardt, RelativeDamping, is_zero
from natgrad_flax.linalg.dense import full_products
from natgrad_flax.linear.deep_linear_forms import (
    chain,
    damped_form,
    inverse_form,
    whiten,
)
from natgrad_flax.linear.deep_linear_moments import Moments, check_factors, is_square
from natgrad_flax.losses import MeanSquaredError
from natgrad_flax.models import MLP
from natgrad_flax.optimizer.checks import check_array, check_damping, check_normal
from natgrad_flax.optimizer.transformation import NaturalGradientState, Step, transformation
from natgrad_flax.signals.model import Path, dense_layers


def deep_linear_descent(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    damping: float | optax.Schedule | LevenbergMarquardt = 0.0,
    output_variance: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Exact natural-gradient descent of a linear network on the squared error (Eqs. 10, 16, 20).

    ``update`` needs the batch, as in ``ng.natural_gradient_descent``: ``module=model, x=x, y=y``.
    The batch enters through its second moments alone; beyond them a step costs about 10 n^3 flops
    a layer of width n. A learning rate of 1 is one unit of time of the flow; the 1/L is included.
    Undamped, equal widths use inverses of the factors (one that is singular is an error, inside
    ``jit`` NaN) and others pseudo-inverses, by SVD. A product of many random factors is
    singular in float32: damp it.

    Args:
      learning_rate: alpha, a number or a schedule over steps.
      damping: lambda of Eq. 20, whose root is added to the second moments of layer inputs
        and of errors: a number, a schedule over steps, or adapted by Eq. 21
        (``ng.LevenbergMarquardt()``).
      output_variance: variance of the model's outputs: errors have the weight 1 / output_variance,
        which only the damping sees.

    Returns:
      An optax transformation with the extra arguments ``module``, ``x`` (N, n_0), ``y`` (N, n_L).

    Raises:
      ValueError, TypeError: bad settings here; in ``update`` a bad batch, or a module that is not
        a chain of linear layers without biases.

    Example:
      >>> import jax, jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> from natgrad_flax import linear
      >>> model = ng.MLP((3, 3, 3), activation="identity", rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> y = x @ jnp.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
      >>> tx, loss = linear.deep_linear_descent(0.02), ng.MeanSquaredError()
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> @nnx.jit
      ... def train_step(model, optimizer):
      ...     value, grads = nnx.value_and_grad(lambda model: loss(model(x), y))(model)
      ...     optimizer.update(model, grads, module=model, x=x, y=y)
      ...     return value
      >>> values = [train_step(model, optimizer) for _ in range(51)]
      >>> # the flow has exp(-2 t), at t = 50 x 0.02
      >>> round(float(values[50] / values[0]), 2)
      0.13
    """

    @full_products()
    def compute(
        module: nnx.Module, x: Array, y: Array, rho: Any, state: NaturalGradientState, key: Array
    ) -> Step:
        x, layers = check_array(x), linear_layers(module)
        check_normal(rho, x.dtype)
        scales = [getattr(layer, "weight_scale", 1.0) for layer in layers.values()]
        kernels = [layer.kernel[...] for layer in layers.values()]  # type: ignore[attr-defined]
        dtype = solve_dtype(x.dtype, *(kernel.dtype for kernel in kernels))
        x, y, *kernels = [array.astype(dtype) for array in (x, y, *kernels)]
        weights = [scale * kernel for scale, kernel in zip(scales, kernels, strict=True)]
        before, after, product = chain(weights)
        inputs, residual = x.T @ x / len(x), x.T @ (y - x @ product) / len(x)
        if is_zero(rho):
            moves = _undamped(weights, inputs, residual)
            steps = [move / (s * len(weights)) for move, s in zip(moves, scales, strict=True)]
            slope = jnp.zeros(())
        else:
            root = jnp.sqrt(rho).astype(x.dtype)
            scaled = [scale * a for scale, a in zip(scales, before, strict=True)]
            noise = jnp.eye(y.shape[1], dtype=x.dtype)
            moves, slope = damped_form(
                scaled, after, inputs, residual, noise, root, output_variance * root
            )
            steps, slope = [move / len(weights) for move in moves], slope / len(weights)

        def change(rate: Array | float, step: Any) -> Array:
            del step
            moved = [w + rate * s * d for w, s, d in zip(weights, scales, steps, strict=True)]
            difference = chain(moved)[2] - product
            return jnp.sum(difference * (inputs @ difference / 2 - residual))

        direction = {path: {"kernel": step} for path, step in zip(layers, steps, strict=True)}
        return Step(direction, lambda: slope, change)

    learning_rate = check_settings(learning_rate, damping, output_variance)
    return transformation(
        "deep_linear_descent", learning_rate, damping, MeanSquaredError(), 0, compute
    )


def _undamped(weights: list[Array], inputs: Array, residual: Array) -> list[Array]:
    """L times the descent direction of Eq. 16, or of Eq. 10 with pseudo-inverses."""
    if is_square(weights):
        check_factors(weights)
        return list(inverse_form(jnp.stack(weights), inputs, residual))
    noise = jnp.eye(residual.shape[1], dtype=residual.dtype)
    cross = residual + inputs @ chain(weights)[2]
    net = whiten(weights, Moments(inputs, cross, noise))
    return [
        jnp.linalg.pinv(a) @ net.residual @ jnp.linalg.pinv(b)
        for a, b in zip(net.before, net.after, strict=True)
    ]


def linear_layers(module: nnx.Module) -> dict[Path, nnx.Module]:
    """The layers of a linear network in forward order, by path.

    Raises:
      TypeError: not an ng.MLP or nnx.Sequential, or another layer with parameters.
      ValueError: an activation or a bias.
    """
    if not isinstance(module, (MLP, nnx.Sequential)):
        raise TypeError(
            "deep_linear_descent takes ng.MLP(..., activation='identity') or an nnx.Sequential of "
            f"linear layers, got {type(module).__name__}; use online_natural_gradient_descent"
        )
    if isinstance(module, MLP) and module.activation != "identity":
        raise ValueError(
            f"deep_linear_descent needs a linear network, got activation={module.activation!r}; "
            "use online_natural_gradient_descent"
        )
    known = dense_layers(module)
    layers = {("layers", index): layer for index, layer in enumerate(module.layers)}
    for path, layer in layers.items():
        if path not in known:
            raise TypeError(
                f"deep_linear_descent needs linear layers only, got {layer!r} at layer "
                f"{path[1] + 1}; use online_natural_gradient_descent"
            )
        if layer.bias is not None:  # type: ignore[attr-defined]
            raise ValueError(
                f"layer {path[1] + 1} has a bias, which deep_linear_descent does not take: centre "
                "the data, or use online_natural_gradient_descent"
            )
    return layers  # type: ignore[return-value]


def check_settings(learning_rate: Any, damping: Any, output_variance: float) -> Any:
    """The learning rate; raises TypeError or ValueError on settings out of range."""
    check_damping(damping)
    if isinstance(damping, RelativeDamping) or np.ndim(damping):
        raise TypeError("damping must be a number, a schedule or ng.LevenbergMarquardt() here")
    check_number("output_variance", output_variance, positive=True)
    return check_learning_rate(learning_rate, schedule=True)
