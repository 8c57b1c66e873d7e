"""Boards from records that never ran."""

import json
import random

import pytest
from leaderboard_records import CPU, GPU, SMALL, TWO, by_hand, only, record, sample, trials

from benchmarks.leaderboard import board as boards
from benchmarks.leaderboard import readme


@pytest.fixture(scope="module")
def whole():
    return boards.build(sample(names=SMALL, workloads=TWO))


@pytest.fixture
def small():
    return by_hand()


def rows(device):
    return {row["contestant"]: row for row in device["rows"]}


def test_a_board_by_hand(small):
    device = only(boards.build(small))
    found = rows(device)
    assert [w["name"] for w in device["workloads"]] == ["digits-mse", "linear-teacher"]
    assert [cell["seconds"] for cell in found["kfac"]["cells"]] == [2.0, 3.0]
    assert [cell["training"] for cell in found["kfac"]["cells"]] == [1.0, 3.0]
    assert [cell["seconds"] for cell in found["adam"]["cells"]] == [4.0, None]
    first, second = found["kfac"]["scores"]["seconds"], found["adam"]["scores"]["seconds"]
    assert first["score"] == 1.0
    # twice as long on one workload, never on the other
    assert second["score"] == pytest.approx((2 / 3 + 0) / 2)
    assert second["ratios"] == [2.0, None]
    # on the clock of training alone four times as long: outside of the score
    assert found["adam"]["scores"]["training"]["score"] == 0.0
    assert found["adam"]["scores"]["steps"]["ratios"][0] == 4.0
    assert (first["speed_up"], first["shared"]) == (pytest.approx(2.0), 1)
    assert (found["kfac"]["reached"], found["adam"]["reached"]) == (2, 1)
    assert [row["contestant"] for row in device["rows"]] == ["kfac", "adam"]


def test_counts_failures_and_the_trials_behind_a_number(small):
    cell = rows(only(boards.build(small)))["adam"]["cells"][1]
    assert cell["counts"] == {"reached": 1, "missed": 2, "diverged": 0, "skipped": 0}
    assert cell["status"] == "missed"
    assert sorted(trial["key"] for trial in cell["trials"]) == sorted(
        r["key"] for r in small
        if r["config"]["contestant"] == "adam" and r["config"]["workload"] == "linear-teacher"
    )  # fmt: skip
    digits = rows(only(boards.build(small)))["kfac"]["cells"][0]
    shown = next(trial for trial in digits["trials"] if trial["key"] == digits["shown"])
    assert shown["seconds"] == digits["seconds"] == 2.0


def test_winners_and_structures_before_the_best_first_order(small):
    small += trials("sgd", "digits-mse", [2.5, 2.5, 2.5], learning_rate=0.1)
    small += trials("kfac-mc", "digits-mse", [2.4, 2.4, 2.4])
    small += trials("exact", "digits-mse", [9.0, 9.0, 9.0])
    digits, teacher = only(boards.build(small))["workloads"]
    assert digits["winners"]["seconds"] == ["kfac"]
    assert digits["first_order"]["seconds"] == {"contestants": ["sgd"], "time": 2.5}
    # two variants of one structure are one structure
    assert digits["faster"]["seconds"] == ["K-FAC"]
    assert (digits["reached_by"], digits["of"]) == (5, 5)
    assert teacher["first_order"]["seconds"] == {"contestants": [], "time": None}
    assert teacher["faster"]["seconds"] == ["K-FAC"]


def test_the_order_of_records_does_not_matter():
    records = sample(names=SMALL, workloads=TWO)
    shuffled = random.Random(0).sample(records, len(records))
    assert boards.build(records) == boards.build(shuffled)


def test_a_board_is_plain_json(whole):
    assert json.loads(json.dumps(whole, allow_nan=False)) == whole


def test_devices_have_their_own_boards(whole):
    names = [device["name"] for device in whole["devices"]]
    assert names == ["CPU, Example CPU, 2 cores", "Example GPU, Example CPU, 16 cores"]
    first, second = (rows(device)["kfac"]["cells"][0]["seconds"] for device in whole["devices"])
    assert first != second


