"""Every structure of the library on one network: how isotropic, for which cost."""

from __future__ import annotations

from typing import Any

import numpy as np

from natgrad_flax import (
    EKFAC,
    KFAC,
    KFOC,
    BlockDiagonal,
    BlockTriDiagonal,
    Diagonal,
    Exact,
    Foof,
    LowRankUnits,
    MiniBlock,
    Nystroem,
    QuasiDiagonal,
    Shampoo,
    Structure,
    UnitBlocks,
    UnitWise,
)
from natgrad_flax.optimizer.learning_rate import model_geometry
from ntk_analysis.cost import structure_cost
from ntk_analysis.gradient_descent import GradientDescent
from ntk_analysis.isotropy import isotropy
from ntk_analysis.reproduce.natgrad.common import dense_net, sphere
from ntk_analysis.reproduce.registry import Outcome, Report, above, below, between, check, close

STRUCTURES: dict[str, Structure] = {
    "gradient descent": GradientDescent(),
    "diagonal": Diagonal(),
    "quasi-diagonal": QuasiDiagonal(),
    "blocks of 8": UnitBlocks(8),
    "blocks of 24": UnitBlocks(24),
    "blocks of 64": UnitBlocks(64),
    "units of rank 10": LowRankUnits(10),
    "units of rank 40": LowRankUnits(40),
    "unit-wise": UnitWise(),
    "A alone": Foof("inputs"),
    "B alone": Foof("units"),
    "mini-block": MiniBlock("inputs"),
    "mini-block, outgoing": MiniBlock("units"),
    "K-FAC": KFAC(),
    "EKFAC": EKFAC(),
    "Shampoo 1/4": Shampoo(0.25),
    "Shampoo 1/2": Shampoo(0.5),
    "Shampoo 1": Shampoo(1.0),
    "KFOC": KFOC(20),
    "Nystroem": Nystroem(40, seed=0),
    "block-diagonal": BlockDiagonal(),
    "block-tri-diagonal": BlockTriDiagonal(),
    "exact": Exact(),
}
"""By their names in tables and figures."""

_SAMPLES, _WIDTH, _SEEDS = 40, 256, (0, 1)


@check(
    "NG-Frontier-Map",
    "The frontier: condition number against what is stored and computed",
    claim="Isotropic without qualification are the exact, the layer-wise and the K-FAC structures, "
    "for one output the mini-block one, and the unit-wise one up to inactive units; so is Nystroem "
    "from N directions on, below which it trains none of the others. FOOF comes within a factor of "
    "1.7, for a sixth of a gradient step in flops, and stores less than even the diagonals, which "
    "leave a factor of 6; the mini-block Fisher stores no more. Blocks of 24 inputs do nearly as "
    "well as the unit-wise Fisher of a ReLU network for a tenth of its numbers, and so much better "
    "than the ten largest eigenvalues a unit, which take nearly as many. Shampoo and KFOC store as "
    "much as K-FAC, cost more and are less isotropic: nearest to the Fisher matrix in Frobenius "
    "norm is not near in function space.",
    setting="two hidden layers of 256 units, ReLU and tanh, one output, no biases, N = 40 Gaussian "
    "inputs of 256 features and norm 16, means of two seeds; numbers that one keeps who averages "
    "the Fisher over batches; flops of one full-batch step; zero damping",
    origin="ours",
)
def frontier(report: Report) -> Outcome:
    """Condition numbers and costs of every structure."""
    x = sphere(_SAMPLES, _WIDTH)
    models = {
        activation: [dense_net((_WIDTH, _WIDTH, _WIDTH, 1), activation, seed) for seed in _SEEDS]
        for activation in ("relu", "tanh")
    }
    geometry = model_geometry(models["relu"][0], _SAMPLES)
    gradient = structure_cost(GradientDescent(), geometry).step_flops
    points: list[dict[str, Any]] = []
    for name, structure in STRUCTURES.items():
        report(name)
        cost = structure_cost(structure, geometry)
        points.append(
            {
                "name": name,
                "structure": structure.name,
                "stored": cost.stored,
                "flops": cost.step_flops / gradient,
                **{
                    activation: float(
                        np.mean([isotropy(structure, one, x).condition_number for one in several])
                    )
                    for activation, several in models.items()
                },
            }
        )
    by_name = {point["name"]: point for point in points}
    relu = {name: point["relu"] for name, point in by_name.items()}
    tanh = {name: point["tanh"] for name, point in by_name.items()}
    exact = (
        "exact", "block-diagonal", "block-tri-diagonal", "K-FAC", "mini-block", "Nystroem",
    )  # fmt: skip
    stored = {name: point["stored"] for name, point in by_name.items()}
    measurements = [
        below(
            "exact, layer-wise, K-FAC, mini-block, Nystroem: largest condition number - 1",
            max(max(relu[name], tanh[name]) for name in exact) - 1,
            1e-6,
        ),
        between("unit-wise: relu", relu["unit-wise"], 1.05, 1.4),
        below("unit-wise: tanh, less 1", tanh["unit-wise"] - 1, 1e-6),
        between("A alone: relu", relu["A alone"], 1.1, 1.7),
        below("A alone: tanh", tanh["A alone"], 1.25),
        between("B alone: relu", relu["B alone"], 1.2, 1.8),
        between("EKFAC: relu", relu["EKFAC"], 1.05, 1.3),
        between("Shampoo 1/4: relu", relu["Shampoo 1/4"], 3.5, 7.0),
        between("Shampoo 1/2: relu", relu["Shampoo 1/2"], 1.4, 2.2),
        between("Shampoo 1: relu", relu["Shampoo 1"], 1.2, 2.5),
        above("KFOC: relu", relu["KFOC"], 2.0),
        between("diagonal: relu", relu["diagonal"], 4.5, 7.5),
        above("gradient descent: relu", relu["gradient descent"], 15.0),
        below("A alone: stored over that of K-FAC", stored["A alone"] / stored["K-FAC"], 0.65),
        below("A alone: stored over the diagonal", stored["A alone"] / stored["diagonal"], 0.8),
        below("A alone: flops over gradient descent", by_name["A alone"]["flops"], 1.2),
        below(
            "blocks of 24: stored over that of unit-wise",
            stored["blocks of 24"] / stored["unit-wise"],
            0.12,
        ),
        below("blocks of 24: relu, over unit-wise", relu["blocks of 24"] / relu["unit-wise"], 1.2),
        between(
            "units of rank 10: stored over blocks of 24",
            stored["units of rank 10"] / stored["blocks of 24"],
            0.7,
            1.0,
        ),
        above(
            "units of rank 10: relu, over blocks of 24",
            relu["units of rank 10"] / relu["blocks of 24"],
            1.8,
        ),
        below(
            "units of rank 40: relu, over unit-wise, less 1",
            relu["units of rank 40"] / relu["unit-wise"] - 1,
            1e-6,
        ),
        between("mini-block, outgoing: relu", relu["mini-block, outgoing"], 1.1, 1.5),
        close("mini-block: stored over A alone", stored["mini-block"] / stored["A alone"], 1, 0),
    ]
    notes = (
        "The flops are those of a step alone: with 40 samples the exact Fisher solves one system "
        "of side 40. What is stored counts when the Fisher is kept and averaged over batches.",
    )
    return Outcome(tuple(measurements), {"points": points}, notes)
