"""Each trial runs once, timed ones alone; kills, errors and interruptions lose nothing."""

import errno
import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.leaderboard import locks, runner, torture
from benchmarks.leaderboard.progress import Display, Durations, duration, label
from benchmarks.leaderboard.runner import run
from benchmarks.leaderboard.store import StorageError, Store, trial_key

CHECKOUT = Path(runner.__file__).parents[2]


@pytest.fixture(autouse=True)
def _own_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks of this test alone, also in its processes."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store", torture.RULES)


def make_configs(tmp_path: Path, number: int) -> list[dict]:
    return torture.make_configs(number, tmp_path / torture.LOG)


def events(tmp_path: Path) -> list[tuple[str, str, int]]:
    split = [line.split() for line in torture.log_lines(tmp_path)]
    return [(event, key, int(process)) for event, key, process in split]


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened for too long"
        time.sleep(0.01)


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


def test_untimed_trials_run_in_processes_after_the_timed_ones(tmp_path: Path, store: Store) -> None:
    configs = make_configs(tmp_path, 12)
    summary = run(configs, store, torture.execute, jobs=2)
    assert summary.finished == 12
    timed = {trial_key(config) for config in configs if config["kind"] == "timed"}
    log = events(tmp_path)
    assert {process for _, key, process in log if key in timed} == {os.getpid()}
    assert os.getpid() not in {process for _, key, process in log if key not in timed}
    assert [key in timed for _, key, _ in log] == [True] * 12 + [False] * 12
    assert torture._collisions(torture.log_lines(tmp_path), configs) == 0


def test_a_process_that_dies_fails_its_trials_only(tmp_path: Path, store: Store) -> None:
    configs = [config | {"kind": "structure"} for config in make_configs(tmp_path, 6)]
    configs[0]["seconds"] = 60.0
    killed: list[int] = []

    def kill_the_first() -> None:
        key = trial_key(configs[0])
        wait_for(lambda: any(name == key for _, name, _ in events(tmp_path)))
        killed.append(next(process for _, name, process in events(tmp_path) if name == key))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_the_first)
    killer.start()
    summary = run(configs, store, torture.execute, jobs=2)
    killer.join()
    assert trial_key(configs[0]) in {failure.key for failure in summary.failed}
    assert len(summary.failed) <= 2
    assert all("died" in failure.reason for failure in summary.failed)
    assert summary.finished + len(summary.failed) == 6


