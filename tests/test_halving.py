"""Successive halving with a deterministic timer: who wins, what it costs, and how it goes on after an interrupt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from sylvester.backends.halving import BURST, FIRST_ROUND, MARGIN, Race, Standing
from sylvester.backends.tuner import run_race
from sylvester.backends.tuning_database import Database, Key
from sylvester.codegen.space import Candidate

KEY = Key("hash", "linear f32 1x32x32 f32", "cpu avx2", 2, "zig 1")
NAMES = [Candidate({"A": n}) for n in range(1, 8)]
DEFAULT = Candidate()


class Timer:
    """Candidates take fixed times with a spread of 1 %; every measured nanosecond passes on the clock."""

    def __init__(self, times: dict[Candidate, int], *, stop_after: int = 0) -> None:
        self.times, self.now, self.runs, self.stop_after = times, 0, Counter(), stop_after

    def measure(self, candidate: Candidate, runs: int) -> list[int]:
        if self.stop_after and self.runs.total() >= self.stop_after:
            raise KeyboardInterrupt
        samples = [self.times[candidate] * (100 + (self.runs[candidate] + i) % 3 - 1) // 100 for i in range(runs)]
        self.runs[candidate] += runs
        self.now += sum(samples)
        return samples

    def spent(self, budget: float) -> Callable[[], bool]:
        return lambda: self.now >= budget


def times(**special: int) -> dict[Candidate, int]:
    """10 us for the default, more and more for the others but those named, as A3=8000."""
    slow = {c: 11_000 + 500 * n for n, c in enumerate(NAMES)}
    return {DEFAULT: 10_000} | slow | {Candidate({"A": int(name[1:])}): ns for name, ns in special.items()}


def race(timer: Timer, budget: float = 1e12) -> Race:
    made = Race({c: Standing() for c in timer.times})
    made.run(timer.measure, spent=timer.spent(budget), round_done=lambda: None)
    return made


def test_clear_winner_wins():
    done = race(Timer(times(A3=8_000)))

    assert done.finished
    assert done.winner == Candidate({"A": 3})


@pytest.mark.parametrize("ns", [9_800, 10_000, 10_300])
def test_near_tie_keeps_the_default(ns):
    done = race(Timer(times(A3=ns)))

    assert done.finished
    assert done.winner == DEFAULT


def test_gain_must_exceed_the_spread_of_the_runs():
    wild = [9_000, 4_000, 14_000, 6_000, 12_000, 10_500, 7_500, 8_000]
    done = Race({DEFAULT: Standing([10_000] * 8), NAMES[0]: Standing(wild)})

    assert done.margin(NAMES[0]) > 0.15 > MARGIN
    assert done.winner == DEFAULT


def test_slow_moments_of_the_machine_do_not_make_a_winner():
    half_disturbed = [10_000] * 7 + [40_000] * 9
    less_disturbed = [9_990] * 9 + [40_000] * 7
    done = Race({DEFAULT: Standing(half_disturbed), NAMES[0]: Standing(less_disturbed)})

    assert done.standings[NAMES[0]].median < done.standings[DEFAULT].median / 2
    assert done.winner == DEFAULT


def test_better_half_is_measured_longer():
    timer = Timer(times(A3=8_000))
    done = race(timer)

    assert timer.runs[DEFAULT] == timer.runs[Candidate({"A": 3})] > 4 * FIRST_ROUND
    assert timer.runs[NAMES[6]] == FIRST_ROUND
    assert [c for c, s in done.standings.items() if not s.dropped] == [DEFAULT, Candidate({"A": 3})]


def test_budget_is_respected():
    timer = Timer(times(A3=8_000))
    budget = 40 * 10_000
    done = race(timer, budget)

    assert not done.finished
    assert timer.now <= budget + BURST * 15_000
    assert timer.runs.total() < 60


def test_no_time_at_all_keeps_the_default():
    done = race(Timer(times(A3=1)), 0)

    assert done.winner == DEFAULT
    assert not done.finished


def test_default_that_was_not_measured_is_kept():
    assert Race({DEFAULT: Standing(), NAMES[0]: Standing([10] * 8)}).winner == DEFAULT


def test_interrupt_leaves_what_was_measured_and_the_race_goes_on_from_there(tmp_path):
    whole = Timer(times(A3=8_000))
    race(whole)
    with Database(tmp_path / "t.sqlite") as database:
        first = Timer(times(A3=8_000), stop_after=whole.runs.total() // 2)
        with pytest.raises(KeyboardInterrupt):
            run_race(database, KEY, first.times, first.measure, spent=lambda: False)
        kept = database.look_up(KEY)
        assert kept is not None
        assert not kept.finished
        assert {name: len(t.samples) for name, t in kept.times.items()} == {str(c): n for c, n in first.runs.items()}

        second = Timer(times(A3=8_000))
        done = run_race(database, KEY, second.times, second.measure, spent=lambda: False)

    assert done.finished
    assert done.chosen == "A=3"
    assert first.runs + second.runs == whole.runs


def test_finished_race_is_not_run_again_but_new_candidates_are(tmp_path):
    with Database(tmp_path / "t.sqlite") as database:
        known = times()
        run_race(database, KEY, known, Timer(known).measure, spent=lambda: False)
        again = Timer(known)
        run_race(database, KEY, known, again.measure, spent=lambda: False)
        assert not again.runs

        more = known | {Candidate({"B": 1}): 5_000}
        timer = Timer(more)
        assert run_race(database, KEY, more, timer.measure, spent=lambda: False).chosen == "B=1"

    assert not timer.runs[NAMES[6]]
