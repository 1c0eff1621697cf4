"""The kernel of a linear step: one driver text for every weight format, with its norm and its epilogue filled in."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha1

from sylvester.codegen.epilogue import Finish, finish
from sylvester.codegen.hadamard import row_call, row_header
from sylvester.codegen.index import Index, index
from sylvester.codegen.layout import F32, Format
from sylvester.codegen.lazy import Arithmetic, Buffer, Extern, Linear, Pointer, RowNorm
from sylvester.codegen.prelude import render

FEW_ROWS = 4
"""Rows that every thread packs for itself (SV_FEW_ROWS)."""
ARITHMETIC: dict[str, Arithmetic] = {"bf16": "bf16", "q8": "int8", "q4": "int8", "q3": "int8"}

_SECOND = """float *c = z ? z + row * n + col : tiles;
            const int64_t ld = z ? n : SV_PANEL;
            o.panel += size, o.bias = bias ? bias + n + col : NULL, o.c = c, o.ldc = ld;
            {multiply}"""


def linear_text(form: Format = F32, *, norm: RowNorm | None = None, ways: int = 1, done: Finish | None = None) -> str:
    """C text of an instance, with NAME for its name."""
    step = ", const float *step" if form.static else ""
    return render(
        "linear.c.in",
        NAME="NAME",
        FORMAT=form.name,
        TITLE=form,
        GROUP=form.group,
        RECORD=("2 * " if form.records == 2 else "") + f"sv_{_row_format(form)}_row_bytes(k, {form.group})",
        ROW_BYTES="record / 2" if form.records == 2 else "record",
        PACK=_pack_row(form),
        MULTIPLY=_multiply(form),
        WAYS=ways,
        PARTS=_parts(form, not form.floats or norm is not None),
        PACKS=int(not form.floats or norm is not None),
        NORM="" if norm is None else _norm(norm),
        SECOND=_SECOND.format(multiply=_multiply(form)) if ways > 1 else "",
        PARAMETERS=step + ", const float *scale, const float *shift" + (done.parameters if done else ""),
        FINISH=done.function if done else "",
        EPILOGUE=done.call if done else "",
    )


def _pack_row(form: Format) -> str:
    rounding = f", {form.bits}, {'step' if form.static else 'NULL'}" if form.quantised else ""
    return f"sv_{_row_format(form)}_pack_row(packed + r * record, row, k, {form.group}{rounding});"


def _parts(form: Format, packs: bool) -> str:
    if form.strided:
        return "sv_strided_parts(m, panels, t->nt)"
    return f"sv_row_parts(m, {int(packs)} ? record / (int64_t)sizeof(float) : k, panels, t->nt)"


def _row_format(form: Format) -> str:
    return "f32" if form.floats else form.name


def _multiply(form: Format) -> str:
    return f"sv_{form.name}_panel(&o);" if form.records == 1 else f"sv_q_twice(&o, sv_{form.name}_panel);"


def _norm(norm: RowNorm) -> str:
    arguments = "scale, shift" if norm.kind == "layer" else "scale"
    copied = "memcpy(normal, row, (size_t)k * sizeof(float)), row = normal;"
    normal = f"sv_{norm.kind}_row(normal, row, {arguments}, {float(norm.eps)!r}f, k), row = normal;"
    turned = f" {row_call('normal', 'k', norm.hadamard, norm.transposed)}" if norm.hadamard else ""
    return (copied if norm.kind == "none" else normal) + turned


def _rotation(norm: RowNorm | None) -> str:
    return row_header(norm.hadamard, norm.transposed) if norm and norm.hadamard else ""


def linear_extern(step: Linear, buffers: dict[str, Buffer]) -> Extern:
    """The step as a call of its kernel instance."""
    done = None if step.epilogue is None else finish(step.epilogue, step.outputs, step.n)
    ways, y = len(step.outputs), step.outputs[0] if step.epilogue is None else step.epilogue.buffer
    text = linear_text(step.format, norm=step.norm, ways=ways, done=done)
    kind = str(replace(step.format, group=0)).replace(" ", "_")
    name = f"sv_linear_{kind}_{sha1(text.encode()).hexdigest()[:10]}"
    second = step.outputs[1] if ways > 1 and step.epilogue is None else None
    parameters = [_pointer(p) for p in (*([step.step] if step.step else []), *step.parameters)]
    extra = [Pointer(b, index(0), buffers[b].dtype) for b in done.buffers] if done else []
    operands = (step.rows.buffer, step.weight, step.bias, step.step, *step.parameters, *(done.buffers if done else ()))
    written = [b for b in (y, second, step.records) if b is not None]
    return Extern(
        name,
        _rotation(step.norm) + text.replace("NAME", name),
        (
            Pointer(y, index(0)),
            _pointer(second),
            step.rows,
            Pointer(step.weight, index(0), buffers[step.weight].dtype),
            _pointer(step.bias),
            None if step.records is None else Pointer(step.records, index(0), "u8"),
            step.m,
            step.n,
            step.k,
            step.stride,
            *parameters,
            *extra,
            *(done.sizes if done else ()),
        ),
        writes=tuple(written),
        reads=tuple(b for b in operands if b is not None),
        work=step.m * step.n * step.k * ways * step.format.records,
        scratch=(f"{name}_scratch", (step.k,)),
        bytes=_bytes(step, buffers, done),
        arithmetic=ARITHMETIC.get(step.format.name, "f32"),
        formats=(step.format.name,),
        label=_label(step),
    )


def _label(step: Linear) -> str:
    """Everything that the call computes."""
    before = str(step.norm).replace(" ", "_") if step.norm else ""
    after = step.epilogue.label if step.epilogue else ""
    return "; ".join(label for label in (before, step.label, after) if label)


def _bytes(step: Linear, buffers: dict[str, Buffer], done: Finish | None) -> Index:
    """Each operand once; outputs that an epilogue reads do not reach memory."""
    outputs = 1 if step.epilogue is not None else len(step.outputs)
    total = buffers[step.weight].nbytes + step.m * (step.k + step.n * outputs) * 4
    for name in done.buffers if done else ():
        total = total + buffers[name].nbytes
    return total


def _pointer(name: str | None) -> Pointer | None:
    return None if name is None else Pointer(name, index(0))


def record_bytes(form: Format, k: int) -> int:
    """An upper bound, over all variants, of the bytes of one packed row."""
    multiple = form.group or 32
    whole = max(4 * (k + 4), 2 * -(-k // multiple) * multiple)
    groups = -(-k // form.group) if form.group else 1
    return (-(-whole // 64) * 64 + -(-4 * groups // 64) * 64 + 128) * form.records
