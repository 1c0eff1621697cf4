"""The matrix of models, passes and targets, from the results of the tests.

    make test ARGS=--junitxml=out/tests.xml
    python -m benchmarks.support out/tests.xml [more.xml ...] --page docs/support.md

A test that is parametrised by a model of the zoo and stands in COLUMNS gives a cell: what it compares is what "yes"
means. Results of several runs are joined.
"""

from __future__ import annotations

import argparse
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests import zoo

COLUMNS = {
    "traced, any size": ("test_zoo::test_exported_model_serves_other_sizes", ""),
    "raised": ("test_raise_zoo::test_everything_is_raised", ""),
    "reference, cpu": ("test_zoo_cpu::test_reference_and_cpu_agree_with_float64", ""),
    "cpu, decoding": ("test_zoo_cpu::test_cached_decoding_repeats_the_full_forward", ""),
    "onnx": ("test_zoo_cpu::test_onnxruntime_agrees_with_float64", "standard"),
    "onnx, ops=ort": ("test_zoo_cpu::test_onnxruntime_agrees_with_float64", "ort"),
    "torch.compile": ("test_dynamo::test_models_give_the_same", ""),
    "rotate-hadamard": ("test_rotate_zoo::test_every_rotation_keeps_the_outputs", ""),
    "equalize": ("test_equalize::test_it_is_exact_on_the_zoo_with_caches", ""),
    "skip-layers": ("test_skip_layers::test_decoding_equals_a_model_of_the_kept_layers", ""),
    "skip-ffn": ("test_skip_ffn::test_a_threshold_above_one_changes_no_bit", ""),
    "share-blocks": ("test_share_blocks::test_sharing_is_copying_in_every_entry", ""),
    "share-attention": ("test_sharing_zoo::test_it_is_exact_in_full", ""),
    "sparsify-activations": ("test_sparsify_activations::test_structure_not_names", ""),
}
HEAD = """# What is tested where

Made by `python -m benchmarks.support` from the results of the tests. "yes": the model gave what PyTorch gives in
float64, or a pass kept what it has to keep; "no": that test failed; empty: no test does this with this model. The
models are small, with random weights.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="files of pytest --junitxml")
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    found: dict[tuple[str, str], bool] = {}
    for path in options.results:
        for key, passed in results(path):
            found[key] = found.get(key, True) and passed
    text = page(found)
    if options.page:
        options.page.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


def results(path: Path) -> Iterator[tuple[tuple[str, str], bool]]:
    """((model, column), passed) of every test that counts; skipped ones do not."""
    for case in ET.parse(path).getroot().iter("testcase"):
        name, _, inside = case.get("name", "").rstrip("]").partition("[")
        test = f"{case.get('classname', '').rpartition('.')[2]}::{name}"
        model = max((m for m in zoo.NAMES if inside == m or inside.startswith(f"{m}-")), key=len, default="")
        if model and case.find("skipped") is None:
            passed = case.find("failure") is None and case.find("error") is None
            yield from (((model, column), passed) for column in _columns(test, inside.removeprefix(model)))


def _columns(test: str, rest: str) -> Iterator[str]:
    return (column for column, (name, kind) in COLUMNS.items() if name == test and (not kind or rest == f"-{kind}"))


def page(found: dict[tuple[str, str], bool]) -> str:
    columns = [column for column in COLUMNS if any(c == column for _, c in found)]
    lines = [_line("model", columns), _line("---", ["---"] * len(columns))]
    lines += [_line(name, [_cell(found.get((name, column))) for column in columns]) for name in zoo.NAMES]
    return "\n".join([HEAD, *lines]) + "\n"


def _cell(passed: bool | None) -> str:
    return "" if passed is None else "yes" if passed else "no"


def _line(first: str, cells: Sequence[str]) -> str:
    return f"| {first} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
