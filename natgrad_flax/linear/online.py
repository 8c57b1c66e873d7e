"""The online natural gradient of Bernacchia et al. (2018) as an optax transformation."""

from __future__ import annotations

from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from natgrad_flax.arguments.arrays import solve_dtype
from natgrad_flax.arguments.scalars import check_integer, check_seed
from natgrad_flax.damping import LevenbergMarquardt, by_traces, is_zero
from natgrad_flax.linalg.dense import full_products
from natgrad_flax.linear.deep_linear_forms import map_by_shape, sandwich
from natgrad_flax.linear.deep_linear_optimizer import check_settings
from natgrad_flax.linear.inverse_moments import DirectInverse, InverseMoment
from natgrad_flax.losses import Loss, MeanSquaredError, check_loss
from natgrad_flax.optimizer.checks import check_normal
from natgrad_flax.optimizer.transformation import (
    NaturalGradientState,
    Step,
    change_of_loss,
    transformation,
)
from natgrad_flax.optimizer.trees import leaf_names
from natgrad_flax.signals.base import matrix_of
from natgrad_flax.signals.dense import DenseSignals
from natgrad_flax.signals.fisher import fisher_signals
from natgrad_flax.signals.independence import check_samples_alone
from natgrad_flax.signals.model import dense_layers


