"""The thread team: every thread runs, barriers hold, splits cover, the first error comes back, scratch grows."""

from __future__ import annotations

import numpy as np
import pytest

from sylvester.codegen.isa import SCALAR
from tests.kernel_harness import export, load, run, team

SOURCE = (
    export(
        "count",
        "_Atomic int64_t *n = p[0]; for (int s = 0; s < i[0]; s++) { atomic_fetch_add(n + s, 1); "
        "sv_barrier(t); if (atomic_load(n + s) != t->nt) sv_fail(t, 7, s); sv_barrier(t); }",
    )
    + export(
        "split",
        "int64_t lo, hi; int32_t *hits = p[0]; sv_split(i[0], i[1], t, &lo, &hi); "
        "if (lo < i[0] && lo % i[1]) sv_fail(t, 9, lo); for (; lo < hi; lo++) hits[lo]++;",
    )
    + export(
        "tasks",
        "int32_t *hits = p[0]; for (int s = 0; s < i[1]; s++) { "
        "sv_tasks tasks = sv_share_tasks(t, i[0]); for (int64_t j; (j = sv_next_task(t, &tasks)) >= 0;) "
        "__atomic_fetch_add(hits + s * i[0] + j, 1, 5); }",
    )
    + export("fail", "if (t->tid == t->nt - 1) { sv_fail(t, i[0], i[1]); sv_fail(t, 99, 99); }")
    + export(
        "fill",
        "memset(t->scratch, 1 + t->tid, (size_t)i[0]); sv_barrier(t); char bad = 0; "
        "for (int64_t j = 0; j < i[0]; j++) bad |= t->scratch[j] ^ (char)(1 + t->tid); "
        "if (bad || (uintptr_t)t->scratch % 64) sv_fail(t, 3, 0);",
        "(size_t)i[0]",
    )
)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_barriers_separate_the_steps(threads):
    lib = load(SOURCE, SCALAR)
    with team(lib, threads) as made:
        for _ in range(20):
            counts = np.zeros(50, np.int64)
            assert run(lib, made, "count", [50], [counts]) == 0
            assert (counts == threads).all()


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_split_covers_everything_once(threads):
    lib = load(SOURCE, SCALAR)
    with team(lib, threads) as made:
        for n, grain in [(0, 1), (1, 1), (7, 3), (64, 16), (65, 16), (3, 100)]:
            hits = np.zeros(max(n, 1), np.int32)
            assert run(lib, made, "split", [n, grain], [hits]) == 0
            assert (hits[:n] == 1).all()


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_every_task_of_every_kernel_is_taken_once(threads):
    lib = load(SOURCE, SCALAR)
    with team(lib, threads) as made:
        for tasks in (1, 2, 7, 100):
            hits = np.zeros((200, tasks), np.int32)
            assert run(lib, made, "tasks", [tasks, 200], [hits]) == 0
            assert (hits == 1).all()


def test_first_error_is_reported_and_forgotten():
    lib = load(SOURCE, SCALAR)
    with team(lib, 3) as made:
        assert run(lib, made, "fail", [5, 1 << 40], []) == 5
        assert lib.sv_team_error_value(made) == 1 << 40
        assert run(lib, made, "split", [1, 1], [np.zeros(1, np.int32)]) == 0


def test_scratch_is_private_aligned_and_grows():
    lib = load(SOURCE, SCALAR)
    with team(lib, 3) as made:
        for size in (64, 100, 1 << 20, 10):
            assert run(lib, made, "fill", [size], []) == 0


def test_no_threads_is_no_team():
    assert load(SOURCE, SCALAR).sv_team_new(0) is None
