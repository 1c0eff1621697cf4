"""A hand-written artefact: a language model of a dozen lines of C, so that the runtime is tested without the compiler.

Its next token is (last token + first token) modulo 8; the first token lives in the state.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from sylvester.backends.kernel_table import write_table
from sylvester.backends.toolchain import build_shared
from sylvester.codegen.costs import Cost
from sylvester.codegen.index import index
from sylvester.codegen.isa import AVX2, SCALAR
from sylvester.compiler.manifest import (
    WEIGHTS,
    EntrySpec,
    Generation,
    Manifest,
    OutputSpec,
    SlotSpec,
    Symbol,
    TensorSpec,
)

VOCAB = 8
CAPACITY = 16
SCALE = 3.0

SOURCE = r"""
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#define API __attribute__((visibility("default")))
enum { VOCAB = 8, CAPACITY = 16 };
typedef struct { int threads; int64_t value; } team;
API int64_t sv_abi(void) { return ABI; }
API int sv_isa_level(void) { return 1; }
API void *sv_team_new(int threads) { team *t = calloc(1, sizeof *t); t->threads = threads; return t; }
API void sv_team_free(void *t) { free(t); }
API int64_t sv_team_error_value(void *t) { return ((team *)t)->value; }

static int64_t step(team *t, const int64_t *sizes, int64_t past, const int64_t *ids, const float *scale, float *first,
                    float *logits, char *arena)
{
    memset(arena, 1, (size_t)(sizes[0] * sizes[1]));
    for (int64_t b = 0; b < sizes[0]; b++)
        for (int64_t i = 0; i < sizes[1]; i++) {
            int64_t id = ids[b * sizes[1] + i];
            if (id < 0 || id >= VOCAB) { t->value = id; return 1; }
            first[b * CAPACITY + past + i] = (float)id;
            float *row = logits + (b * sizes[1] + i) * VOCAB;
            memset(row, 0, VOCAB * sizeof *row);
            row[(id + (int64_t)first[b * CAPACITY]) % VOCAB] = *scale;
        }
    return 0;
}

API int64_t sv_arena_prefill(const int64_t *s) { return s[0] * s[1]; }
API int64_t sv_arena_decode(const int64_t *s) { return s[0] * s[1]; }
API void sv_shapes_prefill(const int64_t *s, int64_t *d)
{
    const int64_t dims[] = {s[0], s[1], s[0], s[1], VOCAB, s[0], CAPACITY};
    memcpy(d, dims, sizeof dims);
}
API void sv_shapes_decode(const int64_t *s, int64_t *d) { sv_shapes_prefill(s, d); }
API int64_t sv_run_prefill(void *t, const int64_t *s, void *const *b)
{
    return step(t, s, 0, b[0], b[1], b[2], b[3], b[4]);
}
API int64_t sv_run_decode(void *t, const int64_t *s, void *const *b)
{
    return step(t, s, *(int64_t *)b[1], b[0], b[2], b[3], b[4], b[5]);
}
API int64_t sv_profile_prefill(void *t, const int64_t *s, void *const *b, double *times)
{
    times[0] += 1e-3;
    return sv_run_prefill(t, s, b);
}
API int64_t sv_profile_decode(void *t, const int64_t *s, void *const *b, double *times)
{
    times[0] += 1e-3;
    return sv_run_decode(t, s, b);
}
API void sv_costs_prefill(const int64_t *s, int64_t position, double *flops, double *bytes)
{
    flops[0] = 1e6 * (double)(position + s[1]);
    bytes[0] = 8e6;
}
API void sv_costs_decode(const int64_t *s, int64_t position, double *flops, double *bytes)
{
    sv_costs_prefill(s, position, flops, bytes);
}
"""


def entry(*inputs: TensorSpec) -> EntrySpec:
    symbols = (Symbol("s0", 1, 64), Symbol("s1", 1, CAPACITY))
    return EntrySpec(symbols, inputs, ("scale",), ("first",), (TensorSpec("logits", "float32", ("s0", "s1", VOCAB)),))


IDS = TensorSpec("input_ids", "int64", ("s0", "s1"))
MANIFEST = Manifest(
    target="cpu",
    entries={"prefill": entry(IDS), "decode": entry(IDS, TensorSpec("past", "int64", ()))},
    isas=("scalar", "avx2"),
    state={"first": SlotSpec(0, "float32", ("s0", CAPACITY))},
    output=OutputSpec("dict"),
    generation=Generation(CAPACITY, (0,), uniform=True),
    threads=2,
)


def write(folder: Path, *, abi: int = 2, manifest: Manifest = MANIFEST) -> Path:
    """Build the artefact; both variants are the same code."""
    (folder / "code").mkdir(parents=True)
    for isa in (SCALAR, AVX2):
        build_shared(
            f"#define ABI {abi}\n{SOURCE}", folder / "code" / f"{isa.name}.so", dataclasses.replace(isa, flags=())
        )
    save_file({"scale": np.array([SCALE], np.float32)}, folder / WEIGHTS)
    step = Cost("step", ("pick lm",), "f32", index(0), (), streams=True)
    write_table(folder, {name: (step,) for name in manifest.entries})
    manifest.seal(folder)
    return folder
