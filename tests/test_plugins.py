"""Passes and targets of other packages: the example package as installed, and packages that break what they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import sylvester as sv
from sylvester.compiler import registry
from sylvester.compiler.changes import Changes
from sylvester.compiler.errors import CompileError, ContractBroken
from sylvester.compiler.pipeline import Contract, Pass, Pipeline

EXAMPLE = Path(__file__).parent.parent / "examples/plugin"
SCRIPT = """
import json, sys, torch, sylvester as sv
class Scaled(torch.nn.Module):
    def forward(self, x):
        return torch.relu(x * 3.0 * 0.5)
x = torch.randn(2, 3)
compiled = sv.compile(Scaled(), (x,), passes="merge-scales", target="dot")
compiled.save(sys.argv[1])
print(json.dumps([compiled.ledger, bool(torch.allclose(compiled(x), Scaled()(x)))]))
"""


def test_the_example_package_is_installed_and_used(tmp_path):
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    source = tmp_path / "source"
    source.mkdir()
    (source / "sylvester_example").mkdir()
    for path in (EXAMPLE / "pyproject.toml", *(EXAMPLE / "sylvester_example").glob("*.py")):
        (source / path.relative_to(EXAMPLE)).write_bytes(path.read_bytes())
    subprocess.run([sys.executable, *install, "--target", str(tmp_path / "site"), str(source)], check=True)
    script = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n{SCRIPT}"
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    ledger, same = json.loads(ran.stdout)

    assert same
    assert "TwoScales" in ledger
    assert "mul" in (tmp_path / "out/forward.dot").read_text()


@dataclass(frozen=True)
class Honest(Pass):
    name: ClassVar[str] = "honest"
    contract: ClassVar[Contract] = "exact"

    def run(self, program):
        return Changes()


class Doubles(Honest):
    """Says that it is exact."""

    def run(self, program):
        node = next(n for n in program.main.calls() if n.target is torch.ops.aten.relu.default)
        (x,) = node.args
        program.main.replace(node, program.main.emit(torch.ops.aten.add.Tensor, x, x, before=node))
        return Changes()


class Silent(Honest):
    def run(self, program):
        return None


class Unsure(Honest):
    contract = "nearly"


class NoBuild:
    name = "nobuild"


def no_pass():
    return None


def registered(monkeypatch, kind, name, place):
    point = metadata.EntryPoint(name, place, f"sylvester.{kind}")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == point.group else [])


@pytest.mark.parametrize(
    ("kind", "name", "place", "message"),
    [
        ("passes", "honest", "no_such_module:Pass", "cannot be imported from 'no_such_module:Pass': ModuleNotFound"),
        ("passes", "honest", f"{__name__}:no_pass", "expected a subclass"),
        ("passes", "other", f"{__name__}:Honest", "calls itself 'honest'"),
        ("passes", "honest", f"{__name__}:Unsure", "has the contract 'nearly'"),
        ("targets", "nobuild", f"{__name__}:NoBuild", "has no method build"),
        ("loaders", "nobuild", "json:__name__", "expected a function load"),
    ],
)
def test_what_another_package_registers_must_be_what_it_is_for(monkeypatch, kind, name, place, message):
    registered(monkeypatch, kind, name, place)
    with pytest.raises(CompileError, match=message) as failed:
        registry.lookup(kind, name)

    assert "of another package" in failed.value.message
    assert failed.value.hint


def test_a_pass_that_breaks_its_contract_is_named():
    program = sv.trace(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()).eval(), (torch.randn(2, 3),))
    with pytest.raises(ContractBroken) as broken:
        Pipeline((Doubles(),))(program)
    with pytest.raises(CompileError, match="the pass 'honest' returned None, expected Changes"):
        Pipeline((Silent(),))(program)

    assert any("honest" in note for note in broken.value.__notes__)
