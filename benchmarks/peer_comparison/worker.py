"""The process of a peer: reads requests, one JSON line each, and answers in the same way.

``python -m benchmarks.peer_comparison.worker MODULE`` runs with the Python of the peer's own
environment. MODULE has a class ``Side``: made from a problem, with ``quantity(name)``, ``step()``
and ``versions()``. Requests are ``load`` (a problem), ``quantity`` (written as .npy) and ``step``.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np

from benchmarks.peer_comparison import exchange


class Side(Protocol):
    """One library on one problem."""

    def versions(self) -> dict[str, str]:
        """Packages that count, with their versions."""

    def quantity(self, name: str) -> exchange.Array:
        """A matrix or vector of the problem, in natgrad's order and normalisation.

        Raises:
          KeyError: this side does not have it.
        """

    def step(self) -> None:
        """One training step by Monte-Carlo K-FAC from where the last one ended, over on return."""


class Server:
    """Answers the requests of one conversation.

    Args:
      make: from a problem to the side.
    """

    def __init__(self, make: Any) -> None:
        self._make = make
        self._side: Side | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What is sent back; a failure is an answer, too."""
        try:
            return self._do(request)
        except Exception as error:
            traceback.print_exc()
            return {"error": f"{type(error).__name__}: {error}"}

    def _do(self, request: dict[str, Any]) -> dict[str, Any]:
        call = request["call"]
        if call == "load":
            self._side = self._make(exchange.load(Path(request["problem"])))
            return {"versions": self._side.versions()}
        if self._side is None:
            raise RuntimeError("no problem has been loaded")
        if call == "quantity":
            np.save(Path(request["out"]), self._side.quantity(request["name"]))
            return {}
        if call == "step":
            wall, busy = time.perf_counter(), time.process_time()
            self._side.step()
            return {
                "seconds": time.perf_counter() - wall,
                "cpu_seconds": time.process_time() - busy,
            }
        raise RuntimeError(f"unknown request {call!r}")


def serve(server: Server, requests: TextIO, answers: TextIO) -> None:
    """Answers until there are no more requests."""
    for line in requests:
        print(json.dumps(server.answer(json.loads(line))), file=answers, flush=True)


def main() -> None:
    """Serves the module that the command line names."""
    # what libraries print must not mix with the answers
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(Server(import_module(sys.argv[1]).Side), sys.stdin, answers)


if __name__ == "__main__":
    main()
