"""Layer-wise Fisher approximations: a coupling matrix Sigma between layers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.arrays import real_array
from natgrad_flax.damping import is_zero, per_layer
from natgrad_flax.layer_signals import LayerSignals, LayerUpdate
from natgrad_flax.linalg import has_full_rank, lu_solve, pinv_solve
from natgrad_flax.signals import Residual, Signals
from natgrad_flax.structures.base import (
    Geometry,
    Space,
    Structure,
    check_space,
    dual_direction,
    gradient,
    has_shared_layers,
    pull_back_solution,
    rank_failures,
    ravel,
    sample_targets,
    woodbury,
)
from natgrad_flax.structures.coupling import (
    mix,
    solve_coupled,
    solve_in_ranges,
    solve_tridiagonal,
    solve_undamped,
)
from natgrad_flax.structures.exact import mean_gram_diagonal


class SingularCouplingWarning(UserWarning):
    """The block tri-diagonal coupling of this depth is singular; says what is done instead."""


@dataclass(frozen=True)
class LayerWise(Structure):
    """G = S^T (Sigma (x) I) S / N + rho I, S = blockdiag(J_1, ..., J_L) (Eq. 15).

    For any nonsingular symmetric Sigma (positive definite or not) and Jacobians J_l of full row
    rank, zero damping gives Theta-bar(x', x) = sum_l (Sigma^{-1} 1)_l Theta_l(x', x) Theta_l^{-1}
    and alpha = 1^T Sigma^{-1} 1 (Karakida & Osawa 2020, Theorem 4.1).

    Args:
      sigma: symmetric (L, L) array.
      space: "sample", "parameter", or "auto" for the cheaper one.

    Raises:
      ValueError: sigma is not a finite, symmetric, nonsingular square matrix.
      TypeError: it is complex, or holds something other than numbers.
    """

    sigma: tuple[tuple[float, ...], ...]
    space: Space = "auto"
    infinite_width = "all"
    couples_layers = True

    def __init__(
        self, sigma: Sequence[Sequence[float]] | np.ndarray, space: Space = "auto"
    ) -> None:
        matrix = real_array(sigma, "sigma")
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
            raise ValueError(f"sigma must be a square matrix (L, L), got shape {matrix.shape}")
        if not np.isfinite(matrix).all():
            raise ValueError("sigma has NaN or infinite entries")
        if not np.allclose(matrix, matrix.T, rtol=1e-12, atol=1e-12):
            raise ValueError("sigma must be symmetric")
        size = np.abs(np.linalg.eigvalsh(matrix))
        if size.min() <= 1e-12 * max(size.max(), 1e-300):
            raise ValueError(
                f"sigma is singular: its smallest absolute eigenvalue is {size.min():.3g} beside a "
                f"largest of {size.max():.3g}; Theorem 4.1 needs a nonsingular one"
            )
        object.__setattr__(self, "sigma", tuple(map(tuple, matrix.tolist())))
        check_space(space)
        object.__setattr__(self, "space", space)

    def coupling(self, depth: int) -> np.ndarray:
        """Sigma for a network of L layers, shape (L, L).

        Raises:
          ValueError: sigma was given for another number of layers.
        """
        matrix = np.asarray(self.sigma)
        if len(matrix) != depth:
            raise ValueError(
                f"sigma is {len(matrix)} x {len(matrix)} but the network has {depth} layers"
            )
        return matrix

    def weights(self, depth: int) -> np.ndarray:
        """Sigma^{-1} 1 (or Sigma^+ 1), the weight of each layer at zero damping, shape (L,)."""
        return np.linalg.pinv(self.coupling(depth), hermitian=True) @ np.ones(depth)

    def _in_parameters(self, signals: Signals) -> bool:
        if self.space == "auto":
            return signals.num_params < len(signals.layers) * signals.size
        return self.space == "parameter"

    def solve(
        self, signals: Signals, residual: Residual, damping: Array | float
    ) -> tuple[LayerUpdate, ...]:
        """G^{-1} J^T r / N; see ``Structure.solve``."""
        sigma = self.coupling(len(signals.layers))
        if self._in_parameters(signals):
            dense = self.to_dense(signals, damping)
            flat = ravel(gradient(signals, residual))
            solver = pinv_solve if is_zero(damping) else lu_solve
            return signals.unravel(solver(dense, flat))
        shift = signals.num_samples * damping
        targets = [sample_targets(a, i, residual) for i, a in enumerate(signals.layers)]
        if residual.coefficients is None:
            targets = mix(sigma, targets)
        grams = [layer.gram() for layer in signals.layers]
        inside = residual.coefficients is not None
        duals = self._solve_grams(
            sigma, grams, targets, shift, zero=is_zero(damping), inside=inside
        )
        return tuple(
            layer.pull_back(dual_direction(layer, index, residual, duals[index], shift))
            for index, layer in enumerate(signals.layers)
        )

    def precondition(
        self, signals: Signals, slope: tuple[LayerUpdate, ...], damping: Array | float
    ) -> tuple[LayerUpdate, ...]:
        """G^{-1} g; see ``Structure.precondition``."""
        sigma = self.coupling(len(signals.layers))
        if self._in_parameters(signals):
            dense = self.to_dense(signals, damping)
            solver = pinv_solve if is_zero(damping) else lu_solve
            return signals.unravel(solver(dense, ravel(slope)))
        shift = signals.num_samples * damping
        images = [layer.jvp(g).reshape(-1) for layer, g in zip(signals.layers, slope, strict=True)]
        grams = [layer.gram() for layer in signals.layers]
        if is_zero(damping):
            inside = [pinv_solve(k, b) for k, b in zip(grams, images, strict=True)]
            duals = solve_in_ranges(sigma, grams, inside, 0.0)
            return tuple(map(pull_back_solution, signals.layers, duals))
        duals = self._solve_grams(sigma, grams, mix(sigma, images), shift, zero=False, inside=False)
        return tuple(
            woodbury(layer, g, dual, shift)
            for layer, g, dual in zip(signals.layers, slope, duals, strict=True)
        )

    def coefficient(self, test: Signals, train: Signals, damping: Array | float) -> Array:
        """Eq. 16 at zero damping; sum_l K_l(x', x) U_l with damping (science: 3.3)."""
        eye = jnp.eye(train.size, dtype=train.outputs.dtype)
        return self.coefficient_times(test, train, damping, eye)

    def coefficient_times(
        self, test: Signals, train: Signals, damping: Array | float, vectors: Array
    ) -> Array:
        """sum_l K_l(x', x) U_l with the k columns of V as right-hand sides."""
        sigma = self.coupling(len(train.layers))
        grams = [layer.gram() for layer in train.layers]
        targets = [vectors] * len(grams)
        shift = train.num_samples * damping
        duals = self._solve_grams(sigma, grams, targets, shift, zero=is_zero(damping), inside=True)
        parts = [
            there.gram(here) @ dual
            for there, here, dual in zip(test.layers, train.layers, duals, strict=True)
        ]
        return sum(parts[1:], start=parts[0])

    def undamped_diagonal(self, train: Signals) -> Array | None:
        """alpha for every output; None where a layer's Jacobian lacks full row rank."""
        if not all(has_full_rank(layer.gram()) for layer in train.layers):
            return None
        alpha = self.weights(len(train.layers)).sum()
        return jnp.full(train.size, alpha, train.outputs.dtype)

    def _solve_grams(
        self,
        sigma: np.ndarray,
        grams: list[Array],
        targets: list[Array],
        shift: Array | float,
        *,
        zero: bool,
        inside: bool,
    ) -> list[Array]:
        """u with (s I + (Sigma (x) I) blockdiag(K_l)) u = b; at s = 0 the pseudo-inverse's u.

        Args:
          sigma: the coupling.
          grams: K_l, L arrays (n, n).
          targets: b, L arrays (n,) or (n, k); at s = 0 they must all be the same.
          shift: s = N rho.
          zero: s is known to be 0.
          inside: J_l^T u_l are the updates, and not what (g_l - J_l^T u_l) / s makes of them.
        """
        if zero:
            return solve_undamped(sigma, grams, targets[0])
        return solve_coupled(sigma, grams, targets, shift)

    def to_dense(self, signals: Signals, damping: Array | float = 0.0) -> Array:
        """The Hadamard product of J^T J / N with Sigma blown up to parameters, plus rho I."""
        jacobian = signals.to_dense()
        owner = np.repeat(
            np.arange(len(signals.layers)), [layer.num_params for layer in signals.layers]
        )
        # a constant of (P, P) numbers would lie in the program
        mask = jnp.asarray(self.coupling(len(signals.layers)), jacobian.dtype)[owner][:, owner]
        dense = mask * (jacobian.T @ jacobian) / signals.num_samples
        values = jnp.stack([jnp.asarray(v) for v in per_layer(damping, len(signals.layers))])
        return dense + jnp.diag(values[owner].astype(dense.dtype))

    def damping_scale(self, signals: Signals) -> Array:
        """Mean diagonal of K_l / N over layers."""
        return jnp.mean(jnp.stack(mean_gram_diagonal(signals)))

    def alpha(self, geometry: Geometry) -> float:
        """1^T Sigma^{-1} 1."""
        return float(self.weights(geometry.depth).sum())

    def failed_conditions(self, geometry: Geometry) -> list[str]:
        """Every J_l must be able to have full row rank."""
        return rank_failures(geometry)

    def check(self, signals: Signals, damping: object) -> None:
        """Sigma must have the size of the network; undamped, every J_l full row rank.

        Raises:
          ValueError: it has not.
        """
        depth = len(signals.layers)
        sigma = self.coupling(depth)
        if (
            not is_zero(damping)
            or self._in_parameters(signals)
            or np.array_equal(sigma, np.eye(depth))
        ):
            return
        shapes = tuple((layer.fan_in, layer.num_units) for layer in signals.layers)
        if has_shared_layers(signals):
            # of weights that positions share only the number of parameters bounds the rank
            failures = [
                f"layer {index + 1} has {layer.num_params} parameters for {signals.size} outputs"
                for index, layer in enumerate(signals.layers)
                if layer.num_params < signals.size
            ]
        else:
            failures = rank_failures(Geometry(shapes, signals.num_samples, signals.num_seeds))
        if failures:
            raise ValueError(
                f"{self.name} at zero damping needs layer Jacobians of full row rank: "
                + "; ".join(failures)
                + ". Use wider layers, fewer samples or a positive damping"
            )

    def gram_size(self, signals: Signals) -> int:
        """L N S or P."""
        if self._in_parameters(signals):
            return signals.num_params
        return len(signals.layers) * signals.size

    def entries(self, geometry: Geometry) -> tuple[int, int]:
        """Those of the blocks that Sigma couples; see ``Structure.entries``."""
        sigma, params = self.coupling(geometry.depth), geometry.params
        nonzeros = sum(params[i] * params[j] for i, j in np.argwhere(sigma))
        # blocks on the diagonal are symmetric, the others come in pairs
        diagonal = sum(params[i] for i in np.flatnonzero(np.diagonal(sigma)))
        return nonzeros, (nonzeros + diagonal) // 2

    def block_form(self, layer: LayerSignals) -> str:
        """See ``Structure.block_form``."""
        return "exact, coupled"


class BlockTriDiagonal(LayerWise):
    """Sigma_ij = 1 for |i - j| <= 1: neighbouring layers are coupled (Eq. 19).

    Lemma 4.3: alpha = s for L = 3s and s + 1 for L = 3s + 1. Sigma is indefinite for every L >= 3
    (the paper's "positive definite" is an error) and singular for L = 3s + 2. There 1 still lies
    in its range, so the pseudo-inverse of G gives Theta-bar = (s + 1) I at zero damping; this is
    what is computed, with a ``SingularCouplingWarning`` that says so.

    Args:
      space: "sample", "parameter", or "auto".
    """

    def __init__(self, space: Space = "auto") -> None:
        object.__setattr__(self, "sigma", ())
        check_space(space)
        object.__setattr__(self, "space", space)

    def coupling(self, depth: int) -> np.ndarray:
        """The tri-diagonal matrix of ones, shape (L, L)."""
        return np.eye(depth) + np.eye(depth, k=1) + np.eye(depth, k=-1)

    def check(self, signals: Signals, damping: object) -> None:
        """As for every layer-wise structure; warns where Sigma is singular.

        Raises:
          ValueError: a layer Jacobian cannot have full row rank at zero damping.
        """
        super().check(signals, damping)
        depth = len(signals.layers)
        if depth % 3 == 2:
            warnings.warn(
                f"the block tri-diagonal Sigma of L = {depth} = 3s + 2 layers is singular; zero "
                "damping uses the pseudo-inverse of G, which is still isotropic with alpha = "
                f"{(depth + 1) // 3}; a small positive damping can hit a resonance and diverge",
                SingularCouplingWarning,
                stacklevel=4,
            )

    def _solve_grams(
        self,
        sigma: np.ndarray,
        grams: list[Array],
        targets: list[Array],
        shift: Array | float,
        *,
        zero: bool,
        inside: bool,
    ) -> list[Array]:
        if zero:
            return solve_undamped(sigma, grams, targets[0])
        return solve_tridiagonal(grams, targets, shift, refine=not inside)
