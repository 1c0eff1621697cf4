"""Saving: a loaded program is the same text and computes the same; what is broken or foreign names the file."""

from __future__ import annotations

import json
import math
import operator

import pytest
import torch
from torch import fx

from sylvester.compiler.check import relative_error
from sylvester.compiler.encoding import decode, encode, resolve
from sylvester.compiler.errors import ArtefactError, CompileError, Unsupported
from sylvester.compiler.serialize import EXAMPLES, PROGRAM, WEIGHTS, load, save
from sylvester.compiler.symbols import symbols_of
from sylvester.compiler.trace import capture
from sylvester.compiler.weights import ParameterStore
from sylvester.passes.derive_decode import DeriveDecode
from tests import zoo
from tests.test_derive_decode import gpt


def saved(name, folder):
    case = zoo.case(name)
    program = capture(case.model, case.inputs)
    save(program, folder)
    return case, program


def lines_of(program):
    return [n.meta.get("stack_trace") for _, n in program.nodes()]


@pytest.mark.parametrize("name", ["llama-tied", "bert", "t5", "resnet"])
def test_round_trip(name, tmp_path):
    case, program = saved(name, tmp_path)

    loaded = load(tmp_path)

    assert str(loaded) == str(program)
    assert loaded.info == program.info
    assert loaded.weights.aliases == program.weights.aliases
    assert lines_of(loaded) == lines_of(program)
    for inputs in (program.main.examples, *case.other):
        found, expected = loaded.run("forward", inputs), program.run("forward", inputs)
        assert max(relative_error(expected[k], found[k]) for k in expected) < 1e-6


def test_round_trip_of_state_and_entries(tmp_path):
    program = gpt()
    DeriveDecode().run(program)

    save(program, tmp_path)
    loaded = load(tmp_path)

    assert str(loaded) == str(program)
    assert {k: str(s) for k, s in loaded.state.items()} == {k: str(s) for k, s in program.state.items()}
    assert {k: list(e.examples) for k, e in loaded.entries.items()} == {"prefill": ["ids"], "decode": ["ids", "past"]}
    assert loaded.main.calls()[0].meta["made_by"] == ("derive-decode",)


def test_loaded_program_can_be_saved_again(tmp_path):
    saved("bert", tmp_path / "first")

    save(load(tmp_path / "first"), tmp_path / "second")

    assert (tmp_path / "second" / PROGRAM).read_text() == (tmp_path / "first" / PROGRAM).read_text()


def test_symbols_have_hints_and_ranges():
    program = capture(zoo.case("bert").model, zoo.case("bert").inputs)

    found = sorted((s.hint, s.least, s.most) for s in symbols_of(program))

    assert found == [(2, 1, None), (11, 1, 64)]


ARGUMENTS = [
    1, 1.0, -math.inf, True, None, "tanh", [1, [2.5, None]], torch.bfloat16, torch.strided, torch.contiguous_format,
    torch.device("cpu"),
]  # fmt: skip


@pytest.mark.parametrize("argument", ARGUMENTS, ids=str)
def test_arguments_survive_json(argument):
    node = fx.Graph().placeholder("x")

    found = decode(json.loads(json.dumps(encode(argument, node), allow_nan=False)), {})

    assert found == argument
    assert type(found) is type(argument)


def test_node_references_survive():
    node = fx.Graph().placeholder("x")

    assert decode(encode([node, {"a": node}], node), {"x": node}) == [node, {"a": node}]


@pytest.mark.parametrize("target", [torch.nn.functional.relu, len, torch.add])
def test_foreign_target_is_refused(target, tmp_path):
    _, program = saved("mlp", tmp_path)
    node = program.main.calls()[0]
    node.target = target

    with pytest.raises(Unsupported, match="cannot save a call of"):
        save(program, tmp_path)


def test_info_that_is_no_json_is_refused(tmp_path):
    _, program = saved("mlp", tmp_path)
    program.info["module"] = torch.nn.Linear(2, 2)

    with pytest.raises(CompileError, match="not JSON"):
        save(program, tmp_path)


@pytest.mark.parametrize("name", ["aten.no_such_op.default", "no_such.add.Tensor", "os.system", "aten.add", "add"])
def test_unknown_op(name):
    with pytest.raises(ArtefactError, match=rf"'{name}'"):
        resolve(name)


def test_plain_arithmetic_is_known():
    assert resolve("operator.mul") is operator.mul


@pytest.mark.parametrize("file", [PROGRAM, WEIGHTS, EXAMPLES])
def test_missing_or_truncated_file_is_named(file, tmp_path):
    saved("mlp", tmp_path)
    path = tmp_path / file

    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ArtefactError, match=rf"{file}.* is truncated"):
        load(tmp_path)

    path.unlink()
    with pytest.raises(ArtefactError, match=f"no {file}"):
        load(tmp_path)


def edit(folder, change):
    document = json.loads((folder / PROGRAM).read_text())
    change(document)
    (folder / PROGRAM).write_text(json.dumps(document))


EDITS = [
    lambda d: d.update(format=99),
    lambda d: d.pop("entries"),
    lambda d: d["entries"]["forward"]["nodes"][0].update(target="aten.no_such_op.default"),
    lambda d: d["entries"]["forward"]["nodes"][0].update(args=[{"node": "nobody"}]),
    lambda d: d["entries"]["forward"]["outputs"][0].update(node="nobody"),
    lambda d: d["entries"]["forward"]["placeholders"][0].update(dtype="save"),
    lambda d: d["entries"]["forward"]["placeholders"][0].update(shape=[1]),
    lambda d: d["entries"]["forward"]["placeholders"][0].update(shape=["__import__('os')"]),
]


@pytest.mark.parametrize("change", EDITS)
def test_edited_program_is_refused(change, tmp_path):
    saved("mlp", tmp_path)
    edit(tmp_path, change)

    with pytest.raises(ArtefactError, match=PROGRAM):
        load(tmp_path)


def test_weights_that_overlap_in_memory(tmp_path):
    whole = torch.randn(4, 3)
    ParameterStore({"whole": whole, "rows": whole[:2]}).save(tmp_path / WEIGHTS)

    found = ParameterStore.load(tmp_path / WEIGHTS)
    assert torch.equal(found["whole"], whole)
    assert torch.equal(found["rows"], whole[:2])
