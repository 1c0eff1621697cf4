"""The runtime and the page in headless Chromium: builds, headers, storage, broken downloads, a strict policy."""

from __future__ import annotations

import shutil
import threading

import numpy as np
import pytest
import torch

import sylvester as sv
from sylvester.compiler.manifest import read
from tests import web
from tests.web import PROMPT, Fault, serving

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")
TOKENS = 12


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def context(browser):
    """A profile of its own, which knows no site."""
    context = browser.new_context()
    context.set_default_timeout(20_000)
    yield context
    context.close()


@pytest.fixture(scope="module")
def expected(web_model):
    with sv.load(web_model / "cpu") as cpu:
        return cpu.generate(np.array([PROMPT]), TOKENS)[0, len(PROMPT) :].tolist()


@pytest.fixture
def shard(bundle):
    return web.weights(bundle)


def blank(context, site):
    """A page of the site that loads no model by itself."""
    page = context.new_page()
    page.goto(site.url + "page/icon.svg")
    return page


def made(page, **options):
    """Loads the model with these options; what it generates, its facts, and the progress it told of."""
    script = """async ([options, prompt, count]) => {
        const { load } = await import(new URL("/model.js", location.href).href);
        const events = [];
        const more = { retries: { count: 2, delay: 0 }, onProgress: (event) => events.push(event) };
        try {
          const model = await load({ url: "/", ...more, ...options });
          const { ids } = await model.generate(prompt, { maxNewTokens: count });
          const { facts } = model;
          model.dispose();
          return { ids, facts, events };
        } catch ({ name, message, hint }) {
          return { name, message, hint, events };
        }
      }"""
    return page.evaluate(script, [options, PROMPT, TOKENS])


def until(page, condition):
    """Waits until an expression, which may await, holds."""
    page.evaluate(f"async () => {{ while (!({condition})) await new Promise((next) => setTimeout(next, 2)); }}")


@pytest.mark.parametrize(
    ("options", "isa"),
    [
        ({"threads": 2}, "simd128-threads"),
        ({"threads": 3}, "simd128-threads"),
        ({"threads": 1}, "relaxed"),
        ({"isa": "simd128"}, "simd128"),
    ],
)
def test_every_build_gives_the_tokens_of_the_cpu(context, site, expected, options, isa):
    found = made(blank(context, site), **options)

    assert (found["ids"], found["facts"]["isa"]) == (expected, isa)
    assert found["facts"]["threads"] == options.get("threads", 1)


def test_threads_and_relaxed_simd_give_the_outputs_of_the_cpu(context, site, web_model):
    ids = np.random.default_rng(3).integers(1, 4096, (2, 33))
    script = """async ([ids, all]) => {
        const { load } = await import("/model.js");
        const found = [];
        for (const options of all) {
          const model = await load({ url: "/", ...options });
          found.push(Array.from((await model.run({ input_ids: ids })).logits.data));
          model.dispose();
        }
        return found;
      }"""
    options = [{"threads": 2}, {"threads": 1, "isa": "relaxed"}]
    with sv.load(web_model / "cpu") as cpu:
        logits = cpu(ids).logits

    for found in blank(context, site).evaluate(script, [ids.tolist(), options]):
        np.testing.assert_allclose(np.reshape(found, logits.shape), logits, atol=2e-4)


def test_low_bit_products_of_every_build_are_those_of_the_cpu(context, web_low_bit):
    x = np.random.default_rng(1).standard_normal((5, 96), np.float32)
    script = """async (x) => {
        const { load } = await import("/model.js");
        const loaded = ["simd128", "relaxed"].map((isa) => load({ url: "/", isa }));
        const runs = loaded.map(async (model) => Object.values(await (await model).run({ input: x }))[0]);
        return (await Promise.all(runs)).map(({ data }) => Array.from(data));
      }"""
    with sv.load(web_low_bit / "cpu") as cpu, serving(web_low_bit / "wasm") as site:
        expected = cpu(x)
        for found in blank(context, site).evaluate(script, x.tolist()):
            np.testing.assert_allclose(np.reshape(found, expected.shape), expected, atol=1e-5)


def test_without_the_headers_one_thread_is_used_and_said_why(context, bundle, expected):
    with serving(bundle, isolation=False) as site:
        found = made(blank(context, site), threads=2)

    assert (found["ids"], found["facts"]["isa"], found["facts"]["threads"]) == (expected, "relaxed", 1)
    assert any("Cross-Origin-Opener-Policy" in note for note in found["facts"]["notes"])


