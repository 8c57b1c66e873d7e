"""Several processes: those of a run find each other and see a lost one; workers end with theirs."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection

import jax

from natgrad_flax.arguments.scalars import check_integer

_SIGNS = ("gloo", "nccl", "connection closed by peer", "connection reset", "coordination")


class LostPeerError(RuntimeError):
    """Another process of the run has ended, or cannot be reached.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from natgrad_flax.devices import LostPeerError, lost_peers
      >>> try:
      ...     with lost_peers():
      ...         total = jax.block_until_ready(jnp.ones(3).sum())  # a step of the run
      ... except LostPeerError:
      ...     print("start all processes anew: they go on from the last checkpoint")
      >>> issubclass(LostPeerError, RuntimeError)
      True
    """


def connect(
    coordinator: str,
    num_processes: int,
    process_id: int,
    *,
    timeout: int = 30,
    start_timeout: int = 300,
) -> None:
    """Joins the processes of a run; to be called by each of them before JAX is used otherwise.

    ``jax.distributed.initialize`` with a time after which a lost process is an error in all others.
    One that ends, for example because it is killed, closes its connections: the next collective of
    the others on CPUs raises at once. One that hangs or whose machine is gone sends no heartbeats:
    after ``timeout`` seconds, and at most 5 more, JAX ends the others with a message and SIGABRT.
    After either start all processes anew, and go on from the last checkpoint.

    Args:
      coordinator: "host:port" of process 0, free there and reachable for all.
      num_processes: of the run.
      process_id: 0 to num_processes - 1, another one for each process.
      timeout: seconds without a heartbeat after which a process counts as lost; as long again a
        process waits for the others at its own end.
      start_timeout: seconds to wait for all processes to join.

    Raises:
      ValueError: an address without a port, a number out of range.
      RuntimeError: this process has joined a run before, or JAX was used before.

    Example:
      >>> import jax
      >>> from natgrad_flax.devices import connect

      It waits for the other process, so this is not run:

      >>> connect("host0:9911", num_processes=2, process_id=0)  # doctest: +SKIP
      >>> jax.process_count()  # doctest: +SKIP
      2
    """
    host, colon, port = str(coordinator).rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise ValueError(f'coordinator must be "host:port", got {coordinator!r}')
    check_integer("num_processes", num_processes, 1)
    check_integer("process_id", process_id, 0)
    if process_id >= num_processes:
        raise ValueError(
            f"process_id must be below num_processes = {num_processes}, got {process_id}"
        )
    check_integer("timeout", timeout, 1)
    check_integer("start_timeout", start_timeout, 1)
    if jax.distributed.is_initialized():
        raise RuntimeError("this process has joined a run before; connect is called once")
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        initialization_timeout=start_timeout,
        heartbeat_timeout_seconds=timeout,
        shutdown_timeout_seconds=timeout,
    )


@contextmanager
def lost_peers() -> Iterator[None]:
    """Turns the errors of collectives, which name sockets, into one that says what happened.

    Computations run on after their call returns, so the results should be waited for
    (``jax.block_until_ready``) inside.

    Raises:
      LostPeerError: a collective inside failed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from natgrad_flax.devices import lost_peers
      >>> with lost_peers():
      ...     total = jax.block_until_ready(jnp.ones(3).sum())  # a step of the run
      >>> float(total)
      3.0
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        text = str(error).lower()
        if jax.process_count() == 1 or not any(sign in text for sign in _SIGNS):
            raise
        raise LostPeerError(
            f"process {jax.process_index()} of {jax.process_count()} lost another one, which ended "
            "or cannot be reached: start all processes anew, and go on from the last checkpoint"
        ) from error


@contextmanager
def workers() -> Iterator[Callable[[int], ProcessPoolExecutor]]:
    """Gives what makes pools of so many processes, which end with the context and this process.

    They end whatever they are doing, and are waited for. They are spawned, because JAX does not
    survive a fork, and the keyboard interrupts this process alone.

    Example:
      >>> from natgrad_flax.processes import workers

      It starts processes, so this is not run:

      >>> with workers() as new_pool:  # doctest: +SKIP
      ...     print(*new_pool(2).map(abs, [-1, 2]))
      1 2
    """
    context = get_context("spawn")
    # readable once its other end is closed, which the death of this process does, too
    lifeline, hold = context.Pipe(duplex=False)
    pools: list[ProcessPoolExecutor] = []

    def new_pool(jobs: int) -> ProcessPoolExecutor:
        pools.append(ProcessPoolExecutor(jobs, context, _end_with, (lifeline,)))
        return pools[-1]

    try:
        yield new_pool
    finally:
        hold.close()
        for pool in pools:
            pool.shutdown(cancel_futures=True)
        lifeline.close()


def _end_with(lifeline: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        lifeline.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
