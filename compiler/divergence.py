"""KL(reference || candidate) = sum p (log p - log q) of next tokens, against scores that are kept once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ROOM = 1 << 28
"""Bytes that the reference may take with all its tokens; past that the likeliest ones are kept."""
LIKELIEST = 512


@dataclass(frozen=True)
class Score:
    """Sums over positions: KL in nats, and -log p of the token that came."""

    kl: float = 0.0
    surprise: float = 0.0
    positions: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.kl + other.kl, self.surprise + other.surprise, self.positions + other.positions)

    @property
    def mean(self) -> float:
        """KL per position."""
        return self.kl / max(self.positions, 1)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.surprise / max(self.positions, 1), 700.0))


@dataclass(frozen=True)
class Reference:
    """Log-probabilities [positions, kept] of the original, float32; `tokens` says whose, None for all in order.

    With the likeliest tokens only, the others count as one: KL is then a lower bound, close to it.
    """

    logs: Tensor
    tokens: Tensor | None
    wanted: Tensor

    @staticmethod
    def of(scores: Tensor, wanted: Tensor, every: bool) -> Reference:
        """Scores [positions, vocabulary] and the tokens that came [positions]."""
        logs = F.log_softmax(scores.float(), -1)
        if every or logs.shape[-1] <= LIKELIEST:
            return Reference(logs, None, wanted)
        kept, tokens = logs.topk(LIKELIEST, -1)
        return Reference(_with_rest(kept), tokens, wanted)

    def score(self, scores: Tensor) -> Score:
        """How far a candidate's scores [positions, vocabulary] are off."""
        logs = F.log_softmax(scores.float(), -1)
        surprise = -float(logs.gather(1, self.wanted[:, None]).double().sum())
        found = logs if self.tokens is None else _with_rest(logs.gather(1, self.tokens))
        kl = float(F.kl_div(found, self.logs, reduction="none", log_target=True).sum(-1).double().sum())
        return Score(kl if math.isfinite(kl) else math.inf, surprise, len(self.wanted))


def _with_rest(logs: Tensor) -> Tensor:
    """One column more: what all other tokens have together."""
    rest = (1 - logs.double().exp().sum(-1, keepdim=True)).clamp_min(1e-12).log()
    return torch.cat([logs, rest.float()], -1)
