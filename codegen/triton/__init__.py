"""Kernels for GPUs in Triton, one family a file; `codegen.gpu_kernel.text` joins a file with those that it imports."""
