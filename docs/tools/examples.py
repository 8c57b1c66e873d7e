"""Examples of docstrings as code: the section that Griffe knows is called ``Examples``."""

from __future__ import annotations

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Reads ``Example:`` as the section that it is."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Renames the section of a docstring."""
        if obj.docstring is not None:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
