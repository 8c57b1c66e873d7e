"""nngeometry in a worker: Fisher matrices in several representations.

Conventions, from its documentation and sources (release 0.4): ``FIM`` is (1/N) J^T H J of the exact
output Fisher, "regression" with H = I, all as ours; parameters of a layer are the weight (units
first) and then the bias. ``PMatKFAC`` has the bias as a last column of ones, and ``use_pi`` adds
pi sqrt(regul) to A and sqrt(regul) / pi to B by mean diagonals. ``regul`` is added to the matrix,
so in the 1/N convention. ``PMatEKFAC`` starts with the eigenvalues of K-FAC; ``update_diag`` puts
the second moments of per-sample gradients in their place, as ours. ``PMatQuasiDiag`` keeps the
entries of Ollivier (2015), the diagonal and the row of each unit's bias, and inverts the matrix
that has zeros in all other places; Ollivier's reduction, which is ours, is another matrix with
these entries. So entries are compared, not steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from benchmarks.peer_comparison.exchange import Array, Problem
from benchmarks.peer_comparison.torch_network import Batch

if TYPE_CHECKING:
    import torch

RATE = 1e-3
"""Learning rate of the timed steps."""

REPRESENTATIONS = {
    "fisher": "PMatDense",
    "block-diagonal": "PMatBlockDiag",
    "kfac": "PMatKFAC",
    "ekfac": "PMatEKFAC",
    "diagonal": "PMatDiag",
    "quasi-diagonal": "PMatQuasiDiag",
}
"""Names of the package by ours."""


class Side:
    """nngeometry on one problem.

    Args:
      problem: the problem.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._batch = Batch(problem)

    def versions(self) -> dict[str, str]:
        """Of nngeometry and PyTorch."""
        return {name: version(name) for name in ("nngeometry", "torch")}

    def quantity(self, name: str) -> Array:
        """See ``worker.Side``."""
        batch = self._batch
        if name == "gradient":
            return batch.vector(self._gradient())
        kind, _, which = name.rpartition("/")
        step = kind.startswith("step/")
        matrix = self._matrix(REPRESENTATIONS[kind.removeprefix("step/")], which)
        if step:
            return batch.vector(self._solved(matrix, self._gradient()))
        order = batch.order()
        if kind == "diagonal":
            found: Array = matrix.get_diag().detach().numpy()
            return found[order]
        found = matrix.to_torch().detach().numpy()
        return found[order][:, order]

    def step(self) -> None:
        """Factors of a drawn target a sample, the damped solve, and the move."""
        from nngeometry.metrics import FIM_MonteCarlo
        from nngeometry.object import PMatKFAC

        batch = self._batch
        slopes = self._gradient()
        matrix = FIM_MonteCarlo(batch.network, (batch.x, batch.y), PMatKFAC)
        batch.descend(self._solved(matrix, slopes), RATE)

    def _matrix(self, representation: str, which: str) -> Any:
        """The exact Fisher, or the Monte-Carlo one of the given draws, represented."""
        import nngeometry.object
        from nngeometry.backend import TorchHooksJacobianBackend
        from nngeometry.metrics import FIM

        batch, make = self._batch, getattr(nngeometry.object, representation)
        entropy = self._problem.loss == "cross-entropy"
        if which == "exact":
            variant, examples = "classif_logits" if entropy else "regression", (batch.x, batch.y)
            matrix = FIM(batch.network, examples, make, variant=variant)
        else:
            backend = TorchHooksJacobianBackend(batch.network, self._likelihood)
            examples = (batch.x, batch.drawn)
            matrix = make(backend, examples=examples)
        if representation == "PMatEKFAC":
            matrix.update_diag(examples)
        return matrix

    def _likelihood(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The negative log-likelihood of each sample, up to its sign and a constant, (N, 1)."""
        import torch

        outputs = self._batch.network(x)
        if self._problem.loss == "cross-entropy":
            return torch.log_softmax(outputs, dim=1).gather(1, targets[:, None])
        return ((outputs - targets) ** 2).sum(dim=1, keepdim=True) / 2

    def _gradient(self) -> Sequence[torch.Tensor]:
        slopes = self._batch.gradient()
        if self._problem.loss == "cross-entropy":
            return slopes
        # PyTorch's squared error is a mean over the outputs as well, and has no 1/2
        return [slope * (self._problem.num_outputs / 2) for slope in slopes]

    def _solved(self, matrix: Any, slopes: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """(G + rho)^{-1} g, one tensor a parameter."""
        from nngeometry.object import PMatKFAC, PVector

        found, layers = iter(slopes), matrix.generator.layer_collection
        sizes = {name: 1 if layer.bias is None else 2 for name, layer in layers.layers.items()}
        parts = {name: tuple(next(found) for _ in range(size)) for name, size in sizes.items()}
        vector = PVector(layers, dict_repr=parts)
        rho = self._problem.damping
        if isinstance(matrix, PMatKFAC):
            # its ``solve`` is by least squares, which takes minutes for a factor of side 8192
            solved = matrix.inverse(regul=rho).mv(vector).to_dict()
        else:
            solved = matrix.solve(vector, regul=rho).to_dict()
        return [part for name in sizes for part in solved[name] if part is not None]
