"""A model whose weights are frozen and rounded, with adapters that train: read, written and merged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sylvester.compiler.errors import CompileError
from sylvester.compiler.halo_module import HaloModule, Report
from sylvester.compiler.halo_ops import level_of
from sylvester.compiler.halo_quantise import Rounded
from sylvester.compiler.halo_rotate import rotate
from sylvester.compiler.training_trace import Captured

PREFIX = "base_model.model."
"""What PEFT writes before the names of modules."""
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class Base:
    """A frozen weight: all its names in the model, its layer, its type, and whether it is [in, out] there."""

    names: tuple[str, ...]
    layer: str
    dtype: torch.dtype
    turned: bool


@dataclass(frozen=True)
class Adapters:
    """B A alpha / rank is added to the weights of the layers."""

    rank: int
    alpha: float
    dropout: float
    layers: tuple[str, ...]

    @property
    def factor(self) -> float:
        return self.alpha / self.rank


class LoraModule(HaloModule):
    """Calls like those of the model. `base_values` and `base_scale` of a layer are W R, `lora_A` and `lora_B` train."""

    def __init__(
        self,
        frozen: nn.Module,
        captured: Captured,
        report: Report,
        simulate: bool,
        bases: tuple[Base, ...],
        adapted: Adapters,
        names: tuple[str, ...],
    ) -> None:
        super().__init__(frozen, captured, report, simulate)
        self.adapted, self._bases, self._names = adapted, bases, names

    def adapters(self) -> dict[str, Tensor]:
        """What has been trained, under the names that PEFT gives."""
        named = ((layer, part) for layer in self.adapted.layers for part in ("lora_A.weight", "lora_B.weight"))
        return {f"{PREFIX}{layer}.{part}": self.get_parameter(f"{layer}.{part}") for layer, part in named}

    def save_adapters(self, folder: str | Path) -> None:
        """Write the adapters as PEFT does: `PeftModel.from_pretrained` reads the folder."""
        place, found = Path(folder), self.adapted
        place.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().contiguous() for name, tensor in self.adapters().items()}, place / WEIGHTS)
        turned = {base.layer: base.turned for base in self._bases}
        config = {
            "peft_type": "LORA", "r": found.rank, "lora_alpha": found.alpha, "lora_dropout": found.dropout,
            "bias": "none", "target_modules": list(found.layers),
            "fan_in_fan_out": all(turned[layer] for layer in found.layers),
            "base_model_name_or_path": None, "task_type": None, "inference_mode": True,
        }  # fmt: skip
        (place / CONFIG).write_text(json.dumps(config, indent=2))

    def load_adapters(self, source: str | Path | Mapping[str, Tensor]) -> None:
        """Take adapters from a folder or from what `adapters` gives; they must be those of the same layers and rank."""
        given = source if isinstance(source, Mapping) else load_file(Path(source) / WEIGHTS)
        own = self.adapters()
        different = [name for name, tensor in own.items() if name not in given or given[name].shape != tensor.shape]
        if wrong := sorted({*different, *(given.keys() - own.keys())}):
            raise CompileError(
                f"the adapters do not fit: {wrong[:3]}",
                hint=f"expected those of rank {self.adapted.rank} for {list(self.adapted.layers[:3])} and others",
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(given[name])

    @torch.no_grad()
    def merged(self, model: nn.Module | None = None) -> dict[str, Tensor]:
        """The state dict of the model with W + B A alpha / rank.

        W is that of `model`, the one that the module was made from; without it, the rounded W, which is less precise.
        """
        original = None if model is None else dict(model.named_parameters(remove_duplicate=False))
        state = {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}
        for base in self._bases:
            weight = self._weight(base) if original is None else original[base.names[0]].detach()
            state |= dict.fromkeys(base.names, (weight + self._change(base).to(weight.device)).to(base.dtype))
        return {name: state[name] for name in self._names}

    def _weight(self, base: Base) -> Tensor:
        values, scale = (self.get_buffer(f"{base.layer}.base_{part}") for part in ("values", "scale"))
        wide = Rounded(values, scale).wide()
        wide = rotate(wide, transposed=True) if level_of(self.report.level).forward.middle else wide
        return wide.t() if base.turned else wide

    def _change(self, base: Base) -> Tensor:
        if base.layer not in self.adapted.layers:
            return torch.zeros(())
        a, b = (self.get_parameter(f"{base.layer}.{part}.weight").double() for part in ("lora_A", "lora_B"))
        change = b @ a * self.adapted.factor
        return change.t() if base.turned else change
