"""What tests of pages and Node share: small models built for the web and the CPU, a server with faults, Node."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import torch
import transformers as hf

import sylvester as sv
from benchmarks.quality.recipes import MODEL
from sylvester.backends.shards import write_shard
from sylvester.cli_serve import Handler, Server
from sylvester.compiler.manifest import read
from tests import zoo

NODE = shutil.which("node")
PROMPT = [5, 77, 1030, 9, 41]
LENGTH = 320
"""Longer than what one call reads of a prompt."""
ISAS = ("simd128", "simd128-threads", "relaxed")


class Encoder(torch.nn.Module):
    """States of tokens, of which some are padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = torch.nn.Embedding(4096, 24), torch.nn.Linear(24, 24)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        states = torch.tanh(self.mix(self.embed(input_ids)))
        return {"last_hidden_state": states * attention_mask[..., None]}


class Eye(torch.nn.Module):
    """Scores of 4 classes: how much of an image's mean colour each likes; one class a channel, the last none."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(3 * pixel_values.mean((2, 3)), (0, 1))


def write_language_model(folder: Path) -> None:
    """A Hugging Face folder: random weights, the tokenizer of the shipped model."""
    config = hf.LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=LENGTH, eos_token_id=0, bos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(config).eval()
    zoo.randomise(model)
    model.save_pretrained(folder)
    shutil.copyfile(Path(MODEL) / "tokenizer.json", folder / "tokenizer.json")


def trace_encoder() -> sv.Program:
    """It takes texts by the tokenizer of the shipped model."""
    torch.manual_seed(0)
    inputs = {"input_ids": torch.zeros(2, 7, dtype=torch.int64), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    program = sv.trace(Encoder().eval(), inputs)
    program.info["tokenizer"] = str(Path(MODEL) / "tokenizer.json")
    return program


def cut(bundle: Path, folder: Path, size: int) -> Path:
    """A copy of a bundle with smaller shards."""
    shutil.copytree(bundle, folder, dirs_exist_ok=True)
    index = json.loads((bundle / "weights.json").read_bytes())
    data = b"".join((bundle / shard["file"]).read_bytes() for shard in index["shards"])
    shutil.rmtree(folder / "weights")
    (folder / "weights").mkdir()
    index["shards"] = [write_shard(folder, data[at : at + size]) for at in range(0, len(data), size)]
    (folder / "weights.json").write_text(json.dumps(index))
    read(folder).seal(folder)
    return folder


def change(file: Path, texts: dict[str, str]) -> None:
    """Replaces texts that the file has."""
    content = file.read_text()
    for old, new in texts.items():
        assert old in content, f"{file.name} has no {old}"
        content = content.replace(old, new)
    file.write_text(content)


def eager(bundle: Path, folder: Path) -> Path:
    """A copy of a bundle that chooses the best candidate however slow it is, after few and short batches."""
    shutil.copytree(bundle, folder)
    changes = {
        "best(own) < GAIN * best(winner)": "false", "const sure = ": "const sure = true || ", "SLOW = 1.5": "SLOW = 99",
        "? 2 : 10": "? .1 : .1", "SETTLED = 250": "SETTLED = 1", "ROUNDS = 4": "ROUNDS = 2", "PAIRS = 15": "PAIRS = 1",
    }  # fmt: skip
    change(folder / "trials.js", changes)
    change(folder / "tuning.js", {"IDLE = 200": "IDLE = 1"})
    return folder


def build_pair(model: Any, inputs: Any, folder: Path, isas: tuple[str, ...], passes: Any = ()) -> Path:
    """`folder/wasm` and `folder/cpu`."""
    for target in (sv.Target("wasm", isas=isas), sv.Target("cpu", isas=("scalar",), threads=1)):
        with sv.compile(model, inputs, target=target, passes=passes) as compiled:
            compiled.save(folder / target.name)
    return folder


def weights(bundle: Path) -> str:
    """The one shard."""
    return next(name for name in read(bundle).files if name.startswith("weights/"))


def node(bundle: Path, script: str, *options: str, **given: Any) -> Any:
    """What the body of an async function returns, as JSON; it sees `sylvester`, `given` and `module(name)`."""
    text = f"""
        const folder = {json.dumps(bundle.as_uri() + "/")};
        const module = (name) => import(folder + name);
        const sylvester = await module("model.js");
        const given = {json.dumps(given)};
        const plain = (key, value) =>
          typeof value === "bigint" ? Number(value) : ArrayBuffer.isView(value) ? Array.from(value, Number) : value;
        const failure = (work) => work.then(() => "no error", ({{ name, code, message, hint, partial }}) =>
          ({{ name, code, message, hint, partial }}));
        const found = await (async () => {{ {script} }})();
        process.stdout.write(JSON.stringify(found ?? null, plain));
    """
    ran = subprocess.run(
        [str(NODE), *options, "--input-type=module", "-e", text],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def relaxed_options() -> list[str]:
    """What switches relaxed SIMD on in a Node that has it as an experiment."""
    option = "--experimental-wasm-relaxed-simd"
    known = subprocess.run([str(NODE), "--v8-options"], capture_output=True, text=True, check=True).stdout
    return [option] if option in known else []


@dataclass
class Fault:
    """What happens to one request: `status` instead of the file, `cut` after some bytes, one byte `spoiled`.

    With an event `stalled`, the server waits for it in the middle: after what is sent until a cut, or after 1000 bytes.
    """

    status: int = 0
    cut: int = -1
    spoiled: bool = False
    whole: bool = False
    """Ignores that a part was asked for."""
    stalled: threading.Event | None = None


@dataclass
class Site:
    """A served bundle."""

    url: str
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    """By the end of the path; each serves one request."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Path, and which part of it was asked for."""

    def parts(self, suffix: str) -> list[str]:
        return [part for path, part in self.requests if path.endswith(suffix)]


@contextmanager
def serving(folder: Path, isolation: bool = True) -> Iterator[Site]:
    connections: list[socket.socket] = []

    class Faulty(Handler):
        def setup(self) -> None:
            super().setup()
            connections.append(self.connection)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            site.requests.append((path, self.headers.get("Range", "")))
            fault = next((f.pop(0) for end, f in site.faults.items() if path.endswith(end) and f), None)
            if fault is None:
                super().do_GET()
            elif fault.status:
                self.send_error(fault.status)
            elif fault.whole:
                del self.headers["Range"]
                super().do_GET()
            else:
                self.spoil(fault)

        def spoil(self, fault: Fault) -> None:
            data = bytearray(Path(self.translate_path(self.path)).read_bytes())
            data[len(data) // 2] ^= fault.spoiled
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            first = fault.cut if fault.cut >= 0 else 1000
            self.wfile.write(data[:first])
            if fault.stalled:
                fault.stalled.wait(30)
            if fault.cut < 0:
                self.wfile.write(data[first:])
            self.close_connection = fault.cut >= 0

    server = Server(folder, "127.0.0.1", 0, isolation, Faulty)
    site = Site(server.url)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        server.server_close()
        thread.join()
