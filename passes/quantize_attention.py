"""attention(q, k, v) -> attention_bf16(q, k, v) or attention_int8(q, k, v): low-bit products, sums in float32."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from sylvester.compiler import ops
from sylvester.compiler.calibration import Sample, spread
from sylvester.compiler.changes import Changes, Refusal, place
from sylvester.compiler.errors import CompileError, module_path
from sylvester.compiler.observe import watch
from sylvester.compiler.pipeline import Contract, Pass
from sylvester.compiler.program import Entry, Program, value
from sylvester.compiler.progress import report
from sylvester.compiler.quantized_ops import attention_bf16, attention_int8
from sylvester.passes.options import require_choice, require_fraction

PRODUCTS = {"int8": attention_int8, "bf16": attention_bf16}
"""From the fastest to the closest; float32 comes after them."""
SAMPLES, STAGE = 4, "try int8 attention"
Site = tuple[str, int]
"""Path of the module of an attention, and which of those in it this one is: the same in every entry."""


@dataclass(frozen=True)
class QuantizeAttention(Pass):
    """Products of bfloat16 or int8 where the CPU has them, for many queries; elsewhere kernels stay in float32.

    With int8 `products` (keys and values smoothed, as in SageAttention2) each layer is tried on calibration data, else
    on the example inputs: where the cosine of its result to that of float32 is below `cosine` it gets bfloat16, or
    stays in float32 if that is too low as well. Goes after `derive-decode`, which looks for plain attention.
    """

    name: ClassVar[str] = "quantize-attention"
    contract: ClassVar[Contract] = "lossy"
    products: Literal["bf16", "int8"] = "bf16"
    cosine: float = 0.999

    def __post_init__(self) -> None:
        require_choice("products", self.products, ("bf16", "int8"))
        require_fraction("cosine", self.cosine)

    def requires(self, program: Program) -> None:
        if self.products == "int8" and not _samples(program):
            hint = "compile(..., calibration=texts), or give products='bf16'"
            raise CompileError("int8 attention is tried on data, found no calibration data and no examples", hint=hint)

    def run(self, program: Program) -> Changes:
        changes = Changes()
        chosen = self._chosen(program, changes) if self.products == "int8" else {}
        for entry in program.entries.values():
            for site, node in _sites(entry):
                kind = chosen.get(site, "bf16")
                if (refusal := _refusal(node, kind)) is not None:
                    changes.refuse("attention", refusal)
                    continue
                new = entry.emit(PRODUCTS[kind].target, *node.args, before=node, made_by=self.name, **node.kwargs)
                changes.apply("attention" if self.products == "bf16" else f"{kind} attention", node)
                entry.replace(node, new)
        return changes

    def _chosen(self, program: Program, changes: Changes) -> dict[Site, str]:
        """The products of every attention of the main entry: the fastest that are close enough."""
        chosen = {}
        if not (program.calibration and program.calibration.fit):
            changes.note("no calibration data: int8 attention is tried on the example inputs")
        for (site, node), found in zip(_sites(program.main), _cosines(program), strict=True):
            chosen[site] = next((kind for kind in PRODUCTS if found.get(kind, 0.0) >= self.cosine), "float32")
            for kind, cosine in found.items():
                changes.figure(place(node), f"1 - cosine of {kind} attention", 1 - cosine)
            if found and chosen[site] != "int8":
                cosines = " and ".join(f"{cosine:.6f} in {kind}" for kind, cosine in found.items())
                changes.note(f"{place(node)}: {chosen[site]}, as its cosine to float32 is {cosines}")
        return chosen


def _sites(entry: Entry) -> Iterator[tuple[Site, fx.Node]]:
    seen = Counter[str]()
    for node in entry.calls(ops.attention.target):
        path = module_path(node)
        yield (path, seen[path]), node
        seen[path] += 1


def _refusal(node: fx.Node, kind: str) -> Refusal | None:
    if (found := value(node).dtype) != torch.float32:
        return Refusal(f"it computes in {found}, expected torch.float32", node)
    if kind not in PRODUCTS:
        return Refusal("neither int8 nor bf16 products are close enough, see the notes", node)
    return None


def _samples(program: Program) -> Sequence[Sample]:
    """Some of the calibration data, else the example inputs."""
    if program.calibration and (data := program.calibration.fit):
        return spread(data, min(SAMPLES, len(data)))
    return (program.main.examples,) if program.main.examples else ()


def _cosines(program: Program) -> list[dict[str, float]]:
    """For every attention of the main entry, by products, the least cosine of the result of a sample to float32."""
    nodes = program.main.calls(ops.attention.target)
    found: dict[fx.Node, dict[str, float]] = {node: {} for node in nodes}

    def see(node: fx.Node, given: Sequence[Any], exact: Tensor) -> None:
        for kind, op in PRODUCTS.items():
            near = torch.cosine_similarity(op(*given).double().flatten(), exact.double().flatten(), dim=0)
            found[node][kind] = min(found[node].get(kind, 1.0), near.item())

    samples = _samples(program)
    wanted = [node for node in nodes if value(node).dtype == torch.float32]
    for n, sample in enumerate(samples):
        report(STAGE, n, len(samples))
        watch(program, sample, wanted, see)
    return list(found.values())
