"""Whether drafting pays: how often drafts are accepted, what reading several tokens takes, what was lost so far."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

FADING = 0.95
"""What a round counts beside the one after it, in rates of acceptance (as DEL has it)."""
PRIOR = (2.0, 1.0)
"""Drafts accepted and rejected before the first one."""
SIBLING = (0.3, 2.7)
"""The same of a draft beside a likelier one."""
RECENT, SOONER = 0.05, 0.25
"""What the last call counts among those before it, in times, and where it was faster: other work only slows down."""
USUAL = 0.1
"""What the last call counts in the mean of all."""
START = 4
"""Values from which on their mean counts."""
SLOPE = 0.1
"""What one token more takes beside a call of one, until calls have been timed."""
FRESH = 40
"""Calls after which one of a single token is timed again."""
PATIENCE = (32, 256)
"""Calls without drafts after which some are tried, though they did not pay: at first, and at most."""
TRIED = 4
"""Calls in a row that are tried: after the first, what drafts is in the cache of the processor."""
ALLOWED, ADVANCE = 0.01, 4.0
"""Part of all time that drafting may lose, and steps of plain decoding that it may lose at once."""
SEARCHED, SAVED = ALLOWED / 2, 16.0
"""Part of all time that a search for a better draft may take, and steps of plain decoding that it can put by."""


@dataclass
class Rate:
    """Part of the drafts of a kind that are accepted."""

    prior: tuple[float, float] = PRIOR

    def __post_init__(self) -> None:
        self.accepted, self.rejected = self.prior

    def __float__(self) -> float:
        return self.accepted / (self.accepted + self.rejected)

    def add(self, accepted: bool) -> None:
        self.accepted = FADING * (self.accepted - self.prior[0]) + self.prior[0] + accepted
        self.rejected = FADING * (self.rejected - self.prior[1]) + self.prior[1] + (not accepted)


@dataclass
class Mean:
    """Of the values of late; one that is far off counts as twice or half the mean: something else ran.

    Of the first `START` the least counts: memory is read for the first time then.
    """

    value: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.count += 1
        if self.count <= START:
            self.value = min(value, self.value) if self.count > 1 else value
            return
        value = min(max(value, self.value / 2), self.value * 2)
        self.value += (SOONER if value < self.value else RECENT) * (value - self.value)


@dataclass
class Reading:
    """Seconds of a call that reads n tokens: those of one token, and a share of them for each more."""

    one: Mean = field(default_factory=Mean)
    usual: float = 0.0
    """What one token takes on the mean, whatever else runs: what was spent is held against it."""
    more: Mean = field(default_factory=lambda: Mean(SLOPE, START))
    calls: int = 0

    def add(self, tokens: int, seconds: float) -> None:
        self.calls += 1
        if tokens == 1:
            self.one.add(seconds)
            known = self.usual if self.one.count > START else seconds
            self.usual = known + USUAL * (min(max(seconds, known / 4), known * 4) - known)
            self.calls = 0
        elif self.one.count:
            self.more.add(max(seconds / self.one.value - 1, 0.0) / (tokens - 1))

    @property
    def stale(self) -> bool:
        """Whether it is time for a call of a single token."""
        return self.one.count < 3 or self.calls >= FRESH

    def __call__(self, tokens: int) -> float:
        return self.one.value * (1 + self.more.value * (tokens - 1))


@dataclass
class Policy:
    """Goes on drafting while one token more is expected to raise tokens per second, within what may be lost."""

    rates: dict[Hashable, Rate] = field(default_factory=dict)
    reading: Reading = field(default_factory=Reading)
    drafting: Mean = field(default_factory=Mean)
    """Seconds that drafting one token takes."""
    total: float = 0.0
    lost: float = 0.0
    credit: float = 0.0
    """Seconds that a search may take: a part of all time, and half of what drafting gained."""
    idle: int = 0
    patience: int = PATIENCE[0]
    tries: int = 0

    def rate(self, kind: Hashable) -> float:
        return float(self.rate_of(kind))

    def rate_of(self, kind: Hashable) -> Rate:
        """Kinds that are tuples are siblings."""
        if kind not in self.rates:
            self.rates[kind] = Rate(SIBLING if isinstance(kind, tuple) else PRIOR)
        return self.rates[kind]

    def allowed(self) -> bool:
        """Whether to draft now: not while it has lost too much, nor when a single token is to be timed."""
        return not self.reading.stale and self.lost <= ALLOWED * self.total + ADVANCE * self.reading(1)

    def pays(self, drafted: int, expected: float, chance: float) -> bool:
        """Whether to draft one more after `drafted`, of which `expected` will be accepted, this one with `chance`."""
        if not drafted and (self.tries or self.idle >= self.patience):
            return True
        now = (1 + expected) / self._takes(drafted)
        return (1 + expected + chance) / self._takes(drafted + 1) > now

    def _takes(self, drafted: int) -> float:
        return self.reading(drafted + 1) + drafted * self.drafting.value

    def settle(self, read: int, made: int, seconds: float, drafting: float) -> None:
        """A round read `read` tokens in `seconds` and made `made`, after `drafting` seconds of drafting."""
        self.reading.add(read, seconds)
        spent = seconds + drafting
        gained = made * self.reading.usual - spent if read > 1 or drafting else 0.0
        self.total += spent
        self.idle += 1
        most = SAVED * self.reading(1)
        self.credit = min(max(self.credit + SEARCHED * spent + gained / 2, -most), most)
        if read > 1 or drafting:
            self.lost = max(self.lost - gained, -ALLOWED * self.total)
            self._tried(gained > 0)

    def affords(self, seconds: float) -> bool:
        """Whether a search may take so long now; at first it may have half of what drafting may lose at once."""
        return self.reading.one.count >= 3 and seconds <= self.credit + ADVANCE / 2 * self.reading(1)

    def charge(self, seconds: float) -> None:
        """A search took so long, which counts as lost."""
        self.total += seconds
        self.lost += seconds
        self.credit -= seconds

    def retry(self) -> None:
        """What drafts is another: it is tried soon, whatever the one before it lost."""
        self.patience = self.idle = PATIENCE[0]

    def _tried(self, gained: bool) -> None:
        """Drafts were read; while it is tried whether they pay, that is known after some calls."""
        if self.idle > self.patience:
            self.tries = TRIED
        self.idle, self.tries = 0, max(0, self.tries - 1)
        if gained:
            self.patience = PATIENCE[0]
        elif not self.tries:
            self.patience = min(2 * self.patience, PATIENCE[1])
