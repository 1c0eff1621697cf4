"""torch.compile with our backend: the same outputs, any size, changed weights, and what is left to PyTorch and why."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from sylvester.compiler import dynamo
from sylvester.compiler.dynamo import LeftToPyTorch, backend
from tests import zoo

TOLERANCE = 1e-5
OFTEN = ("llama-gqa", "bert", "vit")


class Block(nn.Module):
    """Sizes, a number that modules hold, a buffer, and an output that is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.scale = nn.Linear(8, 12), 0.5
        self.register_buffer("shift", torch.linspace(-1, 1, 12))

    def forward(self, x, rate=2.0):
        states = torch.tanh(self.project(x) + self.shift) * self.scale * rate
        return states.reshape(states.shape[0] * states.shape[1], -1), x, states.shape[1] + 1


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    dynamo._graphs.clear()
    with torch.no_grad():
        yield


def compiled(model, **options):
    return torch.compile(model.eval(), backend=backend, **options)


def same(found, expected):
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_module_gives_the_same_at_any_size_from_one_compilation():
    model = Block()
    function = compiled(model, dynamic=True)
    for size in (3, 5), (4, 9), (2, 2):
        x = torch.randn(*size, 8)
        found = function(x)
        same(found, model(x))
        assert found[1] is x

    assert [graph.reason for graph in dynamo.report()] == [""]


def test_changed_weights_and_numbers_are_seen():
    model = Block()
    function, x = compiled(model, dynamic=True), torch.randn(2, 3, 8)
    same(function(x), model(x))
    model.project.weight.mul_(3)
    same(function(x), model(x))
    model.scale = 0.25
    same(function(x, rate=3.0), model(x, rate=3.0))


def test_numbers_that_change_often_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(dynamo, "COMPILATIONS", 3)
    model, x = Block(), torch.randn(2, 3, 8)
    function = compiled(model, dynamic=True)
    for rate in (2.0, 3.0):
        same(function(x, rate=rate), model(x, rate=rate))
    with pytest.warns(LeftToPyTorch, match="have changed 2 times"):
        found = function(x, rate=4.0)

    same(found, model(x, rate=4.0))
    same(function(x, rate=5.0), model(x, rate=5.0))


def test_graph_breaks_are_tolerated():
    class Broken(nn.Module):
        def forward(self, x):
            y = torch.relu(x) + 1
            torch._dynamo.graph_break()
            return y.softmax(-1)

    x = torch.randn(3, 7)
    same(compiled(Broken())(x), Broken()(x))
    assert [graph.reason for graph in dynamo.report()] == ["", ""]


class InPlace(nn.Module):
    def forward(self, x):
        x.add_(1)
        return x * 2


class Number(nn.Module):
    def forward(self, x, count):
        return x * count


REFUSED = {
    "in place": (InPlace(), lambda: (torch.zeros(3),), "in place"),
    "bfloat16": (nn.Linear(4, 4).bfloat16(), lambda: (torch.ones(2, 4).bfloat16(),), "bfloat16"),
    "number": (Number(), lambda: (torch.ones(3), 3), "no size of a tensor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compiled_is_left_to_pytorch_with_the_reason(case):
    model, inputs, reason = REFUSED[case]
    given, again = inputs(), inputs()
    with pytest.warns(LeftToPyTorch, match=reason):
        found = compiled(model, dynamic=True)(*given)

    same(found, model(*again))
    same(given[0], again[0])
    assert [reason in graph.reason for graph in dynamo.report()] == [True]


def test_training_is_left_to_pytorch():
    layer = nn.Linear(4, 4)
    with torch.enable_grad(), pytest.warns(LeftToPyTorch, match="gradients may be wanted"):
        compiled(layer)(torch.ones(2, 4)).sum().backward()

    assert layer.weight.grad is not None


def test_unknown_options_are_refused():
    with pytest.raises(BackendCompilerFailed, match="CompileError: unknown option 'thread'"):
        compiled(nn.Linear(4, 4), options={"thread": 1})(torch.ones(2, 4))


def test_a_graph_that_fixes_its_sizes_is_compiled_for_each(monkeypatch):
    """As images are by some networks, for which torch.export solves no equation."""

    def only_batches(name, fact, axes):
        if axes - {0}:
            raise dynamo.SizesFixed("fixed")

    monkeypatch.setattr(dynamo, "_require_free", only_batches)
    model = Block()
    function = compiled(model, dynamic=True)
    for size in (2, 5), (3, 5), (2, 7), (4, 5):
        x = torch.randn(*size, 8)
        same(function(x), model(x))

    assert [graph.reason for graph in dynamo.report()] == ["", ""]


@pytest.mark.parametrize("norm_first", [False, True])
def test_fast_paths_of_modules_are_written_out(norm_first):
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True, norm_first=norm_first).eval()
    x, padded = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    padded[0, 3:] = True
    with torch.no_grad():
        found = compiled(layer)(x, src_key_padding_mask=padded)

    same(found[~padded], layer(x, src_key_padding_mask=padded)[~padded])
    assert [graph.reason for graph in dynamo.report()] == [""]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.nightly) for name in zoo.NAMES]
)
def test_models_give_the_same(name):
    case = zoo.case(name)
    function = compiled(case.model, dynamic=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", LeftToPyTorch)
        found, expected = function(**case.inputs), case.model(**case.inputs)

    for ours, theirs in zip(zoo.tensors(found), zoo.tensors(expected), strict=True):
        same(ours, theirs)
    assert [graph.reason for graph in dynamo.report()] == [""]


def test_the_backend_is_found_by_name():
    script = "import torch._dynamo; print('sylvester' in torch._dynamo.list_backends())"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert ran.stdout.strip() == "True"
