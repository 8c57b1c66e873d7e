"""What a loss makes of outputs that have positions, and of weights.

The loss of outputs (N, ..., C) is sum_nt w_nt l(f_nt, y_nt) / W over samples n and positions t,
with W the sum of all weights. In the conventions of all structures, gradient J^T r / N and Fisher
J^T H J / N, its residual is (N w_nt / W) r_nt and its factor sqrt(N w_nt / W) R_nt. So a damping is
added to the Fisher of a mean over weights, however many positions a sample has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.losses.base import Loss
from natgrad_flax.losses.targets import fitted


@dataclass(frozen=True)
class OutputTerms:
    """Residual, factor and drawn targets of a loss as cotangents of the outputs.

    Attributes:
      loss: the loss.
      outputs: f, shape (N, ..., C); N may be those of a microbatch.
      targets: y as ``fitted`` has them, None where nothing is made of them.
      weights: (N, ...), as ``relative`` has them: their mean over the whole batch is 1. None for
        the plain mean.
    """

    loss: Loss
    outputs: Array
    targets: Array | None
    weights: Array | None

    @classmethod
    def of(
        cls, loss: Loss, outputs: Array, targets: Array | None, weights: Array | None
    ) -> OutputTerms:
        """With targets and weights that fit the outputs.

        Raises:
          ValueError: targets or weights of another shape.
        """
        places = outputs.shape[:-1]
        if targets is not None:
            targets = fitted(loss, targets, outputs)
        if weights is not None:
            if weights.shape != places[: weights.ndim]:
                raise ValueError(
                    f"the model returns {outputs.shape}, but weights have shape {weights.shape}; "
                    f"they must have shape {places[:1]}"
                    + (f", or {places} for one a position" if len(places) > 1 else "")
                )
            weights = weights.astype(outputs.dtype)
            weights = weights.reshape(*weights.shape, *[1] * (len(places) - weights.ndim))
            weights = jnp.broadcast_to(weights, places).reshape(places[0], -1)
        return cls(loss, outputs, targets, weights)

    @property
    def plain(self) -> bool:
        """Whether all of it is what the methods of the loss give."""
        return self.outputs.ndim == 2 and self.weights is None

    @property
    def num_positions(self) -> int:
        """T, those of one sample."""
        return math.prod(self.outputs.shape[1:-1])

    def residual(self) -> Array:
        """(N w / W) r, shape (N, ..., C)."""
        rows, targets = self._rows()
        assert targets is not None
        residual = self.loss.residual(rows, targets)
        return self._times(residual, self._scale()).reshape(self.outputs.shape)

    def directions(self) -> Array:
        """The columns of sqrt(N w / W) R as output directions, shape (N, T S, ..., C)."""
        rows, targets = self._rows()
        given = (rows, targets) if self.loss.needs_targets else (rows,)
        factor = jnp.swapaxes(self.loss.factor(*given), 1, 2)
        if self.plain:
            return factor
        factor = self._times(factor, self._root())
        n, t, (s, c) = len(self.outputs), self.num_positions, factor.shape[1:]
        blocks = factor.reshape(n, t, s, 1, c)
        if t > 1:
            blocks = blocks * jnp.eye(t, dtype=factor.dtype)[:, None, :, None]
        return blocks.reshape(n, t * s, *self.outputs.shape[1:])

    def coefficients(self) -> Array:
        """w with which the directions sum to the residual, shape (N, T S)."""
        rows, targets = self._rows()
        assert targets is not None
        found = self.loss.coefficients(rows, targets)
        return self._times(found, self._root()).reshape(len(self.outputs), -1)

    def slope(self, vectors: Array) -> Array:
        """The mean over samples of (N w / W) r . v for vectors v (N, ..., C), a scalar."""
        rows, targets = self._rows()
        assert targets is not None
        return self._mean(self.loss.residual(rows, targets) * vectors.reshape(rows.shape))

    def curvature(self, left: Array, right: Array) -> Array:
        """The mean over samples of (N w / W) v^T H u for vectors (N, ..., C), a scalar."""
        rows, targets = self._rows()
        product = self.loss.fisher_product(rows, right.reshape(rows.shape), targets)
        return self._mean(left.reshape(rows.shape) * product)

    def _mean(self, rows: Array) -> Array:
        return jnp.sum(self._times(rows, self._scale())) / len(self.outputs)

    def drawn(self, key: Array, draws: int, first: Array | int, size: int) -> Array:
        """Residuals of drawn targets as output directions, shape (N, draws, ..., C).

        One draw of a sample is that of all of its positions, independent of each other. Targets
        depend on the outputs of a sample and on its place in the batch, not on microbatches.

        Args:
          key: of the whole batch.
          draws: targets a sample.
          first: the number of the first sample in the whole batch.
          size: samples of the whole batch.
        """
        if self.outputs.ndim == 2:
            drawn = self._drawn_rows(key, draws, first, size)
            return drawn if self.plain else self._times(drawn, self._root())
        n, *shape = self.outputs.shape

        def one(number: Array, outputs: Array) -> Array:
            own = jax.random.fold_in(key, number)
            rows = self.loss.sample(own, outputs.reshape(-1, shape[-1]), draws)
            return jnp.moveaxis(rows, 2, 0)

        found = jax.vmap(one)(first + jnp.arange(n), self.outputs)
        root = self._root().reshape(n, 1, -1, 1)
        return jnp.where(root > 0, root * found, 0).reshape(n, draws, *shape)

    def check_curvature(self) -> None:
        """Raises ValueError where H is not positive semi-definite; of concrete arrays."""
        rows, targets = self._rows()
        assert targets is not None
        if self.weights is not None:
            counted = np.asarray(self.weights).reshape(-1) > 0
            rows, targets = rows[counted], targets[counted]
        self.loss.check_curvature(rows, targets)

    def _drawn_rows(self, key: Array, draws: int, first: Array | int, size: int) -> Array:
        outputs = self.outputs
        if len(outputs) == size:
            return jnp.swapaxes(self.loss.sample(key, outputs, draws), 1, 2)
        whole = jnp.zeros((size, outputs.shape[1]), outputs.dtype)
        whole = jax.lax.dynamic_update_slice_in_dim(whole, outputs, first, 0)
        drawn = jnp.swapaxes(self.loss.sample(key, whole, draws), 1, 2)
        return jax.lax.dynamic_slice_in_dim(drawn, first, len(outputs))

    def _rows(self) -> tuple[Array, Array | None]:
        """Outputs (N T, C) and their targets."""
        if self.outputs.ndim == 2:
            return self.outputs, self.targets
        places = self.outputs.ndim - 1
        targets = self.targets
        if targets is not None:
            targets = targets.reshape(-1, *targets.shape[places:])
        return self.outputs.reshape(-1, self.outputs.shape[-1]), targets

    def _scale(self) -> Array:
        """N w / W of every row, (N T,) or one number."""
        if self.weights is None:
            return jnp.full((), 1 / self.num_positions, self.outputs.dtype)
        return self.weights.reshape(-1) / self.num_positions

    def _root(self) -> Array:
        """The square root of ``_scale``, (N T,)."""
        return jnp.broadcast_to(jnp.sqrt(self._scale()), math.prod(self.outputs.shape[:-1]))

    def _times(self, rows: Array, scale: Array) -> Array:
        """Rows (N T, ...) times a scale; what is masked may be NaN."""
        if self.plain:
            return rows
        scale = scale.reshape(*scale.shape, *[1] * (rows.ndim - 1)) if scale.ndim else scale
        return jnp.where(scale > 0, scale * rows, 0)


def columns_in_range(loss: Loss, outputs: Array) -> Array | None:
    """``Loss.columns_in_range`` of outputs (N, ..., C), shape (N, T S)."""
    found = loss.columns_in_range(outputs.reshape(-1, outputs.shape[-1]))
    return None if found is None else found.reshape(len(outputs), -1)
