"""Triton kernels: quantize (with a transposed copy), transpose, INT8 GEMM, convolution.

Importing this package does not import Triton, so that it can be asked whether the kernels can run
(`launch.unavailable_reasons`) where Triton is not installed. Each kernel's file has one order: formula,
kernel, launcher. The references are the operators' (`qcompile.ops`).
"""
