"""Commands of `natgrad` where a folder, a number or a name of the user's is bad."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import natgrad_datasets
import numpy as np
import pytest
from fault_harness import Exits, over
from natgrad_datasets import DatasetStatus
from rich.console import Console
from run_records import COMMANDS, by_hand, finished, natgrad

from ntk_analysis.cli import app, main
from ntk_analysis.cli.app import progress_bar, work
from ntk_analysis.files import keep_copy, own_folder, replace_file
from ntk_analysis.results import write_json
from ntk_analysis.sweep import SweepSettings
from ntk_analysis.tables import dataset_table

WRITERS = ("dynamics", "predict", "isotropy", "reproduce", "datasets")
DRAWINGS = {
    "dynamics": "ntk_analysis.figures.draw_dynamics",
    "predict": "ntk_analysis.figures_theory.draw_prediction",
    "isotropy": "ntk_analysis.figures_theory.draw_isotropy",
    "reproduce": "ntk_analysis.report.papers.write_papers",
}


def call(command: str, *options: object, out: str | None = None) -> Callable[[], tuple[int, str]]:
    """A command that is refused before any work, and leaves no folder."""

    def run() -> tuple[int, str]:
        ran: list[str] = []
        with tempfile.TemporaryDirectory() as folder, by_hand(ran):
            place = Path(folder) / "deep" / "out"
            code, text = natgrad(*COMMANDS[command], *options, "--out", out or place)
            assert code == 2
            assert ran == []
            assert list(Path(folder).iterdir()) == []
            return code, text

    return run


def while_owned(command: str) -> Callable[[], tuple[int, str]]:
    def run() -> tuple[int, str]:
        ran: list[str] = []
        with tempfile.TemporaryDirectory() as folder, by_hand(ran), own_folder(Path(folder)):
            answer = natgrad(*COMMANDS[command], "--out", folder)
            assert ran == []
            assert list(Path(folder).iterdir()) == []
            return answer

    return run


def drawing(command: str, problem: BaseException) -> Callable[[], tuple[int, str]]:
    """A command whose figures or pages cannot be written."""

    def fail(*args: object) -> None:
        raise problem

    def run() -> tuple[int, str]:
        with (
            tempfile.TemporaryDirectory() as folder,
            by_hand([]),
            patch(DRAWINGS[command], fail),
        ):
            answer = natgrad(*COMMANDS[command], "--out", folder)
            assert (Path(folder) / "results.json").is_file()
            return answer

    return run


FULL = OSError(errno.ENOSPC, "No space left on device")
BEYOND = "_variance .* is beyond what float32 can hold; choose one nearer to 1"
PLACES = {
    **{
        f"{command}: another run": (while_owned(command), Exits(2, "another run is writing to"))
        for command in WRITERS
    },
    **{
        f"{command}: {what}": (
            call(command, out=out), Exits(2, f"error: cannot write to {out}.*: {says}"),
        )
        for command in WRITERS
        for what, out, says in (
            ("a file", __file__, "it is not a folder; choose another --out"),
            ("below a file", f"{__file__}/a/b", "Not a directory"),
            ("/proc", "/proc/natgrad", "No such file or directory"),
            ("a folder of the system", "/proc/self/task", "No such file or directory"),
            ("a name that is too long", "/tmp/" + "x" * 300, "File name too long"),
        )
    },
    **{
        f"{command}: a full disk while figures are written": (
            drawing(command, FULL), Exits(2, "error: cannot write to /.*: No space left on device"),
        )
        for command in DRAWINGS
    },
    **{
        f"{command}: interrupted while figures are drawn": (
            drawing(command, KeyboardInterrupt()), Exits(130, "interrupted; finished .* are kept"),
        )
        for command in DRAWINGS
    },
    "no memory": (
        drawing("dynamics", MemoryError("for an array")), Exits(2, "out of memory; .* smaller"),
    ),
}  # fmt: skip
NUMBERS = {
    f"{command} {option} {value}": (call(command, option, value), Exits(2, says))
    for command, option, value, says in (
        (
            "dynamics",
            "--seed",
            "99999999999999999999",
            "seed must be an integer of 0 to 4294967295, got 9999",
        ),
        ("dynamics", "--seed", "4294967296", "seed must be an integer of 0 to 4294967295"),
        ("dynamics", "--damping", "1e308", "damping 1e.308 times 6 samples is beyond"),
        ("dynamics", "--damping", "1e-320", "damping 1e-320 times 6 samples is beyond"),
        ("predict", "--ridge", "1e-320", "ridge 1e-320 is beyond"),
        ("dynamics", "--damping", "inf", "damping must be 0 or positive and finite"),
        (
            "dynamics",
            "--relative-damping",
            "1e300",
            "relative_damping 1e.300 times 6 samples",
        ),
        ("dynamics", "--weight-variance", "1e300", BEYOND),
        ("dynamics", "--weight-variance", "1e-300", BEYOND),
        ("dynamics", "--weight-variance", "1e20", BEYOND),
        ("dynamics", "--bias-variance", "1e200", BEYOND),
        ("dynamics", "--bias-variance", "nan", "bias_variance must be 0 or positive and finite"),
        ("predict", "--seed", "99999999999999999999", "seed must be an integer of 0 to 4294967295"),
        ("predict", "--damping", "1e308", "damping 1e.308 times 6 samples is beyond"),
        ("predict", "--ridge", "1e200", "ridge 1e.200 is beyond"),
        ("predict", "--weight-variance", "1e300", BEYOND),
        (
            "isotropy",
            "--seeds",
            "99999999999999999999",
            "every seed must be an integer of 0 to 4294967295",
        ),
        ("isotropy", "--damping", "1e308", "damping 1e.308 times 3 samples is beyond"),
        ("isotropy", "--weight-variance", "1e300", BEYOND),
        ("isotropy", "--bias-variance", "1e300", BEYOND),
    )
} | {
    "predict, seeds of initialisations": (
        call("predict", "--initialisations", 10, "--seed", 2**32 - 5),
        Exits(2, "seed must be an integer of 0 to 4294967286"),
    ),
    "isotropy, dampings": (
        call("isotropy", "--vary", "damping", "--values", 0, "1e38"),
        Exits(2, r"damping 1e\+38 times 3 samples is beyond"),
    ),
    "report, a seed": (
        lambda: natgrad("report", "--dataset", "digits", "--seed", 2**32 - 1, "--out", "/dev/x"),
        Exits(2, "seed must be an integer of 0 to 4294967295, got 4294967296"),
    ),
}


@contextmanager
def data_folder(name: str) -> Iterator[None]:
    with patch.dict(os.environ, {"NATGRAD_DATA": name}):
        yield


def with_data(name: str, *command: object) -> Callable[[], tuple[int, str]]:
    def run() -> tuple[int, str]:
        with data_folder(name):
            return natgrad(*command)

    return run


MNIST = ["dynamics", "--dataset", "mnist", "--out", "/tmp/never-made"]
UNREADABLE = "x" * 300  # an error of the system that the superuser meets, too
DATA = {
    "unreadable": (
        with_data(UNREADABLE, *MNIST), Exits(2, "NATGRAD_DATA names xxx.*cannot be read: File name")
    ),
    "no folder": (with_data("/nowhere", *MNIST), Exits(2, "names /nowhere, which is not a folder")),
    "of nobody": (with_data("~no-such-user/x", *MNIST), Exits(2, "which has no home folder")),
    "unreadable, listed": (with_data(UNREADABLE, "datasets"), Exits(0, "cannot be read: File")),
    "of nobody, listed": (with_data("~no-such-user/x", "datasets"), Exits(0, "no home folder")),
}  # fmt: skip


@over(PLACES)
def test_places(run, answer):
    answer.check(run)


@over(NUMBERS)
def test_numbers(run, answer):
    answer.check(run)


@over({f"NATGRAD_DATA {name}": case for name, case in DATA.items()})
def test_data_folders(run, answer):
    answer.check(run)


@pytest.mark.parametrize(
    "sizes",
    [{"depth": 300}, {"weight_variance": 1e15, "bias_variance": 1e-15}, {"damping": 1e-30}],
    ids=str,
)
def test_numbers_that_float32_holds_are_taken(sizes):
    SweepSettings("num_samples", (3,), **sizes)


def test_data_without_permission(monkeypatch, tmp_path):
    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / "mnist").mkdir()
    monkeypatch.setenv("NATGRAD_DATA", str(tmp_path))
    monkeypatch.setattr(Path, "is_file", denied)
    (mnist,) = (row for row in natgrad_datasets.status() if row.name == "mnist")
    assert mnist.found == f"not found: {tmp_path}/mnist cannot be read: Permission denied"
    assert natgrad("datasets")[0] == 0


@pytest.mark.parametrize("command", [*DRAWINGS, "datasets"])
def test_no_lock_outlives_its_command(command, tmp_path):
    with by_hand([]):
        for _ in range(2):
            assert natgrad(*COMMANDS[command], "--out", tmp_path / "out")[0] == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["results.json"]


def test_a_folder_that_another_run_owns_can_be_owned_afterwards(tmp_path):
    for _ in range(2):
        with own_folder(tmp_path / "a" / "b"):
            with pytest.raises(ValueError, match="another run"), own_folder(tmp_path / "a" / "b"):
                pass
            assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    def unsupported(handle, operation):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("ntk_analysis.files.fcntl.flock", unsupported)
    with own_folder(tmp_path), own_folder(tmp_path):
        pass


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_json(tmp_path / "a.json", {"a": 1})
        copy = keep_copy(tmp_path / "a.json")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "a.json", copy)] == [mode, mode]
    assert copy.name == "a.1.json"


def test_a_file_that_does_not_fit_leaves_the_earlier_one(tmp_path):
    path = tmp_path / "a.json"
    replace_file(path, b"earlier")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            replace_file(path, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.filename == str(path)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a.json", b"earlier")]


def test_every_earlier_file_is_kept(tmp_path):
    ran: list[str] = []
    with by_hand(ran):
        for scale in (1, 2, 1, 3):
            options = ("--scale", scale, "--out", tmp_path)
            assert natgrad(*COMMANDS["dynamics"], *options)[0] == 0
    scales = [
        json.loads((tmp_path / f"results{number}.json").read_text())["settings"]["scale"]
        for number in (".1", ".2", ".3", "")
    ]
    assert scales == [1, 2, 1, 3]


def test_an_interrupted_run_has_said_what_it_replaced(tmp_path):
    path = tmp_path / "results.json"
    other = json.loads(finished("reproduce"))
    other["environment"]["jax"] = "0.0.1"
    path.write_text(json.dumps(other), encoding="utf-8")
    with by_hand([]), patch("run_records.below", side_effect=KeyboardInterrupt):
        code, text = natgrad(*COMMANDS["reproduce"], "--out", tmp_path)
    assert code == 130
    assert "the earlier file is kept as results.1.json" in " ".join(text.split())
    assert json.loads((tmp_path / "results.1.json").read_text(encoding="utf-8")) == other
    assert json.loads(path.read_text(encoding="utf-8"))["checks"] == {}


# ----- names that are markup


NAMES = ["[/x]", "[red]x[/red]", "[link=http://x.example]x[/link]", ":smile:", "[bold", "\\[x]"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_no_markup(name, tmp_path):
    with by_hand([], (name,)):
        assert name in natgrad("reproduce", "--list")[1]
        code, text = natgrad("reproduce", name, "--out", tmp_path)
    assert code == 0
    assert f"{name}: title of {name}" in " ".join(text.split())
    with patch("natgrad_datasets.status", lambda: [status(name)]):
        assert name in natgrad("datasets")[1]
    progress = progress_bar()
    progress.add_task(name)
    terminal = Console(file=io.StringIO(), width=200)
    terminal.print(progress.make_tasks_table(progress.tasks))
    assert name in terminal.file.getvalue()


def status(name: str) -> DatasetStatus:
    return DatasetStatus(name, 1, 1, (1,), 2, 0, f"/data/{name}", name, name, usable=True)


def test_warnings_are_sentences(capsys):
    with work(None, ""):
        warnings.simplefilter("always")
        warnings.warn("[/x] was damaged", stacklevel=1)
    assert capsys.readouterr().err == "warning: [/x] was damaged\n"


def test_failed_checks_are_named_as_they_are(tmp_path):
    with by_hand([], ("[/x]",)), patch("run_records.below", lambda *a: _failed()):
        code, text = natgrad("reproduce", "--all", "--out", tmp_path)
    assert code == 1
    assert "not as expected: [/x]" in text


def _failed():
    from ntk_analysis.reproduce.registry import Measurement

    return Measurement("[/what]", np.inf, "[/expected]", False)


# ----- standard output


def run_main(monkeypatch, stream) -> int:
    monkeypatch.setattr(sys, "argv", ["natgrad", "datasets"])
    monkeypatch.setenv("NATGRAD_DATA", "/nowhere")
    monkeypatch.setattr(sys, "stdout", stream)
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code or 0


def test_a_locale_without_the_signs(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert run_main(monkeypatch, stream) == 0
    stream.flush()
    assert b"28?28" in stream.buffer.getvalue()


def test_standard_output_on_a_full_disk(monkeypatch, capfd):
    with open("/dev/full", "w", encoding="utf-8") as stream:
        assert run_main(monkeypatch, stream) == 2
    assert "cannot write to standard output: No space left" in capfd.readouterr().err


def test_every_command_is_here():
    names = {c.name or c.callback.__name__ for c in app.registered_commands}
    assert names == {*WRITERS, "report"}
    assert all(json.loads(finished(command))["command"] for command in WRITERS)
    assert dataset_table([status("a")]).row_count == 1
