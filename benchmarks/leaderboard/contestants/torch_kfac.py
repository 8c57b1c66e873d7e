"""K-FAC of curvlinops, a peer on PyTorch: optional, and skipped with the reason without it.

It trains a PyTorch copy of the workload's MLP in the same parameters: the factors of the NTK
parametrisation are constants of the copy, and a bias is the weight of a constant input, as in
natgrad's own signals. So a step with the true Fisher is that of ``ng.KFAC(last_layer="literal",
split="pi")``. curvlinops has the curvature and its inverse and no optimizer: both are made anew
from the batch of each step, without averages over steps. PyTorch runs on the CPU, on as many
threads as the process has cores.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import NDArray

import natgrad_flax as ng
from benchmarks.leaderboard.contestant import Contestant
from benchmarks.leaderboard.natural import fisher_on
from benchmarks.leaderboard.workload import Workload
from benchmarks.machine import cores
from natgrad_flax.optimizer.trees import as_state

if TYPE_CHECKING:
    import torch

PACKAGES = {"torch": "torch", "curvlinops-for-pytorch": "curvlinops"}
"""What it needs: distributions, and the modules that they bring."""

MAJOR = "3."
"""Releases of curvlinops that have the interface used here."""

DAMPING = 1e-5
"""Added to the Fisher (1/N), its root to both factors by the heuristic of Martens & Grosse 2015."""


@dataclass
class Training:
    """A state of training, which a step changes in place.

    Attributes:
      network: the PyTorch copy.
      rate: the learning rate.
      draws: gives each step the seed of its Monte-Carlo targets.
    """

    network: torch.nn.Sequential
    rate: float
    draws: np.random.Generator


class CurvlinopsProgram:
    """Training steps by curvlinops' K-FAC: a ``Program`` of the leaderboard.

    Args:
      contestant: its ``fisher`` counts: "exact", or "mc", which is the true one where one backward
        pass gives that.
      workload: one that is not ``unsuitable``.

    Attributes:
      compile_seconds: of a first step, in which PyTorch sets itself up.
    """

    def __init__(self, contestant: Contestant, workload: Workload) -> None:
        import torch

        assert contestant.fisher is not None
        torch.set_num_threads(cores())
        data = workload.data()
        model = workload.model(0)
        assert isinstance(model, ng.MLP)
        self._workload, self._template, self._inputs = workload, nnx.state(model), model.widths[:-1]
        self._mc = fisher_on(workload, contestant.fisher) == "mc"
        self._x, y = torch.tensor(data.x_train), torch.tensor(data.y_train)
        entropy = isinstance(workload.loss, ng.SoftmaxCrossEntropy)
        # classes, not one-hot rows, are what K-FAC takes under cross-entropy
        self._y = y.argmax(dim=1) if entropy else y
        self._loss = torch.nn.CrossEntropyLoss() if entropy else torch.nn.MSELoss()
        # PyTorch's squared error is a mean over the outputs as well, and has no 1/2; a damping of
        # as many times makes the same step of it
        self._damping = DAMPING * (1.0 if entropy else 2 / y.shape[1])
        size = workload.batch_size
        started = time.perf_counter()
        self.step(self.start(0, 0.0), None if size is None else np.arange(size))
        self.compile_seconds = time.perf_counter() - started

    def start(self, seed: int, rate: float) -> Training:
        """A copy of the model of a seed."""
        model = self._workload.model(seed)
        assert isinstance(model, ng.MLP)
        return Training(torch_copy(model), rate, np.random.default_rng(seed))

    def step(self, state: Training, batch: NDArray[np.integer] | None) -> Training:
        """One step, over when it returns; without a finite direction to NaN: it has diverged."""
        import torch

        x, y = self._x, self._y
        if batch is not None:
            rows = torch.from_numpy(batch)
            x, y = x[rows], y[rows]
        weights = list(state.network.parameters())
        gradient = torch.autograd.grad(self._loss(state.network(x), y), weights)
        try:
            if not all(slope.isfinite().all() for slope in gradient):
                raise torch.linalg.LinAlgError
            directions = self._preconditioned(state, x, y, weights, gradient)
        except torch.linalg.LinAlgError:
            directions = [torch.full_like(weight, torch.nan) for weight in weights]
        with torch.no_grad():
            for weight, direction in zip(weights, directions, strict=True):
                weight -= state.rate * direction
        return state

    def _preconditioned(
        self,
        state: Training,
        x: torch.Tensor,
        y: torch.Tensor,
        weights: Sequence[torch.Tensor],
        gradient: Sequence[torch.Tensor],
    ) -> Sequence[torch.Tensor]:
        from curvlinops import FisherType, KFACInverseLinearOperator, KFACLinearOperator

        kfac = KFACLinearOperator(
            state.network,
            self._loss,
            weights,
            [(x, y)],
            fisher_type=FisherType.MC if self._mc else FisherType.TYPE2,
            seed=int(state.draws.integers(2**31)),
            # what it would find out by going through the data twice
            num_data=len(x),
            num_per_example_loss_terms=1,
            check_deterministic=False,
        )
        inverse = KFACInverseLinearOperator(kfac, damping=self._damping, use_heuristic_damping=True)
        with warnings.catch_warnings():
            # that it tries a Cholesky factor in float64, too
            warnings.simplefilter("ignore", UserWarning)
            directions: Sequence[torch.Tensor] = inverse @ list(gradient)
        return directions

    def wait(self, state: Training) -> None:
        """Returns at once: no step is left under way."""

    def parameters(self, state: Training) -> nnx.State:
        """The weights of the copy, in the tree of the model."""
        found = {}
        pairs = zip(state.network.parameters(), self._inputs, strict=True)
        for index, (matrix, fan_in) in enumerate(pairs):
            columns = matrix.detach().numpy().T
            layer = {"kernel": jnp.array(columns[:fan_in])}
            if len(columns) > fan_in:
                layer["bias"] = jnp.array(columns[fan_in])
            found["layers", index] = layer
        moved: nnx.State = as_state(self._template, found)
        return moved


def torch_copy(model: ng.MLP) -> torch.nn.Sequential:
    """A PyTorch network with the parameters and the outputs of a model.

    Returns:
      Linear layers without biases, whose weights (units, fan-in, or fan-in + 1 where there is a
      bias) are all of its parameters, and before each what makes its inputs.
    """
    import torch

    function = {
        "relu": torch.relu,
        "tanh": torch.tanh,
        "erf": torch.erf,
        "gelu": torch.nn.functional.gelu,
        "leaky_relu": torch.nn.functional.leaky_relu,
        "identity": torch.nn.Identity(),
    }[model.activation]

    class Inputs(torch.nn.Module):
        """The scaled activations, and the constant input of the bias."""

        def __init__(self, layer: ng.Dense, first: bool) -> None:
            super().__init__()
            self.scale, self.constant, self.first = layer.weight_scale, layer.bias_scale, first

        def forward(self, u: torch.Tensor) -> torch.Tensor:
            inputs = self.scale * (u if self.first else function(u))
            if self.constant is None:
                return inputs
            return torch.cat([inputs, inputs.new_full((len(u), 1), self.constant)], dim=1)

    modules: list[torch.nn.Module] = []
    for index, layer in enumerate(model.layers):
        rows = [np.asarray(layer.kernel[...])]
        if layer.bias is not None:
            rows.append(np.asarray(layer.bias[...])[None])
        matrix = np.concatenate(rows).T
        linear = torch.nn.Linear(matrix.shape[1], len(matrix), bias=False)
        linear.weight = torch.nn.Parameter(torch.tensor(matrix))
        modules += [Inputs(layer, index == 0), linear]
    return torch.nn.Sequential(*modules)


def _unsuitable(workload: Workload) -> str:
    if not isinstance(workload.model(0), ng.MLP):
        return "it trains a PyTorch copy of ng.MLP, and this is another network"
    if workload.loss not in (ng.MeanSquaredError(), ng.SoftmaxCrossEntropy()):
        return "curvlinops has K-FAC for squared error and cross-entropy, without output damping"
    entropy = isinstance(workload.loss, ng.SoftmaxCrossEntropy)
    if entropy and not np.isin(workload.data().y_train, (0, 1)).all():
        return "under cross-entropy curvlinops takes classes, not soft targets"
    return _absent()


def _absent() -> str:
    """Why the packages do not run here, or ""; imports them."""
    for distribution, module in PACKAGES.items():
        try:
            found = version(distribution)
        except PackageNotFoundError:
            return f"{distribution} is not installed: `pip install 'natgrad[peers]'`"
        if module == "curvlinops" and not found.startswith(MAJOR):
            return f"{distribution} {found} has another interface than {MAJOR}x, which is used here"
        # read when PyTorch loads: threads that spin between its operations would take each other's
        # cores, and a step 50 times as long, as soon as anything else runs
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        try:
            import_module(module)
        # whatever a broken installation raises at import
        except Exception as error:
            return f"{distribution} {found} does not run here: {error}"
    if jax.default_backend() != "cpu":
        return f"it runs on the CPU: no times to set beside those of a {jax.default_backend()}"
    return ""


CONTESTANTS = (
    Contestant(
        name="curvlinops-kfac",
        title="K-FAC of curvlinops (PyTorch)",
        family="peer",
        rate_rule="tuned",
        rates=(0.003, 1.0),
        fisher="mc",
        damping_words=f"{DAMPING:g}, added to the Fisher (1/N), its root to both factors by pi",
        unsuitable=_unsuitable,
        program=CurvlinopsProgram,
        packages=tuple(PACKAGES),
    ),
)
