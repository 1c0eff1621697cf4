"""Tuning: the race with a deterministic timer, the choice for a program, and one real run on a tiny problem."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import closing

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sylvester as sv
from sylvester.backends import tuner as tuner_module
from sylvester.backends.halving import BURST, FIRST_ROUND, MARGIN, Race, Standing
from sylvester.backends.toolchain import find_compiler
from sylvester.backends.tuner import Setting, Tuner, run_race
from sylvester.backends.tuning import best_for_program, gain, read_problems, tune
from sylvester.backends.tuning_bench import Bench, WrongCandidate, build
from sylvester.backends.tuning_database import Database, Entry, Key, Time, default_path
from sylvester.codegen.compile import program_problems
from sylvester.codegen.isa import AVX512, SCALAR
from sylvester.codegen.problems import DECODE_KEYS, worth_tuning
from sylvester.codegen.space import Candidate, Problem, Space, row_class
from sylvester.codegen.tunable import family_of
from sylvester.compiler.errors import CompileError, Unsupported
from sylvester.compiler.target import Target

KEY = Key("hash", "linear f32 1x32x32 f32", "cpu avx2", 2, "zig 1")
TINY = Problem.linear("f32", 3, 40, 33)
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


def entry(problem: Problem, chosen: str, **medians: int) -> Entry:
    known = {name.replace("_is_", "="): Time(ns, (ns,) * 8) for name, ns in medians.items()}
    return Entry(Key("h", str(problem), "cpu", 1, "zig"), chosen, True, 0.03, known)


def test_program_takes_one_candidate_by_the_time_of_all_its_layers():
    a, b = Problem.linear("f32", 256, 64, 64), Problem.linear("f32", 256, 96, 64)
    known = {
        a: entry(a, "SV_KC=256", default=100, SV_KC_is_256=80, SV_KC_is_512=95),
        b: entry(b, "SV_KC=512", default=100, SV_KC_is_256=110, SV_KC_is_512=80),
    }
    of = family_of(a)

    def best(problems: dict[str, dict[Problem, int]]) -> str:
        return str(best_for_program(of.choices[0], problems, known))

    assert best({"f": {a: 1, b: 1}}) == "SV_KC=512"
    assert best({"f": {a: 9, b: 1}}) == "SV_KC=256"
    assert best({"f": {a: 1, b: 1}, "g": {a: 8}}) == "SV_KC=256"
    assert best({"f": {Problem.linear("f32", 1, 8, 8): 1}}) == "default"


def test_program_takes_choices_that_win_different_problems_together():
    one, many = Problem.linear("q4/32", 1, 64, 64), Problem.linear("q4/32", 256, 64, 64)
    known = {
        one: entry(one, "SV_Q4_AHEAD=4096", default=100, SV_Q4_AHEAD_is_4096=90, SV_Q4_ROWS_is_6=102),
        many: entry(many, "SV_Q4_ROWS=6", default=100, SV_Q4_AHEAD_is_4096=103, SV_Q4_ROWS_is_6=70),
    }
    of = family_of(one)

    chosen = [best_for_program(c, {"decode": {one: 1}, "prefill": {many: 1}}, known) for c in of.choices]

    assert [str(c) for c in chosen] == ["SV_Q4_ROWS=6", "SV_Q4_AHEAD=4096"]


def test_choice_that_costs_one_entry_more_than_it_gives_another_is_not_taken():
    one, many = Problem.linear("q4/32", 1, 64, 64), Problem.linear("q4/32", 256, 64, 64)
    known = {
        one: entry(one, "SV_Q4_ROWS=6", default=100, SV_Q4_ROWS_is_6=80),
        many: entry(many, "default", default=100, SV_Q4_ROWS_is_6=130),
    }
    of = family_of(one)

    assert best_for_program(of.choices[0], {"decode": {one: 1}, "prefill": {many: 1}}, known) == DEFAULT
    assert str(best_for_program(of.choices[0], {"decode": {one: 1}}, known)) == "SV_Q4_ROWS=6"


def test_gain_is_told_in_words():
    assert gain(entry(TINY, "SV_KC=256", default=100, SV_KC_is_256=80)).startswith("SV_KC=256, 1.25x")
    assert "nothing beats it by 3.0%" in gain(entry(TINY, "default", default=100, SV_KC_is_256=99))


def test_candidates_are_values():
    assert Candidate({"B": 1, "A": 2}) == Candidate({"A": 2, "B": 1})
    assert len({Candidate({"B": 1, "A": 2}), Candidate({"A": 2, "B": 1}), DEFAULT}) == 2
    assert (str(DEFAULT), str(Candidate({"B": 1, "A": 2}))) == ("default", "A=2 B=1")
    with pytest.raises(ValueError, match="distinct candidates"):
        Space("f", (DEFAULT, DEFAULT))
    with pytest.raises(TypeError):
        Candidate({"A": 1}).parameters["A"] = 2  # type: ignore[index]


def test_rows_come_in_classes():
    assert [row_class(m) for m in (1, 2, 8, 9, 63, 64, 512)] == [1, 4, 4, 32, 32, 256, 256]


def test_tuned_variant_renders_its_macros():
    tuned = AVX512.tuned({"SV_KC": 512, "SV_MR": 8})

    assert tuned.gemm_rows == 8
    assert "#define SV_MR 8\n" in tuned.defines()
    assert "#define SV_KC 512\n" in tuned.defines()
    assert (tuned.name, AVX512.tuned({})) == ("avx512", AVX512)


def test_real_candidates_of_a_tiny_layer_agree_and_are_timed(tmp_path):
    setting = Setting(SCALAR, 2, find_compiler())
    seen = []
    with Database(tmp_path / "t.sqlite") as database, Tuner(setting, database, lambda *s: seen.append(s)) as tuner:
        assert tuner.tune({TINY: 2}, 20.0) == {TINY}
        found = database.look_up(setting.key(TINY))
        assert tuner.tune({TINY: 2}, 20.0) == set()

    assert found is not None
    assert found.finished
    assert set(found.times) == {str(c) for c in family_of(TINY).space.candidates}
    assert all(len(t.samples) >= FIRST_ROUND and min(t.samples) > 0 for t in found.times.values())
    assert seen == [(f"tune {TINY}", 0, 1), ("tune", 1, 1)]


@pytest.mark.parametrize(
    "problem",
    [
        Problem("linear", "bf16", (5, 40, 33)),
        Problem("linear", "q8", (5, 40, 33)),
        Problem("linear", "q8/32", (5, 40, 64)),
        Problem("linear", "q4/32", (5, 40, 64)),
        Problem("attention", "f32/causal", (9, 9, 4, 2, 16)),
        Problem("attention", "f32/full", (1, 70, 4, 2, 16)),
        Problem("attention", "bf16/full", (1, 70, 4, 2, 16)),
    ],
    ids=str,
)
def test_candidates_of_every_family_build_and_agree(problem, tmp_path):
    of, compiler = family_of(problem), find_compiler()
    candidates = [DEFAULT, *(Candidate(c[-1]) for c in of.choices)]

    bench = Bench({c: build(of, SCALAR, c, tmp_path, compiler) for c in candidates}, of, problem, 2)
    with closing(bench):
        bench.check()
        times = bench.measure(candidates[-1], 3)

    assert len(times) == 3
    assert min(times) > 0
    assert np.abs(bench.operands[0].view(np.float32)).max() > 0


def test_harness_computes_the_layer(tmp_path):
    m, n, k = TINY.shape
    bench = Bench(
        {DEFAULT: build(family_of(TINY), SCALAR, DEFAULT, tmp_path, find_compiler())}, family_of(TINY), TINY, 2
    )
    with closing(bench):
        bench.check()
        x = bench.operands[1].view(np.float32).reshape(m, k).astype(np.float64)
        panels = bench.cold.view(np.float32)[: -(-n // 32) * 32 * k].reshape(-1, k, 32).astype(np.float64)
        weight = panels.transpose(0, 2, 1).reshape(-1, k)[:n]

        np.testing.assert_allclose(bench.operands[0].view(np.float32).reshape(m, n), x @ weight.T, rtol=0, atol=1e-6)


def test_problems_of_a_language_model():
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        max_position_embeddings=32,
    )
    program = sv.trace(LlamaForCausalLM(config).eval(), (torch.randint(0, 50, (2, 8)),))

    found = program_problems(program)

    assert found["decode"][Problem("attention", "f32/full", (1, DECODE_KEYS, 4, 2, 8))] == 2
    assert found["start"][Problem("attention", "f32/causal", (256, 256, 4, 2, 8))] == 2
    assert found["decode"][Problem("linear", "f32", (1, 50, 32))] == 1
    assert found["start"][Problem("linear", "f32", (1, 50, 32))] == 1
    columns = [n * p.shape[1] for p, n in found["decode"].items() if p.family == "linear"]
    assert sum(columns) == 50 + 2 * (64 + 32 + 128 + 32)


def test_prompts_are_tuned_as_the_entry_that_reads_them():
    counts = Counter([TINY])

    assert set(worth_tuning({"prefill": counts, "start": counts, "decode": counts})) == {"start", "decode"}
    assert set(worth_tuning({"prefill": counts, "decode": counts})) == {"prefill", "decode"}


def test_wrong_candidate_is_an_error(tmp_path):
    of, compiler = family_of(TINY), find_compiler()
    good = build(of, SCALAR, DEFAULT, tmp_path, compiler)
    narrow = Problem("linear", "f32", (3, 40, 20))
    libraries = {DEFAULT: good, NAMES[0]: _Skewed(good)}
    bench = Bench(libraries, of, narrow, 1)  # type: ignore[arg-type]
    with pytest.raises(WrongCandidate, match="A=1 of linear f32 3x40x20 f32 is off by"):
        bench.check()
    bench.close()


class _Skewed:
    """A library whose kernel takes one input feature less."""

    def __init__(self, library) -> None:
        self.sv_tune_bytes, self.library = library.sv_tune_bytes, library

    def sv_tune_run(self, team, sizes, *rest):
        return self.library.sv_tune_run(team, type(sizes)(sizes[0], sizes[1], sizes[2] - 1), *rest)


def test_no_time_to_build_leaves_the_problem_open(tmp_path, monkeypatch):
    monkeypatch.setattr(tuner_module, "build", lambda *_: pytest.fail("built after the end"))
    with Database(tmp_path / "t.sqlite") as database:
        setting = Setting(SCALAR, 1, find_compiler())
        with Tuner(setting, database, clock=iter(range(100)).__next__) as tuner:
            tuner.tune({TINY: 1}, 0.5)
        assert database.look_up(setting.key(TINY)) is None


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A tuning database of the test's own, in use."""
    monkeypatch.setenv("SYLVESTER_TUNE", "1")
    monkeypatch.setattr("sylvester.backends.tuning.default_path", lambda: tmp_path / "tuning.sqlite")
    return tmp_path / "tuning.sqlite"


