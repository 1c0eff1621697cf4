"""A key and a value cache in bfloat16 on the CPU: rows are rounded as they are written, attention widens them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from sylvester.backends import cpu_runtime
from sylvester.backends.cpu import Cpu
from sylvester.codegen.compile import compile_program
from sylvester.compiler.errors import CompileError, Unsupported
from sylvester.compiler.program import Binding, Entry, Output, Program, StateSlot, fake_like
from sylvester.compiler.progress import silent
from sylvester.compiler.target import Target
from sylvester.compiler.weights import ParameterStore

CAPACITY, HEADS, WIDTH = 700, 2, 16
attention, kv_update = torch.ops.sylvester.attention, torch.ops.sylvester.kv_update


def cached(
    tokens: int, read: object = None, held: torch.dtype = torch.bfloat16, widths: tuple[int, int] = (WIDTH, WIDTH)
) -> Program:
    """q, k, v [1, tokens, heads, width] -> attention over caches that get k and v; the op `read` reads keys."""
    graph, mode = fx.Graph(), FakeTensorMode()
    entry = Entry(graph, [Output("output", "y"), Output("state", "keys"), Output("state", "values")])
    end = graph.output([])
    places = []
    for name in ("q", "k", "v", "past"):
        with graph.inserting_before(end):
            places.append(graph.placeholder(name))
        rows = (1, tokens, HEADS, widths[name == "v"])
        shape, dtype = ((), torch.int64) if name == "past" else (rows, torch.float32)
        with mode:
            places[-1].meta |= {"val": torch.empty(shape, dtype=dtype), "bind": Binding("input", name)}
    state = {name: StateSlot(n, (1, HEADS, CAPACITY, widths[n]), held) for n, name in enumerate(("keys", "values"))}
    caches = [
        entry.bind("state", name, fake_like(mode, torch.zeros(slot.shape, dtype=slot.dtype)))
        for name, slot in state.items()
    ]
    q, k, v = (entry.emit(torch.ops.aten.permute.default, p, [0, 2, 1, 3], before=end) for p in places[:3])
    keys, values = (
        entry.emit(kv_update.default, c, x, places[3], before=end) for c, x in zip(caches, (k, v), strict=True)
    )
    if read is not None:
        keys = entry.emit(read, keys, before=end)
    y = entry.emit(attention.default, q, keys, values, None, places[3], 0.25, True, 0, before=end)
    end.args = ((y, keys, values),)
    return Program(ParameterStore(), {"main": entry}, state)


def operands(tokens: int, past: int) -> dict[str, Tensor]:
    return {name: torch.randn(1, tokens, HEADS, WIDTH) for name in "qkv"} | {"past": torch.tensor(past)}


def arrays(given: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: t.numpy() for name, t in given.items() if name != "past"}


@pytest.mark.parametrize("threads", [1, 4])
def test_decode_over_rounded_caches(threads: int, tmp_path: Path) -> None:
    program = cached(1)
    manifest = Cpu().build(program, Target("cpu"), tmp_path, silent)
    engine = cpu_runtime.load(tmp_path, manifest, threads)
    state = engine.new_state("main", arrays(operands(1, 0)))
    keys, values = (torch.randn(1, HEADS, CAPACITY, WIDTH).bfloat16() for _ in range(2))
    for name, cache in (("keys", keys), ("values", values)):
        state.arrays[name][...] = cache.view(torch.uint16).numpy()
    for past in (0, 1, 600, CAPACITY - 1):
        given, state.position = operands(1, past), past
        k, v = (given[name].transpose(1, 2) for name in "kv")
        keys, values = (
            kv_update(c.double(), x.bfloat16().double(), given["past"]) for c, x in ((keys, k), (values, v))
        )
        q = given["q"].transpose(1, 2).double()
        expected = attention(q, keys, values, None, given["past"], 0.25, True, 0)
        keys, values = keys.bfloat16(), values.bfloat16()

        found = engine.run("main", arrays(given), state)

        torch.testing.assert_close(torch.from_numpy(found["y"]), expected.float(), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(state.arrays["keys"], keys.view(torch.uint16).numpy())
    engine.close()


def test_a_step_past_the_end_writes_nothing(tmp_path: Path) -> None:
    program = cached(2)
    engine = cpu_runtime.load(tmp_path, Cpu().build(program, Target("cpu"), tmp_path, silent), 2)
    given = arrays(operands(2, CAPACITY - 1))
    state = engine.new_state("main", given)
    state.position = CAPACITY - 1

    with pytest.raises(CompileError, match=f"at position {CAPACITY - 1}"):
        engine.run("main", given, state)

    assert not any(array.any() for array in state.arrays.values())
    engine.close()


def test_other_readers_of_a_bf16_cache_are_refused() -> None:
    with pytest.raises(Unsupported, match="over bfloat16 has no lowering"):
        compile_program(cached(1, torch.ops.aten.neg.default))
