"""Replays of the slow checks of Kerekes et al., which register themselves in ``REPLAYS``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from replays import Record, StandIns, always, measured, replay

from ntk_analysis.reproduce.kerekes import completion, natural_completion, small_sparse, sparse
from ntk_analysis.reproduce.kerekes.sparse_runs import FULL_RANK, TRAIN
from ntk_analysis.reproduce.registry import Outcome


@replay("KE-Fig4", "KE-Fig4-quick", what="the solution of least norm from the full-rank solver")
def _figure_4(record: Record, wrong: bool) -> StandIns:
    data = record["data"]
    accuracy = {name: np.array(values) for name, values in data["accuracy"].items()}
    if wrong:
        accuracy[FULL_RANK] = accuracy[TRAIN]

    def measure(setting: Any, report: Any) -> Outcome:
        return Outcome(tuple(sparse.judge(setting, accuracy, data["sparsity"])))

    return {"measure": measure}


@replay("KE-Fig5", what="one factor in the place of two")
def _figure_5(record: Record, wrong: bool) -> StandIns:
    data = record["data"]
    nuclear, euclidean = completion.NUCLEAR, completion.EUCLIDEAN
    few = f"m = {data['shown']}"
    observed = measured(record, "observed error of EGD")
    losses = {completion.NATURAL: measured(record, f"{completion.NATURAL}: observed")}
    norms = {nuclear: 1.0, euclidean[3]: measured(record, f"{few}: nuclear norm")}

    def completed(name: str, error: float, rank: float) -> completion.Completed:
        return completion.Completed(error, rank, norms.get(name, 1.0), losses.get(name, observed))

    found = {
        name: [completed(name, *row) for row in zip(c["error"], c["rank"], strict=True)]
        for name, c in data["curves"].items()
    }
    spread = {depth: np.array(data["spread"][euclidean[depth]]) for depth in (2, 3)}
    if wrong:
        found[euclidean[2]] = found[euclidean[1]]
        spread[2] = np.array([[row.error for row in found[euclidean[1]]]] * len(spread[2]))
    collapsed = {
        depth: [completed("", error, 1.0) for error in data["collapsed"][f"L = {depth}"]]
        for depth in (2, 3)
    }
    drift = [measured(record, f"{completion.NATURAL}: change")]
    return {"run_all": always(completion.Table(found, drift, collapsed, spread))}


@replay("KE-Fig5-NGD", what="the entries that are not observed count as well")
def _natural_completion(record: Record, wrong: bool) -> StandIns:
    data, paper = record["data"], completion.PAPER
    case = completion.problem(paper, paper.shown)
    signs, others = np.sign(np.random.default_rng(0).normal(size=(2, *case.target.shape)))

    def path(depth: int, curve: dict[str, Any], kept: int | None = None) -> completion.Path:
        """With the stored errors of the observed entries, and motion and last error of the rest."""
        betas, last = [], measured(record, f"L = {depth}: unobserved error") ** 0.5 * signs
        for observed, moved in zip(curve["observed"], curve["moved"], strict=True):
            error = observed**0.5 * signs
            rest = error if wrong else last + (moved - curve["moved"][-1]) * others
            betas.append(case.target + np.where(case.mask, error, rest))
        steps = np.array(curve["times"]) / completion.STEPS[depth]
        return completion.Path(steps[:kept], np.array(betas[:kept]))

    joint = {depth: data["joint"][f"L = {depth}"] for depth in (1, 2, 3)}
    truncated = {depth: data["truncated"][f"L = {depth}"] for depth in (2, 3)}
    halved = dict(joint[2])
    share = measured(record, "L = 2: the same over that of half")
    halved["moved"] = [moved / share for moved in joint[2]["moved"]]
    found = natural_completion.Naturals(
        {depth: path(depth, curve) for depth, curve in joint.items()},
        path(2, halved),
        {
            depth: path(depth, joint[depth], round(time * completion.PIECES / paper.natural_time))
            for depth, time in ((d, data["split"][f"L = {d}"]) for d in (2, 3))
        },
        {depth: path(depth, curve) for depth, curve in truncated.items()},
    )
    return {"run_natural": always(found)}


@replay("KE-Fig6", what="natural gradient in the place of gradient descent")
def _figure_6(record: Record, wrong: bool) -> StandIns:
    data = record["data"]
    test: small_sparse.Table = {
        curve["name"]: dict(zip(curve["numbers"], curve["accuracies"], strict=True))
        for curve in data["curves"]
    }
    fitted: small_sparse.Table = {
        name: {num: [1.0] for num in small_sparse.NUMBERS} for name in small_sparse.EUCLIDEAN
    }
    fitted["EGD, L = 4"][10] = [measured(record, "training accuracy of EGD, L = 4")]
    for other, stored in zip(small_sparse.OTHER_STARTS, data["starts"], strict=True):
        test[other.name] = {other.num: stored["accuracies"]}
        if not other.positive:
            fitted[other.name] = {other.num: [measured(record, f"{other.name}, N")]}
    limit = test[small_sparse.NATURAL]
    if wrong:
        test["EGD, L = 1"] = limit
    gap = measured(record, "NGD at t = 60")
    margins = {
        1: measured(record, "EGD, L = 1, against the l_2"),
        2: measured(record, "EGD, L = 2, against the l_1"),
    }
    return {
        "accuracies": always((test, fitted)),
        "sparse_classification": lambda num, test, dim, relevant, seed: SimpleNamespace(
            teacher=limit[num][seed]
        ),
        "train_naturally": always(gap),
        "gaussian_accuracy": lambda apart, accuracy: accuracy + apart,
        "_gaps_to_max_margin": lambda test, depth: (margins[depth],) * 2,
    }
