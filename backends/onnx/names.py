"""What inputs and outputs are called: caches as other libraries call them, everything else as in the program."""

from __future__ import annotations

import re

KINDS = {"k": "key", "v": "value"}


def past_name(slot: str) -> str:
    """The input that holds a state slot: `k3` is past_key_values.3.key."""
    return f"past_key_values.{_cache(slot)}" if _cache(slot) else f"past.{slot}"


def present_name(slot: str) -> str:
    """The output with the next value of a state slot: `v3` is present.3.value."""
    return f"present.{_cache(slot) or slot}"


def _cache(slot: str) -> str:
    found = re.fullmatch(r"([kv])(\d+)", slot)
    return f"{found[2]}.{KINDS[found[1]]}" if found else ""
