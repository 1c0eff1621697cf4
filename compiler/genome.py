"""What every part of a model becomes: bits of its weights or nothing, own weights or those of an earlier block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from sylvester.compiler.calls import arguments
from sylvester.compiler.dataflow import Segment
from sylvester.compiler.layers import find_layers
from sylvester.compiler.parts import Part
from sylvester.compiler.program import Program, binding, is_weight

aten = torch.ops.aten
LINEAR, EMBEDDING = aten.linear.default, aten.embedding.default
FLOAT, DROPPED = 32, 0
"""Bits of a float weight, and of a part that is not there."""
DROPPABLE = ("attention", "ffn")
HEAD, TABLES = "head", "tables"


@dataclass(frozen=True)
class Site:
    """Weights that get one width: a kind of part of a block, or what lies outside of all blocks (block -1).

    `held`: one of the weights is read elsewhere too, so that they stay when the part goes.
    """

    block: int
    kind: str
    keys: tuple[str, ...]
    held: bool = False

    @property
    def droppable(self) -> bool:
        return self.block >= 0 and self.kind in DROPPABLE and not self.held

    def __str__(self) -> str:
        return self.kind if self.block < 0 else f"{self.kind} {self.block}"


@dataclass(frozen=True)
class Genome:
    """One choice for every site.

    `outer`: bits of the sites outside of blocks. `parts`: per block the bits of its sites, `DROPPED` for none.
    `shares`: per block 0 for weights of its own, or d for those of block i - d, whose bits are then its own.
    `world`: which of the programs that compute the same is meant.
    """

    outer: tuple[int, ...]
    parts: tuple[tuple[int, ...], ...]
    shares: tuple[int, ...]
    world: int = 0

    def normal(self) -> Genome:
        """Blocks that share have the bits of the block they read."""
        parts = list(self.parts)
        for i, d in enumerate(self.shares):
            parts[i] = parts[i - d]
        return Genome(self.outer, tuple(parts), self.shares, self.world)

    def __str__(self) -> str:
        """Identifies it, such as "0|8|8.4 0.8 <1"; the last block reads the weights of the one before."""
        blocks = (f"<{d}" if d else ".".join(map(str, bits)) for bits, d in zip(self.parts, self.shares, strict=True))
        return f"{self.world}|{'.'.join(map(str, self.outer))}|{' '.join(blocks)}"

    @staticmethod
    def parse(text: str) -> Genome:
        """The genome of a text."""
        world, outer, blocks = text.split("|")
        parts: list[tuple[int, ...]] = []
        shares: list[int] = []
        for block in blocks.split():
            shares.append(int(block[1:]) if block.startswith("<") else 0)
            parts.append(parts[-shares[-1]] if shares[-1] else tuple(map(int, block.split("."))))
        return Genome(tuple(int(b) for b in outer.split(".") if b), tuple(parts), tuple(shares), int(world))


@dataclass(frozen=True)
class Block:
    """A layer of the main entry; `place` in its stack."""

    place: int
    parts: tuple[Part, ...]
    segments: tuple[Segment, ...]

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return tuple(node for segment in self.segments for node in segment.nodes)

    @property
    def end(self) -> fx.Node:
        return self.segments[-1].end

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part.kind for part in self.parts))

    @property
    def parameters(self) -> tuple[str, ...]:
        """Weight keys in an order that corresponds between blocks of one form."""
        return tuple(binding(node).key for segment in self.segments for node in segment.parameters)

    @property
    def form(self) -> tuple[str, ...]:
        return tuple(segment.digest for segment in self.segments)


@dataclass(frozen=True)
class Sites:
    """The sites of a program: `outer` and, per block, `inner`."""

    outer: tuple[Site, ...]
    inner: tuple[tuple[Site, ...], ...]
    blocks: tuple[Block, ...]

    def __iter__(self) -> Iterator[Site]:
        yield from self.outer
        for sites in self.inner:
            yield from sites

    def genome(self, bits: int = FLOAT, world: int = 0) -> Genome:
        """Every site with the same bits."""
        inner = tuple((bits,) * len(sites) for sites in self.inner)
        return Genome((bits,) * len(self.outer), inner, (0,) * len(self.inner), world)

    def bits(self, genome: Genome) -> dict[str, int]:
        """Bits by weight key; keys of dropped parts, and of blocks that share, are left out."""
        found = {key: bits for site, bits in zip(self.outer, genome.outer, strict=True) for key in site.keys}
        for sites, parts, shares in zip(self.inner, genome.parts, genome.shares, strict=True):
            if not shares:
                found |= {key: bits for site, bits in zip(sites, parts, strict=True) for key in site.keys if bits}
        return found

    def shareable(self, block: int, distance: int) -> bool:
        """Whether a block may read the linear weights of the one `distance` before: equal layers of one stack."""
        if block < distance or len(self.inner[block]) != len(self.inner[block - distance]):
            return False
        here, there = self.blocks[block], self.blocks[block - distance]
        return here.form == there.form and here.place == there.place + distance


def find_sites(program: Program) -> Sites:
    """Sites of the main entry, by structure; `CompileError` where nothing repeats."""
    blocks = tuple(
        Block(
            layer.place,
            tuple(part for part, _ in layer.main.parts),
            tuple({segment.end: segment for _, segment in layer.main.parts}.values()),
        )
        for layer in find_layers(program)
    )
    place = _places(blocks)
    found: dict[tuple[int, str], dict[str, None]] = {
        (i, kind): {} for i, block in enumerate(blocks) for kind in block.kinds
    }
    owner: dict[str, tuple[int, str]] = {}
    held: set[tuple[int, str]] = set()
    for node in program.main.calls(LINEAR, EMBEDDING):
        key = _key(program, node)
        if key is None:
            continue
        at = place.get(node, (-1, HEAD if _read_by_linear(program, key) else TABLES))
        if owner.setdefault(key, at) == at:
            found.setdefault(at, {})[key] = None
        else:
            held.add(owner[key])
    sites = {at: Site(*at, tuple(keys), at in held) for at, keys in found.items() if keys or at[1] in DROPPABLE}
    inner = tuple(tuple(site for at, site in sites.items() if at[0] == i) for i in range(len(blocks)))
    outer = tuple(site for at, site in sorted(sites.items()) if at[0] < 0)
    return Sites(outer, inner, blocks)


def _places(blocks: tuple[Block, ...]) -> dict[fx.Node, tuple[int, str]]:
    """Nodes of every block -> block and kind of part; those of no part are in one called "rest"."""
    place: dict[fx.Node, tuple[int, str]] = {}
    for i, block in enumerate(blocks):
        place |= dict.fromkeys(block.nodes, (i, "rest"))
        counts = Counter(node for part in block.parts for node in part.nodes)
        for part in block.parts:
            place |= {node: (i, part.kind) for node in part.nodes if counts[node] == 1}
    return place


def _key(program: Program, node: fx.Node) -> str | None:
    """The key of a float matrix that the node reads as its weight."""
    weight = arguments(node)["weight"]
    if not is_weight(weight):
        return None
    key = binding(weight).key
    tensor = program.weights[key]
    return key if tensor.dim() == 2 and tensor.dtype == torch.float32 else None


def _read_by_linear(program: Program, key: str) -> bool:
    return any(user.target is LINEAR for user in program.users(key))
