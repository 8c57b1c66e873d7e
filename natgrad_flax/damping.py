"""How much is added to the diagonal of the Fisher.

One normalisation everywhere: rho is added to F = (1/N) sum_n J_n^T H_n J_n, so it adds N rho to an
unnormalised Gram matrix (Karakida & Osawa 2020, Eq. 8).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.arguments.scalars import as_number, check_number, keep_plain

TINY = float(jnp.finfo(jnp.float32).tiny)
"""What adaptive damping, which is kept in float32, can be at least without counting as 0."""


class SmallDampingWarning(UserWarning):
    """A damping is so small that rounding may decide the step.

    Beside an eigenvalue lambda of the Fisher, eps lambda / damping of a step may be rounding; the
    message names a damping that is large enough in this precision.

    Example:
      >>> import warnings, jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0))
      >>> x, y = jnp.eye(4), jnp.ones((4, 1))
      >>> options = {"structure": ng.Exact(), "loss": ng.MeanSquaredError()}
      >>> with warnings.catch_warnings(record=True) as caught:
      ...     warnings.simplefilter("always", ng.SmallDampingWarning)
      ...     step = ng.natural_gradient(model, x, y, damping=1e-9, **options)
      >>> str(caught[0].message).split(":")[0]
      'a damping of 1e-09 is below 100 times the rounding of float32'
    """


@dataclass(frozen=True)
class RelativeDamping:
    """Damping relative to the mean diagonal of the Gram matrices.

    N rho_l = ratio times the mean diagonal of the Gram blocks that the structure inverts in layer
    l (one common value where the structure couples layers). Invariant to scalings of network and
    data, which a fixed number is not. The mean diagonal counts as at least eps^2 of its dtype
    (1.4e-14 in float32), as derivatives below eps count as zero: at the end of training, or in a
    dead layer, the Fisher vanishes, and with a damping that vanishes, too, the step would be
    rounding over rounding. With the floor it tends to zero with the gradient.

    Args:
      ratio: positive; 1e-3 to 1e-4 suits the unit-wise Fisher.

    Raises:
      ValueError: the ratio is not positive and finite.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model, y = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0)), jnp.ones((4, 1))
      >>> options = {"structure": ng.Exact(), "loss": ng.MeanSquaredError()}
      >>> damping = ng.RelativeDamping(1e-3)
      >>> step = ng.natural_gradient(model, jnp.eye(4), y, damping=damping, **options)
      >>> F = ng.fisher(model, jnp.eye(4), **options)
      >>> rho = F.to_dense(damping)[0, 0] - F.to_dense()[0, 0]
      >>> # N rho; tr(K) / N = tr(F)
      >>> bool(jnp.isclose(4 * rho, 1e-3 * F.trace(), rtol=1e-2))
      True
    """

    ratio: float

    def __post_init__(self) -> None:
        check_number("ratio of RelativeDamping", self.ratio, positive=True)
        keep_plain(self)

    def times(self, scale: Array) -> Array:
        """rho = ratio times the larger of eps^2 and a mean diagonal of Gram blocks over N."""
        return self.ratio * jnp.maximum(scale, float(jnp.finfo(scale.dtype).eps) ** 2)


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Damping adapted to how well the quadratic model predicts the loss (Bernacchia 2018, Eq. 21).

    After each step the reduction ratio (L_new - L_old) / predicted is taken on the same batch. A
    ratio below ``lower`` multiplies the damping by ``increase``, one above ``upper`` by
    ``decrease``. It costs one more forward pass a step.

    Args:
      initial: the first damping.
      increase: factor > 1 for a poor prediction.
      decrease: factor < 1 for a good one.
      lower: the ratio under which a prediction is poor.
      upper: the ratio over which it is good.
      minimum: the damping never falls below this.
      maximum: it never rises above this: at the rounding of the loss every prediction is poor.

    Raises:
      ValueError: a constant is out of range.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0))
      >>> x, y = jnp.eye(4), jnp.ones((4, 1))
      >>> options = {"structure": ng.Exact(), "loss": ng.MeanSquaredError()}
      >>> damping = ng.LevenbergMarquardt(initial=0.3)
      >>> tx = ng.natural_gradient_descent(1.0, damping=damping, **options)
      >>> params = nnx.state(model, nnx.Param)
      >>> updates, state = tx.update(
      ...     params, tx.init(params), params, module=model, x=x, y=y
      ... )
      >>> round(float(state.damping), 3)  # the loss fell as predicted
      0.2
    """

    initial: float = 1.0
    increase: float = 1.5
    decrease: float = 2.0 / 3.0
    lower: float = 0.25
    upper: float = 0.75
    minimum: float = 1e-12
    maximum: float = 1e6

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_number(
                f"{field.name} of LevenbergMarquardt", getattr(self, field.name), positive=True
            )
        keep_plain(self)
        ordered = 0 < self.decrease < 1 < self.increase and 0 < self.lower < self.upper
        within = TINY <= self.minimum <= self.initial <= self.maximum < math.inf
        if not (ordered and within):
            raise ValueError(
                "LevenbergMarquardt needs 0 < decrease < 1 < increase, 0 < lower < upper and "
                f"{TINY:.2g} <= minimum <= initial <= maximum, finite, got {self}"
            )

    def adapt(self, damping: Array, actual: Array, predicted: Array) -> Array:
        """The damping for the next step.

        Args:
          damping: the damping of this step.
          actual: L_new - L_old on the batch of this step.
          predicted: the change that the quadratic model predicted, negative.
        """
        ratio = actual / predicted
        factor = jnp.where(
            ratio > self.upper, self.decrease, jnp.where(ratio < self.lower, self.increase, 1.0)
        )
        # a step that blew up tells nothing but that the damping was too small
        factor = jnp.where(jnp.isfinite(ratio), factor, self.increase)
        return jnp.clip(damping * factor.astype(damping.dtype), self.minimum, self.maximum)


