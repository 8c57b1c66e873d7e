"""Refutations: a refuted row is shown, has no rank, and comes back where they are withdrawn."""

import re
from pathlib import Path

import pytest
import toy_leaderboard as toy
from boards import command, put
from leaderboard_records import CPU, GPU, record, trials

from benchmarks.leaderboard import RULES, page, refutations, tables, trial
from benchmarks.leaderboard import board as boards
from benchmarks.leaderboard.record_form import misfit
from benchmarks.leaderboard.records import trial_key
from benchmarks.leaderboard.store import Store

ROWS = {
    "kfac": trials("kfac", "digits-mse", [1.0, 1.0]),
    "adam": trials("adam", "digits-mse", [2.0, 2.0], learning_rate=0.1),
    "sgd": trials("sgd", "digits-mse", [3.0, 3.0], learning_rate=0.1),
}
ALL = [entry for row in ROWS.values() for entry in row]
REPEAT = record("kfac", seed=7, seconds=None, status="missed")


def against(refuted, reason="it misses", evidence=(REPEAT,), day=5):
    """The record that refutes another one."""
    config = refutations.refutation(refuted, reason, evidence)
    facts = {"submitter": "B. Hand", "commit": "abc", "title": refuted["facts"]["title"]}
    key = trial_key(config)
    return {"key": key, "config": config, "date": f"2026-11-0{day}T00:00:00+00:00", "facts": facts,
            "command": refuted["command"], "outcome": {}}  # fmt: skip


def rows(records):
    (device,) = boards.build(records)["devices"]
    return device, {row["contestant"]: row for row in device["rows"]}


def places(found):
    """Scores by steps and seconds of the rows that have a rank."""
    return {name: row["scores"] for name, row in found.items() if row["ranked"]}


def test_a_refuted_row_is_there_and_the_others_rank_as_if_it_were_not():
    device, found = rows([*ALL, against(ROWS["kfac"][1])])
    assert places(found) == places(rows(ROWS["adam"] + ROWS["sgd"])[1])
    assert found["kfac"]["cells"][0]["seconds"] == 1.0
    assert (found["kfac"]["refuted"], found["adam"]["refuted"]) == (True, False)
    (said,) = found["kfac"]["refutations"]
    assert (said["reason"], said["submitter"], said["workload"]) == (
        "it misses", "B. Hand", "digits-mse"
    )  # fmt: skip
    assert [(shown["key"], shown["status"]) for shown in said["evidence"]] == [
        (REPEAT["key"], "missed")
    ]
    assert device["workloads"][0]["winners"]["seconds"] == ["adam"]
    (sentence,) = [s for s in device["verdict"]["sentences"] if "efuted" in s]
    assert sentence == "Refuted, so without a rank: K-FAC."
    assert not any("Skipped" in s for s in device["verdict"]["sentences"])


def test_withdrawn_it_ranks_again_and_a_second_refutation_still_stands():
    first = against(ROWS["kfac"][0])
    withdrawal = against(first, "the repeat had another version of the data", (), day=6)
    _, found = rows([*ALL, first, withdrawal])
    assert places(found) == places(rows(ALL)[1])
    assert found["kfac"]["refutations"][0]["withdrawn"]["reason"].startswith("the repeat had")
    again = against(ROWS["kfac"][0], "it sees the held-out samples", ())
    assert rows([*ALL, first, withdrawal, again])[1]["kfac"]["refuted"]


def test_a_choice_of_workloads_does_not_raise_a_refuted_row():
    elsewhere = [record("kfac", "linear-teacher"), record("adam", "linear-teacher")]
    said = against(elsewhere[0], evidence=())
    (device,) = boards.build([*ALL, *elsewhere, said], ["digits-mse"])["devices"]
    found = {row["contestant"]: row for row in device["rows"]}
    assert (found["kfac"]["refuted"], found["kfac"]["ranked"]) == (True, False)
    assert found["kfac"]["refutations"][0]["workload"] == "linear-teacher"
    assert found["adam"]["ranked"]


def test_it_is_of_the_version_and_machine_that_it_names_alone():
    old = against(ROWS["kfac"][0])
    new = trials("kfac", "digits-mse", [1.0, 1.0], sources="mended", day=9)
    _, found = rows([*ALL, old, *new])
    assert not found["kfac"]["refuted"]
    assert [version["refuted"] for version in found["kfac"]["earlier"]] == [True]
    elsewhere = trials("kfac", "digits-mse", [1.0, 1.0], environment=GPU)
    board = boards.build([*ALL, *elsewhere, old])
    assert [row["refuted"] for d in board["devices"] for row in d["rows"]
            if row["contestant"] == "kfac"] == [True, False]  # fmt: skip
    assert [row["machine"] for row in board["across"] if row["contestant"] == "kfac"] == [
        boards.device_name({**CPU, **GPU})
    ]


