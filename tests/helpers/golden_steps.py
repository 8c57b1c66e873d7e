"""Forty steps of every structure in many settings, and the file that keeps what they gave.

``PYTHONPATH=. python tests/helpers/golden_steps.py`` adds the cells that the file lacks,
and drops those that are no cells any more; with ``--rewrite NAME ...`` it writes these anew. It
takes none that carries rounding of its inputs further than a tenth of what the test allows. A cell
that changes is a change of results: rewrite it only where that is meant.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from battery import AS_USERS, STRUCTURES
from flax import nnx

import natgrad_flax as ng

FILE = Path(__file__).with_suffix(".json")
STEPS, EVERY, BATCHES = 40, 4, 4
MSE, SOFTMAX = ng.MeanSquaredError(), ng.SoftmaxCrossEntropy()


class Images(nnx.Module):
    """A convolution in two groups, batch normalisation as in evaluation, and a readout."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        keys: dict[str, Any] = {"param_dtype": jnp.float64, "rngs": rngs}
        self.conv = nnx.Conv(2, 4, (2, 2), strides=2, feature_group_count=2, **keys)
        self.norm = nnx.BatchNorm(4, use_running_average=True, **keys)
        self.readout = nnx.Linear(16, 3, **keys)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.norm(jnp.tanh(self.conv(x)))
        return self.readout(h.reshape(len(h), -1))


