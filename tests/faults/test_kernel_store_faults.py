"""Kernel stores that were damaged: what is lost is computed anew, and the numbers are right."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from fault_harness import Refused, Right, Warned, over

from ntk_analysis.kernel_store import open_store

NAMES, SIDE, BLOCK = ("ntk", "nngp"), 10, 4  # 3 x 3 blocks, of which 6 are computed
STARTS = range(0, SIDE, BLOCK)
HALF = [(i, j) for i in STARTS for j in STARTS if i <= j]
ALL = [(i, j) for i in STARTS for j in STARTS]


def reference() -> dict[str, np.ndarray]:
    """Symmetric kernels."""
    drawn = np.random.default_rng(0).normal(size=(len(NAMES), SIDE, SIDE))
    return {name: m + m.T for name, m in zip(NAMES, drawn, strict=True)}


def fill(
    store: Path, blocks: Sequence[tuple[int, int]] = HALF, most: int | None = None
) -> tuple[dict, int]:
    """Kernels from a store, of which missing blocks are computed, up to so many; how many were."""
    computed = 0
    with open_store(store, NAMES, (SIDE, SIDE), ["a test", len(blocks)], BLOCK) as target:
        for i, j in blocks[:most]:
            if not target.done[i // BLOCK, j // BLOCK]:
                values = [m[i : i + BLOCK, j : j + BLOCK] for m in reference().values()]
                target.write(i, j, values, mirror=blocks is HALF)
                computed += 1
        return {name: np.array(m) for name, m in target.arrays().items()}, computed


def edit(place: Path, name: str, change: Callable[[np.ndarray], object]) -> None:
    """Changes an array of a store in its file."""
    array = np.load(place / f"{name}.npy", mmap_mode="r+")
    change(array)
    array.flush()


def flip(name: str, row: int, column: int, bit: int = 0) -> Callable[[Path], None]:
    """One bit of one number."""

    def damage(place: Path) -> None:
        def change(array: np.ndarray) -> None:
            number = array[row : row + 1, column : column + 1].view(np.uint64)
            number ^= np.uint64(1 << bit)

        edit(place, name, change)

    return damage


def put(name: str, rows: slice, columns: slice, value: float) -> Callable[[Path], None]:
    """One value in a part of a kernel."""
    return lambda place: edit(place, name, lambda array: array.__setitem__((rows, columns), value))


def mark(row: int, column: int, change: Callable[[int], int]) -> Callable[[Path], None]:
    """Another mark."""

    def damage(place: Path) -> None:
        def change_mark(marks: np.ndarray) -> None:
            marks[row, column] = change(int(marks[row, column]))

        edit(place, "done", change_mark)

    return damage


def swap_kernels(place: Path) -> None:
    first, second = (place / f"{name}.npy" for name in NAMES)
    first.rename(place / "third")
    second.rename(first)
    (place / "third").rename(second)


def replace(name: str, content: object) -> Callable[[Path], None]:
    """Another file: an array, bytes, a text, or what a function makes."""

    def damage(place: Path) -> None:
        path = place / name
        path.unlink()
        if isinstance(content, np.ndarray):
            np.save(path, content)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        elif callable(content):
            content(path)

    return damage


def afterwards(
    damage: Callable[[Path], None],
    blocks: Sequence[tuple[int, int]] = HALF,
    before: int | None = None,
) -> Callable[[], dict[str, np.ndarray]]:
    """What a run finds in a store that an earlier run filled and that was damaged since.

    Args:
      damage: is given the folder of the kernels.
      blocks: of the kernels.
      before: how many blocks the earlier run has computed.
    """

    def run() -> dict[str, np.ndarray]:
        with tempfile.TemporaryDirectory() as folder:
            fill(Path(folder), blocks, before)
            (place,) = Path(folder).iterdir()
            damage(place)
            found, _ = fill(Path(folder), blocks)
            again, computed = fill(Path(folder), blocks)
            assert computed == 0
            for name in NAMES:
                np.testing.assert_array_equal(again[name], found[name])
            return found

    return run


EXACT = Right(reference, tolerance=0)
ANEW = "{} of {} finished blocks of kernels do not have the checksums .* computed anew"


def anew(count: int, of: int = len(HALF)) -> Warned:
    return Warned(ANEW.format(count, of), EXACT)


EVERYTHING = slice(None)
DAMAGED_BLOCKS = {
    "nothing": (afterwards(lambda place: None), EXACT),
    "the lowest bit": (afterwards(flip("ntk", 0, 0)), anew(1)),
    "the sign": (afterwards(flip("ntk", 1, 2, 63)), anew(1)),
    "an exponent": (afterwards(flip("nngp", 5, 5, 62)), anew(1)),
    "above the diagonal": (afterwards(flip("ntk", 0, 9)), anew(1)),
    "its mirror image": (afterwards(flip("ntk", 9, 0)), anew(1)),
    "a mirror image of the last kernel": (afterwards(flip("nngp", 8, 5, 40)), anew(1)),
    "the last number": (afterwards(flip("nngp", 9, 9)), anew(1)),
    "without mirroring": (afterwards(flip("ntk", 9, 0), ALL), anew(1, len(ALL))),
    "a block of zeros": (afterwards(put("ntk", slice(4), slice(4), 0.0)), anew(1)),
    "a block of NaN": (afterwards(put("ntk", slice(4, 8), slice(8, 10), np.nan)), anew(1)),
    "NaN in a mirror image": (afterwards(put("ntk", slice(8, 10), slice(4, 8), np.nan)), anew(1)),
    "a lost page": (afterwards(put("nngp", slice(3, 6), EVERYTHING, 0.0)), anew(5)),
    "a lost file": (afterwards(put("nngp", EVERYTHING, EVERYTHING, 0.0)), anew(6)),
    "kernels in the place of each other": (afterwards(swap_kernels), anew(6)),
    "rows in another order": (
        afterwards(lambda place: edit(place, "ntk", lambda a: a.__setitem__(..., a[::-1].copy()))),
        anew(6),
    ),
    "a transposed block": (
        afterwards(lambda place: edit(place, "ntk", lambda a: np.copyto(a[:4, 4:8], a[:4, 4:8].T))),
        anew(1),
    ),
    "integers in the place of floats": (
        afterwards(
            lambda place: edit(
                place, "ntk", lambda a: a.__setitem__(..., np.round(a).view(np.uint64))
            )
        ),
        anew(6),
    ),
}
MARKS = {
    "of a block that was never written": (
        afterwards(mark(1, 2, lambda _: 1 << 32), before=3), anew(1, 4),
    ),
    "of the first format": (afterwards(mark(1, 2, lambda _: 1), before=3), anew(1, 4)),
    "with another checksum": (afterwards(mark(0, 0, lambda m: m ^ 1)), anew(1)),
    "with the checksum of another block": (
        afterwards(mark(1, 1, lambda m: m ^ 0xFFFF)), anew(1),
    ),
    "without the bit of a finished block": (afterwards(mark(0, 1, lambda m: m ^ 1 << 32)), anew(1)),
    "without the bit of a mirrored block": (afterwards(mark(0, 1, lambda m: m ^ 1 << 33)), anew(1)),
    "with the bit of a mirrored block": (
        afterwards(mark(0, 1, lambda m: m | 1 << 33), ALL), anew(1, len(ALL)),
    ),
    "with bits that mean nothing": (afterwards(mark(2, 2, lambda m: m | 1 << 63)), anew(1)),
    "lost": (afterwards(mark(2, 2, lambda _: 0)), EXACT),
    "below the diagonal": (afterwards(mark(2, 0, lambda _: 7)), anew(1, 7)),
    "all ones": (
        afterwards(lambda place: edit(place, "done", lambda a: a.fill(2**64 - 1))), anew(9, 9),
    ),
    "all lost": (afterwards(lambda place: edit(place, "done", lambda a: a.fill(0))), EXACT),
}  # fmt: skip
NOT_WHOLE = "is not a whole store of kernels .*{}.*remove it, and it is made anew"


def broken(name: str, content: object, says: str = "") -> tuple[Callable[[], object], Refused]:
    return afterwards(replace(name, content)), Refused(NOT_WHOLE.format(says))


SHAPE = (SIDE, SIDE)
FILES = {
    "float32": broken("ntk.npy", np.zeros(SHAPE, np.float32), "holds float32"),
    "integers": broken("ntk.npy", np.zeros(SHAPE, np.int64), "holds int64"),
    "big-endian": broken("ntk.npy", np.zeros(SHAPE, ">f8"), "holds >f8"),
    "columns first": broken("ntk.npy", np.asfortranarray(np.ones(SHAPE))),
    "too many rows": broken("nngp.npy", np.zeros((SIDE + 1, SIDE)), "nngp.npy holds"),
    "too few columns": broken("nngp.npy", np.zeros((SIDE, 1)), "nngp.npy holds"),
    "a vector": broken("nngp.npy", np.zeros(SIDE * SIDE), "nngp.npy holds"),
    "a number": broken("ntk.npy", np.zeros(()), "holds float64"),
    "objects": broken("ntk.npy", np.full(SHAPE, None)),
    "text": broken("ntk.npy", b"not an array"),
    "an empty file": broken("ntk.npy", b""),
    "half of a header": broken("ntk.npy", b"\x93NUMPY\x01\x00v"),
    "an archive": broken("ntk.npy", b"PK\x03\x04"),
    "a missing kernel": broken("ntk.npy", None, "ntk.npy"),
    "a folder": broken("ntk.npy", Path.mkdir, "ntk.npy is no file"),
    "a pipe": broken("ntk.npy", os.mkfifo, "ntk.npy is no file"),
    "a link to itself": broken("ntk.npy", lambda path: path.symlink_to(path), "no file"),
    "a link to nothing": broken("ntk.npy", lambda path: path.symlink_to("gone"), "no file"),
    "marks that are missing": broken("done.npy", None, "done.npy"),
    "marks of the first format": broken("done.npy", np.ones((3, 3), np.uint8), "done.npy"),
    "marks of other blocks": broken("done.npy", np.zeros((5, 5), np.uint64), "done.npy"),
    "marks that are text": broken("done.npy", b"1 1 1"),
    "a manifest that is missing": broken("kernels.json", None, "kernels.json"),
    "a manifest that is empty": broken("kernels.json", b"", "kernels.json"),
    "a manifest that is null": broken("kernels.json", b"null", "not a JSON object"),
    "a manifest that is a list": broken("kernels.json", b"[]", "not a JSON object"),
    "a manifest without a hash": broken("kernels.json", b"{}", "kernels.json"),
    "a manifest of zeros": broken("kernels.json", bytes(100), "kernels.json"),
    "a manifest that is not UTF-8": broken("kernels.json", b"\xff\xfe{}", "kernels.json"),
    "a manifest nested too deep": broken("kernels.json", b"[" * 100_000, "nested too deep"),
    "a manifest that is a folder": broken("kernels.json", Path.mkdir, "kernels.json"),
    "a manifest that is a pipe": broken("kernels.json", os.mkfifo, "kernels.json"),
    "a manifest of other kernels": (
        afterwards(replace("kernels.json", b'{"hash": "0"}')),
        Refused("holds other kernels; remove it or choose another folder"),
    ),
    "a manifest whose hash is no text": (
        afterwards(replace("kernels.json", b'{"hash": [1]}')), Refused("holds other kernels"),
    ),
}  # fmt: skip


def at(path: str) -> Callable[[], object]:
    return lambda: fill(Path(path))


KEPT_ELSEWHERE = r"kernels cannot be kept in .*{}.*; choose another folder for the store, or none"
PLACES = {
    "a file": (at(__file__), Refused(KEPT_ELSEWHERE.format("test_kernel_store_faults.py"))),
    "below a file": (at(f"{__file__}/store"), Refused(KEPT_ELSEWHERE.format("Not a directory"))),
    "/proc": (at("/proc/store"), Refused(KEPT_ELSEWHERE.format("/proc/store"))),
    "a device": (at("/dev/null"), Refused(KEPT_ELSEWHERE.format("/dev/null"))),
    "a name that is too long": (at("/tmp/" + "x" * 300), Refused(KEPT_ELSEWHERE.format("long"))),
}


@over(DAMAGED_BLOCKS | {f"a mark {name}": case for name, case in MARKS.items()})
def test_damaged_blocks_are_computed_anew(run, answer):
    answer.check(run)


@over({f"file: {name}": case for name, case in FILES.items()} | PLACES)
def test_stores_that_are_none_are_refused(run, answer):
    answer.check(run)


def test_only_what_is_damaged_is_computed_anew(tmp_path):
    assert fill(tmp_path)[1] == len(HALF)
    (place,) = tmp_path.iterdir()
    flip("ntk", 9, 0)(place)
    with pytest.warns(UserWarning, match="1 of 6"):
        found, computed = fill(tmp_path)
    assert computed == 1
    np.testing.assert_array_equal(found["ntk"], reference()["ntk"])


def test_an_interrupted_run_keeps_its_blocks_and_their_marks(tmp_path):
    def interrupted():
        with open_store(tmp_path, NAMES, SHAPE, ["a test", len(HALF)], BLOCK) as target:
            target.write(0, 0, [m[:BLOCK, :BLOCK] for m in reference().values()], mirror=True)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert fill(tmp_path)[1] == len(HALF) - 1


def test_files_have_their_room_on_the_disk_from_the_start(tmp_path):
    side = 256
    with open_store(tmp_path, ["ntk"], (side, side), ["large"], side):
        (place,) = tmp_path.iterdir()
        status = (place / "ntk.npy").stat()
        assert status.st_size > side * side * 8
        assert status.st_blocks * 512 >= status.st_size


def test_a_disk_that_is_full_is_a_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"cannot be kept in .*: No space left on device"):
        fill(tmp_path / "store")
    assert list((tmp_path / "store").iterdir()) == []


def test_a_store_of_the_first_format_is_not_taken_over(tmp_path, monkeypatch):
    fill(tmp_path)
    (place,) = tmp_path.iterdir()
    manifest = json.loads((place / "kernels.json").read_text())
    monkeypatch.setattr("ntk_analysis.kernel_store._FORMAT", 1)
    assert fill(tmp_path)[1] == len(HALF)
    assert {p.name for p in tmp_path.iterdir()} > {place.name}
    assert json.loads((place / "kernels.json").read_text()) == manifest
