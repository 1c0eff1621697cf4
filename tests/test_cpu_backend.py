"""What the CPU backend refuses, reports at run time, and keeps equal between variants and thread counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from sylvester.backends import cpu_runtime
from sylvester.backends.cpu import Cpu
from sylvester.compiler import knobs
from sylvester.compiler.errors import CompileError, InputError, Unsupported
from sylvester.compiler.manifest import Manifest
from sylvester.compiler.program import Binding, Entry, Output, Program, StateSlot, fake_like
from sylvester.compiler.progress import silent
from sylvester.compiler.runner import State
from sylvester.compiler.target import Target
from sylvester.compiler.weights import ParameterStore
from tests.kernel_harness import supported
from tests.programs import program

VOCAB, WIDTH, CAPACITY = 11, 32, 8
TABLE, SQUARE = torch.randn(VOCAB, WIDTH), torch.randn(WIDTH, WIDTH) / 6
IDS = torch.randint(VOCAB, (2, 5))
attention, kv_update, rms_norm = (
    torch.ops.sylvester.attention,
    torch.ops.sylvester.kv_update,
    torch.ops.sylvester.rms_norm,
)


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    return F.embedding(ids, table)


def padded_embedding(ids: Tensor, table: Tensor) -> Tensor:
    """The position before the first token is read by no one."""
    return F.pad(F.embedding(ids, table), (0, 0, 1, 0))


def first_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.softmax(x, -1)
    return y[:2], y


def shared_weight(ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix that is multiplied by, read by rows, read transposed, and returned."""
    x = F.embedding(ids, table)
    return F.linear(x, table), x @ table.T, table * 2


