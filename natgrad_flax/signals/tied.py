"""Signals of weights that are used as they stand and transposed: tied embeddings, autoencoders."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from natgrad_flax.linalg.dense import reciprocal
from natgrad_flax.signals.base import LayerUpdate
from natgrad_flax.signals.lookup import LookupSignals, OneHot
from natgrad_flax.signals.shared import SharedSignals, Sharing


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs", "derivatives", "row_weights", "turned"],
    meta_fields=["bias_scale", "path", "kernel_form", "bias_form"],
)
@dataclass(frozen=True)
class TiedSignals(SharedSignals):
    """Signals of weights W (K, M) of two uses, u_t = a_t W at T positions and v_t = h_t W^T at T'.

    J[(n,s), (k,i)] = sum_t a[n,t,k] D[n,s,t,i] + sum_t E[n,s,t,k] h[n,t,i]. Of a tied embedding a
    is one-hot, h what is read out and E the derivative with respect to the logits. Gram matrices
    come from pairs of positions of one use and of both, sum_tt' (a_t . E'_t') (D_t . h'_t'), where
    a one-hot a takes an entry; with them nothing has the size N S K M. ``squares`` forms one sample
    at a time.

    A cotangent is (N, T M + T' K): D of all positions, and E of all.

    The sum of the Kronecker products A_1 (x) B_1 and A_2 (x) B_2 that K-FAC has for the two uses,
    each as if it were a layer of its own (A_2 made of E and B_2 of h), is none. In its place stands
    (p_1 A_1 / tr A_1 + p_2 A_2 / tr A_2) (x) (p_1 B_1 / tr B_1 + p_2 B_2 / tr B_2), times
    t_1 + t_2, with t = tr A tr B and p proportional to sqrt(t). It has the trace of the sum. Of all
    (x A_1 + y A_2) (x) (B_1 / x + B_2 / y), none of which is less than the sum, it is up to a
    factor the one of least trace, as pi is chosen for a damping (Martens & Grosse 2015, Section
    6.3). Two uses that are alike have the factors of one layer with the positions of both. Of
    one-hot inputs A_1 is a diagonal, and of A_2 the diagonal is taken.

    Attributes:
      inputs: a, shape (N, T, 1, K), or ``OneHot``.
      derivatives: D, shape (N, S, T, 1, M).
      bias_scale: None.
      row_weights: as in ``SharedSignals``, of the positions of the first use.
      turned: the second use as a layer with weights W^T: h (N, T', 1, M) and E (N, S, T', 1, K).
    """

    inputs: Any
    turned: Any = None

    @property
    def direct(self) -> SharedSignals:
        """The first use alone."""
        kind = LookupSignals if isinstance(self.inputs, OneHot) else SharedSignals
        rest = (None, self.path, self.kernel_form, None, self.row_weights)
        return kind(self.inputs, self.derivatives, *rest)

    @property
    def num_positions(self) -> int:
        """T + T'."""
        return self.inputs.shape[1] + self.turned.num_positions

    def take_directions(self, start: int, stop: int) -> TiedSignals:
        """The same signals with some of the output directions only."""
        turned = self.turned.take_directions(start, stop)
        return dataclasses.replace(super().take_directions(start, stop), turned=turned)

    def mix_directions(self, factor: Array) -> TiedSignals:
        """The same layer with combinations of its output directions, R of shape (N, S, S')."""
        derivatives = self.direct.mix_directions(factor).derivatives
        turned = self.turned.mix_directions(factor)
        return dataclasses.replace(self, derivatives=derivatives, turned=turned)

    def weighed(self, weights: Array) -> TiedSignals:
        """See ``SharedSignals.weighed``; each use by itself."""
        own, turned = self.direct.weighed(weights), self.turned.weighed(weights)
        return dataclasses.replace(self, row_weights=own.row_weights, turned=turned)

    def in_basis(self, left: Array | None, right: Array) -> TiedSignals:
        """The signals whose Jacobians are U^T J V.

        Args:
          left: U, shape (K, r); None for the identity.
          right: V, shape (M, r').
        """
        inputs, read = self.inputs, self.turned.derivatives
        if left is not None:
            inputs = jnp.moveaxis(_products(left.T, self._inputs), 0, 2)[:, :, None]
            read = read @ left
        turned = dataclasses.replace(
            self.turned, inputs=self.turned.inputs @ right, derivatives=read
        )
        derivatives = self.derivatives @ right
        return dataclasses.replace(self, inputs=inputs, derivatives=derivatives, turned=turned)

    def jacobian(self) -> Array:
        """J_l as (N, S, K, M)."""
        return self.direct.jacobian() + self.turned.jacobian().swapaxes(2, 3)

    def pairs_are_cheaper(self, other: SharedSignals | None = None) -> bool:
        """Whether the pairs of positions cost less for both uses."""
        second = (None, None) if other is None else (other.direct, other.turned)  # type: ignore[attr-defined]
        pairs = zip((self.direct, self.turned), second, strict=True)
        return all(own.pairs_are_cheaper(one) for own, one in pairs)

    def gram(self, other: Any = None) -> Array:
        """J_l J'_l^T, shape (N S, N' S')."""
        if not self.pairs_are_cheaper(other):
            return self.explicit().gram(None if other is None else other.explicit())
        if other is None:
            both = self._crossed(self)
            return self.direct.gram() + self.turned.gram() + both + both.T
        apart = self.direct.gram(other.direct) + self.turned.gram(other.turned)
        return apart + self._crossed(other) + other._crossed(self).T

    def _crossed(self, other: TiedSignals) -> Array:
        """The first use here times the second one there, shape (N S, N' S')."""
        taken = _products(other.turned.derivatives[:, :, :, 0], self._inputs)
        units = _products(self.derivatives[:, :, :, 0], other.turned.inputs[:, :, 0])
        gram = jnp.einsum("prunt,nstpu->nspr", taken, units)
        return gram.reshape(self.num_samples * self.num_directions, -1)

    @property
    def _inputs(self) -> Array | OneHot:
        """a without its axis of groups."""
        return self.inputs if isinstance(self.inputs, OneHot) else self.inputs[:, :, 0]

    def gram_norms(self) -> Array:
        """The diagonal of ``gram``, shape (N, S); by pairs of positions of one sample."""

        def crossed(inputs: Any, derivatives: Array, read: Array, units: Array) -> Array:
            taken, met = _products(read, inputs), _products(derivatives, units)
            return jnp.einsum("sut,stu->s", taken, met)

        own, read = self.derivatives[:, :, :, 0], self.turned.derivatives[:, :, :, 0]
        both = jax.vmap(crossed)(self._inputs, own, read, self.turned.inputs[:, :, 0])
        one_hot = isinstance(self.inputs, OneHot)
        norms = self.direct.gram_norms() if one_hot else _norms_by_pairs(self.direct)
        return norms + _norms_by_pairs(self.turned) + 2 * both

    def combine(self, coefficients: Array) -> Array:
        """sum_s v[n,s] of D and of E, shape (N, T M + T' K)."""
        return _joined(self.direct.combine(coefficients), self.turned.combine(coefficients))

    def cotangent(self, index: int) -> Array:
        """D and E of one output direction."""
        return _joined(self.direct.cotangent(index), self.turned.cotangent(index))

    def local_vjp(self, cotangents: Array) -> LayerUpdate:
        """sum_nt of a[n,t] times the first part, and of the second times h[n,t]."""
        shapes = self.derivatives.shape[2:], self.turned.derivatives.shape[2:]
        count = shapes[0][0] * shapes[0][2]
        parts = cotangents[:, :count], cotangents[:, count:]
        own, read = (
            part.reshape(len(part), *shape) for part, shape in zip(parts, shapes, strict=True)
        )
        turned = self.turned.local_vjp(read)["kernel"].T
        return {"kernel": self.direct.local_vjp(own)["kernel"] + turned}

    def local_jvp(self, update: LayerUpdate) -> Array:
        """The change of u and of v, in the shape of a cotangent."""
        turned = {"kernel": update["kernel"].T}
        return _joined(self.direct.local_jvp(update), self.turned.local_jvp(turned))

    def jvp(self, update: LayerUpdate) -> Array:
        """J_l applied to a step in the parameters, shape (N, S)."""
        return self.direct.jvp(update) + self.turned.jvp({"kernel": update["kernel"].T})

    def squares(self) -> LayerUpdate:
        """sum_n sum_s J_l^2, entry by entry, sample after sample."""

        def add(total: Array, one: TiedSignals) -> tuple[Array, None]:
            single: TiedSignals = jax.tree.map(lambda leaf: leaf[None], one)
            return total + jnp.sum(single.jacobian() ** 2, axis=(0, 1)), None

        start = jnp.zeros((self.fan_in, self.num_units), self.derivatives.dtype)
        return {"kernel": lax.scan(add, start, self)[0]}

    def has_diagonal_inputs(self, sharing: str) -> bool:
        """With one-hot inputs and "expand"."""
        return self.direct.has_diagonal_inputs(sharing)

    def _positions(self, sharing: Sharing) -> tuple[int, int]:
        """Rows of inputs a sample, of both uses."""
        if sharing == "reduce":
            return 1, 1
        return self.direct.num_positions, self.turned.num_positions

    def _balanced(self, sharing: Sharing) -> tuple[Array, Array, Array, Array]:
        """Traces of A_1, A_2 and of B_1, B_2, both (2,), and what ``balance`` makes of them."""
        n, (t, u) = float(self.num_samples), self._positions(sharing)
        (a, d), (h, e) = self.direct.row_norms(sharing), self.turned.row_norms(sharing)
        left, right = jnp.stack([a / (n * t), e / n]), jnp.stack([d / n, h / (n * u)])
        return left, right, *balance(left, right)

    def row_norms(self, sharing: Sharing) -> tuple[Array, Array]:
        """See ``SharedSignals.row_norms``."""
        left, right, by_a, by_b = self._balanced(sharing)
        n = float(self.num_samples)
        count = float(self.num_samples * sum(self._positions(sharing)))
        count = n if sharing == "reduce" else count
        return count * jnp.sum(by_a * left), n * jnp.sum(by_b * right)

    def rows(self, sharing: Sharing) -> tuple[Array, Array]:
        """See ``SharedSignals.rows``; (1, N T + N S T', K) and (1, N S T + N T', M)."""
        by_a, t = self._balanced(sharing)[2], self._positions(sharing)
        count = 1 if sharing == "reduce" else sum(t)
        own, read = self.direct.rows(sharing)[0], self.turned.unit_rows(sharing)
        left = [jnp.sqrt(by_a[0] * count / t[0]) * own, jnp.sqrt(by_a[1] * count) * read]
        return jnp.concatenate(left, axis=1), self.unit_rows(sharing)

    def unit_rows(self, sharing: Sharing) -> Array:
        """The second array of ``rows``."""
        by_b, (_, t) = self._balanced(sharing)[3], self._positions(sharing)
        own, read = self.direct.unit_rows(sharing), self.turned.rows(sharing)[0]
        return jnp.concatenate([jnp.sqrt(by_b[0]) * own, jnp.sqrt(by_b[1] / t) * read], axis=1)

    def counts(self) -> Array:
        """The diagonal of the product of the first array of ``rows("expand")``, shape (K,)."""
        assert isinstance(self.direct, LookupSignals)
        by_a, t = self._balanced("expand")[2], self._positions("expand")
        own = by_a[0] / t[0] * self.direct.counts()
        return sum(t) * (own + by_a[1] * self.turned.unit_squares())


def balance(left: Array, right: Array) -> tuple[Array, Array]:
    """By what the factors of two uses are multiplied before they are added; see ``TiedSignals``.

    What is left to choose is the trace of the sum of A, the mean of tr A_1 and tr A_2 by p.

    Args:
      left: tr A_1 and tr A_2.
      right: tr B_1 and tr B_2.

    Returns:
      x and y (2,), for (x_1 A_1 + x_2 A_2) (x) (y_1 B_1 + y_2 B_2); 0 for a use without rows.
    """
    roots = jnp.sqrt(left * right)
    share = roots * reciprocal(jnp.sum(roots))
    trace = jnp.sum(share * left)
    by_b = jnp.sum(left * right) * reciprocal(trace) * share
    return trace * share * reciprocal(left), by_b * reciprocal(right)


def _products(rows: Array, inputs: Array | OneHot) -> Array:
    """The products of rows (..., K) with inputs (N, T, K), shape (..., N, T)."""
    if isinstance(inputs, OneHot):
        taken = jnp.take(rows, inputs.indices, axis=-1, mode="fill", fill_value=0)
        return inputs.scale * taken
    return jnp.tensordot(rows, inputs, axes=(-1, -1))


def _joined(own: Array, read: Array) -> Array:
    """Cotangents of both uses in one axis."""
    return jnp.concatenate([own.reshape(len(own), -1), read.reshape(len(read), -1)], axis=1)


def _norms_by_pairs(layer: SharedSignals) -> Array:
    """``gram_norms`` of a layer of one group by pairs of positions."""
    inputs = jnp.einsum("ntgk,nugk->ntu", layer.inputs, layer.inputs)
    units = jnp.einsum("nstgm,nsugm->nstu", layer.derivatives, layer.derivatives)
    return jnp.einsum("ntu,nstu->ns", inputs, units)
