"""Layer-wise Fisher approximations: a coupling matrix Sigma between layers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from natgrad_flax.arguments.arrays import real_array
from natgrad_flax.damping import is_zero
from natgrad_flax.linalg.dense import has_full_rank
from natgrad_flax.operators.base import Operator, Space, check_space, mean_gram_diagonal
from natgrad_flax.operators.coupled import Coupled, Solver
from natgrad_flax.operators.coupling import solve_coupled, solve_tridiagonal
from natgrad_flax.signals.base import LayerSignals
from natgrad_flax.signals.dense import Signals
from natgrad_flax.structures.base import Structure, has_shared_layers, rank_failures
from natgrad_flax.structures.geometry import Geometry, NeededRank
from natgrad_flax.structures.style import styled


class SingularCouplingWarning(UserWarning):
    """The coupling of ``BlockTriDiagonal`` has no inverse at this depth, L = 3s + 2 layers.

    Undamped, the pseudo-inverse of G is taken; the message says what follows of it.

    Example:
      >>> import warnings, jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0))
      >>> x, y = jnp.eye(4), jnp.ones((4, 1))
      >>> options = {"structure": ng.BlockTriDiagonal(), "loss": ng.MeanSquaredError()}
      >>> with warnings.catch_warnings():  # L = 2 = 3s + 2: known, and accepted
      ...     warnings.simplefilter("ignore", ng.SingularCouplingWarning)
      ...     step = ng.natural_gradient(model, x, y, **options)
    """


@dataclass(frozen=True)
class LayerWise(Structure):
    """The Fisher block between layers i and j times a number Sigma_ij (Karakida & Osawa 2020).

    G = S^T (Sigma (x) I) S / N + rho I with S = blockdiag(J_1, ..., J_L) (Eq. 15).
    For any nonsingular symmetric Sigma (positive definite or not) and Jacobians J_l of full row
    rank, zero damping gives Theta-bar(x', x) = sum_l (Sigma^{-1} 1)_l Theta_l(x', x) Theta_l^{-1}
    and alpha = 1^T Sigma^{-1} 1 (Karakida & Osawa 2020, Theorem 4.1).

    Args:
      sigma: symmetric (L, L) array.
      space: "sample", "parameter", or "auto" for the cheaper one.

    Raises:
      ValueError: sigma is not a finite, symmetric, nonsingular square matrix.
      TypeError: it is complex, or holds something other than numbers.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng, numpy as np
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0))
      >>> x, y = jnp.eye(4), jnp.ones((4, 1))
      >>> structure = ng.LayerWise([[1.0, 0.5], [0.5, 1.0]])
      >>> step = ng.natural_gradient(
      ...     model, x, y, structure=structure, loss=ng.MeanSquaredError()
      ... )
      >>> rate = ng.optimal_learning_rate(structure, model, 4)
      >>> bool(np.isclose(1 / rate, np.linalg.inv(structure.sigma).sum()))
      True
    """

    sigma: tuple[tuple[float, ...], ...]
    space: Space = "auto"
    style = styled("Layer-wise", "#6A3D9A", "h", command="")
    optimal_rate = "1/alpha (Theorem 4.1)"
    infinite_width = "all"
    couples_layers = True
    shared_weights = "gram"
    _solver: ClassVar[Solver] = staticmethod(solve_coupled)
    coefficient_arrays = (4.0, 0.5)

    def needed_ranks(self, geometry: Geometry) -> list[NeededRank]:
        """N C of every J_l (Theorem 4.1)."""
        wanted = geometry.num_samples * geometry.num_outputs
        return [
            NeededRank(index, "jacobian", wanted, fan_in * units)
            for index, (fan_in, units) in enumerate(geometry.layers)
        ]

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

    def operator(self, signals: Signals) -> Operator:
        """S^T (Sigma (x) I) S / N."""
        return Coupled(
            signals.layers,
            self.space,
            sigma=self.coupling(len(signals.layers)),
            solver=self._solver,
        )

    def coefficient(self, test: Signals, train: Signals, damping: Array | float) -> Array:
        """Eq. 16 at zero damping; sum_l K_l(x', x) U_l with damping (science: 3.3)."""
        eye = jnp.eye(train.size, dtype=train.outputs.dtype)
        return self.coefficient_times(test, train, damping, eye)

    def coefficient_times(
        self, test: Signals, train: Signals, damping: Array | float, vectors: Array
    ) -> Array:
        """sum_l K_l(x', x) U_l with the k columns of V as right-hand sides."""
        coupled = Coupled(train.layers, sigma=self.coupling(len(train.layers)), solver=self._solver)
        duals = coupled.solve_duals(vectors, damping)
        parts = [
            test_layer.gram(train_layer) @ dual
            for test_layer, train_layer, dual in zip(test.layers, train.layers, duals, strict=True)
        ]
        return sum(parts[1:], start=parts[0])

    def undamped_diagonal(self, train: Signals) -> Array | None:
        """alpha for every output; None where a layer's Jacobian lacks full row rank."""
        if not all(has_full_rank(layer.gram()) for layer in train.layers):
            return None
        alpha = self.weights(len(train.layers)).sum()
        return jnp.full(train.size, alpha, train.outputs.dtype)

    def damping_scale(self, signals: Signals) -> Array:
        """Mean diagonal of K_l / N over layers."""
        return jnp.mean(mean_gram_diagonal(signals))

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
            or self._sizes(signals).in_parameters
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
            failures = rank_failures(Geometry(shapes, signals.num_samples, signals.num_directions))
        if failures:
            raise ValueError(
                f"{self.name} at zero damping needs layer Jacobians of full row rank: "
                + "; ".join(failures)
                + ". Use wider layers, fewer samples or a positive damping"
            )

    def gram_size(self, signals: Signals) -> int:
        """L N S or P."""
        return self._sizes(signals).side

    def _sizes(self, signals: Signals) -> Coupled:
        """The operator of any Sigma, for its sizes."""
        return Coupled(signals.layers, self.space, sigma=np.eye(len(signals.layers)))

    def system_arrays(self, signals: Signals) -> float:
        """See ``Structure.system_arrays``."""
        return 5.0

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
    """The Fisher within a layer and between neighbouring ones (Karakida & Osawa 2020, Eq. 19).

    All other blocks are 0: ``LayerWise`` with Sigma_ij = 1 for |i - j| <= 1.
    Lemma 4.3: alpha = s for L = 3s and s + 1 for L = 3s + 1. Sigma is indefinite for every L >= 3
    (the paper's "positive definite" is an error) and singular for L = 3s + 2. There 1 still lies
    in its range, so the pseudo-inverse of G gives Theta-bar = (s + 1) I at zero damping; this is
    what is computed, with a ``SingularCouplingWarning`` that says so.

    Args:
      space: "sample", "parameter", or "auto".

    Example:
      >>> import natgrad_flax as ng
      >>> from flax import nnx
      >>> model = ng.MLP((4, 8, 8, 8, 1), rngs=nnx.Rngs(0))
      >>> rate = ng.optimal_learning_rate(ng.BlockTriDiagonal(), model, 4)
      >>> round(rate, 6)  # L = 4 = 3 s + 1: alpha = 2
      0.5
    """

    _solver = staticmethod(solve_tridiagonal)
    style = styled(
        "Block tri-diagonal", "#009E73", "^", short="tri-diag", aliases=("block-tridiagonal",)
    )
    optimal_rate = "1/alpha (Lemma 4.3)"

    def largest_system(self, signals: Signals) -> int:
        """Every other layer is eliminated."""
        return min(len(signals.layers) // 2 * signals.size, signals.num_params)

    def system_arrays(self, signals: Signals) -> float:
        """Arrays of one layer each; the system couples all."""
        depth = len(signals.layers)
        return 5.0 if self._sizes(signals).in_parameters else (2 * depth + 10.0) / depth**2

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
