"""Which trials make a leaderboard: tuning first, then every contestant on the same seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from benchmarks.leaderboard.contestant import Contestant, Ruleset, contestants, find_contestant
from benchmarks.leaderboard.identity import identity, sources
from benchmarks.leaderboard.records import Record
from benchmarks.leaderboard.studies import (
    STUDIES,
    TUNING_SEED,
    Space,
    is_tuning,
    rates,
    study_of,
    tuning_seed,
)
from benchmarks.leaderboard.targets import target_of
from benchmarks.leaderboard.trial import Config, configuration
from benchmarks.leaderboard.versions import by_rules, counts
from benchmarks.leaderboard.workload import find_workload, workloads
from benchmarks.leaderboard.workloads import diagnosis
from ntk_analysis.names import find

_DIGITS = (
    "digits-fit", "digits-mse", "digits-classes", "linear-teacher", "sparse-classification",
    "matrix-completion",
)  # fmt: skip
_LARGE = (
    "mnist-fit", "mnist-mse", "mnist-classes", "mnist-autoencoder", "linear-teacher-long",
)  # fmt: skip
_NETWORKS = ("digits-conv", "cifar-conv", "cifar-residual", "cifar-transformer")
_TRAINING = (
    "poisson-2d", "heat", "poisson-5d", "language-bytes", "digits-rows", "mnist-classes",
    "cifar-conv", "linear-teacher-long",
)  # fmt: skip
_DIAGNOSIS = tuple(workload.name for workload in diagnosis.WORKLOADS)
_BASELINES = ("first-order", "quasi-Newton")


@dataclass(frozen=True)
class Profile:
    """A board of a certain size.

    Attributes:
      workloads: their names.
      variants: endings of the contestants that take part; "" is the plain one of a structure.
        Those of others always do.
      seeds: number of evaluation seeds.
      description: for whom it is.
    """

    workloads: tuple[str, ...]
    variants: tuple[str, ...]
    seeds: int
    description: str


PROFILES = {
    "default": Profile(
        _DIGITS, ("", "-mc-lm"), 3, "digits-size workloads, about 15 minutes on 2 cores"
    ),
    "large": Profile(
        _LARGE, ("", "-mc-lm"), 3, "the MNIST workloads and the linear teacher to its end"
    ),
    "networks": Profile(
        _NETWORKS,
        ("-mc-lm", "-mc-tuned", "-average", "-momentum", "-cosine", "-spring"),
        3,
        "convolutional nets and a transformer in mini-batches; CIFAR-10 from files, hours",
    ),
    "training": Profile(
        _TRAINING,
        ("-mc-lm", "-quadratic", "-cosine", "-spring", "-fixed"),
        3,
        "equations, text, recurrent and image nets: where should curvature win, and does it?",
    ),
    "diagnosis": Profile(
        _DIAGNOSIS, ("", "-mc-lm"), 3, "one difficulty each, with known targets: who passes?"
    ),
    "full": Profile(
        tuple(dict.fromkeys((*_DIGITS, *_LARGE, *_NETWORKS, *_TRAINING))),
        (
            "",
            "-lm",
            "-tuned",
            "-mc",
            "-mc-lm",
            "-mc-tuned",
            "-average",
            "-momentum",
            "-cosine",
            "-spring",
            "-fixed",
            "-quadratic",
        ),
        5,
        "every workload and every contestant",
    ),
}


@dataclass(frozen=True)
class Plan:
    """A leaderboard to be made.

    Attributes:
      workloads: their names.
      contestants: their names.
      seeds: number of evaluation seeds, 0, 1, ...
      machine: code and environment of the processes that will run it; None for this one's.
    """

    workloads: tuple[str, ...]
    contestants: tuple[str, ...]
    seeds: int
    machine: Mapping[str, Any] | None = None

    def tuning(self) -> Iterator[Config]:
        """Trials of every tuned contestant, those of the studies that the seeds ask for.

        Raises:
          ValueError: a workload has no valid target.
        """
        for workload, contestant in self._pairs():
            target = _target(workload)
            if contestant.rate_rule == "tuned":
                for study in self._studies():
                    yield from study_configs(
                        workload, contestant, study, target, machine=self.machine
                    )

    def evaluation(self, records: Iterable[Mapping[str, Any]]) -> Iterator[Config]:
        """Trials that count, given what tuning found.

        Args:
          records: of the store, the tuning trials of this code and machine among them.
        """
        tuned = _by_pair(records, "tuning")
        for workload, contestant in self._pairs():
            target = _target(workload)
            found: dict[int, float] = {}
            if contestant.rate_rule == "tuned":
                trials = tuned.get((workload, contestant.name), [])
                space = contestant.space(find_workload(workload))
                own = [t for t in trials if t["config"]["sources"] == sources(contestant)]
                found = {
                    study: best_rate(space, study, own, target, self.machine)
                    for study in self._studies()
                }
            for seed in range(self.seeds):
                yield configuration(
                    find_workload(workload), contestant.name, seed,
                    target=target, role="evaluation", learning_rate=found.get(study_of(seed)),
                    machine=self.machine,
                )  # fmt: skip

    def structures(self) -> Iterator[Config]:
        """Untimed trials: isotropy and cost of each structure, once a workload."""
        for workload in self.workloads:
            seen = set()
            for name in self.contestants:
                structure = type(find_contestant(name).structure)
                if structure is type(None) or structure in seen:
                    continue
                seen.add(structure)
                yield configuration(
                    find_workload(workload), name, 0,
                    target=None, role="structure", kind="structure", machine=self.machine,
                )  # fmt: skip

    def _studies(self) -> list[int]:
        return sorted({study_of(seed) for seed in range(self.seeds)})

    def _pairs(self) -> Iterator[tuple[str, Contestant]]:
        for workload in self.workloads:
            for name in self.contestants:
                yield workload, find_contestant(name)


def make_plan(
    profile: str = "default",
    chosen_workloads: Sequence[str] | None = None,
    chosen_contestants: Sequence[str] | None = None,
    seeds: int | None = None,
    ruleset: str | None = None,
) -> Plan:
    """A plan by the name of a profile, with changes.

    Args:
      profile: a key of ``PROFILES``.
      chosen_workloads: instead of those of the profile.
      chosen_contestants: instead of those of the profile.
      seeds: instead of their number in the profile.
      ruleset: "tuned" or "self-tuning", of which alone contestants take part; None for both.

    Raises:
      ValueError: an unknown name (the nearest is offered), less than one seed, or a workload
        without a valid target.
    """
    base = PROFILES[find("profile", profile, PROFILES)]
    if seeds is not None:
        check_seeds(seeds)
    names = [find("workload", name, workloads()) for name in chosen_workloads or base.workloads]
    if chosen_contestants:
        members = [find("contestant", name, contestants()) for name in chosen_contestants]
    else:
        members = [name for name, entry in contestants().items() if _takes_part(entry, base)]
    if ruleset is not None:
        wanted = find("ruleset", ruleset, get_args(Ruleset))
        members = [name for name in members if find_contestant(name).ruleset == wanted]
    for name in names:
        _target(name)
    return Plan(tuple(dict.fromkeys(names)), tuple(dict.fromkeys(members)), seeds or base.seeds)


def check_seeds(seeds: int) -> None:
    """Raises ValueError on a number of seeds that is none, or that would reach that of tuning."""
    if not 1 <= seeds <= TUNING_SEED:
        raise ValueError(
            f"seeds must be at least 1, and at most {TUNING_SEED}, from which tuning has its own, "
            f"got {seeds}"
        )


def extended(
    records: list[Record], members: Sequence[str], chosen: Sequence[str] | None = None
) -> Plan:
    """A plan of some contestants on the workloads and seeds of a board that is there.

    Args:
      records: of the board; those of earlier rules, and of workloads that are no longer here, are
        left aside.
      members: names of contestants.
      chosen: workloads instead of those of the board.

    Raises:
      ValueError: as ``make_plan``.
    """
    known = workloads()
    counted = [
        record["config"] for record in by_rules(records)[0]
        if counts(record) and record["config"]["workload"] in known
    ]  # fmt: skip
    where = list(dict.fromkeys(sorted(config["workload"] for config in counted)))
    seeds = max((config["seed"] + 1 for config in counted), default=None)
    return make_plan("default", chosen or where or None, members, seeds)


def _takes_part(contestant: Contestant, profile: Profile) -> bool:
    ending = contestant.name[len(plain(contestant.name)) :]
    return ending in profile.variants or (contestant.structure is None and not ending)


def plain(name: str) -> str:
    """The name of a contestant without the ending of its variant."""
    endings = sorted(PROFILES["full"].variants, key=len, reverse=True)
    return next(name.removesuffix(end) for end in endings if name.endswith(end))


def _target(workload: str) -> float:
    return float(target_of(find_workload(workload))["target"])


def study_configs(
    workload: str,
    contestant: Contestant,
    study: int,
    target: float | None,
    role: str = "tuning",
    machine: Mapping[str, Any] | None = None,
) -> Iterator[Config]:
    """One trial for each learning rate of a contestant's study, in their order."""
    where = find_workload(workload)
    for rate in rates(contestant.space(where), study):
        yield configuration(
            where, contestant.name, tuning_seed(study),
            target=target, role=role, learning_rate=rate, machine=machine,
        )  # fmt: skip