@pytest.mark.usefixtures("texts")
def test_the_page_streams_text_under_a_strict_policy(context, site, web_model):
    """Nothing is refused by the policy, nothing fails; the report is drawn."""
    page = context.new_page()
    problems = []
    page.on("console", lambda message: problems.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(site.url)
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("textbox").fill("Once upon a time")
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("button", name="Generate").wait_for()
    page.locator(".out:not(.busy)").wait_for()
    with sv.load(web_model / "cpu") as cpu:
        text = cpu.generate("Once upon a time", 160)

    assert page.locator(".out .text").text_content() == text
    assert "thread" in page.locator("#facts").text_content()
    page.get_by_role("tab", name="Report").click()
    page.locator("svg.plot").first.wait_for()
    assert page.get_by_role("cell", name="derive-decode").is_visible()
    assert problems == []


@pytest.mark.usefixtures("texts")
def test_the_page_loads_again_without_a_server(context, bundle):
    page = context.new_page()
    with serving(bundle) as site:
        page.goto(site.url)
        page.get_by_role("button", name="Generate").wait_for()
        page.evaluate("navigator.serviceWorker.ready.then(() => undefined)")
        for name in ("page/page.css", "vendor/tokenizers.min.mjs", "thread.js", "manifest.json", "report.json"):
            until(page, f"await caches.match('/{name}')")
    page.reload()
    page.get_by_label("Tokens").first.fill("8")
    page.get_by_role("button", name="Generate").click()
    page.locator(".out:not(.busy) .text:not(:empty)").wait_for()

    assert "offline: the stored model is used" in page.locator("#facts").text_content()
    assert page.evaluate("crossOriginIsolated")
    page.get_by_role("tab", name="Report").click()
    page.locator("svg.plot").first.wait_for()


@pytest.mark.parametrize("storage", ["opfs", "cache"])
def test_what_is_stored_is_not_fetched_again(context, site, expected, shard, storage):
    page = blank(context, site)
    first, second = made(page, storage=storage), made(page, storage=storage)

    assert first["ids"] == second["ids"] == expected
    assert len(site.parts(shard)) == 1
    assert {event["status"] for event in second["events"]} == {"stored"}


def test_a_stored_file_that_was_altered_is_fetched_again(context, site, expected, shard):
    page = blank(context, site)
    made(page, storage="opfs")
    page.evaluate(
        """async () => {
          const root = await navigator.storage.getDirectory();
          for await (const [, file] of (await root.getDirectoryHandle("sylvester")).entries()) {
            const { size } = await file.getFile();
            const writer = await file.createWritable({ keepExistingData: true });
            await writer.write({ type: "write", position: size - 4, data: new Uint8Array(4) });
            await writer.close();
          }
        }"""
    )

    found = made(page, storage="opfs")

    assert found.get("ids") == expected, found
    assert len(site.parts(shard)) == 2


def test_a_model_that_changed_takes_the_place_of_the_stored_one(context, bundle, expected, tmp_path):
    folder = tmp_path / "site"
    shutil.copytree(bundle, folder)
    names = """async () => {
        const root = await navigator.storage.getDirectory();
        const found = [];
        for await (const name of (await root.getDirectoryHandle("sylvester")).keys()) found.push(name);
        return found.sort();
      }"""
    with serving(folder) as site:
        page = blank(context, site)
        made(page, storage="opfs", isa="simd128")
        web.cut(bundle, folder, 200_000)
        found = made(page, storage="opfs", isa="simd128")
        stored = page.evaluate(names)
    files = read(folder).files
    used = [name for name in files if name.startswith("weights") or name in ("code/simd128.wasm", "tokenizer.json")]

    assert found["ids"] == expected
    assert sorted(name for name in stored if not name.startswith("manifest")) == sorted(
        files[name].sha256 for name in used
    )


def test_a_broken_shard_is_fetched_again_and_then_an_error(context, site, expected, shard):
    page = blank(context, site)
    site.faults[shard] = [Fault(spoiled=True)] * 2
    failed, found = made(page), made(page)

    assert (failed["name"], "has the sha256" in failed["message"]) == ("ArtefactError", True)
    assert found["ids"] == expected
    assert len(site.parts(shard)) == 3


@pytest.mark.parametrize("storage", ["opfs", "cache", "memory"])
def test_a_cancelled_download_is_resumed(context, site, bundle, expected, shard, storage):
    page = blank(context, site)
    stalled = threading.Event()
    site.faults[shard] = [Fault(cut=1000, stalled=stalled)]
    name = page.evaluate(
        """async ([storage, shard, left]) => {
          const { load } = await import("/model.js");
          const stop = new AbortController();
          const onProgress = ({ file, loaded, total }) => file === shard && total - loaded < left && stop.abort();
          return load({ url: "/", storage, signal: stop.signal, onProgress }).catch((error) => error.name);
        }""",
        [storage, shard, read(bundle).files[shard].bytes - 900],
    )
    stalled.set()

    assert name == "AbortError"
    assert made(page, storage=storage)["ids"] == expected
    assert site.parts(shard) == ["", "bytes=1000-"]


def test_a_full_storage_is_a_note_or_an_error(context, site, expected):
    page = blank(context, site)
    context.new_cdp_session(page).send("Storage.overrideQuotaForOrigin", {"origin": site.url[:-1], "quotaSize": 20_000})
    found, failed = made(page), made(page, storage="opfs")

    assert (found["ids"], found["facts"]["storage"]) == (expected, "memory")
    assert any("not stored for the next visit" in note for note in found["facts"]["notes"])
    assert failed["name"] == "QuotaError"


def test_two_tabs_download_once(context, site, bundle, expected, shard):
    """The second waits for the file that the first fetches, then reads what it stored."""
    pages = [blank(context, site), blank(context, site)]
    stalled = threading.Event()
    site.faults[shard] = [Fault(stalled=stalled)]
    script = """async ([prompt, count]) => {
        const { load } = await import("/model.js");
        globalThis.done = load({ url: "/" }).then((model) => model.generate(prompt, { maxNewTokens: count }));
      }"""
    for page in pages:
        page.evaluate(script, [PROMPT, TOKENS])
    name = read(bundle).files[shard].sha256
    until(pages[1], f"(await navigator.locks.query()).pending.some((lock) => lock.name.endsWith('{name}'))")
    stalled.set()

    assert [page.evaluate("done.then(({ ids }) => ids)") for page in pages] == [expected, expected]
    assert site.parts(shard) == [""]


def test_kernels_of_all_threads_are_swapped_and_remembered(context, bundle, expected, tmp_path):
    script = """async ([prompt, count, options]) => {
        const { load } = await import(new URL("/model.js", location.href).href);
        const model = await load({ url: "/", threads: 2, ...options });
        const say = async () => (await model.generate(prompt, { maxNewTokens: count })).ids;
        const found = [await say(), await model.tuned, await say()];
        model.dispose();
        return found;
      }"""
    with serving(web.eager(bundle, tmp_path / "eager")) as site:
        for storage in ("opfs", "cache"):
            page, visits = blank(context, site), []
            for _ in range(2):
                visits.append(page.evaluate(script, [PROMPT, TOKENS, {"storage": storage}]))
            (_, tuned, _), (_, again, _) = visits

            assert all((before, after) == (expected, expected) for before, _, after in visits)
            assert "default" not in {shape["candidate"] for shape in tuned["shapes"]}
            assert again == {**tuned, "remembered": True}
            assert len(site.parts("simd128-threads-f32.wasm")) == (1 if storage == "opfs" else 2)


@pytest.mark.usefixtures("texts")
def test_the_report_shows_what_was_tuned_on_this_device(context, bundle, tmp_path):
    page = context.new_page()
    with serving(web.eager(bundle, tmp_path / "eager")) as site:
        page.goto(site.url)
        page.get_by_role("tab", name="Report").click()
        page.locator("svg.plot").first.wait_for()
        assert page.get_by_text("Tuned on this device").count() == 0
        page.get_by_role("tab", name="Run").click()
        page.get_by_role("textbox").fill("Once")
        page.get_by_label("Tokens").first.fill("8")
        page.get_by_role("button", name="Generate").click()
        page.locator(".out:not(.busy) .text:not(:empty)").wait_for()
        page.get_by_role("tab", name="Report").click()
        page.get_by_role("heading", name="Tuned on this device").wait_for()

        assert page.get_by_text("f32, k 32, 256 rows").is_visible()


def test_a_model_loads_inside_a_worker(context, bundle, expected, tmp_path):
    folder = tmp_path / "site"
    shutil.copytree(bundle, folder)
    (folder / "inside.js").write_text(
        """import { load } from "./model.js";
        self.onmessage = async ({ data: [prompt, count] }) => {
          const model = await load({ url: "./", threads: 2 });
          self.postMessage((await model.generate(prompt, { maxNewTokens: count })).ids);
        };"""
    )
    with serving(folder) as site:
        ids = blank(context, site).evaluate(
            """(given) => new Promise((made) => {
              const worker = new Worker("/inside.js", { type: "module" });
              worker.onmessage = ({ data }) => made(data);
              worker.postMessage(given);
            })""",
            [PROMPT, TOKENS],
        )

    assert ids == expected


@pytest.mark.usefixtures("texts")
def test_the_page_of_an_encoder_searches(context, web_encoder):
    page = context.new_page()
    with serving(web_encoder / "wasm") as site:
        page.goto(site.url)
        page.get_by_label("Lines to search").fill("one line\nanother\n\none line\nthe last")
        page.get_by_label("Search for").fill("another")
        page.get_by_role("button", name="Search").click()
        page.locator(".found li").first.wait_for()

        assert page.locator(".found li").first.text_content() == "1.00another"
        assert page.locator(".found li").count() == 3


def test_the_page_of_a_vision_model_reads_an_image(context, tmp_path):
    images = {"pixel_values": torch.zeros(2, 3, 8, 8)}
    with sv.compile(web.Eye(), images, target=sv.Target("wasm", isas=("simd128",))) as compiled:
        compiled.save(tmp_path / "eye")
    page = context.new_page()
    with serving(tmp_path / "eye") as site:
        page.goto(site.url)
        green = page.evaluate(
            """async () => {
              const canvas = new OffscreenCanvas(8, 8);
              const context = canvas.getContext("2d");
              context.fillStyle = "#0f0";
              context.fillRect(0, 0, 8, 8);
              return [...new Uint8Array(await (await canvas.convertToBlob()).arrayBuffer())];
            }"""
        )
        file = {"name": "green.png", "mimeType": "image/png", "buffer": bytes(green)}
        page.get_by_label("An image").set_input_files(file)
        page.locator(".found li").first.wait_for()

        assert page.locator(".found li").first.text_content().endswith("class 1")
