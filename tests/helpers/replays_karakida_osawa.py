"""Replays of the slow checks of Karakida & Osawa, which register themselves in ``REPLAYS``."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from natgrad_datasets import Dataset
from replays import Record, StandIns, always, measured, numbers, replay

from natgrad_flax import RelativeDamping
from ntk_analysis.reproduce.karakida_osawa import (
    figure1,
    figure1b,
    figure2,
    figure3,
    unit_wise_damping,
)

_DESCENT = "gradient descent in the place of K-FAC"


def _curve(method: Any, width: int, seed: int, found: dict[str, Any]) -> figure1.Curve:
    names = ("theory", "network", "theory_test", "network_test")
    losses = [numbers(found.get(name, ())) for name in names]
    return figure1.Curve(method, width, seed, 1.0, *losses)


def _trained(curve: Callable[[Any, int, int], figure1.Curve]) -> StandIns:
    """Stand-ins for data and training, from method, width and seed to what was recorded."""

    def train(cells: Any, methods: Any, width: int, _: Any) -> list[figure1.Curve]:
        return [curve(method, width, seed) for _, seed in cells for method, _ in methods]

    return {"mnist_pair": always(None), "train_beside_theory": train}


@replay("KO-Fig1a", what=_DESCENT)
def _figure_1a(record: Record, wrong: bool) -> StandIns:
    found = {(c["structure"], c["factor"], c["seed"]): c for c in record["data"]["curves"]}

    def curve(method: Any, width: int, seed: int) -> figure1.Curve:
        name = method.structure.name
        name = "GradientDescent" if wrong and name == "KFAC" else name
        return _curve(method, width, seed, found[name, method.factor, seed])

    return _trained(curve)


@replay("KO-Fig1a-width", what=_DESCENT)
def _figure_1a_width(record: Record, wrong: bool) -> StandIns:
    data = record["data"]

    def curve(method: Any, width: int, seed: int) -> figure1.Curve:
        name, place = method.identifier, data["widths"].index(width)
        where = f"M = {width}, {name}: "
        if name not in data["first_losses"]:
            ahead = [0.1, 0.1 * (1 + measured(record, where))]
            return _curve(method, width, seed, {"theory": [0.1, 0.1], "network": ahead})
        first = data["first_losses"][name][place]
        # the largest of the ratios that are stored
        start = max(first) / measured(record, f"{where}loss_1")
        losses = [start, first[seed], start * measured(record, f"{where}loss_2")]
        slow = wrong and name == "kfac"
        return _curve(method, width, seed, {"network": [start, start, start] if slow else losses})

    return _trained(curve)


@replay("KO-Fig1a-README", what="tested on the training samples")
def _readme(record: Record, wrong: bool) -> StandIns:
    found = {curve["seed"]: curve for curve in record["data"]["curves"]}
    if wrong:
        found = {seed: {**c, "network_test": c["network"]} for seed, c in found.items()}

    return _trained(lambda method, width, seed: _curve(method, width, seed, found[seed]))


@replay("KO-Fig1b-left", "KO-Fig1b-right", what="the damping is dropped")
def _figure_1b(record: Record, wrong: bool) -> StandIns:
    data, solvers = record["data"], {update: name for name, update in figure1b._SOLVERS.items()}
    # the left one has one depth, solver and precision, which it does not name
    own = {"depth": 4, "solver": "elimination", "precision": "float32"}
    keys = ("depth", "width", "solver", "precision", "damping")
    curves = {tuple((own | c)[key] for key in keys): c["network"] for c in data["curves"]}
    rises = data["scan"]["rise"]
    rises = rises["elimination"] if isinstance(rises, dict) else rises
    scan = dict(zip(data["scan"]["damping"], rises, strict=True))
    theory = {(c["width"], c["damping"]): numbers(c.get("theory", ())) for c in data["curves"]}

    def train(model: Any, update: Any, x: Any, y: Any, rho: float, steps: int, precision="float32"):
        width, solver = model.widths[1], solvers[update]
        undamped = model.depth, width, solver, precision, 0.0
        if wrong and undamped in curves:
            return numbers(curves[undamped])
        losses = curves.get((model.depth, width, solver, precision, rho))
        return numbers([1.0, scan[rho]] if losses is None else losses)

    return {
        "mnist_pair": always(SimpleNamespace(x_train=[], y_train=[])),
        "relu_network": lambda data, width, depth, seed: SimpleNamespace(
            depth=depth, widths=(1, width)
        ),
        "initial_signals": lambda model, x: SimpleNamespace(
            train=None, outputs=None, width=model.widths[1]
        ),
        "coefficient_pair": lambda structure, signals, rho: (signals.width, rho),
        "linearised_dynamics": lambda width, rho, *_: SimpleNamespace(
            train_losses=theory[width, rho]
        ),
        "_radii": always(data["radii"]),
        "train": train,
    }


def _images(name: str, *args: Any) -> Dataset:
    x, y, label = np.zeros((1, 1)), np.zeros((1, 1)), np.zeros(1, int)
    return Dataset(name, x, y, x, y, label, label, (0,), ("",), "", ())


def _drawn(accuracy: dict[str, float], lost: float = 0.0) -> tuple[float, ...]:
    """Ten accuracies of this mean and standard deviation."""
    places = np.arange(10.0) - 4.5
    return tuple(accuracy["mean"] - lost + accuracy["std"] * places / places.std(ddof=1))


@replay("KO-Fig2-left", "KO-Fig2-left-small", what="no Forster transform")
def _figure_2_left(record: Record, wrong: bool) -> StandIns:
    table = record["data"]["accuracy"]

    def accuracies(data: Any, structures: Any, report: Any) -> list[figure2.Accuracy]:
        stored = {name: f"{name}, Forster" if "kfac" in structures else name for name in structures}
        if wrong and "kfac" in structures:
            stored = dict.fromkeys(structures, "exact")
        return [figure2.Accuracy(name, _drawn(table[key])) for name, key in stored.items()]

    transformed = SimpleNamespace(x_train=[], x_test=[], iterations=0)
    return {
        "images": _images,
        "smaller": lambda data: data,
        "forster_transform": always(transformed),
        "accuracies": accuracies,
        # its controls are rows of the check
        "_written_out": always([]),
    }


@replay(
    "KO-Fig2-center", "KO-Fig2-right", "KO-Fig2-kfac", what="one structure is two points behind"
)
def _figure_2(record: Record, wrong: bool) -> StandIns:
    lost = {"block-tri-diagonal": 0.02} if wrong else {}
    found = [
        figure2.Accuracy(name, _drawn(accuracy, lost.get(name, 0.0)))
        for name, accuracy in record["data"]["accuracy"].items()
    ]
    return {"images": _images, "accuracies": always(found)}


@replay("KO-Fig3", what="all couplings of a unit are quasi-diagonal")
def _figure_3(record: Record, wrong: bool) -> StandIns:
    values = {curve["structure"]: curve["values"] for curve in record["data"]["curves"]}
    if wrong:
        values["quasi-diagonal"] = values["unit-wise"]
    apart = measured(record, "sigma_b = 0")
    return {
        "condition_numbers": lambda x, width, bias, seed: {
            name: found[figure3._WIDTHS.index(width)][seed] for name, found in values.items()
        },
        "_without_biases": always(({}, apart)),
    }


@replay("KO-Thm5.1-training", what="a thousandth of the theorem's damping")
def _theorem_5_1(record: Record, wrong: bool) -> StandIns:
    data = record["data"]
    keys = ("activation", "width", "damping", "factor")
    curves = {tuple(curve[key] for key in keys): curve["network"] for curve in data["curves"]}
    small = "0.001 of a block's diagonal"
    names = {rho: name for name, rho in unit_wise_damping.dampings(1024).items()}
    names[RelativeDamping(1e-3)] = small

    def train(run: Any, x: Any, y: Any, damping: Any, *, steps: int, factor: float = 1.0):
        if damping == 0:
            return numbers(data["undamped"])
        name = small if wrong else names[damping]
        return numbers(curves[run.activation, run.width, name, factor])

    rows = np.array(list(data["conditions"].values())).T
    return {
        "_mnist": always((None, None)),
        "_train": train,
        "problem": lambda widths, count: data["widths"].index(widths[1]),
        "conditions": lambda at, names: list(rows[at]),
    }
