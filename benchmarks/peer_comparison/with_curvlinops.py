"""curvlinops in a worker: curvature as linear operators, and the inverse of its K-FAC.

Conventions, from its documentation (release 3): with ``reduction="mean"`` curvature carries 1/N, as
ours does, and PyTorch's squared error is a mean over the C outputs as well and has no 1/2, so its
Hessian is 2/C of ours and an outer product of its gradients 4/C (``GGNLinearOperator``,
``EFLinearOperator``). ``separate_weight_and_bias=False`` treats kernel and bias jointly, as we do.
``use_heuristic_damping`` is the pi split of Martens & Grosse (2015, Section 6.3) by mean diagonals;
``EKFACLinearOperator`` takes ``use_exact_damping`` alone, which adds rho to its eigenvalues. These
are second moments of per-example gradients, summed over positions, as ours.
``KFACType`` names the two forms of Eschenhagen et al. (2023) for shared weights.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from benchmarks.peer_comparison.exchange import Array, Problem
from benchmarks.peer_comparison.torch_network import Batch

if TYPE_CHECKING:
    import torch

RATE = 1e-3
"""Learning rate of the timed steps."""


class Side:
    """curvlinops on one problem.

    Args:
      problem: the problem.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._batch = Batch(problem)
        self._seed = 0
        entropy = problem.loss == "cross-entropy"
        self._hessian = 1.0 if entropy else 2 / problem.num_outputs
        self._outer = self._hessian**2 * (1.0 if entropy else problem.num_outputs)
        self._slope = self._hessian

    def versions(self) -> dict[str, str]:
        """Of curvlinops and PyTorch."""
        return {name: version(name) for name in ("curvlinops-for-pytorch", "torch")}

    def quantity(self, name: str) -> Array:
        """See ``worker.Side``."""
        from curvlinops import EFLinearOperator, FisherType, GGNLinearOperator

        batch = self._batch
        if name == "gradient":
            return batch.vector(batch.gradient()) / self._slope
        kind, _, which = name.rpartition("/")
        # the Monte-Carlo Fisher of given draws is the empirical one of these targets
        targets = batch.drawn if which == "mc" else batch.y
        scale = self._hessian if which == "exact" else self._outer
        if kind == "fisher":
            operator = GGNLinearOperator if which == "exact" else EFLinearOperator
            found = operator(
                batch.network, batch.loss, batch.parameters(), [(batch.x, targets)],
                check_deterministic=False,
            )  # fmt: skip
            return self._dense(found) / scale
        sort = FisherType.TYPE2 if which == "exact" else FisherType.EMPIRICAL
        form = "reduce" if kind.endswith("reduce") else "expand"
        structure = kind.removeprefix("step/")
        if structure not in ("kfac", "kfac-reduce", "ekfac"):
            raise KeyError(name)
        corrected = structure == "ekfac"
        factors = self._factors(sort, targets, form, corrected=corrected)
        if structure == kind:
            return self._dense(factors) / scale
        directions = self._inverse(factors, scale, corrected=corrected) @ list(batch.gradient())
        return batch.vector(directions) * scale / self._slope

    def step(self) -> None:
        """Factors of a drawn target a sample, their inverses, and the move."""
        from curvlinops import FisherType

        batch = self._batch
        # another draw each time
        self._seed += 1
        slopes = batch.gradient()
        kfac = self._factors(FisherType.MC, batch.y, "expand")
        batch.descend(self._inverse(kfac, self._hessian) @ list(slopes), RATE)

    def _factors(
        self, sort: Any, targets: torch.Tensor, form: str, *, corrected: bool = False
    ) -> Any:
        """K-FAC, or EKFAC where its eigenvalues are corrected."""
        from curvlinops import EKFACLinearOperator, KFACLinearOperator

        batch = self._batch
        make = EKFACLinearOperator if corrected else KFACLinearOperator
        return make(
            batch.network,
            batch.loss,
            batch.parameters(),
            [(batch.x, targets)],
            fisher_type=sort,
            kfac_approx=form,
            separate_weight_and_bias=False,
            seed=self._seed,
            # what it would find out by going through the data twice
            num_data=len(batch.x),
            num_per_example_loss_terms=1,
            check_deterministic=False,
        )

    def _inverse(self, factors: Any, scale: float, *, corrected: bool = False) -> Any:
        from curvlinops import KFACInverseLinearOperator

        # a matrix that is as many times larger needs as many times the damping for the same step
        rho = self._problem.damping * scale
        return KFACInverseLinearOperator(
            factors, damping=rho, use_heuristic_damping=not corrected, use_exact_damping=corrected
        )

    def _dense(self, operator: Any) -> Array:
        import torch

        order = self._batch.order()
        columns = operator @ torch.eye(len(order))
        found: Array = columns.detach().numpy()
        return found[order][:, order]
