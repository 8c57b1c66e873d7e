"""Records of trials that never ran, for tests of the board and the page."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from ntk_analysis.results import content_hash

CPU = {"device": "cpu: cpu", "processor": "Example CPU", "cores": "2"}
GPU = {"device": "gpu: Example GPU", "processor": "Example CPU", "cores": "16"}
VERSIONS = {
    "natgrad": "0.1.0", "jax": "0.10.2", "flax": "0.12.6", "optax": "0.2.5", "numpy": "2.3.0",
    "python": "3.11.7",
}  # fmt: skip
START = datetime(2026, 11, 1, tzinfo=UTC)

# structure, Fisher kind, damping, steps and seconds a step as multiples of SGD's
OURS = {
    "exact": ("Exact", 0.02, 1.2),
    "block-diagonal": ("BlockDiagonal", 0.022, 1.2),
    "block-tri-diagonal": ("BlockTriDiagonal", 0.025, 1.6),
    "kfac": ("KFAC", 0.03, 1.3),
    "unit-wise": ("UnitWise", 0.05, 2.4),
    "diagonal": ("Diagonal", 0.4, 1.5),
    "quasi-diagonal": ("QuasiDiagonal", 0.4, 2.0),
}
OTHERS = {
    "sgd": ("SGD", "first-order", 1.0, 1.0),
    "momentum": ("Momentum", "first-order", 0.4, 1.0),
    "adam": ("Adam", "first-order", 0.3, 1.1),
    "adamw": ("AdamW", "first-order", 0.31, 1.1),
    "muon": ("Muon", "first-order", 0.2, 1.8),
    "lbfgs": ("L-BFGS", "quasi-Newton", 0.1, 2.5),
    "kfac-jax": ("kfac-jax", "peer", 0.03, 1.6),
}
VARIANTS = {
    "": ("true", "0"),
    "-mc": ("Monte-Carlo, 1 sample", "1e-3, relative to the mean eigenvalue"),
    "-lm": ("true", "Levenberg-Marquardt, 1/N convention"),
    "-mc-lm": ("Monte-Carlo, 1 sample", "Levenberg-Marquardt, 1/N convention"),
}
WORKLOADS = {
    "digits-mse": ("Digits 0 against 7", 400, 4e-3),
    "digits-classes": ("Digits, ten classes", 900, 8e-3),
    "linear-teacher": ("Ill-conditioned deep linear teacher", 3000, 1.5e-3),
    "sparse-classification": ("Sparse classification", 1200, 2e-3),
    "matrix-completion": ("Matrix completion", 2000, 4e-3),
}
SMALL = ("sgd", "adam", "lbfgs", "exact", "kfac", "kfac-mc-lm", "diagonal")


def contestants() -> list[str]:
    """All names, variants included."""
    return [*OTHERS, *(name + variant for name in OURS for variant in VARIANTS)]


def facts(contestant: str, workload: str = "digits-mse") -> dict[str, str]:
    """What a record says of a contestant and its workload."""
    shared = {
        "workload_title": WORKLOADS.get(workload, (workload,))[0],
        "metric": "held-out mean squared error",
        "commit": "0a1b2c3d4e5f",
        "natgrad": "0.1.0",
        "submitter": "",
        "expectation": "",
        "expected": "",
        "why_target": "what Adam, tuned in 8 trials, reaches in 2000 steps; median of 3 seeds",
    }
    if contestant in OTHERS:
        title, family, *_ = OTHERS[contestant]
        return {
            "title": title, "family": family, "structure": "", "damping": "",
            "fisher": "true" if family == "peer" else "",
            "rate_rule": "line search" if contestant == "lbfgs" else "tuned, 8 trials",
            "ruleset": "self-tuning" if contestant == "lbfgs" else "tuned", **shared,
        }  # fmt: skip
    name = next(name for name in sorted(OURS, key=len, reverse=True) if contestant.startswith(name))
    fisher, damping = VARIANTS[contestant.removeprefix(name)]
    suffix = contestant.removeprefix(name).replace("-mc", ", Monte-Carlo").replace("-lm", ", LM")
    return {
        "title": name.replace("kfac", "K-FAC").replace("-", " " if name != "kfac" else "-")
        .capitalize().replace("K-fac", "K-FAC") + suffix,
        "family": "natural-gradient", "structure": OURS[name][0], "fisher": fisher,
        "damping": damping, "rate_rule": "theoretical", "ruleset": "self-tuning", **shared,
    }  # fmt: skip


def record(
    contestant: str = "kfac",
    workload: str = "digits-mse",
    seed: int = 0,
    *,
    seconds: float | None = 1.0,
    steps: int | None = 10,
    status: str | None = None,
    role: str = "evaluation",
    target: float | None = 0.01,
    learning_rate: float | None = None,
    code: str = "c0de",
    sources: str | None = None,
    environment: dict[str, str] | None = None,
    day: int = 0,
    compile_seconds: float = 0.0,
    preparation_seconds: float = 0.0,
    curve: dict[str, list[Any]] | None = None,
    workload_version: int = 1,
    rules: str = "1.0",
    **more: Any,
) -> dict[str, Any]:
    """One record; ``seconds`` None is a missed target, and ``more`` goes over facts and outcome."""
    structure = role == "structure"
    if status is None:
        status = "measured" if structure else "missed" if seconds is None else "reached"
    config = {
        "rules": rules, "kind": "structure" if structure else "timed", "role": role,
        "workload": workload, "workload_version": workload_version, "workload_digest": "d1gest",
        "target": target, "contestant": contestant, "learning_rate": learning_rate, "seed": seed,
        "code": code, "sources": sources or content_hash([contestant]),
        "environment": {**VERSIONS, **(environment or CPU)},
    }  # fmt: skip
    if structure:
        outcome: dict[str, Any] = {
            "status": status, "reason": "", "alpha": 3.0, "condition_number": 1.5,
            "deviation": 0.1, "nonzeros": 1.5e6, "stored": 20000, "flops": 3e8, "sgd_flops": 2e8,
        }  # fmt: skip
    else:
        reached = status == "reached"
        outcome = {
            "status": status, "reason": "",
            "steps_to_target": steps if reached else None,
            "seconds_to_target": seconds if reached else None,
            "compile_seconds": compile_seconds, "preparation_seconds": preparation_seconds,
            "steps": 20, "seconds": 2.0, "wall_seconds": 2.5, "harness_seconds": 0.01,
            "final": 0.005, "best": 0.005, "learning_rate": learning_rate or 0.1,
            "rate_note": "1/alpha",
            "curve": curve or {"steps": [0, 10, 20], "seconds": [0.0, 1.0, 2.0],
                               "train": [1.0, 0.1, 0.01], "held_out": [1.0, 0.2, 0.005]},
        }  # fmt: skip
    described = facts(contestant, workload)
    described |= {name: value for name, value in more.items() if name in described}
    outcome |= {name: value for name, value in more.items() if name in outcome}
    if status == "skipped":
        outcome = {"status": status, "reason": more.get("reason", "")}
    key = content_hash([config])
    body = {
        "schema": 1, "key": key, "config": config,
        "date": (START + timedelta(days=day)).isoformat(),
        "command": f"python -m benchmarks.leaderboard trial --key {key[:12]} --out leaderboard",
        "facts": described, "outcome": outcome,
    }  # fmt: skip
    return {**body, "digest": content_hash([body])}


def _timed(
    contestant: str, workload: str, seed: int, device: dict[str, str], **config: Any
) -> dict[str, Any]:
    """A trial with a curve that falls as a power to the target."""
    number = np.random.default_rng([*f"{contestant}/{workload}/{seed}".encode()])
    name = next((n for n in sorted(OURS, key=len, reverse=True) if contestant.startswith(n)), None)
    _, fewer, slower = OURS[name] if name else ("", *OTHERS[contestant][2:])
    _, scale, pace = WORKLOADS[workload]
    gpu = device is GPU
    tone = np.random.default_rng([*f"{contestant}/{workload}".encode()])
    steps = max(1, round(scale * fewer * np.exp(0.3 * tone.normal() + 0.1 * number.normal())))
    pace *= slower * np.exp(0.03 * number.normal()) * (0.2 if gpu else 1.0)
    budget, target = 9 * scale // 10, config["target"]
    compilation = (0.4 + 0.3 * slower) * np.exp(0.05 * number.normal())
    status = "reached" if steps <= budget else "missed"
    reason = "" if status == "reached" else f"the target was not reached in {budget} steps"
    if contestant == "kfac-jax":
        return record(
            contestant, workload, seed, status="skipped", seconds=None, environment=device,
            reason="kfac-jax is not installed", **config,
        )  # fmt: skip
    last = min(budget, steps)
    at = np.unique(np.geomspace(1, last, 60).astype(int)).tolist()
    at = [0, *at]
    loss = [float(target * 30 * (1 / 30) ** ((step / steps) ** 0.7)) for step in at]
    train = [value * 0.8 for value in loss]
    if name == "diagonal" and workload == "linear-teacher" and seed == 1:
        status, reason = "diverged", "the training loss was not finite at step 12"
        loss, train = [*loss[:8], *[None] * (len(at) - 8)], [*train[:8], *[None] * (len(at) - 8)]  # type: ignore[list-item]
    return record(
        contestant, workload, seed, status=status, reason=reason, steps=steps,
        seconds=float(pace * steps), compile_seconds=float(compilation),
        preparation_seconds=0.2 if name else 0.0, environment=device,
        curve={"steps": at, "seconds": [float(pace * step) for step in at], "train": train,
               "held_out": loss},
        **config,
    )  # fmt: skip


def sample(
    *,
    names: tuple[str, ...] | None = None,
    workloads: tuple[str, ...] | None = None,
    devices: tuple[dict[str, str], ...] = (CPU, GPU),
    seeds: int = 3,
    tuning: int = 3,
    target: float = 0.01,
) -> list[dict[str, Any]]:
    """A whole leaderboard: tuning, evaluation and structure trials of every device.

    Args:
      names: of contestants; all by default.
      workloads: all by default.
      devices: their environments.
      seeds: evaluation trials of each contestant on each workload.
      tuning: trials of each contestant whose learning rate is tuned.
      target: of every workload.
    """
    records: list[dict[str, Any]] = []
    for device in devices:
        for workload in workloads or tuple(WORKLOADS):
            for name in names or tuple(contestants()):
                tuned = facts(name)["rate_rule"].startswith("tuned")
                for trial in range(tuning if tuned else 0):
                    rate = float(f"{10.0 ** (trial - 2):.3g}")
                    records.append(
                        _timed(name, workload, 0, device, target=target, role="tuning",
                               learning_rate=rate)
                    )  # fmt: skip
                rate = 0.1 if tuned else None
                records += [
                    _timed(name, workload, seed, device, target=target, learning_rate=rate)
                    for seed in range(seeds)
                ]
                if name in OURS:
                    records.append(record(name, workload, role="structure", environment=device))
    return records


TWO = ("digits-mse", "linear-teacher")
"""Workloads of two rows of a board."""


def trials(contestant, workload, seconds, **more):
    """A trial a seed; None misses."""
    return [record(contestant, workload, seed, seconds=s, **more) for seed, s in enumerate(seconds)]


def by_hand():
    """K-FAC 2 s and 3 s with half of it compilation, Adam 4 s and never."""
    before = {"compile_seconds": 0.75, "preparation_seconds": 0.25}
    return [
        *trials("kfac", "digits-mse", [1.0, 0.5, 1.5], **before),
        *trials("kfac", "linear-teacher", [3.0, 3.0, None]),
        *trials("adam", "digits-mse", [4.0, 5.0, 3.0], learning_rate=0.1, steps=40),
        *trials("adam", "linear-teacher", [1.0, None, None], learning_rate=0.1),
    ]  # fmt: skip


def only(board):
    (device,) = board["devices"]
    return device