def test_a_board_of_which_all_is_refuted_has_no_winners():
    device, _ = rows([*ROWS["kfac"], against(ROWS["kfac"][0])])
    assert device["workloads"][0]["winners"] == {clock: [] for clock in boards.CLOCKS}
    assert (device["workloads"][0]["reached_by"], device["workloads"][0]["of"]) == (0, 0)
    assert device["verdict"]["answer"] == "No contestant has reached a target yet."


def test_the_refutation_of_what_is_not_there_changes_nothing():
    stray = against(record("muon", environment=GPU))
    assert rows([*ALL, stray])[0]["rows"] == rows(ALL)[0]["rows"]


def test_page_and_terminal_show_who_says_what():
    nasty = "<script>alert(1)</script>"
    first = against(ROWS["kfac"][0], nasty)
    first["facts"]["submitter"] = nasty
    document = boards.build([*ALL, first])
    text = page.render(document, ALL)
    history = text[text.index('<section id="history">') :]
    assert nasty not in text
    escaped = "&lt;script&gt;alert(1)&lt;/script&gt;"
    assert f"by {escaped}" in history
    assert f"<q>{escaped}</q>" in history
    assert history.count("<s>") == 1
    assert "<s>K-FAC</s> refuted" in history
    assert REPEAT["command"] in history
    device = document["devices"][0]
    assert tables.entries(device)[-1]["contestant"] == "kfac (refuted)"
    assert tables.refutations(device) == [
        f"kfac on digits-mse: refuted on 2026-11-05 by {nasty}: {nasty}"
    ]
    withdrawn = [*ALL, first, against(first, "mistaken", (), day=6)]
    text = page.render(boards.build(withdrawn), ALL)
    assert "<s>" not in text[text.index('<section id="history">') :]
    assert "Withdrawn on 2026-11-06 by B. Hand" in text
    assert tables.refutations(boards.build(withdrawn)["devices"][0]) == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"reason": " "}, "config.reason is not a reason"),
        ({"evidence": [{"key": "x"}]}, "config.evidence is not a list of results"),
        ({"refutes": None}, "config.refutes is not a text"),
    ],
)
def test_a_foreign_refutation_that_is_none_is_left_out(change, says):
    whole = against(ROWS["kfac"][0])
    assert misfit(whole) == ""
    assert says in misfit({**whole, "config": {**whole["config"], **change}})


@pytest.fixture
def folder(tmp_path):
    """A folder with the rows, and the keys that their first trials have in it."""
    out = tmp_path / "board"
    Store.open(out, RULES)
    keys = {}
    for name, row in ROWS.items():
        keys[name], _ = (put(out, entry) for entry in row)
    keys["tuning"] = put(out, record("adam", role="tuning", learning_rate=0.1))
    keys["elsewhere"] = put(out, record("kfac", "linear-teacher"))
    return out, keys


