"""Lists of passes under one name: `passes="w4a8"` stands for the tuple W4A8."""

from __future__ import annotations

from sylvester.compiler.pipeline import Pass
from sylvester.passes.quantize import Quantize
from sylvester.passes.quantize_attention import QuantizeAttention
from sylvester.passes.quantize_cache import QuantizeCache

BF16: tuple[Pass, ...] = (Quantize(weights="bf16"), QuantizeCache(), QuantizeAttention())
W8A8: tuple[Pass, ...] = (Quantize(weights="int8"), QuantizeCache(), QuantizeAttention())
W4A8: tuple[Pass, ...] = (Quantize(weights="int4"), QuantizeCache(), QuantizeAttention())
