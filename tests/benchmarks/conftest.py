"""Where trials of a test are kept, and locks that no other process of this machine holds."""

from pathlib import Path

import pytest

from benchmarks.leaderboard import torture
from benchmarks.leaderboard.store import Store


@pytest.fixture
def own_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks of this test alone, also in its processes."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store", torture.RULES)
