"""Accuracies of separators of Gaussian samples as N and D grow together.

Labels are the signs of s = t . x. The margins of a separator with alpha along the unit vector t and
tau across it are v = alpha |s| + tau z with a normal z; its accuracy is 1 - atan(tau / alpha) / pi.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.optimize import brentq, fsolve, minimize_scalar
from scipy.special import ndtr

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(200)
_SIZES, _MASS = np.abs(_NODES), _WEIGHTS / _WEIGHTS.sum()


def deviation(dim: int, seeds: int = 1) -> float:
    """Standard deviation of a mean accuracy over seeds: measured at D = 50, 60 seeds, as 0.043."""
    return 0.043 * math.sqrt(50 / (dim * seeds))


def _short(level: float, alpha: float, tau: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """P(v < level), E(level - v)_+ and E(level - v)_+^2 for every size of s."""
    d = (level - alpha * _SIZES) / tau
    density = np.exp(-np.minimum(d**2, 1400) / 2) / math.sqrt(2 * math.pi)
    first = d * ndtr(d) + density
    return ndtr(d), tau * first, tau**2 * (d * first + ndtr(d))


def natural_limit_accuracy(ratio: float) -> float:
    """Of the limit of natural-gradient descent, the least sum of margins of at least 1, N > D.

    For an M-estimator with the proximal map p(v) = max(1, v - gamma) of that sum, the equations are
    E |s| (v - p) = 0, E (v - p)^2 = tau^2 D / N and P(p > 1) = 1 - D / N (Salehi et al. 2019).

    Args:
      ratio: N / D, above 1.
    """

    def equations(at: np.ndarray) -> list[float]:
        alpha, tau, gamma = at[0], math.exp(at[1]), at[2]
        tight, first, second = _short(1 + gamma, alpha, tau)
        moved = gamma**2 - 2 * gamma * first + second
        return [
            float(_MASS @ (_SIZES * (gamma - first))),
            float(_MASS @ moved) - tau**2 / ratio,
            float(_MASS @ tight) - 1 / ratio,
        ]

    (alpha, log_tau, _), _, solved, message = fsolve(
        equations, [ratio, 0.5, 1 / ratio], full_output=True
    )
    if solved != 1:
        raise ArithmeticError(f"no fixed point at N / D = {ratio:g}: {message}")
    return 1 - math.atan2(math.exp(log_tau), alpha) / math.pi


def max_margin_accuracy(ratio: float) -> float:
    """Of the l_2 max margin: the largest m with E (m - v)_+^2 <= tau^2 D / N on the unit circle.

    Montanari et al. (2019).

    Args:
      ratio: N / D.
    """

    def margin(angle: float) -> float:
        alpha, tau = math.cos(angle), math.sin(angle)

        def excess(level: float) -> float:
            return float(_MASS @ _short(level, alpha, tau)[2]) - tau**2 / ratio

        return float(brentq(excess, -20.0, 20.0))

    best = minimize_scalar(
        lambda angle: -margin(angle), bounds=(1e-3, math.pi / 2 - 1e-3), method="bounded"
    )
    return 1 - float(best.x) / math.pi
