"""The problems that benchmarks share: networks, batches, structures and skips, all as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

import natgrad_flax as ng
from benchmarks.common import PROFILES, profile
from natgrad_flax.signals.fisher import FisherKind
from natgrad_flax.structures import NAMED

SEED = 0
INPUTS = 784


@dataclass(frozen=True)
class Entry:
    """A Fisher structure in a benchmark.

    Attributes:
      structure: the structure.
      bias_variance: of the network on which it is measured.
      undamped: it is measured at zero damping where the line asks for that.
      damping: the ratio of its ``ng.RelativeDamping``, 0 for that of the line.
    """

    structure: ng.Structure
    bias_variance: float = 0.0
    undamped: bool = False
    damping: float = 0.0


@dataclass(frozen=True)
class Line:
    """A network, a batch size, a loss and a kind of Fisher: a line of docs/structures.md.

    Attributes:
      title: what the table calls it.
      widths: (M_0, ..., M_L) of the ReLU network; of another one (*shape of an input, outputs).
      num_samples: N.
      loss: the loss.
      fisher: "exact" or "mc" with one sample.
      undamped: the structures that can do so run at zero damping.
      targets: for each structure the ratio to reach.
      damping: the ratio of ``ng.RelativeDamping`` wherever there is one.
      optimizers: for each optimizer on gradients alone the ratio to reach.
      network: key of NETWORKS, "" for the fully connected one of ``widths``.
      closed: the batch is a constant of the steps, as where a jitted function closes over it.
    """

    title: str
    widths: tuple[int, ...]
    num_samples: int
    loss: ng.Loss
    fisher: FisherKind
    undamped: bool
    targets: Mapping[str, float] = field(default_factory=dict)
    damping: float = 1e-3
    optimizers: Mapping[str, float] = field(default_factory=dict)
    network: str = ""
    closed: bool = False

    def __post_init__(self) -> None:
        for kind, targets, known in (
            ("structures", self.targets, STRUCTURES),
            ("optimizers", self.optimizers, OPTIMIZERS),
        ):
            if unknown := set(targets) - set(known):
                raise ValueError(
                    f"targets of {', '.join(sorted(unknown))}, but {kind} are called "
                    f"{', '.join(known)}"
                )

    @property
    def ratios(self) -> dict[str, float]:
        """The ratio to reach of each structure and optimizer."""
        return {**self.targets, **self.optimizers}


@dataclass(frozen=True)
class Case:
    """A network, a batch and a loss by their sizes: the parameters of a suite.

    Attributes:
      width: M of every hidden layer.
      depth: L, layers with weights.
      samples: N.
      outputs: C.
      loss: key of LOSSES.
      fisher: "exact" or "mc" with one sample.
    """

    width: int
    depth: int
    samples: int
    outputs: int
    loss: str = "cross-entropy"
    fisher: FisherKind = "exact"

    def line(self) -> Line:
        """The same as a Line; the mean squared error with the exact Fisher runs undamped.

        A damping costs the same whatever its size; this one keeps float32 steps far from rounding.
        """
        widths = (INPUTS, *[self.width] * (self.depth - 1), self.outputs)
        title = f"{'-'.join(map(str, widths))} ReLU, N={self.samples}, {self.loss}, {self.fisher}"
        undamped = self.loss == "mse" and self.fisher == "exact"
        return Line(
            title, widths, self.samples, LOSSES[self.loss], self.fisher, undamped, damping=0.1
        )


@dataclass(frozen=True)
class Rule:
    """Cases that are left out.

    Attributes:
      reason: why, a sentence that asv prints.
      applies: whether it is about a case.
      profiles: in which profiles.
    """

    reason: str
    applies: Callable[[Case], bool]
    profiles: tuple[str, ...] = PROFILES


@dataclass(frozen=True)
class Problem:
    """A model and its batch.

    Attributes:
      model: the network, in float32.
      x: inputs (N, M_0), Gaussian rows of unit norm; images (N, H, W, C) are standard normal.
      y: targets (N, M_L): one-hot for the cross-entropy, otherwise +-0.5.
      key: for a Monte-Carlo Fisher.
    """

    model: nnx.Module
    x: Array
    y: Array
    key: Array


RATIOS: dict[str, tuple[float, float, float]] = {
    "exact": (1.2, 12, 2),
    "block-diag": (1.2, 14, 2.2),
    "tri-diag": (1.2, 16, 2.5),
    "K-FAC": (1.4, 10, 3),
    "EKFAC": (2, 50, 6),
    "diagonal": (2, 6, 3),
    "quasi-diag": (2.5, 8, 4),
    "unit-wise": (3, 15, 10),
}
"""Ratios to reach on the fully connected lines of docs/structures.md, column by column."""

# relative to a mean over all parameters, of which a batch reaches few
_DAMPINGS: dict[type[ng.Structure], float] = {ng.EKFAC: 1.0}


def _entry(cls: type[ng.Structure]) -> Entry:
    """A structure as benchmarks run it: undamped where theory trains it so."""
    return Entry(
        cls(),
        bias_variance=0.1 if cls.without_biases else 0.0,
        undamped=bool(cls.optimal_rate) and not cls.default_damping,
        damping=_DAMPINGS.get(cls, 0.0),
    )


_CLASSES = {cls.style.short: cls for cls in NAMED}
STRUCTURES: dict[str, Entry] = {
    name: _entry(_CLASSES[name]) for name in dict.fromkeys((*RATIOS, *_CLASSES)) if name in _CLASSES
}
"""Every structure by its short name: the columns of README.md, then those without a target."""


PERIOD = 10
"""Steps from one renewal of Shampoo's roots and SOAP's bases to the next."""

OPTIMIZERS: dict[str, optax.GradientTransformation] = {
    "Adam": optax.adam(0.1),
    "Shampoo": ng.shampoo(0.1, decay=0.95, every=PERIOD, grafting="sgd", block_size=64),
    "SOAP": ng.soap(0.1, every=PERIOD, basis_every=PERIOD, block_size=64),
}
"""Optimizers on gradients alone, as benchmarks run them."""

LOSSES: dict[str, ng.Loss] = {
    "mse": ng.MeanSquaredError(),
    "cross-entropy": ng.SoftmaxCrossEntropy(),
}

SKIPS: tuple[Rule, ...] = (
    Rule(
        "the softmax of one output is constant: cross-entropy needs two classes",
        lambda case: case.loss == "cross-entropy" and case.outputs == 1,
    ),
    Rule(
        "the exact Fisher of one output needs one backward pass as well: nothing to sample",
        lambda case: case.fisher == "mc" and case.outputs == 1,
    ),
    Rule(
        "with several outputs the mean squared error costs what cross-entropy does (C seeds, not "
        "C - 1); the profiles from regular on measure it",
        lambda case: case.loss == "mse" and case.outputs > 1,
        ("smoke", "fast"),
    ),
)
"""Combinations without a meaning, or not worth the time of a profile; the first rule counts."""

TIMING_SKIPS: tuple[Rule, ...] = (
    *SKIPS,
    Rule(
        "asv's statistics are those of cross-entropy with its exact Fisher up to the fast profile",
        lambda case: case.fisher == "mc" or case.loss == "mse",
        ("smoke", "fast"),
    ),
)
"""The same for ``step.StepTiming``, which compiles each case once more."""


def skip_reason(case: Case, rules: Sequence[Rule] = SKIPS) -> str | None:
    """Why a case is left out in this profile, or None."""
    here = profile()
    found = (rule.reason for rule in rules if here in rule.profiles and rule.applies(case))
    return next(found, None)


IMAGE = (32, 32, 3)
"""Height, width and channels of CIFAR-10."""

NETWORKS: dict[str, Callable[[nnx.Rngs], nnx.Module]] = {
    "conv": lambda rngs: ng.ConvNet(IMAGE, rngs=rngs),
    "transformer": lambda rngs: ng.VisionTransformer(IMAGE, rngs=rngs),
    "small conv": lambda rngs: ng.ConvNet((6, 6, 2), (3, 4), 3, strides=(1, 2), rngs=rngs),
    "small transformer": lambda rngs: ng.VisionTransformer(
        (4, 4, 2), patch=2, width=4, depth=1, heads=2, mlp=6, outputs=3, rngs=rngs
    ),
}
"""Networks with shared weights; the small ones are for the smoke profile and for tests."""


def _targets(line: int) -> Mapping[str, float]:
    return {name: ratios[line] for name, ratios in RATIOS.items()}


LINES: dict[str, Line] = {
    "mse-4096": Line(
        "784-4096-4096-1 ReLU, N=100, MSE",
        (784, 4096, 4096, 1),
        100,
        ng.MeanSquaredError(),
        "exact",
        True,
        _targets(0),
    ),
    "xent-1024": Line(
        "784-1024-1024-10 ReLU, N=128, cross-entropy, true Fisher",
        (784, 1024, 1024, 10),
        128,
        ng.SoftmaxCrossEntropy(),
        "exact",
        False,
        _targets(1),
        optimizers={"Adam": 1.5, "Shampoo": 1.5, "SOAP": 1.5},
    ),
    "xent-1024-mc": Line(
        "the same, Monte-Carlo Fisher (1 sample)",
        (784, 1024, 1024, 10),
        128,
        ng.SoftmaxCrossEntropy(),
        "mc",
        False,
        _targets(2),
    ),
    "conv-mc": Line(
        "ConvNet 32-64-128-128 on 32x32x3, N=128, cross-entropy, Monte-Carlo Fisher (1 sample)",
        (*IMAGE, 10),
        128,
        ng.SoftmaxCrossEntropy(),
        "mc",
        False,
        {"exact": 5, "block-diag": 6, "K-FAC": 3, "EKFAC": 8, "diagonal": 3, "unit-wise": 15},
        network="conv",
    ),
    "transformer-mc": Line(
        "vision transformer, width 64, depth 2, 64 tokens, N=64, the same loss and Fisher",
        (*IMAGE, 10),
        64,
        ng.SoftmaxCrossEntropy(),
        "mc",
        False,
        {"exact": 6, "K-FAC": 3},
        network="transformer",
    ),
}
LINES["mse-4096-closed"] = replace(
    LINES["mse-4096"],
    title="784-4096-4096-1 ReLU, N=100, MSE, the batch closed over",
    closed=True,
)


_PLAIN = Entry(ng.Exact())


def make_model(line: Line, entry: Entry) -> nnx.Module:
    """The network of a line, in float32, the same numbers at every call."""
    if line.network:
        return NETWORKS[line.network](nnx.Rngs(SEED))
    return ng.MLP(
        line.widths,
        activation="relu",
        weight_variance=2.0,
        bias_variance=entry.bias_variance,
        param_dtype=jnp.float32,
        rngs=nnx.Rngs(SEED),
    )


def make_problem(line: Line, entry: Entry = _PLAIN) -> Problem:
    """The model and batch of a line, the same numbers at every call."""
    inputs, labels, targets = jax.random.split(jax.random.key(SEED), 3)
    shape = line.widths[:-1] if line.network else line.widths[:1]
    x = jax.random.normal(inputs, (line.num_samples, *shape), jnp.float32)
    if not line.network:
        x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
    outputs = line.widths[-1]
    if isinstance(line.loss, ng.SoftmaxCrossEntropy):
        classes = jax.random.randint(labels, (line.num_samples,), 0, outputs)
        y = jax.nn.one_hot(classes, outputs, dtype=jnp.float32)
    else:
        y = jax.random.bernoulli(labels, shape=(line.num_samples, outputs)) - jnp.float32(0.5)
    return Problem(make_model(line, entry), x, y, targets)
