"""What a report is asked to show, with sizes that two cores finish in minutes."""

from __future__ import annotations

from dataclasses import dataclass

from ntk_analysis.isotropy_run import IsotropySettings
from ntk_analysis.methods import STRUCTURES
from ntk_analysis.prediction_run import PredictionSettings
from ntk_analysis.settings import DynamicsSettings
from ntk_analysis.sweep import SweepSettings

_WIDTHS = (128, 256, 512, 1024)
_SEEDS = 2
_FINITE_WIDTHS = (256, 256)
# classes that are hard to tell apart, or all structures would be right nearly everywhere
_HARD_PAIRS: dict[str, tuple[int, int]] = {
    "mnist": (4, 9),
    "digits": (3, 8),
    "fashion_mnist": (2, 4),
    "cifar10": (3, 5),
}
_FINITE_SAMPLES = {"digits": (40, 70)}


@dataclass(frozen=True)
class ReportSettings:
    """The settings of all parts.

    Attributes:
      training: of the networks that are trained beside theory; the verdict is about these, so
        every structure is among them, and the hidden widths are equal.
      sweep: of the isotropy against the width, the spectra and the costs.
      limit: of test accuracies at infinite width.
      finite: of test accuracies at finite width, one entry a seed.
      checks: identifiers to run; None means those that take seconds.

    Raises:
      ValueError: hidden widths that differ.
    """

    training: DynamicsSettings
    sweep: IsotropySettings
    limit: PredictionSettings
    finite: tuple[PredictionSettings, ...]
    checks: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        widths = self.training.widths
        assert widths is not None
        if len(set(widths)) > 1:
            raise ValueError(f"a report needs hidden widths that are equal, got {widths}")

    @classmethod
    def standard(cls, dataset: str | None = None, seed: int = 0) -> ReportSettings:
        """The settings of ``natgrad report``.

        Args:
          dataset: a name of ``natgrad_datasets``; MNIST where it is on this machine, else digits.
          seed: of the parameters of the trained networks, and the first of several elsewhere.

        Raises:
          ValueError: an unknown data set or a bad seed.
        """
        training = DynamicsSettings(dataset=dataset, seed=seed)
        name = str(training.dataset)
        seeds = tuple(range(seed, seed + _SEEDS))
        num_train, num_test = _FINITE_SAMPLES.get(name, (100, 1000))
        finite = tuple(
            PredictionSettings(
                dataset=name,
                classes=_HARD_PAIRS.get(name),
                num_train=num_train,
                num_test=num_test,
                widths=_FINITE_WIDTHS,
                structures=tuple(STRUCTURES),
                kernels="empirical",
                seed=s,
            )
            for s in seeds
        )
        return cls(
            training,
            IsotropySettings(SweepSettings("width", _WIDTHS, seeds)),
            PredictionSettings(dataset=name, seed=seed),
            finite,
        )

    @property
    def network(self) -> IsotropySettings:
        """The isotropy of the network that is trained, at initialisation and zero damping."""
        training = self.training
        assert training.widths is not None
        sweep = SweepSettings(
            "width",
            training.widths[:1],
            (training.seed,),
            network=training.network,
            depth=len(training.widths) + 1,
            num_samples=int(training.num_train or 0),
            activation=training.activation,
            weight_variance=training.weight_variance,
            bias_variance=training.bias_variance,
            dataset=str(training.dataset),
            classes=training.classes,
        )
        names = tuple(dict.fromkeys(method.name for method in training.methods()))
        return IsotropySettings(sweep, names)
