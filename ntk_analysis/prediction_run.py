"""The run of ``natgrad predict``: where training ends with every structure, on test data."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import natgrad_datasets
import numpy as np
from natgrad_datasets import Dataset, DatasetError

from natgrad_flax import MLP, Signals, SingularCouplingWarning, Structure
from natgrad_flax.arguments.scalars import check_integer, check_number, check_seed, keep_plain
from natgrad_flax.models.activations import get_activation
from ntk_analysis.analytic import Progress, analytic_kernels
from ntk_analysis.analytic_signals import check_limit
from ntk_analysis.coefficient import Kernels, analytic_signals
from ntk_analysis.dynamics import squared_losses
from ntk_analysis.empirical import Matrix
from ntk_analysis.experiment import Experiment, Report, describe_data
from ntk_analysis.methods import STRUCTURES, Method, find_structure, select_methods
from ntk_analysis.networks import build_network, check_damping_size, check_variances
from ntk_analysis.prediction import (
    Prediction,
    predict,
    predict_from_signals,
    prediction_matrix,
    propagated,
)
from ntk_analysis.prior import initial_outputs, prior_variances
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
from ntk_analysis.settings import data_arrays, find_dataset

COMMAND = "natgrad predict"
WITH_LIMIT = tuple(name for name, s in STRUCTURES.items() if s.infinite_width == "all")
"""Structures that have analytic kernels between training and test inputs."""
DEFAULT_STRUCTURES = tuple(name for name in WITH_LIMIT if STRUCTURES[name].takes_damping)
"""Those of a Fisher: gradient descent ends where the exact natural gradient does."""
_NUM_SAMPLES = {"digits": (1437, 360)}
_INITIALISATIONS = 10
# directions that images hardly use have no Forster transform, or one that magnifies their noise
_RANK_TOLERANCES = (3e-2, 1e-1)
_FORSTER_TOLERANCE = 1e-3
_FORSTER_ITERATIONS = 100


@dataclass(frozen=True)
class PredictionSettings:
    """Settings of ``natgrad predict``; smaller than Karakida & Osawa (2020), Fig. 2.

    Attributes:
      dataset: a name of ``natgrad_datasets``; MNIST where it is on this machine, else digits.
      classes: class ids; None means all of them.
      num_train: N; 1000 by default, all 1437 for digits.
      num_test: N'; 1000 by default, all 360 for digits.
      widths: hidden widths, of the networks that initialisations are drawn from and of empirical
        kernels.
      activation: of the hidden layers.
      weight_variance: sigma_w^2.
      bias_variance: sigma_b^2; 0 means no biases.
      structures: names; ``DEFAULT_STRUCTURES`` unless given.
      damping: rho in the 1/N convention for every structure but gradient descent, or None.
      ridge: lambda of ``predict``.
      kernels: "analytic" or "empirical".
      initialisations: how many f_0 to draw; 10 by default, none with empirical kernels.
      covariance: "none" or "variance", over initialisations.
      seed: of the initial parameters, and of "gaussian".
      forster: whether the inputs of K-FAC go through a Forster transform where their rank is below
        N. Without one it converges all the same, but not at one rate for all samples.
      rank_tolerance: of the Forster transform: singular values below this share of the largest are
        cut off before. By default 0.03, or 0.1 where the iteration does not converge with that.

    Raises:
      ValueError: a setting is out of range, or settings contradict each other.
    """

    dataset: str | None = None
    classes: tuple[int, ...] | None = None
    num_train: int | None = None
    num_test: int | None = None
    widths: tuple[int, ...] = (2048, 2048)
    activation: str = "relu"
    weight_variance: float = 2.0
    bias_variance: float = 0.0
    structures: tuple[str, ...] = DEFAULT_STRUCTURES
    damping: float | None = None
    ridge: float = 0.0
    kernels: Kernels = "analytic"
    initialisations: int | None = None
    covariance: str = "none"
    seed: int = 0
    forster: bool = False
    rank_tolerance: float | None = None

    def __post_init__(self) -> None:
        dataset = find_dataset(self.dataset)
        if self.kernels not in get_args(Kernels):
            raise ValueError(f"kernels must be analytic or empirical, got {self.kernels!r}")
        if self.covariance not in ("none", "variance"):
            raise ValueError(f"covariance must be none or variance, got {self.covariance!r}")
        analytic = self.kernels == "analytic"
        if not analytic and (self.initialisations or self.covariance != "none"):
            raise ValueError(
                "empirical kernels belong to one initialisation: initialisations and covariance "
                "need kernels analytic"
            )
        samples = _NUM_SAMPLES.get(dataset, (1000, 1000))
        draws = _INITIALISATIONS if analytic else 0
        names = tuple(dict.fromkeys(find_structure(name) for name in self.structures))
        for name, value in (
            ("dataset", dataset),
            ("num_train", samples[0] if self.num_train is None else self.num_train),
            ("num_test", samples[1] if self.num_test is None else self.num_test),
            ("initialisations", draws if self.initialisations is None else self.initialisations),
            ("structures", names),
        ):
            object.__setattr__(self, name, value)
        if not self.structures:
            raise ValueError("structures must name at least one")
        check_integer("num_train", self.num_train, 1)
        check_integer("num_test", self.num_test, 1)
        check_integer("initialisations", self.initialisations, 0)
        check_seed(self.seed, draws=max(1, int(self.initialisations or 0)))
        if not self.widths:
            raise ValueError("widths must name at least one hidden layer")
        for width in self.widths:
            check_integer("every hidden width", width, 1)
        get_activation(self.activation)
        check_variances(self.weight_variance, self.bias_variance)
        check_damping_size("ridge", self.ridge)
        if self.damping is not None:
            check_damping_size("damping", self.damping, int(self.num_train or 0))
        if self.rank_tolerance is not None:
            check_number("rank_tolerance", self.rank_tolerance, positive=False)
            if self.rank_tolerance >= 1:
                raise ValueError(f"rank_tolerance must be below 1, got {self.rank_tolerance!r}")
        keep_plain(self)
        for method in self.methods():
            if analytic:
                check_limit(method.structure, True, method.damping)

    def methods(self) -> tuple[Method, ...]:
        """The structures with their dampings, in the order of tables and figures."""
        return select_methods(self.structures, 1.0, self.damping)

    def load_data(self) -> Dataset:
        """The data in float64: standardised, then unit norm; two classes +-0.5, more one-hot.

        Raises:
          ValueError: the data set cannot be given as asked.
        """
        return natgrad_datasets.load(
            str(self.dataset),
            classes=self.classes,
            num_train=self.num_train,
            num_test=self.num_test,
            seed=self.seed,
            dtype="float64",
        )

    def model(self, data: Dataset) -> MLP:
        """The network."""
        network = build_network(
            "mlp",
            (data.input_dim,),
            self.widths,
            data.output_dim,
            activation=self.activation,
            weight_variance=self.weight_variance,
            bias_variance=self.bias_variance,
            seed=self.seed,
        )
        assert isinstance(network, MLP)
        return network

    def fingerprint(self, data: Dataset, versions: dict[str, str]) -> str:
        """SHA-256 of all that decides a result; which structures are asked for does not."""
        values = {k: v for k, v in plain(asdict(self)).items() if k != "structures"}
        return content_hash([values, versions, *data_arrays(data)])


def run_prediction(
    settings: PredictionSettings,
    out: Path,
    *,
    fresh: bool = False,
    store: Path | None = None,
    report: Report = lambda what, done: None,
    say: Say = lambda sentence: None,
    blocks: Progress | None = None,
) -> Experiment:
    """Predicts with every structure and writes results.json after each.

    Args:
      settings: what to do.
      out: folder of results.json; structures that it holds for the same settings are not run again.
      fresh: run them again all the same.
      store: see ``analytic_kernels``.
      report: told about finished structures.
      say: told what becomes of earlier results that are not taken over.
      blocks: told about finished blocks of kernels.

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
        "settings": asdict(settings),
        "fingerprint": fingerprint,
        "environment": versions,
        "data": describe_data(data),
        "loss": "mean squared error, 1/(2N') sum |y - f|^2",
    }
    resumed = tuple(m.name for m in methods if m.name in records)
    report("resuming" if resumed else "preparing", len(resumed))
    laboratory = _Laboratory(settings, data, store, blocks)
    for method in methods:
        if method.name in records:
            continue
        report(method.name, 0)
        records[method.name] = plain(laboratory.run(method))
        results.write(document)
        report(method.name, 1)
    results.write(document)
    return Experiment(document, tuple(m.name for m in methods), resumed)


