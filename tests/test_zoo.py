"""Every model of the zoo is what the rest of the suite takes it for: exportable, symbolic in size, not degenerate."""

from __future__ import annotations

import copy

import pytest
import torch

from tests import zoo
from tests.zoo import tensors


@pytest.mark.parametrize("name", zoo.NAMES)
def test_exported_model_serves_other_sizes(name: str) -> None:
    case = zoo.case(name)
    program = torch.export.export(case.model, (), case.inputs, dynamic_shapes=case.dynamic_shapes, strict=False)
    module = program.module()

    for inputs in (case.inputs, *case.other):
        with torch.no_grad():
            torch.testing.assert_close(tensors(module(**inputs)), tensors(case.model(**inputs)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_outputs_are_well_conditioned(name: str) -> None:
    """Rows differ from each other and float32 is near float64: a compiled result can be judged by its error."""
    case = zoo.case(name)
    with torch.no_grad():
        single = tensors(case.model(**case.inputs))
        double = tensors(copy.deepcopy(case.model).double()(**zoo.to_double(case.inputs)))

    for got, want in zip(single, double, strict=True):
        scale = want.abs().max()
        assert (got - want).abs().max() < 2e-5 * scale
        assert want.flatten(0, -2).std(0).mean() > 1e-3 * scale


def test_same_name_gives_the_same_weights() -> None:
    first = zoo.case("llama-gqa")
    zoo.case.cache_clear()
    again = zoo.case("llama-gqa")

    assert all(map(torch.equal, first.model.parameters(), again.model.parameters()))
    assert torch.equal(first.inputs["input_ids"], again.inputs["input_ids"])
