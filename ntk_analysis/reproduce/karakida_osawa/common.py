"""Small networks and their dense matrices: the explicit side of every identity check.

Nothing here uses signals or structures. The forward and the backward pass are written out in
NumPy, the Jacobian and every P x P metric are explicit, and inverses are pseudo-inverses of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import nnx

from natgrad_flax import MLP, Structure
from ntk_analysis.coefficient import Damping, coefficient_pair
from ntk_analysis.displacement import solve_residual
from ntk_analysis.empirical import InitialSignals, Matrix, initial_signals
from ntk_analysis.reproduce.ruler import max_abs_error, pseudo_inverse


@dataclass(frozen=True, eq=False)
class Problem:
    """A random network with random data.

    Attributes:
      model: parameters in float64.
      x: training inputs of norm 1, shape (N, M_0).
      y: targets, shape (N, C).
      x_test: more inputs, shape (N', M_0).
    """

    model: MLP
    x: Matrix
    y: Matrix
    x_test: Matrix

    @property
    def depth(self) -> int:
        """L."""
        return self.model.depth

    @cached_property
    def signals(self) -> InitialSignals:
        """Ours: the signals that the structures work on."""
        return initial_signals(self.model, self.x, self.x_test)

    @cached_property
    def train(self) -> Dense:
        """The dense side on the training inputs."""
        return dense(self.model, self.x)

    @cached_property
    def test(self) -> Dense:
        """The dense side on the test inputs."""
        return dense(self.model, self.x_test)

    @property
    def residual(self) -> Matrix:
        """f_0 - y on the training inputs, shape (N C,)."""
        return (self.train.outputs - self.y).reshape(-1)

    def ours(self, structure: Structure, damping: Damping = 0.0) -> tuple[Matrix, Matrix]:
        """Theta-bar(x, x) and Theta-bar(x', x) of a structure."""
        return coefficient_pair(structure, self.signals, damping)

    def update(self, structure: Structure, damping: float = 0.0) -> Matrix:
        """G^-1 J^T (f_0 - y) / N by a structure, one vector in the order of ``Dense``."""
        residual = self.residual.reshape(self.y.shape)
        updates = solve_residual(structure, self.signals.train, residual, damping)
        parts = [np.ravel(u[name]) for u in updates for name in ("kernel", "bias") if name in u]
        return np.concatenate(parts)


def problem(
    widths: Sequence[int],
    num_samples: int,
    *,
    activation: str = "tanh",
    bias_variance: float = 0.0,
    num_test: int = 3,
    seed: int = 0,
    x: Matrix | None = None,
) -> Problem:
    """A network with standard normal parameters and sigma_w^2 = 2, and Gaussian data.

    Args:
      widths: (M_0, ..., M_L).
      num_samples: N.
      activation: "tanh" or "relu".
      bias_variance: sigma_b^2.
      num_test: N'.
      seed: of everything.
      x: training inputs in place of random ones of norm 1.
    """
    rng = np.random.default_rng(seed)
    inputs = unit_rows(rng.normal(size=(num_samples + num_test, widths[0])))
    y = rng.normal(size=(num_samples, widths[-1]))
    with jax.enable_x64(True):
        abstract = nnx.eval_shape(
            lambda: MLP(
                widths,
                activation=activation,
                bias_variance=bias_variance,
                param_dtype=jnp.float64,
                rngs=nnx.Rngs(0),
            )
        )
        graphdef, state = nnx.split(abstract)
        filled = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), state)
        model = nnx.merge(graphdef, filled)
    train = inputs[:num_samples] if x is None else x
    return Problem(model, train, y, inputs[num_samples:])


def unit_rows(x: Matrix) -> Matrix:
    """Rows divided by their norms."""
    scaled: Matrix = x / np.linalg.norm(x, axis=1, keepdims=True)
    return scaled


