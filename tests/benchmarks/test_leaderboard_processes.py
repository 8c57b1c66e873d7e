"""Trials in processes and under several runners: timed ones alone, and kills lose nothing."""

import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console
from sleeping_trials import events, make_configs, wait_for

from benchmarks.leaderboard import locks, runner, torture
from benchmarks.leaderboard.progress import Display
from benchmarks.leaderboard.records import trial_key
from benchmarks.leaderboard.runner import run
from benchmarks.leaderboard.store import Store

CHECKOUT = Path(runner.__file__).parents[2]

pytestmark = pytest.mark.usefixtures("own_machine")


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
