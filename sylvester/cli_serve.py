"""A web server for one artefact: the headers that threads and a strict page need, parts of files, and caching."""

from __future__ import annotations

import errno
import re
import socket
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any

from sylvester.compiler.errors import CompileError, Unsupported
from sylvester.compiler.manifest import REPORT_HTML, read

POLICY = (
    "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""No code from elsewhere, none made from text."""
ISOLATION = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
}
"""What a browser asks of a page before it shares memory between threads."""
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".mjs": "text/javascript; charset=utf-8",
    ".wasm": "application/wasm",
}
"""Not left to the machine's own table: a browser runs no module of another type."""
HASHED = re.compile(r"/weights/[0-9a-f]{32}\.bin$")
"""Files that are named after what they hold never change."""
RANGE = re.compile(r"bytes=(\d+)-(\d*)$")


class Handler(SimpleHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def __init__(self, request: Any, client: Any, server: Server) -> None:
        super().__init__(request, client, server, directory=str(server.folder))

    def end_headers(self) -> None:
        path = self.path.partition("?")[0]
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Cache-Control", "max-age=31536000, immutable" if HASHED.search(path) else "no-cache")
        if not path.endswith(f"/{REPORT_HTML}"):  # the report states a stricter policy itself
            self.send_header("Content-Security-Policy", POLICY)
        for name, value in ISOLATION.items() if self.server.isolation else ():
            self.send_header(name, value)
        super().end_headers()

    def guess_type(self, path: Any) -> str:
        return TYPES.get(Path(path).suffix) or super().guess_type(path)

    def send_head(self) -> Any:
        """A part of a file where one is asked for."""
        asked = RANGE.match(self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if not asked or not path.is_file():
            return super().send_head()
        size = path.stat().st_size
        first, last = int(asked[1]), min(int(asked[2] or size), size - 1)
        if first > last:
            self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        self.send_response(HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Type", self.guess_type(str(path)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Length", str(last + 1 - first))
        self.end_headers()
        return Part(path, first, last + 1)

    def list_directory(self, path: Any) -> None:
        self.send_error(HTTPStatus.NOT_FOUND, "no such file")

    def copyfile(self, source: Any, outputfile: Any) -> None:
        try:
            super().copyfile(source, outputfile)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the page cancelled

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a page asks for many files."""


class Part:
    """Bytes [first, end) of a file, to be read once."""

    def __init__(self, path: Path, first: int, end: int) -> None:
        self.file: IO[bytes] = path.open("rb")
        self.file.seek(first)
        self.left = end - first

    def read(self, count: int) -> bytes:
        data = self.file.read(min(count, self.left))
        self.left -= len(data)
        return data

    def close(self) -> None:
        self.file.close()


class Server(ThreadingHTTPServer):
    """Serves one folder."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, folder: Path, host: str, port: int, isolation: bool, handler: type[Handler] = Handler) -> None:
        self.folder, self.isolation = folder, isolation
        super().__init__((host, port), handler)

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}/"

    def server_bind(self) -> None:
        """Without the look-up of the machine's name, which may take long."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])


def listen(folder: Path, host: str, port: int, isolation: bool = True) -> Server:
    """A server that has its port already."""
    manifest = read(folder)
    if manifest.target != "wasm":
        raise Unsupported(
            f"{str(folder)!r} was compiled for {manifest.target}, expected wasm",
            hint="compile it with --target wasm to serve it",
        )
    try:
        return Server(folder, host, port, isolation)
    except OSError as error:
        hint = (
            "give another --port, or 0 for any" if error.errno == errno.EADDRINUSE else "give another --host or --port"
        )
        raise CompileError(f"cannot listen at {host}:{port}: {error.strerror or error}", hint=hint) from error
