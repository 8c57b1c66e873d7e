"""Each trial runs once, timed ones first; errors and interruptions lose nothing; what is shown."""

import errno
import io
import os
import signal
import time
from pathlib import Path

import pytest
from rich.console import Console
from sleeping_trials import events, make_configs

from benchmarks.leaderboard import torture
from benchmarks.leaderboard.progress import Display, Durations, duration, label
from benchmarks.leaderboard.records import trial_key
from benchmarks.leaderboard.runner import run
from benchmarks.leaderboard.store import StorageError, Store

pytestmark = pytest.mark.usefixtures("own_machine")


def test_runs_each_trial_once_and_timed_ones_first(tmp_path: Path, store: Store) -> None:
    configs = make_configs(tmp_path, 6)
    summary = run([*configs, *configs[:2]], store, torture.execute)
    assert (summary.finished, summary.resumed, summary.elsewhere) == (6, 0, 0)
    assert summary.complete
    assert 0 < summary.trial_seconds <= summary.seconds
    keys = [trial_key(config) for config in configs]
    order = [keys.index(key) for event, key, _ in events(tmp_path) if event == "start"]
    assert order == [0, 2, 4, 1, 3, 5]
    assert {record["key"] for record in store.records()} == set(keys)
    again = run(configs, store, torture.execute)
    assert (again.finished, again.resumed) == (0, 6)
    assert len(events(tmp_path)) == 12
    assert not list(store.folder.rglob(".*"))


def test_stage_after_stage(tmp_path: Path, store: Store) -> None:
    configs = make_configs(tmp_path, 4)
    display = Display()
    run(configs[:2], store, torture.execute, display=display)
    summary = run(configs, store, torture.execute, display=display)
    assert (summary.finished, summary.resumed) == (2, 2)


def test_a_trial_that_raises_stops_no_other_and_is_tried_again(
    tmp_path: Path, store: Store
) -> None:
    configs = make_configs(tmp_path, 4)

    def fail_once(config: dict) -> dict:
        if config["seed"] == 0:
            raise ZeroDivisionError("no digits left")
        return torture.execute(config)

    summary = run(configs, store, fail_once)
    (failure,) = summary.failed
    assert failure.key == trial_key(configs[0])
    assert failure.reason == "ZeroDivisionError: no digits left"
    assert "sleep: sleep, seed 0: ZeroDivisionError" in str(failure)
    assert "fail_once" in failure.details
    assert summary.finished == 3
    assert not summary.complete
    assert "1 failed" in str(summary)
    again = run(configs, store, torture.execute)
    assert (again.finished, again.resumed, again.failed) == (1, 3, [])


@pytest.mark.parametrize(
    ("result", "reason"), [({"facts": {}}, "lacks outcome"), ({1: set()}, "lacks"), (None, "")]
)
def test_a_result_that_is_none_fails_its_trial(
    tmp_path: Path, store: Store, result: object, reason: str
) -> None:
    summary = run(make_configs(tmp_path, 2), store, lambda _: result)
    assert len(summary.failed) == 2
    assert all(reason in failure.reason for failure in summary.failed)
    assert store.records() == []


def test_a_damaged_record_is_named_and_runs_again(tmp_path: Path, store: Store) -> None:
    configs = make_configs(tmp_path, 3)
    run(configs, store, torture.execute)
    bad = trial_key(configs[1])
    store.path(bad).write_text('{"schema": 1,')
    summary = run(configs, Store.open(store.folder, torture.RULES), torture.execute)
    assert (summary.finished, summary.resumed) == (1, 2)
    (found,) = summary.quarantined
    assert bad in found.name
    assert "1 files quarantined" in str(summary)
    assert store.has(bad)


@pytest.mark.parametrize("jobs", [0, -1, 1.5, True, "2"])
def test_jobs_that_are_none(store: Store, jobs: object) -> None:
    with pytest.raises(ValueError, match="jobs must be an integer of at least 1"):
        run([], store, torture.execute, jobs=jobs)


def test_a_kind_that_is_none(tmp_path: Path, store: Store) -> None:
    configs = make_configs(tmp_path, 2)
    configs[1]["kind"] = "times"
    with pytest.raises(ValueError, match="kind is timed or structure, got 'times'"):
        run(configs, store, torture.execute)
    assert events(tmp_path) == []


def test_nothing_to_run(store: Store) -> None:
    assert run([], store, torture.execute).complete


