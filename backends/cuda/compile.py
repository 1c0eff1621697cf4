"""Kernels as cubins, built without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sylvester.backends.cuda.modules import load, require_triton
from sylvester.codegen.gpu_architectures import SHARED
from sylvester.codegen.gpu_kernel import Kernel
from sylvester.compiler.errors import CompileError

WARP = 32


@dataclass(frozen=True)
class Cubin:
    """Machine code of one kernel. `shared` bytes of shared memory; the driver takes two null pointers after the
    arguments, which are for scratch memory that no kernel here has."""

    function: str
    image: bytes
    shared: int
    warps: int


def build(kernel: Kernel, arch: str) -> Cubin:
    """`CompileError` for an architecture that is not among `SHARED`, a kernel that Triton refuses, or types in
    another order than arguments are passed in."""
    if arch not in SHARED:
        raise CompileError(f"found the architecture {arch!r}, expected one of {list(SHARED)}")
    compiled = _compiled(kernel, arch)
    if compiled.metadata.global_scratch_size:
        raise CompileError(f"the kernel {kernel.function} asks for scratch memory, which is not given")
    return Cubin(compiled.metadata.name, compiled.asm["cubin"], compiled.metadata.shared, compiled.metadata.num_warps)


def _compiled(kernel: Kernel, arch: str) -> Any:
    require_triton()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(load(kernel.text, interpreted=False), kernel.function)
    names = function.arg_names
    given = [name for name in names if name in kernel.types]
    if given != list(kernel.types):
        raise CompileError(f"{kernel.function} takes {given} in this order, found types of {list(kernel.types)}")
    signature = {name: kernel.types.get(name, "constexpr") for name in names}
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in kernel.aligned}
    source = ASTSource(function, signature, dict(kernel.constants), hints)
    options = {"num_warps": kernel.warps, "num_stages": kernel.stages, "enable_fp_fusion": True}
    try:
        return triton.compile(source, target=GPUTarget("cuda", int(arch.removeprefix("sm_")), WARP), options=options)
    except triton.CompilationError as cause:
        raise CompileError(f"Triton refuses the kernel {kernel.function} for {arch}: {cause}") from cause
