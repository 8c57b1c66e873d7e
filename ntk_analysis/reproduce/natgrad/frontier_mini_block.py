"""The mean of the Fisher blocks of all units of a layer: isotropic, for one factor."""

from __future__ import annotations

from natgrad_flax import Foof, MiniBlock
from ntk_analysis.coefficient import coefficient_matrix
from ntk_analysis.reproduce.natgrad.common import condition_number, dense_net, deviation, sphere
from ntk_analysis.reproduce.registry import (
    Measurement,
    Outcome,
    Report,
    above,
    below,
    between,
    check,
)

_SAMPLES, _FEATURES, _WIDTHS, _OUTPUTS = 20, 64, (64, 256), 3


@check(
    "NG-Frontier-MiniBlock",
    "One block for all units of a layer is isotropic for one output, at any width",
    claim="The mini-block Fisher (Bahamou, Goldfarb & Ren 2023) of a dense layer is the mean of "
    "the Fisher blocks of its units, R = (1/(N M)) sum_n |D_n|^2 a_n^T a_n. If inputs have rank N, "
    "a_n R^-1 a_m^T = delta_nm N M / |D_n|^2, so Theta-bar_l = M_l I for one output: isotropic "
    "without any limit, for the numbers of FOOF, which leaves |D_n|^2. With several outputs "
    "M_l D_ns . D_nt / |D_n|^2 is left within each sample; it tends to M_l / C as M^-1/2.",
    setting=f"two hidden layers, ReLU and tanh, no biases, N = {_SAMPLES} Gaussian inputs of "
    f"{_FEATURES} features and norm 8, one output at width {_WIDTHS[0]} and {_OUTPUTS} outputs at "
    f"widths {_WIDTHS[0]} and {_WIDTHS[1]}, one seed, zero damping",
    origin="ours",
    fast=True,
)
def mini_block(report: Report) -> Outcome:
    """The distance from alpha I, with FOOF as the control, and what C > 1 leaves."""
    x, structure = sphere(_SAMPLES, _FEATURES), MiniBlock("inputs")
    measurements: list[Measurement] = []
    for activation in ("relu", "tanh"):
        report(activation)
        width = _WIDTHS[0]
        model = dense_net((_FEATURES, width, width, 1), activation)
        found = deviation(coefficient_matrix(structure, model, x), 2 * width + 1)
        control = condition_number(coefficient_matrix(Foof("inputs"), model, x))
        left = [
            deviation(
                coefficient_matrix(
                    structure, dense_net((_FEATURES, wide, wide, _OUTPUTS), activation), x
                ),
                (2 * wide + _OUTPUTS) / _OUTPUTS,
            )
            for wide in _WIDTHS
        ]
        measurements += [
            below(f"{activation}: |Theta-bar / (2 M + 1) - I|", found, 1e-8),
            above(f"{activation}: condition of FOOF", control, 1.1),
            above(f"{activation}, {_OUTPUTS} outputs: the distance from it, narrow", left[0], 0.1),
            between(
                f"{activation}, {_OUTPUTS} outputs: the same, wide over narrow, 4^-1/2 in theory",
                left[1] / left[0],
                0.3,
                0.75,
            ),
        ]
    return Outcome(tuple(measurements))
