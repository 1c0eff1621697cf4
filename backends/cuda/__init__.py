"""NVIDIA GPUs: kernels in Triton, built ahead of time, started by the driver."""
