"""Training a ConvNet on real images: K-FAC beside momentum SGD, steps and seconds to one loss.

``python -m benchmarks.training`` gives both optimizers the same number of learning rates, two
epochs of 10 000 images of CIFAR-10 and the same order of batches, and tells when each is first at
the training loss with which the best momentum SGD ends.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import natgrad_datasets
import numpy as np
import optax
from flax import nnx
from jax import Array
from rich.console import Console
from rich.table import Table

import natgrad_flax as ng
from benchmarks.accuracy import missing_files
from benchmarks.common import Suite, by_profile, profile, unit
from benchmarks.step import environment

LOSS = ng.SoftmaxCrossEntropy()
MOMENTUM = 0.9
DAMPING = 3e-4
DATA_SEED = 1


@dataclass(frozen=True)
class Setting:
    """What is trained.

    Attributes:
      dataset: a name of ``natgrad_datasets``.
      num_train: N.
      batch: samples a step, drawn without replacement in each epoch.
      epochs: times that every sample is seen.
      evaluate: steps from one look at the training loss to the next.
      evaluated: samples of which that loss is the mean, the first of the training set.
      channels: of the ConvNet.
      strides: of its convolutions.
      pooling: before its readout. Flattened images of CIFAR-10 give the readout a factor of side
        8192, which nobody inverts at every step.
    """

    dataset: str
    num_train: int
    batch: int
    epochs: int
    evaluate: int
    evaluated: int
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    pooling: str

    @property
    def steps(self) -> int:
        """Steps in all; samples that do not fill a batch are left out of their epoch."""
        return self.epochs * (self.num_train // self.batch) // self.evaluate * self.evaluate


CIFAR = Setting("cifar10", 10_000, 128, 2, 6, 1000, (32, 64, 128, 128), (1, 2, 2, 1), "average")
DIGITS = Setting("digits", 512, 64, 3, 4, 512, (8, 16), (1, 2), "flatten")


@dataclass(frozen=True)
class Curve:
    """One training run.

    Attributes:
      optimizer: key of OPTIMIZERS.
      learning_rate: eta.
      steps: at which the loss was looked at, the first is 0.
      losses: the training loss there; NaN after a divergence.
      seconds: of training until there, without compilation and without the looks.
    """

    optimizer: str
    learning_rate: float
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    seconds: tuple[float, ...]

    def reaches(self, target: float) -> tuple[float, float]:
        """Steps and seconds until the loss is first at the target, interpolated; inf if never."""
        for i, loss in enumerate(self.losses):
            if loss <= target:
                if i == 0:
                    return 0.0, 0.0
                share = (self.losses[i - 1] - target) / (self.losses[i - 1] - loss)
                ends = (self.steps[i - 1], self.steps[i]), (self.seconds[i - 1], self.seconds[i])
                return tuple(a + share * (b - a) for a, b in ends)  # type: ignore[return-value]
        return math.inf, math.inf

    @property
    def final(self) -> float:
        """The last loss; infinite after a divergence."""
        return self.losses[-1] if math.isfinite(self.losses[-1]) else math.inf


def momentum_sgd(rate: float, model: nnx.Module, x: Array) -> optax.GradientTransformation:
    """Gradient descent with heavy-ball momentum."""
    return optax.sgd(rate, momentum=MOMENTUM)


def kfac(every: int) -> Any:
    """K-FAC with averaged factors that are renewed after so many steps, and the same momentum."""

    def build(rate: float, model: nnx.Module, x: Array) -> optax.GradientTransformation:
        return optax.chain(
            ng.natural_gradient_descent(
                rate,
                structure=ng.KFAC(last_layer="literal", split="pi"),
                loss=LOSS,
                damping=DAMPING,
                fisher="mc",
                average=ng.MovingAverage(decay=0.95, every=every),
                example=(model, x),
            ),
            optax.trace(MOMENTUM),
        )

    return build


OPTIMIZERS: Mapping[str, tuple[Any, tuple[float, ...]]] = {
    "momentum SGD": (momentum_sgd, (0.1, 0.3, 1.0, 3.0, 10.0)),
    "K-FAC": (kfac(1), (0.001, 0.003, 0.01, 0.03, 0.1)),
    "K-FAC, factors every 10 steps": (kfac(10), (0.001, 0.003, 0.01, 0.03, 0.1)),
}
"""How each optimizer is built, and its learning rates: as many for each."""

RIVALS = [name for name in OPTIMIZERS if name != "momentum SGD"]


def load(setting: Setting) -> tuple[Array, Array]:
    """Images (N, H, W, C) of zero mean and unit variance, and one-hot labels."""
    data = natgrad_datasets.load(
        setting.dataset,
        classes=range(10),
        num_train=setting.num_train,
        num_test=10,
        layout="image",
        prepare=False,
        dtype="float32",
    )
    x = data.x_train
    return jnp.asarray((x - x.mean()) / x.std()), jnp.asarray(data.y_train)


def train(setting: Setting, optimizer: str, rate: float, x: Array, y: Array) -> Curve:
    """One run from the same parameters, over the same batches, for every optimizer and rate."""
    model = ng.ConvNet(
        x.shape[1:],
        setting.channels,
        10,
        strides=setting.strides,
        pooling=setting.pooling,
        rngs=nnx.Rngs(0),
    )
    graphdef, params = nnx.split(model)
    first = x[: setting.batch]
    tx = optax.with_extra_args_support(OPTIMIZERS[optimizer][0](rate, model, first))

    def value(params: Any, x: Array, y: Array) -> Array:
        return LOSS(nnx.merge(graphdef, params)(x), y)

    # no scan over the steps: the gradient of SGD would be slow inside (xla/convolution.py)
    @jax.jit
    def step(carry: Any, indices: Array) -> Any:
        params, state = carry
        batch, labels = x[indices], y[indices]
        slope = jax.grad(value)(params, batch, labels)
        module = nnx.merge(graphdef, params)
        move, state = tx.update(slope, state, params, module=module, x=batch, y=labels)
        return optax.apply_updates(params, move), state

    def advance(carry: Any, part: Array) -> Any:
        return functools.reduce(step, part, carry)

    look = jax.jit(lambda params: value(params, x[: setting.evaluated], y[: setting.evaluated]))
    carry = (params, tx.init(params))
    parts = batches(setting).reshape(-1, setting.evaluate, setting.batch)
    jax.block_until_ready((advance(carry, parts[0]), look(params)))
    steps, losses, seconds = [0], [float(look(params))], [0.0]
    for part in parts:
        start = time.perf_counter()
        carry = jax.block_until_ready(advance(carry, part))
        seconds.append(seconds[-1] + time.perf_counter() - start)
        steps.append(steps[-1] + setting.evaluate)
        losses.append(float(look(carry[0])))
        if not math.isfinite(losses[-1]):
            break
    return Curve(optimizer, rate, tuple(steps), tuple(losses), tuple(seconds))


def batches(setting: Setting) -> Array:
    """Indices of every step, (steps, batch); the same at every call."""
    rng = np.random.default_rng(DATA_SEED)
    whole = setting.num_train // setting.batch * setting.batch
    epochs = [rng.permutation(setting.num_train)[:whole] for _ in range(setting.epochs)]
    return jnp.asarray(np.concatenate(epochs).reshape(-1, setting.batch)[: setting.steps])


def best(curves: Sequence[Curve], optimizer: str) -> Curve:
    """The run of an optimizer that ends lowest."""
    return min((c for c in curves if c.optimizer == optimizer), key=lambda c: c.final)


def soonest(curves: Sequence[Curve], optimizer: str, target: float) -> Curve:
    """The run of an optimizer that needs the fewest steps to a loss."""
    mine = [c for c in curves if c.optimizer == optimizer]
    return min(mine, key=lambda c: (c.reaches(target)[0], c.final))


class Training(Suite):
    """Training a ConvNet: steps of K-FAC over those of momentum SGD to the loss where SGD ends.

    Every optimizer has the same number of learning rates. A rise of the share of steps says that
    K-FAC learns less from a batch; of the share of seconds, that or a dearer step.
    """

    params: ClassVar[tuple[list[Any], ...]] = (
        by_profile(smoke=["digits"], fast=["digits"], regular=["digits"], large=["cifar10"]),
        by_profile(smoke=RIVALS[:1], fast=RIVALS, regular=RIVALS, large=RIVALS),
    )
    param_names: ClassVar = ["data", "optimizer"]

    def measure(self, data: str, optimizer: str) -> Mapping[str, float]:
        """Steps and seconds, as shares of those of momentum SGD."""
        setting = {"digits": DIGITS, "cifar10": CIFAR}[data]
        x, y = load(setting)
        rates = slice(2, 3) if profile() == "smoke" else slice(5)
        curves = [
            train(setting, name, rate, x, y)
            for name in ("momentum SGD", optimizer)
            for rate in OPTIMIZERS[name][1][rates]
        ]
        sgd = best(curves, "momentum SGD")
        steps, seconds = soonest(curves, optimizer, sgd.final).reaches(sgd.final)
        if not math.isfinite(steps):
            raise ArithmeticError(f"{optimizer} never reaches the loss {sgd.final:.3g} of SGD")
        spent = sgd.reaches(sgd.final)
        return {"steps": steps / spent[0], "seconds": seconds / spent[1]}

    def skipped(self, *case: Any) -> str | None:
        """What takes too long for the profile, and files that are not on this machine."""
        if profile() == "fast":
            return "ten trainings take two minutes; the profiles from regular on have them"
        return missing_files("cifar10") if case[0] == "cifar10" else None

    @unit("of the steps of momentum SGD")
    def track_share_of_steps(self, *case: Any) -> float:
        """Steps to the loss of the best momentum SGD, over its own."""
        return self.figures["steps"]

    @unit("of the seconds of momentum SGD")
    def track_share_of_seconds(self, *case: Any) -> float:
        """The same in seconds of training, without compilation."""
        return self.figures["seconds"]


def table(curves: Sequence[Curve]) -> Table:
    """The best run of each optimizer beside the best of momentum SGD."""
    sgd = best(curves, "momentum SGD")
    spent = sgd.reaches(sgd.final)
    found = Table(title=f"Training loss {sgd.final:.4f}, where the best momentum SGD ends")
    columns = "learning rate", "steps", "of SGD's", "seconds", "of SGD's", "last loss"
    for name in ("optimizer", *columns):
        found.add_column(name, justify="left" if name == "optimizer" else "right")
    for name in dict.fromkeys(c.optimizer for c in curves):
        curve = soonest(curves, name, sgd.final)
        steps, seconds = curve.reaches(sgd.final)
        shares = [own / its for own, its in zip((steps, seconds), spent, strict=True)]
        cells = (f"{steps:.0f}", f"{shares[0]:.2f}", f"{seconds:.3g}", f"{shares[1]:.2f}")
        last = f"{best(curves, name).final:.4f}"
        found.add_row(name, f"{curve.learning_rate:g}", *cells, last)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, prints the table, and writes every curve as JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--data", choices=("cifar10", "digits"), default="cifar10")
    parser.add_argument("--optimizer", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--out", type=Path, help="also write every curve to this JSON file")
    options = parser.parse_args(arguments)
    setting = {"digits": DIGITS, "cifar10": CIFAR}[options.data]
    console, curves = Console(), []
    x, y = load(setting)
    for name in dict.fromkeys(("momentum SGD", *options.optimizer)):
        for rate in OPTIMIZERS[name][1]:
            curve = train(setting, name, rate, x, y)
            curves.append(curve)
            where = f"after {curve.steps[-1]} steps and {curve.seconds[-1]:.1f} s"
            console.print(f"{name}, rate {rate:g}: loss {curve.losses[-1]:.4f} {where}")
            if options.out:
                found = {"setting": asdict(setting), "environment": environment()}
                text = json.dumps({**found, "curves": [asdict(c) for c in curves]}, indent=2)
                options.out.write_text(text + "\n")
    console.print(table(curves))


if __name__ == "__main__":
    main()
