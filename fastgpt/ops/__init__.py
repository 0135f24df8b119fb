"""Operations: one file each, holding its contract, input checks, reference and choice of implementation."""