@dataclass(frozen=True, eq=False)
class Dense:
    """Explicit matrices of a network on N inputs; parameters as kernel (K, M) by rows, then bias.

    Attributes:
      inputs: a_{l-1} with the column of the bias, L arrays (N, K).
      derivatives: D_l, L arrays (N, C, M).
      outputs: f, shape (N, C).
    """

    inputs: list[Matrix]
    derivatives: list[Matrix]
    outputs: Matrix

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.outputs)

    @cached_property
    def layers(self) -> list[Matrix]:
        """J_l, L arrays (N C, P_l), rows n-major."""
        return [
            np.einsum("ncm,nk->nckm", d, a).reshape(self.outputs.size, -1)
            for a, d in zip(self.inputs, self.derivatives, strict=True)
        ]

    @cached_property
    def jacobian(self) -> Matrix:
        """J, shape (N C, P)."""
        return np.concatenate(self.layers, axis=1)

    @property
    def kernel(self) -> Matrix:
        """Theta = J J^T / N."""
        return self.jacobian @ self.jacobian.T / self.num_samples

    def owners(self) -> Matrix:
        """The layer of each parameter, shape (P,)."""
        return np.concatenate([np.full(j.shape[1], float(i)) for i, j in enumerate(self.layers)])

    def units(self) -> Matrix:
        """The unit of each parameter, counted through the network, shape (P,)."""
        first, parts = 0, []
        for a, d in zip(self.inputs, self.derivatives, strict=True):
            parts.append(first + np.tile(np.arange(d.shape[2], dtype=np.float64), a.shape[1]))
            first += d.shape[2]
        return np.concatenate(parts)

    def fisher(self) -> Matrix:
        """F = J^T J / N, shape (P, P)."""
        return self.jacobian.T @ self.jacobian / self.num_samples

    def layer_wise(self, sigma: Matrix) -> Matrix:
        """G = S^T (Sigma (x) I) S / N (Eq. 15), shape (P, P)."""
        owner = self.owners().astype(int)
        return sigma[np.ix_(owner, owner)] * self.fisher()

    def unit_wise(self) -> Matrix:
        """F between parameters of the same unit (Eq. 23)."""
        unit = self.units()
        return np.where(unit[:, None] == unit, self.fisher(), 0.0)

    def kronecker(self, last: str, first: str = "literal") -> Matrix:
        """Blocks A* (x) B* (Eq. 20).

        Args:
          last: "scaled" divides the last B* by N, as Eq. 21 needs.
          first: "scaled" multiplies the first A* by M_0 / N.
        """
        n, blocks = self.num_samples, []
        for index, (a, d) in enumerate(zip(self.inputs, self.derivatives, strict=True)):
            flat = d.reshape(-1, d.shape[2])
            left, right = a.T @ a / n, flat.T @ flat / n
            if last == "scaled" and index == len(self.inputs) - 1:
                right = right / n
            if first == "scaled" and index == 0:
                left = left * a.shape[1] / n
            blocks.append(np.kron(left, right))
        return scipy.linalg.block_diag(*blocks)


def dense(model: MLP, x: Matrix) -> Dense:
    """Forward and backward pass of a tanh or ReLU network, written out."""
    rectified = model.activation == "relu"
    inputs, slopes, h = [], [], x
    for layer in model.layers:
        a = np.sqrt(model.weight_variance / h.shape[1]) * h
        weights = np.asarray(layer.kernel[...], np.float64)
        if layer.bias is not None:
            a = np.hstack([a, np.full((len(a), 1), np.sqrt(model.bias_variance))])
            weights = np.vstack([weights, np.asarray(layer.bias[...], np.float64)])
        inputs.append(a)
        u = a @ weights
        slopes.append((u > 0) * 1.0 if rectified else 1 - np.tanh(u) ** 2)
        h = np.maximum(u, 0) if rectified else np.tanh(u)
    n, c = u.shape
    derivatives = [np.broadcast_to(np.eye(c), (n, c, c))]
    for index in range(len(inputs) - 1, 0, -1):
        kernel = np.asarray(model.layers[index].kernel[...], np.float64)
        scaled = np.sqrt(model.weight_variance / len(kernel)) * kernel
        derivatives.insert(0, (derivatives[0] @ scaled.T) * slopes[index - 1][:, None, :])
    return Dense(inputs, derivatives, u)


def theta_bar(metric: Matrix, train: Dense, test: Dense | None = None) -> Matrix:
    """J(x') G^+ J(x)^T / N from explicit matrices (Eq. 11)."""
    left = train if test is None else test
    result: Matrix = (
        left.jacobian
        @ pseudo_inverse(metric, symmetric=True)
        @ train.jacobian.T
        / train.num_samples
    )
    return result


def off_identity(matrix: Matrix, alpha: float) -> float:
    """The largest entry of matrix - alpha I."""
    return max_abs_error(matrix, alpha * np.eye(len(matrix)))


def random_coupling(depth: int, *, definite: bool, seed: int = 0) -> Matrix:
    """A random symmetric Sigma, positive definite or indefinite."""
    random = np.random.default_rng(seed).normal(size=(depth, depth))
    if definite:
        return random @ random.T + 0.5 * np.eye(depth)
    return random + random.T


def flatten(state: nnx.State) -> Matrix:
    """Parameters of an MLP as one vector in the order of ``Dense``."""
    parts = []
    for index in range(len(state["layers"])):
        layer = state["layers"][index]
        parts += [np.ravel(np.asarray(layer[k][...])) for k in ("kernel", "bias") if k in layer]
    return np.concatenate(parts)
