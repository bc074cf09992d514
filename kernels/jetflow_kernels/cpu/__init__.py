"""What a CPU computes of each row alone, in C that this machine's compiler builds on first use."""

from jetflow_kernels.cpu.library import CpuKernels, cpu_kernels

__all__ = ["CpuKernels", "cpu_kernels"]