def freezing_configs(workload: str, contestant: Contestant) -> Iterator[Config]:
    """The trials of a baseline by which a target is set: of all its studies, without a target."""
    if contestant.rate_rule == "tuned":
        for study in range(STUDIES):
            yield from study_configs(workload, contestant, study, None, "freezing")
    else:
        yield configuration(
            find_workload(workload), contestant.name, TUNING_SEED, target=None, role="freezing"
        )


def _by_pair(
    records: Iterable[Mapping[str, Any]], role: str
) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for record in records:
        config = record["config"]
        if config["role"] == role:
            found.setdefault((config["workload"], config["contestant"]), []).append(record)
    return found


def best_rate(
    space: Space,
    study: int,
    trials: Iterable[Mapping[str, Any]],
    target: float | None,
    machine: Mapping[str, Any] | None = None,
) -> float:
    """The learning rate that a study found: fewest steps to the target, else the best end.

    Steps, not seconds: every step of a contestant costs the same, and steps do not depend on what
    else the machine does.

    Args:
      space: of the contestant's learning rates.
      study: its number.
      trials: the contestant's tuning records; those of other studies, code, machines or targets
        are left aside.
      target: that they aim at.
      machine: code and environment of the trials to take; None for this process's.
    """
    wanted = {**(machine or identity()), "seed": tuning_seed(study)}
    outcomes = {
        trial["config"]["learning_rate"]: trial["outcome"]
        for trial in trials
        if trial["config"]["target"] == target and _is_of(trial["config"], wanted)
    }

    def merit(rate: float) -> tuple[float, float]:
        outcome = outcomes.get(rate, {})
        steps, final = outcome.get("steps_to_target"), outcome.get("final")
        lost = outcome.get("status") not in ("reached", "missed")
        return (
            math.inf if steps is None else steps,
            math.inf if lost or final is None else final,
        )

    # min takes the first of equals, the smallest rate: also where all of them diverged
    return min(rates(space, study), key=merit)


