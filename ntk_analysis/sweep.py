"""Isotropy of every structure against one setting: width, depth, samples, damping, activation."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from natgrad_flax import MLP, ConvNet, RelativeDamping, SingularCouplingWarning, Structure
from natgrad_flax.arguments.scalars import check_integer, check_number, check_seed, keep_plain
from natgrad_flax.models.activations import get_activation
from natgrad_flax.optimizer.checks import check_structure
from natgrad_flax.structures import Geometry
from natgrad_flax.structures.weight_sharing import signals_geometry
from ntk_analysis.coefficient import Damping
from ntk_analysis.conditions import NetworkRanks, measured_ranks
from ntk_analysis.empirical import InitialSignals, Matrix, initial_signals
from ntk_analysis.isotropy import IsotropyReport, isotropy_of
from ntk_analysis.networks import (
    build_network,
    check_damping_size,
    check_variances,
    find_network,
    layout,
)

if TYPE_CHECKING:
    import pandas as pd

Variable = Literal["width", "depth", "num_samples", "damping", "activation"]
Report = Callable[[str, int], object]
"""Called with what is being done now, and how many rows have been finished since the last call."""
Observe = Callable[[str, Any, IsotropyReport], object]
"""Called with the name of a structure, the value of the variable, and what was measured."""

_GAUSSIAN_INPUTS = 100
_NUMBERS = (
    "alpha",
    "theoretical_alpha",
    "condition_number",
    "deviation",
    "smallest_eigenvalue",
    "largest_eigenvalue",
    "learning_rate",
)


@dataclass(frozen=True)
class SweepSettings:
    """What is varied, and what every point has in common.

    The defaults stand in for Karakida & Osawa (2020), Fig. 3, whose settings are not public.

    Attributes:
      variable: "width", "depth", "num_samples", "damping" or "activation".
      values: of the variable, without repetition; they take the place of the setting of that name.
      seeds: of the initial parameters, and of "gaussian" inputs; without repetition.
      network: "mlp", "conv-flatten" or "conv-average" (``networks``); the latter two want images.
      width: units of every hidden layer, or channels of every convolution.
      depth: L, the number of layers with parameters.
      num_samples: N.
      num_inputs: M_0 of "gaussian" inputs, 100 by default; other data have a number of their own.
      num_outputs: C.
      activation: of the hidden layers.
      weight_variance: sigma_w^2.
      bias_variance: sigma_b^2; 0 means no biases.
      damping: rho in the 1/N convention; 0 means the pseudo-inverse. Gradient descent has none.
      relative_damping: whether dampings are ratios, as in ``ng.RelativeDamping``.
      dataset: a name of ``natgrad_datasets``; inputs are standardised and have unit norm.
      classes: class ids to take the first N samples of; None means all of them.

    Raises:
      ValueError: a setting is out of range, or settings contradict each other.

    Example:
      >>> import ntk_analysis as na
      >>> settings = na.SweepSettings("damping", (0.0, 1e-3), seeds=(0,), width=32)
      >>> settings.depth, settings.num_samples
      (3, 100)
    """

    variable: Variable
    values: tuple[Any, ...]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    network: str = "mlp"
    width: int = 256
    depth: int = 3
    num_samples: int = 100
    num_inputs: int | None = None
    num_outputs: int = 1
    activation: str = "relu"
    weight_variance: float = 2.0
    bias_variance: float = 0.5
    damping: float = 0.0
    relative_damping: bool = False
    dataset: str = "gaussian"
    classes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.variable not in get_args(Variable):
            raise ValueError(
                f"variable must be one of {', '.join(get_args(Variable))}, got {self.variable!r}"
            )
        for name in ("values", "seeds"):
            entries = getattr(self, name)
            if isinstance(entries, str) or not isinstance(entries, Iterable):
                raise ValueError(f"{name} must be a sequence, got {entries!r}")
            entries = tuple(entries)
            object.__setattr__(self, name, entries)
            if not entries:
                raise ValueError(f"{name} must hold at least one entry")
            if len(set(entries)) < len(entries):
                raise ValueError(f"{name} must not repeat an entry, got {entries}")
        for seed in self.seeds:
            check_seed(seed, "every seed")
        for value in self.values:
            _CHECKS[self.variable](f"every {self.variable} in values", value)
        for name, check in _CHECKS.items():
            check(name, getattr(self, name))
        check_integer("num_outputs", self.num_outputs, 1)
        check_variances(self.weight_variance, self.bias_variance)
        for value in self.values:
            here = {name: getattr(self, name) for name in _CHECKS} | {self.variable: value}
            check_damping_size("damping", here["damping"], here["num_samples"])
        self._check_data()
        keep_plain(self)

    def _check_data(self) -> None:
        import natgrad_datasets

        object.__setattr__(self, "network", find_network(self.network, self.dataset))
        depths = self.values if self.variable == "depth" else (self.depth,)
        if self.network != "mlp" and min(depths) < 2:
            raise ValueError(f"{self.network} has a depth of 2 at least: the readout counts")
        if self.dataset not in natgrad_datasets.names():
            known = ", ".join(natgrad_datasets.names())
            raise ValueError(f"unknown data set {self.dataset!r}; known are {known}")
        if self.dataset == "gaussian":
            if self.classes is not None:
                raise ValueError("gaussian inputs have no classes; leave classes out")
            if self.num_inputs is None:
                object.__setattr__(self, "num_inputs", _GAUSSIAN_INPUTS)
            check_integer("num_inputs", self.num_inputs, 1)
        elif self.num_inputs is not None:
            raise ValueError(
                f"num_inputs is for gaussian inputs; those of {self.dataset} have a size of "
                "their own"
            )

    @property
    def num_points(self) -> int:
        """Networks in all: values times seeds."""
        return len(self.values) * len(self.seeds)

    def at(self, value: Any) -> SweepSettings:
        """The settings of one point: the variable has this value."""
        return dataclasses.replace(self, **{self.variable: value})

    def inputs(self, seed: int) -> Matrix:
        """Prepared training inputs, shape (N, M_0) or (N, H, W, C), float64.

        Raises:
          ValueError: the data are not to be had as asked.
        """
        import natgrad_datasets

        extra: dict[str, Any] = {"classes": self.classes}
        if self.dataset == "gaussian":
            extra = {"input_dim": self.num_inputs, "seed": seed}
        data = natgrad_datasets.load(
            self.dataset,
            num_train=self.num_samples,
            num_test=1,
            dtype="float64",
            layout=layout(self.network),
            **extra,
        )
        return np.asarray(data.x_train, np.float64)

    def model(self, sample_shape: Sequence[int], seed: int) -> MLP | ConvNet:
        """The network of one point, for inputs (N, *sample_shape)."""
        return build_network(
            self.network,
            sample_shape,
            [self.width] * (self.depth - 1),
            self.num_outputs,
            activation=self.activation,
            weight_variance=self.weight_variance,
            bias_variance=self.bias_variance,
            seed=seed,
        )

    def damping_of(self, structure: Structure) -> Damping:
        """The damping of a structure: a number or a ratio, and 0 for gradient descent."""
        if not structure.takes_damping or self.damping == 0:
            return 0.0
        return RelativeDamping(self.damping) if self.relative_damping else self.damping


def isotropy_sweep(
    structures: Mapping[str, Structure],
    settings: SweepSettings,
    *,
    report: Report = lambda what, done: None,
    observe: Observe = lambda name, value, found: None,
) -> pd.DataFrame:
    """Alpha, condition number and deviation of structures at every value and seed.

    The signals of a network are computed once and serve all structures. A structure that does not
    suit a point does not end the sweep: its row says why. ``SingularCouplingWarning`` (block
    tri-diagonal at L = 3s + 2) is silenced.

    Args:
      structures: Fisher approximations by the names of the rows, such as
        ``ntk_analysis.methods.STRUCTURES``.
      settings: what to vary.
      report: told about the progress.
      observe: given what was measured, which has the whole spectrum.

    Returns:
      One row for each seed, value and structure, in this order. Columns: "structure", the variable
      under its own name, "seed"; "alpha", "theoretical_alpha", "condition_number", "deviation",
      "smallest_eigenvalue", "largest_eigenvalue", "learning_rate", as in ``IsotropyReport``, float;
      "failed_conditions", sentences joined by "; ", and "failure", "" or why there are no numbers
      (they are NaN then).

    Raises:
      ValueError, TypeError: no structures, something that is not one, or data that are not to be
        had.

    Example:
      >>> import natgrad_flax as ng, ntk_analysis as na
      >>> sizes = {"width": 8, "depth": 2, "num_samples": 4, "num_inputs": 4}
      >>> settings = na.SweepSettings("damping", (0.0, 1.0), seeds=(0,), **sizes)
      >>> table = na.isotropy_sweep({"block-diagonal": ng.BlockDiagonal()}, settings)
      >>> table["alpha"].round(2).tolist()  # L = 2 undamped, less with a damping
      [2.0, 0.15]
      >>> table.columns.tolist()[:5]
      ['structure', 'damping', 'seed', 'alpha', 'theoretical_alpha']
    """
    if not isinstance(structures, Mapping) or not structures:
        raise TypeError(
            "structures must be a dict of at least one Fisher approximation by name, got "
            f"{structures!r}"
        )
    for structure in structures.values():
        check_structure(structure)
    import pandas as pd

    rows = []
    for seed in settings.seeds:
        point: _Point | None = None
        for value in settings.values:
            here = settings.at(value)
            what = f"{settings.variable} {value}, seed {seed}"
            report(f"{what}: network", 0)
            # the damping is no part of the network
            if point is None or settings.variable != "damping":
                point = _Point.of(here, seed)
            for name, structure in structures.items():
                report(f"{what}: {name}", 0)
                keys = {"structure": name, settings.variable: value, "seed": seed}
                found, failure = point.measure(structure, here.damping_of(structure))
                if found is not None:
                    observe(name, value, found)
                rows.append(keys | _numbers(found) | {"failure": failure})
                report(f"{what}: {name}", 1)
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class _Point:
    """A network on its data: what structures share."""

    signals: InitialSignals
    geometry: Geometry
    ranks: NetworkRanks

    @classmethod
    def of(cls, settings: SweepSettings, seed: int) -> _Point:
        x = settings.inputs(seed)
        model = settings.model(x.shape[1:], seed)
        signals = initial_signals(model, x)
        train = signals.train
        return cls(signals, signals_geometry(model, train), measured_ranks(train))

    def measure(self, structure: Structure, damping: Damping) -> tuple[IsotropyReport | None, str]:
        """The report, or None and why there is none."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SingularCouplingWarning)
                return isotropy_of(structure, self.signals, self.geometry, damping, self.ranks), ""
        except (ValueError, np.linalg.LinAlgError) as error:
            return None, str(error)


def _numbers(found: IsotropyReport | None) -> dict[str, Any]:
    if found is None:
        return dict.fromkeys(_NUMBERS, math.nan) | {"failed_conditions": ""}
    alpha = found.theoretical_alpha
    return {
        "alpha": found.alpha,
        "theoretical_alpha": math.nan if alpha is None else alpha,
        "condition_number": found.condition_number,
        "deviation": found.deviation,
        "smallest_eigenvalue": float(found.eigenvalues[0]),
        "largest_eigenvalue": float(found.eigenvalues[-1]),
        "learning_rate": found.learning_rate,
        "failed_conditions": "; ".join(found.failed_conditions),
    }


def _check_activation(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be the name of an activation, got {value!r}")
    get_activation(value)


_CHECKS: dict[str, Callable[[str, object], object]] = {
    "width": lambda name, value: check_integer(name, value, 1),
    "depth": lambda name, value: check_integer(name, value, 1),
    "num_samples": lambda name, value: check_integer(name, value, 1),
    "damping": lambda name, value: check_number(name, value, positive=False),
    "activation": _check_activation,
}
