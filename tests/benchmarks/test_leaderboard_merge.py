"""Trials of one folder go into another, from it or from an archive."""

from pathlib import Path

import pytest
from store_records import RULES, make_config, make_result, snapshot, spoil_half, write

import benchmarks.leaderboard
from benchmarks.leaderboard.store import MANIFEST, Store


@pytest.fixture
def trials(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "out", RULES)


def test_merge_copies_what_is_missing_and_keeps_ours(tmp_path: Path) -> None:
    ours, theirs = (Store.open(tmp_path / name, RULES) for name in ("ours", "theirs"))
    mine = write(ours, 1, 0.25)
    both = write(ours, 2)
    write(theirs, 2)
    theirs.path(both).write_bytes(ours.path(both).read_bytes())
    kept, new, bad = write(theirs, 1, 0.75), write(theirs, 3), write(theirs, 4)
    spoil_half(theirs.path(bad))
    before = snapshot(theirs.folder)
    report = ours.merge(theirs.folder)
    assert report.copied == (new,)
    assert report.same == 1
    assert report.kept == (kept,) == (mine,)
    (invalid,) = report.invalid
    assert bad in invalid.name
    assert snapshot(theirs.folder) == before
    assert ours.read(new) == theirs.read(new)
    assert ours.read(mine)["outcome"]["final"] == 0.25
    assert len(ours.records()) == 3
    again = ours.merge(theirs.folder)
    assert (again.copied, again.same) == ((), 2)


def test_merge_replaces_what_is_damaged_here(tmp_path: Path) -> None:
    ours, theirs = (Store.open(tmp_path / name, RULES) for name in ("ours", "theirs"))
    key = write(ours, 1)
    write(theirs, 1, 0.75)
    spoil_half(ours.path(key))
    assert ours.merge(theirs.folder).copied == (key,)
    assert ours.read(key)["outcome"]["final"] == 0.75


def test_merge_refuses_what_is_no_other_leaderboard(trials: Store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"holds no leaderboard: it has no {MANIFEST}"):
        trials.merge(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is the folder to merge into"):
        trials.merge(trials.folder / ".." / "out")
    Store.open(tmp_path / "old", "0.9")
    with pytest.raises(ValueError, match=r"holds trials of rules '0\.9'"):
        trials.merge(tmp_path / "old")


def test_trials_of_past_rules_come_along_and_no_others(tmp_path: Path) -> None:
    """From a folder or an archive; a folder of past rules takes no new trial."""
    for rules in ("1.1", "0.9"):
        old = Store.open(tmp_path / rules, rules)
        key = old.write(make_config() | {"rules": rules}, make_result())["key"]
        old.export(tmp_path / f"{rules}.jsonl")
        if rules == "1.1":
            kept = key
    now = Store.open(tmp_path / "now", benchmarks.leaderboard.RULES)
    assert now.merge(tmp_path / "1.1.jsonl").copied == (kept,)
    assert now.merge(tmp_path / "1.1").same == 1
    (found,) = now.records()
    assert (found["key"], found["config"]["rules"], now.quarantined) == (kept, "1.1", [])
    (refused,) = now.merge(tmp_path / "0.9.jsonl").invalid
    assert "of rules '0.9', the folder has" in refused.reason
    with pytest.raises(ValueError, match=r"holds trials of rules '1\.1'"):
        Store.open(tmp_path / "1.1", benchmarks.leaderboard.RULES)
    # of other rules than these, nothing is past
    (alien,) = Store.open(tmp_path / "other", RULES).merge(tmp_path / "1.1.jsonl").invalid
    assert "of rules '1.1'" in alien.reason


@pytest.mark.parametrize("name", ["trials.jsonl", "trials.jsonl.gz"])
def test_an_archive_brings_all_records_back(tmp_path: Path, name: str) -> None:
    ours, theirs = (Store.open(tmp_path / part, RULES) for part in ("ours", "theirs"))
    keys = {write(theirs, number) for number in range(3)}
    archive = tmp_path / name
    assert theirs.export(archive) == 3
    first = archive.read_bytes()
    theirs.export(archive)
    assert archive.read_bytes() == first
    assert set(ours.merge(archive).copied) == keys
    assert [snapshot(store.folder / "trials") for store in (ours, theirs)].count(
        snapshot(ours.folder / "trials")
    ) == 2
    assert ours.merge(archive).same == 3


def test_a_damaged_archive_gives_what_is_whole(tmp_path: Path) -> None:
    ours, theirs = (Store.open(tmp_path / part, RULES) for part in ("ours", "theirs"))
    for number in range(3):
        write(theirs, number)
    archive = tmp_path / "trials.jsonl"
    theirs.export(archive)
    lines = archive.read_bytes().splitlines(keepends=True)
    archive.write_bytes(lines[0].replace(b'"date":"2', b'"date":"3') + lines[1] + lines[2][:-40])
    report = ours.merge(archive)
    assert [entry.name for entry in report.invalid] == ["line 1", "line 3"]
    assert "edited by hand" in report.invalid[0].reason
    assert "half-written" in report.invalid[1].reason
    assert len(report.copied) == 1
    cut = tmp_path / "cut.jsonl.gz"
    theirs.export(cut)
    cut.write_bytes(cut.read_bytes()[:-20])
    with pytest.raises(OSError, match="its compression is damaged"):
        ours.merge(cut)
