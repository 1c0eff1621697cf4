"""Reuse of earlier work: libraries by their text, artefacts by what decides them; damaged ones are rebuilt."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import sylvester as sv
from sylvester.backends import toolchain
from sylvester.backends.cpu import Cpu
from sylvester.backends.toolchain import build_shared
from sylvester.codegen.isa import SCALAR
from sylvester.compiler import compile_cache, driver, knobs
from sylvester.compiler.store import store
from sylvester.compiler.target import host_architecture

ANSWER = '__attribute__((visibility("default"))) int answer(void) { return 42; }\n'
TARGET = sv.Target("cpu", isas=("neon" if host_architecture() == "aarch64" else "scalar",))
NOTE = "note: reused what an earlier run compiled"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """A cache of this test's own; zig's support libraries, which take seconds, are shared."""
    folder = tmp_path_factory.mktemp("cache")
    shared = knobs.cache_folder() / "zig"
    shared.mkdir(parents=True, exist_ok=True)
    (folder / "zig").symlink_to(shared)
    monkeypatch.setenv(knobs.CACHE.name, str(folder))
    monkeypatch.setenv(knobs.REUSE.name, "1")
    return folder


@pytest.fixture
def builds(monkeypatch):
    """The sources that were compiled rather than found."""
    seen, build = [], toolchain._build
    monkeypatch.setattr(toolchain, "_build", lambda source, *rest: (seen.append(source), build(source, *rest))[1])
    return seen


@pytest.fixture
def traces(monkeypatch):
    """The models that were captured rather than found."""
    seen, capture = [], driver.capture
    monkeypatch.setattr(
        driver, "capture", lambda model, *rest, **more: (seen.append(model), capture(model, *rest, **more))[1]
    )
    return seen


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


X = torch.linspace(-1, 1, 12).reshape(2, 6)


def compiled(model: nn.Module, **options: object) -> sv.Compiled:
    return sv.compile(model, (X,), **{"target": TARGET, **options})


def test_a_library_is_built_once(tmp_path, builds):
    first = build_shared(ANSWER, tmp_path / "a.so", SCALAR)
    second = build_shared(ANSWER, tmp_path / "b.so", SCALAR)

    assert builds == [ANSWER]
    assert first.read_bytes() == second.read_bytes()


def test_other_text_and_other_flags_are_other_libraries(tmp_path, builds):
    build_shared(ANSWER, tmp_path / "a.so", SCALAR)
    build_shared(ANSWER.replace("42", "43"), tmp_path / "b.so", SCALAR)
    build_shared(ANSWER, tmp_path / "c.so", SCALAR.__class__(**{**vars(SCALAR), "flags": ("-O1",)}))

    assert len(builds) == 3


@pytest.mark.parametrize("damage", [b"", b"not a library"])
def test_a_damaged_library_is_built_again(tmp_path, builds, damage):
    good = build_shared(ANSWER, tmp_path / "a.so", SCALAR).read_bytes()
    (kept,) = store("code").folder.glob("*/library.so")
    kept.write_bytes(damage)

    assert build_shared(ANSWER, tmp_path / "b.so", SCALAR).read_bytes() == good
    assert len(builds) == 2
    build_shared(ANSWER, tmp_path / "c.so", SCALAR)
    assert len(builds) == 2


def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path, monkeypatch, builds, cache):
    (cache / "kept").write_text("a file where the folder should be")

    build_shared(ANSWER, tmp_path / "a.so", SCALAR)
    build_shared(ANSWER, tmp_path / "b.so", SCALAR)

    assert len(builds) == 2


def test_threads_may_build_the_same_library_at_once(tmp_path):
    workers = [threading.Thread(target=build_shared, args=(ANSWER, tmp_path / f"{n}.so", SCALAR)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()

    assert len({(tmp_path / f"{n}.so").read_bytes() for n in range(4)}) == 1
    assert len(store("code").sizes()) == 1


def test_a_model_is_compiled_once_and_the_ledger_says_so(traces):
    with compiled(network()) as first, compiled(network()) as second:
        assert len(traces) == 1
        assert NOTE not in first.ledger
        assert NOTE in second.ledger
        assert torch.equal(first(X), second(X))
        torch.testing.assert_close(second(X), network()(X))
    with compiled(network()) as third:
        assert NOTE in third.ledger


def _weight(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].bias[0] += 1


@pytest.mark.parametrize(
    "change",
    [_weight, lambda m: setattr(m[0], "note", "x"), lambda m: setattr(m, "1", nn.GELU())],
    ids=["weight", "attribute", "class"],
)
def test_a_changed_model_is_compiled_anew(traces, change):
    compiled(network()).close()
    other = network()
    change(other)
    with compiled(other) as fresh:
        assert len(traces) == 2
        torch.testing.assert_close(fresh(X), other(X))


@pytest.mark.parametrize(
    "options",
    [{"threads": 3}, {"target": sv.Target("cpu", isas=("avx2",))}, {"dynamic": {"input": {0: torch.export.Dim("n")}}}],
    ids=str,
)
@pytest.mark.skipif(host_architecture() != "x86_64", reason="names a variant of x86")
def test_other_options_are_another_artefact(traces, options):
    compiled(network()).close()
    compiled(network(), **options).close()

    assert len(traces) == 2


def test_modes_of_pytorch_are_another_artefact():
    def text() -> str:
        return compile_cache.key(network(), (X,), None, TARGET, (), Cpu()).text

    plain = text()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = text()
    with torch.device("meta"):
        elsewhere = text()

    hook = register_module_forward_hook(lambda module, given, result: result + 1)
    hooked = text()
    hook.remove()

    assert len({plain, cast, hooked}) == 3
    assert elsewhere not in (plain, cast)
    assert text() == plain


def test_options_of_passes_count(traces):
    for passes in (("w8a8",), ("w8a8",), ("bf16",)):
        with compiled(network(), passes=passes) as made:
            reused = NOTE in made.ledger
        assert "compiles this model anew" not in made.ledger

    assert len(traces) == 2
    assert not reused


def test_other_compilers_are_another_artefact(traces, monkeypatch):
    compiled(network()).close()
    monkeypatch.setattr("sylvester.backends.identity.version", lambda compiler: "another")
    compiled(network()).close()

    assert len(traces) == 2


def test_a_damaged_artefact_is_compiled_again(traces):
    compiled(network()).close()
    (entry,) = store("models").folder.glob("[!.]*")
    (entry / "weights.safetensors").write_bytes(b"damaged")

    with compiled(network()) as again:
        assert len(traces) == 2
        torch.testing.assert_close(again(X), network()(X))
    with compiled(network()) as kept:
        assert NOTE in kept.ledger


def test_a_reused_artefact_can_be_saved_and_outlives_the_cache(tmp_path):
    compiled(network()).close()
    with compiled(network()) as reused:
        for key in store("models").sizes():
            store("models").drop(key)
        reused.save(tmp_path / "saved")

    torch.testing.assert_close(sv.load(tmp_path / "saved")(X), network()(X))


@pytest.mark.parametrize("knob", [(knobs.REUSE, "0"), (knobs.CACHE_SIZE, "0")], ids=lambda knob: knob[0].name)
def test_the_knobs_turn_it_off(monkeypatch, traces, knob):
    monkeypatch.setenv(knob[0].name, knob[1])
    compiled(network()).close()
    with compiled(network()) as again:
        assert len(traces) == 2
        assert "anew" not in again.ledger


def test_a_model_without_a_digest_is_compiled_anew_with_a_note(traces):
    for _ in range(2):
        model = network()
        model.lock = threading.Lock()
        with compiled(model) as made:
            assert "note: the next run compiles this model anew: it has a value of type _thread.lock" in made.ledger

    assert len(traces) == 2


def test_a_model_folder_is_known_by_its_files(tmp_path, traces):
    from tests import zoo  # takes seconds to import

    zoo.case("llama-gqa").model.save_pretrained(tmp_path)
    for _ in range(2):
        sv.compile(tmp_path, target=TARGET).close()
    assert len(traces) == 1

    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 3}')
    with sv.compile(tmp_path, target=TARGET) as other:
        assert other.manifest.generation.eos_token_ids == (3,)


def test_two_processes_compile_the_same_model_at_once():
    code = (
        "import torch; from tests.test_compile_cache import *\n"
        "with compiled(network()) as made: print(made(X).tolist())"
    )
    root = Path(__file__).parent.parent
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    results = [run.communicate() for run in runs]

    assert [run.returncode for run in runs] == [0, 0], results
    assert results[0][0] == results[1][0]
    with compiled(network()) as third:
        assert NOTE in third.ledger
        assert str(third(X).tolist()) == results[0][0].strip()
