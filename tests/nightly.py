"""Tests that run for every change with some of their parameters, and by night with all."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def by_night(values: Iterable[Any], daily: Collection[Any]) -> list[Any]:
    """Parameters of a test of which only the `daily` ones run for every change."""
    return [value if value in daily else pytest.param(value, marks=pytest.mark.nightly) for value in values]
