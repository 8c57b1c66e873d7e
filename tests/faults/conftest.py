"""A watchdog over every case: a call that hangs ends its process with the stacks of all threads."""

from pathlib import Path

import pytest

SECONDS = 60


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gives each test of this folder a time limit that works inside of compiled code, too."""
    for item in items:
        if (
            Path(__file__).parent in item.path.parents
            and item.get_closest_marker("timeout") is None
        ):
            item.add_marker(pytest.mark.timeout(SECONDS, method="thread"))
