"""For tests of kernels: the numerics contract, and inputs that exercise every feature of an operation."""
