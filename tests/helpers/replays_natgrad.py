"""Replays of the slow checks of the project's own results, registered in ``REPLAYS``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from replays import Record, StandIns, always, measured, numbers, replay

from ntk_analysis.reproduce.natgrad import (
    drift,
    drift_batches,
    frontier_blocks,
    frontier_map,
    frontier_training,
    sparse_networks,
)

_ZEROS = np.zeros((1, 1))
_DATA = SimpleNamespace(input_dim=1, x_train=_ZEROS, y_train=_ZEROS, x_test=_ZEROS, y_test=_ZEROS)
"""Of one sample: what is measured on data is stored."""


def _activation(widths: Any, activation: str, *args: Any, **options: Any) -> str:
    """In the place of a network."""
    return activation


@replay("NG-Drift-Structures", what="gradient descent in the place of K-FAC")
def _drift(record: Record, wrong: bool) -> StandIns:
    curves = record["data"]["curves"]

    def follow(model: str, name: str, x: Any, y: Any) -> dict[str, Any]:
        name = "gradient descent" if wrong and name == "K-FAC" else name
        return curves[model][drift.STRUCTURES[name].name]

    digits = always((_ZEROS, _ZEROS))
    return {"digits_pair": digits, "dense_net": _activation, "_follow": follow}


@replay("NG-Drift-Batches", "NG-Drift-Batches-Digits", what="a batch is the whole training set")
def _drift_batches(record: Record, wrong: bool) -> StandIns:
    def course(model: str, which: str, *args: Any) -> drift_batches.Course:
        which = "full" if wrong and which == "batches" else which
        return drift_batches.Course(**record["data"]["runs"][model][which])

    return {
        "images": always(_DATA),
        "MLP": lambda widths, parametrization, **options: parametrization,
        "_course": course,
    }


@replay("NG-Frontier-Blocks", what="half the block")
def _blocks(record: Record, wrong: bool) -> StandIns:
    sizes, curves = frontier_blocks.SIZES, record["data"]["curves"]

    def measured_at(structure: Any, model: str, x: Any) -> float:
        size = max(1, structure.size // 2) if wrong else structure.size
        return curves[model]["measured"][max(i for i, s in enumerate(sizes) if s <= size)]

    return {
        "_net": lambda activation, side, seed: activation,
        "dense_layers": lambda model, x: model,
        "coefficient_matrix": measured_at,
        "_expected": lambda model, size: curves[model]["ridge"][sizes.index(size)],
        "condition_number": float,
    }


@replay("NG-Frontier-Map", what="gradient descent in the place of K-FAC")
def _map(record: Record, wrong: bool) -> StandIns:
    points = {point["name"]: point for point in record["data"]["points"]}
    names = {id(structure): name for name, structure in frontier_map.STRUCTURES.items()}

    def isotropy(structure: Any, model: str, x: Any) -> Any:
        name = names[id(structure)]
        name = "gradient descent" if wrong and name == "K-FAC" else name
        return SimpleNamespace(condition_number=points[name][model])

    def cost(structure: Any, geometry: Any) -> Any:
        # that of gradient descent, by which the others are divided, is of another object
        point = points[names.get(id(structure), "gradient descent")]
        return SimpleNamespace(stored=point["stored"], step_flops=point["flops"])

    return {
        "dense_net": _activation,
        "model_geometry": always(None),
        "structure_cost": cost,
        "isotropy": isotropy,
    }


@replay("NG-Frontier-Training", what="a damping where there should be none")
def _training(record: Record, wrong: bool) -> StandIns:
    names = {id(structure): name for name, structure in frontier_map.STRUCTURES.items()}
    rows = {
        (activation, row["name"]): {key: row[key] for key in frontier_training.Run._fields}
        for activation, found in record["data"]["rows"].items()
        for row in found
    }

    def train(structure: Any, damping: Any, problem: Any) -> frontier_training.Run:
        name = names[id(structure)]
        run = frontier_training.Run(**rows[problem.model, name])
        if damping == 0 and name in frontier_training._DAMPED and not wrong:
            run = run._replace(peak=measured(record, f"relu, {name}, no damping"))
        return run

    return {
        "digits_pair": always((_ZEROS, _ZEROS)),
        "dense_net": _activation,
        "initial_signals": always(None),
        "_train": train,
    }


@replay("NG-Conv-Digits", what="no pooling")
def _digits(record: Record, wrong: bool) -> StandIns:
    networks = dict(record["data"]["networks"])
    worst = {name: measured(record, f"{name}: largest |Theta") for name in networks}
    if wrong:
        networks["conv-average"] = networks["conv-flatten"]

    def predict(structure: Any, train: Any, *args: Any) -> Any:
        return SimpleNamespace(accuracy=always(train.network["accuracies"][structure.name]))

    def signals(structure: Any, name: str, *args: Any) -> tuple[Any, Any]:
        found = SimpleNamespace(network=networks[name], gram=lambda: list(networks).index(name))
        return found, found

    def descent(kernel: Any, targets: Any) -> tuple[Any, float]:
        found = list(networks.values())[int(kernel)]
        return found["gradient_descent"], found["condition_number"]

    return {
        "natgrad_datasets": SimpleNamespace(load=always(_DATA)),
        "_network": lambda name, shape: name,
        "analytic_signals": signals,
        "limit_isotropy": lambda structure, name, train: SimpleNamespace(
            deviation=worst[name], theoretical_alpha=1.0
        ),
        "predict_from_signals": predict,
        "_descent": descent,
    }


@replay("NG-Sparse-Networks", what="the scale of the weights is dropped")
def _sparse_networks(record: Record, wrong: bool) -> StandIns:
    data = record["data"]
    limits = zip(data["limit"]["accuracy"], data["limit"]["alignment"], strict=True)
    limit = dict(zip(data["counts"], limits, strict=True))
    names = [method.name for method in sparse_networks.METHODS]

    def train(graph: Any, state: Any, x: Any, targets: Any, key: Any, method: Any) -> Any:
        scale, seed = graph
        at = 0 if wrong else data["scales"].index(scale)
        return at, names.index(method.name), data["counts"].index(len(x)), seed

    def judge(graph: Any, place: Any, x: Any, y: Any) -> tuple[float, float]:
        if len(x) != sparse_networks._TEST:
            return 1.0, 0.0
        return tuple(np.array(data[name])[place] for name in ("accuracy", "alignment"))

    few, many = np.zeros((max(data["counts"]), 1)), np.zeros((sparse_networks._TEST, 1))
    sets = SimpleNamespace(x_train=few, y_train=few[:, 0], x_test=many, y_test=many[:, 0])
    return {
        "sparse_classification": always(sets),
        "_kernel_limit": lambda sets, count: limit[count],
        "_network": lambda scale, seed: (scale, seed),
        "nnx": SimpleNamespace(split=lambda network: (network, None)),
        "_train": train,
        "_judge": judge,
    }


@replay("NG-Conv-Training", what="the narrow network for the wide one")
def _conv_training(record: Record, wrong: bool) -> StandIns:
    losses, widths = record["data"]["losses"], record["data"]["widths"]

    def trainer(model: tuple[str, int], structure: Any, *args: Any) -> Any:
        name, width_ = model
        place = 0 if wrong else widths[name].index(width_)
        found = numbers(losses[name][structure.name][place])
        return SimpleNamespace(run=always(SimpleNamespace(outputs_train=found)))

    return {
        "natgrad_datasets": SimpleNamespace(load=always(_DATA)),
        "build_network": lambda name, shape, sizes, *args, **options: (name, sizes[0]),
        "Trainer": trainer,
        "squared_losses": lambda found, y: found,
    }


@replay("NG-Width-Law", what="half the step")
def _width_law(record: Record, wrong: bool) -> StandIns:
    data, half = record["data"], measured(record, "half the rate")
    curves = [curve for found in data["curves"].values() for curve in found.values()]
    intervals = {curve["losses"][0]: curve["interval"] for curve in curves}
    losses = {
        activation: np.array([curve["losses"] for curve in found.values()])[:, :, None]
        for activation, found in data["curves"].items()
    }
    if wrong:
        losses = {activation: np.full_like(found, half) for activation, found in losses.items()}
    return {
        "_DEEP_WIDTHS": tuple(data["widths"]),
        "_measure_widths": always((losses, half)),
        # of the same loss at every width the exponent is 0
        "_interval": lambda widths, losses: intervals.get(losses[0, 0], (0.0, 0.0)),
    }


@replay("NG-MuP-Transfer", what="the widths of muP start as in the standard parametrisation")
def _mup_transfer(record: Record, wrong: bool) -> StandIns:
    data = record["data"]

    def sweep(kind: str, name: str, rates: Any, dampings: Any) -> Any:
        kind = "standard" if wrong else kind
        fixed = len(set(rates)) == 1
        return data["dampings"][kind]["losses"] if fixed else data["panels"][kind][name]["losses"]

    return {"_sweep": sweep}
