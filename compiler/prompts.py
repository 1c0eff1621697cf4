"""Prompts as a caller gives them: checked, as int64 ids [batch, length], and in groups of equal length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sylvester.compiler.arrays import is_tensor, to_numpy
from sylvester.compiler.errors import InputError
from sylvester.compiler.manifest import Manifest
from sylvester.compiler.session import generation_of, vocabulary

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]


def batch(prompt: Any) -> Ids:
    """Ids [batch, length] from an array or tensor of integers."""
    array = _integers("the prompt", prompt)
    if array.ndim != 2:
        hint = "ids.reshape(1, -1) is a batch of one prompt" if array.ndim == 1 else ""
        raise InputError(f"the prompt has shape {list(array.shape)}, expected [batch, length]", hint=hint)
    return array


def rows(prompts: Sequence[Any]) -> list[Ids]:
    """Ids [length] of every prompt in a list."""
    import numpy as np

    found = []
    for number, prompt in enumerate(prompts):
        name = f"prompt {number}"
        if isinstance(prompt, Sequence) and not isinstance(prompt, str):
            prompt = _array(name, prompt)
        elif not isinstance(prompt, np.ndarray) and not is_tensor(prompt):
            hint = "give one prompt as [ids], texts and ids in calls of their own"
            kind = type(prompt).__name__
            raise InputError(f"{name} is a {kind}, expected token ids, as the list does not hold texts only", hint=hint)
        array = _integers(name, prompt)
        if array.ndim != 1:
            raise InputError(f"{name} has shape {list(array.shape)}, expected [length]")
        found.append(array)
    return found


def groups(prompts: Sequence[Ids]) -> dict[int, list[int]]:
    """Length -> numbers of the prompts that have it."""
    found: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        found.setdefault(len(prompt), []).append(number)
    return found


def require_fit(manifest: Manifest, prompt: Ids) -> None:
    """`InputError` when the prompt [batch, length] is empty, longer than the caches, or has an unknown id."""
    limit, length = generation_of(manifest).max_length, prompt.shape[1]
    if prompt.size == 0:
        raise InputError(
            "the prompt has no tokens, expected at least one", hint="begin with the token that begins texts"
        )
    if length > limit:
        raise InputError(
            f"the prompt has {length} tokens, above the compiled maximum of {limit}", hint="shorten the prompt"
        )
    known = vocabulary(manifest)
    wrong = (prompt < 0) | (prompt >= known) if known else prompt < 0
    if wrong.any():
        row, column = (int(n) for n in divmod(int(wrong.argmax()), length))
        expected = f"0 to {known - 1}" if known else "0 or more"
        raise InputError(
            f"token id {prompt[row, column]} at position {column} of row {row} of the prompt, expected {expected}",
            hint="encode the text with the tokenizer of this model",
        )


def _array(name: str, prompt: Sequence[Any]) -> Any:
    import numpy as np

    if len(prompt) == 0:
        return np.empty(0, np.int64)
    try:
        return np.array(prompt)
    except ValueError as error:
        raise InputError(f"{name} is a list of lists of different lengths, expected token ids") from error


def _integers(name: str, prompt: Any) -> Ids:
    import numpy as np

    array = to_numpy("input_ids", prompt)
    if array.dtype.kind not in "iu":
        raise InputError(f"{name} has dtype {array.dtype}, expected integers", hint="give token ids")
    return np.asarray(array, np.int64)
