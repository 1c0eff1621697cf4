"""Samples against the signature of the main entry: names, types, sizes, finite floats, ids within their tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sylvester.compiler.arrays import to_numpy
from sylvester.compiler.binding import bind, complete
from sylvester.compiler.calibration import Sample
from sylvester.compiler.errors import CompileError, InputError
from sylvester.compiler.manifest import EntrySpec, Symbol, TensorSpec
from sylvester.compiler.next_token import table_rows
from sylvester.compiler.program import Program, binding, value
from sylvester.compiler.sizes import symbols
from sylvester.compiler.symbols import size_text, symbols_of

TOKENIZER = "was the data made with another tokenizer?"


@dataclass(frozen=True)
class Signature:
    """Inputs of the main entry by name; `tables` how many ids an input may name, `max_length` 0 is without limit."""

    inputs: Mapping[str, TensorSpec]
    symbols: Mapping[str, Symbol]
    tables: Mapping[str, int]
    max_length: int

    @staticmethod
    def of(program: Program) -> Signature:
        facts = {binding(n).key: value(n) for n in program.main.placeholders("input")}
        inputs = {
            name: TensorSpec(name, str(fact.dtype).removeprefix("torch."), tuple(size_text(n) for n in fact.shape))
            for name, fact in facts.items()
        }
        lowest = int(program.info.get("least_size", 1))
        lone = [symbols(size) for spec in inputs.values() for size in spec.shape if len(symbols(size)) == 1]
        used = frozenset().union(*lone)
        known = {s.name: Symbol(s.name, max(s.least, lowest), s.most) for s in symbols_of(program) if s.name in used}
        tables = {name: rows for name in inputs if (rows := table_rows(program.main, name)) is not None}
        return Signature(inputs, known, tables, int(program.info.get("max_length") or 0))

    def length(self, name: str) -> int:
        """The fixed number of tokens of an input [batch, tokens]; 0 where any is taken."""
        size = self.inputs[name].shape[1]
        return size if isinstance(size, int) else 0

    def least(self, name: str, axis: int) -> int:
        """The smallest size that an axis takes."""
        size = self.inputs[name].shape[axis]
        return size if isinstance(size, int) else self.symbols[size].min if size in self.symbols else 1

    def batch(self) -> int:
        """The fewest rows that a call takes."""
        return max((self.least(name, 0) for name, spec in self.inputs.items() if spec.shape), default=1)

    def check(self, sample: Sample, where: str) -> None:
        """`CompileError` says which sample and input, what was found and what was expected."""
        for name, tensor in sample.items():
            self._check_length(name, tensor, where)
        try:
            spec = EntrySpec(tuple(self.symbols.values()), tuple(self.inputs.values()), (), (), ())
            bind(spec, complete(spec, {name: to_numpy(name, t) for name, t in sample.items()}, None), None, {})
        except InputError as error:
            raise CompileError(f"{where}: {error.message}", hint=error.hint) from error
        for name, tensor in sample.items():
            _check_finite(name, tensor, where)
            self._check_ids(name, tensor, where)

    def _check_length(self, name: str, tensor: Tensor, where: str) -> None:
        whole = tensor.ndim == 2 and not tensor.is_floating_point()
        if whole and self.max_length and tensor.shape[1] > self.max_length:
            raise CompileError(
                f"{where}: input {name!r} has {tensor.shape[1]} tokens, the model takes at most {self.max_length}",
                hint="cut it into shorter samples, or give it as ids [tokens]",
            )

    def _check_ids(self, name: str, tensor: Tensor, where: str) -> None:
        rows = self.tables.get(name)
        if rows is None or not tensor.numel():
            return
        least, most = int(tensor.min()), int(tensor.max())
        if least < 0 or most >= rows:
            found = most if most >= rows else least
            message = f"{where}: input {name!r} holds the id {found}, the model knows 0 to {rows - 1}"
            raise CompileError(message, hint=TOKENIZER)


def _check_finite(name: str, tensor: Tensor, where: str) -> None:
    if not tensor.is_floating_point() or bool(tensor.isfinite().all()):
        return
    kind, bad = ("NaN", tensor.isnan()) if bool(tensor.isnan().any()) else ("infinite", tensor.isinf())
    found = f"{int(bad.sum())} of {tensor.numel()} values are {kind}"
    raise CompileError(f"{where}: input {name!r}: {found}, expected finite numbers", hint="leave the sample out")
