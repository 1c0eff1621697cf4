"""genome -> passes: rotate, share, drop, round, in this order, so that what is rounded is what is left.

A rotation folds the norms of each layer into weights of its own; layers share weights after that.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sylvester.compiler.genome import DROPPED, FLOAT, Genome, Sites, find_sites
from sylvester.compiler.pipeline import Pass, Pipeline
from sylvester.compiler.program import Program
from sylvester.passes.drop_sublayers import DropSublayers
from sylvester.passes.quantize import Quantize
from sylvester.passes.quantize_attention import QuantizeAttention
from sylvester.passes.quantize_cache import QuantizeCache
from sylvester.passes.search_weights import FITTED, Method, RoundedWeights
from sylvester.passes.share_blocks import ShareBlocks

SHORT: tuple[Pass, ...] = (QuantizeCache(), QuantizeAttention())
"""Caches and attention in bfloat16: their error is far below that of any rounded weight."""


@dataclass(frozen=True)
class World:
    """A program that computes what the original does, after `passes`, with the sites that genomes choose for."""

    name: str
    passes: tuple[Pass, ...]
    program: Program

    @staticmethod
    def of(program: Program, name: str, passes: Sequence[Pass]) -> World:
        return World(name, tuple(passes), Pipeline(tuple(passes), check=False)(program) if passes else program)

    @cached_property
    def sites(self) -> Sites:
        return find_sites(self.program)

    @cached_property
    def weights(self) -> RoundedWeights:
        return RoundedWeights(self.program, self.sites, "gptq" if self.program.calibration else "mse")

    def realise(self, genome: Genome, method: Method | None = None) -> tuple[Pass, ...]:
        """The passes that make the original program what the genome says."""
        return (*self.passes, *_shared(genome), *self._dropped(genome), *self._rounded(genome, method), *SHORT)

    def _dropped(self, genome: Genome) -> tuple[Pass, ...]:
        gone: dict[str, list[int]] = {"attention": [], "ffn": []}
        for i, (sites, bits) in enumerate(zip(self.sites.inner, genome.parts, strict=True)):
            for site, b in zip(sites, bits, strict=True):
                if b == DROPPED:
                    gone[site.kind].append(i)
        return (DropSublayers(tuple(gone["attention"]), tuple(gone["ffn"])),) if any(gone.values()) else ()

    def _rounded(self, genome: Genome, method: Method | None) -> tuple[Pass, ...]:
        """The most frequent bits are those of all weights, the others by key."""
        bits = self.sites.bits(genome)
        whole = Counter(b for b in bits.values() if b != FLOAT)
        if not whole:
            return ()
        usual = whole.most_common(1)[0][0]
        others: dict[str, Any] = {key: "float" if b == FLOAT else b for key, b in bits.items() if b != usual}
        step = Quantize(weights=usual, embeddings=True, per_layer=others)  # type: ignore[arg-type]
        usual_method: Method = self.weights.method if min(whole) <= FITTED else "rtn"
        return (dataclasses.replace(step, method=method or usual_method),)


def _shared(genome: Genome) -> tuple[Pass, ...]:
    groups: list[list[int]] = []
    for i, distance in enumerate(genome.shares):
        if distance == 1:
            groups.append([i - 1, i])
        elif distance:
            groups[-1].append(i)
    return (ShareBlocks(groups=tuple(map(tuple, groups))),) if groups else ()
