"""`quantization_config` of a Hugging Face folder: how packed weights are read, and which modules are not there.

{"quant_method": "sylvester", "version": 1,
 "modules": {"model.layers.0.mlp.up_proj": {"op": "linear", "bits": 4, "group": 32, "activations": 8}},
 "absent": {"model.layers.1.self_attn": 2}, "passed": ["model.layers.1.input_layernorm"]}

A module of `modules` has `weight_packed`, with whole numbers `weight_scale` [n, groups], and where it is static
`input_step` [1] in the place of its weight. One of `absent` adds nothing: it returns zeros, alone (0) or first of a
tuple of so many. Those of `passed` return what they get.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from sylvester.compiler import quantized_ops as dialect
from sylvester.compiler.calls import arguments
from sylvester.compiler.errors import CompileError
from sylvester.compiler.program import value
from sylvester.compiler.quantization import GRIDS
from sylvester.compiler.quantized_ops import GROUPS, group_size

KEY, METHOD, VERSION = "quantization_config", "sylvester", 1
MODULES, NOTHING, PASSED, REFUSED, PARTIAL = "modules", "absent", "passed", "refused", "partial"
PACKED, SCALE, STEP = "weight_packed", "weight_scale", "input_step"
WEIGHTS_KEY, GUARD = "transformers_weights", "needs-import-sylvester.transformers.safetensors"
"""A name that transformers looks for, and fails to find, unless the loader is there: else it would make up weights."""
LINEAR, EMBEDDING = "linear", "embedding"
BITS = {16: dialect.BF16, 8: dialect.INT8, 4: dialect.PACKED, 3: dialect.PACKED}
LINEARS = {16: dialect.linear_bf16, 8: dialect.linear_w8, 4: dialect.linear_w4, 3: dialect.linear_w3}
WIDENED = {16: dialect.widen_bf16, 8: dialect.dequantize_w8, 4: dialect.dequantize_w4, 3: dialect.dequantize_w3}


@dataclass(frozen=True)
class Format:
    """How a weight [n, k] is stored and read; `group` columns share a scale, with 0 a row; rows of x are rounded to
    `activations` bits, `static` with one step.
    """

    op: str
    bits: int
    group: int = 0
    activations: int = 16
    static: bool = False

    @property
    def whole(self) -> bool:
        return self.bits in GRIDS

    def empty(self, rows: int, depth: int, device: torch.device) -> dict[str, Tensor]:
        """Tensors without values for a weight [rows, depth], by name."""
        numbers = depth * self.bits // 8 if self.whole else depth
        made = {PACKED: torch.empty((rows, numbers), dtype=BITS[self.bits], device=device)}
        if self.whole:
            shape = (rows, -(-depth // self.group) if self.group else 1)
            made[SCALE] = torch.empty(shape, dtype=torch.float32, device=device)
        return made | ({STEP: torch.empty(1, dtype=torch.float32, device=device)} if self.static else {})

    def to_dict(self) -> dict[str, Any]:
        """For config.json: what a format has none of is left out."""
        kept = {"op", "bits", *({"group"} if self.whole else ())}
        if self.whole and self.op == LINEAR:
            kept |= {"activations", "static"} if self.static else {"activations"}
        return {key: item for key, item in asdict(self).items() if key in kept}

    @staticmethod
    def parse(name: str, given: object) -> Format:
        """One entry of `modules`; `CompileError` names what is malformed."""
        if not isinstance(given, Mapping) or not {"op", "bits"} <= set(given) <= set(Format.__annotations__):
            shown = sorted(given) if isinstance(given, Mapping) else type(given).__name__
            raise CompileError(f"{KEY} of {name!r} has {shown}, expected some of {list(Format.__annotations__)}")
        made = Format(**given)
        known = {
            "op": (LINEAR, EMBEDDING), "bits": tuple(BITS), "group": (0, *GROUPS), "activations": (16, 8, 4),
            "static": (False, True),
        }  # fmt: skip
        for field, choices in known.items():
            if getattr(made, field) not in choices:
                raise CompileError(f"{KEY} of {name!r} has {field}={getattr(made, field)!r}, expected one of {choices}")
        return made


@dataclass(frozen=True)
class Stored:
    """A format and the program's tensors in it, by name: nodes of one call."""

    format: Format
    tensors: Mapping[str, fx.Node]


def stored_linear(node: fx.Node) -> Stored | None:
    """What a layer with a rounded weight reads; None for any other node."""
    bits = next((bits for bits, op in LINEARS.items() if op.target is node.target), None)
    if bits is None:
        return None
    given = arguments(node)
    if bits not in GRIDS:
        return Stored(Format(LINEAR, bits), {PACKED: given["weight"]})
    tensors = {PACKED: given["weight"], SCALE: given["scales"]}
    tensors |= {STEP: given["step"]} if given["step"] is not None else {}
    depth = value(given["x"]).shape[-1]
    return Stored(Format(LINEAR, bits, _group(depth, tensors[SCALE]), given["bits"], STEP in tensors), tensors)


def stored_table(node: object) -> Stored | None:
    """What a table is widened from; None for any other node."""
    if not isinstance(node, fx.Node):
        return None
    bits = next((bits for bits, op in WIDENED.items() if op.target is node.target), None)
    if bits is None:
        return None
    given = arguments(node)
    if bits not in GRIDS:
        return Stored(Format(EMBEDDING, bits), {PACKED: given["weight"]})
    group = _group(value(node).shape[-1], given["scales"])
    return Stored(Format(EMBEDDING, bits, group), {PACKED: given["weight"], SCALE: given["scales"]})


def _group(depth: int, scales: fx.Node) -> int:
    groups = int(value(scales).shape[1])
    return 0 if groups == 1 else group_size(int(depth), groups)


def parse_modules(config: Mapping[str, Any]) -> dict[str, Format]:
    """The formats of a `quantization_config`; `CompileError` for another version or what the loader cannot run."""
    if (version := config.get("version")) != VERSION:
        hint = "install the version of sylvester that wrote the folder, or a later one"
        raise CompileError(f"{KEY} has version {version!r}, expected {VERSION}", hint=hint)
    given = config.get(MODULES, {})
    if not isinstance(given, Mapping):
        raise CompileError(f"{MODULES} of {KEY} is a {type(given).__name__}, expected an object of names")
    return {name: Format.parse(name, form) for name, form in given.items()}


def with_all_parts(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a folder of ours with every module in its place, some without values: a capture drops them."""
    if not is_ours(config):
        return config
    kept = {k: v for k, v in config[KEY].items() if k not in (NOTHING, PASSED, REFUSED)}
    return {k: v for k, v in config.items() if k != WEIGHTS_KEY} | {KEY: kept | {PARTIAL: True}}


def is_ours(config: Mapping[str, Any]) -> bool:
    found = config.get(KEY)
    return isinstance(found, Mapping) and found.get("quant_method") == METHOD
