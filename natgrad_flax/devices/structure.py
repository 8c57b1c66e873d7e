"""A structure whose work is dealt out to the devices of a mesh."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from natgrad_flax.arguments.scalars import check_integer, check_number, keep_plain
from natgrad_flax.damping import is_zero
from natgrad_flax.devices.executor import run_on_mesh
from natgrad_flax.devices.linear_solve import Solution
from natgrad_flax.devices.passes import OverDevices
from natgrad_flax.devices.placement import Placement, check_divisible, device_memory, place
from natgrad_flax.devices.row_solve import RowSolver, rows_side, solve_rows
from natgrad_flax.operators.coupled import Coupled
from natgrad_flax.optimizer.checks import check_structure
from natgrad_flax.signals.base import LayerUpdate
from natgrad_flax.signals.dense import Signals
from natgrad_flax.signals.gradient import Gradient, Residual
from natgrad_flax.structures import AveragedStructure, Structure

SolverName = Literal["auto", "replicated", "cholesky", "cg"]


def _own(name: str, *, on_mesh: bool = False) -> Callable[..., Any]:
    """A method that gives what the structure gives: as XLA partitions it, or dealt out."""

    def method(self: Sharded, *arguments: Any, **named: Any) -> Any:
        own = partial(getattr(self.structure, name), *arguments, **named)
        return run_on_mesh(own, self.placement) if on_mesh else own()

    return method


@dataclass(frozen=True)
class Sharded(Structure):
    """A structure on a mesh, to be used wherever a structure is.

    Every structure serves a batch that is sharded over a mesh as it is: XLA partitions the passes,
    the Gram matrices and the means over samples, and puts the collectives between them. This
    wrapper adds what XLA does not see: systems in sample space whose N S x N S matrices stay
    sharded by rows; units that are independent of each other; and systems, inverses and
    eigendecompositions (of layers, of Kronecker factors), each of which one device does for all.

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

    Example:
      >>> import jax, jax.numpy as jnp, natgrad_flax as ng
      >>> from flax import nnx
      >>> from natgrad_flax.devices import Sharded
      >>> # or more of them
      >>> mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
      >>> model = ng.MLP((4, 8, 1), rngs=nnx.Rngs(0))
      >>> x, y = jnp.eye(4), jnp.ones((4, 1))
      >>> structure = Sharded(ng.KFAC(), mesh)
      >>> options = {"loss": ng.MeanSquaredError(), "damping": 1e-3}
      >>> step = ng.natural_gradient(model, x, y, structure=structure, **options)
      >>> same = ng.natural_gradient(model, x, y, structure=ng.KFAC(), **options)
      >>> u, v = (tree["layers"][0]["kernel"] for tree in (step, same))
      >>> bool(jnp.allclose(u, v, rtol=1e-3))
      True
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
        for kind in (Structure, AveragedStructure):
            for name in kind.__annotations__:
                if hasattr(self.structure, name):
                    # what a class says of itself, the structure's says of this one
                    object.__setattr__(self, name, getattr(self.structure, name))

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

    operator = _own("operator")

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
        name = self.chosen_solver(signals, damping)

        def solve() -> tuple[tuple[LayerUpdate, ...], Solution | None]:
            if name == "replicated":
                return self.structure.solve(signals, gradient, damping), None
            solver = RowSolver(self.placement, name, self.tolerance, self.max_iterations)
            return solve_rows(self.structure.operator(signals), gradient, damping, solver)

        found: tuple[tuple[LayerUpdate, ...], Solution | None] = run_on_mesh(solve, self.placement)
        return found

    def chosen_solver(self, signals: Signals, damping: object) -> SolverName:
        """The solver for a batch of these shapes.

        Raises:
          ValueError: this solver does not serve the structure.
        """
        structure, (coupled, side) = self.structure, self._rows(signals)
        fits = 2 * side**2 * signals.outputs.dtype.itemsize <= device_memory()
        if self.solver == "replicated" or (self.solver == "auto" and fits):
            return "replicated"
        if not side:
            raise ValueError(
                f'solver="{self.solver}" needs a definite system in sample space, which ng.Exact, '
                "ng.BlockDiagonal and ng.LayerWise with a positive definite sigma have; for "
                f'{structure!r} on this batch use solver="replicated"'
            )
        if coupled:
            if self.solver == "cholesky":
                raise ValueError(
                    f"{structure.name} couples its layers, so its rows cannot be factorised layer "
                    'by layer: use solver="cg"'
                )
            if is_zero(damping):
                raise ValueError(f'solver="cg" for {structure.name} needs a positive damping')
            return "cg"
        return "cholesky" if self.solver == "auto" else self.solver

    def _rows(self, signals: Signals) -> tuple[bool, int]:
        """Whether layers are coupled, and the side of systems whose rows can be sharded, or 0."""
        # operators of Gram matrices are made of shapes alone
        if self.structure.shared_weights != "gram":
            return False, 0
        operator = self.structure.operator(signals)
        return isinstance(operator, Coupled), rows_side(operator)

    coefficient = _own("coefficient")
    undamped_diagonal = _own("undamped_diagonal")
    damping_scale = _own("damping_scale")
    alpha = _own("alpha")
    failed_conditions = _own("failed_conditions")

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
        side = self._rows(signals)[1]
        if not side or self.solver == "replicated":
            return self.structure.gram_size(signals)
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

    statistics = _own("statistics")
    latest = _own("latest")
    rotated = _own("rotated")
    scale_of = _own("scale_of")
    factor_size = _own("factor_size")
    basis_of = _own("basis_of")
    basis = _own("basis", on_mesh=True)
    moments = _own("moments", on_mesh=True)
    invert = _own("invert", on_mesh=True)
    apply = _own("apply", on_mesh=True)
