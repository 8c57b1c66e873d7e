"""Steps of a language model: K-FAC and EKFAC with averaged factors beside SGD and Adam.

``python -m benchmarks.language`` times rounds of ten steps of a causal transformer of 10.9 million
parameters (width 384, depth 6, 256 tokens; 32 sequences of 128), of which the natural gradients
renew their Monte-Carlo factors and inverses at the first, and all else moves at every step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from rich.console import Console
from rich.table import Table

import natgrad_flax as ng
from benchmarks.common import Suite, by_profile, unit
from benchmarks.programs import check_finite, planned_bytes
from benchmarks.step import environment
from ntk_analysis.results import write_json

LOSS = ng.SoftmaxCrossEntropy()
EVERY = 10
"""Steps of a round, and from one renewal of factors and inverses to the next."""


@dataclass(frozen=True)
class Setting:
    """A language model and its batches.

    Attributes:
      vocabulary: V.
      sequences: N.
      context: T.
      width: features of a token; the affine layers between have four times as many.
      depth: blocks.
      heads: of attention.
      scan: whether one loop goes through all blocks.
    """

    vocabulary: int = 256
    sequences: int = 32
    context: int = 128
    width: int = 384
    depth: int = 6
    heads: int = 6
    scan: bool = False

    def model(self) -> ng.LanguageModel:
        """The same numbers at every call."""
        sizes = (self.vocabulary, self.context, self.width, self.depth, self.heads)
        return ng.LanguageModel(*sizes, 4 * self.width, scan=self.scan, rngs=nnx.Rngs(0))

    def batch(self) -> tuple[Array, Array]:
        """Tokens and those that follow them, (N, T) each."""
        shape = (self.sequences, self.context + 1)
        tokens = jax.random.randint(jax.random.key(1), shape, 0, self.vocabulary)
        return tokens[:, :-1], tokens[:, 1:]


CHARACTERS = Setting()
TINY = Setting(vocabulary=11, sequences=4, context=5, width=8, depth=1, heads=2)


def _natural(structure: ng.Structure) -> Callable[[nnx.Module, Array], Any]:
    def build(model: nnx.Module, x: Array) -> optax.GradientTransformation:
        return ng.natural_gradient_descent(
            1e-3,
            structure=structure,
            loss=LOSS,
            damping=1e-2,
            fisher="mc",
            average=ng.MovingAverage(every=EVERY),
            example=(model, x),
        )

    return build


OPTIMIZERS: Mapping[str, Callable[[nnx.Module, Array], Any]] = {
    "SGD": lambda model, x: optax.sgd(1e-3),
    "Adam": lambda model, x: optax.adam(1e-3),
    "K-FAC": _natural(ng.KFAC(split="pi", last_layer="literal")),
    "EKFAC": _natural(ng.EKFAC()),
}
RIVALS = [name for name in OPTIMIZERS if name != "SGD"]


class Run:
    """The compiled step of an optimizer, and where it stands.

    Args:
      setting: what is trained.
      name: key of OPTIMIZERS.

    Attributes:
      compile_seconds: of tracing and compiling, by processor time.
      planned: bytes that XLA plans for a step, parameters and state with it.
    """

    def __init__(self, setting: Setting, name: str) -> None:
        model, self._batch = setting.model(), setting.batch()
        graphdef, params = nnx.split(model)
        tx = optax.with_extra_args_support(OPTIMIZERS[name](model, self._batch[0]))

        def value(params: Any, x: Array, y: Array) -> Array:
            return LOSS(nnx.merge(graphdef, params)(x), y)

        def step(params: Any, state: Any, x: Array, y: Array) -> Any:
            # natural gradients take theirs by a pass of their own, and XLA leaves this one out
            gradient, module = jax.grad(value)(params, x, y), nnx.merge(graphdef, params)
            move, state = tx.update(gradient, state, params, module=module, x=x, y=y)
            return optax.apply_updates(params, move), state

        self._carry = jax.tree.map(jnp.copy, (params, tx.init(params)))
        start = time.process_time()
        lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*self._carry, *self._batch)
        self._step = lowered.compile()
        self.compile_seconds = time.process_time() - start
        self.planned = planned_bytes(self._step)

    def round(self) -> float:
        """Seconds of a step, the mean of ten of which the first renews."""
        start = time.perf_counter()
        for _ in range(EVERY):
            self._carry = self._step(*self._carry, *self._batch)
        jax.block_until_ready(self._carry)
        return (time.perf_counter() - start) / EVERY

    def check(self) -> None:
        """Raises FloatingPointError where a parameter is not finite."""
        check_finite(self._carry[0])


def measure(setting: Setting, names: Sequence[str], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of a step, over those of SGD, planned bytes and compile seconds of each optimizer.

    Raises:
      FloatingPointError: parameters that are not finite afterwards.
    """
    runs = {name: Run(setting, name) for name in dict.fromkeys(("SGD", *names))}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run.round()
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(run.round())
    found = {}
    for name, run in runs.items():
        run.check()
        pairs = zip(seconds[name], seconds["SGD"], strict=True)
        found[name] = {
            "seconds": statistics.median(seconds[name]),
            "ratio": statistics.median(own / sgd for own, sgd in pairs),
            "bytes": float(run.planned),
            "memory": run.planned / runs["SGD"].planned,
            "compile": run.compile_seconds,
        }
    return found


