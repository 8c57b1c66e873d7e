"""Trials on a Dask cluster: workers run them, this process stores them as they come.

Timed trials still run one at a time on each machine: every worker takes the lock of its machine
(``lanes.perform``). A worker that dies makes Dask run its trial elsewhere. All workers of a run
must have the same code and environment, because times on unlike machines do not compare: one run
for each kind of machine, and ``Store.merge`` for their folders.

Start workers in a checkout, so that they import the same sources (``WORKER``). Schedulers and
workers run any code of whoever reaches their ports, and Dask opens them on all interfaces unless it
is told otherwise: the commands here name the loopback.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.leaderboard.lanes import (
    Execute,
    Identity,
    Lanes,
    RefusedError,
    Result,
    perform,
)

if TYPE_CHECKING:
    from distributed import Client

LOCAL = "local"
SCHEDULER = "python -m dask scheduler --host 127.0.0.1 --dashboard-address 127.0.0.1:0"
WORKER = (
    "python -m dask worker ADDRESS --host 127.0.0.1 --dashboard-address 127.0.0.1:0 --nthreads 1"
)
"""How to start a cluster that other machines cannot reach."""

CONNECT_SECONDS = 10.0
WORKER_SECONDS = 30.0
"""How long to wait for a scheduler to answer, and for the first of its workers."""

_REFRESH_SECONDS = 2.0

# a thread of Dask samples the stack of each task many times a second, beside what is timed
_SETTINGS = {"distributed.worker.profile.enabled": False}


@contextmanager
def lanes(
    scheduler: str, execute: Execute, jobs: int, identity: Identity | None = None
) -> Iterator[Lanes]:
    """Lanes on a cluster, for ``runner.run``.

    Args:
      scheduler: an address, or "local" for worker processes of this machine.
      execute: runs one trial; workers import it.
      jobs: workers of a local cluster.
      identity: "code" and "environment" of the process that calls it, to compare with a config's.

    Raises:
      ValueError: Dask is not installed, no scheduler or no worker answers, or workers differ.
    """
    with _connected(scheduler, jobs) as client:
        _agreed(client, identity)
        executor = client.get_executor(pure=False)
        try:
            begin = partial(executor.submit, _on_worker, execute, identity)
            yield Lanes(lambda config: begin(dict(config)), _Width(client))
        finally:
            with contextlib.suppress(Exception):  # of a scheduler that is gone
                executor.shutdown(wait=False)


def common_identity(scheduler: str, identity: Identity) -> dict[str, Any]:
    """What ``identity`` returns on the workers of a cluster, for the configs of its trials.

    Raises:
      ValueError: as ``lanes``.
    """
    with _connected(scheduler, 1) as client:
        return _agreed(client, identity)


def exposure(scheduler: str) -> str:
    """What an address of a scheduler means for who may run code there; "" for nothing to say."""
    protocol, _, place = scheduler.rpartition("://")
    host = place.rpartition(":")[0].strip("[]")
    if scheduler == LOCAL or protocol in ("tls", "wss", "inproc") or host == "localhost":
        return ""
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return ""
    return (
        f"whoever reaches {scheduler} or one of its workers runs any code there, without a "
        "password: keep them in a private network, or start them with TLS and a tls:// address"
    )


@contextmanager
def _connected(scheduler: str, jobs: int) -> Iterator[Client]:
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError:
        raise ValueError(
            "--scheduler needs Dask, which is not installed: pip install 'natgrad[cluster]'"
        ) from None
    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set(_SETTINGS))
        if scheduler == LOCAL:
            address = stack.enter_context(
                LocalCluster(
                    n_workers=jobs,
                    threads_per_worker=1,
                    processes=True,
                    host="127.0.0.1",
                    dashboard_address="127.0.0.1:0",  # two runs must not ask for one port
                    memory_limit=0,
                    silence_logs=logging.ERROR,
                )
            )
        else:
            address = scheduler
        try:
            client = stack.enter_context(Client(address, timeout=CONNECT_SECONDS))
        # a TypeError: a protocol that lacks certificates, or its package
        except (OSError, ValueError, TypeError, TimeoutError) as error:
            raise ValueError(
                f"no Dask scheduler answers at {scheduler!r} ({error}); start one with "
                f"`{SCHEDULER}`, give its address as tcp://HOST:PORT, or say local"
            ) from None
        try:
            client.wait_for_workers(1, timeout=WORKER_SECONDS)
        except TimeoutError:
            raise ValueError(
                f"the scheduler at {scheduler!r} has no workers; start some in a checkout with "
                f"`{WORKER.replace('ADDRESS', scheduler)}`"
            ) from None
        yield client


def _agreed(client: Client, identity: Identity | None) -> dict[str, Any]:
    """What all workers say of themselves; ValueError where they differ or lack our sources."""
    try:
        answers = client.run(_answer, identity)
    except Exception as error:
        raise ValueError(
            f"the workers cannot import the leaderboard ({error}); start them in a checkout of the "
            f"same commit, with `{WORKER}`"
        ) from None
    (first, expected), *others = sorted(answers.items())
    for worker, found in others:
        difference = differences(expected, found)
        if difference:
            raise ValueError(
                f"worker {worker} differs from {first}: {difference}; times on unlike machines do "
                "not compare: run each kind by itself, and merge the folders"
            )
    return dict(expected)


def _answer(identity: Identity | None) -> dict[str, Any]:
    return {} if identity is None else dict(identity())


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """In which of its entries an identity differs from another, in words; "" where in none."""
    parts = []
    for name in sorted(expected.keys() | found.keys()):
        wanted, has = expected.get(name), found.get(name)
        if isinstance(wanted, Mapping) and isinstance(has, Mapping):
            inner = differences(wanted, has)
            parts += [inner] if inner else []
        elif wanted != has:
            parts.append(f"{name} is {_short(has)}, not {_short(wanted)}")
    return ", ".join(parts)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:16]}...'"


class _Width:
    """Two trials for each thread of a cluster, so that a worker need not wait for the next one."""

    def __init__(self, client: Client) -> None:
        self._client, self._width, self._asked = client, 2, float("-inf")

    def __call__(self) -> int:
        now = time.monotonic()
        if now - self._asked > _REFRESH_SECONDS:
            self._asked = now
            with contextlib.suppress(Exception):  # a lost scheduler is told by the trials
                self._width = max(2, 2 * sum(self._client.nthreads().values()))
        return self._width


def _on_worker(
    execute: Execute, identity: Identity | None, config: dict[str, Any]
) -> tuple[float, Result]:
    """Runs a trial on a worker.

    Raises:
      RefusedError: the worker is of other code or another environment than the config.
    """
    if identity is not None:
        found = identity()
        wanted = {name: config.get(name) for name in found}
        difference = differences(wanted, found)
        if difference:
            from distributed import get_worker

            raise RefusedError(
                f"worker {get_worker().address} refused a trial: {difference}; stop this worker, "
                "or run with the code and environment that it has, and start the command again"
            )
    return perform(execute, config)