def test_a_refutation_goes_through_export_and_merge(folder, tmp_path):
    out, keys = folder
    repeat = tmp_path / "repeat"
    Store.open(repeat, RULES)
    put(repeat, {**ROWS["kfac"][0], "outcome": REPEAT["outcome"]})  # the same key, another result
    arguments = (
        "refute",
        keys["kfac"][:12],
        "--reason",
        "it misses",
        "--with",
        repeat,
        keys["sgd"],
    )
    code, text = command(*arguments, "--submitter", "B. Hand", "--out", out)
    assert code == 0, text
    (made,) = [r for r in Store.open(out, RULES).records() if not refutations.is_trial(r)]
    assert f"refutation {made['key']} of kfac on digits-mse, with 2 trials as evidence" in text
    assert "kfac, as this version of it, has no rank on any workload until" in text
    assert {shown["key"] for shown in made["config"]["evidence"]} == {keys["kfac"], keys["sgd"]}
    assert made["facts"].keys() == {"commit", "natgrad", "submitter", "title"}
    code, text = command("score", "--out", out)
    assert "kfac (refuted)" in text
    assert "by B. Hand: it misses" in text
    code, text = command(*arguments, "--out", out)
    assert (code, "was refuted in these words already" in text) == (2, True)
    archive, other = tmp_path / "all.jsonl.gz", tmp_path / "other"
    assert "9 records" in command("export", archive, "--out", out)[1]
    assert "9 records copied" in command("merge", archive, "--out", other)[1]
    assert "0 records copied, 9 were here" in command("merge", archive, "--out", other)[1]
    code, text = command("merge", archive, repeat, "--out", other)
    assert (code, text.count("records copied"), text.count("1 differ")) == (0, 2, 1), text
    code, text = command("merge", Path(__file__), "--out", other)
    assert (code, "has no record of a leaderboard: line 1" in text) == (2, True)
    assert boards.build(Store.open(other, RULES).records()) == boards.build(
        Store.open(out, RULES).records()
    )
    code, text = command("page", "--out", other)
    assert code == 0, text
    assert "<s>K-FAC</s> refuted" in (other / "leaderboard.html").read_text(encoding="utf-8")
    code, text = command("refute", made["key"], "--reason", "mistaken", "--out", other)
    assert "withdrawal" in text
    code, text = command("refute", made["key"], "--reason", "once more", "--out", other)
    assert (code, "was withdrawn already" in text) == (2, True)
    assert "refuted" not in command("score", "--out", other)[1]
    (last,) = [r for r in Store.open(other, RULES).records() if r["config"]["role"] == "withdrawal"]
    code, text = command("refute", last["key"], "--reason", "no", "--out", other)
    assert (code, "of the role 'withdrawal'" in text) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("0" * 64, "--reason", "x"), "no record here has the key"),
        (("kf", "--reason", "x"), "'kf' is too short for a key: give at least 8 digits"),
        (("kfac",), "a refutation needs a reason; say by --reason"),
        (("kfac", "--reason", " \n"), "a refutation needs a reason; say by --reason"),
        (("tuning", "--reason", "x"), "is of the role 'tuning': name an evaluation trial"),
        (("kfac", "--reason", "x", "--with", "1" * 64), "no record here has the key '111"),
        (("kfac", "--reason", "x", "--with", "no/where"), "no/where is no folder, no archive and"),
        (("tuning", "--rerun"), "is of the role 'tuning': name an evaluation trial"),
        (("kfac", "--reason", "x", "--with", "elsewhere"), "shows nothing: evidence is an "),
        (("kfac", "--reason", "x", "--with", "tuning"), "shows nothing: evidence is an "),
        (("kfac", "--reason", "x", "--with", "."), "holds no leaderboard"),
        (("kfac", "--rerun"), "steps repeat exactly on the same machine with the same versions"),
    ],
)
def test_what_cannot_be_refuted_is_refused_in_a_sentence(folder, arguments, says):
    out, keys = folder
    before = len(Store.open(out, RULES).records())
    code, text = command("refute", *(keys.get(word, word) for word in arguments), "--out", out)
    assert code == 2, text
    assert says in text
    assert len(re.findall(r"\S", text)) < 300
    assert "Traceback" not in text
    assert len(Store.open(out, RULES).records()) == before


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """A trial of the toy that ran, in a folder."""
    where = toy.install(monkeypatch)
    monkeypatch.setattr(trial, "reason_of", lambda workload: "")
    config = trial.configuration(where, "sgd", 0, target=1e-2, role="evaluation", learning_rate=0.3)
    yield Store.open(tmp_path / "board", RULES), config, trial.execute(config)
    for kept in (trial._program, trial._rate, trial._evaluation):
        kept.cache_clear()


def test_a_repeat_confirms_or_refutes(ran, tmp_path):
    store, config, result = ran
    key = store.write(config, result)["key"]
    code, text = command("refute", key, "--rerun", "--out", store.folder)
    assert code == 0, text
    assert "confirmed" in text
    assert len(store.records()) == 1
    steps = result["outcome"]["steps_to_target"]
    claimed = {**result["outcome"], "steps": steps - 1, "steps_to_target": steps - 1}
    better = Store.open(Path(tmp_path / "better"), RULES)
    better.write(config, {**result, "outcome": claimed})
    code, text = command("refute", key, "--rerun", "--out", better.folder)
    assert code == 0, text
    (made,) = [r for r in better.records() if not refutations.is_trial(r)]
    assert made["config"]["reason"] == (
        f"a repeat gave reached after {steps} steps, not reached after {steps - 1}"
    )
    (shown,) = made["config"]["evidence"]
    assert (shown["key"], shown["steps_to_target"]) == (key, steps)


def test_a_repeat_that_ran_out_of_seconds_says_nothing():
    slow = {**REPEAT["outcome"], "steps": 5}
    with pytest.raises(ValueError, match="used up its seconds after 5 steps"):
        refutations.difference(ROWS["kfac"][0], slow)
