"""What an experiment is asked to do, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import natgrad_datasets
import numpy as np
from natgrad_datasets import Dataset
from numpy.typing import NDArray

from natgrad_flax import RelativeDamping
from natgrad_flax.arguments.scalars import (
    check_integer,
    check_number,
    check_seed,
    check_steps,
    keep_plain,
)
from natgrad_flax.models.activations import get_activation
from ntk_analysis.coefficient import Damping
from ntk_analysis.methods import Method, find_structure, select_methods
from ntk_analysis.networks import check_damping_size, check_variances, find_network, layout
from ntk_analysis.results import content_hash

# 40 digits: their 64 pixels have rank 50 or so, and K-FAC and the unit-wise Fisher invert the
# N x N Gram matrix of the inputs in float32
_NUM_SAMPLES = {"digits": (40, 50)}
_GAUSSIAN_INPUTS_PER_SAMPLE = 2
_WIDTHS = {"mlp": (2048, 2048)}
_CHANNELS = (64, 64)


@dataclass(frozen=True)
class DynamicsSettings:
    """Settings of ``natgrad dynamics``; the defaults are Karakida & Osawa (2020), Fig. 1a.

    Attributes:
      dataset: a name of ``natgrad_datasets``; MNIST where it is on this machine, else digits.
      classes: class ids; None means 0 and 7 (all of them for "gaussian").
      num_train: N; 100 by default, 40 for digits.
      num_test: N'; 100 by default, 50 for digits.
      network: "mlp", "conv-flatten" or "conv-average" (``networks``); the latter two want images.
      widths: hidden widths, or channels of the convolutions; 2048, 2048 by default, or 64, 64.
      activation: of the hidden layers.
      weight_variance: sigma_w^2.
      bias_variance: sigma_b^2; 0 means no biases.
      structures: names; None means all.
      damping: rho in the 1/N convention for every structure, or None.
      relative_damping: ratio to the mean Gram diagonal for every structure, or None.
      scale: multiplies every learning rate.
      steps: number of steps.
      seed: of the initial parameters, and of "gaussian".
      dtype: precision of training; theory is always float64.

    Raises:
      ValueError: a setting is out of range, or settings contradict each other.
    """

    dataset: str | None = None
    classes: tuple[int, ...] | None = None
    num_train: int | None = None
    num_test: int | None = None
    network: str = "mlp"
    widths: tuple[int, ...] | None = None
    activation: str = "relu"
    weight_variance: float = 2.0
    bias_variance: float = 0.0
    structures: tuple[str, ...] | None = None
    damping: float | None = None
    relative_damping: float | None = None
    scale: float = 1.0
    steps: int = 10
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        dataset = find_dataset(self.dataset)
        samples = _NUM_SAMPLES.get(dataset, (100, 100))
        self._set("network", find_network(self.network, dataset))
        classes = self.classes
        if classes is None and dataset != "gaussian":
            classes = (0, 7)
        self._set("dataset", dataset)
        self._set("classes", classes)
        self._set("num_train", samples[0] if self.num_train is None else self.num_train)
        self._set("num_test", samples[1] if self.num_test is None else self.num_test)
        for name in ("num_train", "num_test"):
            check_integer(name, getattr(self, name), 1)
        check_steps(self.steps, minimum=1)
        check_seed(self.seed)
        if self.widths is None:
            self._set("widths", _WIDTHS.get(self.network, _CHANNELS))
        if not self.widths:
            raise ValueError("widths must name at least one hidden layer")
        for width in self.widths:
            check_integer("every hidden width", width, 1)
        get_activation(self.activation)
        check_variances(self.weight_variance, self.bias_variance)
        check_number("scale", self.scale, positive=True)
        if self.damping is not None and self.relative_damping is not None:
            raise ValueError("give damping or relative_damping, not both")
        if self.damping is not None:
            check_damping_size("damping", self.damping, int(self.num_train or 0))
        if self.relative_damping is not None:
            check_number("relative_damping", self.relative_damping, positive=True)
            check_damping_size("relative_damping", self.relative_damping, int(self.num_train or 0))
        if self.dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be float32 or float64, got {self.dtype!r}")
        if self.structures is not None:
            if not self.structures:
                raise ValueError("structures must name at least one")
            names = tuple(dict.fromkeys(find_structure(name) for name in self.structures))
            self._set("structures", names)
        keep_plain(self)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)

    def methods(self) -> tuple[Method, ...]:
        """The curves that are asked for, in the order of tables and figures."""
        damping: Damping | None = self.damping
        if self.relative_damping is not None:
            damping = RelativeDamping(self.relative_damping)
        return select_methods(self.structures, self.scale, damping)

    def load_data(self) -> Dataset:
        """The data, prepared as in the paper: standardised, then unit norm; targets +-0.5.

        Raises:
          ValueError: the data set cannot be given as asked.
        """
        extra: dict[str, Any] = {}
        if self.dataset == "gaussian" and self.num_train is not None:
            # as many inputs as samples at least, which K-FAC and the unit-wise Fisher need
            extra["input_dim"] = _GAUSSIAN_INPUTS_PER_SAMPLE * self.num_train
        return natgrad_datasets.load(
            str(self.dataset),
            classes=self.classes,
            num_train=self.num_train,
            num_test=self.num_test,
            seed=self.seed,
            layout=layout(self.network),
            **extra,
        )

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON has them."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def fingerprint(self, data: Dataset, versions: dict[str, str]) -> str:
        """SHA-256 of all that decides a curve; which structures are asked for does not.

        Args:
          data: the data itself counts, not only its name.
          versions: of the software and the device.
        """
        values = {k: v for k, v in self.as_dict().items() if k != "structures"}
        return content_hash([values, versions, *data_arrays(data)])


def find_dataset(name: str | None) -> str:
    """The name of a data set; None means MNIST where it is on this machine, else digits.

    Raises:
      ValueError: unknown; the message lists the known ones.
    """
    found = natgrad_datasets.best_available() if name is None else name
    if found not in natgrad_datasets.names():
        known = ", ".join(natgrad_datasets.names())
        raise ValueError(f"unknown data set {found!r}; known are {known}")
    return found


def data_arrays(data: Dataset) -> tuple[NDArray[np.floating], ...]:
    """All numbers of a data set, for ``content_hash``."""
    return data.x_train, data.y_train, data.x_test, data.y_test