def _is_of(config: Mapping[str, Any], machine: Mapping[str, Any]) -> bool:
    return all(config[name] == value for name, value in machine.items())


def baselines(chosen: Sequence[str] | None = None) -> list[Contestant]:
    """The contestants by which targets are set, at their best learning rates.

    Args:
      chosen: names of some of them; None for all.

    Raises:
      ValueError: a name of no baseline.
    """
    known = [
        entry for entry in contestants().values()
        if entry.family in _BASELINES and entry.rate_rule != "fixed"
    ]  # fmt: skip
    if not chosen:
        return known
    by_name = {entry.name: entry for entry in known}
    return [by_name[find("baseline", name, by_name)] for name in chosen]


def best_baseline(
    workload: str, records: Iterable[Mapping[str, Any]], tried: Iterable[Contestant]
) -> tuple[Contestant, float | None]:
    """The baseline with the best held-out metric at the end of its budget, and its learning rate.

    Args:
      workload: its name.
      tried: baselines to choose from.
      records: of the store, with "freezing" trials without a target on the seeds of the studies.

    Raises:
      ValueError: none of them came to the end of its budget.
    """
    best: tuple[float, str, float | None] | None = None
    names = {entry.name for entry in tried}
    for (where, name), trials in _by_pair(records, "freezing").items():
        if where != workload or name not in names:
            continue
        here = {**identity(), "sources": sources(find_contestant(name))}
        for trial in trials:
            config, final = trial["config"], trial["outcome"].get("final")
            if not (_is_of(config, here) and is_tuning(config["seed"])):
                continue
            if trial["outcome"]["status"] == "missed" and final is not None:
                entry = (final, name, config["learning_rate"])
                best = entry if best is None or entry[0] < best[0] else best
    if best is None:
        raise ValueError(f"{workload}: no baseline came to the end of its budget")
    return find_contestant(best[1]), best[2]
