"""Arena slots: values that live at the same time never share one, values that do not are packed together."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from sylvester.codegen.index import Size, atom, index
from sylvester.codegen.lazy import Buffer
from sylvester.codegen.memory import Slot, assign

TOKENS = Size("s0")
HINTS = {TOKENS: 32}
Spans = dict[str, tuple[int, int]]

spans = st.dictionaries(
    st.integers(0, 30).map("b{}".format),
    st.tuples(st.integers(0, 12), st.integers(0, 6)).map(lambda t: (t[0], t[0] + t[1])),
    max_size=16,
)


def buffer(name: str, width: int) -> Buffer:
    return Buffer(name, (atom(TOKENS), index(width)), "f32", "arena")


def slots(lifetimes: Spans, widths: dict[str, int]) -> list[Slot]:
    return assign(lifetimes, {name: buffer(name, widths.get(name, 8)) for name in lifetimes}, HINTS)


@given(spans, st.dictionaries(st.integers(0, 30).map("b{}".format), st.integers(1, 500)))
def test_overlapping_lifetimes_never_share_a_slot(lifetimes: Spans, widths: dict[str, int]) -> None:
    found = slots(lifetimes, widths)

    assert sorted(name for slot in found for name in slot.buffers) == sorted(lifetimes)
    for slot in found:
        ordered = sorted(lifetimes[name] for name in slot.buffers)
        assert all(last < first for (_, last), (first, _) in pairwise(ordered))


@given(spans, st.dictionaries(st.integers(0, 30).map("b{}".format), st.integers(1, 500)))
def test_a_slot_holds_its_largest_buffer(lifetimes: Spans, widths: dict[str, int]) -> None:
    for slot in slots(lifetimes, widths):
        needs = {buffer(name, widths.get(name, 8)).nbytes for name in slot.buffers}
        assert needs == set(slot.sizes)


@given(st.integers(1, 12))
def test_a_chain_needs_two_slots(length: int) -> None:
    """Each value is read by the next kernel only, so that values alternate."""
    found = slots({f"b{n}": (n, n + 1) for n in range(length)}, {})

    assert len(found) == min(length, 2)


def test_a_large_buffer_does_not_grow_a_small_slot() -> None:
    found = slots({"b0": (0, 1), "b1": (2, 3)}, {"b0": 1, "b1": 400})

    assert [slot.buffers for slot in found] == [["b0"], ["b1"]]
