"""How isotropic each structure is on real data, and whether alpha is the one of the theory.

No time is measured here: every figure is the same on each run, so any change is one of the code.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import natgrad_datasets
from flax import nnx

import natgrad_flax as ng
import ntk_analysis as na
from benchmarks.common import Suite, by_profile, unit
from ntk_analysis.methods import STRUCTURES

SAMPLES = 40
"""No more digits than their 64 pixels have rank, which K-FAC needs to be isotropic."""
CLASSES = (0, 7)
BIAS_VARIANCE = 0.1
"""For structures that are another one without biases."""
ROUNDING = 1e-8
"""What float64 leaves of a deviation that is zero; smaller ones are shown as this."""
TOLERANCE = 1e-6
LIMIT_FACTOR = 6.0


class Isotropy(Suite):
    """The spectrum of Theta-bar(x, x), which decides how fast a linearised network trains.

    ReLU networks 64-M-M-1 in NTK parametrisation on 40 handwritten digits (0 against 7), undamped,
    in float64. At Theta-bar = alpha I all eigenvalues are alpha, and one step of the learning rate
    1 / alpha fits the training set. ``gd`` is gradient descent, whose Theta-bar is the NTK; it and
    the diagonal structures are not isotropic, and have no alpha of the theory.
    """

    params: ClassVar[tuple[list[Any], ...]] = (
        by_profile(
            smoke=["gd", "block-diagonal"],
            fast=list(STRUCTURES),
            regular=list(STRUCTURES),
            large=list(STRUCTURES),
        ),
        by_profile(smoke=[64], fast=[256], regular=[64, 256, 1024], large=[64, 256, 1024, 4096]),
    )
    param_names: ClassVar = ["structure", "width"]

    def measure(self, structure: str, width: int) -> dict[str, float]:
        """All figures of a structure at a width; see the class.

        Raises:
          ArithmeticError: the spectrum contradicts the theory of the structure.
        """
        data = natgrad_datasets.load(
            "digits", classes=CLASSES, num_train=SAMPLES, num_test=1, dtype="float64"
        )
        model = ng.MLP(
            (data.input_dim, width, width, data.output_dim),
            activation="relu",
            weight_variance=2.0,
            bias_variance=BIAS_VARIANCE if STRUCTURES[structure].without_biases else 0.0,
            rngs=nnx.Rngs(0),
        )
        report = na.isotropy(STRUCTURES[structure], model, data.x_train)
        error = alpha_error(report)
        check(structure, width, report, error)
        return {
            "condition number": report.condition_number,
            "alpha error": error if math.isnan(error) else max(error, ROUNDING),
            "deviation": max(report.deviation, ROUNDING),
        }

    @unit("largest / smallest eigenvalue")
    def track_condition_number(self, *case: Any) -> float:
        """1 is isotropic. A rise at the same width makes training slower by this factor."""
        return self.figures["condition number"]

    @unit("|alpha measured / alpha of theory - 1|")
    def track_alpha_error(self, *case: Any) -> float:
        """How far off the learning rate 1 / alpha is; n/a where theory gives no alpha.

        1e-8 means exact. It falls with the width for unit-wise. A rise means that the formula of
        alpha and the structure no longer belong together.
        """
        return self.figures["alpha error"]

    @unit("spectral norm of Theta-bar / alpha - I")
    def track_deviation(self, *case: Any) -> float:
        """What share of the residual one step can leave, at most; 1e-8 means isotropic.

        Sees what the condition number does not: a few eigenvalues that are off.
        """
        return self.figures["deviation"]


def alpha_error(report: na.IsotropyReport) -> float:
    """|alpha measured / alpha of theory - 1|; NaN where theory gives no alpha."""
    if report.theoretical_alpha is None:
        return math.nan
    return abs(report.alpha / report.theoretical_alpha - 1)


def check(structure: str, width: int, report: na.IsotropyReport, error: float) -> None:
    """Compares a spectrum with the theory of its structure.

    Args:
      structure: its name.
      width: of the hidden layers.
      report: what was measured.
      error: of alpha, NaN where theory gives none.

    Raises:
      ArithmeticError: Theta-bar is not symmetric and positive; a structure is not isotropic with
        its alpha although its conditions hold (``UnitWise``: up to its rate in the width); gradient
        descent is isotropic.
    """
    where = f"{structure} at width {width}"
    if report.asymmetry > TOLERANCE or not report.eigenvalues[0] > 0:
        raise ArithmeticError(f"{where}: Theta-bar is not symmetric and positive")
    if not math.isfinite(report.condition_number):
        raise ArithmeticError(f"{where}: Theta-bar is singular")
    if structure == "gd" and report.condition_number < 10:
        raise ArithmeticError(f"{where}: the NTK of digits cannot be isotropic")
    if math.isnan(error) or report.failed_conditions:
        return
    # two hidden layers: isotropic up to about 1 / sqrt(M (L - 1))
    limit = STRUCTURES[structure].infinite_width == "train"
    allowed = LIMIT_FACTOR / math.sqrt(2 * width) if limit else TOLERANCE
    if report.deviation > allowed or error > allowed:
        raise ArithmeticError(
            f"{where} must be isotropic with alpha {report.theoretical_alpha:g}, to {allowed:.1e}; "
            f"found alpha {report.alpha:g} and a deviation of {report.deviation:.1e}"
        )
