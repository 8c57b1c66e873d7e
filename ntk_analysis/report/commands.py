"""The exact command that repeats a part of the report."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Any

from ntk_analysis.isotropy_run import DEFAULT_VALUES, IsotropySettings
from ntk_analysis.prediction_run import DEFAULT_STRUCTURES, PredictionSettings
from ntk_analysis.settings import DynamicsSettings
from ntk_analysis.sweep import SweepSettings


def dynamics_command(settings: DynamicsSettings) -> str:
    """``natgrad dynamics`` with the settings that are not its defaults, and those of the machine.

    What defaults to data that are on the machine is always said: data set, classes, samples.
    """
    always = ("dataset", "classes", "num_train", "num_test", "widths", "seed")
    return _command("dynamics", settings, always, {})


def prediction_command(settings: PredictionSettings) -> str:
    """As ``dynamics_command``, for ``natgrad predict``."""
    always = ("dataset", "classes", "num_train", "num_test", "widths", "kernels", "seed")
    # empirical kernels belong to one initialisation, so that there is nothing to say
    draws = 0 if settings.kernels == "empirical" else None
    defaults = {"structures": DEFAULT_STRUCTURES, "initialisations": draws}
    return _command("predict", settings, always, defaults)


def isotropy_command(settings: IsotropySettings) -> str:
    """As ``dynamics_command``, for ``natgrad isotropy``."""
    sweep = settings.sweep
    words = ["natgrad", "isotropy", "--vary", sweep.variable]
    if sweep.values != DEFAULT_VALUES[sweep.variable]:
        words += ["--values", *map(str, sweep.values)]
    words += ["--seeds", *map(str, sweep.seeds), "--dataset", sweep.dataset]
    for field in dataclasses.fields(SweepSettings):
        value = getattr(sweep, field.name)
        said = ("variable", "values", "seeds", "dataset", sweep.variable)
        if field.name not in said and value != field.default and value is not None:
            words += _option(field.name, value)
    for field in dataclasses.fields(IsotropySettings):
        value = getattr(settings, field.name)
        if field.name != "sweep" and value != field.default:
            words += _option(field.name, value)
    return shlex.join(words)


def _command(name: str, settings: Any, always: tuple[str, ...], defaults: dict[str, Any]) -> str:
    """The command with every setting that is not its default.

    Args:
      name: of the command.
      settings: a dataclass whose fields are called as the options are.
      always: fields that are said even then, unless they are None.
      defaults: values that are not said, where they are not those of the field.
    """
    words = ["natgrad", name]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        default = defaults.get(field.name, field.default)
        if value is not None and (field.name in always or value != default):
            words += _option(field.name, value)
    return shlex.join(words)


def _option(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag] if value else []
    if isinstance(value, tuple):
        return [flag, *map(str, value)]
    return [flag, str(value)]