def kfac_data(data: Dataset, rank_tolerance: float | None = None) -> tuple[Dataset, str]:
    """The data as K-FAC takes them, and a sentence on what was done, "" where nothing.

    Where the training inputs have a rank r below N, K-FAC is isotropic only after a Forster
    transform (Karakida & Osawa 2020, Section 4.2). Images have none before directions that they
    hardly use are cut off.

    Args:
      data: flat inputs.
      rank_tolerance: as in ``PredictionSettings``.

    Raises:
      ValueError: there is no transform with this cut.
    """
    rank = int(np.linalg.matrix_rank(data.x_train))
    if rank >= data.num_train:
        return data, ""
    cuts = _RANK_TOLERANCES if rank_tolerance is None else (rank_tolerance,)
    for cut in cuts:
        try:
            fitted = natgrad_datasets.forster_transform(
                data.x_train,
                data.x_test,
                tolerance=_FORSTER_TOLERANCE,
                max_iterations=_FORSTER_ITERATIONS,
                rank_tolerance=cut,
            )
        except DatasetError as error:
            failure = error
            continue
        assert fitted.x_test is not None
        note = (
            f"the inputs have rank {rank} < N = {data.num_train}, so they went through a Forster "
            f"transform to {fitted.rank} dimensions; {rank - fitted.rank} with singular values "
            f"below {cut:g} of the largest were cut off"
        )
        return replace(data, x_train=fitted.x_train, x_test=fitted.x_test), note
    raise ValueError(f"kfac: {failure}; use a larger rank_tolerance, or no transform") from failure


