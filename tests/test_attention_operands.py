"""Optional operands of the attention ops: shared keys and listed blocks, as references, passes and compiled code."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sylvester as sv
from sylvester.codegen.compile import plans
from sylvester.codegen.index import index
from sylvester.codegen.lazy import Extern, Plan
from sylvester.compiler import ops
from sylvester.compiler.attention_operands import LISTED, listed
from sylvester.compiler.cache_ops import attention_q, quantize_records
from sylvester.compiler.errors import InputError
from sylvester.compiler.quantized_ops import attention_bf16
from tests.programs import program

QUERIES, KEYS = 130, 300


def heads(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("op", [ops.attention, attention_bf16, attention_q], ids=lambda op: op.name)
def test_shared_keys_are_those_of_the_first_row(op):
    q, k, v = heads(3, 4, 2, 8), heads(3, 2, 40, 8), heads(3, 2, 40, 8) + 1
    copied = [torch.cat((x[:1, :, :21].expand(3, 2, 21, 8), x[:, :, 21:]), 2) for x in (k, v)]
    k[1:, :, :21] = v[1:, :, :21] = torch.nan
    tail: tuple[object, ...] = (None, torch.tensor(30), 0.3, True, 15, 1.5)
    if op is attention_q:
        k, v, *copied = (quantize_records(x, 8) for x in (k, v, *copied))
        tail = (*tail, 8)
    found = op(q, k, v, *tail, shared=torch.tensor(21))
    assert torch.equal(found, op(q, *copied, *tail))
    assert not torch.equal(found, op(q, *copied, *tail, shared=torch.tensor(32)))


@pytest.mark.parametrize("op", [ops.attention, attention_bf16], ids=lambda op: op.name)
def test_listed_blocks_are_a_mask(op):
    q, k, v = heads(1, 2, QUERIES, 8), heads(1, 2, KEYS, 8), heads(1, 2, KEYS, 8)
    lists = torch.tensor([[[0, 3, -1], [4, -1, -1], [-1, -1, -1]], [[2, -1, -1], [0, 1, 2], [1, 4, -1]]])
    dense = torch.zeros(1, 2, QUERIES, KEYS, dtype=torch.bool)
    for head, block, column in torch.nonzero(lists >= 0).tolist():
        at, j = LISTED * block, LISTED * int(lists[head, block, column])
        dense[:, head, at : at + LISTED, j : j + LISTED] = True
    assert torch.equal(listed(lists, QUERIES, KEYS)[None], dense)
    other = heads(1, 1, QUERIES, KEYS)
    for mask, both in ((None, dense), (other > 0, (other > 0) & dense), (other, other.masked_fill(~dense, -torch.inf))):
        found = op(q, k, v, mask, None, 0.3, False, 0, blocks=lists)
        assert torch.equal(found, op(q, k, v, both, None, 0.3, False, 0))
        assert (found[:, 0, 2 * LISTED :] == 0).all()


def test_operands_that_do_not_go_together():
    q, past = heads(1, 2, 4, 8), torch.tensor(0)
    with pytest.raises(ValueError, match="`shared` keys reads caches, got no `past`"):
        ops.attention(q, q, q, None, None, 0.3, True, 0, shared=past)
    with pytest.raises(ValueError, match="`blocks` reads no caches, got `past`"):
        ops.attention(q, q, q, None, past, 0.3, True, 0, blocks=torch.tensor([[0]]))


def bytes_of(plan: Plan, tokens: int) -> int:
    """All that the plan keeps in its arena when every symbolic size is `tokens`."""
    sizes = {size: index(tokens) for size in plan.sizes}
    held = [b.nbytes.substitute(sizes).constant for b in plan.buffers.values() if b.kind == "arena"]
    assert held
    assert None not in held
    return sum(held)


@pytest.mark.parametrize("way", ["plain", "masked", "listed", "exported"])
def test_memory_of_attention_is_linear_in_the_tokens(way):
    """No buffer of queries times keys; the scratch of a thread depends on no size at all."""

    def attend(q, k, v, *rest):
        if way == "exported":
            return F.scaled_dot_product_attention(q.exp(), k, v, is_causal=True)
        mask, blocks = (rest[0] if way == name else None for name in ("masked", "listed"))
        return ops.attention(q.exp(), k, v, mask, None, 0.3, True, 0, blocks=blocks)

    rest = {"masked": [heads(1, 1, 1, QUERIES)], "listed": [torch.tensor([[0, -1], [0, 1], [1, 2]])]}.get(way, [])
    given = (*(heads(1, 4, QUERIES, 32) + n for n in range(3)), *rest)
    plan = plans(program(attend, *given, axes=lambda x: [n for n in range(x.dim()) if x.shape[n] in (QUERIES, 3)]))[
        "forward"
    ]
    calls = [step for step in plan.steps if isinstance(step, Extern)]
    assert [step.scratch[1] for step in calls] == [()]
    assert len(plan.sizes) >= 1
    assert 2 * bytes_of(plan, 2048) < bytes_of(plan, 8192) <= 4 * bytes_of(plan, 2048)


class Listed(nn.Module):
    """Causal attention over listed blocks, in arithmetic `op`."""

    def __init__(self, op=ops.attention):
        super().__init__()
        self.op = op

    def forward(self, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor) -> Tensor:
        return self.op(q, k, v, None, None, 0.35, True, 0, blocks=blocks)


@pytest.mark.parametrize("op", [ops.attention, attention_bf16], ids=lambda op: op.name)
def test_listed_blocks_compiled(op):
    q, k, v = heads(2, 4, KEYS, 32), heads(2, 2, KEYS, 32), heads(2, 2, KEYS, 32)
    lists = torch.tensor([[0, -1, -1], [0, 1, -1], [0, 2, -1], [1, 2, 3], [0, 3, 4]])
    with sv.compile(Listed(op), (q, k, v, lists), target=sv.Target(threads=2, isas=("avx2",))) as model:
        allowed = 1e-5 if op is ops.attention else 2e-2
        torch.testing.assert_close(model(q, k, v, lists), Listed()(q, k, v, lists), rtol=0, atol=allowed)
        with pytest.raises(InputError, match="holds 9 out of place or range, expected ascending numbers of blocks"):
            model(q, k, v, torch.where(lists == 4, 9, lists))
