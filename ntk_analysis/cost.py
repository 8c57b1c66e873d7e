"""What a Fisher approximation costs: entries of the Fisher, numbers stored, operations a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from natgrad_flax import DenseSignals, Signals, Structure
from natgrad_flax.costs.flops import cost_of
from natgrad_flax.costs.programs import solve_cost
from natgrad_flax.optimizer.checks import check_structure
from natgrad_flax.signals.base import LayerSignals, LayerUpdate
from natgrad_flax.structures import Geometry
from ntk_analysis.gradient_descent import GradientDescent


@dataclass(frozen=True)
class StructureCost:
    """The cost of one Fisher approximation on a network.

    Attributes:
      structure: its name.
      num_params: P.
      nonzeros: entries of the P x P Fisher that the structure keeps; the Kronecker products of
        K-FAC and EKFAC fill the blocks of the block-diagonal structure. For the quasi-diagonal one
        these are the non-zeros of its inverse, since its own G is filled in unit by unit. An entry
        counts that can be non-zero: with several outputs and the mean squared error, those between
        different units of the last layer are zero all the same.
      stored: numbers that an implementation keeps which forms the Fisher itself: nonzeros, once
        where they come in symmetric pairs; the two factors of each layer for K-FAC; their
        eigenvectors and the scaling in that basis for EKFAC; none for gradient descent.
      inversion_flops: of one step, what the structure adds to the gradient: Gram matrices,
        factorisations and their solves.
      step_flops: of one step, all of it.

    Example:
      >>> import natgrad_flax as ng, ntk_analysis as na
      >>> from natgrad_flax.structures import Geometry
      >>> geometry = Geometry(layers=((4, 8), (8, 1)), num_samples=4, num_outputs=1)
      >>> cost = na.structure_cost(ng.Diagonal(), geometry)
      >>> cost.num_params, cost.nonzeros, cost.fraction_of_exact  # P of P^2 entries
      (40, 40, 0.025)
    """

    structure: str
    num_params: int
    nonzeros: int
    stored: int
    inversion_flops: float
    step_flops: float

    @property
    def fraction_of_exact(self) -> float:
        """nonzeros / P^2; about 1 / (M (L - 1)) for the unit-wise Fisher of a square network."""
        return self.nonzeros / self.num_params**2


def structure_cost(
    structure: Structure, geometry: Geometry, *, damped: bool = False
) -> StructureCost:
    """Counts entries, numbers and the flops of one full-batch step with the exact Fisher.

    The flops are counted in the program of ``Structure.solve`` on signals of these sizes
    (``natgrad_flax.costs.flops.cost_of``), so they follow its choice of space, its symmetric
    products and its decisions, for matrices of full rank.

    Args:
      structure: the Fisher approximation, or ``GradientDescent()``.
      geometry: sizes of the network and the batch. Layers that follow each other show whether they
        have biases, which ``QuasiDiagonal`` counts; layer 1 is taken to be like layer 2. With an
        active fraction other than 1 the units of an undamped ``UnitWise`` share no factorisation.
      damped: whether there is a damping; layer-wise and unit-wise structures then solve larger
        systems.

    Raises:
      TypeError: the structure does not tell its entries.
      ValueError: a layer-wise structure for another number of layers; ``QuasiDiagonal`` on a
        single layer.

    Example:
      >>> import natgrad_flax as ng, ntk_analysis as na
      >>> from natgrad_flax.structures import Geometry
      >>> geometry = Geometry(layers=((4, 8), (8, 1)), num_samples=4, num_outputs=1)
      >>> na.structure_cost(ng.BlockDiagonal(), geometry).nonzeros  # 32^2 + 8^2
      1088
    """
    check_structure(structure)
    nonzeros, stored = structure.entries(geometry)
    alone = damped or (structure.masks_units and geometry.active_fraction != 1)
    gradient = _solve_flops(GradientDescent(), geometry, False)
    inversion = _solve_flops(structure, geometry, alone) - gradient
    step = gradient_flops(geometry) + inversion
    return StructureCost(structure.name, sum(geometry.params), nonzeros, stored, inversion, step)


def gradient_flops(geometry: Geometry) -> float:
    """Flops of the gradient: forward pass, D of every output, and the product J^T r.

    An output goes back through a layer at the price of the way forward; for one output this is
    ordinary back-propagation. Activations are not counted.
    """
    layers = _signals(geometry).layers
    updates = jax.eval_shape(lambda layers: [a.local_vjp(a.cotangent(0)) for a in layers], layers)

    def through(layers: Sequence[LayerSignals], updates: Sequence[LayerUpdate]) -> list[Array]:
        return [a.local_jvp(u) for a, u in zip(layers, updates, strict=True)]

    forward = cost_of(through, layers, updates).flops
    back = geometry.num_outputs * cost_of(through, layers[1:], updates[1:]).flops
    return forward + back + _solve_flops(GradientDescent(), geometry, False)


@lru_cache
def _solve_flops(structure: Structure, geometry: Geometry, damped: bool) -> float:
    signals = _signals(geometry)
    return solve_cost(structure, signals, inside=True, damping=float(damped)).flops


def _signals(geometry: Geometry) -> Signals:
    """Shapes of the signals of a network of these sizes."""
    n, c = geometry.num_samples, geometry.num_outputs

    def shape(*sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    layers = tuple(
        DenseSignals(shape(n, fan_in - bias), shape(n, c, units), 1.0 if bias else None, ())
        for (fan_in, units), bias in zip(geometry.layers, geometry.biases, strict=True)
    )
    return Signals(layers, shape(n, c))