def is_zero(damping: object) -> bool:
    """Whether the damping is the number 0, known before tracing."""
    return as_number(damping) == 0


def damping_as(damping: Array | float, dtype: Any) -> Array | float:
    """A damping for arrays of a dtype; numbers of Python fit all."""
    return damping if type(damping) in (int, float) else jnp.asarray(damping, dtype)


def per_layer(damping: Array | float, num_layers: int) -> list[Array | float]:
    """One damping a layer, from a number or an array of one entry a layer."""
    if jnp.ndim(damping) == 0:
        return [damping] * num_layers
    values = jnp.asarray(damping)
    if len(values) != num_layers:
        raise ValueError(
            f"a damping of shape {values.shape} has no entry for each of {num_layers} layers"
        )
    return [values[index] for index in range(num_layers)]


def check_damping_shape(damping: Any, scale: tuple[int, ...], name: str, depth: int) -> None:
    """Raises ValueError on an array that is not one number and has not the shape of the scale.

    Args:
      damping: an array.
      scale: the shape of the structure's ``damping_scale``, of which the first axis may do.
      name: of the structure.
      depth: the number of layers.
    """
    shape = np.shape(damping)
    if shape in [scale[:axes] for axes in range(len(scale) + 1)]:
        return
    wanted = ["one number", f"({depth},), one a layer", f"{scale}, one a factor"]
    raise ValueError(
        f"the damping of {name} must be {' or '.join(wanted[: len(scale) + 1])}, got an array of "
        f"shape {shape}"
    )


def warn_of_rounding(damping: object, dtype: jnp.dtype, margin: float = 1.0) -> None:
    """Warns of a concrete positive damping that is lost in the rounding of a precision.

    Args:
      damping: a number or an array of numbers.
      dtype: of the solves.
      margin: how many times the unit roundoff a damping must be; 1 suits one that is added to a
        Gram matrix, of what is divided by a damping each step loses more.

    Warns:
      SmallDampingWarning: with what of a step may be rounding.
    """
    if isinstance(damping, jax.core.Tracer):
        return
    values = np.asarray(damping, np.float64)
    least = float(values[values > 0].min(initial=np.inf))
    roundoff = float(jnp.finfo(dtype).eps) / 2
    if least < margin * roundoff:
        times = "" if margin == 1 else f"{margin:g} times "
        warnings.warn(
            f"a damping of {least:.2g} is below {times}the rounding of {dtype}: beside an "
            f"eigenvalue lambda of the Fisher, {roundoff / least:.0e} lambda of the step may be "
            f"rounding; use {margin * roundoff:.0e} or more, ng.RelativeDamping, the number 0 for "
            "the pseudo-inverse, or float64",
            SmallDampingWarning,
            stacklevel=4,
        )


def of_block(damping: Array | float) -> Array | float:
    """The damping of a layer's own Fisher block, where both Kronecker factors may have one each."""
    return damping if jnp.ndim(damping) == 0 else jnp.asarray(damping)[0]


def by_traces(damping: Array | float, mean_a: Array, mean_b: Array) -> tuple[Array, Array]:
    """(pi sqrt(rho), sqrt(rho) / pi) for both factors (Martens & Grosse 2015, Section 6.3).

    Args:
      damping: rho.
      mean_a: the mean diagonal of A, with pi^2 = mean_a / mean_b; pi is 1 where one of them is 0.
      mean_b: that of B.
    """
    usable = (mean_a > 0) & (mean_b > 0)
    pi = jnp.where(usable, jnp.sqrt(mean_a / jnp.where(usable, mean_b, 1)), 1)
    root = jnp.sqrt(jnp.asarray(damping, mean_a.dtype))
    return pi * root, root / pi


def as_pair(damping: Array | float) -> tuple[Array | float, Array | float]:
    """What is added to both factors of a Kronecker product; a damping of shape (2,) is the pair."""
    if jnp.ndim(damping) == 1:
        pair = jnp.asarray(damping)
        return pair[0], pair[1]
    return damping, damping
