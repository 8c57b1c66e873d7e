"""What is compared, and in which convention the two sides agree. All of it is data.

A structure that another peer has, or a quantity more, is a row more here and a name more on both
sides (``ours.quantity``, ``Side.quantity``).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """A quantity that both sides compute.

    Attributes:
      quantity: its name, see ``ours.quantity``.
      theirs: what the peer calls it.
      convention: how theirs becomes ours, as the peer documents it; "" where they are the same.
    """

    quantity: str
    theirs: str
    convention: str = ""


TOLERANCE = {"float64": 1e-10, "float32": 1e-4}
"""Most of |theirs - ours| / |ours|, by the type of the numbers.

Rounding in float32 is magnified by the condition of the damped factors.
"""

MEAN = "its squared error is a mean over the C outputs without 1/2: "
TWICE = MEAN + "2/C of ours"
OUTER = MEAN + "products of its gradients are 4/C of ours"
SPLIT = "pi by mean diagonals (Martens & Grosse 2015, Section 6.3)"
WHOLE = "exact damping: rho is added to the scaling"
SCALED = "update_diag gives the scaling of George et al. (2018); without it K-FAC's"
DRAWS = "the empirical Fisher of the drawn targets"
AVERAGED = "averages squares over the batch twice: 1/N of ours"

COMPARISONS: dict[str, tuple[Comparison, ...]] = {
    "curvlinops": (
        Comparison("gradient", "torch.autograd.grad", TWICE),
        Comparison("fisher/exact", "GGNLinearOperator", TWICE),
        Comparison("fisher/empirical", "EFLinearOperator", OUTER),
        Comparison("fisher/mc", "EFLinearOperator", f"{DRAWS}; {OUTER}"),
        Comparison("kfac/exact", "KFACLinearOperator, type-2, expand", TWICE),
        Comparison("kfac/empirical", "KFACLinearOperator, empirical, expand", OUTER),
        Comparison("kfac/mc", "KFACLinearOperator, empirical, expand", f"{DRAWS}; {OUTER}"),
        Comparison("kfac-reduce/exact", "KFACLinearOperator, type-2, reduce", TWICE),
        Comparison("ekfac/exact", "EKFACLinearOperator, type-2, expand", TWICE),
        Comparison("ekfac/mc", "EKFACLinearOperator, empirical, expand", f"{DRAWS}; {OUTER}"),
        Comparison("step/kfac/exact", "KFACInverseLinearOperator", f"{SPLIT}; {TWICE}"),
        Comparison("step/kfac-reduce/exact", "KFACInverseLinearOperator", f"{SPLIT}; {TWICE}"),
        Comparison("step/kfac/mc", "KFACInverseLinearOperator", f"{SPLIT}; {DRAWS}; {OUTER}"),
        Comparison("step/ekfac/exact", "KFACInverseLinearOperator", f"{WHOLE}; {TWICE}"),
        Comparison("step/ekfac/mc", "KFACInverseLinearOperator", f"{WHOLE}; {DRAWS}; {OUTER}"),
    ),
    "nngeometry": (
        Comparison("gradient", "torch.autograd.grad", TWICE),
        Comparison("fisher/exact", "FIM, PMatDense"),
        Comparison("fisher/mc", "PMatDense of log-likelihoods", DRAWS),
        Comparison("block-diagonal/exact", "FIM, PMatBlockDiag"),
        Comparison(
            "kfac/exact",
            "FIM, PMatKFAC",
            "sqrt(S) A and B / sqrt(S) for S outputs: one product",
        ),
        Comparison("kfac/mc", "PMatKFAC of log-likelihoods", DRAWS),
        Comparison("ekfac/exact", "FIM, PMatEKFAC", SCALED),
        Comparison("ekfac/mc", "PMatEKFAC of log-likelihoods", f"{DRAWS}; {SCALED}"),
        Comparison("diagonal/exact", "FIM, PMatDiag"),
        Comparison(
            "quasi-diagonal/exact",
            "FIM, PMatQuasiDiag",
            "entries alone: it inverts the matrix that is 0 elsewhere, Ollivier (2015) another",
        ),
        Comparison("step/fisher/exact", "PMatDense.solve"),
        Comparison("step/block-diagonal/exact", "PMatBlockDiag.solve"),
        Comparison("step/kfac/exact", "PMatKFAC.inverse", SPLIT),
        Comparison("step/kfac/mc", "PMatKFAC.inverse", f"{SPLIT}; {DRAWS}"),
        Comparison("step/ekfac/exact", "PMatEKFAC.solve", SCALED),
        Comparison("step/ekfac/mc", "PMatEKFAC.solve", f"{DRAWS}; {SCALED}"),
        Comparison("step/diagonal/exact", "PMatDiag.solve"),
    ),
    "kfac-jax": (
        Comparison("gradient", "jax.grad"),
        Comparison("fisher/exact", "ImplicitExactCurvature.multiply_fisher"),
        Comparison("block-diagonal/exact", "DenseFull, Conv2DFull, fisher_exact"),
        Comparison("kfac/exact", "...TwoKroneckerFactored, fisher_exact"),
        Comparison("kfac/empirical", "...TwoKroneckerFactored, fisher_empirical", AVERAGED),
        Comparison("kfac/mc", "...TwoKroneckerFactored, fisher_empirical", f"{DRAWS}; {AVERAGED}"),
        Comparison("diagonal/exact", "DenseDiagonal, Conv2DDiagonal, fisher_exact"),
        Comparison("step/block-diagonal/exact", "multiply_inverse"),
        Comparison(
            "step/kfac/exact", "Optimizer.step, its first", f"{SPLIT}; moving averages start anew"
        ),
        Comparison(
            "step/kfac/mc",
            "multiply_inverse",
            f"{SPLIT}; {DRAWS}; {AVERAGED}, so 1/N of the damping gives N times the step",
        ),
        Comparison("step/diagonal/exact", "multiply_inverse"),
    ),
}
"""By peer. Curvature of all carries 1/N, and damping is added to it, as ours."""

STEP = "step/kfac/mc"
"""What is compared at the size that is timed: that very step, for given draws."""
