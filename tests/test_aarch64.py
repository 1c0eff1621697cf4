"""Code for AArch64, cross-compiled and run under qemu-user: the kernel tests again, and a whole artefact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import sylvester as sv
from sylvester.backends.tensor_file import map_tensors
from sylvester.backends.toolchain import build_shared
from sylvester.codegen.isa import DOTPROD, NEON
from sylvester.codegen.prelude import prelude
from sylvester.compiler.errors import ArtefactError, Unsupported
from sylvester.compiler.manifest import WEIGHTS, read
from sylvester.compiler.target import host_architecture
from tests import (
    emulator,
    test_kernels_attention_int8,
    test_kernels_bf16,
    test_kernels_conv2d,
    test_kernels_gemm,
    test_kernels_hadamard,
    test_kernels_math,
    test_kernels_records,
    test_kernels_shared,
)

pytestmark = [
    pytest.mark.skipif(host_architecture() == "aarch64", reason="the other tests cover this machine"),
    pytest.mark.skipif(bool(emulator.missing()), reason=emulator.missing() or "emulated"),
]
KERNELS = {
    "linear": lambda isa: test_kernels_gemm.test_linear(isa, 2),
    "matmul": lambda isa: test_kernels_gemm.test_matmul_takes_any_strides(isa, 3),
    "empty": test_kernels_gemm.test_empty_sizes,
    "exp": lambda isa: test_kernels_math.test_close_to_float64(isa, "exp"),
    "bf16": lambda isa: test_kernels_bf16.test_panels(isa, ""),
    "records": lambda isa: test_kernels_records.check_cases(
        isa, 2, [(40, "none", 8), (150, "none", 4)], test_kernels_records.USED[:5]
    ),
    "record rows": lambda isa: test_kernels_records.test_rows_are_written_as_the_op_does(isa, 4),
    "attention int8": lambda isa: test_kernels_attention_int8.check(
        isa, 2, test_kernels_attention_int8.INSTANCES[:3], [test_kernels_attention_int8.CASE]
    ),
    "shared records": lambda isa: test_kernels_shared.check_records(isa, 8),
    "conv2d": lambda isa: test_kernels_conv2d.test_conv2d(isa, 2, 0),
    "hadamard": lambda isa: test_kernels_hadamard.test_every_kind_of_base(isa, "lanes"),
    "hadamard fourier": lambda isa: test_kernels_hadamard.test_every_kind_of_base(isa, "fourier"),
}
"""The bodies of the kernel tests, which take any variant."""


@pytest.mark.parametrize("isa", [NEON, DOTPROD], ids=lambda isa: isa.name)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel(kernel, isa):
    KERNELS[kernel](isa)


@pytest.mark.parametrize(("cpu", "level"), [(emulator.OLD_CPU, NEON.level), (emulator.NEW_CPU, DOTPROD.level)])
def test_level_of_the_emulated_cpu(cpu, level, tmp_path):
    library = emulator.Library(build_shared(prelude(NEON), tmp_path / "neon.so", NEON), cpu)

    assert library.call("sv_isa_level", 1, [], []) == level
    library.close()


class Network(nn.Module):
    """A transformer block with odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(40), nn.Linear(40, 120)
        self.wide, self.narrow = nn.Linear(40, 70), nn.Linear(70, 40)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (5, 8)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return torch.softmax(x + self.narrow(nn.functional.gelu(self.wide(y))), -1)


def network() -> Network:
    torch.manual_seed(0)
    return Network().eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = sv.Target("cpu", arch="aarch64", isas=("neon", "dotprod"))
    with sv.compile(network(), (torch.randn(2, 7, 40),), target=target) as compiled:
        with pytest.raises(Unsupported, match=f"compiled for aarch64, this machine is {host_architecture()}"):
            compiled(torch.randn(2, 7, 40))
        return compiled.save(tmp_path_factory.mktemp("aarch64") / "network")


def test_artefact_for_another_architecture_is_not_loaded_here(folder):
    assert read(folder).arch == "aarch64"
    with pytest.raises(ArtefactError, match=f"is for aarch64, this machine is {host_architecture()}"):
        sv.load(folder)


@pytest.mark.parametrize(("isa", "cpu"), [("neon", emulator.OLD_CPU), ("dotprod", emulator.NEW_CPU)])
def test_artefact_computes_what_the_model_computes(folder, isa, cpu):
    entry, weights = read(folder).entries["forward"], map_tensors(folder / WEIGHTS)
    x = torch.randn(3, 5, 40)
    named = dict(zip(entry.inputs[0].shape, x.shape, strict=True))
    y, arena = np.full((3, 5, 40), np.nan, np.float32), np.zeros(1 << 20, np.uint8)
    library = emulator.Library(folder / "code" / f"{isa}.so", cpu)

    sizes = [named[symbol.name] for symbol in entry.symbols]
    code = library.call("sv_run_forward", 2, sizes, [x.numpy(), *(weights[n] for n in entry.weights), y, arena])

    library.close()
    assert code == 0
    expected = network().double()(x.double()).detach().numpy()
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
