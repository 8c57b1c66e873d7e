"""A worker seen from natgrad's side."""

from __future__ import annotations

import json
import os
import select
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from benchmarks.machine import cores
from benchmarks.peer_comparison import exchange
from benchmarks.peer_comparison.environments import ROOT, Peer
from natgrad_flax.xla.compiler import flags_of_others

PATIENCE = 600.0
"""Seconds after which a worker that does not answer is given up."""


class PeerError(RuntimeError):
    """A peer's process failed; the message has what it said."""


class Worker:
    """The process of a peer; a context manager, which ends it.

    Args:
      peer: the peer.
      python: of the environment that has it.
      patience: seconds to wait for an answer.

    Attributes:
      versions: of the packages of the peer, once a problem is loaded.

    Raises:
      PeerError: that Python cannot be run.
    """

    def __init__(self, peer: Peer, python: str, patience: float = PATIENCE) -> None:
        self._name, self._patience = peer.name, patience
        self.versions: dict[str, str] = {}
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "log"
        command = [python, "-m", "benchmarks.peer_comparison.worker", peer.side]
        # PyTorch's threads: as many as JAX has, and none that spin while natgrad's step runs
        threads = {"OMP_NUM_THREADS": str(cores()), "OMP_WAIT_POLICY": "passive"}
        flags = flags_of_others(os.environ.get("XLA_FLAGS", ""))
        try:
            with self._log.open("w") as log:
                self._process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=os.environ | threads | {"XLA_FLAGS": flags},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                )
        except OSError as error:
            self._folder.cleanup()
            raise PeerError(f"{peer.name}: {python} cannot be run: {error}") from error

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()
        self._folder.cleanup()

    def load(self, problem: exchange.Problem) -> None:
        """Gives the worker a problem.

        Raises:
          PeerError: the peer failed; as by the other methods.
        """
        path = Path(self._folder.name) / "problem.npz"
        exchange.save(path, problem)
        self.versions = self._ask(call="load", problem=str(path))["versions"]

    def quantity(self, name: str) -> exchange.Array:
        """The peer's matrix or vector."""
        path = Path(self._folder.name) / "quantity.npy"
        self._ask(call="quantity", name=name, out=str(path))
        found: exchange.Array = np.load(path)
        return found

    def step(self) -> tuple[float, float]:
        """Seconds of one step of the peer by its own clock, and of its processor time."""
        found = self._ask(call="step")
        return found["seconds"], found["cpu_seconds"]

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise PeerError(f"{self._name}: its process ended: {self._last_words()}") from None
        answer: dict[str, Any] = json.loads(self._line())
        if "error" in answer:
            raise PeerError(f"{self._name}: {answer['error']}")
        return answer

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], self._patience)
        if not ready:
            raise PeerError(f"{self._name}: no answer within {self._patience:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"{self._name}: its process ended: {self._last_words()}")
        return line

    def _last_words(self) -> str:
        self._process.wait()
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.returncode}"
