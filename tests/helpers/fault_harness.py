"""What an entry may answer to bad or extreme input: the right value, or one clear sentence.

A case is a name, a call and the kind of its answer. `check` fails where the answer is another one:
a wrong number, a NaN, an error that comes from inside of a library, a text that names nothing. The
watchdog of `conftest.py` ends a call that hangs.
"""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = ("natgrad_flax", "ntk_analysis", "datasets", "benchmarks")


@dataclass(frozen=True)
class Refused:
    """An exception that natgrad itself raises, whose text matches a regular expression."""

    says: str
    errors: tuple[type[BaseException], ...] = (ValueError, TypeError)

    def check(self, run: Callable[[], Any]) -> None:
        with pytest.raises(self.errors) as caught:
            run()
        text = str(caught.value)
        assert re.search(self.says, text), f"{self.says!r} not found in: {text}"
        assert len(text) > 20, f"says too little: {text!r}"
        raised = Path(traceback.extract_tb(caught.value.__traceback__)[-1].filename).resolve()
        inside = raised.is_relative_to(ROOT) and raised.relative_to(ROOT).parts[0] in OURS
        assert inside, f"comes from {raised}, not from natgrad: {text}"


@dataclass(frozen=True)
class Right:
    """A tree of finite numbers; equal to a reference where one is given.

    Attributes:
      expected: a tree of the same structure, a function that returns it, or None: finite only.
      tolerance: of the norm of the difference, leaf by leaf, over the norm of the reference.
    """

    expected: Any = None
    tolerance: float = 1e-5

    def check(self, run: Callable[[], Any]) -> None:
        found = [np.asarray(leaf) for leaf in jax.tree.leaves(run())]
        for leaf in found:
            assert np.isfinite(leaf.astype(np.complex128)).all(), f"not finite: {leaf}"
        if self.expected is None:
            assert found, "nothing was returned"
            return
        expected = self.expected() if callable(self.expected) else self.expected
        wanted = [np.asarray(leaf) for leaf in jax.tree.leaves(expected)]
        assert len(found) == len(wanted)
        for leaf, reference in zip(found, wanted, strict=True):
            assert leaf.shape == reference.shape
            scale = np.linalg.norm(reference.astype(np.complex128).ravel())
            error = np.linalg.norm((leaf.astype(np.complex128) - reference).ravel())
            assert error <= self.tolerance * (scale or 1), f"off by {error / (scale or 1):.1e}"


@dataclass(frozen=True)
class Warned:
    """An answer that comes with a warning of natgrad's, whose text matches a regular expression."""

    says: str
    answer: Right = Right()

    def check(self, run: Callable[[], Any]) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.answer.check(run)
        texts = [str(warning.message) for warning in caught]
        assert any(re.search(self.says, text) for text in texts), f"no such warning in {texts}"


@dataclass(frozen=True)
class Exits:
    """A command that ends with an exit code and a sentence, never a traceback.

    The call returns the exit code and everything that was printed.
    """

    code: int
    says: str

    def check(self, run: Callable[[], Any]) -> None:
        code, text = run()
        assert "Traceback" not in text, text
        assert code == self.code, f"exit code {code}: {text}"
        words = " ".join(text.split())
        assert re.search(self.says, words), f"{self.says!r} not found in: {words}"


Answer = Refused | Right | Warned | Exits
Case = tuple[Callable[[], Any], Answer]


def over(cases: Mapping[str, Case]) -> pytest.MarkDecorator:
    """Parametrises a test over a table, for `def test_...(run, answer): answer.check(run)`."""
    return pytest.mark.parametrize(("run", "answer"), list(cases.values()), ids=list(cases))