def test_tuning_trials_are_linked_and_do_not_count():
    evaluation = trials("adam", "digits-mse", [4.0], learning_rate=0.1)
    tuning = [
        record("adam", seed=seed, role="tuning", learning_rate=rate, seconds=0.001)
        for seed, rate in ((1001, 0.03), (1000, 0.1), (1000, 0.01))
    ]
    device = only(boards.build(evaluation + tuning))
    (cell,) = rows(device)["adam"]["cells"]
    assert cell["seconds"] == 4.0
    tuned_on = [(entry["seed"], entry["learning_rate"]) for entry in cell["tuned_on"]]
    assert tuned_on == [(1000, 0.01), (1000, 0.1), (1001, 0.03)]
    assert {entry["key"] for entry in cell["tuned_on"]} == {trial["key"] for trial in tuning}
    assert (device["trials"], device["tuning_trials"]) == (1, 3)
    assert cell["learning_rates"] == [0.1, 0.1]


def test_seeds_at_the_rates_of_their_studies_all_count():
    """Three studies found three rates; of a study's rates the newest counts, and only there."""
    found = [
        record("adam", seed=seed, seconds=1.0 + seed, learning_rate=rate)
        for seed, rate in enumerate((0.1, 0.3, 0.03, 0.1))
    ]
    cell = rows(only(boards.build(found)))["adam"]["cells"][0]
    assert cell["learning_rates"] == [0.03, 0.3]
    assert [trial["learning_rate"] for trial in cell["trials"]] == [0.1, 0.3, 0.03, 0.1]
    again = record("adam", seed=0, seconds=9.0, learning_rate=0.2, day=2)
    device = only(boards.build([*found, again]))
    cell = rows(device)["adam"]["cells"][0]
    assert [trial["learning_rate"] for trial in cell["trials"]] == [0.2, 0.3, 0.03]
    assert device["left_out"]["at other learning rates"] == 2


def test_trials_of_earlier_rules_are_past_and_not_ranked():
    """Whatever their target was: 1 s then, 4 s now, and K-FAC has no trial of these rules."""
    old = {"rules": "0.9", "target": 0.5, "code": "older"}
    past = [*trials("adam", "digits-mse", [1.0, 1.0], learning_rate=0.2, **old)]
    past += [record("kfac", seconds=0.5, **old), record("kfac", "linear-teacher", **old)]
    now = [record("adam", seconds=4.0, learning_rate=0.1, day=1), record("exact", day=1)]
    board = boards.build([*past, *now])
    device = only(board)
    assert board["rules"] == "1.0"
    assert device["trials"] == 2
    assert [w["name"] for w in device["workloads"]] == ["digits-mse"]
    found = rows(device)
    assert set(found) == {"adam", "exact"}
    assert (found["adam"]["rules"], found["adam"]["cells"][0]["seconds"]) == ("1.0", 4.0)
    assert found["adam"]["scores"]["seconds"]["score"] == pytest.approx(0)
    (earlier,) = found["adam"]["earlier"]
    assert (earlier["rules"], earlier["cells"][0]["seconds"]) == ("0.9", 1.0)
    assert found["exact"]["earlier"] == []
    assert {name: n for name, n in device["left_out"].items() if n} == {
        "of earlier rules, of contestants without a row": 2
    }


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"target": 0.02}, "of other targets or versions of a workload"),
        ({"workload_version": 2}, "of other targets or versions of a workload"),
        ({"learning_rate": 0.5}, "at other learning rates"),
    ],
)
def test_the_newest_counts_and_the_others_are_counted_as_left_out(change, reason):
    old = [record("kfac", seed=seed, seconds=5.0) for seed in (0, 3)]
    new = trials("kfac", "digits-mse", [1.0], day=3, **change)
    device = only(boards.build(old + new))
    (cell,) = rows(device)["kfac"]["cells"]
    assert cell["seconds"] == 1.0
    assert {name: count for name, count in device["left_out"].items() if count} == {reason: 2}
    assert any(f"2 {reason}" in sentence for sentence in device["verdict"]["sentences"])


@pytest.mark.parametrize(
    "change",
    [{"sources": "newer"}, {"environment": {**CPU, "jax": "0.12.0"}}, {"code": "newer"}],
    ids=["sources", "library", "harness"],
)
def test_another_version_of_one_contestant_leaves_the_rows_of_the_others(change):
    """It stands in its own row, which keeps the earlier one."""
    others = [record("adam", seconds=4.0, learning_rate=0.1), record("exact", seconds=3.0)]
    old = trials("kfac", "digits-mse", [5.0, 7.0])
    new = trials("kfac", "digits-mse", [1.0], day=3, **change)
    device = only(boards.build([*old, *others, *new]))
    found = rows(device)
    assert set(found) == {"adam", "exact", "kfac"}
    assert [found[name]["cells"][0]["seconds"] for name in found] == [1.0, 3.0, 4.0]
    (earlier,) = found["kfac"]["earlier"]
    assert earlier["cells"][0] == {
        "status": "reached", "seconds": 6.0, "training": 6.0, "steps": 10.0
    }  # fmt: skip
    assert (earlier["date"] < found["kfac"]["date"], earlier["commit"]) == (True, "0a1b2c3d4e5f")
    assert found["adam"]["earlier"] == found["exact"]["earlier"] == []
    assert not any(device["left_out"].values())
    text = " ".join(device["verdict"]["sentences"])
    assert ("2 versions of the harness" in text) == ("code" in change)


