"""Trials on the disk: whole or not there, never lost, and a bad file stops nothing."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from store_records import RULES, make_config, make_result, snapshot, spoil_half, write

from benchmarks.leaderboard import locks, store
from benchmarks.leaderboard.records import trial_key
from benchmarks.leaderboard.store import MANIFEST, StorageError, Store
from ntk_analysis.results import content_hash

CHECKOUT = Path(store.__file__).parents[2]


@pytest.fixture
def trials(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "out", RULES)


def test_a_record_comes_back_as_it_was(trials: Store) -> None:
    config, result = make_config(3, target=None), make_result()
    result["outcome"]["curve"] = (1, 2.5, math.nan, -math.inf)
    record = trials.write(config, result)
    assert record["config"] == config
    assert record["outcome"]["curve"] == [1, 2.5, None, None]
    assert {
        "schema": 1,
        "command": "python -m x",
        "facts": {"title": "T"},
    }.items() <= record.items()
    again = Store.open(trials.folder, RULES)
    assert again.read(record["key"]) == record
    assert again.records() == [record]
    assert again.has(record["key"])
    path = trials.folder / "trials" / record["key"][:2] / f"{record['key']}.json"
    assert json.loads(path.read_text()) == record
    manifest = json.loads((trials.folder / MANIFEST).read_text())
    assert manifest["rules"] == RULES
    assert manifest.keys() == {"rules", "created"}


def test_key_and_digest_are_the_content_hash_of_the_project(trials: Store) -> None:
    config = make_config(1, name="é", nested={"b": [1, 2.5, None], "a": True})
    assert trial_key(config) == content_hash([config])
    assert trial_key(dict(reversed(config.items()))) == trial_key(config)
    assert trial_key({**config, "seed": 2}) != trial_key(config)
    record = trials.write(config, make_result())
    stated = record.pop("digest")
    assert stated == content_hash([record])


def test_a_trial_that_is_not_there(trials: Store) -> None:
    key = trial_key(make_config())
    assert not trials.has(key)
    assert trials.read(key) is None
    assert trials.records() == []
    assert trials.quarantined == []


@pytest.mark.parametrize("key", ["", "abc", "../" * 20 + "abcd", "A" * 64])
def test_what_is_no_key(trials: Store, key: str) -> None:
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        trials.read(key)


@pytest.mark.parametrize("lacking", ["facts", "outcome", "command"])
def test_a_result_without_a_part_is_refused(trials: Store, lacking: str) -> None:
    result = make_result()
    del result[lacking]
    with pytest.raises(ValueError, match=f"lacks {lacking}"):
        trials.write(make_config(), result)
    assert trials.records() == []


def test_what_json_cannot_hold_is_refused(trials: Store) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        trials.write(make_config(), {**make_result(), "outcome": {"x": object()}})
    with pytest.raises(TypeError, match="must be dictionaries"):
        trials.write(make_config(), {**make_result(), "outcome": "reached"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        trials.write(make_config(rate=math.nan), make_result())
    with pytest.raises(ValueError, match=r"rules '0\.9' does not belong"):
        trials.write(make_config() | {"rules": "0.9"}, make_result())
    assert trials.records() == []
    assert not list(trials.folder.rglob(".*"))


def spoil_number(path: Path) -> None:
    path.write_text(path.read_text().replace("0.5", "0.4"))


def spoil_config(path: Path) -> None:
    # with a digest that fits, so that only the key can tell
    record = json.loads(path.read_text())
    record["config"]["seed"] += 1
    del record["digest"]
    path.write_text(json.dumps({**record, "digest": content_hash([record])}))


def spoil_schema(path: Path) -> None:
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))


def spoil_rules(path: Path) -> None:
    record = json.loads(path.read_text())
    record["config"]["rules"] = "0.9"
    record["key"] = trial_key(record["config"])
    del record["digest"]
    path.unlink()
    other = path.parents[1] / record["key"][:2] / f"{record['key']}.json"
    other.parent.mkdir(exist_ok=True)
    other.write_text(json.dumps({**record, "digest": content_hash([record])}))


def spoil_facts(path: Path) -> None:
    record = json.loads(path.read_text())
    del record["facts"], record["digest"]
    path.write_text(json.dumps({**record, "digest": content_hash([record])}))


def spoil_digest(path: Path) -> None:
    record = json.loads(path.read_text())
    del record["digest"]
    path.write_text(json.dumps(record))


SPOILED = {
    "half-written": (spoil_half, "half-written"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "zeros": (lambda path: path.write_bytes(b"\0" * 512), "empty"),
    "bytes": (lambda path: path.write_bytes(b"\xff\xfe\xfa"), "not JSON"),
    "list": (lambda path: path.write_text("[1]"), "no object"),
    "number edited": (spoil_number, "edited by hand"),
    "not finite": (
        lambda path: path.write_text(path.read_text().replace("0.5", "NaN")),
        "not finite",
    ),
    "config edited": (spoil_config, "not that of its config"),
    "other schema": (spoil_schema, "of schema 2"),
    "other rules": (spoil_rules, "of rules '0.9'"),
    "no facts": (spoil_facts, "incomplete"),
    "no digest": (spoil_digest, "edited by hand"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_bad_file_is_quarantined_named_and_run_again(trials: Store, name: str) -> None:
    spoil, reason = SPOILED[name]
    good, bad = write(trials, 1), write(trials, 2)
    spoil(trials.path(bad))
    assert [record["key"] for record in trials.records()] == [good]
    (found,) = trials.quarantined
    assert reason in found.reason
    assert found.name.startswith("trials/")
    assert found.name in str(found)
    assert found.place is not None
    assert found.place.exists()
    assert reason in found.place.with_name(found.place.name + ".txt").read_text()
    assert not trials.has(bad)
    # once: it is not there any more
    assert len(trials.records()) == 1
    assert len(trials.quarantined) == 1
    assert write(trials, 2) == bad
    assert trials.has(bad)


def test_has_and_read_quarantine_too(trials: Store) -> None:
    for seed, ask in enumerate((trials.has, trials.read)):
        key = write(trials, seed)
        spoil_half(trials.path(key))
        assert not ask(key)
        assert len(trials.quarantined) == seed + 1


def test_the_same_trial_quarantined_twice_keeps_both_files(trials: Store) -> None:
    for _ in range(2):
        spoil_half(trials.path(write(trials, 0)))
        assert trials.records() == []
    first, second = (found.place for found in trials.quarantined)
    assert first != second
    assert first is not None
    assert first.exists()


def test_a_record_under_the_name_of_another(trials: Store) -> None:
    one, other = write(trials, 1), write(trials, 2)
    trials.path(one).write_bytes(trials.path(other).read_bytes())
    assert [record["key"] for record in trials.records()] == [other]


def test_a_file_that_became_valid_again_is_not_taken_away(trials: Store) -> None:
    # as when another process quarantined it and ran the trial again after we had read it
    key = write(trials, 1)
    assert trials._quarantine(trials.path(key)) == trials.read(key)
    assert trials.quarantined == []


def test_a_bad_file_that_cannot_be_moved_is_named(
    trials: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = write(trials, 1)
    spoil_half(trials.path(key))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert trials.records() == []
    (found,) = trials.quarantined
    assert found.place is None
    assert "left where it is" in str(found)
    assert trials.path(key).exists()


def test_other_rules_are_refused_and_nothing_is_touched(trials: Store) -> None:
    write(trials, 1)
    before = snapshot(trials.folder)
    with pytest.raises(ValueError, match=r"rules '1\.0', and this .* '1\.1'.* another --out"):
        Store.open(trials.folder, "1.1")
    assert snapshot(trials.folder) == before


@pytest.mark.parametrize("text", ["", "[]", '{"created": "now"}', "{"])
def test_a_damaged_manifest_is_refused(trials: Store, text: str) -> None:
    (trials.folder / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match="not the manifest of a leaderboard; choose another --out"):
        Store.open(trials.folder, RULES)


def test_a_file_for_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is not a folder"):
        Store.open(tmp_path / "file", RULES)
    with pytest.raises(StorageError, match=r"cannot write to .*file/below"):
        Store.open(tmp_path / "file" / "below", RULES)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_all_as_it_was(
    trials: Store, monkeypatch: pytest.MonkeyPatch, number: int, where: str
) -> None:
    for seed in range(3):
        write(trials, seed)
    before = snapshot(trials.folder)

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if where == "fsync" else (Path, "replace")), fail)
        with pytest.raises(StorageError) as caught:
            write(trials, 9)
    sentence = str(caught.value)
    assert str(trials.folder) in sentence
    assert os.strerror(number) in sentence
    assert "the 3 finished trials in it are kept" in sentence
    assert ("make room" in sentence) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert snapshot(trials.folder) == before
    write(trials, 9)
    assert len(trials.records()) == 4


def test_a_claim_is_alone_until_it_ends(trials: Store) -> None:
    key, other = trial_key(make_config(1)), trial_key(make_config(2))
    second = Store.open(trials.folder, RULES)
    with trials.claim(key) as mine:
        assert mine
        with second.claim(key) as theirs:
            assert not theirs
        with second.claim(other) as free:
            assert free
        # opening a folder clears away locks of the dead only
        Store.open(trials.folder, RULES)
        with second.claim(key) as theirs:
            assert not theirs
    with second.claim(key) as theirs:
        assert theirs
    assert not list(trials.folder.rglob(".*"))


def test_a_claim_ends_with_an_error(trials: Store) -> None:
    key = trial_key(make_config())
    with pytest.raises(KeyError), trials.claim(key):
        raise KeyError
    with trials.claim(key) as mine:
        assert mine


CLAIM_AND_WRITE = """
import sys, time
from pathlib import Path
from benchmarks.leaderboard import locks, store
target = store.Store.open(Path(sys.argv[1]), "1.0")
with target.claim(sys.argv[2]) as mine:
    temporary, handle = store._open_temporary(target.path(sys.argv[2]))
    print(mine, temporary, flush=True)
    time.sleep(60)
