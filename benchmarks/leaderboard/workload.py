"""A workload: data, model, loss, batch, budget and how the result is judged; and their register."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import natgrad_datasets
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from ntk_analysis.names import find
from ntk_analysis.results import content_hash

if TYPE_CHECKING:
    from natgrad_flax import Loss

Samples = NDArray[Any]


class Data(NamedTuple):
    """The samples of a workload, the same for every seed.

    Attributes:
      x_train: inputs (N, M_0), or images (N, H, W, C), in the precision of the workload; or tokens
        (N, T), integers.
      y_train: targets (N, C), or tokens (N, T).
      x_held_out: inputs that no contestant trains on, (N', ...).
      y_held_out: their targets.
    """

    x_train: Samples
    y_train: Samples
    x_held_out: Samples
    y_held_out: Samples


class Metric(NamedTuple):
    """How a model is judged; the smaller the better.

    Attributes:
      title: what tables call it.
      function: from outputs and targets to a scalar; None where the training loss itself counts.
    """

    title: str
    function: Callable[[Array, Array], Array] | None


def mean_squared_error(outputs: Array, targets: Array) -> Array:
    """The mean over samples and outputs of (f - y)^2."""
    return jnp.mean((outputs - targets) ** 2)


def error_rate(outputs: Array, targets: Array) -> Array:
    """The share of samples of the wrong class; a single output decides by its sign."""
    if targets.shape[1] == 1:
        return jnp.mean(jnp.sign(outputs) != jnp.sign(targets), dtype=jnp.float32)
    wrong = jnp.argmax(outputs, axis=1) != jnp.argmax(targets, axis=1)
    return jnp.mean(wrong, dtype=jnp.float32)


def relative_error(outputs: Array, targets: Array) -> Array:
    """|f - y| / |y|, Euclidean norms over all samples."""
    return jnp.linalg.norm(outputs - targets) / jnp.linalg.norm(targets)


def cross_entropy(outputs: Array, targets: Array) -> Array:
    """The mean over samples and positions of -log p(y), for class numbers; in nats."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(outputs), targets[..., None], axis=-1)
    return -jnp.mean(chosen)


METRICS = {
    "train": Metric("training loss", None),
    "mse": Metric("held-out mean squared error", mean_squared_error),
    "rmse": Metric(
        "held-out root mean squared error",
        lambda outputs, targets: jnp.sqrt(mean_squared_error(outputs, targets)),
    ),
    "error": Metric("held-out error rate", error_rate),
    "relative": Metric("held-out relative L2 error", relative_error),
    "token": Metric("held-out cross-entropy, nats a token", cross_entropy),
}


@dataclass(frozen=True)
class Workload:
    """What contestants train, and how it is judged.

    Attributes:
      name: its key, in lower case with hyphens.
      title: one line, with the network, N and the loss.
      version: raised with every change of what it is; targets belong to one version.
      question: what a result on it tells, one sentence.
      settings: every number of data and model, as JSON has it; they enter the hash of trials.
        "num_measured" samples make the training loss of a curve, "parametrisation" is "standard"
        where it is not that of the NTK, "num_validation" of the held-out samples choose learning
        rates and do not count, "dtype" is "float64" where float32 would be the floor, "order" is
        "fixed" where the batches are those of the data in its order, again and again.
      data: the samples, the same at every call. Work starts here: nothing happens at import.
      model: from the seed of a trial to the model at its initial parameters, in the precision of
        the workload.
      loss: what is trained.
      batch_size: samples a step, drawn without replacement in epochs; None for all of them.
      metric: a key of ``METRICS``: the training loss, or something on the held-out samples.
      max_steps: steps after which a trial has missed the target.
      max_seconds: seconds of training after which it has.
      dataset: a name of ``natgrad_datasets`` whose files must be at hand; None where the workload
        makes its data or the data is embedded.
      known_target: the target, and how it is known, where that is beforehand; else it is frozen by
        what the best baseline reaches.
      expectation: why curvature should win there, or why not, one sentence.
      curvature_wins: what is expected: that a natural gradient is at the target before every
        first-order contestant, or that none is. None where nothing is.
      absent: why files that it reads itself are not at hand, or "".
    """

    name: str
    title: str
    version: int
    question: str
    settings: Mapping[str, Any]
    data: Callable[[], Data]
    model: Callable[[int], nnx.Module]
    loss: Loss
    batch_size: int | None
    metric: str
    max_steps: int
    max_seconds: float
    dataset: str | None = None
    known_target: tuple[float, str] | None = None
    expectation: str = ""
    curvature_wins: bool | None = None
    absent: Callable[[], str] = lambda: ""

    @property
    def digest(self) -> str:
        """SHA-256 of all that makes the workload but its target."""
        parts = {
            "name": self.name,
            "version": self.version,
            "settings": dict(self.settings),
            "loss": repr(self.loss),
            "batch_size": self.batch_size,
            "metric": self.metric,
            "max_steps": self.max_steps,
            "max_seconds": self.max_seconds,
            **({"known_target": list(self.known_target)} if self.known_target else {}),
        }
        return content_hash([parts])

    def training_only(self) -> Workload:
        """The workload as contestants see it: without the samples that they are judged on."""

        def data() -> Data:
            x, y, x_held_out, y_held_out = self.data()
            return Data(x, y, x_held_out[:0], y_held_out[:0])

        return replace(self, data=data)

    def missing(self) -> str:
        """Why the data cannot be had here, or ""; nothing is downloaded."""
        if self.dataset is None:
            return self.absent()
        return _missing(self.dataset)

    def judged(self, *, validation: bool) -> tuple[Samples, Samples]:
        """The held-out samples by which learning rates are chosen, or those that count.

        The first "num_validation" of the settings choose, the others judge; without that setting
        all of them do both.
        """
        data, first = self.data(), self.settings.get("num_validation", 0)
        rows = slice(None) if not first else slice(first) if validation else slice(first, None)
        return data.x_held_out[rows], data.y_held_out[rows]

    @property
    def double(self) -> bool:
        """Whether it is computed in float64."""
        return self.settings.get("dtype") == "float64"


@cache
def _missing(dataset: str) -> str:
    if any(row.name == dataset and row.usable for row in natgrad_datasets.status()):
        return ""
    return (
        f"{dataset} is not on this machine; set NATGRAD_DATA to a folder that has it, or fetch it "
        f"by `natgrad dynamics --dataset {dataset}`"
    )


@cache
def workloads() -> dict[str, Workload]:
    """All workloads by name: ``WORKLOAD`` or ``WORKLOADS`` of each module of ``workloads/``."""
    package = import_module("benchmarks.leaderboard.workloads")
    found = {}
    for entry in pkgutil.iter_modules(package.__path__):
        module = import_module(f"{package.__name__}.{entry.name}")
        for workload in getattr(module, "WORKLOADS", None) or (module.WORKLOAD,):
            found[workload.name] = workload
    return found


def find_workload(name: str) -> Workload:
    """A workload by name.

    Raises:
      ValueError: unknown; the message offers the nearest name.
    """
    return workloads()[find("workload", name, workloads())]