def layer() -> tuple[torch.nn.Module, tuple[torch.Tensor]]:
    return torch.nn.Linear(33, 40).eval(), (torch.randn(3, 33),)


def test_compile_takes_what_the_database_knows(own_cache):
    model, inputs = layer()
    target = Target("cpu", isas=("scalar",), threads=1)
    setting = Setting(SCALAR, 1, find_compiler())
    known = entry(TINY, "SV_KC=256", default=100, SV_KC_is_256=80)
    with Database(own_cache) as database:
        database.record(Entry(setting.key(TINY), known.chosen, True, 0.03, known.times))

    with sv.compile(model, inputs, target=target) as compiled:
        notes = str(compiled.ledger)
        torch.testing.assert_close(compiled(*inputs), model(*inputs).detach())

    assert "SV_KC=256, 1.25x the speed of the default, from the database" in notes
    assert "scalar built with SV_KC=256" in notes


def test_compile_tunes_within_seconds_and_the_artefact_knows_its_problems(own_cache, tmp_path):
    model, inputs = layer()

    with sv.compile(model, inputs, target=Target("cpu", isas=("scalar",), threads=1), tune=20) as compiled:
        compiled.save(tmp_path / "saved")
        assert "measured now" in str(compiled.ledger)

    assert read_problems(tmp_path / "saved") == {"forward": {TINY: 1}}


