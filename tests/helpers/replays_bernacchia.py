"""Replays of the slow checks of Bernacchia et al., which register themselves in ``REPLAYS``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from replays import Record, StandIns, always, replay

from ntk_analysis.reproduce.bernacchia import autoencoder, costs, teachers
from ntk_analysis.reproduce.bernacchia.training import Run


class Replayed(Run):
    """A run of a method in training that is over."""

    def __init__(self, curve: dict[str, list[float]]) -> None:
        self.examples, self.seconds, self.errors = (
            list(curve[name]) for name in ("examples", "seconds", "errors")
        )

    def advance(self) -> None:
        pass


def _panel(panel: dict[str, Any]) -> dict[str, list[Replayed]]:
    """Runs by the beginning of the name of their curve."""
    return {
        curve["name"].partition(", learning rate")[0]: [Replayed(run) for run in curve["runs"]]
        for curve in panel["curves"]
    }


@replay("BE-Fig1A", "BE-Fig1B", "BE-Fig1C", what="SGD in the place of natural gradient")
def _linear_networks(record: Record, wrong: bool) -> StandIns:
    found = {panel["title"]: _panel(panel) for panel in record["data"]["panels"]}
    kinds = {network: kind for kind, network in teachers.NETWORKS.items()}
    natural = "SGD" if wrong else "natural gradient"

    def experiment(setting: Any) -> Any:
        return SimpleNamespace(
            setting=setting,
            natural=lambda network, seed: found[kinds[network]][natural][seed],
            gradient=lambda network, seed, rate: found[kinds[network]]["SGD"][seed],
        )

    return {"Experiment": experiment}


@replay("BE-Fig1D", what="the damping is not split")
def _autoencoder(record: Record, wrong: bool) -> StandIns:
    found = _panel(record["data"]["panels"][0])
    diverged = Replayed({"examples": [0, 1], "seconds": [0, 0], "errors": [1, np.nan]})

    def start(seed: int) -> autoencoder.SetUp:
        natural = {name: found[name][seed] for name in autoencoder.VARIANTS}
        if wrong:
            natural[autoencoder.PI] = natural[autoencoder.PLAIN]
        sgd = dict.fromkeys(autoencoder.RATES, diverged)
        return autoencoder.SetUp(natural, sgd | {autoencoder.RATES[-1]: found["SGD"][seed]})

    return {"pixels": always((None, None)), "Experiment": always(SimpleNamespace(start=start))}


@replay("BE-Cost", what="eight targets are one")
def _costs(record: Record, wrong: bool) -> StandIns:
    flops = dict(record["data"]["flops"])
    if wrong:
        flops[costs.EIGHT] = flops[costs.ONE]
    return {
        "flops": lambda w: {name: row[costs.WIDTHS.index(w)] for name, row in flops.items()},
        "_train": always(_panel(record["data"])),
    }
