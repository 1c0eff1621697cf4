"""Check the arrays of a call against an entry's signature and read the symbols off their shapes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sylvester.compiler.device_arrays import INTERFACE
from sylvester.compiler.errors import InputError
from sylvester.compiler.manifest import EntrySpec, SlotSpec, Symbol, TensorSpec
from sylvester.compiler.runner import PADDING, SHARED, State
from sylvester.compiler.sizes import evaluate, solve, symbols

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DTYPES = {"bfloat16": "uint16"}
"""Storage type of the dtypes numpy has no name for."""


def is_position(spec: TensorSpec, entry: EntrySpec) -> bool:
    """Whether an input is a number that the state knows: of positions in it, of those that rows share, of padding."""
    return bool(entry.states) and not spec.shape and spec.dtype.startswith("int")


def asked(entry: EntrySpec) -> tuple[TensorSpec, ...]:
    """The inputs a caller gives: all but the position."""
    return tuple(spec for spec in entry.inputs if not is_position(spec, entry))


def complete(
    entry: EntrySpec, inputs: Mapping[str, NDArray[np.generic]], state: State | None
) -> list[NDArray[np.generic]]:
    """The arrays in the entry's order, the position filled in; names and dtypes are checked."""
    import numpy as np

    _check_names([s.name for s in asked(entry)], list(inputs))
    if entry.states and state is None:
        raise InputError("this entry works on a state, found none", hint="make one with `new_state`")
    arrays = []
    for spec in entry.inputs:
        if is_position(spec, entry):
            arrays.append(np.array(0 if state is None else _number(spec.name, state), dtype=spec.dtype))
        else:
            arrays.append(_checked(spec, inputs[spec.name]))
    return arrays


def _number(name: str, state: State) -> int:
    return {SHARED: state.shared, PADDING: state.padding}.get(name, state.position)


def _check_names(expected: Sequence[str], found: Sequence[str]) -> None:
    for name in found:
        if name not in expected:
            close = difflib.get_close_matches(name, expected, 1)
            hint = f"did you mean {close[0]!r}?" if close else ""
            raise InputError(f"unexpected input {name!r}, expected {list(expected)}", hint=hint)
    if missing := [name for name in expected if name not in found]:
        raise InputError(f"missing input {missing[0]!r}, expected {list(expected)}")


def _checked(spec: TensorSpec, array: Any) -> NDArray[np.generic]:
    import numpy as np

    if not isinstance(array, np.ndarray) and not hasattr(array, INTERFACE):
        raise InputError(
            f"input {spec.name!r} is a {type(array).__name__}, expected a tensor or a numpy array of {spec.dtype}"
        )
    wanted = DTYPES.get(spec.dtype, spec.dtype)
    if array.dtype != wanted:
        hint = f"convert it with `.astype({spec.dtype!r})`, a tensor with `.to(torch.{spec.dtype})`"
        raise InputError(f"input {spec.name!r} has dtype {array.dtype}, expected {spec.dtype}", hint=hint)
    if array.ndim != len(spec.shape):
        raise InputError(
            f"input {spec.name!r} has shape {list(array.shape)}, expected {shape_text(spec)}",
            hint=f"it has {array.ndim} dimensions, give {len(spec.shape)}; the first is usually the batch",
        )
    fitting: NDArray[np.generic] = array
    return fitting


def shape_text(spec: TensorSpec) -> str:
    return f"[{', '.join(str(n) for n in spec.shape)}]"


def bind(
    entry: EntrySpec, arrays: Sequence[NDArray[np.generic]], state: State | None, slots: Mapping[str, SlotSpec]
) -> dict[str, int]:
    """Symbol values, in the entry's order, after every dimension and range is checked."""
    given = list(zip(entry.inputs, arrays, strict=True))
    if state is not None:
        given += [(_slot(name, slots), state.arrays[name]) for name in entry.states]
    values: dict[str, int] = {}
    for spec, array in given:
        for axis, size in enumerate(spec.shape):
            if isinstance(size, str):
                _solve(spec, axis, array.shape, values)
    for spec, array in given:
        _check_shape(spec, array.shape, values)
    for symbol in entry.symbols:
        _check_range(symbol, values, given)
    return {symbol.name: values[symbol.name] for symbol in entry.symbols}


def _slot(name: str, slots: Mapping[str, SlotSpec]) -> TensorSpec:
    return TensorSpec(name, slots[name].dtype, slots[name].shape)


def _solve(spec: TensorSpec, axis: int, shape: tuple[int, ...], values: dict[str, int]) -> None:
    size = str(spec.shape[axis])
    names = symbols(size)
    if len(names) != 1 or (name := next(iter(names))) in values:
        return
    value = solve(size, name, shape[axis])
    if value is None:
        raise InputError(
            f"input {spec.name!r} has {shape[axis]} in dimension {axis}, expected a size of the form {size}"
        )
    values[name] = value


def _check_shape(spec: TensorSpec, shape: tuple[int, ...], values: Mapping[str, int]) -> None:
    expected = tuple(evaluate(size, values) for size in spec.shape)
    if shape != expected:
        symbolic = any(isinstance(n, str) for n in spec.shape)
        form = f" ({shape_text(spec)})" if symbolic else ""
        raise InputError(
            f"{spec.name!r} has shape {list(shape)}, expected {list(expected)}{form}",
            hint="numbers are fixed, equal names are equal sizes; to change them, compile with other examples",
        )


def _check_range(
    symbol: Symbol, values: Mapping[str, int], given: Sequence[tuple[TensorSpec, NDArray[np.generic]]]
) -> None:
    value = values[symbol.name]
    if symbol.min <= value and (symbol.max is None or value <= symbol.max):
        return
    places = [
        f"{s.name!r} has {value} in dimension {s.shape.index(symbol.name)}" for s, _ in given if symbol.name in s.shape
    ]
    place = places[0] if places else f"size {symbol.name} is {value}"
    if value < symbol.min:
        raise InputError(f"{place}, below the compiled minimum of {symbol.min}", hint="give more, or pad the input")
    raise InputError(
        f"{place}, above the compiled maximum of {symbol.max}", hint="compile with a larger maximum length"
    )


def state_shapes(
    entry: EntrySpec, slots: Mapping[str, SlotSpec], values: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    return {name: tuple(evaluate(n, values) for n in slots[name].shape) for name in entry.states}