def test_database_is_ignored_when_the_switch_says_so(own_cache, monkeypatch):
    monkeypatch.setenv("SYLVESTER_TUNE", "0")
    own_cache.write_text("not a database")
    problems = {"forward": {TINY: 1}}

    quiet = tune(problems, (SCALAR,), Target(), find_compiler())
    asked = tune(problems, (SCALAR,), Target(), find_compiler(), seconds=1.0)

    assert (quiet.isas, quiet.notes) == ((SCALAR,), [])
    assert asked.notes == ["tuning: off, or nothing to tune: defaults"]


def test_broken_database_is_a_note_when_only_asked_and_an_error_when_tuning(own_cache):
    own_cache.write_text("not a database, but long enough to be looked at as one" * 20)
    problems = {"forward": {TINY: 1}}

    assert "cannot use the tuning database" in tune(problems, (SCALAR,), Target(), find_compiler()).notes[0]
    with pytest.raises(CompileError, match="cannot use the tuning database"):
        tune(problems, (SCALAR,), Target(), find_compiler(), seconds=1.0)
    assert own_cache.read_text().startswith("not a database")


def test_other_targets_and_bad_times_are_refused():
    model, inputs = layer()

    with pytest.raises(Unsupported, match="the target 'null' has nothing to tune"):
        sv.compile(model, inputs, target="null", tune=1)
    with pytest.raises(CompileError, match="tune must be a number of seconds above 0, found 0"):
        sv.compile(model, inputs, tune=0)


def test_default_path_is_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SYLVESTER_CACHE", str(tmp_path))

    assert default_path() == tmp_path / "tuning.sqlite"
