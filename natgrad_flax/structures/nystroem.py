"""The exact Fisher, seen in random directions (Nystroem)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
from jax import Array

from natgrad_flax.arguments.scalars import check_integer, check_seed
from natgrad_flax.linalg.dense import qr
from natgrad_flax.operators.factored import Factored, largest_part
from natgrad_flax.signals.base import LayerSignals, ravel, unravel
from natgrad_flax.signals.dense import Signals
from natgrad_flax.structures.base import Structure, triangle
from natgrad_flax.structures.exact import Exact
from natgrad_flax.structures.geometry import Geometry, NeededRank
from natgrad_flax.structures.style import styled


@dataclass(frozen=True)
class Nystroem(Structure):
    """F Omega (Omega^T F Omega)^+ Omega^T F + rho I with Gaussian Omega, (P, rank).

    The randomised Nystroem approximation of the whole Fisher (Gittens & Mahoney 2013; Frangella,
    Tropp & Udell 2023): never above F, and F itself from the rank of F on, which is at most N S.
    It takes ``rank`` products with J and as many with J^T, no Gram matrix. As F = J^T J / N, it is
    J^T Pi J / N with the projection Pi on the columns of J Omega. An orthonormal basis of these
    stands in place of the pseudo-inverse, so the core is never squared and needs no shift, which
    Frangella et al. add where F is known by products alone.

    What is left out has the damping alone: the number 0, the pseudo-inverse, makes no step there,
    and a small damping long ones. It is not a mean over samples: it takes no moving averages.

    At infinite width J Omega is drawn from N(0, K), so below rank N C the coefficient matrix has a
    limit in law only. From there on it is that of ``Exact``.

    Args:
      rank: columns of Omega; fewer where N S or P is less.
      seed: of Omega, which is the same at every step.

    Raises:
      ValueError: a rank that is no positive integer, or no seed; rank 0 would be gradient descent.

    Example:
      >>> import jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> model, x, y = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0)), jnp.eye(4), jnp.ones((4, 1))
      >>> options = {"loss": ng.MeanSquaredError(), "damping": 1e-3}
      >>> step = ng.natural_gradient(model, x, y, structure=ng.Nystroem(3, seed=0), **options)
    """

    rank: int
    seed: int
    style = styled("Nystroem", "#B39DDB", "x", command="")
    optimal_rate = "1"
    eigensystems = True
    shared_weights = "rows"
    infinite_width = "train"
    why_no_limit = "below rank N C it depends on the directions drawn, and from there on is Exact's"

    def __post_init__(self) -> None:
        check_integer("rank", self.rank, 1)
        check_seed(self.seed)

    def operator(self, signals: Signals) -> Factored:
        """J^T Pi J / N, by the eigenvectors of the smaller of its two sides."""
        layers, n, params = signals.layers, signals.num_samples, signals.num_params
        count = min(self.rank, signals.size, params)

        def image(key: Array) -> Array:
            drawn = unravel(layers, jax.random.normal(key, (params,), signals.outputs.dtype))
            parts = [layer.jvp(part) for layer, part in zip(layers, drawn, strict=True)]
            return sum(parts[1:], start=parts[0]).reshape(-1)

        def row(weights: Array) -> Array:
            return ravel([layer.vjp(weights.reshape(n, -1)) for layer in layers])

        # one after the other: a layer needs memory for each
        images = jax.lax.map(image, jax.random.split(jax.random.key(self.seed), count))
        rows = jax.lax.map(row, qr(images.T)[0].T) / float(n) ** 0.5
        factor, values = largest_part(rows, count)
        return Factored(layers, factor[None], values[None])

    def damping_scale(self, signals: Signals) -> Array:
        """Mean diagonal of K / N, as for ``Exact``."""
        return Exact().damping_scale(signals)

    def needed_ranks(self, geometry: Geometry) -> list[NeededRank]:
        """N C of the Jacobian of the network."""
        return Exact().needed_ranks(geometry)

    def outside_theory(self, geometry: Geometry) -> list[str]:
        """A rank below N C."""
        outputs = geometry.num_samples * geometry.num_outputs
        few = f"the structure sees {self.rank} directions for N C = {outputs} outputs"
        return [few] if self.rank < outputs else []

    def alpha(self, geometry: Geometry) -> float:
        """1."""
        return 1.0

    def failed_conditions(self, geometry: Geometry) -> list[str]:
        """That of ``Exact``, and a rank below N C."""
        return [*self.outside_theory(geometry), *Exact().failed_conditions(geometry)]

    def gram_size(self, signals: Signals) -> int:
        """The rank, or what is less of N S and P."""
        return min(self.rank, signals.size, signals.num_params)

    def system_arrays(self, signals: Signals) -> float:
        """Rows and factor, both (P, rank), their images (N S, rank) and the eigenproblem."""
        return 3.0 + 2 * (signals.num_params + signals.size) / self.gram_size(signals)

    def entries(self, geometry: Geometry) -> tuple[int, int]:
        """All; stored is the factor, or F where that is less."""
        params = sum(geometry.params)
        return params**2, min(params * self.rank, triangle(params))

    def block_form(self, layer: LayerSignals) -> str:
        """See ``Structure.block_form``."""
        return f"exact, in {self.rank} random directions"
