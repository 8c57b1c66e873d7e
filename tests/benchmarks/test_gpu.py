"""The session on a GPU, tried without one: its stages are short programs of this test's own."""

import json
import sys

import pytest

from benchmarks import gpu
from benchmarks.common import VARIABLE
from benchmarks.gpu import FILE_NAME, Stage


def python(code, name, seconds=20.0):
    return Stage(name, (sys.executable, "-c", code), seconds)


def test_documents_of_all_stages_are_kept(tmp_path, monkeypatch, capsys):
    out, results = tmp_path / "out", tmp_path / "results"
    steps = out / "steps" / FILE_NAME
    written = f'open({str(steps)!r}, \'w\').write(\'{{"command": "c", "a": 1}}\')'
    planned = (
        python("import os; print(os.environ['NATGRAD_BENCH_PROFILE'])", ""),
        python(f"{written}; import time; time.sleep(60)", "steps", 1.0),
        python("raise SystemExit(3)", "asv"),
    )
    monkeypatch.setenv(VARIABLE, "smoke")
    monkeypatch.setattr(gpu, "stages", lambda *_: planned)
    monkeypatch.setattr(gpu, "_printed", lambda *_: "gpu")
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--out", str(out), "--results", str(results)])
    assert ended.value.code == 1
    assert len(list(results.iterdir())) == 3
    documents = [json.loads(path.read_text()) for path in sorted(results.iterdir())]
    assert {"command": "c", "a": 1} in documents
    assert ["smoke"] in [document.get("output") for document in documents]
    said = capsys.readouterr().err
    assert "checks of the papers: done" in said
    assert "steps: ended after 1 s" in said
    assert "asv: exit code 3" in said


def test_a_cpu_is_refused_but_for_a_try(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, "large")
    monkeypatch.setattr(gpu, "_printed", lambda *_: "cpu")
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--out", str(tmp_path)])
    assert ended.value.code == 2
    assert "sees no accelerator" in capsys.readouterr().err


@pytest.mark.parametrize("smoke", [True, False])
def test_the_session_fits_into_ten_minutes(tmp_path, smoke):
    planned = gpu.stages(tmp_path, "machine", smoke)
    assert sum(stage.seconds for stage in planned) <= 600
    assert len({stage.name for stage in planned}) == len(planned)