# SIGINT is taken back: a process started in the background ignores it, and so do its children
RUN_IN_PROCESSES = """
import signal
import sys
from pathlib import Path
from benchmarks.leaderboard import runner, store, torture
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = Path(sys.argv[1])
    configs = torture.make_configs(4, folder / torture.LOG)
    configs = [config | {"kind": "structure", "seconds": 60.0} for config in configs]
    runner.run(configs, store.Store.open(folder / "store", torture.RULES), torture.execute, jobs=2)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_their_runner(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "program.py").write_text(RUN_IN_PROCESSES)
    command = [sys.executable, str(tmp_path / "program.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    with subprocess.Popen(command, cwd=CHECKOUT, env=environment) as process:
        wait_for(lambda: len(events(tmp_path)) == 2)
        process.send_signal(number)
    children = {process for _, _, process in events(tmp_path)}
    assert process.pid not in children

    def gone() -> bool:
        return not any(is_running(child) for child in children)

    wait_for(gone, seconds=10.0)


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # a zombie that init has yet to collect is dead


def test_a_trial_of_another_runner_is_waited_for(tmp_path: Path, store: Store) -> None:
    configs = make_configs(tmp_path, 4)
    held = trial_key(configs[0])
    other = Store.open(store.folder, torture.RULES)
    written = threading.Event()

    def finish_it() -> None:
        with other.claim(held) as mine:
            claimed.set()
            assert mine
            # the others do not wait for it
            wait_for(lambda: len(store.records()) == 3)
            other.write(configs[0], torture.execute(configs[0]))
            written.set()

    claimed = threading.Event()
    thread = threading.Thread(target=finish_it)
    thread.start()
    assert claimed.wait(10)
    console = Console(file=io.StringIO(), width=200)
    summary = run(configs, store, torture.execute, display=Display(console))
    thread.join()
    assert written.is_set()
    assert (summary.finished, summary.elsewhere, summary.complete) == (3, 1, True)
    assert len([key for event, key, _ in events(tmp_path) if (event, key) == ("start", held)]) == 1
    shown = console.file.getvalue()
    assert shown.count("waiting for 1 trials that other runners have in hand") == 1
    assert "finished by another runner" in shown


def test_a_trial_that_another_runner_gave_up_is_run_here(tmp_path: Path, store: Store) -> None:
    configs = make_configs(tmp_path, 4)
    other = Store.open(store.folder, torture.RULES)
    claimed = threading.Event()

    def give_up() -> None:
        with other.claim(trial_key(configs[0])):
            claimed.set()
            wait_for(lambda: len(store.records()) == 3)

    thread = threading.Thread(target=give_up)
    thread.start()
    assert claimed.wait(10)
    summary = run(configs, store, torture.execute)
    thread.join()
    assert (summary.finished, summary.elsewhere) == (4, 0)
    assert events(tmp_path)[-1][1] == trial_key(configs[0])


def test_a_timed_trial_waits_for_the_machine_and_says_so(tmp_path: Path, store: Store) -> None:
    (config, _) = make_configs(tmp_path, 2)
    console = Console(file=io.StringIO(), width=200)
    with locks.machine(shared=True):
        thread = threading.Thread(
            target=run,
            args=([config], store, torture.execute),
            kwargs={"display": Display(console)},
        )
        thread.start()
        wait_for(lambda: "another runner on this machine" in console.file.getvalue())
        assert events(tmp_path) == []
    thread.join()
    assert len(store.records()) == 1


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


@pytest.mark.parametrize("runners", [1, 2])
def test_kills_lose_nothing(runners: int) -> None:
    report = torture.torture(5, runners, seed=runners)
    assert report.passed, report
    assert report.kills == 5
    assert report.finished == report.trials >= 50
    console = Console(file=io.StringIO(), width=100)
    console.print(report.table())
    assert "passed" in console.file.getvalue()


@pytest.mark.parametrize("kills", [0, -3, 1.5, True])
def test_kills_that_are_none(kills: object) -> None:
    with pytest.raises(ValueError, match="kills must be an integer of at least 1"):
        torture.torture(kills)
    with pytest.raises(ValueError, match="runners must be an integer of at least 1"):
        torture.torture(1, kills)


def test_the_torture_sees_a_lost_and_a_corrupt_file(tmp_path: Path, store: Store) -> None:
    configs = make_configs(tmp_path, 4)
    run(configs, store, torture.execute)
    watch = torture._Watch(tmp_path)
    watch.look()
    assert (len(watch.seen), watch.lost, watch.corrupt) == (4, set(), set())
    lost, corrupt = (trial_key(config) for config in configs[:2])
    store.path(lost).unlink()
    store.path(corrupt).write_bytes(store.path(corrupt).read_bytes()[:300])
    watch.look()
    assert watch.lost == {lost, corrupt}
    assert watch.corrupt == {f"{corrupt}.json"}
    run(configs, store, torture.execute)
    assert len(list(store.folder.glob("quarantine/*.json"))) == 1
    again = torture._Watch(tmp_path)
    again.look()
    assert len(again.corrupt) == 1


def test_the_torture_sees_finished_work_done_again(tmp_path: Path, store: Store) -> None:
    configs = make_configs(tmp_path, 2)
    run(configs, store, torture.execute)
    watch = torture._Watch(tmp_path)
    watch.look()
    torture.execute(configs[0])
    watch.look()
    assert watch.restarted.total() == 1


def test_the_torture_counts_starts_and_collisions(tmp_path: Path) -> None:
    timed, untimed, other = (trial_key(config) for config in make_configs(tmp_path, 4)[:3])
    configs = make_configs(tmp_path, 4)
    fourth = trial_key(configs[3])
    assert configs[2]["kind"] == "timed"
    assert torture._repeated([f"start {timed} 1", f"start {timed} 2"], {1: timed}) == 0
    assert torture._repeated([f"start {timed} 1", f"start {timed} 2"], {}) == 1
    assert torture._repeated([f"start {timed} 1", f"start {timed} 2"], {1: untimed}) == 1

    def collisions(first: str, second: str) -> int:
        lines = [f"start {first} 1", f"start {second} 2", f"end {first} 1", f"end {second} 2"]
        return torture._collisions(lines, configs)

    assert collisions(untimed, fourth) == 0
    assert collisions(untimed, untimed) == 1
    assert collisions(timed, other) == 1
    assert collisions(timed, untimed) == 1
    assert collisions(untimed, timed) == 1
    # killed in its midst: no end, and no collision
    lines = [f"start {timed} 1", f"start {timed} 2", f"end {timed} 2"]
    assert torture._collisions(lines, configs) == 0
