"""Downloads in Node: broken, altered, cancelled and gone on with."""

from __future__ import annotations

import threading

import pytest

from sylvester.compiler.manifest import read
from tests import web
from tests.web import Fault, node, weights

pytestmark = pytest.mark.skipif(web.NODE is None, reason="node is not installed")
FAST = {"retries": {"count": 3, "delay": 0}}
LOAD = """const events = [];
    const wanted = { ...given.options, isa: "simd128", onProgress: (event) => events.push(event) };
    const attempt = async () => (await sylvester.load(given.url, wanted)).generate([5, 77], { maxNewTokens: 3 });"""


def test_a_broken_download_goes_on_where_it_broke_off(site, bundle):
    name = weights(bundle)
    site.faults[name] = [Fault(cut=1000), Fault(cut=500), Fault(status=503)]
    made = node(bundle, LOAD + "return [await attempt(), events];", url=site.url, options=FAST)
    first, *rest = site.parts(name)
    last = made[1][-1]

    assert len(made[0]["ids"]) == 3
    assert first == ""
    assert rest == ["bytes=1000-", "bytes=500-", "bytes=500-"]
    assert (
        last["loaded"]
        == last["total"]
        == sum(read(bundle).files[file].bytes for file in ("weights.json", "code/simd128.wasm", "tokenizer.json", name))
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
        const onProgress = ({ file, loaded, total }) =>
          file === given.name && total - loaded < given.left && stop.abort();
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
    script = (
        "const found = []; for (const url of given.urls) found.push(await failure(sylvester.load(url))); return found;"
    )
    cpu, nothing, wrong = node(
        bundle, script, urls=[str(web_model / "cpu"), str(web_model / "none"), site.url + "nowhere/"]
    )

    assert (cpu["name"], "describes no model for the web" in cpu["message"]) == ("ArtefactError", True)
    assert (nothing["name"], wrong["name"]) == ("NetworkError", "NetworkError")


def test_many_shards_are_put_together(site, bundle, tmp_path):
    many = web.cut(bundle, tmp_path / "many", 100_000)
    script = """const ids = [];
        for (const url of given.urls) ids.push((await (await sylvester.load(url)).generate([5, 77, 8])).ids);
        return ids;"""
    one, found = node(bundle, script, urls=[str(bundle), str(many)])

    assert one == found
    assert len(list((many / "weights").iterdir())) > 4
