"""Capture: the program computes what the model does at other sizes, and what cannot be traced says why and where."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim

from sylvester.compiler import ops
from sylvester.compiler.check import relative_error
from sylvester.compiler.errors import CompileError, TraceError
from sylvester.compiler.program import binding, value
from sylvester.compiler.trace import capture
from tests import zoo


def module(forward, **children):
    """A module in eval mode whose forward is a function of itself and its inputs."""
    made = type("Made", (nn.Module,), {"forward": forward})()
    for name, child in children.items():
        if isinstance(child, torch.Tensor):
            made.register_buffer(name, child)
        else:
            setattr(made, name, child)
    return made.eval()


def shapes(program):
    return {binding(n).key: list(value(n).shape) for n in program.main.placeholders("input")}


def symbolic(program):
    return {key: [isinstance(n, torch.SymInt) for n in shape] for key, shape in shapes(program).items()}


def targets(program):
    return [str(node.target) for node in program.main.calls()]


def outputs_of(model, inputs):
    with torch.no_grad():
        found = model(**inputs)
    return {"out0": found} if isinstance(found, torch.Tensor) else found


@pytest.mark.parametrize("name", ["llama-tied", "opt", "bert", "vit", "t5", "torch-decoder", "resnet", "mlp"])
def test_zoo_at_every_size(name):
    case = zoo.case(name)

    program = capture(case.model, case.inputs)

    ones = {key: x[:1] for key, x in case.inputs.items()}
    for inputs in (case.inputs, *case.other, ones):
        found, expected = program.run("forward", inputs), outputs_of(case.model, inputs)
        assert set(found) <= set(expected)
        assert max(relative_error(expected[key], found[key]) for key in found) < 2e-6


def test_tied_weights_are_one_key_with_an_alias():
    model = zoo.case("llama-tied").model

    program = capture(model, zoo.case("llama-tied").inputs)

    key = program.weights.aliases["lm_head.weight"]
    assert program.weights[key].data_ptr() == model.lm_head.weight.data_ptr()
    assert program.weights.nbytes < sum(p.nbytes for p in model.state_dict().values())


def test_every_call_has_fact_and_origin():
    program = capture(zoo.case("llama-gqa").model, zoo.case("llama-gqa").inputs)

    for node in program.main.calls():
        assert {"val", "stack_trace", "nn_module_stack"} <= set(node.meta), node
    linear = program.main.calls(torch.ops.aten.linear.default)[0]
    assert "modeling_llama.py" in linear.meta["stack_trace"]


def test_cache_and_training_mode_are_put_back():
    model = zoo.case("llama-gqa").model
    model.config.use_cache = True
    try:
        program = capture(model.train(), zoo.case("llama-gqa").inputs)

        assert model.config.use_cache
        assert all(m.training for m in model.modules())
        assert [o.name for o in program.main.outputs] == ["logits"]
    finally:
        model.config.use_cache = False
        model.eval()


def test_dropout_is_traced_in_eval_mode_with_a_note():
    model = module(lambda self, x: self.drop(x) + 1, drop=nn.Dropout(0.5)).train()
    x = torch.randn(3, 4)

    program = capture(model, (x,))

    assert program.info["notes"] == ["the model was in training mode; it was traced in eval mode"]
    torch.testing.assert_close(program.run("forward", {"x": x})["out0"], x + 1)


def test_batch_and_length_are_symbolic_and_shared():
    case = zoo.case("bert")

    found = shapes(capture(case.model, case.inputs))

    assert str(found["input_ids"]) == str(found["attention_mask"])
    assert all(isinstance(n, torch.SymInt) for n in found["input_ids"])


def test_image_has_a_symbolic_batch_only():
    assert symbolic(capture(zoo.case("resnet").model, zoo.case("resnet").inputs)) == {
        "pixel_values": [True, False, False, False]
    }


def test_fixed_dimension_is_a_number_with_a_note():
    case = zoo.case("whisper-encoder")

    program = capture(case.model, case.inputs)

    assert shapes(program)["input_features"][1:] == [20, 60]
    assert type(shapes(program)["input_features"][1]) is int
    assert program.info["notes"] == ["input 'input_features': dimension 1 is fixed at 20"]


def test_example_sizes_of_one_stay_symbolic():
    model = module(lambda self, x: self.linear(x).softmax(-1), linear=nn.Linear(6, 5))

    program = capture(model, (torch.randn(1, 1, 6),))

    x = torch.randn(4, 3, 6)
    assert symbolic(program) == {"x": [True, True, False]}
    assert program.main.examples["x"].shape == (1, 1, 6)
    torch.testing.assert_close(program.run("forward", {"x": x})["out0"], model(x))


def test_batch_of_one_that_must_be_one_is_fixed_with_a_note():
    model = module(lambda self, x: x.squeeze(0) @ self.w, w=torch.randn(6, 5))

    program = capture(model, (torch.randn(1, 4, 6),))

    assert symbolic(program)["x"][0] is False
    assert "dimension 0 is fixed at 1" in program.info["notes"][0]


def test_dynamic_shapes_of_the_caller():
    model = module(lambda self, x: x * 2)

    program = capture(model, (torch.randn(3, 4),), dynamic={"x": {0: Dim("batch", max=64)}})

    assert symbolic(program) == {"x": [True, False]}


def test_dynamic_shapes_that_do_not_fit():
    model = module(lambda self, x: x * 2)

    with pytest.raises(TraceError, match="the dynamic shapes do not fit the model"):
        capture(model, (torch.randn(3, 4),), dynamic={"x": {0: Dim("batch", max=2)}})


def test_keyword_variadic_and_absent_inputs():
    a, b, c, d = torch.randn(4, 3, 5)

    positional = capture(module(lambda self, a, b=None, *, c=2.0: a * c), (a, None))
    variadic = capture(module(lambda self, a, *more: a + more[0] * more[1]), (a, b, c))
    keyword = capture(module(lambda self, a, **other: a + other["shift"]), {"a": a, "shift": d})

    assert list(shapes(positional)) == ["a"]
    assert list(shapes(variadic)) == ["a", "more_0", "more_1"]
    torch.testing.assert_close(keyword.run("forward", {"a": a, "shift": d})["out0"], a + d)
    assert len(keyword.info["notes"]) == 4


def test_unused_input_is_kept():
    program = capture(module(lambda self, x, y: x + 1), (torch.randn(3, 4), torch.randn(3, 4)))

    assert list(shapes(program)) == ["x", "y"]


def test_nested_outputs_are_named():
    model = module(lambda self, x: {"a": x, "b": [x + 1, x + 2], "none": None, "size": 3})

    program = capture(model, (torch.randn(3, 4),))

    assert [o.name for o in program.main.outputs] == ["a", "b.0", "b.1"]
    assert program.info["output_type"] == "dict"


@pytest.mark.parametrize(
    ("forward", "kind", "names"),
    [
        (lambda self, x: x + 1, "tensor", ["out0"]),
        (lambda self, x: (x + 1, x + 2), "tuple", ["out0", "out1"]),
        (lambda self, x: [x + 1, None, (x, x)], "tuple", ["out0", "out2.0", "out2.1"]),
    ],
)
def test_output_structure(forward, kind, names):
    program = capture(module(forward), (torch.randn(3, 4),))

    assert program.info["output_type"] == kind
    assert [o.name for o in program.main.outputs] == names


def test_composite_dialect_op_is_one_node():
    q = torch.randn(2, 3, 5, 4)

    program = capture(module(lambda self, q: ops.attention(q, q, q, None, None, 0.5, True, 0)), (q,))

    assert targets(program) == ["sylvester.attention.default"]


def test_constants_become_weights():
    program = capture(module(lambda self, x: x + torch.tensor([1.0, 2.0])), (torch.randn(3, 2),))

    assert [t.tolist() for t in program.weights.values()] == [[1.0, 2.0]]


def test_exported_program_and_file(tmp_path):
    model = module(lambda self, x: self.linear(x), linear=nn.Linear(6, 5))
    exported = torch.export.export(model, (torch.randn(3, 6),), dynamic_shapes={"x": {0: Dim.DYNAMIC}})
    torch.export.save(exported, tmp_path / "model.pt2")
    x = torch.randn(7, 6)

    for source in (exported, tmp_path / "model.pt2", str(tmp_path / "model.pt2")):
        program = capture(source)
        assert symbolic(program) == {"x": [True, False]}
        torch.testing.assert_close(program.run("forward", {"x": x})["out0"], model(x))


def test_truncated_file(tmp_path):
    path = tmp_path / "model.pt2"
    path.write_bytes(b"PK\x03\x04 and no more")

    with pytest.raises(TraceError, match=r"'model.pt2' is not a readable .pt2 file"):
        capture(path)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        (None, "no example inputs"),
        ((), "no example inputs"),
        ({}, "no example inputs"),
        (torch.zeros(3), "example inputs are Tensor, expected a tuple or a dict"),
        ({"y": torch.zeros(3)}, "do not fit forward"),
        ((torch.zeros(3), torch.zeros(3), torch.zeros(3)), "do not fit forward"),
        ((torch.zeros(3), "text"), "input 'mode' is str, expected a tensor"),
        ((torch.zeros(3), [torch.zeros(3)]), "input 'mode' is list, expected a tensor"),
        ((torch.zeros(0, 3),), r"input 'x' is empty: shape \[0, 3\]"),
        ((torch.zeros(3, 3).to_sparse(),), "expected a plain dense tensor"),
        ((torch.zeros(3, device="meta"),), "input 'x' is on meta, expected cpu"),
    ],
)
def test_wrong_examples(examples, message):
    model = module(lambda self, x, mode=None: x + 1)

    with pytest.raises(TraceError, match=message):
        capture(model, examples)


def branch(self, x):
    if x.sum() > 0:
        return x
    return -x


def condition(self, x):
    return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


def autocast(self, x):
    with torch.autocast("cpu", torch.bfloat16):
        return x @ x


def wrong_shape(self, x):
    return x @ self.w


def counter(self, x):
    self.w.add_(1)
    return x + self.w.sum()


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (branch, "control flow or a size depends on the values of a tensor"),
        (condition, "found a cond construct"),
        (autocast, "found an autocast region to torch.bfloat16"),
        (wrong_shape, "the model fails on its example inputs: .*shapes cannot be multiplied"),
        (counter, "forward writes to"),
        (lambda self, x: x.shape, "the model returns no tensor"),
    ],
)
def test_untraceable_models(forward, message, capfd):
    with pytest.raises(TraceError, match=message) as caught:
        capture(module(forward, w=torch.zeros(7, 7)), (torch.randn(4, 4),))

    assert len(str(caught.value)) < 300
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("forward", [branch, wrong_shape])
def test_error_names_the_line_of_the_user(forward):
    with pytest.raises(TraceError) as caught:
        capture(module(forward, w=torch.zeros(7, 7)), (torch.randn(4, 4),))

    note = next(n for n in caught.value.__notes__ if n.startswith("from "))
    assert f"{__file__}:{forward.__code__.co_firstlineno + 1} in {forward.__name__}" in note
    assert caught.value.__cause__ is not None


def test_weights_without_values():
    with torch.device("meta"):
        model = nn.Linear(3, 4)

    with pytest.raises(TraceError, match="weight 'weight' has no values"):
        capture(model, (torch.zeros(2, 3),))


@pytest.mark.parametrize("model", [3, "no/such/folder", len])
def test_not_a_model(model):
    with pytest.raises(CompileError):
        capture(model, (torch.zeros(2),))


class SingleTokenBranch(nn.Module):
    def forward(self, x):
        return x * 2 if x.shape[1] > 1 else x * 100


def test_a_model_that_differs_at_size_one_keeps_sizes_of_two():
    program = capture(SingleTokenBranch(), (torch.randn(2, 5, 3),))

    assert program.info["least_size"] == 2
    assert "the model differs or fails at size 1: symbolic sizes are at least 2" in program.info["notes"]
