"""Sizes, divisors, types and state arrays at the edge of what compiled code may touch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from sylvester.backends import cpu_runtime
from sylvester.backends.cpu import Cpu
from sylvester.backends.tensor_file import map_tensors
from sylvester.backends.tensor_writer import Deferred, write_tensors
from sylvester.codegen.compile import compile_program
from sylvester.compiler.errors import CompileError, InputError, Unsupported
from sylvester.compiler.program import Binding, Entry, Output, Program, StateSlot, fake_like
from sylvester.compiler.progress import silent
from sylvester.compiler.runner import State
from sylvester.compiler.target import Target
from sylvester.compiler.weights import ParameterStore
from tests.programs import program

TABLE, SQUARE = torch.randn(11, 32), torch.randn(32, 32) / 6
kv_update = torch.ops.sylvester.kv_update


def build(function: Callable[..., object], *args: Tensor, folder: Path, **options: object) -> cpu_runtime.Engine:
    whole = program(function, *args, **options)
    return cpu_runtime.load(folder, Cpu().build(whole, Target("cpu", isas=("scalar",)), folder, silent), 1)


@pytest.mark.parametrize(
    "function",
    [lambda x: x[:, 2:] + 1, lambda x: x[:, :2] + 1, lambda x: x[:, 1] + 1, lambda x: x[:, -2] + 1],
    ids=["from_2", "up_to_2", "at_1", "at_-2"],
)
def test_a_size_the_views_do_not_allow_is_refused(function: Callable[..., object], tmp_path: Path) -> None:
    engine = build(function, torch.randn(2, 5, 8), folder=tmp_path)

    with pytest.raises(InputError, match="below the compiled minimum of 2"):
        engine.run("forward", {"x0": np.zeros((2, 1, 8), np.float32)})


def test_an_axis_may_become_empty(tmp_path: Path) -> None:
    engine = build(lambda x: (x[:, 1:] - x[:, :-1]).relu(), torch.randn(2, 5, 64), folder=tmp_path)

    (found,) = engine.run("forward", {"x0": np.zeros((2, 1, 64), np.float32)}).values()

    assert found.shape == (2, 0, 64)


def test_nests_leave_before_dividing_by_an_empty_axis() -> None:
    unit = compile_program(program(lambda x: (x[:, 1:] - x[:, :-1]).relu(), torch.randn(2, 5, 64))).unit
    (text,) = unit.functions

    assert text.index("if (lo >= hi) return;") < text.index("lo % (")


@pytest.mark.parametrize(
    "function",
    [lambda x, y: x // y, lambda x, y: x % y, torch.fmod, lambda x, y: torch.div(x, y, rounding_mode="trunc")],
    ids=["floor", "remainder", "fmod", "trunc"],
)
def test_integer_division_by_zero_is_an_error(function: Callable[..., object], tmp_path: Path) -> None:
    x, y = torch.tensor([7, -7, 9]), torch.tensor([2, 2, -4])
    engine = build(function, x, y, folder=tmp_path, axes=lambda x: ())

    with pytest.raises(InputError, match="divided by zero"):
        engine.run("forward", {"x0": x.numpy(), "x1": np.array([1, 0, 2])})
    (found,) = engine.run("forward", {"x0": x.numpy(), "x1": y.numpy()}).values()
    assert found.tolist() == function(x, y).tolist()


def test_keys_shared_by_a_batch_are_broadcast(tmp_path: Path) -> None:
    q, k = torch.randn(3, 4, 5, 8), torch.randn(1, 4, 7, 8)
    engine = build(lambda q, k: F.scaled_dot_product_attention(q, k, k), q, k, folder=tmp_path, axes=lambda x: ())

    (found,) = engine.run("forward", {"x0": q.numpy(), "x1": k.numpy()}).values()

    torch.testing.assert_close(torch.from_numpy(found), F.scaled_dot_product_attention(q, k, k))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64])
def test_matrix_products_of_other_types_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    x = torch.ones(3, 3).to(dtype)

    with pytest.raises(Unsupported, match="computes in float32"):
        build(lambda x, y: x @ y, x, x.clone(), folder=tmp_path)


def test_a_layer_over_one_looked_up_row(tmp_path: Path) -> None:
    ids = torch.tensor([3, 1])
    weights = {"table": TABLE, "w": SQUARE}
    function = lambda ids, table, w: F.linear(F.embedding(ids, table)[0], w)  # noqa: E731
    engine = build(function, ids, folder=tmp_path, weights=weights, axes=lambda x: ())

    (found,) = engine.run("forward", {"x0": ids.numpy()}).values()

    torch.testing.assert_close(torch.from_numpy(found), SQUARE @ TABLE[3], rtol=1e-5, atol=1e-5)


def rolling(capacity: int) -> Program:
    """Every row of a cache moves to the place behind it."""
    graph, mode = fx.Graph(), FakeTensorMode()
    result = Entry(graph, [Output("output", "y"), Output("state", "cache")])
    end = graph.output([])
    with graph.inserting_before(end):
        past = graph.placeholder("past")
    with mode:
        past.meta |= {"val": torch.empty((), dtype=torch.int64), "bind": Binding("input", "past")}
    slot = StateSlot(0, (1, 1, capacity, 4), torch.float32)
    cache = result.bind("state", "cache", fake_like(mode, torch.zeros(slot.shape)))
    rest = result.emit(torch.ops.aten.slice.Tensor, cache, 2, 0, capacity - 1, before=end)
    moved = result.emit(kv_update.default, cache, rest, past, before=end)
    y = result.emit(torch.ops.aten.sum.dim_IntList, moved, [1], before=end)
    end.args = ((y, moved),)
    return Program(ParameterStore(), {"roll": result}, {"cache": slot})


def test_more_rows_than_a_cache_holds_stay_inside_it(tmp_path: Path) -> None:
    new, cache = torch.ones(1, 1, 3, 4), torch.zeros(1, 1, 4, 4)

    def updated(new: Tensor, past: Tensor, cache: Tensor) -> Tensor:
        return kv_update(cache, new, past)

    whole = program(updated, new, torch.tensor(0), weights={"cache": cache}, axes=lambda x: [2] if x.dim() == 4 else [])
    entry = whole.main
    (node,) = entry.placeholders("weight")
    node.meta["bind"] = Binding("state", "cache")
    whole.state["cache"] = StateSlot(0, (1, 1, 4, 4), torch.float32)
    entry.outputs[:] = [Output("state", "cache")]
    engine = cpu_runtime.load(tmp_path, Cpu().build(whole, Target("cpu", isas=("scalar",)), tmp_path, silent), 1)
    around = np.zeros((1, 1, 64, 4), np.float32)
    state = State({"cache": around[:, :, :4]})

    with pytest.raises(CompileError, match="at position 0"):
        engine.run("forward", {"x0": np.ones((1, 1, 40, 4), np.float32)}, state)

    assert not around[:, :, 4:].any()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> cpu_runtime.Engine:
    folder = tmp_path_factory.mktemp("rolling")
    return cpu_runtime.load(folder, Cpu().build(rolling(6), Target("cpu", isas=("scalar",)), folder, silent), 2)


def numbered() -> State:
    return State({"cache": np.arange(24, dtype=np.float32).reshape(1, 1, 6, 4)}, position=1)


def test_rows_of_a_cache_may_move_within_it(engine: cpu_runtime.Engine) -> None:
    state = numbered()
    cache = torch.from_numpy(state.arrays["cache"].copy())
    expected = rolling(6).run("roll", {"past": torch.tensor(1)}, {"cache": cache})

    engine.run("roll", {}, state)

    assert np.array_equal(state.arrays["cache"], expected["cache"].numpy())


def test_replaced_arrays_of_a_state_are_the_ones_written(engine: cpu_runtime.Engine) -> None:
    state = numbered()
    engine.run("roll", {}, state)
    after, state.arrays["cache"] = state.arrays["cache"], numbered().arrays["cache"]

    engine.run("roll", {}, state)

    assert np.array_equal(state.arrays["cache"], after)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((1, 1, 6, 4), np.float64),
        np.zeros((1, 1, 6, 8), np.float32)[..., ::2],
        np.broadcast_to(np.float32(0), (1, 1, 6, 4)),
    ],
    ids=["dtype", "strides", "read_only"],
)
def test_state_that_cannot_be_written_is_refused(wrong: np.ndarray, engine: cpu_runtime.Engine) -> None:
    with pytest.raises(InputError, match="state 'cache' is a"):
        engine.run("roll", {}, State({"cache": wrong}))


def test_stored_tensors_start_on_a_multiple_of_their_item_size(tmp_path: Path) -> None:
    odd = {"flags": np.ones(3, bool), "x": np.ones(5, np.float32), "ids": np.ones(7, np.int64), "none": np.ones(0)}
    write_tensors(tmp_path / "w", {n: Deferred(a.shape, a.dtype.name, lambda a=a: a) for n, a in odd.items()})

    found = map_tensors(tmp_path / "w")

    assert all(np.array_equal(found[name], array) for name, array in odd.items())
    assert all(array.flags.aligned for array in found.values())


@pytest.mark.parametrize("worst", [-torch.inf, torch.finfo(torch.float32).min])
def test_extremum_of_a_row_without_a_larger_number(worst: float, tmp_path: Path) -> None:
    x = torch.full((2, 70), worst)
    engine = build(lambda x: (x.amax(-1), (-x).amin(-1)), x, folder=tmp_path)

    found = engine.run("forward", {"x0": x.numpy()}).values()

    assert [y.tolist() for y in found] == [[worst] * 2, [-worst] * 2]


def test_small_integers_wrap_inside_an_expression(tmp_path: Path) -> None:
    x = torch.tensor([100, 3], dtype=torch.uint8)
    engine = build(lambda x: ((x + 200) // 2, ~x > 3), x, folder=tmp_path, axes=lambda x: ())

    found = engine.run("forward", {"x0": x.numpy()}).values()

    assert [y.tolist() for y in found] == [[22, 101], [True, True]]


def test_keys_shared_by_heads_that_values_do_not_share(tmp_path: Path) -> None:
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 1, 5, 8), torch.randn(2, 4, 5, 8)
    engine = build(F.scaled_dot_product_attention, q, k, v, folder=tmp_path, axes=lambda x: ())

    (found,) = engine.run("forward", {"x0": q.numpy(), "x1": k.numpy(), "x2": v.numpy()}).values()

    torch.testing.assert_close(torch.from_numpy(found), F.scaled_dot_product_attention(q, k, v))
