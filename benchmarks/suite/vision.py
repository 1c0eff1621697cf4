"""Models that are measured whole: those of tests/zoo.py, and image models of real size at 224 x 224 pixels, batch 1.

The image models have random weights and are built from their configurations.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn import init

from tests import zoo

MODELS = {
    "resnet50": lambda: hf.ResNetModel(hf.ResNetConfig()),
    "mobilenet-v2": lambda: hf.MobileNetV2Model(hf.MobileNetV2Config()),
    "convnext-tiny": lambda: hf.ConvNextModel(hf.ConvNextConfig()),
}
IMAGES = tuple(MODELS)


@dataclass(frozen=True)
class Case:
    """A model in eval mode with its inputs; `dynamic` as in `sylvester.compile`."""

    model: nn.Module
    inputs: dict[str, Tensor]
    dynamic: dict[str, dict[int, object]]


def case(name: str) -> Case | zoo.Case:
    """The model of a name of `IMAGES` or of the zoo."""
    return _image_case(name) if name in IMAGES else zoo.case(name)


@functools.cache
def _image_case(name: str) -> Case:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(sum(name.encode()))
        model = MODELS[name]().eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                init.kaiming_normal_(parameter)
        return Case(model, {"pixel_values": torch.randn(1, 3, 224, 224)}, {"pixel_values": {}})