"""


def test_a_killed_process_leaves_no_claim_and_no_file(trials: Store) -> None:
    key = trial_key(make_config())
    command = [sys.executable, "-c", CLAIM_AND_WRITE, str(trials.folder), key]
    with subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        mine, temporary = process.stdout.readline().split()
        assert mine == "True"
        with trials.claim(key) as ours:
            assert not ours
        Store.open(trials.folder, RULES)
        assert Path(temporary).exists()
        process.send_signal(signal.SIGKILL)
    assert Path(temporary).exists()
    with trials.claim(key) as ours:
        assert ours
    Store.open(trials.folder, RULES)
    assert not list(trials.folder.rglob(".*"))
    assert trials.records() == []


def test_a_lock_file_that_was_removed_while_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the first holder removes the file between our opening and our lock: that lock is worth nothing
    path, flock, calls = tmp_path / "lock", locks.fcntl.flock, []

    def remove_first(handle: int, operation: int) -> None:
        if not calls:
            path.unlink()
        calls.append(operation)
        flock(handle, operation)

    monkeypatch.setattr(locks.fcntl, "flock", remove_first)
    handle = locks.acquire(path)
    assert len(calls) == 2
    assert handle is not None
    assert locks.acquire(path) is None
    os.close(handle)


def test_the_machine_is_shared_by_untimed_trials_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = tmp_path / locks.MACHINE_LOCK

    def free(shared: bool) -> bool:
        handle = locks.acquire(path, create=False, shared=shared)
        if handle is None:
            return False
        os.close(handle)
        return True

    with locks.machine():
        assert not free(shared=True)
        assert not free(shared=False)
    with locks.machine(shared=True), locks.machine(shared=True):
        assert free(shared=True)
        assert not free(shared=False)
    assert free(shared=False)


def test_the_store_does_not_import_jax() -> None:
    # a runner that starts at once is what makes a hundred kills a matter of minutes
    code = "import sys, benchmarks.leaderboard.torture; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, check=False).returncode == 0
