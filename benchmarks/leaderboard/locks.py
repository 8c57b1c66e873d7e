"""Locks between processes that end with the process that holds them, however it ends.

A lock is flock(2) on an open file: the kernel gives it up when the last descriptor of that opening
is closed, which SIGKILL does too. Two openings exclude each other within one process as well.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

MACHINE_LOCK = "natgrad-leaderboard-timing.lock"
"""In the temporary folder of the machine; it stays there, empty."""


class MachineLockError(OSError):
    """The lock of the machine cannot be opened, so nothing timed may run here."""


def acquire(
    path: Path, *, create: bool = True, shared: bool = False, wait: bool = False
) -> int | None:
    """Opens a file and locks it; ``os.close`` of the descriptor gives the lock up.

    Args:
      path: of the lock file.
      create: make the file where it is not there; without it, a missing file is not locked.
      shared: hold it beside other shared holders; an exclusive one is alone.
      wait: until whoever holds it lets go.

    Returns:
      The descriptor; None where another holds the lock, or the file is missing.

    Raises:
      OSError: the file cannot be opened.
    """
    operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        try:
            handle = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o644)
        except FileNotFoundError:
            if create:
                raise
            return None
        try:
            fcntl.flock(handle, operation)
            if _is_still(path, handle):
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except BaseException:
            os.close(handle)
            raise
        # the last holder removed or renamed the file between our opening and our lock
        os.close(handle)


def _make(path: Path) -> None:
    # created apart from opening: in a sticky folder Linux refuses O_CREAT on a file of another user
    with suppress(FileExistsError):
        created = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.fchmod(created, 0o666)
        os.close(created)


def _is_still(path: Path, handle: int) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(handle))


@contextmanager
def held(path: Path, *, remove: bool = False, **how: bool) -> Iterator[bool]:
    """Holds a lock inside the context: True, or False where ``acquire`` gives None.

    Args:
      path: of the lock file.
      remove: the file at the end.
      how: as ``acquire`` has it.

    Raises:
      OSError: the file cannot be opened.
    """
    handle = acquire(path, **how)
    try:
        yield handle is not None
    finally:
        if handle is not None:
            # removed while it is locked, so that nobody can hold a lock on a file without a name
            if remove:
                path.unlink(missing_ok=True)
            os.close(handle)


@contextmanager
def machine(*, shared: bool = False, waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds this machine: alone for a timed trial, shared for those that are not timed.

    All runners of the machine that have the same temporary folder (TMPDIR) respect it, of all
    users and on all results folders.

    Args:
      shared: beside other shared holders, but never beside a timed trial.
      waiting: called once where the lock is held elsewhere, before waiting for it.

    Raises:
      MachineLockError: its file cannot be made or opened, or was removed meanwhile.
    """
    path = Path(tempfile.gettempdir()) / MACHINE_LOCK
    with ExitStack() as stack:
        try:
            _make(path)
            mine = stack.enter_context(held(path, create=False, shared=shared))
            if not mine:
                if waiting is not None:
                    waiting()
                mine = stack.enter_context(held(path, create=False, shared=shared, wait=True))
        except OSError as error:
            raise MachineLockError(
                f"the lock of this machine cannot be opened ({error.strerror}: {error.filename}); "
                "remove what is there, or set TMPDIR to another folder for all runners of the "
                "machine"
            ) from None
        if not mine:
            raise MachineLockError(
                f"{path} was removed while it was waited for; run the command again"
            )
        yield