class _Laboratory:
    """The data, and what structures in a row share; transformed inputs are not shared."""

    def __init__(
        self,
        settings: PredictionSettings,
        data: Dataset,
        store: Path | None,
        blocks: Callable[[int, int], object] | None,
    ) -> None:
        self._settings, self._data = settings, data
        self._options: dict[str, Any] = {"store": store, "progress": blocks}
        # of the last key only: kernels of different structures together may not fit in memory
        self._shared: dict[str, tuple[object, Any]] = {}

    def run(self, method: Method) -> dict[str, Any]:
        structure, data, note = method.structure, self._data, ""
        transformed = structure.after_forster() if self._settings.forster else None
        if transformed is not None:
            structure = transformed
            data, note = kfac_data(data, self._settings.rank_tolerance)
        with warnings.catch_warnings():
            # at zero damping the structure is isotropic all the same
            warnings.simplefilter("ignore", SingularCouplingWarning)
            try:
                found = self._predict(structure, method, data)
            except ValueError as error:
                raise ValueError(f"{method.name}: {error}") from None
        draws = [] if found.samples is None else found.sampled_accuracies(data.y_test).tolist()
        law = None if found.variance is None else found.expected_accuracy(data.y_test)
        return {
            "label": method.name,
            "structure": structure.name,
            "damping": method.damping_text,
            "accuracy": found.accuracy(data.y_test),
            "accuracies": draws,
            "expected_accuracy": law,
            "test_loss": float(squared_losses(found.mean[None], data.y_test)[0]),
            "mean_deviation": None
            if found.variance is None
            else float(np.mean(np.sqrt(np.maximum(found.variance, 0)))),
            "input_dim": data.input_dim,
            "notes": [note] if note else [],
            "date": now(),
        }

    def _predict(self, structure: Structure, method: Method, data: Dataset) -> Prediction:
        settings, model = self._settings, self._settings.model(data)
        targets = np.asarray(data.y_train, np.float64)
        if settings.kernels == "empirical":
            return predict(
                structure, model, data.x_train, targets, data.x_test,
                damping=method.damping, ridge=settings.ridge, kernels="empirical",
            )  # fmt: skip
        train, test = self._signals(structure, model, data)
        rules: dict[str, Any] = {"damping": method.damping, "ridge": settings.ridge}
        found = predict_from_signals(
            structure, train, test, targets, initial=self._initial(structure, model, data), **rules
        )
        if settings.covariance == "none":
            return found
        matrix = prediction_matrix(structure, train, test, **rules)
        return replace(found, variance=propagated(matrix, *self._prior(structure, model, data)))

    def _signals(self, structure: Structure, model: MLP, data: Dataset) -> tuple[Signals, Signals]:
        def make() -> tuple[Signals, Signals | None]:
            return analytic_signals(structure, model, data.x_train, data.x_test, **self._options)

        train, test = self._share("signals", (structure.limit_kernels, data is self._data), make)
        return train, test

    def _initial(self, structure: Structure, model: MLP, data: Dataset) -> Matrix | None:
        seed, count = self._settings.seed, self._settings.initialisations
        if not count:
            return None
        everything = np.concatenate([data.x_train, data.x_test])

        def make() -> Matrix:
            return initial_outputs(model, everything, range(seed, seed + count))

        drawn: Matrix = self._share("initial", data is self._data, make)
        return drawn

    def _prior(
        self, structure: Structure, model: MLP, data: Dataset
    ) -> tuple[Matrix, Matrix, Matrix]:
        def make() -> tuple[Matrix, Matrix, Matrix]:
            inner, cross = (
                analytic_kernels(model, first, second, parts=("nngp",), **self._options).nngp
                for first, second in ((data.x_train, None), (data.x_test, data.x_train))
            )
            test_inputs = np.asarray(data.x_test, np.float64)
            return inner, cross, prior_variances(model, test_inputs)

        kernels: tuple[Matrix, Matrix, Matrix] = self._share("prior", data is self._data, make)
        return kernels

    def _share(self, what: str, key: object, make: Callable[[], Any]) -> Any:
        if what not in self._shared or self._shared[what][0] != key:
            self._shared.pop(what, None)
            self._shared[what] = key, make()
        return self._shared[what][1]
