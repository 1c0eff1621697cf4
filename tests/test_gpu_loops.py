"""Launches for GPUs of every op, run by Triton's interpreter, against PyTorch: a few ops, by night all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sylvester.backends.cuda.simulated import Simulated
from sylvester.codegen.gpu_plan import GpuEntry, gpu_entries
from sylvester.compiler.ops import OPS
from sylvester.compiler.program import Entry, binding, value
from tests import aten_program
from tests.aten_cases import CASES
from tests.gpu import builds, with_columns
from tests.graphs import Builder
from tests.sampling import EDGES, SIZES, Case, Sample, edges, f, sample, w

FEW = CASES[::12]
ROUNDED = ("attention_bf16", "attention_int8")
"""Ops whose products are rounded otherwise than in PyTorch."""
EXAMPLES = [
    (op.name, Case(op.target, tuple(sample(a) for a in example))) for op in OPS.values() for example in op.examples
]
FIRST = dict(reversed(EXAMPLES))
COMMON = (
    *("attention", "attention_q", "kv_update", "hadamard", "widen_bf16", "linear_bf16", "linear_w8", "linear_w4"),
    *("linear_w3", "linear_fp8", "dequantize_fp8", "linear_fp16", "widen_fp16"),
)


def lowered(case: Case) -> tuple[Entry, GpuEntry]:
    program = aten_program.program([("forward", case)])
    return program.entries["forward"], gpu_entries(program)["forward"]


def simulated(entry: Entry, made: GpuEntry, tensors: list[Tensor]) -> Simulated:
    given, sizes = {}, {}
    for node, tensor in zip(entry.placeholders(), tensors or [torch.zeros(1)], strict=True):
        given[binding(node).key] = tensor
        symbols = ((n, m) for n, m in zip(value(node).shape, tensor.shape, strict=True) if isinstance(n, torch.SymInt))
        sizes |= {str(n.node.expr): m for n, m in symbols}
    return Simulated(made, with_columns(made, given), sizes)


def check(case: Case) -> None:
    entry, made = lowered(case)
    tensors = case.tensors(SIZES[0])
    tolerance = 1e-1 if any(name in str(case.target) for name in ROUNDED) else 2e-3 if _wide(case) else 2e-5
    found = simulated(entry, made, tensors).run()
    for k, expected in enumerate(case.call(tensors, SIZES[0], wide=False)):
        assert found[f"y{k}"].shape == expected.shape
        torch.testing.assert_close(
            found[f"y{k}"].to(expected.dtype), expected, rtol=tolerance, atol=tolerance, equal_nan=True
        )  # fmt: skip


def _wide(case: Case) -> bool:
    """Rows of 16 bits, which GPUs multiply as they are."""
    return "linear_w" in str(case.target) and 16 in case.args


@pytest.mark.parametrize("case", FEW, ids=lambda case: str(case.target))
def test_op(case):
    check(case)


@pytest.mark.parametrize("name", COMMON)
def test_op_of_the_dialect(name):
    check(FIRST[name])


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "case"), EXAMPLES)
def test_every_example_of_the_dialect(name, case):
    test_op(case)


@pytest.mark.nightly
@pytest.mark.parametrize("case", [c for n, c in enumerate(CASES) if n % 12], ids=lambda case: str(case.target))
def test_every_op(case):
    test_op(case)


def applied(target: object, operand: Sample, *tensors: Tensor) -> Tensor:
    """The op over tensors of the shape of a sample."""
    entry, made = lowered(Case(target, (operand,) * len(tensors)))
    return simulated(entry, made, list(tensors)).run()["y0"]


ARGUMENTS = [t.contiguous() for t in torch.meshgrid(torch.tensor(EDGES), torch.tensor(EDGES), indexing="ij")]
"""Every pair of zeros of both signs, whole and other numbers, infinities and not a number."""


@pytest.mark.parametrize("target", [torch.ops.aten.atan2.default, torch.ops.aten.pow.Tensor_Tensor])
def test_functions_of_two_numbers_at_their_edges(target):
    found = applied(target, edges(16, 16), *ARGUMENTS)
    expected = target(*(t.double() for t in ARGUMENTS)).float()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, equal_nan=True)
    numbers = ~expected.isnan()
    assert (found.signbit() == expected.signbit())[numbers].all()


def test_angles_are_as_precise_as_float32():
    y, x = (torch.randn(17, 63) * 10.0 ** torch.randint(-9, 10, (17, 63)) for _ in range(2))
    wide = torch.atan2(y.double(), x.double())
    assert ((applied(torch.ops.aten.atan2.default, f(17, 63), y, x) - wide) / wide).abs().max() < 2.5e-7


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8])
def test_whole_powers_are_exact(dtype):
    """Of negative bases, to negative exponents, and past what the type holds."""
    operand = Sample((19, 17), "integer", 0, 9, dtype=dtype)
    base, exponent = torch.randint(-9, 10, (19, 17)).to(dtype), torch.randint(-5, 70, (19, 17)).to(dtype)
    found = applied(torch.ops.aten.pow.Tensor_Tensor, operand, base, exponent)
    assert found.dtype == dtype
    assert found.equal(base**exponent)


def test_kernels_of_functions_of_two_numbers_are_built():
    whole = Sample((3, 5), "integer", 0, 9)
    for target, operand in ((torch.ops.aten.atan2.default, f(3, 5)), (torch.ops.aten.pow.Tensor_Tensor, whole)):
        for launch in lowered(Case(target, (operand, operand)))[1].launches:
            builds(launch.kernel, ("sm_90",))


OTHER_LINEARS = [
    (f("n", 9), w(9)),
    (f("n", 9), w(6, 9), w(1)),
    (f("n", 9), w(6, 9), f("n", 6)),
    (f("n", "m"), f(3, "m"), w(3)),
]
"""By a vector, with a bias that broadcasts, over an open number of features."""


@pytest.mark.parametrize("operands", OTHER_LINEARS)
def test_linear_layers_that_are_no_product_of_a_matrix_are_loops(operands):
    case = Case(torch.ops.aten.linear.default, operands)
    check(case)
    assert {launch.kernel.function for launch in lowered(case)[1].launches} == {"loops"}


def normalised() -> Builder:
    """Rows that a reduction and an elementwise step share, columns that are summed, and tokens that are looked up."""
    b = Builder()
    ids, x = b.ids(3, high=11), b.input(3, 70)
    table = b.weight("table", 11, 70)
    aten = torch.ops.aten
    looked_up = b.call(aten.embedding.default, table, ids)
    total = b.call(aten.add.Tensor, looked_up, x)
    normal = b.call(aten._softmax.default, total, -1, False)
    b.returns(normal, b.call(aten.sum.dim_IntList, normal, [0]), b.call(aten.argmax.default, total, -1))
    return b


def test_a_nest_of_several_members():
    program = normalised().program
    entry, made = program.entries["forward"], gpu_entries(program)["forward"]
    given = entry.examples | {"table": program.weights["table"]}
    found = Simulated(made, given, {}).run()
    total = given["table"][given["x0"]] + given["x1"]
    torch.testing.assert_close(found["y0"], total.softmax(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["y1"], total.softmax(-1).sum(0), rtol=1e-5, atol=1e-6)
    assert found["y2"].tolist() == total.argmax(-1).tolist()
    assert len(made.launches) <= 4
    for launch in made.launches:
        builds(launch.kernel, ("sm_80",))


def test_a_position_outside_of_memory_is_reported():
    program = normalised().program
    entry, made = program.entries["forward"], gpu_entries(program)["forward"]
    given = entry.examples | {"table": program.weights["table"], "x0": torch.tensor([3, 12, 4])}
    device = Simulated(made, given, {})
    device.run()
    assert device.flag.tolist() == [1, 12]
