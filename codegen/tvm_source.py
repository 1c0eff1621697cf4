"""What TVM builds of a region as C text that takes the place of ours: its assembly, and a function that calls it."""

from __future__ import annotations

import re
from hashlib import sha256
from typing import Any

import tvm
from tvm import tirx

from sylvester.codegen.emit_loops import row_elements
from sylvester.codegen.index import product
from sylvester.codegen.index_text import c_text
from sylvester.codegen.isa import Isa
from sylvester.codegen.prelude import render
from sylvester.codegen.region import Refused, Region
from sylvester.codegen.scalar import C_TYPES
from sylvester.codegen.tvm_region import Schedule, function

ARCHITECTURE = "x86_64"
DROPPED = re.compile(r"\s*(\.(file|loc|ident|cfi_sections)\b|#|\.Ltmp\d+:)")
UNUSED = re.compile(r'\s*\.section\s+"?\.(debug|note|text\.tvm\.fp16)')
SECTION = re.compile(r"\s*\.(section|text|data|bss)\b")


def source(region: Region, schedule: Schedule, isa: Isa) -> str:
    """C text with NAME for the name of the function; `Refused` where TVM has no form for the region."""
    if isa.architecture != ARCHITECTURE:
        raise Refused(f"code for {isa.architecture}")
    symbol = f"sv_tvm_{sha256(f'{region.function.text} {schedule} {isa}'.encode()).hexdigest()[:12]}"
    lines = _assembly(function(region, schedule, symbol), symbol, isa)
    return _called(region, schedule, symbol, "\n".join(f'"{line}\\n"' for line in lines))


def _target(isa: Isa) -> Any:
    """Without the preference for half registers that compilers have for variants with the whole."""
    narrow = ["-prefer-256-bit"] if isa.vector == 16 else []
    attributes = [*(f"+{name}" for name in isa.features), *narrow]
    kind = {"kind": "llvm", "mtriple": f"{isa.architecture}-linux-gnu", "mcpu": isa.march}
    return tvm.target.Target({**kind, "mattr": attributes} if attributes else kind)


def _assembly(made: Any, symbol: str, isa: Isa) -> list[str]:
    """The lowering of `tvm.tirx.build` without what packs arguments: the symbol takes plain pointers and integers."""
    target, simple = _target(isa), tirx.transform
    module = tvm.IRModule({symbol: made})
    module = simple.BindTarget(target.with_host(target))(module)
    steps = [simple.VectorizeLoop(True), simple.UnrollLoop(), simple.StmtSimplify()]
    steps += [simple.RemoveNoOp(), simple.CommonSubexprElim(), simple.LowerIntrin()]
    module = tvm.ir.transform.Sequential(steps)(module)
    text = tvm.get_global_func("target.build.llvm")(module, target).inspect_source("asm")
    return ["\\t.pushsection .text", *_kept(text, symbol), f"\\t.hidden {symbol}", "\\t.popsection"]


def _kept(text: str, symbol: str) -> list[str]:
    """Lines for a C string, without debug sections and conversions of float16, with labels of their own."""
    lines, unused = [], False
    for line in text.splitlines():
        if SECTION.match(line):
            unused = UNUSED.match(line) is not None
        if line.strip() and not unused and not DROPPED.match(line):
            renamed = line.replace(".L", f".L{symbol}_").replace("\\", "\\\\").replace('"', '\\"')
            lines.append(renamed.replace("\t", "\\t"))
    return lines


def _called(region: Region, schedule: Schedule, symbol: str, assembly: str) -> str:
    sizes = {size: f"n{n}" for n, size in enumerate(region.function.sizes)}
    rows = {f"l{n}": name for n, name in enumerate(region.rows_in_memory)}
    types = {name: C_TYPES[region.buffers[name].dtype] for name in rows.values()}
    memory = [
        f"  {types[name]} {local}[{row_elements(region.nest, name)}] __attribute__((aligned(64)));\n"
        for local, name in rows.items()
    ]
    passed = [*(f"p{n}" for n in range(len(region.function.buffers))), *rows, *sizes.values(), "lo", "hi"]
    pointers = ["const void *"] * (len(passed) - len(sizes) - 2)
    return render(
        "tvm_call.c.in",
        SYMBOL=symbol,
        TYPES=", ".join([*pointers, *["int64_t"] * (len(sizes) + 2)]),
        ASSEMBLY=assembly,
        SIGNATURE=region.function.text.partition("\n")[0],
        ROWS="".join(memory),
        COUNT=c_text(product(region.nest.rows), lambda a: sizes[a]),  # type: ignore[index]
        GRAIN=schedule.lanes if schedule.rows else 1,
        ARGUMENTS=", ".join(passed),
    )