def test_an_older_trial_of_a_version_does_not_split_its_row():
    """The rate that was tuned last counts within a version alone."""
    first = record("adam", seconds=4.0, learning_rate=0.1, sources="old")
    later = record("adam", seconds=2.0, learning_rate=0.3, sources="new", day=2)
    row = rows(only(boards.build([first, later])))["adam"]
    assert (row["cells"][0]["seconds"], row["earlier"][0]["cells"][0]["seconds"]) == (2.0, 4.0)


def test_machines_stand_in_one_ranking_by_steps():
    """By hand: 10 and 20 steps here, 40 and a miss there; of another target nobody is behind."""
    here = [record("kfac", steps=10), record("adam", steps=20, learning_rate=0.1)]
    there = [
        record("kfac", steps=40, environment=GPU),
        record("adam", seconds=None, learning_rate=0.1, environment=GPU),
        record("adam", "linear-teacher", steps=7, learning_rate=0.1, environment=GPU),
    ]
    found = boards.build(here + there)["across"]
    assert found[0]["workloads"] == ["digits-mse", "linear-teacher"]
    score = {(row["contestant"], row["machine"].split(",")[0]): row["score"] for row in found}
    assert score == {
        ("kfac", "CPU"): pytest.approx(0.5),
        ("adam", "CPU"): pytest.approx((2 / 3) / 2),
        ("kfac", "Example GPU"): pytest.approx(0.0),
        ("adam", "Example GPU"): pytest.approx(0.5),
    }
    steps = {(row["contestant"], row["machine"].split(",")[0]): row["steps"] for row in found}
    assert steps["adam", "Example GPU"] == [None, 7.0]
    assert boards.build(here)["across"] == []
    moved = [record("kfac", steps=1, environment=GPU, target=0.02)]
    apart = boards.build(here + moved)["across"]
    assert sorted(row["score"] for row in apart) == pytest.approx([1 / 3, 0.5, 0.5])


def test_a_trial_without_a_target_does_not_count():
    device = only(boards.build([record(), record(seed=1, target=None)]))
    assert device["trials"] == 1
    assert device["left_out"]["without a frozen target"] == 1


def test_a_lone_structure_trial_of_newer_code_does_not_empty_the_board():
    newer = record(role="structure", code="newer", day=9)
    device = only(boards.build([record(), newer]))
    assert device["trials"] == 1
    assert device["structures"] == []


def test_records_without_an_evaluation_make_an_empty_board():
    device = only(boards.build([record(role="tuning", learning_rate=0.1)]))
    assert device["rows"] == []
    assert device["verdict"]["answer"] == "No contestant has reached a target yet."
    assert "No results yet" in readme.section({"devices": [device]})


def test_a_choice_of_workloads_ranks_as_if_only_they_had_run(small):
    """Adam, which missed the other workload, ties nobody there; SGD ran that one alone."""
    small = [*small, *trials("sgd", "linear-teacher", [1.0, 1.0, 1.0], learning_rate=0.1)]
    there = [r for r in small if r["config"]["workload"] == "digits-mse"]
    chosen, alone = (only(boards.build(*how)) for how in ((small, ["digits_mse"]), (there,)))
    left = len([r for r in small if r not in there])
    assert chosen["left_out"].pop("on workloads that were not chosen") == left
    assert any(
        f"{left} on workloads that were not chosen" in text
        for text in chosen["verdict"]["sentences"]
    )
    assert set(rows(chosen)) == {"kfac", "adam"}
    for board in (chosen, alone):
        del board["verdict"], board["left_out"]
    assert chosen == alone
    assert boards.build(small, ["digits-mse", "linear-teacher"]) == boards.build(small)
    with pytest.raises(ValueError, match="'digit-mse'; did you mean 'digits-mse'"):
        boards.build(small, ["digit-mse"])


