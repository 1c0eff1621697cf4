"""`sylvester serve`: headers, parts of files, what is refused, and how it ends."""

from __future__ import annotations

import http.client
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from sylvester.__main__ import main
from sylvester.cli_serve import listen
from sylvester.compiler.manifest import Manifest

SHARD = f"weights/{'0' * 32}.bin"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of every type that a bundle has."""
    folder = tmp_path_factory.mktemp("site") / "bundle"
    for name in ("index.html", "model.js", "page/page.css", "vendor/t.mjs", "code/simd128.wasm", SHARD, "report.html"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(range(100)))
    Manifest(target="wasm", entries={}, arch="wasm32").seal(folder)
    (folder.parent / "secret").write_text("not served")
    return folder


@contextmanager
def serving(folder, isolation=True):
    server = listen(folder, "127.0.0.1", 0, isolation)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    connection = http.client.HTTPConnection(*server.server_address)

    def get(path, method="GET", **headers):
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response, response.read()

    yield get
    connection.close()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/model.js", "text/javascript; charset=utf-8"),
        ("/vendor/t.mjs", "text/javascript; charset=utf-8"),
        ("/page/page.css?x=1", "text/css; charset=utf-8"),
        ("/code/simd128.wasm", "application/wasm"),
        ("/manifest.json", "application/json"),
    ],
)
def test_files_have_their_types_and_a_page_may_share_memory(folder, path, kind):
    with serving(folder) as get:
        response, _ = get(path)

    assert (response.status, response.headers["Content-Type"]) == (200, kind)
    assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert response.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert "script-src 'self' 'wasm-unsafe-eval'" in response.headers["Content-Security-Policy"]
    assert "unsafe-inline" not in response.headers["Content-Security-Policy"]


def test_the_report_keeps_its_own_policy_and_isolation_can_be_left_out(folder):
    with serving(folder, isolation=False) as get:
        response, _ = get("/report.html")

    assert response.headers["Content-Security-Policy"] is None
    assert response.headers["Cross-Origin-Opener-Policy"] is None


def test_files_named_after_their_content_are_kept_and_others_asked_for_again(folder):
    with serving(folder) as get:
        found = [get(f"/{name}")[0].headers["Cache-Control"] for name in (SHARD, "model.js")]

    assert found == ["max-age=31536000, immutable", "no-cache"]


@pytest.mark.parametrize(
    ("asked", "status", "shown", "data"),
    [
        ("bytes=10-", 206, "bytes 10-99/100", bytes(range(10, 100))),
        ("bytes=10-19", 206, "bytes 10-19/100", bytes(range(10, 20))),
        ("bytes=90-500", 206, "bytes 90-99/100", bytes(range(90, 100))),
        ("bytes=100-", 416, "bytes */100", b""),
        ("bytes=1-2,5-6", 200, None, bytes(range(100))),
    ],
)
def test_parts_of_files(folder, asked, status, shown, data):
    with serving(folder) as get:
        response, found = get(f"/{SHARD}", Range=asked)
        again, _ = get("/model.js", "HEAD")

    assert (response.status, response.headers["Content-Range"], found) == (status, shown, data)
    assert again.status == 200


@pytest.mark.parametrize("path", ["/weights/", "/none.js", "/../secret", "/%2e%2e/secret"])
def test_nothing_else_is_served(folder, path):
    with serving(folder) as get:
        response, data = get(path)

    assert response.status == 404
    assert b"not served" not in data


def test_a_port_that_is_taken_and_a_folder_that_is_no_page(folder, tmp_path, capsys):
    server = listen(folder, "127.0.0.1", 0)
    port = str(server.server_address[1])
    Manifest(target="cpu", entries={}).seal(tmp_path)

    assert main(["serve", str(folder), "--port", port]) == 1
    assert f"cannot listen at 127.0.0.1:{port}" in (shown := capsys.readouterr().err)
    assert "--port" in shown
    assert main(["serve", str(tmp_path)]) == 1
    assert "was compiled for cpu, expected wasm" in capsys.readouterr().err
    assert main(["serve", str(tmp_path / "none")]) == 1
    server.server_close()


def test_ctrl_c_ends_it(folder):
    command = [sys.executable, "-m", "sylvester", "serve", str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        url = re.search(r"http://127.0.0.1:(\d+)/", process.stdout.readline())
        connection = http.client.HTTPConnection("127.0.0.1", int(url[1]))
        connection.request("GET", "/")
        status = connection.getresponse().status
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
        connection.close()

    assert (status, process.returncode, error) == (200, 130, "interrupted\n")
