"""x W^T -> round(x) Q^T: W rounded to short floats or to whole numbers with scales; tied embeddings read the same Q."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from sylvester.compiler.calls import arguments
from sylvester.compiler.changes import Changes
from sylvester.compiler.errors import CompileError
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.program import Entry, Program
from sylvester.compiler.progress import report
from sylvester.compiler.quantized_ops import GROUPS
from sylvester.compiler.weight_places import record, weight_places
from sylvester.passes.quantize_cache import QuantizeCache
from sylvester.passes.quantize_fit import STAGE, Fit, decisive
from sylvester.passes.quantize_plan import FP8, FP16, WIDTHS, Layer, Plan, pairs, parse_choice, width
from sylvester.passes.quantize_round import OPS, SCALINGS, Rounder

PerLayer = Mapping[str, int | str] | tuple[tuple[str, int | str], ...]
ROWS = (None, 16, 8, 4)
SHORT = {
    16: "weights of 16 bits are bfloat16",
    FP16: "weights in fp16 are read by rows in fp16",
    FP8: "weights in fp8 have a scale a row, and so have the rows of x",
}


@dataclass(frozen=True)
class Quantize(Pass):
    """Round the weights of linear layers, and with whole numbers the rows of x as they are read.

    `weights` are bits: 16 (bfloat16), 8, 4 or 3; or "fp16"; or "fp8" (e4m3, a scale per row of weights and of x).
    `activations` are the bits of the rows of x that whole numbers meet: 8, 4, or 16, which None stands for. `kv` rounds
    caches too, as `QuantizeCache(bits)` does.
    `group` columns of whole numbers share a scale: 32, 64 or 128; 0 is a scale per row of int8, 32 for int4 and int3.
    `method` is "rtn" (nearest, nothing cut off), "mse" (scales searched) or "gptq" (fitted to calibration data).
    `static` takes one scale of x per layer from calibration data instead of one per row.
    `embeddings` rounds tables that no linear layer shares. `skip` names weights to leave, by patterns as "lm_head.*".
    `per_layer` gives patterns their own: {"lm_head.*": 8, "*.down_proj.*": "w8a16", "*.1.*": "fp8", "*.0.*": "float"}.
    """

    name: ClassVar[str] = "quantize"
    contract: ClassVar[Contract] = "lossy"
    weights: Literal[16, 8, 4, 3, "fp16", "fp8"] = 8
    activations: Literal[16, 8, 4] | None = 8
    kv: Literal[16, 8, 4] | None = None
    group: int = 0
    method: Literal["rtn", "mse", "gptq"] = "rtn"
    static: bool = False
    embeddings: bool = False
    per_layer: PerLayer = ()
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for option, found, known in (
            ("weights", self.weights, WIDTHS),
            ("activations", self.activations, ROWS),
            ("kv", self.kv, ROWS),
            ("group", self.group, (0, *GROUPS)),
            ("method", self.method, tuple(SCALINGS)),
        ):
            if isinstance(found, (bool, float)) or found not in known:
                raise ValueError(f"{option} is {found!r}, expected one of {known}")
        for option, switch in (("static", self.static), ("embeddings", self.embeddings)):
            if not isinstance(switch, bool):
                raise TypeError(f"{option} is {switch!r}, expected True or False")
        if not isinstance(self.skip, tuple) or not all(isinstance(pattern, str) for pattern in self.skip):
            raise TypeError(f"skip is {self.skip!r}, expected a tuple of patterns")
        object.__setattr__(self, "per_layer", pairs(self.per_layer))
        self._require_sense()

    def _require_sense(self) -> None:
        """Options that contradict each other."""
        widths = [choice for _, choice in self._plan().choices if not isinstance(choice, str)]
        whole = any(choice.whole for choice in (self._plan().default, *widths))
        if not whole and (self.group or self.activations == 4 or self.static):
            raise ValueError(f"{SHORT[self.weights]}: no group, no activations of 4 bits, no static scales")
        if self.weights == FP8 and (self.activations != 8 or self.method != "rtn"):
            raise ValueError(
                f"weights in fp8 are rounded to nearest and read rows of 8 bits: expected activations=8, method='rtn', "
                f"found activations={self.activations}, method={self.method!r}"
            )
        if self.static and self.activations in (None, 16):
            raise ValueError(f"static scales need activations of 8 or 4 bits, found {self.activations}")

    def requires(self, program: Program) -> None:
        if self.kv:
            self._cache.requires(program)
        needed = {"method='gptq'": self.method == "gptq", "static=True": self.static}
        if any(needed.values()) and not (program.calibration and program.calibration.fit):
            what = " and ".join(option for option, given in needed.items() if given)
            raise CompileError(f"{what} needs calibration data", hint="compile(..., calibration=texts)")

    def run(self, program: Program) -> Changes:
        changes = Changes()
        layers = self._plan().layers(program, changes)
        places = weight_places(program) if layers else {}
        rounder = Rounder(program, self.method, decisive(program, layers, self.static) if self.method == "gptq" else ())
        if layers and program.calibration and program.calibration.fit:
            changes.extend(Fit(program, layers, self.static, rounder).run())
        self._round_rest(layers, rounder, changes)
        for layer in layers:
            self._rewrite(program, layer)
            changes.apply(layer.uses.kind, layer.key)
        record(changes, places, ((layer.key, layer.width.name) for layer in layers))
        if rounder.finished.reused:
            changes.note(f"reused {rounder.finished.reused} of {len(layers)} layers of an earlier run")
        if self.kv:
            changes.extend(self._cache.run(program))
        return changes

    def _round_rest(self, layers: list[Layer], rounder: Rounder, changes: Changes) -> None:
        """Without calibration data every layer; with it, those that the main entry does not run."""
        rest = [layer for layer in layers if not layer.stored]
        for number, layer in enumerate(rest):
            report(STAGE, number, len(rest))
            rounder.replace(layer, rounder.tensors(layer))
            if self.method == "gptq":
                changes.note(f"{layer.key} is read outside the main entry only: scales searched instead of gptq")
        if self.activations is None and any(layer.width.activations == 16 for layer in layers if layer.width.whole):
            changes.note("rows of x are integers of 16 bits")
        float8 = [layer.key for layer in layers if layer.width.weights == FP8]
        if float8 and self.method != "rtn":
            changes.note(f"rounded to nearest, not by {self.method}, as they are fp8: {', '.join(float8)}")

    def _rewrite(self, program: Program, layer: Layer) -> None:
        linear, widen = OPS[layer.width.weights]
        for entry, node in layer.uses.linears:
            given = arguments(node)
            operands = [given["input"], *_bound(program, entry, layer.stored), given["bias"]]
            if layer.width.whole:
                operands += [layer.width.activations, *_bound(program, entry, [layer.step] if layer.step else [])]
            entry.replace(node, entry.emit(linear.target, *operands, before=node, made_by=self.name))
        for entry, node in layer.uses.embeddings:
            table = entry.emit(widen.target, *_bound(program, entry, layer.stored), before=node, made_by=self.name)
            node.args = (table, *node.args[1:])

    def _plan(self) -> Plan:
        rows = self.activations or 16
        choices = [(pattern, parse_choice(choice, rows, self.group)) for pattern, choice in pairs(self.per_layer)]
        return Plan(choices, width(self.weights, rows, self.group), self.skip, self.embeddings)

    @property
    def _cache(self) -> QuantizeCache:
        return QuantizeCache(bits=self.kv or 16)


def _bound(program: Program, entry: Entry, keys: list[str]) -> list[fx.Node]:
    """Placeholders of the entry for stored tensors."""
    return [entry.bind("weight", key, program.weights[key]) for key in keys]
