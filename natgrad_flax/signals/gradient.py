"""The gradient that a structure preconditions, in the form in which it comes."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax.arguments.renamed import Renamed
from natgrad_flax.damping import is_zero
from natgrad_flax.signals.base import LayerSignals, LayerUpdate


class Gradient(abc.ABC):
    """A vector g of the parameters of all layers, and what solves in sample space ask of it.

    With F = J^T J / N the solution of (F + rho) u = g is found in two ways. Where g = J^T w / N it
    is J^T v with v = (J J^T + N rho)^{-1} w, without a division by rho. Any other g has a part
    outside of the rows of J: then u = (g - J^T v / c) / rho, v = (J J^T + N rho)^{-1} c J g
    (Woodbury), with a factor c of each form's own.
    """

    coefficients: Array | None
    """w, shape (N, S), where g = J^T w / N; else None."""

    @abc.abstractmethod
    def of_layer(self, index: int) -> Gradient:
        """The part of one layer, as the gradient of that layer alone."""

    @abc.abstractmethod
    def vector(self, layers: Sequence[LayerSignals]) -> tuple[LayerUpdate, ...]:
        """g itself, one entry a layer."""

    @abc.abstractmethod
    def inner(self, layers: Sequence[LayerSignals], step: Sequence[LayerUpdate]) -> Array:
        """<g, u>, shape ()."""

    @abc.abstractmethod
    def images(self, layers: Sequence[LayerSignals]) -> list[Array]:
        """c J_l g_l of every layer, each (N S,)."""

    @abc.abstractmethod
    def remainder(
        self, layer: LayerSignals, index: int, dual: Array, shift: Array | float
    ) -> LayerUpdate:
        """(g_l - J_l^T v / c) / rho, for v of shape (N S,) and shift = N rho."""

    @abc.abstractmethod
    def adjoint(self, layer: LayerSignals, dual: Array) -> LayerUpdate:
        """N J_l^T v / c, for v of shape (N S,)."""

    def targets(self, layers: Sequence[LayerSignals]) -> list[Array]:
        """The right-hand sides of solves in sample space: w for every layer, or the images."""
        if self.coefficients is not None:
            return [self.coefficients.reshape(-1)] * len(layers)
        return self.images(layers)

    def target(self, layers: Sequence[LayerSignals]) -> Array:
        """The right-hand side of one solve in sample space for all layers together."""
        targets = self.targets(layers)
        if self.coefficients is not None:
            return targets[0]
        return sum(targets[1:], start=targets[0])

    def updates(
        self, layers: Sequence[LayerSignals], duals: Sequence[Array], shift: Array | float
    ) -> tuple[LayerUpdate, ...]:
        """u from the solutions in sample space, one entry a layer.

        Args:
          layers: the signals.
          duals: for each layer v, shape (N S,); where shift is the number 0 and g has no
            coefficients, (J J^T)^+ v instead.
          shift: N rho.
        """
        if self.coefficients is not None:
            n_s = self.coefficients.shape
            return tuple(
                layer.vjp(dual.reshape(n_s)) for layer, dual in zip(layers, duals, strict=True)
            )
        if is_zero(shift):
            return tuple(map(self.adjoint, layers, duals))
        return tuple(
            self.remainder(layer, index, dual, shift)
            for index, (layer, dual) in enumerate(zip(layers, duals, strict=True))
        )


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["coefficients", "cotangents"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Residual(Gradient):
    """The loss residual r, ready for the solvers: g = J^T r / N is the gradient of the loss.

    Either r lies in the span of the output directions, r_n = R_n w_n; then
    ``coefficients`` is w and the gradient is (R^T J)^T w / N. Or it does not (a Monte-Carlo
    Fisher); then ``cotangents`` holds the residual carried back to each layer.

    Attributes:
      coefficients: w, shape (N, S), or None.
      cotangents: for each layer the cotangent of r, shape (N, M_l) for dense signals, or None.

    Example:
      >>> import jax, jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0))
      >>> x, y = jnp.eye(4), jnp.ones((4, 1))
      >>> signals, residual = ng.fisher_signals(model, x, y, loss=ng.MeanSquaredError())
      >>> residual.coefficients.shape
      (4, 1)
      >>> # R = I for this loss
      >>> bool(jnp.allclose(residual.coefficients, model(x) - y))
      True
    """

    coefficients: Array | None
    cotangents: tuple[Array, ...] | None

    direction = Renamed("cotangent")
    directions = Renamed("cotangents")

    def cotangent(self, layer: LayerSignals, index: int) -> Array:
        """The residual carried back to a layer, shape (N, M_l) for dense signals."""
        if self.cotangents is not None:
            return self.cotangents[index]
        assert self.coefficients is not None
        return layer.combine(self.coefficients)

    def of_layer(self, index: int) -> Residual:
        """See ``Gradient.of_layer``."""
        if self.cotangents is None:
            return self
        return Residual(None, (self.cotangents[index],))

    def vector(self, layers: Sequence[LayerSignals]) -> tuple[LayerUpdate, ...]:
        """J^T r / N, one entry a layer."""
        # the division goes to the small side of the product: (N, M) and not (K, M)
        return tuple(
            layer.local_vjp(self.cotangent(layer, index) / layer.num_samples)
            for index, layer in enumerate(layers)
        )

    def inner(self, layers: Sequence[LayerSignals], step: Sequence[LayerUpdate]) -> Array:
        """<g, u> sample by sample, without g."""
        parts = [
            jnp.sum(layer.local_jvp(update) * self.cotangent(layer, index)) / layer.num_samples
            for index, (layer, update) in enumerate(zip(layers, step, strict=True))
        ]
        return sum(parts[1:], start=parts[0])

    def images(self, layers: Sequence[LayerSignals]) -> list[Array]:
        """J_l J_l^T r: c = N."""
        return [
            layer.gram_times(self.cotangent(layer, index)).reshape(-1)
            for index, layer in enumerate(layers)
        ]

    def remainder(
        self, layer: LayerSignals, index: int, dual: Array, shift: Array | float
    ) -> LayerUpdate:
        """See ``Gradient.remainder``; the difference is taken sample by sample."""
        spread = layer.combine(dual.reshape(layer.num_samples, layer.num_directions))
        return layer.local_vjp((self.cotangent(layer, index) - spread) / shift)

    def adjoint(self, layer: LayerSignals, dual: Array) -> LayerUpdate:
        """J_l^T v."""
        return layer.vjp(dual.reshape(layer.num_samples, layer.num_directions))


@partial(jax.tree_util.register_dataclass, data_fields=["layers"], meta_fields=[])
@dataclass(frozen=True)
class ParameterGradient(Gradient):
    """Any vector of the parameters, which need not lie in the range of the Fisher.

    Attributes:
      layers: g, one entry a layer.
    """

    layers: tuple[LayerUpdate, ...]
    coefficients = None

    def of_layer(self, index: int) -> ParameterGradient:
        """See ``Gradient.of_layer``."""
        return ParameterGradient((self.layers[index],))

    def vector(self, layers: Sequence[LayerSignals]) -> tuple[LayerUpdate, ...]:
        """g."""
        del layers
        return self.layers

    def inner(self, layers: Sequence[LayerSignals], step: Sequence[LayerUpdate]) -> Array:
        """See ``Gradient.inner``."""
        del layers
        return inner_product(self.layers, step)

    def images(self, layers: Sequence[LayerSignals]) -> list[Array]:
        """J_l g_l: c = 1."""
        return [layer.jvp(g).reshape(-1) for layer, g in zip(layers, self.layers, strict=True)]

    def remainder(
        self, layer: LayerSignals, index: int, dual: Array, shift: Array | float
    ) -> LayerUpdate:
        """See ``Gradient.remainder``."""
        n = layer.num_samples
        back = layer.vjp(dual.reshape(n, layer.num_directions))
        return jax.tree.map(lambda g, b: n * (g - b) / shift, self.layers[index], back)

    def adjoint(self, layer: LayerSignals, dual: Array) -> LayerUpdate:
        """N J_l^T v."""
        n = layer.num_samples
        return layer.vjp(n * dual.reshape(n, layer.num_directions))


def inner_product(left: Sequence[LayerUpdate], right: Sequence[LayerUpdate]) -> Array:
    """The sum over all parameters of the products of two updates."""
    products = jax.tree.map(jnp.vdot, tuple(left), tuple(right))
    return sum(jax.tree.leaves(products), start=jnp.zeros(()))
