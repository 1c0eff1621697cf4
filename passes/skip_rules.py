"""Which layers are kept: by position alone (Unified Layer Skipping, Liu et al., 2024, or evenly) or by similarity."""

from __future__ import annotations

from collections.abc import Sequence


def kept_count(layers: int, speedup: float) -> int:
    """floor(layers / speedup), with room for rounding."""
    return int(layers / speedup + 1e-9)


def kept_paper(layers: int, speedup: float) -> list[int]:
    """Unified Layer Skipping: the first and the last, and every g-th from the front until floor(layers / speedup)."""
    wanted = kept_count(layers, speedup)
    gap = layers // (wanted - 1)
    inner = [n for n in range(1, layers - 1) if n % gap == 0][: wanted - 2]
    return sorted({0, *inner, layers - 1})


def kept_uniform(layers: int, speedup: float) -> list[int]:
    """As many, from the first to the last at equal distances up to rounding."""
    wanted = kept_count(layers, speedup)
    return [(2 * n * (layers - 1) + wanted - 1) // (2 * (wanted - 1)) for n in range(wanted)]


def kept_similar(similarity: Sequence[float], speedup: float) -> list[int]:
    """As many: the first, the last, and those that turn the stream most; `similarity` is the cosine across a layer."""
    layers = len(similarity)
    inner = sorted(range(1, layers - 1), key=lambda n: (similarity[n], n))
    return sorted({0, *inner[: kept_count(layers, speedup) - 2], layers - 1})


def largest_speedup(layers: int) -> float:
    """Two layers stay."""
    return layers / 2


def depths(most: int, least: int, length: int, variants: int) -> list[tuple[int, int]]:
    """SkipDecode's linear decay from `most` to `least` layers over `length` positions, in at most `variants` steps.

    (first position, layers) of each step. Steps are equally long and have the depth that the decay has in their middle,
    so that the mean depth is that of the decay; after `length` the last one goes on.
    """
    steps = min(variants, most - least + 1)
    middle = [most - (most - least) * (i + 0.5) / steps for i in range(steps)]
    found = [(round(i * length / steps), round(depth)) for i, depth in enumerate(middle)]
    return [step for i, step in enumerate(found) if not i or step[1] < found[i - 1][1]]
