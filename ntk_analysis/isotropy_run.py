"""The run of ``natgrad isotropy``: a sweep that can be interrupted, with spectra and costs."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from natgrad_flax import Signals, SingularCouplingWarning, Structure
from natgrad_flax.optimizer.learning_rate import model_geometry
from ntk_analysis.coefficient import Kernels, analytic_signals
from ntk_analysis.cost import structure_cost
from ntk_analysis.experiment import Experiment, Report
from ntk_analysis.isotropy import IsotropyReport, isotropy, limit_isotropy
from ntk_analysis.methods import STRUCTURES, find_structure
from ntk_analysis.results import (
    FILE_NAME,
    METHODS,
    Say,
    content_hash,
    environment,
    now,
    open_results,
    plain,
)
from ntk_analysis.sweep import Observe, SweepSettings, isotropy_sweep

COMMAND = "natgrad isotropy"
DEFAULT_VALUES: dict[str, tuple[Any, ...]] = {
    "width": (128, 256, 512, 1024),
    "depth": (2, 3, 4, 5, 6),
    "num_samples": (25, 50, 100, 200),
    "damping": (0.0, 1e-8, 1e-6, 1e-4, 1e-2, 1.0),
    "activation": ("relu", "leaky_relu", "gelu", "tanh", "erf"),
}
_NUMBERS = (
    "alpha",
    "theoretical_alpha",
    "condition_number",
    "deviation",
    "learning_rate",
)


@dataclass(frozen=True)
class IsotropySettings:
    """Settings of ``natgrad isotropy``.

    Attributes:
      sweep: what is varied, and what every point has in common.
      structures: names; all by default.
      kernels: "empirical", of one network a seed, or "analytic", of infinite width.

    Raises:
      ValueError: a setting is out of range, or settings contradict each other.
    """

    sweep: SweepSettings
    structures: tuple[str, ...] = tuple(STRUCTURES)
    kernels: Kernels = "empirical"

    def __post_init__(self) -> None:
        if self.kernels not in get_args(Kernels):
            raise ValueError(f"kernels must be empirical or analytic, got {self.kernels!r}")
        if self.kernels == "analytic" and self.sweep.variable == "width":
            raise ValueError("analytic kernels are those of infinite width: vary something else")
        names = tuple(dict.fromkeys(find_structure(name) for name in self.structures))
        if not names:
            raise ValueError("structures must name at least one")
        object.__setattr__(self, "structures", names)

    @property
    def rows(self) -> list[tuple[str, Any, int]]:
        """Structure, value and seed of every row, structure by structure."""
        return [
            (name, value, seed)
            for name in self.structures
            for value in self.sweep.values
            for seed in self.sweep.seeds
        ]

    def identifier(self, name: str, value: Any, seed: int) -> str:
        """The name of a row in results.json."""
        return f"{name}, {self.sweep.variable} {value}, seed {seed}"

    def is_shown(self, value: Any, seed: int) -> bool:
        """Whether spectra and costs are kept: those of the last value and the first seed are."""
        return value == self.sweep.values[-1] and seed == self.sweep.seeds[0]

    def fingerprint(self, versions: dict[str, str]) -> str:
        """SHA-256 of all that decides a row; structures, values and seeds do not."""
        ignored = ("values", "seeds", self.sweep.variable)
        common = {k: v for k, v in dataclasses.asdict(self.sweep).items() if k not in ignored}
        # data of files count, not only their name
        inputs = self.sweep.at(self.sweep.values[0]).inputs(0)
        # earlier rows have costs by formulas, and are not taken over
        return content_hash([plain([common, self.kernels, versions, "counted"]), inputs])


def run_isotropy(
    settings: IsotropySettings,
    out: Path,
    *,
    fresh: bool = False,
    report: Report = lambda what, done: None,
    say: Say = lambda sentence: None,
) -> Experiment:
    """Measures every row and writes results.json after each network.

    Args:
      settings: what to do.
      out: folder of results.json; rows that it holds for the same settings are not run again.
      fresh: run them again all the same.
      report: told about finished rows.
      say: told what becomes of earlier results that are not taken over.

    Raises:
      ValueError: data that are not to be had.
    """
    sweep = settings.sweep
    report("loading data", 0)
    versions = environment()
    fingerprint = settings.fingerprint(versions)
    results = open_results(out / FILE_NAME, COMMAND, METHODS, fingerprint, say, fresh=fresh)
    records = results.records
    document = {
        "command": COMMAND,
        "date": now(),
        "settings": dataclasses.asdict(sweep),
        "structures": list(settings.structures),
        "kernels": settings.kernels,
        "fingerprint": fingerprint,
        "environment": versions,
    }
    wanted = [settings.identifier(*row) for row in settings.rows]
    resumed = tuple(
        settings.identifier(*row) for row in settings.rows if _is_done(settings, records, row)
    )
    report("resuming" if resumed else "preparing", len(resumed))
    for seed in sweep.seeds:
        for values in _together(sweep):
            missing = [
                (name, value)
                for name in settings.structures
                for value in values
                if not _is_done(settings, records, (name, value, seed))
            ]
            if not missing:
                continue
            names = tuple(dict.fromkeys(name for name, _ in missing))
            remaining = tuple(dict.fromkeys(value for _, value in missing))
            part = dataclasses.replace(sweep, values=remaining, seeds=(seed,))
            for row in _measure(settings, part, names, report):
                key = settings.identifier(row["structure"], row[sweep.variable], seed)
                records[key] = plain(row)
            results.write(document)
    results.write(document)
    return Experiment(document, tuple(wanted), resumed)


def _is_done(
    settings: IsotropySettings, records: dict[str, Any], row: tuple[str, Any, int]
) -> bool:
    """Whether a row is there, with its spectrum where that is wanted."""
    found = records.get(settings.identifier(*row))
    return found is not None and (not settings.is_shown(*row[1:]) or "eigenvalues" in found)


def _together(sweep: SweepSettings) -> list[tuple[Any, ...]]:
    """Values that share a network."""
    return [sweep.values] if sweep.variable == "damping" else [(v,) for v in sweep.values]


def _measure(
    settings: IsotropySettings, part: SweepSettings, names: tuple[str, ...], report: Report
) -> Iterator[dict[str, Any]]:
    """The rows of some structures on one network, as JSON has them."""
    structures = {name: STRUCTURES[name] for name in names}
    spectra: dict[tuple[str, Any], list[float]] = {}

    def keep(name: str, value: Any, found: IsotropyReport) -> None:
        spectra[name, value] = found.eigenvalues.tolist()

    if settings.kernels == "analytic":
        rows = _analytic_rows(part, structures, report, keep)
    else:
        table = isotropy_sweep(structures, part, report=report, observe=keep)
        rows = [{str(key): entry for key, entry in row.items()} for row in table.to_dict("records")]
    shown = [value for value in part.values if settings.is_shown(value, part.seeds[0])]
    costs = _costs(part.at(shown[0]), structures) if shown else {}
    for row in rows:
        name, value = row["structure"], row[part.variable]
        row["class"] = structures[name].name
        if value in shown:
            row["eigenvalues"] = spectra.get((name, value))
            row["cost"] = costs.get(name) if settings.kernels == "empirical" else None
        yield row


def _costs(point: SweepSettings, structures: dict[str, Structure]) -> dict[str, dict[str, Any]]:
    """The cost of a step of a fully connected network of this size, by structure."""
    if point.network != "mlp":
        return {}
    seed = point.seeds[0]
    x = point.inputs(seed)
    geometry = model_geometry(point.model(x.shape[1:], seed), len(x))
    costs = {}
    for name, structure in structures.items():
        damped = point.damping_of(structure) != 0
        try:
            cost = structure_cost(structure, geometry, damped=damped)
        except TypeError:
            # the structure does not tell its entries
            continue
        costs[name] = dataclasses.asdict(cost) | {"fraction_of_exact": cost.fraction_of_exact}
    return costs


def _analytic_rows(
    part: SweepSettings, structures: dict[str, Structure], report: Report, observe: Observe
) -> list[dict[str, Any]]:
    rows = []
    for value in part.values:
        limit = _Limit(part.at(value))
        for name, structure in structures.items():
            report(f"{part.variable} {value}: {name}", 0)
            row = {"structure": name, part.variable: value, "seed": part.seeds[0]}
            numbers = dict.fromkeys(_NUMBERS, math.nan)
            conditions, failure = "", ""
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", SingularCouplingWarning)
                    found = limit.report(structure)
                observe(name, value, found)
                numbers = {key: getattr(found, key) for key in _NUMBERS}
                conditions = "; ".join(found.failed_conditions)
            except (ValueError, np.linalg.LinAlgError) as error:
                failure = str(error)
            rows.append(row | numbers | {"failed_conditions": conditions, "failure": failure})
            report(f"{part.variable} {value}: {name}", 1)
    return rows


class _Limit:
    """A network of infinite width on its data; structures share its kernels."""

    def __init__(self, point: SweepSettings) -> None:
        self._point = point
        self._x = point.inputs(point.seeds[0])
        self._model = point.model(self._x.shape[1:], point.seeds[0])
        self._signals: dict[tuple[str, ...], Signals] = {}

    def report(self, structure: Structure) -> IsotropyReport:
        """As ``isotropy`` with analytic kernels."""
        damping = self._point.damping_of(structure)
        parts = structure.limit_kernels
        if structure.infinite_width != "all":
            return isotropy(structure, self._model, self._x, damping, kernels="analytic")
        if parts not in self._signals:
            self._signals[parts], _ = analytic_signals(structure, self._model, self._x, None)
        return limit_isotropy(structure, self._model, self._signals[parts], damping)
