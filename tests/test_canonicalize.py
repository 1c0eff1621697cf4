"""Canonical form: one spelling per op, the same values at every size, and the same graph when run again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sylvester.compiler.errors import CompileError
from sylvester.compiler.program import Program, value
from sylvester.compiler.trace import capture
from sylvester.compiler.verify import verify
from sylvester.passes import canonicalize as module
from sylvester.passes.canonicalize import Canonicalize, canonicalize
from tests import zoo
from tests.programs import ops, program

GONE = {
    "aten.view", "aten.transpose.int", "aten.contiguous", "aten.clone", "aten.dropout", "aten.split.Tensor",
    "aten.chunk",
    "aten.unbind.int", "aten.stack", "aten.addmm", "aten.mm", "aten.bmm", "aten._assert_tensor_metadata", "aten.square",
    "aten.flatten.using_ints", "aten.unflatten.int", "aten.squeeze.dim", "aten.ones", "aten.new_ones",
    "aten.to.dtype_layout", "aten.type_as", "aten.__and__.Tensor", "aten.hardtanh",
}  # fmt: skip
x = torch.randn(3, 5, 8)


def canonical(function: Callable[..., Tensor], *args: Tensor, **weights: Tensor) -> Program:
    """Canonicalised `function`; its results are compared with the function's at the traced size and at others."""

    def fixed_width(*tensors: Tensor) -> Tensor:
        for tensor in tensors[: len(args)]:
            torch._check(tensor.shape[-1] == 8)
        return function(*tensors)

    made = program(fixed_width, *args, weights=weights)
    Canonicalize().run(made)
    made.sweep()
    verify(made)
    for shift in (0, 1, 6):
        inputs = [_resized(a, shift) for a in args]
        got = made.run("forward", {f"x{i}": a for i, a in enumerate(inputs)})["y0"]
        torch.testing.assert_close(got, function(*inputs, *weights.values()))
    return made


def _resized(tensor: Tensor, shift: int) -> Tensor:
    """Longer along the first two of three axes; the last axis is often fixed by the function."""
    sizes = [n + shift if i < 2 and tensor.dim() == 3 else n for i, n in enumerate(tensor.shape)]
    return torch.randn(sizes) if tensor.is_floating_point() else torch.randint(0, 5, sizes)


HALVED = ["aten.div.Tensor", "aten.add.Tensor"]
CASES: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "view of view": (lambda x: x.view(x.shape[0], -1, 2, 4).flatten(2), []),
    "transpose twice": (lambda x: x.transpose(0, 1).transpose(1, 0) * 2, ["aten.mul.Tensor"]),
    "transpose is permute": (lambda x: x.mT.transpose(0, 2), ["aten.permute"]),
    "movedim": (lambda x: x.movedim(0, -1), ["aten.permute"]),
    "copies": (lambda x: x.contiguous().clone().detach() + 1, ["aten.add.Tensor"]),
    "casts": (lambda x: x.float().to(torch.float32).type_as(x).neg(), ["aten.neg"]),
    "neutral operands": (lambda x: ((x + 0) * 1 / 1 - 0).relu(), ["aten.relu"]),
    "dropout": (lambda x: F.dropout(x, 0.3, training=False).relu(), ["aten.relu"]),
    "slice of everything": (lambda x: x[:, :, :].relu(), ["aten.relu"]),
    "slices of one axis": (lambda x: x[..., 2:][..., 1:4], ["aten.slice.Tensor"]),
    "slice from the end": (lambda x: x[..., -3:], ["aten.slice.Tensor"]),
    "slice from before the start": (lambda x: torch.ops.aten.slice.Tensor(x, 2, -99, 2), ["aten.slice.Tensor"]),
    "split": (lambda x: x.split(4, -1)[1], ["aten.slice.Tensor"]),
    "uneven split": (lambda x: x.split([2, 5, 1], -1)[1], ["aten.slice.Tensor"]),
    "chunk": (lambda x: x.chunk(3, 2)[2], ["aten.slice.Tensor"]),
    "unbind": (lambda x: x.unbind(-1)[2], ["aten.select.int"]),
    "stack": (lambda x: torch.stack([x], -1).squeeze(-1).relu(), ["aten.relu"]),
    "squares": (lambda x: x.square().add(x * x), ["aten.pow.Tensor_Scalar", "aten.add.Tensor"]),
    "reciprocal root": (lambda x: 1 / (x.abs() + 1).sqrt(), ["aten.abs", "aten.add.Tensor", "aten.rsqrt"]),
    "reverse subtract": (lambda x: 1 - x, ["aten.neg", "aten.add.Tensor"]),
    "relu6": (F.relu6, ["aten.clamp"]),
    "common values": (lambda x: x.exp() + x.exp(), ["aten.exp", "aten.add.Tensor"]),
    "moved unit axis": (lambda x: x.unsqueeze(0).transpose(0, 2).squeeze(2).relu(), ["aten.permute", "aten.relu"]),
    "where true": (lambda x: torch.where(torch.ones_like(x, dtype=torch.bool), x, x * 2), []),
    "never masked": (lambda x: x.masked_fill(torch.zeros(8, dtype=torch.bool), 1.0).relu(), ["aten.relu"]),
    "rows through relu": (lambda x: x.flatten(0, 1).relu().view(x.shape), ["aten.relu"]),
    "rows of a sum": (lambda x: (x.flatten(0, 1) + x.flatten(0, 1) / 2).view(x.shape), HALVED),
}


