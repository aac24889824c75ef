"""Kernels: one folder per op, its reference beside its fast versions."""
