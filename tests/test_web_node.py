"""The JavaScript runtime in Node: what it computes is what the CPU artefact computes; downloads; errors."""

from __future__ import annotations

import hashlib
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import sylvester as sv
from sylvester.backends import web_tokenizer
from sylvester.codegen.plan import ABI
from sylvester.compiler import sizes
from sylvester.compiler.errors import CompileError, Unsupported
from sylvester.compiler.manifest import read
from sylvester.compiler.text import load_tokenizer
from tests import web
from tests.web import PROMPT, Fault, node, serving

pytestmark = pytest.mark.skipif(web.NODE is None, reason="node is not installed")

TOLERANCE = 2e-4
"""Largest difference of outputs that are about 1: vector units add in another order."""
TEXTS = ["Once upon a time", "naïve café, 東京 — 🦊!\n\n  two  spaces", "", "x" * 50, "\u0130stanbul ﬁn"]
FAST = {"retries": {"count": 3, "delay": 0}}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    torch.manual_seed(0)
    inputs = {"input_ids": torch.zeros(2, 7, dtype=torch.int64), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    return web.build_pair(web.Encoder().eval(), inputs, tmp_path_factory.mktemp("encoder"), ("simd128",))


@pytest.fixture
def bundle(web_model):
    return web_model / "wasm"


@pytest.fixture
def site(bundle):
    with serving(bundle) as site:
        yield site


def weights(folder: Path) -> str:
    return next(name for name in read(folder).files if name.startswith("weights/"))


def test_outputs_are_those_of_the_cpu(web_model, bundle):
    ids = np.random.default_rng(0).integers(1, 4096, (2, 9))
    found = node(
        bundle,
        """const model = await sylvester.load(folder);
        const { logits } = await model.run({ input_ids: given.ids });
        return logits;""",
        ids=ids.tolist(),
    )
    with sv.load(web_model / "cpu") as cpu:
        expected = cpu(ids).logits

    assert (found["dtype"], found["shape"]) == ("float32", [2, 9, 4096])
    np.testing.assert_allclose(np.reshape(found["data"], expected.shape), expected, atol=TOLERANCE)


@pytest.mark.parametrize("length", [1, 5, 255, 256, 257, 300])
def test_greedy_tokens_are_those_of_the_cpu(web_model, bundle, length):
    """Prompts of more than 256 tokens are read in parts; the second begins as the first, which is not read again."""
    prompt = np.random.default_rng(length).integers(1, 4096, length).tolist()
    found = node(
        bundle,
        """const model = await sylvester.load(folder);
        const once = await model.generate(given.prompt, { maxNewTokens: 16 });
        const again = await model.generate([...given.prompt, once.ids[0]], { maxNewTokens: 15 });
        return [once.ids, again.ids];""",
        prompt=prompt,
    )
    with sv.load(web_model / "cpu") as cpu:
        expected = cpu.generate(np.array([prompt]), 16)[0, length:].tolist()

    assert found == [expected, expected[1:]]


def test_text_is_that_of_the_cpu(web_model, bundle):
    script = """const model = await sylvester.load(folder);
        const pieces = [];
        const all = await model.generate(given.text, { maxNewTokens: 24, onToken: ({ text }) => pieces.push(text) });
        const stopped = await model.generate(given.text, { maxNewTokens: 24, stop: all.text.slice(9, 12) });
        return { all, stopped, pieces };"""
    found = node(bundle, script, text=TEXTS[1])
    with sv.load(web_model / "cpu") as cpu:
        expected = cpu.generate(TEXTS[1], 24)
        stopped = cpu.generate(TEXTS[1], 24, stop=found["all"]["text"][9:12])

    assert found["all"]["text"] == "".join(found["pieces"]) == expected
    assert found["stopped"]["text"] == stopped
    assert found["stopped"]["finish"] == "stop"


def test_drawing_is_repeatable(bundle):
    script = """const model = await sylvester.load(folder);
        const draw = async (options) => (await model.generate(given.prompt, { maxNewTokens: 12, ...options })).ids;
        const hot = { temperature: 3, seed: 7 };
        return {
          first: await draw(hot), again: await draw(hot), other: await draw({ ...hot, seed: 8 }),
          greedy: await draw({}), one: await draw({ ...hot, topK: 1 }), tiny: await draw({ ...hot, topP: 1e-9 }),
          cold: await draw({ ...hot, temperature: 1e-9 }), both: await draw({ ...hot, topK: 40, topP: 0.9 }),
        };"""
    found = node(bundle, script, prompt=PROMPT)

    assert found["first"] == found["again"] != found["other"]
    assert found["greedy"] == found["one"] == found["tiny"] == found["cold"] != found["both"]


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


def test_a_cancelled_generation_gives_what_was_made(bundle):
    script = """const model = await sylvester.load(folder);
        const stop = new AbortController();
        let made = 0;
        const onToken = () => ++made === 5 && stop.abort();
        const failed = await failure(model.generate(given.prompt, { signal: stop.signal, onToken }));
        const after = await model.generate(given.prompt, { maxNewTokens: 5 });
        return { failed, after };"""
    found = node(bundle, script, prompt=PROMPT)
    partial = found["failed"]["partial"]["ids"]

    assert (found["failed"]["name"], found["failed"]["code"]) == ("AbortError", "abort")
    assert 5 <= len(partial) < web.LENGTH - len(PROMPT)
    assert partial[:5] == found["after"]["ids"]


CALLS = {
    "run({ input_id: [[1]] })": "unexpected input input_id, expected input_ids",
    "run({})": "missing input input_ids",
    "run([[1]])": "given by name",
    "run({ input_ids: [1, 2] })": "has shape [2], expected [",
    "run({ input_ids: [[1, 2], [3]] })": "different lengths",
    "run({ input_ids: [[1.5]] })": "no int64",
    "run({ input_ids: { data: new Float32Array(2), shape: [1, 2] } })": "Float32Array, expected a BigInt64Array",
    "run({ input_ids: { data: [1, 2], shape: [1, 3] } })": "has 2 values",
    "run({ input_ids: [[5000]] })": "index 5000 in input input_ids is out of range",
    "run({ input_ids: [new Array(321).fill(1)] })": "above the compiled maximum of 320",
    "run({ input_ids: [[]] })": "below the compiled minimum of 1",
    "run({ input_ids: [[1]] }, { entry: 'encode' })": "no entry named encode",
    "generate([])": "no tokens",
    "generate([1, 4096])": "token id 4096, expected 0 to 4095",
    "generate(7)": "expected a text or token ids",
    "generate([1], { maxNewTokens: 320 })": "1 prompt tokens + 320 new tokens = 321",
    "generate([1], { temperature: -1 })": "temperature is -1, expected 0 (greedy) or more",
    "generate([1], { topP: 2 })": "topP is 2",
    "generate([1], { topK: 0 })": "topK is 0",
    "generate([1], { stop: [1.5] })": "stop has 1.5",
}


def test_wrong_calls_say_what_is_wrong(bundle):
    calls = ", ".join(f"() => model.{call}" for call in CALLS)
    script = f"""const model = await sylvester.load(folder);
        const found = [];
        for (const call of [{calls}, () => model.embed("a")]) found.push(await failure(call()));
        model.dispose();
        return [found, await failure(model.run({{}}))];"""
    (*found, embedding), disposed = node(bundle, script)

    for (call, expected), error in zip(CALLS.items(), found, strict=True):
        assert (error["name"], expected in error["message"]) == ("InputError", True), f"{call}: {error}"
    assert embedding["name"] == "UnsupportedError"
    assert "disposed" in disposed["message"]


def test_embeddings_are_the_mean_over_the_tokens(encoder):
    """By ids in place of texts: the tokenizer is not what is tested."""
    script = """const { embed } = await module("embed.js");
        const { loadModel } = await module("loading.js");
        const caller = { signal: new AbortController().signal, report() {} };
        const { engine } = await loadModel({ url: folder, threads: 1 }, new Map(), caller);
        const ids = (text) => Array.from(text, Number);
        return [await embed(engine, ids, "3412", {}), await embed(engine, ids, "3412", { normalize: false })];"""
    unit, mean = node(encoder / "wasm", script)
    ids = np.array([[3, 4, 1, 2]])
    with sv.load(encoder / "cpu") as cpu:
        expected = cpu(input_ids=ids, attention_mask=np.ones_like(ids))["last_hidden_state"].mean((0, 1))

    np.testing.assert_allclose(mean, expected, atol=TOLERANCE)
    np.testing.assert_allclose(unit, expected / np.linalg.norm(expected), atol=TOLERANCE)


def test_tokens_are_those_of_python(bundle):
    script = """const { readFile } = await import("node:fs/promises");
        const { loadTokenizer } = await module("text.js");
        const tokenizer = await loadTokenizer(JSON.parse(await readFile(new URL(folder + "tokenizer.json"))));
        return given.texts.map((text) => [tokenizer.encode(text), tokenizer.decode(tokenizer.encode(text))]);"""
    tokenizer = load_tokenizer(bundle)

    for text, (ids, decoded) in zip(TEXTS, node(bundle, script, texts=TEXTS), strict=True):
        assert ids == tokenizer.encode(text).ids
        assert decoded == tokenizer.decode(ids)


LOAD = """const events = [];
    const wanted = { ...given.options, threads: 1, onProgress: (event) => events.push(event) };
    const attempt = () => sylvester.load(given.url, wanted).then((model) => model.generate([5, 77], { maxNewTokens: 3 }));"""


def test_a_broken_download_goes_on_where_it_broke_off(site, bundle):
    name = weights(bundle)
    site.faults[name] = [Fault(cut=1000), Fault(cut=500), Fault(status=503)]
    made = node(bundle, LOAD + "return [await attempt(), events];", url=site.url, options=FAST)
    first, *rest = site.parts(name)
    last = made[1][-1]

    assert len(made[0]["ids"]) == 3
    assert first == ""
    assert rest == ["bytes=1000-", "bytes=500-", "bytes=500-"]
    assert last["loaded"] == last["total"] == sum(
        read(bundle).files[file].bytes for file in ("weights.json", "code/simd128.wasm", "tokenizer.json", name)
    )


def test_a_server_without_ranges_sends_the_file_again(site, bundle):
    name = weights(bundle)
    site.faults[name] = [Fault(cut=1000), Fault(whole=True)]

    assert node(bundle, LOAD + "return (await attempt()).ids;", url=site.url, options=FAST)
    assert site.parts(name) == ["", "bytes=1000-"]


@pytest.mark.parametrize(
    ("faults", "name", "message"),
    [
        ([Fault(status=404)], "NetworkError", "answered 404"),
        ([Fault(status=500)] * 4, "NetworkError", "answered 500"),
        ([Fault(spoiled=True)] * 2, "ArtefactError", "has the sha256"),
    ],
)
def test_what_cannot_be_fetched_is_an_error(site, bundle, faults, name, message):
    site.faults[weights(bundle)] = list(faults)
    found = node(bundle, LOAD + "return failure(attempt());", url=site.url, options=FAST)

    assert (found["name"], message in found["message"]) == (name, True), found
    assert len(site.parts(weights(bundle))) == len(faults)


def test_a_broken_shard_is_fetched_again(site, bundle):
    site.faults[weights(bundle)] = [Fault(spoiled=True)]
    ids, statuses = node(
        bundle, LOAD + "return [(await attempt()).ids, events.map((e) => e.status)];", url=site.url, options=FAST
    )

    assert len(ids) == 3
    assert "broken" in statuses


def test_a_cancelled_download_is_resumed_from_memory(site, bundle):
    name = weights(bundle)
    stalled = threading.Event()
    site.faults[name] = [Fault(cut=1000, stalled=stalled)]
    script = """const stop = new AbortController();
        const onProgress = ({ file, loaded, total }) => file === given.name && total - loaded < given.left && stop.abort();
        const first = await failure(sylvester.load(given.url, { threads: 1, signal: stop.signal, onProgress }));
        const model = await sylvester.load(given.url, { threads: 1 });
        return [first, (await model.generate([5, 77], { maxNewTokens: 3 })).ids];"""
    left = read(bundle).files[name].bytes - 900
    failed, ids = node(bundle, script, url=site.url, name=name, left=left)
    stalled.set()

    assert failed["name"] == "AbortError"
    assert site.parts(name) == ["", "bytes=1000-"]
    assert len(ids) == 3


def test_other_folders_are_refused(bundle, web_model, site):
    script = "const found = []; for (const url of given.urls) found.push(await failure(sylvester.load(url))); return found;"
    cpu, nothing, wrong = node(
        bundle, script, urls=[str(web_model / "cpu"), str(web_model / "none"), site.url + "nowhere/"]
    )

    assert (cpu["name"], "describes no model for the web" in cpu["message"]) == ("ArtefactError", True)
    assert (nothing["name"], wrong["name"]) == ("NetworkError", "NetworkError")


def test_builds_that_do_not_run_here_are_refused_with_reasons(bundle):
    script = """const found = [];
        for (const isa of ["relaxed-threads", "avx2"]) found.push(await failure(sylvester.load(folder, { isa })));
        const { facts } = await sylvester.load(folder, { threads: 1 });
        return [...found, facts];"""
    missing, unknown, facts = node(bundle, script)

    assert "relaxed-threads is not used: the model was compiled without it" in missing["message"]
    assert "no build is named avx2" in unknown["message"]
    assert (facts["isa"], facts["threads"]) == ("simd128", 1)
    assert any("simd128-threads is not used: one thread was asked for" in note for note in facts["notes"])


def test_dimensions_are_evaluated_as_in_python(bundle):
    texts = ["2*s0 + 1", "s0//3", "(s0 - 9)//4", "Mod(s0 - 9, 4)", "(s0 - 9) % 4", "Max(1, s0 - s1)*-2", "FloorDiv(s0, s1)"]
    script = """const { evaluate, solve, symbols } = await module("sizes.js");
        const values = { s0: 7, s1: 2 };
        const bad = given.bad.map((text) => { try { return evaluate(text, values); } catch (error) { return error.name; } });
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
          seen.push(sorted.every(([at, size], i) => at % 64 === 0 && (i + 1 === sorted.length || at + size <= sorted[i + 1][0])));
        }
        for (const at of blocks.keys()) heap.release(at);
        return [seen.every(Boolean), heap.free.length, heap.end, heap.bytes < 3e6];"""

    assert node(bundle, script) == [True, 0, 16 * 65536, True]


def test_types_and_runtime_name_the_same(bundle):
    declared = set(re.findall(r"export (?:class|function) (\w+)", (bundle / "model.d.ts").read_text()))
    exported, abi = node(
        bundle, "return [Object.keys(sylvester), Number((await module('code.js')).ABI)];"
    )

    assert declared == set(exported)
    assert abi == ABI


def test_python_says_where_it_runs(bundle):
    with pytest.raises(Unsupported, match="runs in a page or in Node") as failed:
        sv.load(bundle)(np.array([[1]]))

    assert "sylvester serve" in failed.value.hint


def test_a_tokenizer_that_cannot_be_had_is_a_note(monkeypatch, tmp_path):
    from sylvester.backends.web_bundle import write_bundle
    from sylvester.compiler.program import Program

    monkeypatch.setenv("SYLVESTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(web_tokenizer.shutil, "which", lambda name: None)
    program = Program({}, {}, {}, info={"tokenizer": "tokenizer.json"})
    (note,) = write_bundle(program, tmp_path / "bundle")

    assert "npm is not installed" in note
    assert "install Node.js" in note
    assert not (tmp_path / "bundle" / "vendor").exists()


def test_an_altered_tokenizer_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("SYLVESTER_CACHE", str(tmp_path))
    monkeypatch.setattr(web_tokenizer, "SHA512", "another")
    npm = tmp_path / "npm-command"
    npm.write_text("#!/bin/sh\necho altered > package.tgz\n")
    npm.chmod(0o755)
    monkeypatch.setattr(web_tokenizer.shutil, "which", lambda name: str(npm))

    with pytest.raises(CompileError, match="expected another"):
        web_tokenizer.archive()
    assert not list((tmp_path / "npm").glob("*.tgz"))
