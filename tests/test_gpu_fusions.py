"""What is done in the kernels of linear layers on GPUs: activations, gates, residuals; what is not, and why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from sylvester.backends.cuda.simulated import Simulated
from sylvester.codegen.gpu_plan import GpuEntry, gpu_entries
from sylvester.compiler.packing import packed4
from sylvester.compiler.program import Program
from tests.graphs import ADD, GELU, MUL, PERMUTE, Builder

aten, dialect = torch.ops.aten, torch.ops.sylvester
SILU, RELU, SWIGLU, GEGLU = aten.silu.default, aten.relu.default, dialect.swiglu.default, dialect.geglu.default
ROWS = [1, 3, 20]
K, N = 70, 36


def lowered(program: Program) -> GpuEntry:
    return gpu_entries(program)["forward"]


def kinds(made: GpuEntry) -> list[str]:
    """The kernels in order, with what products have in them."""
    found = []
    for launch in made.launches:
        fixed = launch.kernel.constants
        parts = [launch.kernel.function, *(n.lower() for n in ("GATED", "ADDED") if fixed.get(n))]
        parts += [str(fixed[n]) for n in ("ACTIVATION", "NORM") if fixed.get(n, "none") != "none"]
        found.append(" ".join(parts))
    return found


def check(program: Program, made: GpuEntry, tolerance: float = 2e-5) -> None:
    """The launches give what PyTorch gives."""
    examples = program.entries["forward"].examples
    state = {key: torch.randn(slot.shape).to(slot.dtype) for key, slot in program.state.items()}
    expected = program.run("forward", examples, {key: slot.clone() for key, slot in state.items()})
    found = Simulated(made, {**examples, **program.weights, **state}, {}).run()
    for name, y in found.items():
        allowed = tolerance * float(expected[name].abs().max())
        torch.testing.assert_close(y, expected[name], atol=allowed, rtol=tolerance)


def product_of(rows: int) -> str:
    return "gemv" if rows <= 4 else "matmul"


def held(b: Builder, key: str, tensor: Tensor) -> fx.Node:
    b.program.weights[key] = tensor
    return b.weight(key, *tensor.shape)


def int4(b: Builder, x: fx.Node, key: str, n: int, bits: int = 8) -> fx.Node:
    """A layer of 4 bits in groups of 32 columns, over rows of `bits`."""
    k = x.meta["val"].shape[-1]
    numbers = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=b.random)
    weight, scales = held(b, f"{key}.int4", packed4(numbers)), held(b, f"{key}.scales", torch.rand(n, -(-k // 32)) / k)
    return b.call(dialect.linear_w4.default, x, weight, scales, None, bits)


def swish_gate(b: Builder, x: fx.Node) -> fx.Node:
    return b.call(SWIGLU, b.linear(x, "gate", N, bias=True), b.linear(x, "up", N, bias=True))


ENDS: dict[str, Callable[[Builder, fx.Node], fx.Node]] = {
    "silu": lambda b, x: b.call(SILU, b.linear(x, "w", N, bias=True)),
    "gelu": lambda b, x: b.call(GELU, b.linear(x, "w", N)),
    "gelu_tanh": lambda b, x: b.call(GELU, b.linear(x, "w", N), approximate="tanh"),
    "relu": lambda b, x: b.call(RELU, b.linear(x, "w", N)),
    "gated silu": swish_gate,
    "gated": lambda b, x: b.call(MUL, b.linear(x, "a", N), b.linear(x, "b", N)),
    "gated gelu_tanh": lambda b, x: b.call(GEGLU, int4(b, x, "a", N), int4(b, x, "b", N), "tanh"),
    "added": lambda b, x: b.call(ADD, x, b.linear(x, "w", K, bias=True)),
    "gated added silu": lambda b, x: b.call(ADD, swish_gate(b, x), b.input(x.meta["val"].shape[0], N)),
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", ENDS)
def test_ends_of_products(name: str, rows: int):
    b = Builder()
    program = b.returns(ENDS[name](b, b.input(rows, K)))
    made = lowered(program)
    before = ["quantize_rows"] if name == "gated gelu_tanh" and rows > 4 else []
    assert kinds(made) == [*before, f"{product_of(rows)} {name}"]
    (fusion,) = made.fusions
    assert (fusion.count, fusion.bytes_saved) == (1, rows * (K if name == "added" else N) * 8 * (1 + ("gated" in name)))
    check(program, made)


def read_twice(b: Builder, x: fx.Node) -> list[fx.Node]:
    y = b.linear(x, "w", N)
    return [y, b.call(SILU, y)]


def squared(b: Builder, x: fx.Node) -> list[fx.Node]:
    y = b.linear(x, "w", N)
    return [b.call(MUL, y, y)]


def turned(b: Builder, x: fx.Node) -> list[fx.Node]:
    rows = x.meta["val"].shape[0]
    return [b.call(ADD, b.linear(x, "w", N), b.call(PERMUTE, b.input(N, rows), [1, 0]))]


REFUSED: dict[str, Callable[[Builder, fx.Node], list[fx.Node]]] = {
    "the result is read twice": read_twice,
    "both sides are one product": squared,
    "other rows": lambda b, x: [b.call(SWIGLU, b.linear(x, "a", N), b.linear(b.call(MUL, x, x), "b", N))],
    "another form": lambda b, x: [b.call(SWIGLU, b.linear(x, "a", N, bias=True), b.linear(x, "b", N))],
    "other bits": lambda b, x: [b.call(SWIGLU, int4(b, x, "a", N), int4(b, x, "b", N, bits=4))],
    "another place": turned,
    "a number a column": lambda b, x: [b.call(ADD, b.linear(x, "w", N), b.weight("c", N))],
    "another activation": lambda b, x: [b.call(aten.tanh.default, b.linear(x, "w", N))],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stays_outside(name: str):
    b = Builder()
    program = b.returns(*REFUSED[name](b, b.input(3, K)))
    made = lowered(program)
    assert not made.fusions
    assert "loops" in kinds(made)
    assert set(kinds(made)) <= {"loops", "gemv"}
    check(program, made)


def test_the_other_product_of_a_sum_is_its_residual():
    b = Builder()
    x = b.input(3, K)
    program = b.returns(b.call(ADD, b.linear(x, "a", N), b.linear(x, "b", N)))
    made = lowered(program)
    assert kinds(made) == ["gemv", "gemv added"]
    check(program, made)


@pytest.mark.parametrize("rows", ROWS)
def test_few_programs_share_the_depth(rows: int):
    b = Builder()
    x = b.input(rows, 1024)
    program = b.returns(b.call(ADD, swish_gate(b, x), b.input(rows, N)))
    made = lowered(program)
    assert kinds(made) == [f"{product_of(rows)} gated added silu", "join gated added silu"]
    first, last = made.launches
    assert first.grid[1].constant == last.kernel.constants["SPLITS"] == (2 if rows <= 4 else 8)
    assert {c.grid[1].constant for c in first.others()} == {first.grid[1].constant}
    check(program, made)


def three(b: Builder, x: fx.Node) -> list[fx.Node]:
    """Two products of float rows and one of rounded ones."""
    return [b.linear(x, "q", N), b.linear(x, "k", N), int4(b, x, "v", N)]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", ["rms", "layer", "rms without weight"])
def test_norms_of_products(kind: str, rows: int):
    b = Builder()
    x = b.input(rows, K)
    n = b.layer_norm(x, "n") if kind == "layer" else b.rms(x, "n" if kind == "rms" else "")
    program = b.returns(*three(b, n))
    made = lowered(program)
    form = kind.split()[0]
    if rows <= 4:
        assert kinds(made) == [f"gemv_group {form}", f"gemv {form}"]
    else:
        assert kinds(made) == ["norm", "matmul", "matmul", f"quantize_rows {form}", "matmul"]
    assert [f.kind for f in made.fusions] == [f"{form} norm into the rows of a linear layer"]
    check(program, made)


def strided(b: Builder) -> list[fx.Node]:
    """The norm of the last of 5 tokens."""
    last = b.call(aten.slice.Tensor, b.input(2, 5, K), 1, 4, 5)
    return [b.linear(b.rms(last, "n"), "w", N)]


def twice(b: Builder) -> list[fx.Node]:
    n = b.rms(b.input(3, K), "n")
    return [b.linear(n, "w", N), b.call(SILU, n)]


def both(b: Builder) -> list[fx.Node]:
    n = b.rms(b.input(3, K), "n")
    return [b.call(ADD, n, b.linear(n, "w", K))]


NORMS: dict[str, tuple[Callable[[Builder], list[fx.Node]], list[str]]] = {
    "rows apart": (strided, ["gemv rms"]),
    "read twice": (twice, ["norm", "gemv", "loops"]),
    "the residual too": (both, ["norm", "gemv added"]),
    "no product": (lambda b: [b.layer_norm(b.input(3, K), "n", bias=False)], ["norm"]),
    "two axes": (lambda b: [b.call(aten.layer_norm.default, b.input(2, 3, K), [3, K])], ["loops"]),
    "columns": (lambda b: [b.rms(b.call(PERMUTE, b.input(K, 3), [1, 0]), "n")], ["loops"]),
    "softmax": (lambda b: [b.call(aten._softmax.default, b.input(3, K), -1, False)], ["softmax"]),
    "softmax of columns": (lambda b: [b.call(aten._softmax.default, b.input(3, K), 0, False)], ["loops"]),
}


@pytest.mark.parametrize("name", NORMS)
def test_rows(name: str):
    make, expected = NORMS[name]
    b = Builder()
    program = b.returns(*make(b))
    made = lowered(program)
    assert list(dict.fromkeys(kinds(made))) == expected
    check(program, made)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("interleaved", [False, True])
def test_positions_of_what_attention_reads(batches: int, interleaved: bool):
    b = Builder()
    x, cos, sin = b.input(2, 5, 48), b.input(batches, 5, 12), b.input(batches, 5, 12)
    q = b.call(dialect.rope.default, b.heads(x, 3), cos, sin, interleaved)
    program = b.returns(b.attention(q, q, b.heads(x, 3)))
    made = lowered(program)
    assert kinds(made) == ["rope", "attention", "loops"]
    check(program, made)


@pytest.mark.parametrize("apart", [False, True])
def test_queries_and_keys_are_turned_in_one_launch(apart: bool):
    b = Builder()
    x, angles = b.input(2, 5, 64), [b.input(1, 5, 16) for _ in range(4)]
    q = b.call(dialect.rope.default, b.heads(x, 4), *angles[:2], False)
    k = b.call(dialect.rope.default, b.heads(b.input(2, 5, 32), 2), *angles[2 * apart :][:2], False)
    program = b.returns(b.attention(q, k, k))
    made = lowered(program)
    assert kinds(made) == [*["rope"] * (1 + apart), "attention", "loops"]
    check(program, made)


def test_positions_that_elementwise_work_reads_are_turned_there():
    b = Builder()
    x, cos, sin = b.input(2, 3, 5, 16), b.input(5, 16), b.input(5, 16)
    program = b.returns(b.call(SILU, b.call(dialect.rope.default, x, cos, sin, False)))
    made = lowered(program)
    assert kinds(made) == ["loops"]
    check(program, made)


def grouped(
    b: Builder, queries: int, keys: int, op: Callable[..., Tensor] = dialect.attention.default, **optional: fx.Node
) -> Program:
    """Heads of 20 features, of which two share a key."""
    q, k, v = b.input(2, 4, queries, 20), b.input(2, 2, keys, 20), b.input(2, 2, keys, 20)
    past = b.given(torch.tensor(keys - queries - 3))
    return b.returns(b.call(op, q, k, v, None, past, 0.3, True, 0, **optional))


@pytest.mark.parametrize(("queries", "keys", "parts"), [(1, 1100, 8), (5, 1100, 8), (40, 1100, 1), (1, 1000, 1)])
def test_few_queries_read_many_keys_in_parts(queries: int, keys: int, parts: int):
    b = Builder()
    program = grouped(b, queries, keys)
    made = lowered(program)
    assert kinds(made) == ["attention", *["joined"] * (parts > 1), "loops"]
    first = made.launches[0]
    assert first.grid[1].constant == first.kernel.constants["SPLITS"] == parts
    assert {c.grid[1].constant for c in first.others()} == {parts}
    check(program, made)


INT8 = dialect.attention_int8.default


@pytest.mark.parametrize(("archs", "values"), [(("sm_80", "sm_90"), "*fp16"), (("sm_89", "sm_90"), "*fp8e4nv")])
def test_attention_of_whole_numbers(archs: tuple[str, ...], values: str):
    b = Builder()
    program = grouped(b, 33, 140, INT8)
    made = gpu_entries(program, archs)["forward"]
    assert kinds(made) == ["summaries", "pack", "attention_int8", "loops"]
    assert made.launches[2].kernel.types["values8"] == values
    assert not made.notes
    check(program, made, 5e-2)


def test_whole_numbers_are_not_multiplied_for_few_queries_or_over_listed_blocks():
    b = Builder()
    few = lowered(grouped(b, 8, 140, INT8))
    assert kinds(few) == ["attention", "loops"]
    assert "for up to 8 queries" in few.notes[0]
    b = Builder()
    shared = lowered(grouped(b, 40, 140, INT8, shared=b.given(torch.tensor(4))))
    assert kinds(shared) == ["attention", "loops"]
    assert "shared keys and listed blocks" in shared.notes[0]


class Caches:
    """Two tokens after 3 in caches of bfloat16, which attention reads."""

    def __init__(self) -> None:
        self.b = Builder()
        self.past = self.b.given(torch.tensor(3))

    def written(self, key: str, room: int, x: fx.Node | None = None) -> fx.Node:
        slot = self.b.state(key, 1, 3, room, 16, dtype=torch.bfloat16)
        return self.b.call(dialect.kv_update.default, slot, x or self.b.input(1, 3, 2, 16), self.past)

    def read(self, k: fx.Node, v: fx.Node) -> fx.Node:
        q = self.b.input(1, 3, 2, 16)
        return self.b.call(dialect.attention.default, q, k, v, None, self.past, 0.3, True, 0)


def test_keys_and_values_are_written_in_one_launch():
    c = Caches()
    k, v = c.written("k", 8), c.written("v", 8)
    program = c.b.returns(c.read(k, v), k=k, v=v)
    made = lowered(program)
    assert kinds(made) == ["kv_update", "attention", "loops"]
    assert made.launches[0].grid[0].constant == 2
    check(program, made)


def test_caches_of_other_sizes_are_written_apart():
    c = Caches()
    k, v = c.written("k", 8), c.written("v", 9)
    program = c.b.returns(c.read(k, k), c.read(v, v), k=k, v=v)
    made = lowered(program)
    assert kinds(made).count("kv_update") == 2
    check(program, made)


def test_a_cache_that_is_read_before_the_other_is_written_is_written_before():
    c = Caches()
    k = c.written("k", 8)
    v = c.written("v", 8, c.read(k, k))
    program = c.b.returns(c.read(v, v), k=k, v=v)
    made = lowered(program)
    assert kinds(made)[:2] == ["kv_update", "attention"]
    assert kinds(made).count("kv_update") == 2
    check(program, made)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("widths", [(36, 5), (33, 64, 1), (4, 4, 4, 4, 4)])
def test_products_of_the_same_rows_run_together(widths: tuple[int, ...], rows: int):
    b = Builder()
    x = b.input(rows, K)
    layers = (
        int4(b, x, f"w{i}", n) if len(widths) == 3 else b.linear(x, f"w{i}", n, True) for i, n in enumerate(widths)
    )
    program = b.returns(*layers)
    made = lowered(program)
    if rows <= 4:
        assert kinds(made) == ["gemv_group"] * (-(-len(widths) // 3))
        assert all(launch.others() for launch in made.launches)
    else:
        assert kinds(made).count("matmul") == len(widths)
    check(program, made)


def test_products_come_before_the_norms_in_between():
    b = Builder()
    x = b.input(3, K)
    first = b.rms(b.linear(x, "q", N))
    program = b.returns(first, b.rms(b.linear(x, "k", N)), b.linear(first, "o", N))
    made = lowered(program)
    assert kinds(made) == ["gemv_group", "norm", "norm", "gemv"]
    check(program, made)
