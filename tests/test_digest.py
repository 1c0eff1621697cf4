"""A model's digest: the same in every process, another one when anything that decides its results is changed."""

from __future__ import annotations

import copy
import functools
import importlib
import os
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from sylvester.compiler.digest import Digest, Opaque

FACTOR = 2.0


def scaled(x: torch.Tensor) -> torch.Tensor:
    return x * FACTOR


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.power, self.options, self.act = 1, {"names": ["a", "b"]}, nn.functional.relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return scaled(self.second(self.act(self.first(x)))) ** self.power + self.table


def digest(value: object) -> str:
    made = Digest()
    made.add(value)
    return made.hex()


def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def test_equal_models_have_equal_digests():
    assert digest(model()) == digest(model()) == digest(copy.deepcopy(model()))


def test_the_digest_is_the_same_in_another_process():
    code = "from tests.test_digest import *; print(digest(model()))"
    root = Path(__file__).parent.parent
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]

    assert runs[0] == runs[1]


def _set_weight(m: Model) -> None:
    with torch.no_grad():
        m.first.weight[0, 0] += 1e-3


def _tie(m: Model) -> None:
    m.second.weight = m.first.weight


def _untied_copy(m: Model) -> None:
    m.second.weight = nn.Parameter(m.first.weight.detach().clone())


CHANGES = {
    "weight": _set_weight,
    "buffer": lambda m: m.table.add_(1),
    "attribute": lambda m: setattr(m, "power", 2),
    "type": lambda m: setattr(m, "power", 1.0),
    "nested value": lambda m: m.options["names"].append("c"),
    "function": lambda m: setattr(m, "act", nn.functional.gelu),
    "mode": lambda m: m.train(),
    "dtype": lambda m: m.double(),
    "submodule": lambda m: setattr(m, "second", nn.Identity()),
    "hook": lambda m: m.register_forward_hook(lambda module, args, out: out + 1),
    "tied": _tie,
    "same values, untied": _untied_copy,
    "forward of the instance": lambda m: setattr(m, "forward", types.MethodType(lambda self, x: x, m)),
}


def test_every_change_gives_another_digest():
    found = {"none": digest(model())}
    for name, change in CHANGES.items():
        changed = model()
        change(changed)
        found[name] = digest(changed)

    assert len(set(found.values())) == len(found), found


def test_code_reached_through_globals_counts(monkeypatch):
    before = digest(model())
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 3.0)
    other_value = digest(model())
    monkeypatch.setattr(sys.modules[__name__], "scaled", lambda x: x)
    other_function = digest(model())

    assert len({before, other_value, other_function}) == 3


def test_code_behind_modules_of_modules_counts(tmp_path, monkeypatch):
    (tmp_path / "outer_of_digest").mkdir()
    (tmp_path / "outer_of_digest" / "__init__.py").write_text("from . import inner\n")
    (tmp_path / "outer_of_digest" / "inner.py").write_text(
        "from . import helper\nfrom .helper import scale\ndef run(x): return scale(x)\n"
    )
    (tmp_path / "outer_of_digest" / "helper.py").write_text("from . import inner\ndef scale(x): return x * 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    outer = importlib.import_module("outer_of_digest")
    reader = eval("lambda x: outer.inner.run(x)", {"outer": outer})
    before = digest(reader)
    monkeypatch.setattr(outer.inner.scale, "__code__", (lambda x: x * 3).__code__)

    assert digest(reader) != before


def test_arrays_and_views_of_every_kind_have_digests():
    backwards = np.arange(6)[::-1]
    read_only = np.frombuffer(bytes(8), np.float32)
    turned = torch.ones(3, dtype=torch.complex64).conj()
    foreign = np.ones(3, ">f4")

    assert len({digest(v) for v in (backwards, backwards + 1, read_only, turned, torch.ones(3), foreign)}) == 6
    assert digest(turned.imag) != digest(turned.imag + 1)


def test_patched_library_classes_count(monkeypatch):
    before = digest(model())
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)

    assert digest(model()) != before


def test_patched_library_functions_count(monkeypatch):
    before = digest(model())
    monkeypatch.setattr(nn.functional, "linear", lambda x, w, b=None: x)

    assert digest(model()) != before


def test_reading_the_environment_is_refused():
    with pytest.raises(Opaque, match="reads the environment"):
        digest(lambda x: x if os.environ else 2 * x)


def test_closures_count():
    def made(n: int) -> object:
        return lambda x: x + n

    assert digest(made(1)) == digest(made(1))
    assert digest(made(1)) != digest(made(2))
    assert digest(functools.partial(scaled, 1)) != digest(functools.partial(scaled, 2))


def test_sharing_and_cycles_count():
    shared, cycle = [1], [1]
    cycle.append(cycle)

    assert digest([shared, shared]) != digest([[1], [1]])
    assert digest(cycle) == digest(copy.deepcopy(cycle))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (threading.Lock(), "lock"),
        (iter([1]), "list_iterator"),
        (torch.ones(2, 2).to_sparse(), "layout"),
        (torch.ones(2, device="meta"), "meta"),
        (np.array([object()]), "objects"),
    ],
    ids=["lock", "iterator", "sparse", "meta", "objects"],
)
def test_what_cannot_be_followed_is_refused(value, message):
    changed = model()
    changed.extra = value

    with pytest.raises(Opaque, match=message):
        digest(changed)


def test_imports_inside_functions_are_refused():
    def late(x: object) -> object:
        from tests import zoo

        return zoo, x

    with pytest.raises(Opaque, match=r"an import of 'tests' inside a function"):
        digest(late)
