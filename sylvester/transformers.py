"""Import this, and `transformers` loads the folders of `export_hf`: quantised layers, skipped parts, shared tensors."""

from __future__ import annotations

try:
    from sylvester.compiler.huggingface_quantizer import SylvesterConfig, SylvesterQuantizer
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "transformers":
        raise
    raise ModuleNotFoundError(
        "sylvester.transformers needs transformers: pip install 'sylvester[hf]'", name=error.name
    ) from error

__all__ = ["SylvesterConfig", "SylvesterQuantizer"]
