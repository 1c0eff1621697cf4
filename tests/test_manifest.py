"""manifest.json: round trip, form errors by field, and folders that must not be loaded."""

from __future__ import annotations

import dataclasses
import json

import pytest

from sylvester.compiler import manifest as manifests
from sylvester.compiler.errors import ArtefactError
from sylvester.compiler.manifest import EntrySpec, Generation, Manifest, SlotSpec, Symbol, TensorSpec
from sylvester.compiler.sizes import evaluate, solve, symbols

ENTRY = EntrySpec(
    symbols=(Symbol("s0", 1, 8), Symbol("s1", 2)),
    inputs=(TensorSpec("x", "float32", ("s0", "2*s1", 3)),),
    weights=("a.weight",),
    states=("k",),
    outputs=(TensorSpec("y", "float32", ("s0", "s1 + 1")),),
)
FULL = Manifest(
    target="cpu",
    entries={"forward": ENTRY},
    isas=("scalar",),
    passes=("canonicalize",),
    state={"k": SlotSpec(0, "float32", ("s0", 4))},
    generation=Generation(16, (2, 3)),
    threads=2,
)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "artefact"
    (folder / "code").mkdir(parents=True)
    (folder / "code" / "scalar.so").write_bytes(b"code" * 100)
    (folder / "weights.safetensors").write_bytes(b"weights")
    FULL.seal(folder)
    return folder


def edit(folder, change):
    path = folder / manifests.NAME
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_round_trip(folder):
    found = manifests.read_verified(folder)

    assert set(found.files) == {"code/scalar.so", "weights.safetensors"}
    assert dataclasses.replace(found, files={}) == FULL


def test_main_entry():
    assert FULL.main == "forward"
    assert Manifest("cpu", {"decode": ENTRY, "prefill": ENTRY}).main == "prefill"


EDITS = {
    "entries.forward.inputs[0].dtype: expected str, found 5": lambda d: d["entries"]["forward"]["inputs"][0].update(
        dtype=5
    ),
    "entries.forward.inputs[0].shape[1]: expected int or str, found None": (
        lambda d: d["entries"]["forward"]["inputs"][0].update(shape=["s0", None])
    ),
    "entries.forward.symbols[0].min: expected int, found True": (
        lambda d: d["entries"]["forward"]["symbols"][0].update(min=True)
    ),
    "entries.forward.weights: missing": lambda d: d["entries"]["forward"].pop("weights"),
    "entries: expected dict, found []": lambda d: d.update(entries=[]),
    "state.k: expected an object, found 3": lambda d: d["state"].update(k=3),
    "generation.max_length: missing": lambda d: d.update(generation={}),
    "colour: unknown field": lambda d: d.update(colour="red"),
    "target: missing": lambda d: d.pop("target"),
}


@pytest.mark.parametrize("message", EDITS)
def test_form_errors_name_the_field(folder, message):
    edit(folder, EDITS[message])

    with pytest.raises(ArtefactError) as error:
        manifests.read(folder)

    assert message in error.value.message
    assert "manifest.json" in error.value.message


@pytest.mark.parametrize(
    ("found", "hint"), [(2, "update sylvester"), (0, "compile the model again"), (None, "compile the model again")]
)
def test_other_format_is_refused_with_a_way_out(folder, found, hint):
    edit(folder, lambda d: d.update(format=found))

    with pytest.raises(ArtefactError, match=f"has format {found}, this version reads format 1") as error:
        manifests.read(folder)

    assert hint in error.value.hint


def truncate(folder):
    (folder / "weights.safetensors").write_bytes(b"weig")


def lengthen(folder):
    (folder / "weights.safetensors").write_bytes(b"weights!")


def flip(folder):
    (folder / "weights.safetensors").write_bytes(b"Weights")


def remove(folder):
    (folder / "code" / "scalar.so").unlink()


def add(folder):
    (folder / "code" / "extra.so").write_bytes(b"")


def escape(folder):
    edit(folder, lambda d: d["files"].update({"../secret": {"sha256": "", "bytes": 1}}))


def truncate_manifest(folder):
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text()[:100])


def replace_manifest(folder):
    (folder / "manifest.json").write_text('{"name": "a web application"}')


def remove_manifest(folder):
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "weights.safetensors in .* is truncated: 4 bytes, expected 7"),
        (lengthen, "weights.safetensors in .* is edited: 8 bytes, expected 7"),
        (flip, "weights.safetensors in .* is edited: its sha256"),
        (remove, "code/scalar.so is missing"),
        (add, "code/extra.so in .* is foreign"),
        (escape, "files.../secret: points outside the folder"),
        (truncate_manifest, "manifest.json is not JSON"),
        (replace_manifest, "manifest.json was not written by sylvester"),
        (remove_manifest, "is not an artefact: it has no manifest.json"),
    ],
)
def test_damaged_or_foreign_folder_is_refused(folder, damage, message):
    damage(folder)

    with pytest.raises(ArtefactError, match=message):
        manifests.read_verified(folder)


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(ArtefactError, match="no folder"):
        manifests.read(tmp_path / "nowhere")


def test_notes_beside_the_code_are_no_reason_to_refuse(folder):
    (folder / "README.md").write_text("my model")

    assert manifests.read_verified(folder).target == "cpu"


@pytest.mark.parametrize(
    ("size", "value"),
    [(7, 7), ("s0", 5), ("2*s0 + 1", 11), ("(s0//2)", 2), ("Max(3, s0 - 9)", 3), ("-s0 + 6", 1), ("Mod(s0, 3)*s1", 4)],
)
def test_sizes_evaluate(size, value):
    assert evaluate(size, {"s0": 5, "s1": 2}) == value


@pytest.mark.parametrize(
    ("size", "found", "value"), [("s0", 4, 4), ("2*s0", 4, 2), ("2*s0", 5, None), ("s0 - 1", 4, 5)]
)
def test_sizes_solve(size, found, value):
    assert solve(size, "s0", found) == value


def test_symbols_leave_out_function_names():
    assert symbols("Max(2, s0*s1)") == {"s0", "s1"}


@pytest.mark.parametrize("size", ["s0 +", "__import__('os')", "s9", "s0 ** 2", "open"])
def test_what_is_no_dimension_is_refused(size):
    with pytest.raises(ArtefactError):
        evaluate(size, {"s0": 1})