def network(x: Tensor, w: Tensor) -> Tensor:
    for _ in range(2):
        x = x + F.linear(torch.softmax(F.linear(rms_norm(x, None, 1e-6), w), -1), w).relu()
        q = x.view(x.shape[0], x.shape[1], 4, WIDTH // 4).transpose(1, 2)
        x = x + attention(q, q, q, None, None, 0.35, True, 0).transpose(1, 2).flatten(2)
    return x + x.mean(1, keepdim=True)


FUNCTIONS: dict[str, tuple[Callable[..., object], Tensor, dict[str, Tensor]]] = {
    "embedding": (embedding, IDS, {"table": TABLE}),
    "padded_embedding": (padded_embedding, IDS, {"table": TABLE}),
    "first_rows": (first_rows, torch.randn(4, 3), {}),
    "shared_weight": (shared_weight, IDS, {"table": TABLE}),
    "network": (network, torch.randn(2, 5, WIDTH), {"w": SQUARE}),
}


def cached() -> tuple[Entry, StateSlot]:
    """Write a key into a cache, attend to all of it."""
    graph, mode = fx.Graph(), FakeTensorMode()
    result = Entry(graph, [Output("output", "y"), Output("state", "cache")])
    end = graph.output([])
    new = torch.zeros(1, 2, 3, 8)
    with mode:
        fake = {"new": torch.empty(new.shape), "past": torch.empty((), dtype=torch.int64)}
    places = []
    for name, like in fake.items():
        with graph.inserting_before(end):
            places.append(graph.placeholder(name))
        places[-1].meta |= {"val": like, "bind": Binding("input", name)}
    slot = StateSlot(0, (1, 2, CAPACITY, 8), torch.float32)
    cache = result.bind("state", "cache", fake_like(mode, torch.zeros(slot.shape)))
    updated = result.emit(kv_update.default, cache, *places, before=end)
    y = result.emit(attention.default, places[0], updated, updated, None, places[1], 0.35, True, 0, before=end)
    end.args = ((y, updated),)
    return result, slot


def all_entries() -> Program:
    entry, slot = cached()
    whole = Program(ParameterStore(), {"cached": entry}, {"cache": slot})
    for name, (function, x, weights) in FUNCTIONS.items():
        part = program(function, x, weights=weights, axes=lambda x: range(min(x.dim(), 2)))
        whole.entries[name] = part.main
        for key in part.weights:
            whole.weights[key] = part.weights[key]
    return whole


@pytest.fixture(scope="module")
def whole() -> Program:
    return all_entries()


@pytest.fixture(scope="module")
def artefact(whole: Program, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("cpu")
    return folder, Cpu().build(whole, Target("cpu"), folder, silent)


@pytest.fixture(scope="module")
def engine(artefact: tuple[Path, Manifest]) -> Iterator[cpu_runtime.Engine]:
    loaded = cpu_runtime.load(*artefact, 2)
    yield loaded
    loaded.close()


def first(results: dict[str, object]) -> object:
    return next(iter(results.values()))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_are_those_of_the_program(name: str, whole: Program, engine: cpu_runtime.Engine) -> None:
    x = FUNCTIONS[name][1]
    for given in (x, x[:1, 1:], x.repeat(3, *[1] * (x.dim() - 1))):
        if name == "first_rows" and len(given) < 2:
            continue
        expected = whole.run(name, {"x0": given})

        found = engine.run(name, {"x0": given.contiguous().numpy()})

        assert len(found) == len(expected)
        for actual, value in zip(found.values(), expected.values(), strict=True):
            torch.testing.assert_close(torch.from_numpy(actual), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", [VOCAB, -1, 2**40])
def test_token_id_out_of_range_is_an_error_at_run_time(wrong: int, engine: cpu_runtime.Engine) -> None:
    ids = IDS.clone()
    ids[1, 3] = wrong
    for entry in ("embedding", "padded_embedding", "shared_weight"):
        with pytest.raises(InputError, match=f"index {wrong} in input 'x0' is out of range"):
            engine.run(entry, {"x0": ids.numpy()})
    engine.run("embedding", {"x0": IDS.numpy()})


def test_cache_grows_over_calls_as_in_the_program(whole: Program, engine: cpu_runtime.Engine) -> None:
    state, slots = empty(), {"cache": torch.zeros(1, 2, CAPACITY, 8)}
    for past in (0, 3, 5):
        new, state.position = torch.randn(1, 2, 3, 8), past
        expected = whole.run("cached", {"new": new, "past": torch.tensor(past)}, slots)
        found = engine.run("cached", {"new": new.numpy()}, state)
        slots = {"cache": expected["cache"]}
        torch.testing.assert_close(torch.from_numpy(found["y"]), expected["y"], rtol=1e-5, atol=1e-6)
        assert np.array_equal(state.arrays["cache"], slots["cache"].numpy())


def empty() -> State:
    return State({"cache": np.zeros((1, 2, CAPACITY, 8), np.float32)})


@pytest.mark.parametrize("past", [CAPACITY - 2, CAPACITY, -1])
def test_positions_past_the_capacity_are_an_error(past: int, engine: cpu_runtime.Engine) -> None:
    state = empty()
    state.position = past

    with pytest.raises(CompileError, match=f"at position {past}"):
        engine.run("cached", {"new": np.ones((1, 2, 3, 8), np.float32)}, state)


def test_every_variant_computes_the_same(artefact: tuple[Path, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 37, WIDTH).numpy()
    results = []
    for isa in supported():
        monkeypatch.setenv(knobs.ISA.name, isa.name)
        engine = cpu_runtime.load(*artefact, 2)
        assert engine.isa == isa.name
        results.append(first(engine.run("network", {"x0": x})))
        engine.close()

    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["network", "shared_weight", "padded_embedding"])
def test_threads_do_not_change_the_result(name: str, artefact: tuple[Path, Manifest]) -> None:
    """No sum is split over threads, so that equality is bit for bit."""
    x = torch.randn(4, 150, WIDTH) if name == "network" else torch.randint(VOCAB, (4, 150))
    results = []
    for threads in (1, 2, 3):
        engine = cpu_runtime.load(*artefact, threads)
        results.append(first(engine.run(name, {"x0": x.numpy()})))
        engine.close()

    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])


def test_missing_lowerings_are_listed_with_the_source_line(tmp_path: Path) -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sort(-1)[0] + x.topk(3, -1)[0].sum(-1, keepdim=True) + torch.linalg.det(x)

    with pytest.raises(Unsupported) as caught:
        Cpu().build(program(Model(), torch.randn(4, 4)), Target("cpu"), tmp_path, silent)

    assert str(caught.value) == "cpu has no lowering for ['linalg_det', 'sort', 'topk']"
    notes = "\n".join(caught.value.__notes__)
    assert "return x.sort(-1)[0]" in notes
    assert "target='reference'" in notes
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_float_types_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    half = program(lambda x, w: x * w, torch.randn(3, 4), weights={"w": torch.ones(4)})
    half.weights["w"] = half.weights["w"].to(dtype)

    with pytest.raises(Unsupported, match=str(dtype)) as caught:
        Cpu().build(half, Target("cpu"), tmp_path, silent)

    assert "model.float()" in caught.value.hint


def test_unknown_variant_is_refused(tmp_path: Path) -> None:
    simple = program(lambda x: x * 2, torch.randn(3, 4))

    with pytest.raises(Unsupported, match="no CPU variant named 'avx1024'") as caught:
        Cpu().build(simple, Target("cpu", isas=("avx1024",)), tmp_path, silent)

    assert "avx512" in caught.value.hint


def test_dropout_in_training_mode_is_refused(tmp_path: Path) -> None:
    training = program(lambda x: F.dropout(x, 0.5, True), torch.randn(3, 4))

    with pytest.raises(Unsupported, match="dropout"):
        Cpu().build(training, Target("cpu"), tmp_path, silent)
