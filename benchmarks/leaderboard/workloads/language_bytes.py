"""A small language model on the bytes of two modules of Python's standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

import natgrad_flax as ng
from benchmarks.leaderboard.workload import Data, Workload

# modules that did not change from Python 3.10 to 3.13: half of them English, half a language
FILES = {
    "difflib.py": "0c6afc23568d55b3e9ac914f9c5361e3033e778aa5b58d3cc82835fc5c638679",
    "optparse.py": "07d224301cba312fa0697bff9cd5a4bb4f778a90629632091b3f4ae874d89af5",
}
SETTINGS: Mapping[str, Any] = {
    "files": FILES,
    "num_train": 1989,
    "num_held_out": 220,
    "num_validation": 110,
    "num_measured": 128,
    "parametrisation": "standard",
    "vocabulary": 128,
    "context": 64,
    "width": 64,
    "depth": 2,
    "heads": 4,
    "mlp": 256,
}


def _texts() -> list[bytes]:
    folder = Path(sysconfig.get_path("stdlib"))
    return [(folder / name).read_bytes() for name in FILES]


def absent() -> str:
    """Why the text is not at hand, or ""."""
    try:
        texts = _texts()
    except OSError as error:
        return f"this Python has no {error.filename}, of which the text is made"
    for (name, wanted), text in zip(FILES.items(), texts, strict=True):
        if hashlib.sha256(text).hexdigest() != wanted:
            return (
                f"{name} of this Python is not the file that the text is made of: use 3.11 to 3.13"
            )
    return ""


@cache
def data() -> Data:
    """Pieces of 65 bytes, none in two: 64 and those that follow them. Each file ends held out."""
    length, parts = SETTINGS["context"] + 1, []
    for text in _texts():
        pieces = np.frombuffer(text, np.uint8)[: len(text) // length * length]
        parts.append(pieces.reshape(-1, length).astype(np.int32))
    ends = [len(part) - len(part) // 10 for part in parts]
    train = np.concatenate([part[:end] for part, end in zip(parts, ends, strict=True)])
    held_out = np.concatenate([part[end:] for part, end in zip(parts, ends, strict=True)])
    # validation and test have pieces of both files
    held_out = held_out[np.random.default_rng(0).permutation(len(held_out))]
    return Data(train[:, :-1], train[:, 1:], held_out[:, :-1], held_out[:, 1:])


def model(seed: int) -> nnx.Module:
    """The transformer at its initial parameters."""
    names = ("vocabulary", "context", "width", "depth", "heads", "mlp")
    return ng.LanguageModel(*(SETTINGS[name] for name in names), rngs=nnx.Rngs(seed))


WORKLOAD = Workload(
    name="language-bytes",
    title="Bytes of two modules of the standard library, causal transformer of width 64 and depth "
    "2, 1989 sequences of 64, cross-entropy a token, batches of 32",
    version=1,
    question="Does curvature pay on a language model, whose tokens are rare or frequent?",
    settings=SETTINGS,
    data=data,
    model=model,
    loss=ng.SoftmaxCrossEntropy(),
    batch_size=32,
    metric="token",
    max_steps=800,
    max_seconds=120.0,
    expectation="Curvature should not win by seconds: Adam's own scaling serves rare tokens, and "
    "its step is cheap; by steps it may, for the embedding sees tokens of all frequencies.",
    curvature_wins=False,
    absent=absent,
)
