"""Drafts from what was read before: the longest context that occurred, else what the model last made of the token.

The table of single tokens is filled from the scores of every token read, accepted or not (Luo et al., Token Recycling,
2024); those of longer contexts from the text, as in look-up decoding and ADED (Liu et al., 2024).
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST = 4
"""Tokens of the longest context."""
WIDTH = 3
"""Tokens that are kept after a context, those seen last first."""
MOST = 200_000
"""Contexts that are kept before older ones go."""


Followers = tuple[int, ...]


class NGrams:
    """context -> the tokens that followed it, the last one first."""

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self._young: dict[tuple[int, ...], Followers] = {}
        self._old: dict[tuple[int, ...], Followers] = {}

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
            found = self._find(tuple(tokens[-length:]))
            if found:
                return found[0], length
        return None

    def options(self, tokens: Sequence[int], least: int = 1) -> list[tuple[int, int, int]]:
        """`WIDTH` tokens at most that may follow: (token, length of its context, how many came after it since).

        Those of longer contexts come first.
        """
        made: list[tuple[int, int, int]] = []
        for length in range(min(LONGEST, len(tokens)), least - 1, -1):
            known = {token for token, *_ in made}
            found = enumerate(self._find(tuple(tokens[-length:])))
            made += [(token, length, rank) for rank, token in found if token not in known]
            if len(made) >= WIDTH:
                break
        return made[:WIDTH]

    def _find(self, context: tuple[int, ...]) -> Followers:
        return self._young.get(context) or self._old.get(context, ())

    def _put(self, context: tuple[int, ...], token: int) -> None:
        found = self._find(context)
        if found and found[0] == token:
            self._young.setdefault(context, found)
            return
        if len(self._young) >= self.most:
            self._old, self._young = self._young, {}
        self._young[context] = (token, *[t for t in found if t != token][: WIDTH - 1])
