"""Records of trials that never ran, for the tests of what keeps them."""

from pathlib import Path

from benchmarks.leaderboard.store import Store

RULES = "1.0"


def make_config(seed: int = 0, **more: object) -> dict:
    return {"rules": RULES, "kind": "timed", "workload": "w", "seed": seed, "rate": 0.1, **more}


def make_result(value: float = 0.5) -> dict:
    return {"facts": {"title": "T"}, "outcome": {"final": value}, "command": "python -m x"}


def write(target: Store, seed: int, value: float = 0.5) -> str:
    return target.write(make_config(seed), make_result(value))["key"]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def spoil_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