def test_of_equal_scores_the_one_with_more_targets_is_the_best_first_order():
    """Both are beyond the end of the profile; in the alphabet Adam is before SGD."""
    found = [
        record("kfac", seconds=1.0), record("kfac", "linear-teacher", seconds=1.0),
        record("adam", seconds=9.0, learning_rate=0.1),
        record("adam", "linear-teacher", seconds=None, learning_rate=0.1),
        record("sgd", seconds=9.5, learning_rate=0.1),
        record("sgd", "linear-teacher", seconds=9.5, learning_rate=0.1),
    ]  # fmt: skip
    device = only(boards.build(found))
    assert [row["scores"]["seconds"]["score"] for row in device["rows"]] == [1.0, 0.0, 0.0]
    assert "first-order contestant is SGD with 0.00, and both" in device["verdict"]["answer"]


def test_of_machines_those_are_shown_where_a_chosen_workload_ran():
    elsewhere = record("kfac", "linear-teacher", environment=GPU)
    (device,) = boards.build([record(), elsewhere], ["digits-mse"])["devices"]
    assert device["name"] == "CPU, Example CPU, 2 cores"


def test_who_is_skipped_everywhere_has_no_rank():
    skipped = record("kfac-jax", status="skipped", reason="kfac-jax is not installed")
    device = only(boards.build([record(), skipped]))
    row = rows(device)["kfac-jax"]
    assert (row["ranked"], row["scores"]) == (False, {})
    assert row["cells"][0]["reason"] == "kfac-jax is not installed"
    assert device["workloads"][0]["of"] == 1
    assert "Skipped everywhere, so without a rank: kfac-jax." in device["verdict"]["sentences"]


def test_divergence_and_a_missing_workload_are_told_apart():
    device = only(
        boards.build(
            [
                record("kfac", "digits-mse"),
                record("kfac", "linear-teacher"),
                *trials("exact", "digits-mse", [None, None], status="diverged"),
            ]
        )
    )
    assert device["verdict"]["sentences"][-1] == (
        "Not run yet, and counted as missed: 1 of 4 pairs of a contestant and a workload."
    )
    diverged, missing = rows(device)["exact"]["cells"]
    assert (diverged["status"], diverged["seconds"]) == ("diverged", None)
    assert (missing["status"], missing["trials"], missing["shown"]) == ("not run", [], None)
    assert rows(device)["exact"]["scores"]["seconds"]["score"] == 0.0


def test_isotropy_and_cost_come_from_structure_trials(whole):
    facts = {row["contestant"]: row for row in whole["devices"][0]["structures"]}
    assert set(facts) == {"exact", "kfac", "diagonal"}
    measure = facts["kfac"]["measures"][0]
    assert (measure["condition_number"], measure["flops"], measure["sgd_flops"]) == (1.5, 3e8, 2e8)
    assert measure["key"]


def test_the_same_seconds_are_a_tie_on_the_board():
    records = trials("kfac", "digits-mse", [1.0, 1.1]) + trials("exact", "digits-mse", [1.0, 1.1])
    records += trials("sgd", "digits-mse", [3.0, 3.1], learning_rate=0.1)
    device = only(boards.build(records))
    ranks = {name: row["scores"]["seconds"]["rank"] for name, row in rows(device).items()}
    assert ranks == {"kfac": "1=", "exact": "1=", "sgd": "3"}
    # 3.05 over 1.05 times as long
    assert device["verdict"]["answer"].startswith(
        "Exact and K-FAC share the first rank, where the trials do not tell them apart, with "
        "scores of 1.00 of 1; the best first-order contestant is SGD with 0.37"
    )


def test_the_verdict_says_it_when_first_order_wins():
    records = trials("adam", "digits-mse", [1.0], learning_rate=0.1)
    records += trials("kfac", "digits-mse", [3.0])
    verdict = only(boards.build(records))["verdict"]
    assert verdict["answer"] == (
        "Adam is the fastest to the targets: its score is 1.00 of 1, and it reaches 1 of 1 target; "
        "of natural gradient the best is K-FAC with 0.33, and 1 of 1 target."
    )
    assert verdict["sentences"] == [
        "digits-mse: no structure of ours is faster than the best first-order contestant, Adam."
    ]


def test_the_verdict_tells_compilation_apart():
    records = trials("adam", "digits-mse", [2.0], learning_rate=0.1)
    for name, seconds in (("kfac", 1.0), ("exact", 1.5)):
        slow = trials(name, "digits-mse", [seconds])
        slow[0]["outcome"]["compile_seconds"] += 5.0
        records += slow
    assert only(boards.build(records))["verdict"]["sentences"] == [
        "Who has the first rank depends on the clock: by seconds with compilation Adam; by seconds "
        "of training alone K-FAC; by steps Adam, K-FAC and Exact.",
        "digits-mse: no structure of ours is faster than the best first-order contestant, Adam; "
        "without compilation and preparation 2 (K-FAC, Exact).",
    ]


