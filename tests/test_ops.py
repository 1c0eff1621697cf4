"""Every op that states what its result looks like says what its reference computes."""

from __future__ import annotations

import pytest

from sylvester.compiler.ops import FACTS, OPS, sample

STATED = [op for op in OPS.values() if op.target in FACTS]


@pytest.mark.parametrize("op", STATED, ids=lambda op: op.name)
def test_stated_facts_are_those_of_the_reference(op):
    for example in op.examples:
        arguments = sample(example)
        stated, computed = FACTS[op.target](*arguments), op(*arguments)
        assert (stated.shape, stated.dtype) == (computed.shape, computed.dtype)


def test_hadamard_facts_refuse_unknown_orders():
    with pytest.raises(ValueError, match="known order that divides 12, got 7"):
        FACTS[OPS["hadamard"].target](sample(((2, 12),))[0], 7)
