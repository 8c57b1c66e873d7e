"""A folder of trials: each in a file of its own, whole or not there, under the hash of its config.

Nothing here imports JAX (nor, for that reason, ``ntk_analysis``), so that a runner starts at once.

    leaderboard.json           the manifest: rules, created
    trials/<key[:2]>/<key>.json   a record each
    quarantine/                what was no valid record, with the reason in a .txt beside it
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.leaderboard import locks
from benchmarks.leaderboard.reading import read_file, read_lines
from benchmarks.leaderboard.records import (
    SCHEMA,
    NotARecordError,
    Record,
    belongs,
    digest,
    parse_record,
    read_record,
    trial_key,
)

MANIFEST = "leaderboard.json"

_PARTS = ("facts", "outcome", "command")
_KEY = re.compile(r"[0-9a-f]{64}")


class StorageError(OSError):
    """The folder cannot be written to: what happened, what is kept, what to do."""


@dataclass(frozen=True)
class Quarantined:
    """A file that was no valid record.

    Attributes:
      name: of the file where it was found, relative to its store.
      reason: why it is none.
      place: where it is now; None where it could not be moved.
    """

    name: str
    reason: str
    place: Path | None

    def __str__(self) -> str:
        where = f"moved to {self.place}" if self.place else "left where it is"
        return f"{self.name}: {self.reason}; {where}"


@dataclass(frozen=True)
class Merged:
    """What a merge did.

    Attributes:
      copied: keys of the records that were not here.
      same: number of records that were here already.
      kept: keys that both have, with other content: ours stay.
      invalid: files of the other folder that are no valid records, which are left there.
    """

    copied: tuple[str, ...]
    same: int
    kept: tuple[str, ...]
    invalid: tuple[Quarantined, ...]


@dataclass
class Store:
    """Trials in a folder; open one with ``Store.open``.

    Attributes:
      folder: that holds them.
      rules: version of the rules that all of its trials follow.
      quarantined: files that this object found to be no valid records.
    """

    folder: Path
    rules: str
    quarantined: list[Quarantined] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, rules: str) -> Store:
        """Opens a folder of trials, or makes one, and clears away what killed processes left.

        Raises:
          ValueError: it is no folder, holds trials of other rules, or its manifest is damaged.
          StorageError: it cannot be written to.
        """
        store = cls(Path(folder), rules)
        if os.path.lexists(store.folder) and not store.folder.is_dir():
            raise ValueError(f"{folder} is not a folder; choose another --out")
        if not os.path.lexists(store.folder / MANIFEST):
            store._write(store.folder / MANIFEST, {"rules": rules, "created": _now()})
        _check_rules(store.folder, rules, lambda found: found == rules)
        store._clear()
        return store

    def path(self, key: str) -> Path:
        """Where the record of a trial is, or will be.

        Raises:
          ValueError: not a key.
        """
        if not _KEY.fullmatch(key):
            raise ValueError(f"{key!r} is not the key of a trial: 64 hexadecimal digits")
        return self.folder / "trials" / key[:2] / f"{key}.json"

    def has(self, key: str) -> bool:
        """Whether a trial is finished: its record is there and valid."""
        return self.read(key) is not None

    def read(self, key: str) -> Record | None:
        """The record of a trial; None where it is not there, or was not valid (quarantined)."""
        return self._read(self.path(key))

    def records(self) -> list[Record]:
        """All valid records, by key; other files go to quarantine and into ``quarantined``."""
        found = map(self._read, self._files())
        return [record for record in found if record is not None]

    def _read(self, path: Path) -> Record | None:
        try:
            return read_record(path, self.rules)
        except FileNotFoundError:
            return None
        except NotARecordError:
            return self._quarantine(path)

    def write(self, config: Mapping[str, Any], result: Mapping[str, Any]) -> Record:
        """Stores a finished trial, whole or not at all.

        Args:
          config: of the trial.
          result: with "facts", "outcome" and "command"; numbers that are not finite become null.

        Returns:
          The record.

        Raises:
          ValueError: parts are missing, or the trial is of other rules.
          TypeError: JSON cannot hold the result, or a part of it is of the wrong type.
          StorageError: the folder cannot be written to; what it holds stays as it was.
        """
        missing = [part for part in _PARTS if part not in result]
        if missing:
            raise ValueError(f"the result of a trial lacks {', '.join(missing)}")
        if not all(isinstance(result[part], Mapping) for part in ("facts", "outcome")):
            raise TypeError("the facts and the outcome of a trial must be dictionaries")
        if config.get("rules") != self.rules:
            raise ValueError(
                f"a trial of rules {config.get('rules')!r} does not belong into {self.folder}, "
                f"which holds rules {self.rules!r}"
            )
        record = {
            "schema": SCHEMA,
            "key": trial_key(config),
            "config": dict(config),
            "date": _now(),
            **{part: result[part] for part in ("command", "facts", "outcome")},
        }
        # as it will be read: the digest must hold for what comes back
        record = json.loads(json.dumps(record), parse_constant=lambda _: None)
        record["digest"] = digest(record)
        self._write(self.path(record["key"]), record)
        return record

    @contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Owns a trial inside the context: True, or False where another process owns it.

        Ask ``has`` again once it is owned: its last owner may have finished it. The claim ends with
        the context or with the process.

        Raises:
          StorageError: the folder cannot be written to.
        """
        path = self.path(key).parent / f".{key}.lock"
        with ExitStack() as stack:
            with self._explained():
                path.parent.mkdir(parents=True, exist_ok=True)
                mine = stack.enter_context(locks.held(path, remove=True))
            yield mine

    def merge(self, other: Path) -> Merged:
        """Copies the records of elsewhere that are not here, as from another machine.

        Args:
          other: a folder of trials, or an archive that ``export`` wrote. It is only read.

        Raises:
          ValueError: it is this folder, holds no leaderboard, or one of other rules.
          OSError: the archive cannot be read.
          StorageError: this folder cannot be written to; what was copied stays.
        """
        copied, kept, invalid, same = [], [], [], 0
        for name, read in self._of_elsewhere(Path(other)):
            try:
                record = read()
            except (NotARecordError, FileNotFoundError) as error:
                invalid.append(Quarantined(name, str(error), None))
                continue
            ours = self.read(record["key"])
            if ours is None:
                self._write(self.path(record["key"]), record)
                copied.append(record["key"])
            elif ours["digest"] == record["digest"]:
                same += 1
            else:
                kept.append(record["key"])
        return Merged(tuple(copied), same, tuple(kept), tuple(invalid))

    def read_from(self, other: Path) -> list[Record]:
        """The valid records of another folder or of an archive; nothing is copied.

        Raises:
          ValueError, OSError: as ``merge``.
        """
        found = []
        for _, read in self._of_elsewhere(Path(other)):
            with contextlib.suppress(NotARecordError, FileNotFoundError):
                found.append(read())
        return found

    def _of_elsewhere(self, other: Path) -> Iterator[tuple[str, Callable[[], Record]]]:
        """Where the records of a folder or an archive stand, and what reads each."""
        if os.path.isfile(other):
            for number, line in enumerate(read_lines(other), start=1):
                yield f"line {number}", partial(parse_record, line, self.rules)
            return
        source = Store(other, self.rules)
        if not os.path.isfile(source.folder / MANIFEST):
            raise ValueError(f"{other} holds no leaderboard: it has no {MANIFEST}")
        if source.folder.resolve() == self.folder.resolve():
            raise ValueError(f"{other} is the folder to merge into; name another one")
        _check_rules(source.folder, self.rules, lambda found: belongs(found, self.rules))
        for path in source._files():
            name = str(path.relative_to(source.folder))
            yield name, partial(read_record, path, self.rules)

    def export(self, archive: Path) -> int:
        """Writes all valid records into one file of JSON lines, by key; how many.

        The same records give the same bytes. ``merge`` reads it.

        Args:
          archive: compressed by gzip where its name ends in ".gz".

        Raises:
          OSError: it cannot be written; what stood there stays.
        """
        records = self.records()
        lines = [json.dumps(record, separators=(",", ":")) + "\n" for record in records]
        data = "".join(lines).encode()
        path = Path(archive)
        self._replace(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
        return len(records)

    def _files(self) -> list[Path]:
        """Files that should be records, by name; hidden ones are locks and unfinished writes."""
        return sorted(p for p in self.folder.glob("trials/*/*") if not p.name.startswith("."))

    def _clear(self) -> None:
        """Removes locks and unfinished writes of processes that are gone."""
        for pattern in (".*.tmp", "trials/*/.*.tmp", "trials/*/.*.lock", "quarantine/.lock"):
            for path in self.folder.glob(pattern):
                # where nobody holds it; suppressed on a folder that may only be read
                with contextlib.suppress(OSError), locks.held(path, create=False, remove=True):
                    pass

    def _write(self, path: Path, document: Mapping[str, Any]) -> None:
        """Writes a document, whole or not at all."""
        # a line for each entry: short enough to look at, and fast to read
        lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in document.items()]
        self._replace(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())

    def _replace(self, path: Path, data: bytes) -> None:
        """Writes under a temporary name, which is locked meanwhile, to the disk; then renames."""
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary, handle = _open_temporary(path)
            try:
                with os.fdopen(handle, "wb", closefd=False) as file:
                    file.write(data)
                os.fsync(handle)
                temporary.replace(path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            finally:
                os.close(handle)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns an error of the file system into a sentence about this folder."""
        try:
            yield
        except OSError as error:
            number = sum(path.suffix == ".json" for path in self._files())
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            remedy = "make room" if full else "make it writable or choose another --out"
            raise StorageError(
                f"cannot write to {self.folder}: {error.strerror}; the {number} finished trials in "
                f"it are kept: {remedy}, and run the same command again to go on"
            ) from error

    def _quarantine(self, path: Path) -> Record | None:
        """Moves a file that is no record away; the record, where it meanwhile became one."""
        target: Path | None = None
        pen = self.folder / "quarantine"
        with ExitStack() as stack:
            try:
                pen.mkdir(exist_ok=True)
                alone = stack.enter_context(locks.held(pen / ".lock", wait=True, remove=True))
            except OSError:
                alone = False
            try:
                # another process may have moved it and have run the trial again since we read it
                return read_record(path, self.rules)
            except FileNotFoundError:
                return None
            except NotARecordError as error:
                reason = str(error)
            if alone:
                with contextlib.suppress(OSError):
                    target = path.replace(_free_name(pen, path))
                    target.with_name(target.name + ".txt").write_text(reason + "\n", "utf-8")
        self.quarantined.append(Quarantined(str(path.relative_to(self.folder)), reason, target))
        return None


def _check_rules(folder: Path, rules: str, fits: Callable[[object], bool]) -> None:
    path = folder / MANIFEST
    try:
        found = json.loads(read_file(path))["rules"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(
            f"{path} is not the manifest of a leaderboard; choose another --out, or remove the "
            "file if the trials beside it are yours"
        ) from None
    if not fits(found):
        raise ValueError(
            f"{folder} holds trials of rules {found!r}, and this program has rules {rules!r}: "
            "their results cannot stand beside each other; choose another --out"
        )


def _free_name(pen: Path, path: Path) -> Path:
    names = (pen / f"{path.stem}.{number}{path.suffix}" for number in count(1))
    return next(name for name in names if not name.exists())


def _open_temporary(path: Path) -> tuple[Path, int]:
    """A new locked file beside a path; the lock tells ``Store.open`` that its writer lives."""
    while True:
        temporary = path.parent / f".{path.stem}.{secrets.token_hex(4)}.tmp"
        handle = locks.acquire(temporary)
        if handle is not None:
            return temporary, handle


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