def test_contestants_have_a_place_among_those_of_their_rules(small):
    """SGD takes 3 s and never, L-BFGS 8 s and 4 s; Adam 4 s and never, K-FAC 2 s and 3 s."""
    small += trials("sgd", "digits-mse", [3.0, 3.0, 3.0], learning_rate=0.1)
    small += trials("lbfgs", "digits-mse", [8.0, 8.0, 8.0])
    small += trials("lbfgs", "linear-teacher", [4.0, 4.0, 4.0])
    device = only(boards.build(small))
    found = {name: row["scores"]["seconds"] for name, row in rows(device).items()}
    assert {n: row["ruleset"] for n, row in rows(device).items()} == {
        "kfac": "self-tuning", "lbfgs": "self-tuning", "sgd": "tuned", "adam": "tuned"
    }  # fmt: skip
    # among the tuned the ratios are those to the fastest of them
    assert found["adam"]["ratios"][0] == 2.0
    assert found["adam"]["own"]["ratios"] == [pytest.approx(4 / 3), None]
    assert found["adam"]["own"]["score"] == pytest.approx((4 - 4 / 3) / 3 / 2)
    assert found["sgd"]["own"]["score"] == 0.5
    assert found["lbfgs"]["own"]["score"] == pytest.approx((0 + (4 - 4 / 3) / 3) / 2)
    assert [found[name]["own"]["place"] for name in ("kfac", "sgd")] == [1, 1]
    sentences = device["verdict"]["sentences"]
    assert sentences[1].startswith("Among the 2 self-tuning contestants K-FAC")
    assert sentences[0].startswith("Among the 2 tuned contestants ")


def test_the_verdict_says_what_depends_on_the_clock():
    before = {"compile_seconds": 5.0}
    fast = trials("kfac", "digits-mse", [1.0] * 3, steps=3, **before)
    even = trials("adam", "digits-mse", [2.0] * 3, learning_rate=0.1, steps=40)
    sentences = only(boards.build(fast + even))["verdict"]["sentences"]
    assert (
        "Who has the first rank depends on the clock: by seconds with compilation Adam; by seconds "
        "of training alone K-FAC; by steps K-FAC." in sentences
    )
    same = only(boards.build(trials("kfac", "digits-mse", [1.0] * 3) + even))
    assert not any("depends on the clock" in s for s in same["verdict"]["sentences"])


@pytest.mark.parametrize(
    ("expected", "compilation", "steps", "says"),
    [
        ("curvature", 0.0, 3, "curvature was expected to win, and it wins by every clock"),
        ("first-order", 0.0, 3, "curvature was expected not to win, and it wins by every clock"),
        ("curvature", 9.0, 3, "curvature was expected to win, and it wins by seconds of training "
         "alone and by steps only"),
        ("curvature", 9.0, 90, "curvature was expected to win, and it wins by seconds of training "
         "alone only"),
        ("", 0.0, 3, ""),
    ],
)  # fmt: skip
def test_a_board_says_whether_what_was_expected_came_true(expected, compilation, steps, says):
    facts = {"expectation": "Because of that.", "expected": expected}
    ours = trials("kfac", "digits-mse", [1.0], steps=steps, compile_seconds=compilation, **facts)
    adam = trials("adam", "digits-mse", [2.0], learning_rate=0.1, steps=40, **facts)
    device = only(boards.build(ours + adam))
    (workload,) = device["workloads"]
    assert (workload["expectation"], workload["came_true"]) == ("Because of that.", says)
    assert (f"digits-mse: {says}." in device["verdict"]["sentences"]) == bool(says)


def test_nothing_came_true_where_nobody_is_at_the_target():
    ours = trials("kfac", "digits-mse", [None], expected="curvature")
    assert only(boards.build(ours))["workloads"][0]["came_true"] == ""


def test_contestants_without_a_structure_count_for_themselves():
    records = trials("adam", "digits-mse", [9.0], learning_rate=0.1)
    for name, title, seconds in (("kfac", "SOAP, online", 2.0), ("exact", "Deep linear", 1.0)):
        mine = trials(name, "digits-mse", [seconds])
        for trial in mine:
            trial["facts"] |= {"structure": "", "title": title}
        records += mine
    (workload,) = only(boards.build(records))["workloads"]
    assert workload["faster"]["seconds"] == ["Deep linear", "SOAP, online"]


def test_no_records_are_an_error():
    with pytest.raises(ValueError, match="no trials to score"):
        boards.build([])
