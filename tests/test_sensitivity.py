"""What layers read and how much their outputs matter, on calibration data; groups of blocks by drift."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sylvester as sv
from sylvester.compiler.calibration import Calibration
from sylvester.compiler.calls import arguments
from sylvester.compiler.errors import CompileError
from sylvester.compiler.gram import Whitening, input_grams
from sylvester.compiler.program import binding
from sylvester.compiler.sensitivity import sensitivities
from sylvester.compiler.structure import discover
from sylvester.passes.block_drift import check_groups, consecutive_groups, drift
from tests import zoo
from tests.sharing import inputs, tower

LINEAR = torch.ops.aten.linear.default


class Two(nn.Module):
    """Two layers over one input; the second counts as much as `factor` says."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x, factor):
        return self.a(x) + factor * self.b(x)


def two(samples):
    program = sv.trace(Two(), (torch.randn(3, 6), torch.randn(3, 5)))
    program.calibration = Calibration(tuple({"x": x, "factor": torch.full((len(x), 5), 10.0)} for x in samples))
    return program


def test_grams_are_means_over_all_rows_and_shared_by_layers_over_one_input():
    samples = [torch.randn(n, 6) for n in (3, 7, 4)]
    program = two(samples)
    layers = program.main.calls(LINEAR)
    found = input_grams(program, layers)
    rows = torch.cat(samples).double()
    torch.testing.assert_close(found[layers[0]], rows.T @ rows / 14, rtol=1e-5, atol=1e-6)
    assert found[layers[0]] is found[layers[1]]


def test_inputs_that_are_not_finite_are_an_error():
    with pytest.raises(CompileError, match="not finite"):
        input_grams(two([torch.full((3, 6), math.nan)]), two([]).main.calls(LINEAR))


@pytest.mark.parametrize("rank", [6, 2, 0])
def test_whitening_measures_outputs_and_can_be_undone(rank):
    torch.manual_seed(0)
    x = torch.randn(40, rank, dtype=torch.float64) @ torch.randn(rank, 6, dtype=torch.float64)
    weight = torch.randn(5, 6, dtype=torch.float64)
    whitening = Whitening(x.T @ x / 40)
    norm = (weight @ x.T).square().sum() / 40
    torch.testing.assert_close(whitening.apply(weight).square().sum(), norm, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(whitening.undo(whitening.apply(weight)), weight)


def test_the_layer_that_counts_more_is_more_sensitive():
    program = two([torch.randn(8, 6)])
    found = sensitivities(program, program.main.calls(LINEAR))
    by_key = {binding(arguments(node)["weight"]).key: value for node, value in found.items()}
    assert by_key["b.weight"] == pytest.approx(100 * by_key["a.weight"], rel=1e-4)


def test_the_loss_of_the_next_token_decides_for_a_language_model():
    case = zoo.case("llama-gqa")
    program = zoo.traced(case.name).clone()
    ids = case.inputs["input_ids"]
    program.calibration = Calibration(({"input_ids": ids},))
    layer = next(n for n in program.main.calls(LINEAR))
    found = sensitivities(program, [layer])[layer]
    kept = []
    handle = case.model.model.layers[0].self_attn.q_proj.register_forward_hook(
        lambda _module, _args, y: kept.append(y.detach().requires_grad_()) or kept[-1]
    )
    logits = case.model(ids).logits
    handle.remove()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    assert found == pytest.approx(float(kept[0].grad.square().mean()), rel=1e-3)
    for parameter in case.model.parameters():
        parameter.grad = None


def test_without_data_every_layer_counts_the_same():
    program = two([])
    assert set(sensitivities(program, program.main.calls(LINEAR)).values()) == {1.0}


def test_drift_is_one_minus_the_cosine_of_neighbours():
    program = tower(samples=2)
    stack = discover(program).stacks[0]
    found = drift(program, stack)
    x = torch.cat(inputs(2))
    module_ends = []
    entry = program.main
    graph_ends = [block.end.name for block in stack.blocks]
    interpreter = torch.fx.Interpreter(torch.fx.GraphModule(nn.Module(), entry.graph))
    interpreter.garbage_collect_values = False
    values = {"input": {next(iter(entry.examples)): x}, "weight": program.weights}
    interpreter.run(*(values[binding(n).kind][binding(n).key] for n in entry.placeholders()))
    named = {node.name: value for node, value in interpreter.env.items()}
    module_ends = [named[name].flatten(0, 1) for name in graph_ends]
    expected = [1 - float(F.cosine_similarity(a, b).mean()) for a, b in itertools.pairwise(module_ends)]
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_language_model_drifts_by_what_its_head_makes_of_the_mean():
    case = zoo.case("gpt2")
    program = zoo.traced(case.name).clone()
    ids = case.inputs["input_ids"]
    program.calibration = Calibration(({"input_ids": ids},))
    found = drift(program, discover(program, "prefill").stacks[0])
    model = case.model
    hidden = []
    handles = [h.register_forward_hook(lambda _m, _a, y: hidden.append(y)) for h in model.transformer.h]
    with torch.no_grad():
        model(ids)
        means = [h.flatten(0, 1).mean(0) for h in hidden]
        scores = [F.log_softmax(model.lm_head(model.transformer.ln_f(mean)).double(), -1) for mean in means]
    for handle in handles:
        handle.remove()
    expected = [float((a.exp() * (a - b)).sum()) for a, b in itertools.pairwise(scores)]
    assert found == pytest.approx(expected, rel=1e-3)


def sizes(groups):
    return [len(group) for group in groups]


def test_groups_part_where_the_drift_is_large():
    assert consecutive_groups([0.1, 5.0, 0.1, 0.1, 0.1], 3) == [range(2), range(2, 6)]
    assert consecutive_groups([0.1, 0.1, 0.1, 5.0, 0.1], 3) == [range(4), range(4, 6)]
    assert consecutive_groups([5.0, 0.1, 0.1, 0.1, 0.1], 3) == [range(3), range(3, 6)]


@pytest.mark.parametrize(("blocks", "size"), [(8, 2), (8, 4), (16, 4), (9, 3), (5, 2), (4, 1), (3, 8)])
def test_equal_drifts_give_even_groups(blocks, size):
    groups = consecutive_groups([1.0] * (blocks - 1), size)
    assert [n for group in groups for n in group] == list(range(blocks))
    assert max(sizes(groups)) - min(sizes(groups)) <= 1
    assert len(groups) == -(-blocks // size)


def test_groups_are_the_best_of_all():
    drifts = torch.rand(8, generator=torch.Generator().manual_seed(3)).tolist()
    found = consecutive_groups(drifts, 3)

    def inside(groups):
        return sum(sum(drifts[g.start : g.stop - 1]) for g in groups)

    def every(start, count):
        if count == 0:
            yield from [[]] if start == 9 else []
            return
        for end in range(start + 2, min(9, start + 4) + 1):
            yield from ([range(start, end), *rest] for rest in every(end, count - 1))

    assert inside(found) == pytest.approx(min(map(inside, every(0, 3))))


def test_groups_that_do_not_fit():
    check_groups(((0, 1), (2, 3)), [2, 2])
    with pytest.raises(CompileError, match="block 4"):
        check_groups(((0, 4),), [2, 2])
    with pytest.raises(CompileError, match="two stacks"):
        check_groups(((1, 2),), [2, 2])