@pytest.mark.parametrize("name", CASES)
def test_expected_ops(name: str) -> None:
    function, expected = CASES[name]

    made = canonical(function, x)

    found = [op for op in ops(made) if op != "aten.sym_size.int"]
    assert found == (expected or found)
    assert not GONE.intersection(found)


def test_a_view_of_no_elements_says_every_size() -> None:
    empty = torch.randn(3, 5, 2, 0)
    made = program(lambda x: x.flatten(2), empty)
    Canonicalize().run(made)

    assert made.run("forward", {"x0": torch.randn(4, 6, 2, 0)})["y0"].shape == (4, 6, 0)


def test_view_of_view_is_one_reshape() -> None:
    made = canonical(lambda x: x.view(x.shape[0], -1, 2, 4).view(-1, 4), x)

    assert ops(made) == ["aten.reshape"]
    assert made.main.calls()[0].args[1] == [-1, 4]


def test_reshape_with_two_unknown_sizes_stays_symbolic() -> None:
    made = canonical(lambda x: x.view(x.shape[0], x.shape[1], 2, 4), x)
    size, reshape = made.main.calls()

    assert reshape.args[1] == [size, -1, 2, 4]


def test_select_goes_below_permute() -> None:
    made = canonical(lambda x: x.view(x.shape[0], x.shape[1], 2, 4).permute(2, 0, 1, 3)[1], x)

    assert ops(made) == ["aten.sym_size.int", "aten.reshape", "aten.select.int"]


def test_equal_sizes_are_one_node() -> None:
    made = canonical(lambda a, b: (a + b).view(a.shape[0], b.shape[1], 2, 4) * a.shape[0] * b.shape[0], x, x.clone())

    assert ops(made).count("aten.sym_size.int") == 1


LINEARS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "addmm": lambda x, w, b: torch.addmm(b, x.view(-1, 8), w).view(*x.shape[:2], 6),
    "matmul and bias": lambda x, w, b: x @ w + b,
    "bias first": lambda x, w, b: b + x @ w,
    "mm": lambda x, w, b: (x.flatten(0, 1).mm(w) + b).view(*x.shape[:2], -1),
    "linear of a transpose": lambda x, w, b: F.linear(x, w.t(), b),
}


@pytest.mark.parametrize("name", LINEARS)
def test_products_with_a_matrix_become_linear(name: str) -> None:
    made = canonical(LINEARS[name], x, w=torch.randn(8, 6), b=torch.randn(6))

    assert ops(made) == ["aten.permute", "aten.linear"]


