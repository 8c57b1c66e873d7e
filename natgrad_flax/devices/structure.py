"""A structure whose work is dealt out to the devices of a mesh."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from natgrad_flax.arguments.scalars import check_integer, check_number, keep_plain
from natgrad_flax.damping import is_zero
from natgrad_flax.devices.factors import (
    apply_split,
    basis_dealt,
    invert_dealt,
    moments_dealt,
    solve_ekfac,
)
from natgrad_flax.devices.kfac import solve_kfac
from natgrad_flax.devices.linear_solve import Solution
from natgrad_flax.devices.passes import OverDevices
from natgrad_flax.devices.placement import Placement, check_divisible, device_memory, place
from natgrad_flax.devices.row_solve import RowSolver, serves, solve_rows
from natgrad_flax.devices.units import solve_units_on_mesh
from natgrad_flax.linalg import whole_products
from natgrad_flax.operators.base import Operator
from natgrad_flax.optimizer.checks import check_structure
from natgrad_flax.signals.base import LayerUpdate
from natgrad_flax.signals.dense import Signals
from natgrad_flax.signals.gradient import Gradient, Residual
from natgrad_flax.structures import (
    EKFAC,
    KFAC,
    AveragedStructure,
    BlockDiagonal,
    Geometry,
    LayerWise,
    Moments,
    Structure,
    UnitWise,
)

SolverName = Literal["auto", "replicated", "cholesky", "cg"]


@dataclass(frozen=True)
class Sharded(Structure):
    """A structure on a mesh, to be used wherever a structure is.

    Every structure serves a batch that is sharded over a mesh as it is: XLA partitions the passes,
    the Gram matrices and the means over samples, and puts the collectives between them. This
    wrapper adds what XLA does not see: systems in sample space whose N S x N S matrices stay
    sharded by rows; the units of ng.UnitWise and the factors of ng.KFAC and ng.EKFAC, each of which
    one device solves, inverts or diagonalises for all.

    Where a system with sharded rows is not definite, or conjugate gradients end above the
    tolerance, the update is NaN; ``sharded_natural_gradient`` makes an error of it.

    Args:
      structure: the Fisher approximation.
      mesh: the devices; taken with automatic axes.
      axis: the mesh axis over which samples are sharded; its size must divide N.
      solver: of systems in sample space. "replicated": every device solves the whole system, of
        which it needs a copy.
        "cholesky" and "cg" keep the Gram matrices of ng.Exact, ng.BlockDiagonal and definite
        ng.LayerWise sharded by rows; conjugate gradients also solve the systems that couple layers.
        "auto" is "replicated" as long as the matrix and its factorisation fit on one device.
      tolerance: of conjugate gradients, |A v - b| / |b|.
      max_iterations: of conjugate gradients.

    Raises:
      TypeError, ValueError: no structure, no mesh, a mesh without this axis, an unknown solver, a
        tolerance or a number out of range.
    """

    structure: Structure
    mesh: Mesh
    axis: str = "data"
    solver: SolverName = "auto"
    tolerance: float = 1e-6
    max_iterations: int = 1000

    def __new__(cls, structure: object = None, *args: Any, **options: Any) -> Sharded:
        """One that can be averaged, where the structure can; copies are made without arguments."""
        averaged = isinstance(structure, AveragedStructure)
        return super().__new__(ShardedAverage if averaged else cls)

    def __post_init__(self) -> None:
        check_structure(self.structure)
        if isinstance(self.structure, Sharded):
            raise TypeError("the structure is sharded already")
        object.__setattr__(self, "mesh", place(self.mesh, self.axis).mesh)
        if self.solver not in get_args(SolverName):
            raise ValueError(
                f"solver must be one of {', '.join(get_args(SolverName))}, got {self.solver!r}"
            )
        check_number("tolerance", self.tolerance, positive=True)
        check_integer("max_iterations", self.max_iterations, 1)
        keep_plain(self)

    @property
    def name(self) -> str:
        """That of the structure."""
        return self.structure.name

    @property
    def plain(self) -> Structure:
        """The structure."""
        return self.structure

    @property
    def placement(self) -> Placement:
        """The devices."""
        return Placement(self.mesh, self.axis)

    @property
    def passes(self) -> OverDevices:
        """Each device runs the model on its own samples."""
        return OverDevices(self.placement)

    def operator(self, signals: Signals) -> Operator:
        """That of the structure, partitioned by XLA."""
        return self.structure.operator(signals)

    def solve(
        self, signals: Signals, gradient: Gradient, damping: Array | float
    ) -> tuple[LayerUpdate, ...]:
        """G^{-1} g; see ``Structure.solve``."""
        return self.solve_and_report(signals, gradient, damping)[0]

    def solve_and_report(
        self, signals: Signals, gradient: Gradient, damping: Array | float
    ) -> tuple[tuple[LayerUpdate, ...], Solution | None]:
        """Updates, and how the solves with sharded rows went; None where there were none.

        Args:
          signals: of the whole batch.
          gradient: what is solved for.
          damping: as in ``Structure.solve``.
        """
        solved, solution = self._solved(signals, gradient, damping)
        if solution is None:
            return solved, None
        done = solution.converged
        return jax.tree.map(lambda leaf: jnp.where(done, leaf, jnp.nan), solved), solution

    def _solved(
        self, signals: Signals, gradient: Gradient, damping: Array | float
    ) -> tuple[tuple[LayerUpdate, ...], Solution | None]:
        rows = self.placement.rows
        signals = jax.lax.with_sharding_constraint(signals, rows)
        if isinstance(gradient, Residual):
            gradient = jax.lax.with_sharding_constraint(gradient, rows)
        if isinstance(self.structure, UnitWise):
            found = solve_units_on_mesh(self.structure, signals, gradient, damping, self.placement)
            return found, None
        if isinstance(self.structure, KFAC) and not is_zero(damping):
            return solve_kfac(self.structure, signals, gradient, damping, self.placement), None
        if isinstance(self.structure, EKFAC):
            return solve_ekfac(self.structure, signals, gradient, damping, self.placement), None
        name = self.chosen_solver(signals, damping)
        if name != "replicated":
            solver = RowSolver(self.placement, name, self.tolerance, self.max_iterations)
            return solve_rows(self.structure, signals, gradient, damping, solver)
        with whole_products():
            return self.structure.solve(signals, gradient, damping), None

    def chosen_solver(self, signals: Signals, damping: object) -> SolverName:
        """The solver for a batch of these shapes.

        Raises:
          ValueError: this solver does not serve the structure.
        """
        structure, depth = self.structure, len(signals.layers)
        side, samples = structure.gram_size(signals), signals.size
        sharded = serves(structure, depth) and side in (samples, depth * samples)
        fits = 2 * side**2 * signals.outputs.dtype.itemsize <= device_memory()
        if self.solver == "replicated" or (self.solver == "auto" and (fits or not sharded)):
            return "replicated"
        if not sharded:
            raise ValueError(
                f'solver="{self.solver}" needs a definite system in sample space, which ng.Exact, '
                "ng.BlockDiagonal and ng.LayerWise with a positive definite sigma have; for "
                f'{structure!r} on this batch use solver="replicated"'
            )
        if isinstance(structure, LayerWise) and not isinstance(structure, BlockDiagonal):
            if self.solver == "cholesky":
                raise ValueError(
                    f"{structure.name} couples its layers, so its rows cannot be factorised layer "
                    'by layer: use solver="cg"'
                )
            if is_zero(damping):
                raise ValueError(f'solver="cg" for {structure.name} needs a positive damping')
            return "cg"
        return "cholesky" if self.solver == "auto" else self.solver

    def coefficient(self, test: Signals, train: Signals, damping: Array | float) -> Array:
        """That of the structure, partitioned by XLA."""
        with whole_products():
            return self.structure.coefficient(test, train, damping)

    def undamped_diagonal(self, train: Signals) -> Array | None:
        """That of the structure."""
        return self.structure.undamped_diagonal(train)

    def damping_scale(self, signals: Signals) -> Array:
        """That of the structure."""
        return self.structure.damping_scale(signals)

    def alpha(self, geometry: Geometry) -> float:
        """That of the structure."""
        return self.structure.alpha(geometry)

    def failed_conditions(self, geometry: Geometry) -> list[str]:
        """Those of the structure."""
        return self.structure.failed_conditions(geometry)

    def check(self, signals: Signals, damping: object) -> None:
        """The batch must divide by the devices, and the solver serve the structure.

        Raises:
          ValueError: it does not; or what the structure itself refuses.
        """
        check_divisible(self.placement, signals.num_samples)
        self.structure.check(signals, damping)
        self.chosen_solver(signals, damping)

    def gram_size(self, signals: Signals) -> int:
        """The side of the largest square array, or of one as large as the rows of a device."""
        side = self.structure.gram_size(signals)
        depth = len(signals.layers)
        sharded = serves(self.structure, depth) and side in (signals.size, depth * signals.size)
        if not sharded or self.solver == "replicated":
            return side
        # rows, and as many again while they are put together and factorised
        return math.ceil(side * math.sqrt(2 / self.placement.size))

    def system_arrays(self, signals: Signals) -> float:
        """2: what is dealt out is counted in ``gram_size``."""
        return 2.0


class ShardedAverage(Sharded, AveragedStructure):
    """``Sharded`` of a structure that means over samples make up, for moving averages.

    The means are over all samples of the mesh; what is made of them is dealt out.
    """

    structure: AveragedStructure

    @property
    def cheap_inverse(self) -> bool:  # type: ignore[override]
        """That of the structure."""
        return self.structure.cheap_inverse

    @property
    def has_basis(self) -> bool:  # type: ignore[override]
        """That of the structure."""
        return self.structure.has_basis

    def statistics(self, signals: Signals) -> tuple[Any, ...]:
        """Those of the structure, partitioned by XLA."""
        return self.structure.statistics(signals)

    def latest(self, signals: Signals) -> tuple[Any, ...]:
        """Those of the structure, partitioned by XLA."""
        return self.structure.latest(signals)

    def basis(self, factors: tuple[Any, ...]) -> tuple[Any, ...]:
        """That of the structure, the eigenvectors of a factor from one device."""
        if isinstance(self.structure, EKFAC):
            return basis_dealt(self.structure, factors, self.placement)
        return self.structure.basis(factors)

    def rotated(self, signals: Signals, basis: tuple[Any, ...]) -> tuple[Any, ...]:
        """Those of the structure, partitioned by XLA."""
        return self.structure.rotated(signals, basis)

    def moments(self, signals: Signals) -> Moments:
        """Those of the structure."""
        if isinstance(self.structure, EKFAC):
            return moments_dealt(self.structure, signals, self.placement)
        return self.structure.moments(signals)

    def invert(self, moments: Moments, damping: Array | float, num_samples: int) -> tuple[Any, ...]:
        """What the structure returns, each inverse from one device."""
        if isinstance(self.structure, (KFAC, EKFAC)):
            return invert_dealt(self.structure, moments, damping, num_samples, self.placement)
        return self.structure.invert(moments, damping, num_samples)

    def apply(
        self, inverse: tuple[Any, ...], slope: tuple[LayerUpdate, ...]
    ) -> tuple[LayerUpdate, ...]:
        """What the structure returns, each device with its share of the products."""
        if isinstance(self.structure, (KFAC, EKFAC)):
            return apply_split(self.structure, inverse, slope, self.placement)
        return self.structure.apply(inverse, slope)

    def scale_of(self, moments: Moments, num_samples: int) -> Array:
        """That of the structure."""
        return self.structure.scale_of(moments, num_samples)

    def factor_size(self, signals: Signals) -> int:
        """That of the structure."""
        return self.structure.factor_size(signals)