def test_no_space_left_stops_the_run_and_keeps_what_is_finished(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = make_configs(tmp_path, 8)
    write, calls = Store.write, []

    def write_three(self: Store, config: dict, result: dict) -> dict:
        calls.append(config)
        if len(calls) <= 3:
            return write(self, config, result)
        with self._explained():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", write_three)
        with pytest.raises(StorageError, match="3 finished trials in it are kept: make room"):
            run(configs, store, torture.execute)
    summary = run(configs, store, torture.execute)
    assert (summary.finished, summary.resumed) == (5, 3)


def test_an_interrupted_trial_is_left_out_and_the_others_are_kept(
    tmp_path: Path, store: Store
) -> None:
    # a process started in the background ignores the keyboard, and so would this one
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _interrupt_third(tmp_path, store)
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt_third(tmp_path: Path, store: Store) -> None:
    configs = make_configs(tmp_path, 6)

    def interrupt_third(config: dict) -> dict:
        if config["seed"] == 4:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)
        return torture.execute(config)

    summary = run(configs, store, interrupt_third)
    assert summary.interrupted
    assert not summary.complete
    assert (summary.finished, summary.failed) == (2, [])
    assert "run the same command again" in str(summary)
    assert not list(store.folder.rglob(".*"))
    again = run(configs, store, torture.execute)
    assert (again.finished, again.resumed) == (4, 2)


def test_an_interruption_while_a_record_is_written_loses_nothing(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = make_configs(tmp_path, 4)
    write, calls = Store.write, []

    def interrupted_write(self: Store, config: dict, result: dict) -> dict:
        calls.append(config)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(self, config, result)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", interrupted_write)
        summary = run(configs, store, torture.execute)
    assert summary.interrupted
    assert len(store.records()) == summary.finished == 2
    # the trial was not run again for it
    assert len([event for event, _, _ in events(tmp_path) if event == "start"]) == 2


def test_durations_know_the_nearest_trials() -> None:
    durations = Durations()
    kind = {"kind": "timed", "workload": "digits"}
    assert durations.expected(("timed", "digits", "sgd")) is None
    for contestant, seconds in (("sgd", 1.0), ("sgd", 3.0), ("exact", 8.0)):
        durations.add({**kind, "contestant": contestant}, seconds)
    durations.add({"kind": "timed", "workload": "mnist", "contestant": "sgd"}, 40.0)
    durations.add({"kind": "structure", "workload": "mnist", "contestant": "sgd"}, 8.0)
    assert durations.expected(("timed", "digits", "sgd")) == 2.0
    assert durations.expected(("timed", "digits", "adam")) == 4.0
    assert durations.expected(("timed", "teacher", "adam")) == 13.0
    assert durations.expected(("other", "teacher", "adam")) == 12.0


def test_time_left_counts_timed_trials_one_by_one(tmp_path: Path) -> None:
    display, configs = Display(), make_configs(tmp_path, 8)
    with display.stage(configs, done=0, lanes=2):
        assert display.seconds_left() is None
        display.durations.add(configs[0], 3.0)
        display.durations.add(configs[1], 1.0)
        assert display.seconds_left() == 4 * 3.0 + 4 * 1.0 / 2
        display.ended("key", configs[0], "reached")
        assert display.seconds_left() == 3 * 3.0 + 4 * 1.0 / 2


def test_durations_of_finished_trials_are_read_back(tmp_path: Path, store: Store) -> None:
    configs = make_configs(tmp_path, 1)
    run(configs, store, torture.execute)
    display = Display()
    run(configs, store, torture.execute, display=display)
    assert display.durations.expected(("timed", "sleep", "sleep")) == configs[0]["seconds"]


def test_lines_where_there_is_no_terminal(tmp_path: Path, store: Store) -> None:
    console = Console(file=io.StringIO(), width=200)
    run(make_configs(tmp_path, 3), store, torture.execute, display=Display(console))
    first, *lines, last = console.file.getvalue().splitlines()
    assert first == "0 of 3 trials are finished, 3 to run"
    assert lines[0].startswith("[1/3] sleep: sleep, seed 0: reached in ")
    assert lines[0].endswith(" left")
    assert last.startswith("[3/3] sleep: sleep, seed 1: reached in ")
    assert not last.endswith(" left")


def test_a_bar_on_a_terminal(tmp_path: Path, store: Store) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    run(make_configs(tmp_path, 3), store, torture.execute, display=Display(console))
    shown = console.file.getvalue()
    assert "now sleep: sleep, seed 0" in shown
    assert "3/3" in shown
    assert "left" in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.02, "20 ms"), (1.25, "1.2 s"), (30, "30 s"), (120, "2 min"), (7200, "2.0 h")],
)
def test_durations_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_trials_in_words() -> None:
    config = {"workload": "digits", "contestant": "sgd", "learning_rate": 0.01, "seed": 3}
    assert label(config) == "digits: sgd, rate 0.01, seed 3"
    assert label(config | {"learning_rate": None}) == "digits: sgd, seed 3"
