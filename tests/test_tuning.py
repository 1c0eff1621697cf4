"""Tuning: the choice for a program, real candidates on tiny problems, and what compiling takes from the database."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sylvester as sv
from sylvester.backends import cpu_library
from sylvester.backends import tuner as tuner_module
from sylvester.backends.halving import FIRST_ROUND
from sylvester.backends.toolchain import find_compiler
from sylvester.backends.tuner import Setting, Tuner
from sylvester.backends.tuning import best_for_program, gain, read_problems, runnable, tune
from sylvester.backends.tuning_bench import Bench, WrongCandidate, build
from sylvester.backends.tuning_database import Database, Entry, Key, Time, default_path
from sylvester.codegen.compile import program_problems
from sylvester.codegen.isa import AVX512, SCALAR, variants
from sylvester.codegen.problems import DECODE_KEYS, worth_tuning
from sylvester.codegen.space import Candidate, Problem, Space, row_class
from sylvester.codegen.tunable import family_of
from sylvester.compiler.errors import CompileError, Unsupported
from sylvester.compiler.target import Target, host_architecture

TINY = Problem.linear("f32", 3, 40, 33)
DEFAULT, OTHER = Candidate(), Candidate({"A": 1})


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
        one: entry(one, "SV_Q4_AHEAD=4096", default=100, SV_Q4_AHEAD_is_4096=90, SV_Q4_ROWS_is_8=102),
        many: entry(many, "SV_Q4_ROWS=8", default=100, SV_Q4_AHEAD_is_4096=103, SV_Q4_ROWS_is_8=70),
    }
    of = family_of(one)

    chosen = [best_for_program(c, {"decode": {one: 1}, "prefill": {many: 1}}, known) for c in of.choices]

    assert [str(c) for c in chosen] == ["SV_Q4_ROWS=8", "SV_Q4_AHEAD=4096"]


def test_choice_that_costs_one_entry_more_than_it_gives_another_is_not_taken():
    one, many = Problem.linear("q4/32", 1, 64, 64), Problem.linear("q4/32", 256, 64, 64)
    known = {
        one: entry(one, "SV_Q4_ROWS=8", default=100, SV_Q4_ROWS_is_8=80),
        many: entry(many, "default", default=100, SV_Q4_ROWS_is_8=130),
    }
    of = family_of(one)

    assert best_for_program(of.choices[0], {"decode": {one: 1}, "prefill": {many: 1}}, known) == DEFAULT
    assert str(best_for_program(of.choices[0], {"decode": {one: 1}}, known)) == "SV_Q4_ROWS=8"


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


def test_tiles_fit_the_micro_kernels_of_the_variant():
    of = family_of(Problem.linear("q4/32", 1, 32, 32))

    assert Candidate({"SV_Q4_ROWS": 8}) in of.space(AVX512).candidates
    assert Candidate({"SV_Q4_ROWS": 8}) not in of.space(SCALAR).candidates
    assert of.space(SCALAR).default == DEFAULT


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
    assert set(found.times) == {str(c) for c in family_of(TINY).space(SCALAR).candidates}
    assert all(len(t.samples) >= FIRST_ROUND and min(t.samples) > 0 for t in found.times.values())
    assert seen == [(f"tune {TINY}", 0, 1), ("tune", 1, 1)]


@pytest.mark.parametrize(
    "problem",
    [
        Problem("linear", "bf16", (5, 40, 33)),
        Problem("linear", "q8", (5, 40, 33)),
        Problem("linear", "q8/32", (5, 40, 64)),
        Problem("linear", "q3/32", (5, 40, 64)),
        Problem("linear", "q4/32", (5, 40, 64)),
        Problem("attention", "f32/causal", (9, 9, 4, 2, 16)),
        Problem("attention", "f32/full", (1, 70, 4, 2, 16)),
        Problem("attention", "bf16/full", (1, 70, 4, 2, 16)),
        Problem("attention", "q8/full", (1, 70, 4, 2, 16)),
        Problem("attention", "q4/causal", (9, 70, 4, 2, 16)),
    ],
    ids=str,
)
def test_candidates_of_every_family_build_and_agree(problem, tmp_path):
    of, compiler = family_of(problem), find_compiler()
    candidates = [DEFAULT, *(Candidate(c[0]) for c in of.choices)]

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
    libraries = {DEFAULT: good, OTHER: _Skewed(good)}
    bench = Bench(libraries, of, narrow, 1)  # type: ignore[arg-type]
    with pytest.raises(WrongCandidate, match="A=1 of linear f32 3x40x20 f32 is off by"):
        bench.check()
    bench.close()


class _Skewed:
    """A library whose kernel takes one input feature less."""

    def __init__(self, library) -> None:
        self.sv_tune_bytes, self.real = library.sv_tune_bytes, library

    def sv_tune_run(self, team, sizes, *rest):
        return self.real.sv_tune_run(team, type(sizes)(sizes[0], sizes[1], sizes[2] - 1), *rest)


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


def test_the_variant_to_tune_is_the_one_that_will_be_loaded(monkeypatch):
    isas = variants(("q8", "bf16"), host_architecture())
    monkeypatch.setattr(cpu_library, "cpu_level", lambda baseline: 5)
    monkeypatch.setattr(cpu_library, "_open", lambda baseline: SimpleNamespace(sv_permit_tiles=lambda: -1))
    best = runnable(isas, Target(), find_compiler())
    monkeypatch.setenv("SYLVESTER_ISA", isas[0].name)
    forced = runnable(isas, Target(), find_compiler())
    monkeypatch.setenv("SYLVESTER_ISA", "unknown")

    assert best == [isa for isa in isas if not isa.permission][-1]
    assert forced == isas[0]
    with pytest.raises(Unsupported, match="SYLVESTER_ISA='unknown'"):
        runnable(isas, Target(), find_compiler())


def test_kernels_that_are_not_known_make_one_note(own_cache):
    other = Problem.linear("f32", 3, 64, 33)
    setting = Setting(SCALAR, 1, find_compiler())
    with Database(own_cache) as database:
        database.record(Entry(replace(setting.key(TINY), threads=7), "default", True, 0.03, {}))

    found = tune({"forward": {TINY: 1, other: 1}}, (SCALAR,), Target(threads=1), find_compiler())

    assert found.isas == (SCALAR,)
    assert found.notes == [f"tuning: 2 of 2 kernels are not tuned; {TINY}: missed: other threads: 7, asked 1: default"]


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
    with pytest.raises(CompileError, match="tune must be a number of seconds above 0, found nan"):
        sv.compile(model, inputs, target=sv.Target("cpu", tune=math.nan))


def test_default_path_is_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("SYLVESTER_CACHE", str(tmp_path))

    assert default_path() == tmp_path / "tuning.sqlite"
