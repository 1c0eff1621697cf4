"""The joint graph of forward and backward pass: its rotations and roundings, and the gradients that it gives."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from torch import nn

import sylvester as sv
from sylvester.compiler.errors import CompileError, TraceError
from sylvester.compiler.joint_graph import trained
from tests.test_halo import Small, ids


class Parallel(nn.Module):
    """Three layers over one input, whose gradients add up."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(24, 24, bias=False) for _ in range(3))

    def forward(self, x):
        return sum(part(x).sin() for part in self.parts)


def chain(count: int) -> nn.Module:
    return nn.Sequential(*(part for _ in range(count) for part in (nn.Linear(24, 24), nn.Tanh())))


def gradients(module: nn.Module, model: nn.Module, *given: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    y = module(*given)
    (y * torch.randn_like(y)).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("level", "format"), [(0, "int8"), (1, "int8"), (2, "int8"), (3, "int8"), (3, "exact")])
def test_gradients_are_those_of_the_op(level, format):
    torch.manual_seed(0)
    model, given = Small(blocks=1), ids(3, 7)
    found = [gradients(sv.halo(model, (given,), level, format, joint=joint), model, given) for joint in (False, True)]
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, atol=2e-6 * float(expected.abs().max()), rtol=0)


@pytest.mark.parametrize(("level", "each", "alone"), [(0, 0, 0), (1, 4, 0), (2, 6, 0), (3, 7, 1)])
def test_rotations_of_layers_in_a_row(level, each, alone):
    """Of X, W, and what is undone in E and G; of E over tokens and back; of X R, as F reads it, over tokens."""
    model, x = chain(3), torch.randn(5, 24, requires_grad=True)
    module = sv.halo(model, (x,), level, joint=True, head=True)
    gradients(module, model, x)
    assert module.joint[0].left == 3 * each
    assert module.joint[0].alone == 3 * alone


def test_rotations_of_what_is_shared_or_added_are_done_once():
    model, x = Parallel(), torch.randn(5, 24, requires_grad=True)
    module = sv.halo(model, (x,), 1, joint=True, head=True)
    gradients(module, model, x)
    assert (module.joint[0].placed, module.joint[0].left) == (18, 1 + 3 + 1 + 3)
    assert module.joint[0].alone == 1  # of the sum


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_inputs_of_layers_are_kept_in_8_bits(level):
    model, x = chain(2), torch.randn(6, 24)
    module = sv.halo(model, (x,), level, joint=True, head=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x)
    assert sum(t.dtype == torch.int8 and t.numel() in (6 * 24, 8 * 24) for t in kept) == 2
    assert not any(t.dtype.is_floating_point and torch.equal(t, x) for t in kept if t.shape == x.shape)


def test_weights_stored_the_other_way_and_tied_ones():
    config = hf.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16, use_cache=False, bos_token_id=0, eos_token_id=0,
        embd_pdrop=0, attn_pdrop=0, resid_pdrop=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model, given = hf.GPT2LMHeadModel(config).train(), ids(2, 6)
    found = []
    for joint in (False, True):
        module = sv.halo(model, (given,), joint=joint)
        found.append(gradients(lambda x, module=module: module(x).logits, model, given))
    assert len(module.report.rewritten) == len(module.joint[0].weights) == 4
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, atol=2e-6 * float(expected.abs().max()), rtol=0)


def test_other_sizes_are_traced_again_and_evaluation_is_that_of_the_op():
    torch.manual_seed(0)
    model = Small(blocks=1)
    module, plain = (sv.halo(model, (ids(2, 6),), joint=joint) for joint in (True, False))
    for given in (ids(2, 6), ids(3, 5), ids(2, 6)):
        torch.testing.assert_close(module(given), plain(given))
    assert len(module.joint) == 2
    torch.testing.assert_close(module.eval()(given), plain.eval()(given))
    assert len(module.joint) == 2


def test_parameters_are_those_of_the_model():
    torch.manual_seed(0)
    model, given = Small(blocks=1), ids(2, 6)
    module = sv.halo(model, (given,), joint=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    module(given).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    again = copy.deepcopy(model)
    torch.testing.assert_close(sv.halo(again, (given,), joint=True)(given), module(given))


def test_a_gradient_that_is_not_finite_names_the_layer():
    model, x = chain(2), torch.randn(5, 24)
    module = sv.halo(model, (x,), joint=True, head=True)
    with pytest.raises(CompileError, match=r"gradient of the result of '2.weight' holds a NaN"):
        (module(x) * float("nan")).sum().backward()


def test_a_backward_pass_that_cannot_be_traced_is_refused():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * float(self.w.sum().item())

    with pytest.raises(TraceError, match="cannot trace the backward pass"):
        trained(Reads(), (torch.ones(3),), lambda joint: None)


def test_a_joint_graph_is_not_split_between_ranks():
    with pytest.raises(CompileError, match="traced for whole weights"):
        sv.halo_shard(sv.halo(chain(1), (torch.randn(5, 24),), joint=True, head=True))
