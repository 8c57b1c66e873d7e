"""EKFAC: the mean of K-FAC's coefficient matrix, and not its isotropy."""

from __future__ import annotations

import natgrad_datasets
import numpy as np
from flax import nnx

from natgrad_flax import EKFAC, KFAC, MLP
from ntk_analysis.analytic import analytic_kernels
from ntk_analysis.empirical import Matrix
from ntk_analysis.isotropy import isotropy
from ntk_analysis.reproduce.natgrad.common import dense_layers, deviation, layer_coefficients
from ntk_analysis.reproduce.registry import (
    Measurement,
    Outcome,
    Report,
    above,
    below,
    between,
    check,
    close,
)

_SAMPLES, _INPUTS, _WIDTH = 12, 20, 40
_DIGITS = 40


@check(
    "NG-EKFAC",
    "EKFAC keeps the mean of K-FAC and loses its isotropy",
    claim="With the singular vectors V of the inputs and W of the derivatives, at zero damping "
    "Theta-bar_l = sum_pq z_pq z_pq^T / |z_pq|^2 with z_pq = v_p w_q, entry by entry: no singular "
    "value counts. Its mean eigenvalue is that of K-FAC as in Eq. 20, so N (L - 1) + 1 in all, at "
    "any width. Only the mean: the eigenvalues spread by a factor of 1.2 to 3, also at infinite "
    "width. They would close up as N grows if V and W had nothing to do with each other; but both "
    "come from the same inputs, and where they are the same a direction keeps a third of the mean.",
    setting="tanh networks of width 40 on 12 Gaussian inputs of 20 features, L = 3, one and two "
    "outputs; infinitely wide ReLU network with three hidden layers on 40 digits (3 and 8); random "
    "orthogonal V and W of side 16 and 128; zero damping",
    origin="ours",
)
def eigenbasis(report: Report) -> Outcome:
    """The mean against K-FAC's alpha, the formula against the structure, and the spread."""
    rng = np.random.default_rng(0)
    x, mean = rng.normal(size=(_SAMPLES, _INPUTS)), 2 * _SAMPLES + 1
    measurements: list[Measurement] = []
    for outputs in (1, 2):
        report(f"{outputs} outputs" if outputs > 1 else "one output")
        widths = (_INPUTS, _WIDTH, _WIDTH, outputs)
        model = MLP(widths, activation="tanh", rngs=nnx.Rngs(0))
        kfac = isotropy(KFAC(last_layer="literal"), model, x)
        ekfac = isotropy(EKFAC(), model, x)
        name = f"C = {outputs}"
        measurements += [
            close(f"{name}, K-FAC: alpha", kfac.alpha, mean, 1e-6),
            below(f"{name}, K-FAC: |Theta-bar / alpha - I|", kfac.deviation, 1e-6),
            close(f"{name}, EKFAC: mean eigenvalue", ekfac.alpha, mean, 1e-6),
            between(f"{name}, EKFAC: condition number", ekfac.condition_number, 1.1, 3.0),
        ]
        if outputs == 1:
            measurements.append(
                below(f"{name}: formula against the structure", _formula_error(model, x), 1e-8)
            )
    report("infinite width")
    measurements += _infinite_width()
    report("random bases")
    measurements += _random_bases(rng)
    return Outcome(tuple(measurements))


def coefficient_in_eigenbasis(inputs: Matrix, derivatives: Matrix) -> Matrix:
    """Theta-bar_l of EKFAC from the Gram matrices of a layer of full rank, one output.

    Args:
      inputs: a a^T, shape (N, N).
      derivatives: D D^T, shape (N, N).
    """
    v, w = (np.linalg.eigh(gram)[1] for gram in (inputs, derivatives))
    z = v[:, :, None] * w[:, None, :]
    found: Matrix = np.einsum("npq,mpq->nm", z / np.sum(z**2, axis=0), z)
    return found


def _formula_error(model: MLP, x: Matrix) -> float:
    """The largest relative difference of a hidden layer."""
    grams = [layer.grams for layer in dense_layers(model, x)[:-1]]
    found = layer_coefficients(EKFAC(), model, x)[:-1]
    return max(
        float(np.linalg.norm(matrix - formula) / np.linalg.norm(formula))
        for matrix, formula in zip(
            found, (coefficient_in_eigenbasis(*g) for g in grams), strict=True
        )
    )


def _infinite_width() -> list[Measurement]:
    data = natgrad_datasets.load(
        "digits", classes=(3, 8), num_train=_DIGITS, num_test=1, dtype="float64"
    )
    model = MLP((data.input_dim, 4, 4, 4, 1), activation="relu", rngs=nnx.Rngs(0))
    kernels = analytic_kernels(model, data.x_train, parts=("inputs", "derivatives", "ntk"))
    hidden = zip(kernels.inputs[:-1], kernels.derivatives[:-1], strict=True)
    # a single output has the derivative 1: the last layer adds the identity
    total = sum((coefficient_in_eigenbasis(*pair) for pair in hidden), start=np.eye(_DIGITS))
    mean = float(np.trace(total) / _DIGITS)
    return [
        close("infinite width: mean eigenvalue", mean, 3 * _DIGITS + 1, 1e-6),
        between("infinite width: condition number", float(np.linalg.cond(total)), 1.2, 3.0),
        above(
            "infinite width: condition number of the NTK", float(np.linalg.cond(kernels.ntk)), 100
        ),
    ]


def _random_bases(rng: np.random.Generator) -> list[Measurement]:
    """How far Theta-bar_l is from N I with unrelated and with equal eigenvectors."""
    apart: dict[tuple[str, int], float] = {}
    for size in (16, 128):
        first, second = (np.linalg.qr(rng.normal(size=(size, size)))[0] for _ in range(2))
        values = np.arange(1.0, size + 1)
        grams = [basis * values @ basis.T for basis in (first, second)]
        for name, other in (("unrelated", grams[1]), ("equal", grams[0])):
            apart[name, size] = deviation(coefficient_in_eigenbasis(grams[0], other), size)
    return [
        below(
            "unrelated eigenvectors, N = 128: |Theta-bar_l / N - I|", apart["unrelated", 128], 0.06
        ),
        above(
            "unrelated eigenvectors: N = 16 over N = 128",
            apart["unrelated", 16] / apart["unrelated", 128],
            2.0,
        ),
        close(
            "equal eigenvectors, N = 128: |Theta-bar_l / N - I|", apart["equal", 128], 2 / 3, 0.05
        ),
    ]
