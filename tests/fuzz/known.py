"""What the fuzzer finds and nobody mends: each with the reason, and counted all the same."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """Failures of an oracle whose message holds a text."""

    oracle: str
    text: str
    reason: str


KNOWN: tuple[Known, ...] = ()

FINITE_ONLY = {
    "rule ": "a rule keeps finite values: PyTorch's fused ops and their parts differ at infinities",
    "motif ": "made of the parts of fused ops, as the left sides of rules",
    "aten.gelu": "PyTorch's float32 gelu of infinity is NaN in vectors and infinity one by one",
    "sylvester.geglu": "as gelu",
    "aten.upsample_linear1d": "PyTorch interpolates beside infinities in float32 otherwise than in float64",
    "aten.upsample_bilinear2d": "as upsample_linear1d",
}
"""Records, by how their names begin, that take no infinities and NaNs, and why."""


def known(oracle: str, message: str) -> Known | None:
    return next((k for k in KNOWN if oracle.startswith(k.oracle) and k.text in message), None)
