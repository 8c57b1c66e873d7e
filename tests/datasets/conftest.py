"""An isolated machine state, the real data where there is any, and a local web server."""

from __future__ import annotations

import http.server
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from natgrad_datasets import download, store

REAL_DATA = os.environ.get("NATGRAD_DATA", "")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No data on this machine but what the test puts there, and no pauses between tries."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(store, "cache_folder", lambda: folder)
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.0)
    monkeypatch.delenv("NATGRAD_DATA", raising=False)
    monkeypatch.setenv("NATGRAD_OFFLINE", "1")
    return folder


@pytest.fixture
def real_data(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Folder of the real files of a data set, or skip."""

    def folder(name: str) -> Path:
        path = Path(REAL_DATA) / name
        if not REAL_DATA or not path.is_dir():
            pytest.skip(f"needs real data: NATGRAD_DATA names no folder with {name}/")
        monkeypatch.setenv("NATGRAD_DATA", REAL_DATA)
        return path

    return folder


class Server:
    """A web server on this machine.

    Attributes:
        base: Its address, ending in "/".
        answers: For every path, the (status, body) answers in turn; the last one is repeated.
        requests: The paths asked for, in order.
    """

    def __init__(self) -> None:
        self.answers: dict[str, list[tuple[int, bytes]]] = {}
        self.requests: list[str] = []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.lstrip("/")
                server.requests.append(path)
                answers = server.answers.get(path, [(404, b"not here")])
                status, body = answers.pop(0) if len(answers) > 1 else answers[0]
                self.send_response(status)
                # Status 299 stands for a connection that breaks half-way.
                self.send_header("Content-Length", str(len(body) * (2 if status == 299 else 1)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self._server.server_port}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A web server on this machine, with downloads allowed."""
    monkeypatch.delenv("NATGRAD_OFFLINE")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server()
    yield running
    running.close()
