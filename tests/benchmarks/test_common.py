"""What the suites share: profiles, one measurement for all figures, the machine's name."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from benchmarks import common, machine
from benchmarks.common import Suite, by_profile, profile, unit


class Toy(Suite):
    """Counts its measurements."""

    params: ClassVar = ([1, 2, 3], ["a"])
    param_names: ClassVar = ["number", "letter"]
    measured: ClassVar[list[tuple[Any, ...]]] = []

    def skipped(self, number: int, letter: str) -> str | None:
        return "three is left out" if number == 3 else None

    def measure(self, number: int, letter: str) -> Mapping[str, float]:
        self.measured.append((number, letter))
        return {"value": 10.0 * number, "missing": math.nan}

    @unit("things")
    def track_value(self, *case: Any) -> float:
        return self.figures["value"]


class Broken(Toy):
    """Finds a wrong answer."""

    def measure(self, number: int, letter: str) -> Mapping[str, float]:
        self.measured.append((number, letter))
        raise ArithmeticError("the answer is wrong")


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toy, "measured", [])
    monkeypatch.delenv(machine.VARIABLE, raising=False)
    monkeypatch.setenv(common.VARIABLE, "fast")


def figure(suite: Suite, folder: Path, *case: Any) -> float:
    """As asv does it: set up, then the track with the cache and the case."""
    suite.setup(str(folder), *case)
    return suite.track_value(str(folder), *case)  # type: ignore[attr-defined]


def test_profile_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"smoke": 1, "fast": 2, "regular": 3, "large": 4}
    for name, value in values.items():
        monkeypatch.setenv(common.VARIABLE, name)
        assert profile() == name
        assert by_profile(**values) == value
    for empty in ("", None):
        monkeypatch.delenv(common.VARIABLE)
        if empty is not None:
            monkeypatch.setenv(common.VARIABLE, empty)
        assert profile() == "fast"


def test_unknown_profile_gives_the_nearest_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(common.VARIABLE, "regulr")
    with pytest.raises(ValueError, match=r"did you mean 'regular'\? profiles are smoke, fast"):
        profile()
    monkeypatch.setenv(common.VARIABLE, "xyz")
    with pytest.raises(ValueError, match=r"'xyz': profiles are"):
        profile()


def test_a_case_is_measured_once_for_all_figures_and_processes(tmp_path: Path) -> None:
    assert [figure(Toy(), tmp_path, 1, "a") for _ in range(3)] == [10.0] * 3
    assert Toy.measured == [(1, "a")]
    assert figure(Toy(), tmp_path, 2, "a") == 20.0
    assert Toy.measured == [(1, "a"), (2, "a")]
    suite = Toy()
    suite.setup(str(tmp_path), 1, "a")
    assert math.isnan(suite.figures["missing"])


def test_another_profile_or_folder_measures_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure(Toy(), tmp_path / "one", 1, "a")
    figure(Toy(), tmp_path / "two", 1, "a")
    monkeypatch.setenv(common.VARIABLE, "smoke")
    figure(Toy(), tmp_path / "one", 1, "a")
    assert Toy.measured == [(1, "a")] * 3


def test_setup_cache_is_the_folder_that_asv_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(Toy().setup_cache()) == tmp_path


def test_skips_carry_their_reason_and_measure_nothing(tmp_path: Path) -> None:
    # asv takes NotImplementedError for "n/a" and prints it
    with pytest.raises(NotImplementedError, match="three is left out"):
        Toy().setup(str(tmp_path), 3, "a")
    assert not Toy.measured
    assert Toy.cases() == [(1, "a"), (2, "a"), (3, "a")]


def test_a_wrong_answer_fails_every_figure_and_is_measured_once(tmp_path: Path) -> None:
    with pytest.raises(ArithmeticError, match="the answer is wrong"):
        figure(Broken(), tmp_path, 1, "a")
    with pytest.raises(RuntimeError, match="ArithmeticError: the answer is wrong"):
        figure(Broken(), tmp_path, 1, "a")
    assert Broken.measured == [(1, "a")]
    # a suite of another name has files of its own
    assert figure(Toy(), tmp_path, 1, "a") == 10.0


def test_machine_name_says_processor_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "processor", lambda: "AMD(R) EPYC(TM) 7B13")
    monkeypatch.setattr(machine, "cores", lambda: 16)
    assert machine.machine_name() == "cpu-amd-epyc-7b13-16-cores"
    monkeypatch.setattr(machine, "device", lambda: "NVIDIA H200")
    assert machine.machine_name() == "nvidia-h200-amd-epyc-7b13-16-cores"


def test_results_of_another_device_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(machine.VARIABLE, "nvidia-h200-amd-epyc-2-cores")
    with pytest.raises(RuntimeError, match=r"'nvidia-h200-amd-epyc-2-cores', but JAX runs on"):
        Toy().setup(str(tmp_path), 1, "a")
    assert not Toy.measured
    # the number of cores may be another one inside asv
    monkeypatch.setenv(machine.VARIABLE, f"{machine.device().lower()}-any-7-cores")
    assert figure(Toy(), tmp_path, 1, "a") == 10.0


def test_machine_is_registered_with_every_field_that_asv_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asv = pytest.importorskip("asv.machine")
    path = tmp_path / "machine.json"
    machine.main(["--file", str(path)])
    name = capsys.readouterr().out.strip()
    assert name == machine.machine_name()
    record = json.loads(path.read_text())[name]
    assert {field for field, _ in asv.Machine.fields} <= set(record)
    assert record["machine"] == name
    assert record["device"] == machine.device()
    assert machine.device() in record["cpu"]
    assert record["ram"].endswith(" GiB")
    loaded = asv.Machine.load(machine_name=name, _path=str(path))
    assert (loaded.machine, loaded.device) == (name, machine.device())