def test_product_used_twice_keeps_its_bias_apart() -> None:
    made = canonical(lambda x, w, b: (x @ w + b) * (x @ w), x, w=torch.randn(8, 6), b=torch.randn(6))

    assert ops(made) == ["aten.permute", "aten.linear", "aten.add.Tensor", "aten.mul.Tensor"]


def test_product_of_two_values_stays_matmul() -> None:
    made = canonical(lambda x: torch.bmm(x, x.mT), x)

    assert ops(made) == ["aten.permute", "aten.matmul"]


def test_different_casts_and_literals_are_not_merged() -> None:
    made = canonical(lambda x: x.mul(2).long() + x.mul(2).int() + x.pow(2).long() + x.pow(2.5).long(), x)

    assert ops(made).count("aten.to.dtype") == 4


def test_random_calls_are_not_merged() -> None:
    made = program(lambda x: torch.rand_like(x) + torch.rand_like(x), x)
    Canonicalize().run(made)

    assert ops(made).count("aten.rand_like") == 2


def test_mask_of_ones_leaves_attention() -> None:
    def attend(q: Tensor) -> Tensor:
        seen = torch.arange(q.shape[1])[:, None] >= 0
        return F.scaled_dot_product_attention(q, q, q, attn_mask=seen & torch.ones(1, q.shape[1], dtype=torch.bool))

    assert ops(canonical(attend, x)) == ["aten.scaled_dot_product_attention"]


def test_causal_mask_stays() -> None:
    def attend(q: Tensor) -> Tensor:
        mask = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril()
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    assert canonical(attend, x).main.calls()[-1].args[3] is not None


def test_facts_and_origin_survive() -> None:
    case = zoo.case("gpt2")
    made = capture(case.model, case.inputs)
    Canonicalize().run(made)

    linears = made.main.calls(torch.ops.aten.linear.default)
    assert len(linears) == 4 * 4 + 1
    for node in linears[:-1]:
        assert value(node).shape[-1] == value(node.args[1]).shape[0]
        assert node.meta["nn_module_stack"]
        assert Canonicalize.name in node.meta["made_by"]


@pytest.mark.parametrize("name", zoo.NAMES)
def test_zoo_at_other_sizes(name: str) -> None:
    case = zoo.case(name)
    made = capture(case.model, case.inputs, dynamic=case.dynamic)
    before = {i: made.run("forward", inputs) for i, inputs in enumerate((case.inputs, *case.other))}

    Canonicalize().run(made)
    made.sweep()

    verify(made)
    assert not GONE.intersection(ops(made))
    for i, inputs in enumerate((case.inputs, *case.other)):
        torch.testing.assert_close(made.run("forward", inputs), before[i], rtol=1e-4, atol=1e-4)
    assert not canonicalize(made.main).applied


def test_rules_that_feed_each_other_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    negate = torch.ops.aten.neg.default
    positive = torch.ops.aten.abs.default
    there = lambda node: module.Call(positive, node.args)  # noqa: E731
    back = lambda node: module.Call(negate, node.args)  # noqa: E731
    monkeypatch.setattr(module, "RULES", {negate: (there,), positive: (back,)})

    with pytest.raises(CompileError, match="no normal form"):
        canonicalize(program(torch.neg, x).main)


def test_an_expand_of_an_expand_keeps_the_inner_sizes() -> None:
    canonical(lambda x: x[:1].expand(x.shape[0], -1, 8).expand(2, -1, -1, -1), x)


def test_a_range_with_float_bounds_keeps_its_type() -> None:
    made = canonical(lambda x: torch.arange(0, 5.0, dtype=torch.int64) * x.shape[0], x)

    assert value(made.main.results()[0]).dtype == torch.int64


def test_a_product_of_booleans_is_no_square() -> None:
    canonical(lambda x: (x > 0) * (x > 0), x)