class Words(nnx.Module):
    """An embedding, a layer without a bias that is called twice, a normalisation, a bare gain."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        keys: dict[str, Any] = {"param_dtype": jnp.float64, "rngs": rngs}
        self.embed = nnx.Embed(5, 3, **keys)
        self.mix = nnx.Linear(3, 3, use_bias=False, **keys)
        self.norm = nnx.LayerNorm(3, **keys)
        self.gain = nnx.Param(jnp.ones(3))
        self.readout = nnx.Linear(3, 3, **keys)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.norm(jnp.tanh(self.mix(self.embed(x))))
        return self.readout(jnp.tanh(self.mix(h * self.gain[...])).mean(1))


def _mlp(*widths: int, **options: Any) -> Callable[[nnx.Rngs], nnx.Module]:
    return lambda rngs: ng.MLP(widths, param_dtype=jnp.float64, rngs=rngs, **options)


def _convnet(rngs: nnx.Rngs) -> nnx.Module:
    return ng.ConvNet(
        (4, 4, 2),
        (3,),
        3,
        strides=2,
        activation="tanh",
        bias_variance=0.1,
        param_dtype=jnp.float64,
        rngs=rngs,
    )


MODELS: dict[str, tuple[Callable[[nnx.Rngs], nnx.Module], tuple[int, ...], int, int, int]] = {
    # what makes it, the shape of an input, layers, samples a batch, outputs
    "tanh": (_mlp(5, 6, 4, 3, activation="tanh", bias_variance=0.3), (5,), 3, 6, 3),
    "relu": (_mlp(4, 7, 3, activation="relu"), (4,), 2, 6, 3),
    "wide": (_mlp(9, 10, 8, 3, activation="tanh", bias_variance=0.3), (9,), 3, 4, 3),
    "one output": (_mlp(9, 10, 8, 1, activation="tanh", bias_variance=0.3), (9,), 3, 3, 1),
    "convnet": (_convnet, (4, 4, 2), 2, 4, 3),
    "images": (Images, (4, 4, 2), 3, 6, 3),
    "words": (Words, (4,), 5, 6, 3),
}


@dataclass(frozen=True)
class Setting:
    """How a structure descends.

    Attributes:
      model: a name of ``MODELS``.
      loss: the loss.
      options: of ``ng.natural_gradient_descent``.
      quick: structures by their names in the battery, those of the fast suite.
      slow: the others.
      space: to solve in.
      average: adds ``average=`` and its example.
      rate: the learning rate.
      fisher_batch: whether the Fisher has inputs of its own.
    """

    model: str
    loss: ng.Loss
    options: dict[str, Any]
    quick: str = ""
    slow: str = ""
    space: str = "auto"
    average: ng.MovingAverage | None = None
    rate: float = 0.1
    fisher_batch: bool = False


MC: dict[str, Any] = {"fisher": "mc", "mc_samples": 2, "damping": 0.1}
SETTINGS: dict[str, Setting] = {
    "damped": Setting(
        "tanh",
        MSE,
        {"damping": 0.1},
        quick="kfac",
        slow="exact block-diagonal layer-wise kfac-literal-pi ekfac unit-wise diagonal "
        "quasi-diagonal",
    ),
    "relative": Setting(
        "relu",
        SOFTMAX,
        {"damping": ng.RelativeDamping(0.5)},
        quick="block-tri-diagonal kfac-literal-pi",
        slow="exact block-diagonal layer-wise kfac ekfac unit-wise diagonal",
        rate=0.02,
    ),
    "undamped": Setting(
        "wide",
        MSE,
        {},
        quick="block-diagonal",
        slow="exact block-tri-diagonal layer-wise",
        rate=0.05,
    ),
    "undamped, one output": Setting(
        "one output",
        MSE,
        {},
        quick="layer-wise-indefinite",
        slow="kfac kfac-literal-pi ekfac",
        rate=0.005,
    ),
    "monte-carlo": Setting(
        "tanh",
        SOFTMAX,
        MC,
        quick="exact",
        slow="block-diagonal block-tri-diagonal layer-wise kfac-literal-pi ekfac unit-wise",
    ),
    "empirical": Setting(
        "relu",
        SOFTMAX,
        {"fisher": "empirical", "damping": 0.1},
        quick="quasi-diagonal",
        slow="block-tri-diagonal kfac ekfac",
    ),
    "parameter": Setting(
        "tanh",
        SOFTMAX,
        {"damping": 0.1},
        quick="layer-wise unit-wise",
        slow="exact block-diagonal block-tri-diagonal kfac",
        space="parameter",
    ),
    "sample": Setting("tanh", SOFTMAX, MC, slow="exact kfac unit-wise", space="sample"),
    "convnet": Setting(
        "convnet",
        MSE,
        {"damping": 0.1},
        quick="kfac-reduce unit-wise",
        slow="exact block-diagonal kfac ekfac",
    ),
    "images": Setting(
        "images",
        SOFTMAX,
        {"damping": 0.1},
        quick="layer-wise ekfac-reduce",
        slow="kfac-reduce ekfac unit-wise quasi-diagonal",
    ),
    "words": Setting(
        "words",
        SOFTMAX,
        MC,
        quick="ekfac quasi-diagonal",
        slow="block-diagonal kfac unit-wise diagonal",
    ),
    "averaged": Setting(
        "tanh",
        SOFTMAX,
        MC,
        quick="kfac ekfac",
        slow="kfac-literal-pi diagonal quasi-diagonal",
        average=ng.MovingAverage(0.9, 2, 4),
    ),
    "renewed": Setting(
        "wide",
        SOFTMAX,
        {"damping": 0.1},
        quick="ekfac diagonal",
        slow="kfac quasi-diagonal",
        average=ng.MovingAverage(0.0, 2),
    ),
    "averaged images": Setting(
        "images",
        SOFTMAX,
        {"damping": ng.RelativeDamping(0.5)},
        quick="kfac-reduce",
        slow="ekfac-reduce",
        average=ng.MovingAverage(0.9),
        rate=0.03,
    ),
    "momentum": Setting(
        "tanh", SOFTMAX, {"damping": 0.1, "momentum": 0.8}, quick="exact", slow="block-diagonal"
    ),
    "momentum outside of the span": Setting(
        "tanh", SOFTMAX, MC | {"momentum": 0.8}, quick="block-diagonal", slow="exact"
    ),
    "microbatches": Setting(
        "relu", SOFTMAX, MC | {"microbatches": 3}, quick="kfac", slow="exact ekfac"
    ),
    "fisher batch": Setting(
        "tanh",
        SOFTMAX,
        {"damping": 0.1},
        quick="exact",
        slow="layer-wise kfac unit-wise",
        fisher_batch=True,
    ),
    "incoming": Setting(
        "tanh",
        SOFTMAX,
        {"damping": 0.1, "gradient": "incoming"},
        quick="kfac-literal-pi block-tri-diagonal",
        slow="exact block-diagonal ekfac unit-wise quasi-diagonal",
    ),
    "incoming, averaged": Setting(
        "words",
        SOFTMAX,
        {"damping": 0.1, "gradient": "incoming", "microbatches": 2},
        slow="kfac",
        average=ng.MovingAverage(0.9, 2, 2),
    ),
    "adaptive": Setting(
        "tanh",
        SOFTMAX,
        {"damping": ng.LevenbergMarquardt(initial=0.5, minimum=0.01)},
        quick="diagonal",
        slow="exact ekfac",
    ),
}
CELLS = {
    f"{structure}, {name}": (structure, setting)
    for name, setting in SETTINGS.items()
    for structure in f"{setting.quick} {setting.slow}".split()
}


def network(name: str) -> tuple[Any, Any, Any]:
    """Graph, parameters drawn by NumPy, and the other Variables."""
    make = MODELS[name][0]
    graph, params, rest = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...)
    rng = np.random.default_rng(7)

    def draw(leaf: Any) -> jax.Array:
        return jnp.asarray(rng.normal(size=leaf.shape) * (0.7 if leaf.ndim > 1 else 1.0))

    params = jax.tree.map(draw, params)
    return (
        graph,
        params,
        jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(0.5, 2, leaf.shape)), rest),
    )


def batches(name: str, loss: ng.Loss, nudge: float) -> tuple[jax.Array, jax.Array]:
    """Inputs (batches, N, ...), and targets (batches, N, 3); ``nudge`` times noise on them."""
    _, shape, _, samples, outputs = MODELS[name]
    rng = np.random.default_rng(11)
    size = (BATCHES, samples)
    if name == "words":
        x = rng.integers(0, 5, (*size, *shape))
    else:
        x = rng.normal(size=(*size, *shape))
        x *= 1 + nudge * np.random.default_rng(13).normal(size=x.shape)
    labels, values = rng.integers(0, outputs, size), rng.normal(size=(*size, outputs))
    return jnp.asarray(x), jnp.asarray(np.eye(outputs)[labels] if loss == SOFTMAX else values)


def descend(cell: str, nudge: float = 0.0) -> dict[str, list[float]]:
    """The loss of every fourth step, and two projections of the parameters after the last.

    Args:
      cell: a name of ``CELLS``.
      nudge: how far parameters and inputs are moved before, relative to themselves.
    """
    name, setting = CELLS[cell]
    structure = STRUCTURES[name](MODELS[setting.model][2], setting.space)
    graph, params, rest = network(setting.model)
    noise = np.random.default_rng(17)
    params = jax.tree.map(lambda leaf: leaf * (1 + nudge * noise.normal(size=leaf.shape)), params)
    xs, ys = batches(setting.model, setting.loss, nudge)
    options = dict(setting.options)
    if setting.average is not None:
        example = (nnx.merge(graph, params, rest), xs[0])
        options |= {"average": setting.average, "example": example}
    tx = ng.natural_gradient_descent(
        setting.rate, structure=structure, loss=setting.loss, check_samples=False, **options
    )

    def objective(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return setting.loss(nnx.merge(graph, params, rest)(x), y)

    def penalised(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        squares = jax.tree.map(lambda leaf: jnp.sum(leaf**2), params)
        return objective(params, x, y) + 0.01 * sum(jax.tree.leaves(squares))

    def step(carry: Any, number: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        x, y = xs[number % BATCHES], ys[number % BATCHES]
        given = jax.grad(penalised)(params, x, y) if "gradient" in options else params
        extra = {"fisher_x": -xs[(number + 1) % BATCHES]} if setting.fisher_batch else {}
        module = nnx.merge(graph, params, rest)
        updates, state = tx.update(given, state, params, module=module, x=x, y=y, **extra)
        moved = jax.tree.map(jnp.add, params, updates)
        return (moved, state), objective(params, xs[0], ys[0])

    @partial(jax.jit, compiler_options=AS_USERS)
    def run(params: Any) -> tuple[Any, jax.Array]:
        (params, _), losses = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(STEPS))
        return params, losses

    last, losses = run(params)
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(last)])
    onto = np.random.default_rng(19).normal(size=(2, flat.size))
    return {
        "losses": np.asarray(losses)[EVERY - 1 :: EVERY].tolist(),
        "projections": (onto @ flat).tolist(),
    }


def difference(one: dict[str, list[float]], other: dict[str, list[float]]) -> float:
    """The largest difference, relative to the largest number of its kind."""
    return max(
        float(np.abs(np.subtract(one[key], other[key])).max() / np.abs(other[key]).max())
        for key in ("losses", "projections")
    )


def read() -> dict[str, dict[str, list[float]]]:
    """What the file keeps, by cell."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def main() -> None:
    """Writes the cells that the file lacks, and those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rewrite", nargs="+", default=[], metavar="CELL", choices=CELLS)
    named, kept, refused = parser.parse_args().rewrite, read(), []
    for cell in CELLS:
        if cell in kept and cell not in named:
            continue
        with jax.enable_x64(True):
            found, moved = descend(cell), descend(cell, 1e-15)
        carried = difference(moved, found)
        print(f"{cell}: rounding of the inputs moves it by {carried:.1e}", flush=True)
        if carried < 1e-11:
            kept[cell] = found
        else:
            refused.append(cell)
    lines = [f"{json.dumps(cell)}: {json.dumps(kept[cell])}" for cell in CELLS if cell in kept]
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    if refused:
        raise SystemExit(f"not written, as they magnify rounding: {', '.join(refused)}")


if __name__ == "__main__":
    main()
