"""The names that other people's code relies on. A change here is a change for them."""

from __future__ import annotations

import pytest

import sylvester

PUBLIC = (
    "Budget",
    "CompileError",
    "Compiled",
    "Program",
    "Target",
    "compile",
    "finetune",
    "hadamard",
    "halo",
    "halo_shard",
    "load",
    "lora",
    "passes",
    "trace",
)


def test_public_names_are_these() -> None:
    assert sorted(sylvester.__all__) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_name_resolves_and_is_listed(name: str) -> None:
    assert getattr(sylvester, name) is not None
    assert name in dir(sylvester)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = sylvester.no_such_name
