"""The JavaScript runtime in Node: what it computes is what the CPU artefact computes; wrong calls."""

from __future__ import annotations

import re

import numpy as np
import pytest

import sylvester as sv
from sylvester.codegen.plan import ABI
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.text import load_tokenizer
from tests import web
from tests.web import PROMPT, node

pytestmark = pytest.mark.skipif(web.NODE is None, reason="node is not installed")

TOLERANCE = 2e-4
"""Largest difference of outputs that are about 1: vector units add in another order."""
TEXTS = ["Once upon a time", "naïve café, 東京 — 🦊!\n\n  two  spaces", "", "x" * 50, "\u0130stanbul ﬁn"]


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


def test_threads_give_the_same_tokens_where_node_can_be_trusted_with_them(bundle):
    script = """const found = [];
        for (const threads of [1, 2]) {
          const model = await sylvester.load(folder, { threads });
          found.push((await model.generate(given.prompt, { maxNewTokens: 32 })).ids, model.facts);
          model.dispose();
        }
        return [...found, parseInt(process.versions.node)];"""
    one, _, two, facts, version = node(bundle, script, prompt=PROMPT)

    assert one == two
    assert facts["threads"] == (2 if version >= 22 else 1)
    assert any("threads need Node 22" in note for note in facts["notes"]) == (version < 22)


@pytest.mark.usefixtures("texts")
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


@pytest.mark.usefixtures("texts")
def test_embeddings_are_the_mean_over_the_tokens(web_encoder):
    script = """const model = await sylvester.load(folder);
        return [await model.embed(given.texts), await model.embed(given.texts[0], { normalize: false })];"""
    texts = ["Rain in the evening.", "東京"]
    units, mean = node(web_encoder / "wasm", script, texts=texts)
    tokenizer = load_tokenizer(web_encoder / "cpu")
    for text, unit in zip(texts, units, strict=True):
        ids = np.array([tokenizer.encode(text).ids])
        with sv.load(web_encoder / "cpu") as cpu:
            expected = cpu(input_ids=ids, attention_mask=np.ones_like(ids))["last_hidden_state"].mean((0, 1))
        np.testing.assert_allclose(unit, expected / np.linalg.norm(expected), atol=TOLERANCE)
        if text == texts[0]:
            np.testing.assert_allclose(mean, expected, atol=TOLERANCE)


def test_builds_that_do_not_run_here_are_refused_with_reasons(bundle):
    script = """const found = [];
        for (const isa of ["relaxed-threads", "avx2"]) found.push(await failure(sylvester.load(folder, { isa })));
        const { facts } = await sylvester.load(folder, { threads: 1 });
        return [...found, facts];"""
    missing, unknown, facts = node(bundle, script)

    assert "relaxed-threads is not used: the model was compiled without it" in missing["message"]
    assert "no build is named avx2" in unknown["message"]
    assert (facts["isa"] in ("simd128", "relaxed"), facts["threads"]) == (True, 1)
    assert any("simd128-threads is not used: one thread was asked for" in note for note in facts["notes"])


def test_engines_that_multiply_bytes_wrongly_do_not_get_relaxed_simd(web_low_bit):
    x = np.random.default_rng(0).standard_normal((5, 96), np.float32)
    script = """const model = await sylvester.load(folder, { threads: 1 });
        const [input] = model.manifest.entries.forward.inputs;
        const [output] = Object.values(await model.run({ [input.name]: given.x }));
        return [output.data, model.facts];"""
    found, facts = node(web_low_bit / "wasm", script, *web.relaxed_options(), x=x.tolist())
    with sv.load(web_low_bit / "cpu") as cpu:
        np.testing.assert_allclose(np.reshape(found, (5, 40)), cpu(x), atol=1e-5)

    assert facts["isa"] == "relaxed" or any("relaxed is not used: this engine" in note for note in facts["notes"])


def test_types_and_runtime_name_the_same(bundle):
    declared = set(re.findall(r"export (?:class|function) (\w+)", (bundle / "model.d.ts").read_text()))
    exported, abi = node(bundle, "return [Object.keys(sylvester), Number((await module('code.js')).ABI)];")

    assert declared == set(exported)
    assert abi == ABI


def test_python_says_where_it_runs(bundle):
    with pytest.raises(Unsupported, match="runs in a page or in Node") as failed:
        sv.load(bundle)(np.array([[1]]))

    assert "sylvester serve" in failed.value.hint
