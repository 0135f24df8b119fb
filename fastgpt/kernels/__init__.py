"""Triton kernels and their launchers: pointers and strides, nothing about models."""
