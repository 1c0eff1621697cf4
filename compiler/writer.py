"""Prompts of every form, continued: ids of one or more rows, a text, a list of prompts of different lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sylvester.compiler import prompts, text
from sylvester.compiler.arrays import is_tensor, to_tensor
from sylvester.compiler.drafts import Drafters
from sylvester.compiler.errors import InputError
from sylvester.compiler.generation import Options, budget, steps
from sylvester.compiler.prefix import Sharing
from sylvester.compiler.runner import Runner
from sylvester.compiler.session_pool import SessionPool

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Writer:
    """What `Compiled.generate` does; `tokenizer` is called when there is text."""

    runner: Runner
    pool: SessionPool
    tokenizer: Callable[[], Tokenizer]
    drafters: Drafters
    sharing: Sharing

    def stream(self, prompt: Any, options: Options) -> Iterator[Any]:
        """Pieces of text, new ids of a single row, or arrays [batch] of new ids."""
        if isinstance(prompt, str):
            return self._pieces(prompt, options)
        if isinstance(prompt, list | tuple):
            raise InputError(
                "streaming takes a text or ids [batch, length], found a list", hint="stream the prompts one by one"
            )
        ids = prompts.batch(prompt)
        new = self._steps(ids, options)
        return (int(chosen[0]) for chosen in new) if len(ids) == 1 else new

    def whole(self, prompt: Any, options: Options) -> Any:
        """The new text, or ids with the new ones appended, in the form of the prompt."""
        import numpy as np

        if isinstance(prompt, str):
            return "".join(self._pieces(prompt, options))
        if isinstance(prompt, list | tuple):
            return self._several(prompt, options)
        ids = prompts.batch(prompt)
        result = np.concatenate([ids, *(chosen[:, None] for chosen in self._steps(ids, options))], axis=1)
        return to_tensor(result, "int64") if is_tensor(prompt) else result

    def _several(self, given: Sequence[Any], options: Options) -> list[Any]:
        if not given:
            raise InputError("the list of prompts is empty, expected at least one")
        if all(isinstance(prompt, str) for prompt in given):
            return self._texts(given, options)
        rows = prompts.rows(given)
        new = self._rows(rows, options)
        return [_like(prompt, row, ids) for prompt, row, ids in zip(given, rows, new, strict=True)]

    def _texts(self, given: Sequence[str], options: Options) -> list[str]:
        if options.stop_texts:
            return ["".join(self._pieces(prompt, options, row)) for row, prompt in enumerate(given)]
        new = self._rows([self._encoded(prompt)[0] for prompt in given], options)
        return ["".join(self._decoded(ids, options)) for ids in new]

    def _rows(self, rows: Sequence[Ids], options: Options) -> list[list[int]]:
        """The new ids of every row, up to the one that ends it; rows of equal length run together."""
        import numpy as np

        found: list[list[int]] = [[] for _ in rows]
        stop = options.stop_ids(self.runner.manifest)
        for row in rows:
            budget(self.runner.manifest, row[None], options.max_new_tokens)
        for numbers in prompts.groups(rows).values():
            for chosen in self._steps(np.stack([rows[n] for n in numbers]), options, numbers):
                for n, token in zip(numbers, chosen.tolist(), strict=True):
                    if not (found[n] and found[n][-1] in stop):
                        found[n].append(token)
        return found

    def _steps(self, ids: Ids, options: Options, rows: Sequence[int] = ()) -> Iterator[Ids]:
        if options.stop_texts:
            raise InputError(
                f"stop has the text {options.stop_texts[0]!r}, but the prompt is token ids", hint="stop=(id, ...)"
            )
        return steps(self.runner, ids, options, self.pool, rows, self.drafters, self.sharing)

    def _pieces(self, prompt: str, options: Options, row: int = 0) -> Iterator[str]:
        new = steps(self.runner, self._encoded(prompt), options, self.pool, (row,), self.drafters)
        return self._decoded((int(chosen[0]) for chosen in new), options)

    def _decoded(self, ids: Any, options: Options) -> Iterator[str]:
        stop = options.stop_ids(self.runner.manifest)
        pieces = text.pieces(self.tokenizer(), (token for token in ids if token not in stop))
        return text.until(pieces, options.stop_texts) if options.stop_texts else pieces

    def _encoded(self, prompt: str) -> Ids:
        import numpy as np

        return np.array([self.tokenizer().encode(prompt).ids], np.int64)


def _like(prompt: Any, row: Ids, new: Sequence[int]) -> Any:
    """The row with its new ids: a list, an array or a tensor as the prompt is."""
    import numpy as np

    if isinstance(prompt, Sequence):
        return [*row.tolist(), *new]
    result = np.concatenate([row, np.array(new, np.int64)])
    return to_tensor(result, "int64") if is_tensor(prompt) else result
