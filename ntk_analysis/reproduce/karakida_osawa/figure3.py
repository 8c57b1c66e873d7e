"""Figure 3 of Karakida & Osawa (2020): layer- and unit-wise Fishers are isotropic, others not."""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import nnx

from natgrad_flax import MLP, BlockDiagonal, Diagonal, QuasiDiagonal, Structure, UnitWise
from natgrad_flax.optimizer.learning_rate import model_geometry
from ntk_analysis.coefficient import coefficient_pair
from ntk_analysis.conditions import measured_ranks
from ntk_analysis.empirical import InitialSignals, Matrix, initial_signals
from ntk_analysis.gradient_descent import GradientDescent
from ntk_analysis.isotropy import isotropy_of
from ntk_analysis.reproduce.registry import Measurement, Outcome, Report, above, below, check

STRUCTURES: dict[str, Structure] = {
    "NTK": GradientDescent(),
    "diagonal": Diagonal(),
    "quasi-diagonal": QuasiDiagonal(),
    "unit-wise": UnitWise(),
    "block-diagonal": BlockDiagonal(),
}
"""What the figure compares, from the least to the most isotropic."""

NUM_SAMPLES = 100
_NUM_INPUTS = 100
_WIDTHS = (64, 128, 256, 512, 1024)
_SEEDS = (0, 1, 2, 3, 4)
_WIDE = 256
_BIAS_VARIANCE = 0.5


def gaussian_inputs(num_samples: int, num_inputs: int, seed: int) -> Matrix:
    """Normal inputs of unit norm, shape (N, M_0)."""
    x = np.random.default_rng(seed).standard_normal((num_samples, num_inputs))
    normalised: Matrix = x / np.linalg.norm(x, axis=1, keepdims=True)
    return normalised


def network_signals(
    x: Matrix, width: int, bias_variance: float, seed: int
) -> tuple[MLP, InitialSignals]:
    """A ReLU network of three layers with sigma_w^2 = 2 and one output, and its signals at x."""
    model = MLP(
        (x.shape[1], width, width, 1),
        activation="relu",
        weight_variance=2.0,
        bias_variance=bias_variance,
        rngs=nnx.Rngs(seed),
    )
    return model, initial_signals(model, x)


def condition_numbers(x: Matrix, width: int, bias_variance: float, seed: int) -> dict[str, float]:
    """lambda_max / lambda_min of Theta-bar(x, x) at initialisation, by structure.

    Args:
      x: inputs, shape (N, M_0).
      width: M of both hidden layers.
      bias_variance: sigma_b^2.
      seed: of the parameters.
    """
    model, signals = network_signals(x, width, bias_variance, seed)
    geometry, ranks = model_geometry(model, len(x)), measured_ranks(signals.train)
    return {
        name: isotropy_of(structure, signals, geometry, ranks=ranks).condition_number
        for name, structure in STRUCTURES.items()
    }


@check(
    "KO-Fig3",
    "Condition number of every structure over the width",
    claim=(
        "With growing width the condition numbers of the block-diagonal and the unit-wise "
        "coefficient matrix go to 1; those of the diagonal and the quasi-diagonal one are below "
        "that of the tangent kernel, but stay away from 1."
    ),
    setting=(
        "L = 3, ReLU, sigma_w^2 = 2, sigma_b^2 = 0.5, rho = 0, C = 1, N = 100 Gaussian inputs of "
        "dimension 100 and unit norm, M = 64 to 1024, means over five seeds of inputs and "
        "parameters; the paper's N, input dimension, sigma_b^2 and rho are not public"
    ),
    origin="ours",
)
def run_figure_3(report: Report) -> Outcome:
    """Condition numbers with biases over the width, and without them at one width."""
    values: dict[str, list[list[float]]] = {name: [] for name in STRUCTURES}
    for width in _WIDTHS:
        rows = []
        for seed in _SEEDS:
            report(f"width {width}, seed {seed}")
            x = gaussian_inputs(NUM_SAMPLES, _NUM_INPUTS, seed)
            rows.append(condition_numbers(x, width, _BIAS_VARIANCE, seed))
        for name, found in values.items():
            found.append([row[name] for row in rows])
    means = {name: np.mean(found, axis=1) for name, found in values.items()}
    spreads = {name: np.std(found, axis=1) for name, found in values.items()}
    wide = np.asarray(_WIDTHS) >= _WIDE
    over = {name: mean[wide] for name, mean in means.items()}
    unit = over["unit-wise"]
    measurements = [
        below("block-diagonal, M >= 256: largest", float(over["block-diagonal"].max()), 1.001),
        below("unit-wise, M >= 256: largest", float(unit.max()), 1.3),
        below(
            "unit-wise, M >= 256: largest ratio to the next smaller width",
            float((unit[1:] / unit[:-1]).max()),
            1.0,
        ),
        *_apart("quasi-diagonal", over["quasi-diagonal"]),
        *_apart("diagonal", over["diagonal"]),
        below(
            "quasi-diagonal over diagonal, M >= 256: largest",
            float((over["quasi-diagonal"] / over["diagonal"]).max()),
            1.0,
        ),
        below(
            "diagonal over NTK, M >= 256: largest",
            float((over["diagonal"] / over["NTK"]).max()),
            1.0,
        ),
    ]
    report("no biases")
    unbiased, difference = _without_biases()
    measurements.append(
        below(
            "sigma_b = 0, M = 256: quasi-diagonal from diagonal coefficient matrix, relative",
            difference,
            1e-10,
        )
    )
    document: dict[str, Any] = {
        "widths": list(_WIDTHS),
        "seeds": list(_SEEDS),
        "curves": [
            {
                "structure": name,
                "mean": means[name].tolist(),
                "spread": spreads[name].tolist(),
                "values": values[name],
            }
            for name in STRUCTURES
        ],
        "without_biases": {"width": _WIDE, "values": unbiased},
    }
    notes = (
        "At M = 64 and 128 the inputs of the last layer have a rank below N = 100, as with these "
        "biases a third of the units or more are off for every sample. The pseudo-inverse then "
        "leaves block-diagonal eigenvalues of 2 and 3. The claim is tested from M = 256 on.",
        "The spread is the standard deviation over seeds.",
    )
    return Outcome(tuple(measurements), document, notes)


def _apart(name: str, means: Matrix) -> tuple[Measurement, Measurement]:
    """Away from 1, and not approaching it as the width grows fourfold."""
    return (
        above(f"{name}, M >= 256: smallest", float(means.min()), 3.0),
        above(f"{name}: M = 1024 over M = 256", float(means[-1] / means[0]), 0.6),
    )


def _without_biases() -> tuple[dict[str, list[float]], float]:
    """Condition numbers by structure and seed, and how far the two entry-wise Fishers are apart."""
    found: dict[str, list[float]] = {name: [] for name in STRUCTURES}
    apart = 0.0
    for seed in _SEEDS:
        x = gaussian_inputs(NUM_SAMPLES, _NUM_INPUTS, seed)
        for name, value in condition_numbers(x, _WIDE, 0.0, seed).items():
            found[name].append(value)
        if seed == _SEEDS[0]:
            _, signals = network_signals(x, _WIDE, 0.0, seed)
            quasi, diagonal = (
                coefficient_pair(STRUCTURES[name], signals)[0]
                for name in ("quasi-diagonal", "diagonal")
            )
            apart = float(np.abs(quasi - diagonal).max() / np.abs(diagonal).max())
    return found, apart