def online_natural_gradient_descent(
    learning_rate: optax.ScalarOrSchedule = 1.0,
    *,
    loss: Loss | None = None,
    damping: float | optax.Schedule | LevenbergMarquardt | None = None,
    mc_samples: int = 1,
    inverse: InverseMoment | None = None,
    output_variance: float = 1.0,
    split: Literal["plain", "pi"] = "plain",
    seed: int = 0,
    check_samples: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """The online algorithm of Bernacchia et al. (2018, Section 5), for any network.

    A step of layer i is (alpha / L) (Lambda_i + sqrt(lambda) I)^{-1} (-dL/dW_i)
    (Lambda~_i + sqrt(lambda) I)^{-1} (Eq. 20), with the second moment Lambda_i of its inputs on the
    batch, and Lambda~_i of errors back-propagated from ``mc_samples`` targets a sample that are
    drawn from the model. For linear networks it estimates the exact natural gradient; for others
    it is the paper's extension. Biases are one more row of W_i. ``update`` needs the batch:
    ``module=model, x=x, y=y``. L counts the layers that move: those that the tree of updates has.

    Args:
      learning_rate: alpha, a number or a schedule over steps.
      loss: the loss; None means ng.MeanSquaredError().
      damping: lambda: a number, a schedule, or by Eq. 21; None means ng.LevenbergMarquardt(), the
        paper's choice.
      mc_samples: K, the sampled backward passes a step.
      inverse: how second moments are inverted; None means DirectInverse().
      output_variance: as in ``deep_linear_descent``.
      split: "plain" adds sqrt(lambda) to both moments (Eq. 20); "pi" adds pi sqrt(lambda) to
        Lambda_i and sqrt(lambda) / pi to Lambda~_i, with pi^2 the ratio of their mean diagonals
        (Martens & Grosse 2015), as the paper proposes in its outlook.
      seed: of the drawn targets.
      check_samples: as in ``ng.natural_gradient``.

    Returns:
      An optax transformation with the extra arguments ``module``, ``x`` (N, n_0), ``y`` (N, n_L).

    Raises:
      ValueError, TypeError: bad settings here, a bad batch or a layer without signals in
        ``update``.

    Example:
      >>> import jax, jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> from natgrad_flax import linear
      >>> model = ng.MLP((3, 3, 3), activation="tanh", rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> y, loss = jnp.sin(x), ng.MeanSquaredError()
      >>> tx = linear.online_natural_gradient_descent(0.5)
      >>> optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
      >>> @nnx.jit
      ... def train_step(model, optimizer):
      ...     value, grads = nnx.value_and_grad(lambda model: loss(model(x), y))(model)
      ...     optimizer.update(model, grads, module=model, x=x, y=y)
      ...     return value
      >>> values = [train_step(model, optimizer) for _ in range(30)]
      >>> bool(values[-1] < values[0] / 10)
      True
    """
    loss = MeanSquaredError() if loss is None else loss
    damping = LevenbergMarquardt() if damping is None else damping
    inverse = DirectInverse() if inverse is None else inverse
    check_loss(loss)
    if not isinstance(inverse, InverseMoment):
        raise TypeError(
            "inverse must be DirectInverse(), MovingInverse() or RandomisedSVD(rank), got "
            f"{inverse!r}"
        )
    mc_samples, seed = check_integer("mc_samples", mc_samples, 1), check_seed(seed)
    learning_rate = check_settings(learning_rate, damping, output_variance)
    if split not in ("plain", "pi") or (split == "pi" and output_variance != 1):
        raise ValueError(
            'split must be "plain" or "pi", and "pi" takes the place of an output_variance other '
            f"than 1, got {split!r} and {output_variance}"
        )
    if is_zero(damping):
        raise ValueError(
            "sampled second moments need a positive damping: the gradient does not lie in their "
            "range; linear networks have deep_linear_descent"
        )

    def init(params: Any) -> Any:
        sizes: dict[str, dict[str | int, Array]] = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            names = leaf_names(path)
            sizes.setdefault(_key(names[:-1]), {})[names[-1]] = leaf
        inverses = {}
        for name, leaves in sizes.items():
            fan_in, units = leaves["kernel"].shape
            dtype = solve_dtype(*(leaf.dtype for leaf in jax.tree.leaves(params)))
            rows = fan_in + ("bias" in leaves)
            inverses[name] = (inverse.init(rows, dtype), inverse.init(units, dtype))
        return inverses

    def compute(
        module: nnx.Module,
        x: Array,
        y: Array,
        rho: Any,
        state: NaturalGradientState,
        key: Array,
        wrt: Any,
    ) -> Step:
        check_normal(rho, x.dtype)
        draw, *keys = jax.random.split(key, 1 + 2 * len(dense_layers(module)))
        signals, residual = fisher_signals(
            module, x, y, loss=loss, fisher="mc", key=draw, num_samples=mc_samples, wrt=wrt
        )
        if check_samples:
            check_samples_alone(module, x)
        if not all(isinstance(layer, DenseSignals) for layer in signals.layers):
            raise ValueError(
                "online_natural_gradient_descent needs every layer to be called once, on one "
                "position a sample; use natural_gradient_descent(structure=ng.KFAC())"
            )
        layers = cast("tuple[DenseSignals, ...]", signals.layers)
        depth, count = len(layers), signals.num_samples
        root = jnp.sqrt(rho).astype(signals.outputs.dtype)

        def shifts(layer: DenseSignals) -> tuple[Array, Array]:
            """What is added to both moments of a layer."""
            if split == "plain":
                return root, output_variance * root
            inputs, errors = (
                jnp.sum(rows**2) / (count * rows.shape[1])
                for rows in (layer.augmented_inputs(), layer.flat_derivatives())
            )
            return by_traces(rho, inputs, errors)

        with full_products():
            down = [
                -matrix_of(layer.local_vjp(residual.cotangent(layer, index))) / count
                for index, layer in enumerate(layers)
            ]
            inverses = {}
            if isinstance(inverse, DirectInverse):
                moves = map_by_shape(
                    lambda item: sandwich(*item),
                    [
                        (
                            layer.augmented_inputs().T @ layer.augmented_inputs() / count,
                            middle,
                            layer.flat_derivatives().T @ layer.flat_derivatives() / count,
                            *shifts(layer),
                        )
                        for layer, middle in zip(layers, down, strict=True)
                    ],
                )
                inverses = state.kept
            else:
                moves = []
                first = state.steps == 0
                for index, (layer, middle) in enumerate(zip(layers, down, strict=True)):
                    kept_in, kept_out = state.kept[_key(layer.path)]
                    shift_in, shift_out = shifts(layer)
                    rows = layer.augmented_inputs() / count**0.5
                    half, kept_in = inverse.solve(
                        kept_in, rows, middle, shift_in, keys[2 * index], first
                    )
                    rows = layer.flat_derivatives() / count**0.5
                    move, kept_out = inverse.solve(
                        kept_out, rows, half.T, shift_out, keys[2 * index + 1], first
                    )
                    moves.append(move.T)
                    inverses[_key(layer.path)] = (kept_in, kept_out)
        steps = [move / depth for move in moves]
        slope = sum((jnp.sum(a * b) for a, b in zip(steps, down, strict=True)), jnp.zeros(()))
        direction = {
            layer.path: layer.update(step) for layer, step in zip(layers, steps, strict=True)
        }

        change = change_of_loss(loss, module, x, y, signals.outputs)
        return Step(direction, lambda: slope, change, inverses)

    return transformation(
        "online_natural_gradient_descent",
        learning_rate,
        damping,
        loss,
        seed,
        compute,
        init,
        accepts=("wrt",),
    )


def _key(path: Any) -> str:
    return ".".join(map(str, path))
