"""Serves the bundles, the model files, the peers and the pages of the benchmark, isolated so that threads may run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from sylvester.cli_serve import Handler, Server

PAGES = Path(__file__).parent / "pages"


@contextlib.contextmanager
def serving(folders: Mapping[str, Path]) -> Iterator[str]:
    """The address of a server that shows each folder under its name, and `pages`."""
    mounts = {**folders, "pages": PAGES}

    class Mounted(Handler):
        """The strict policy is left out: the peers start workers from texts."""

        def translate_path(self, path: str) -> str:
            first, _, rest = path.partition("?")[0].lstrip("/").partition("/")
            parts = [part for part in rest.split("/") if part not in ("", ".", "..")]
            return str(mounts.get(first, PAGES / "none").joinpath(*parts))

        def send_header(self, keyword: str, value: str) -> None:
            if keyword != "Content-Security-Policy":
                super().send_header(keyword, value)

    with running(Server(PAGES, "127.0.0.1", 0, True, Mounted)) as url:
        yield url


@contextlib.contextmanager
def running(server: Server) -> Iterator[str]:
    """The address of a server that answers within the block."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.url
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
