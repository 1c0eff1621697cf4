"""The kernel families that can be tuned: the candidates of each, and how a harness calls an instance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import chain
from typing import cast

from sylvester.codegen.attention import RECORDS, attention, attention_header, part_floats, records_header
from sylvester.codegen.formats import format_headers
from sylvester.codegen.isa import Isa
from sylvester.codegen.layout import Format, FormatName
from sylvester.codegen.linear import linear_text
from sylvester.codegen.prelude import prelude, render
from sylvester.codegen.scalar import C_TYPES
from sylvester.codegen.space import Candidate, Problem, Space
from sylvester.compiler.cache_ops import record_bytes

Choices = tuple[Mapping[str, int], ...]
"""Values of macros that exclude each other; different choices of a family act on different problems and add up."""

LINEAR_CHOICES: dict[str, tuple[Choices, ...]] = {
    "f32": (({"SV_KC": 256}, {"SV_KC": 512}, {"SV_KC": 768}, {"SV_A_FLOATS": 1 << 16}, {"SV_A_FLOATS": 1 << 18}),),
    "bf16": (({"SV_BF16_KC": 512}, {"SV_BF16_KC": 2048}), ({"SV_BF16_AHEAD": 0}, {"SV_BF16_AHEAD": 1024})),
    "q8": (
        ({"SV_Q8_ROWS": 4, "SV_Q8_GROUPED_ROWS": 4}, {"SV_Q8_ROWS": 8, "SV_Q8_GROUPED_ROWS": 8}),
        ({"SV_Q8_AHEAD": 0}, {"SV_Q8_AHEAD": 1024}, {"SV_Q8_AHEAD": 8192}),
    ),
    "q4": (
        ({"SV_Q4_ROWS": 4}, {"SV_Q4_ROWS": 8}, {"SV_Q4_ROWS": 12}),
        ({"SV_Q4_AHEAD": 0}, {"SV_Q4_AHEAD": 1024}, {"SV_Q4_AHEAD": 4096}),
    ),
    "q3": (
        ({"SV_Q3_ROWS": 4}, {"SV_Q3_ROWS": 8}, {"SV_Q3_ROWS": 12}),
        ({"SV_Q3_AHEAD": 0}, {"SV_Q3_AHEAD": 1024}, {"SV_Q3_AHEAD": 4096}),
    ),
}
"""Per weight format; macros that other kernels read as well are not in it."""
ATTENTION_CHOICES: tuple[Choices, ...] = (
    ({"SV_ATT_BLOCKS": 8}, {"SV_ATT_BLOCKS": 32}, {"SV_ATT_KEYS": 512}),
    ({"SV_ATT_SPLIT": 128}, {"SV_ATT_FEW": 4}),
)
TILE_ROWS = ("SV_Q8_ROWS", "SV_Q8_GROUPED_ROWS", "SV_Q4_ROWS", "SV_Q3_ROWS")
FLOPS, BYTES = 60e9, 20e9
"""Rates of a thread that time is shared by before anything is measured."""


@dataclass(frozen=True, eq=False)
class Family:
    """A kernel with macros to choose. The C texts see the sizes `i[]`, the operands `p[]` and the pointer `cold`.

    `text`: an instance for an instruction set. `call`: statements that run it. `bytes`: sizes of the cold operand, of
    the float32 result p[0], and of the other operands. `choices`: the candidates beside the default.
    """

    name: str
    format: str
    text: Callable[[Isa], str]
    call: str
    scratch: str
    bytes: tuple[str, ...]
    choices: tuple[Choices, ...]

    def space(self, isa: Isa) -> Space:
        """The default first; without tiles of more rows than the variant has micro-kernels for."""
        tried = (c for c in chain.from_iterable(self.choices) if all(c.get(n, 0) <= isa.gemm_rows for n in TILE_ROWS))
        return Space.of(f"{self.name} {self.format}", *tried)

    def source(self, isa: Isa, candidate: Candidate) -> str:
        """The translation unit that times one candidate."""
        harness = render("tune.c.in", CALL=self.call, SCRATCH=self.scratch, BYTES=", ".join(self.bytes))
        return f"{self.text(isa.tuned(candidate.parameters))}\n#include <time.h>\n{harness}"

    @cache  # noqa: B019  (a family lives as long as the process)
    def kernel_hash(self, isa: Isa) -> str:
        """Changes with the text of the default candidate."""
        return sha256(self.source(isa, Candidate()).encode()).hexdigest()[:16]


@cache
def _linear(name: FormatName, group: int) -> Family:
    form = Format(name, group)

    def text(isa: Isa) -> str:
        parts = [prelude(isa), *format_headers({name}, isa), linear_text(form).replace("NAME", "sv_tuned")]
        return "\n".join(parts)

    return Family(
        "linear",
        str(form),
        text,
        "sv_tuned(t, p[0], NULL, p[1], cold, NULL, p[2], i[0], i[1], i[2], i[2], NULL, NULL);",
        "sv_tuned_scratch(i[2])",
        (
            f"(i[1] + SV_PANEL - 1) / SV_PANEL * sv_{name}_panel_bytes(i[2], {group})",
            "i[0] * i[1] * (int64_t)sizeof(float)",
            "i[0] * i[2] * (int64_t)sizeof(float)",
            f"i[0] * sv_{name}_row_bytes(i[2], {group})",
        ),
        LINEAR_CHOICES[name],
    )


@cache
def _attention(kind: str, width: int) -> Family:
    """One sequence: [heads, queries, width] against keys and values [kv heads, keys, width] side by side."""
    cache_type, _, sight = kind.partition("/")
    element = C_TYPES.get(cache_type, C_TYPES["u8"])
    row = record_bytes(width, RECORDS[cache_type]) if cache_type in RECORDS else width

    def text(isa: Isa) -> str:
        instance = attention("sv_tuned", width, width, cache=cache_type)
        header = [attention_header(), *([records_header()] if cache_type in RECORDS else [])]
        return "\n".join([prelude(isa), *header, instance, render("attention_call.c.in", NAME="sv_tuned")])

    heads, keys = f"i[0] * {width}, {width}", f"i[1] * {row}, {row}"
    return Family(
        "attention",
        kind,
        text,
        f"const {element} *value = (const {element} *)cold + i[3] * i[1] * {row};\n"
        f"sv_tuned_call(t, p[0], p[1], cold, value, NULL, NULL, p[2], {part_floats(width)}, 1, i[2], i[3], i[0], i[1], "
        f"0, {heads}, 0, {heads}, 0, {keys}, 0, {keys}, 0, 0, 0, 0, {width**-0.5}f, {int(sight == 'causal')}, 0, 0, "
        "NULL, NULL);",
        "sv_tuned_scratch",
        (
            f"2 * i[3] * i[1] * {row} * (int64_t)sizeof({element})",
            f"i[2] * i[0] * {width} * (int64_t)sizeof(float)",
            f"i[2] * i[0] * {width} * (int64_t)sizeof(float)",
            f"{part_floats(width)} * (int64_t)sizeof(float)",
        ),
        ATTENTION_CHOICES,
    )


def family(problem: Problem) -> Family | None:
    """The family that runs a problem, or None when there is nothing to choose."""
    name, _, group = problem.format.partition("/")
    if problem.family == "attention":
        return _attention(problem.format, problem.shape[-1])
    if problem.family != "linear" or name not in LINEAR_CHOICES:
        return None
    return _linear(cast(FormatName, name), int(group or 0))


def family_of(problem: Problem) -> Family:
    """The family of a problem that has one."""
    found = family(problem)
    if found is None:
        raise ValueError(f"nothing to tune in {problem}")
    return found


def estimate(problem: Problem) -> float:
    """Rough seconds of one run on one thread, to share time by before anything is measured."""
    if problem.family == "attention":
        queries, keys, heads, kv_heads, width = problem.shape
        return max(4 * queries * keys * heads * width / FLOPS, 8 * keys * kv_heads * width / BYTES)
    m, n, k = problem.shape
    return max(2 * m * n * k / FLOPS, 4 * (n * k + m * (n + k)) / BYTES)