class LanguageStep(Suite):
    """A step of a language model, with factors that are renewed every ten, beside SGD.

    A rise of the ratio says that products with inverses or the renewal of factors got dearer; of
    the memory, that signals or averages are held longer or twice.
    """

    params: ClassVar[tuple[list[Any], ...]] = (
        by_profile(smoke=["tiny"], fast=["tiny"], regular=["characters"], large=["characters"]),
        by_profile(smoke=["K-FAC"], fast=["K-FAC", "EKFAC"], regular=RIVALS, large=RIVALS),
    )
    param_names: ClassVar = ["model", "optimizer"]

    def measure(self, model: str, optimizer: str) -> Mapping[str, float]:
        """All figures of a case."""
        return measure({"tiny": TINY, "characters": CHARACTERS}[model], [optimizer], 3)[optimizer]

    @unit("SGD steps")
    def track_ratio_to_sgd(self, *case: Any) -> float:
        """Mean of ten steps over ten SGD steps beside them."""
        return self.figures["ratio"]

    @unit("of SGD's bytes")
    def track_memory(self, *case: Any) -> float:
        """What XLA plans for a step, over that of SGD."""
        return self.figures["memory"]


def table(found: Mapping[str, Mapping[str, float]]) -> Table:
    """One row an optimizer."""
    columns = ("seconds a step", "of SGD's", "GB", "of SGD's", "compile, CPU s")
    shown = Table(title="Steps of a language model")
    for column in ("optimizer", *columns):
        shown.add_column(column, justify="left" if column == "optimizer" else "right")
    for name, row in found.items():
        cells = (f"{row['seconds']:.3f}", f"{row['ratio']:.2f}", f"{row['bytes'] / 1e9:.2f}")
        shown.add_row(name, *cells, f"{row['memory']:.2f}", f"{row['compile']:.1f}")
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.language", description=__doc__)
    parser.add_argument("--optimizer", nargs="+", choices=RIVALS, default=RIVALS)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of ten steps (default 3)")
    parser.add_argument("--vocabulary", type=int, default=CHARACTERS.vocabulary)
    parser.add_argument("--width", type=int, default=CHARACTERS.width)
    parser.add_argument("--depth", type=int, default=CHARACTERS.depth)
    parser.add_argument("--sequences", type=int, default=CHARACTERS.sequences)
    parser.add_argument("--context", type=int, default=CHARACTERS.context)
    parser.add_argument("--scan", action="store_true", help="one loop through all blocks")
    parser.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    given = vars(parser.parse_args(arguments))
    names, rounds, out = (given.pop(key) for key in ("optimizer", "rounds", "out"))
    setting = Setting(**given)
    found = measure(setting, names, rounds)
    Console().print(table(found))
    if out:
        written = {"setting": given, "environment": environment(), "found": found}
        write_json(out, written)


if __name__ == "__main__":
    main()
