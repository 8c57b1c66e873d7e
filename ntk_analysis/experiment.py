"""The main job: train a network with every structure, beside what its initial kernels predict."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from natgrad_datasets import Dataset

from natgrad_flax import SingularCouplingWarning, Structure
from ntk_analysis.coefficient import Damping, coefficient_pair
from ntk_analysis.dynamics import linearised_dynamics, squared_losses
from ntk_analysis.empirical import InitialSignals, Matrix, initial_signals
from ntk_analysis.methods import Method, spectrum, theoretical_learning_rate
from ntk_analysis.networks import build_network
from ntk_analysis.resonance import ResonanceWarning, warn_of_resonance
from ntk_analysis.results import FILE_NAME, METHODS, Say, environment, now, open_results, plain
from ntk_analysis.settings import DynamicsSettings
from ntk_analysis.training import Trainer

COMMAND = "natgrad dynamics"
Report = Callable[[str, int], object]
"""Called with what is being done now, and how many units of work have been finished."""


@dataclass(frozen=True)
class Experiment:
    """Results of a run.

    Attributes:
      document: what results.json holds.
      selected: identifiers of the methods that this run was asked for, in order.
      resumed: those of them that an earlier run had finished.
    """

    document: dict[str, Any]
    selected: tuple[str, ...]
    resumed: tuple[str, ...]

    @property
    def records(self) -> list[dict[str, Any]]:
        """One record a method."""
        return [self.document["methods"][name] for name in self.selected]

    @property
    def failures(self) -> list[str]:
        """Methods whose losses ceased to be finite where theory says that they fall."""
        return [r["label"] for r in self.records if r["unexpected_divergence"]]


def work_units(settings: DynamicsSettings) -> int:
    """How many units of work ``run_dynamics`` reports in all."""
    return len(settings.methods()) * (settings.steps + 1)


def run_dynamics(
    settings: DynamicsSettings,
    out: Path,
    *,
    fresh: bool = False,
    report: Report = lambda what, done: None,
    say: Say = lambda sentence: None,
) -> Experiment:
    """Runs every method and writes results.json after each.

    Args:
      settings: what to do.
      out: folder of results.json; methods that it holds for the same settings are not run again.
      fresh: run them again all the same.
      report: told about the progress.
      say: told what becomes of earlier results that are not taken over.

    Returns:
      The results; figures and tables are made from them.

    Raises:
      ValueError: data that are not to be had, or a structure that does not suit the network.
    """
    methods = settings.methods()
    report("loading data", 0)
    data = settings.load_data()
    versions = environment()
    fingerprint = settings.fingerprint(data, versions)
    results = open_results(out / FILE_NAME, COMMAND, METHODS, fingerprint, say, fresh=fresh)
    records = results.records
    document = {
        "command": COMMAND,
        "date": now(),
        "settings": settings.as_dict(),
        "fingerprint": fingerprint,
        "environment": versions,
        "data": describe_data(data),
        "loss": "mean squared error, 1/(2N) sum |y - f|^2",
    }
    resumed = tuple(m.identifier for m in methods if m.identifier in records)
    report("resuming" if resumed else "preparing", len(resumed) * (settings.steps + 1))
    if len(resumed) < len(methods):
        laboratory = _Laboratory(settings, data)
        todo = [m for m in methods if m.identifier not in records]
        laboratory.check(todo)
        for method in todo:
            records[method.identifier] = plain(laboratory.run(method, report))
            results.write(document)
    results.write(document)
    return Experiment(document, tuple(m.identifier for m in methods), resumed)


class _Laboratory:
    """The network, its initial signals, and what methods of the same structure share."""

    def __init__(self, settings: DynamicsSettings, data: Dataset) -> None:
        self._settings, self._data = settings, data
        assert settings.widths is not None
        # float64 training starts from the same parameters: drawn in float32, then cast
        self._model = build_network(
            settings.network,
            data.x_train.shape[1:],
            settings.widths,
            data.output_dim,
            activation=settings.activation,
            weight_variance=settings.weight_variance,
            bias_variance=settings.bias_variance,
            seed=settings.seed,
        )
        self._signals: InitialSignals = initial_signals(self._model, data.x_train, data.x_test)
        self._coefficients: dict[tuple[Structure, Damping], tuple[Matrix, Matrix]] = {}
        self._trainers: dict[tuple[Structure, Damping], Trainer] = {}

    def check(self, methods: list[Method]) -> None:
        """Raises ValueError before any work where a structure does not suit the network."""
        with jax.enable_x64(True), warnings.catch_warnings():
            warnings.simplefilter("ignore", SingularCouplingWarning)
            for method in methods:
                try:
                    method.structure.check(self._signals.train, method.damping)
                except ValueError as error:
                    raise ValueError(f"{method.name}: {error}") from None

    def run(self, method: Method, report: Report) -> dict[str, Any]:
        """Theory and network of one method."""
        notes: list[str] = []
        data, steps = self._data, self._settings.steps
        with _noting(notes):
            report(f"{method.identifier}: theory", 0)
            train, test = self._coefficient(method)
            rate = theoretical_learning_rate(
                method, self._model, data.num_train, train, self._signals.train
            )
            targets = np.asarray(data.y_train, np.float64)
            theory = linearised_dynamics(
                train, test, self._signals.outputs, targets, rate.value, steps
            )
            report(f"{method.identifier}: compiling", 1)
            with self._precision():
                trainer = self._trainer(method)
                report(f"{method.identifier}: training", 0)
                run = trainer.run(
                    rate.value, steps, lambda: report(f"{method.identifier}: training", 1)
                )
        if rate.note:
            notes.append(rate.note)
        other = method.structure.without_biases
        if other and self._settings.bias_variance == 0:
            notes.append(f"without biases the {method.name} structure is the {other} one")
        predicted = theory.train_losses
        losses = squared_losses(run.outputs_train, data.y_train)
        lowest, largest = spectrum(train)
        return {
            "label": method.identifier,
            "structure": method.structure.name,
            "factor": method.factor,
            "learning_rate": rate.value,
            "learning_rate_rule": rate.rule,
            "damping": method.damping_text,
            "eigenvalues": {"min": lowest, "max": largest},
            "theory": {
                "train_loss": predicted.tolist(),
                "test_loss": theory.test_losses(data.y_test).tolist(),
            },
            "network": {
                "train_loss": losses.tolist(),
                "test_loss": squared_losses(run.outputs_test, data.y_test).tolist(),
            },
            "seconds_per_step": run.seconds_per_step,
            "compile_seconds": trainer.compile_seconds,
            "unexpected_divergence": bool(
                not np.isfinite(losses).all() and predicted[-1] <= predicted[0]
            ),
            "notes": notes,
            "date": now(),
        }

    def _coefficient(self, method: Method) -> tuple[Matrix, Matrix]:
        key = (method.structure, method.damping)
        if key not in self._coefficients:
            self._coefficients[key] = coefficient_pair(
                method.structure, self._signals, method.damping
            )
            warn_of_resonance(method.structure, self._signals.train, method.damping)
        return self._coefficients[key]

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self._settings.dtype == "float64":
            return jax.enable_x64(True)
        return contextlib.nullcontext()

    def _trainer(self, method: Method) -> Trainer:
        key = (method.structure, method.damping)
        if key not in self._trainers:
            data, dtype = self._data, jnp.dtype(self._settings.dtype)
            graphdef, state = nnx.split(self._model)
            model = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(dtype), state))
            x, y, x_test = (
                jnp.asarray(array, dtype) for array in (data.x_train, data.y_train, data.x_test)
            )
            self._trainers[key] = Trainer(model, method.structure, x, y, x_test, method.damping)
        return self._trainers[key]


@contextlib.contextmanager
def _noting(notes: list[str]) -> Iterator[None]:
    """Turns warnings about a coupling into notes; other warnings stay warnings."""
    coupling = (SingularCouplingWarning, ResonanceWarning)
    with warnings.catch_warnings(record=True) as caught:
        for category in coupling:
            warnings.simplefilter("always", category)
        yield
    for warning in caught:
        if not issubclass(warning.category, coupling):
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
        elif str(warning.message) not in notes:
            notes.append(str(warning.message))


def describe_data(data: Dataset) -> dict[str, Any]:
    """What results.json says of a data set."""
    return {
        "name": data.name,
        "classes": list(data.classes),
        "class_names": list(data.class_names),
        "num_train": data.num_train,
        "num_test": data.num_test,
        "input_dim": data.input_dim,
        "sample_shape": list(data.x_train.shape[1:]),
        "output_dim": data.output_dim,
        "notes": list(data.notes),
    }
