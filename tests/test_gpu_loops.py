"""Launches for GPUs of every op, run by Triton's interpreter, against PyTorch: a few ops, by night all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sylvester.backends.cuda.simulated import Simulated
from sylvester.codegen.gpu_plan import GpuEntry, gpu_entries
from sylvester.compiler.errors import Unsupported
from sylvester.compiler.ops import OPS
from sylvester.compiler.program import Entry, binding, value
from tests import aten_program
from tests.aten_cases import CASES
from tests.gpu import builds
from tests.graphs import Builder
from tests.sampling import SIZES, Case, sample

WITHOUT_FORM = ("atan2", "ipow", "no kernel for", "all_reduce")
"""Functions and kernel families that there are none of."""
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
    return Simulated(made, given, sizes)


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


def refusal(case: Case) -> str:
    """Why a case has no kernels."""
    try:
        lowered(case)
    except Unsupported as cause:
        return str(cause)
    return ""


@pytest.mark.parametrize("case", FEW, ids=lambda case: str(case.target))
def test_op(case):
    reason = refusal(case)
    if reason:
        assert any(known in reason for known in WITHOUT_FORM)
    else:
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
