"""Trials on a real Dask scheduler with two workers, one of which is killed at work."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from sleeping_trials import events, make_configs, wait_for

from benchmarks.leaderboard import cluster, runner, torture
from benchmarks.leaderboard.lanes import RefusedError
from benchmarks.leaderboard.records import trial_key
from benchmarks.leaderboard.runner import run
from benchmarks.leaderboard.store import Store

pytest.importorskip("distributed", reason="Dask is not installed: pip install 'natgrad[cluster]'")

CHECKOUT = Path(runner.__file__).parents[2]
# answers on every worker, from modules that each can import
IDENTITY = partial(dict, code="abc", environment={"device": "cpu: test", "jax": "0.10.2"})


@dataclass
class Cluster:
    """A scheduler and workers in processes of their own, on 127.0.0.1."""

    folder: Path
    processes: list[subprocess.Popen] = field(default_factory=list)

    @property
    def workers(self) -> list[subprocess.Popen]:
        return self.processes[1:]

    @property
    def address_file(self) -> Path:
        return self.folder / "scheduler.json"

    @property
    def address(self) -> str:
        return json.loads(self.address_file.read_text())["address"]

    def start(self, *arguments: str, cwd: Path = CHECKOUT) -> subprocess.Popen:
        command = [sys.executable, "-m", "dask", *arguments, "--host", "127.0.0.1"]
        command += ["--scheduler-file", str(self.address_file), "--no-dashboard"]
        environment = {**os.environ, "TMPDIR": str(self.folder)}
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def start_workers(self, number: int = 1, cwd: Path = CHECKOUT) -> None:
        for _ in range(number):
            self.start("worker", "--nthreads", "1", "--no-nanny", cwd=cwd)
        log = self.folder / "log"
        wait_for(lambda: log.read_text().count("Registered to") == number)


@contextmanager
def cluster_in(folder: Path) -> Iterator[Cluster]:
    found = Cluster(folder)
    try:
        found.start("scheduler", "--port", "0")
        wait_for(found.address_file.exists)
        yield found
    finally:
        for process in found.processes:
            process.kill()
            process.wait()


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[Cluster]:
    with cluster_in(tmp_path) as found:
        yield found


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """With two workers, of which the last test of these kills one."""
    with cluster_in(tmp_path_factory.mktemp("pair")) as found:
        found.start_workers(2)
        yield found


def started(tmp_path: Path) -> list[tuple[str, int]]:
    """Keys and processes of the trials begun so far."""
    return [(key, process) for event, key, process in events(tmp_path) if event == "start"]


def test_a_worker_of_other_code_refuses(pair: Cluster, store: Store, tmp_path: Path) -> None:
    environment = IDENTITY()["environment"]
    assert cluster.common_identity(pair.address, IDENTITY) == IDENTITY()
    good = make_configs(tmp_path, 2, code="abc", environment=environment)
    bad = make_configs(tmp_path, 2, code="other", environment={**environment, "jax": "0.11.0"})
    assert run(good, store, torture.execute, scheduler=pair.address, identity=IDENTITY).complete
    with pytest.raises(RefusedError) as caught:
        run(bad, store, torture.execute, scheduler=pair.address, identity=IDENTITY)
    sentence = str(caught.value)
    assert "worker tcp://127.0.0.1:" in sentence
    assert "code is 'abc', not 'other'" in sentence
    assert "jax is '0.10.2', not '0.11.0'" in sentence
    assert "device" not in sentence
    assert len(started(tmp_path)) == len(store.records()) == 2


def test_workers_that_differ_are_refused(pair: Cluster, store: Store, tmp_path: Path) -> None:
    def process() -> dict:  # local, and so sent by value
        import os

        return {"code": str(os.getpid()), "environment": {}}

    with pytest.raises(ValueError, match="differs from tcp://127") as caught:
        run(
            make_configs(tmp_path, 2),
            store,
            torture.execute,
            scheduler=pair.address,
            identity=process,
        )
    assert all(str(worker.pid) in str(caught.value) for worker in pair.workers)
    assert started(tmp_path) == []


def test_a_worker_killed_at_work_loses_nothing(pair: Cluster, store: Store, tmp_path: Path) -> None:
    configs = make_configs(tmp_path, 12, code="abc", environment=IDENTITY()["environment"])
    for config in configs:
        config["seconds"] = 0.25
    victims: list[tuple[str, int]] = []

    def kill_one() -> None:
        wait_for(lambda: len(started(tmp_path)) >= 3)
        while not victims:
            key, process = started(tmp_path)[-1]
            # stopped first, so that the trial is certainly in its hands when it dies
            os.kill(process, signal.SIGSTOP)
            if f"end {key} {process}" in torture.log_lines(tmp_path):
                os.kill(process, signal.SIGCONT)
            else:
                os.kill(process, signal.SIGKILL)
                victims.append((key, process))

    killer = threading.Thread(target=kill_one)
    killer.start()
    summary = run(configs, store, torture.execute, scheduler=pair.address, identity=IDENTITY)
    killer.join()
    ((key, victim),) = victims
    assert victim in {worker.pid for worker in pair.workers}
    wait_for(lambda: next(w for w in pair.workers if w.pid == victim).poll() is not None)
    assert (summary.finished, summary.failed, summary.complete) == (12, [], True)
    assert {record["key"] for record in store.records()} == set(map(trial_key, configs))
    assert store.quarantined == []
    # the trial in its hands ran again, and no other but those whose results it had not yet sent
    counts = Counter(name for name, _ in started(tmp_path))
    again = {name for name, count in counts.items() if count > 1}
    assert key in again
    assert max(counts.values()) == 2
    assert all((name, victim) in started(tmp_path) for name in again)
    assert torture._collisions(torture.log_lines(tmp_path), configs) == 0
    resumed = run(configs, store, torture.execute, scheduler=pair.address)
    assert (resumed.finished, resumed.resumed) == (0, 12)


def test_a_scheduler_without_workers_and_with_one_outside_of_a_checkout(
    scheduler: Cluster, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cluster, "WORKER_SECONDS", 0.2)
        with pytest.raises(ValueError, match="has no workers; start some in a checkout"):
            run(make_configs(tmp_path, 2), store, torture.execute, scheduler=scheduler.address)
    scheduler.start_workers(cwd=tmp_path)
    with pytest.raises(ValueError, match=r"cannot import the leaderboard .* in a checkout"):
        run(make_configs(tmp_path, 2), store, torture.execute, scheduler=scheduler.address)


def test_a_trial_that_raises_and_a_scheduler_that_dies(
    scheduler: Cluster, store: Store, tmp_path: Path
) -> None:
    scheduler.start_workers()
    configs = make_configs(tmp_path, 6)
    configs[0]["seconds"] = -1.0
    summary = run(configs, store, torture.execute, scheduler=scheduler.address)
    (failure,) = summary.failed
    assert failure.reason == "ValueError: sleep length must be non-negative"
    assert summary.finished == 5

    longer = [config | {"seconds": 5.0} for config in configs]

    def kill_scheduler() -> None:
        wait_for(lambda: len(started(tmp_path)) == 7)
        scheduler.processes[0].kill()

    killer = threading.Thread(target=kill_scheduler)
    killer.start()
    with pytest.raises(ValueError, match=r"scheduler is gone.* finished ones are kept"):
        run(longer, store, torture.execute, scheduler=scheduler.address)
    killer.join()
    assert len(store.records()) == 5
    assert not list(store.folder.rglob(".*"))


def test_a_local_cluster(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    configs = make_configs(tmp_path, 4)
    summary = run(configs, store, torture.execute, jobs=2, scheduler="local")
    assert (summary.finished, summary.complete) == (4, True)
    assert os.getpid() not in {process for _, process in started(tmp_path)}


@pytest.mark.parametrize("address", ["nonsense", "tcp://127.0.0.1:9"])
def test_no_scheduler_answers(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    with pytest.raises(ValueError, match=f"no Dask scheduler answers at '{address}'"):
        run(make_configs(tmp_path, 2), store, torture.execute, scheduler=address)


def test_dask_is_not_installed(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ValueError, match=r"not installed: pip install 'natgrad\[cluster\]'"):
        run(make_configs(tmp_path, 2), store, torture.execute, scheduler="local")


def test_differences_in_words() -> None:
    one = {"code": "a" * 64, "environment": {"jax": "1", "device": "cpu"}}
    assert cluster.differences(one, one) == ""
    other = {"code": "b" * 64, "environment": {"jax": "2", "device": "cpu", "cores": "2"}}
    text = cluster.differences(one, other)
    assert text == "code is 'bbbbbbbbbbbbbbb...', not 'aaaaaaaaaaaaaaa...', " + (
        "cores is '2', not None, jax is '2', not '1'"
    )
