"""Drafts from what was read before: the longest context that occurred, else what the model last made of the token.

The table of single tokens is filled from the scores of every token read, accepted or not (Luo et al., Token Recycling,
2024); those of longer contexts from the text, as in look-up decoding and ADED (Liu et al., 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 4
"""Tokens of the longest context."""
MOST = 200_000
"""Contexts that are kept before older ones go."""


class NGrams:
    """context -> the token that followed it last."""

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self._young: dict[tuple[int, ...], int] = {}
        self._old: dict[tuple[int, ...], int] = {}

    def read(self, tokens: Sequence[int], start: int = 1) -> None:
        """Learn what follows what, for the tokens from `start` on."""
        for at in range(max(start, 2), len(tokens)):
            for length in range(2, min(LONGEST, at) + 1):
                self._put(tuple(tokens[at - length : at]), tokens[at])

    def guess(self, token: int, following: int) -> None:
        """The model expects `following` after the token, whatever came before."""
        self._put((token,), following)

    def next(self, tokens: Sequence[int], least: int = 1) -> tuple[int, int] | None:
        """What may follow, and the length of the context that says so, which is `least` or more."""
        for length in range(min(LONGEST, len(tokens)), least - 1, -1):
            context = tuple(tokens[-length:])
            found = self._young.get(context)
            if found is None:
                found = self._old.get(context)
            if found is not None:
                return found, length
        return None

    def _put(self, context: tuple[int, ...], token: int) -> None:
        if len(self._young) >= self.most:
            self._old, self._young = self._young, {}
        self._young[context] = token
