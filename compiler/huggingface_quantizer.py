"""What transformers calls to load a folder of ours: packed weights, aliases, parts that are left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sylvester.compiler.errors import CompileError
from sylvester.compiler.huggingface_modules import Absent, Packed, quantised
from sylvester.compiler.huggingface_parts import aliases_of
from sylvester.compiler.huggingface_quantized import METHOD, VERSION, WEIGHTS_KEY, parse_modules
from sylvester.compiler.huggingface_skips import DECODE_SKIP
from sylvester.compiler.weights import ALIAS_PREFIX

OURS = "compile the folder with sylvester instead: sv.compile(folder)"


@register_quantization_config(METHOD)
class SylvesterConfig(QuantizationConfigMixin):
    """`quantization_config` as compiler/huggingface_quantized.py describes it."""

    def __init__(
        self,
        quant_method: str = METHOD,
        version: int = VERSION,
        modules: Mapping[str, Any] | None = None,
        absent: Mapping[str, int] | None = None,
        passed: Iterable[str] = (),
        refused: str = "",
        partial: bool = False,
    ) -> None:
        self.quant_method, self.version = quant_method, version  # type: ignore[assignment]  # not one of its own
        self.modules, self.absent, self.passed = dict(modules or {}), dict(absent or {}), list(passed)
        self.partial = partial
        if refused:
            raise CompileError(f"transformers cannot run this folder: {refused}", hint=OURS)


@register_quantizer(METHOD)
class SylvesterQuantizer(HfQuantizer):
    """Replaces modules before weights are loaded; transformers then loads tensors by name and ties aliases."""

    quantization_config: SylvesterConfig

    def update_attn_implementation(self, config: Any) -> Any:
        """The first call with the config: weights are in the usual file for those who can read them."""
        if getattr(config, WEIGHTS_KEY, None) is not None:
            setattr(config, WEIGHTS_KEY, None)
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        settings = self.quantization_config
        if getattr(model.config, DECODE_SKIP, None):
            raise CompileError(f"transformers cannot skip {getattr(model.config, DECODE_SKIP)} in decoding", hint=OURS)
        for name, form in parse_modules(settings.to_dict()).items():
            _put(model, name, quantised(name, _module(model, name), form))
        for name, returns in settings.absent.items():
            _put(model, name, Absent(returns, getattr(_module(model, name), "layer_idx", None)))
        for name in settings.passed:
            _put(model, name, nn.Identity())
        own = set(model.state_dict())
        tied = {alias: to for alias, to in model.all_tied_weights_keys.items() if {alias, to} <= own}
        model.all_tied_weights_keys = tied | _aliases(checkpoint_files or (), own)
        # Tying pads biases to the first axis of the weight, which in a Conv1D is the other one.
        model._adjust_bias = _leave

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Packed tensors that the files lack are zeros where parts are to be dropped, else an error."""
        del model._adjust_bias
        for name, module in model.named_modules():
            if not isinstance(module, Packed):
                continue
            for end, tensor in module.named_parameters():
                if not getattr(tensor, "_is_hf_initialized", False):
                    if not self.quantization_config.partial:
                        raise CompileError(f"the files lack {f'{name}.{end}'!r}", hint="export the folder again")
                    tensor.data.zero_()
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Every tensor once for `save_pretrained`; the other names are in the metadata."""
        aliases = dict(model.all_tied_weights_keys)
        kept = {name: tensor for name, tensor in model.state_dict().items() if name not in aliases}
        return kept, {ALIAS_PREFIX + name: to for name, to in aliases.items()}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _leave(*_: Any) -> None:
    pass


def _module(model: Any, name: str) -> nn.Module:
    try:
        found: nn.Module = model.get_submodule(name)
    except AttributeError as error:
        wanted = model.config.architectures
        raise CompileError(
            f"{type(model).__name__} has no module {name!r}, the folder is of {wanted}",
            hint=f"load it as {wanted[0] if wanted else 'the class it was made from'}, or by its Auto class",
        ) from error
    return found


def _put(model: Any, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)


def _aliases(files: Iterable[str], own: set[str]) -> dict[str, str]:
    """Aliases of tensors that the model has."""
    found = {name: to for name, to in aliases_of(map(Path, files)).items() if name in own}
    for name, to in sorted(found.items()):
        if to not in own:
            raise CompileError(f"{name!r} is an alias of {to!r}, which the model lacks")
    return found
