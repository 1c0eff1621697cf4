"""Micro-kernels chosen in Node: swapped without another result, remembered, in turn with calls, off, and broken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sylvester.backends.toolchain import build_shared
from sylvester.codegen.isa import SIMD128
from sylvester.codegen.layout import Format
from sylvester.codegen.web_candidates import module
from sylvester.compiler.manifest import read
from tests import web
from tests.web import PROMPT, node

pytestmark = pytest.mark.skipif(web.NODE is None, reason="node is not installed")
MODULE, PROBLEMS = "code/tuning/simd128-f32.wasm", "code/tuning/simd128.json"
TUNED = """const load = (options = {}) => sylvester.load(folder, { isa: "simd128", ...options });
    const say = async (model) => (await model.generate(given.prompt, { maxNewTokens: 12 })).ids;"""


@pytest.fixture
def eager(bundle, tmp_path):
    """A bundle whose page takes the best candidate however slow it is, after few and short batches."""
    return web.eager(bundle, tmp_path / "eager")


def spoiled(folder: Path) -> None:
    """Candidates that add 1 to every activation."""
    text, right = module(Format("f32"), SIMD128), "const vf x = vf_set(a[r * lda"
    assert right in text
    build_shared(text.replace(right, "const vf x = vf_set(1 + a[r * lda"), folder / MODULE, SIMD128, beside=True)
    read(folder).seal(folder)


def test_kernels_are_swapped_without_another_result_and_remembered(eager):
    script = (
        TUNED
        + """
        const found = [];
        for (let visit = 0; visit < 2; visit++) {
          const model = await load();
          const before = await say(model);
          const tuned = await model.tuned;
          found.push({ before, tuned, after: await say(model), facts: model.facts.tuned });
          model.dispose();
        }
        return found;"""
    )
    first, second = node(eager, script, prompt=PROMPT)
    problems = json.loads((eager / PROBLEMS).read_bytes())["problems"]
    shapes = first["tuned"]["shapes"]

    assert first["before"] == first["after"] == second["before"] == second["after"]
    assert first["facts"] == first["tuned"]
    assert (first["tuned"]["remembered"], first["tuned"]["notes"]) == (False, [])
    assert 0 < first["tuned"]["seconds"] < 30
    assert [shape["name"] for shape in shapes][:2] == ["f32, k 32, 1 row", "f32, k 56, 1 row"]
    assert all(shape["candidate"] in p["candidates"] for shape, p in zip(shapes, problems, strict=True))
    assert all(min(shape["default"], shape["tuned"]) > 0 for shape in shapes)
    assert second["tuned"] == {**first["tuned"], "remembered": True}


def test_chosen_kernels_run(eager):
    """Those that are wrong, if they were not dropped, give another text: so the right ones run too."""
    spoiled(eager)
    web.change(eager / "trials.js", {"if (bench.agrees(first + number))": "if (true)"})
    script = (
        TUNED
        + """const model = await load();
        const before = await say(model);
        await model.tuned;
        return [before, await say(model)];"""
    )
    before, after = node(eager, script, prompt=PROMPT)

    assert before != after


def test_wrong_candidates_are_dropped_and_told(eager):
    spoiled(eager)
    script = (
        TUNED
        + """const model = await load();
        return [await say(model), await model.tuned, await say(model)];"""
    )
    before, tuned, after = node(eager, script, prompt=PROMPT)

    assert before == after
    assert {shape["candidate"] for shape in tuned["shapes"]} == {"default"}
    assert all("give other results and are not used" in note for note in tuned["notes"])
    assert len(tuned["notes"]) == len(tuned["shapes"])


@pytest.mark.parametrize("how", ["altered", "no module", "missing"])
def test_a_broken_module_leaves_the_defaults_and_says_so(eager, how):
    if how == "missing":
        (eager / MODULE).unlink()
    else:
        data = bytearray((eager / MODULE).read_bytes())
        data[4 if how == "no module" else len(data) // 2] ^= 1
        (eager / MODULE).write_bytes(data)
    if how == "no module":
        read(eager).seal(eager)
    script = (
        TUNED
        + """const model = await load();
        return [await say(model), await model.tuned, await say(model)];"""
    )
    before, tuned, after = node(eager, script, prompt=PROMPT)

    assert before == after
    assert tuned["shapes"] == []
    assert "f32 keeps the defaults, the module of its candidates cannot be had" in tuned["notes"][0]


def test_time_and_the_switch(eager):
    script = (
        TUNED
        + """const found = [];
        for (const tune of [false, 0, 1e-9]) {
          const model = await load({ tune });
          found.push([await say(model), await model.tuned]);
        }
        return [await failure(load({ tune: "soon" })), ...found];"""
    )
    wrong, (ids, off), (also, zero), (more, short) = node(eager, script, prompt=PROMPT)

    assert (wrong["name"], "tune is soon, expected seconds or false" in wrong["message"]) == ("InputError", True)
    assert ids == also == more
    assert off == zero == {"seconds": 0, "remembered": False, "shapes": [], "notes": ["tuning is switched off"]}
    problems = json.loads((eager / PROBLEMS).read_bytes())["problems"]
    assert len(short["shapes"]) <= 1  # what one slice does
    assert len(short["shapes"]) + len(short["notes"]) == len(problems)
    assert short["notes"][-1] == "the time was up: f32, k 56, 4 rows keeps the default"


def test_calls_are_answered_while_kernels_are_timed(bundle):
    """At the usual pace, which takes seconds; disposing ends it."""
    script = (
        TUNED
        + """const model = await load();
        await say(model);
        let done = false;
        const tuned = failure(model.tuned.finally(() => (done = true)));
        await new Promise((next) => setTimeout(next, 600));
        const waits = [];
        for (let n = 0; n < 5; n++) {
          const start = performance.now();
          await model.run({ input_ids: [[5, 6]] });
          waits.push(performance.now() - start);
        }
        const early = !done;
        model.dispose();
        return [early, waits, await tuned];"""
    )
    early, waits, ended = node(bundle, script, prompt=PROMPT)

    assert early
    assert sorted(waits)[2] < 200
    assert ended["name"] == "AbortError"


def test_a_bundle_without_candidates_is_told(eager):
    shutil.rmtree(eager / "code" / "tuning")
    read(eager).seal(eager)
    tuned = node(eager, TUNED + "const model = await load(); await say(model); return model.tuned;", prompt=PROMPT)

    assert tuned["notes"] == ["this model has no kernels to choose from"]
