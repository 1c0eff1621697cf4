"""Sharing with as many atoms as blocks, or a basis of full rank, leaves every model as it is, in all entries."""

from __future__ import annotations

import pytest

from sylvester.compiler.pipeline import Pipeline
from sylvester.passes.share_attention import ShareAttention
from sylvester.passes.share_basis import ShareBasis
from tests import zoo

CLOSE = 1e-4
BOTH_MODES = ("llama-gqa", "gpt2", "bert")


@pytest.mark.parametrize("name", [*zoo.DIVERSE, "bert", "vit", "t5", "torch-decoder"])
def test_it_is_exact_in_full(name):
    case = zoo.case(name)
    program = zoo.traced(case.name).clone()
    attentions = sum(stack.blocks * sum("attention" in part for part in stack.parts) for stack in case.stacks)
    longest = max(stack.blocks for stack in case.stacks)
    passes = [ShareAttention(atoms=longest), ShareBasis(rank=1 << 20)]
    passes += [ShareAttention(atoms=longest, mode="run")] if name in BOTH_MODES else []
    for share in passes:
        _, ledger = Pipeline((share,)).run(program)
        assert ledger.rows[0].error < CLOSE
        kinds = [item.rule.split()[1] for item in ledger.rows[0].changes.applied]
        assert [kinds.count(kind) for kind in "qkvo"] == [attentions] * 4
        assert not ledger.rows[0].changes.refused
