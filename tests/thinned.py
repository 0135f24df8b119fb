"""Products of parameters of which `make test` takes a share."""

import itertools

import pytest


def thinned(*axes, one_of: int) -> list:
    """Every combination of the axes' values, for pytest.mark.parametrize. One in `one_of` of them is always tested, spread so that
    each value meets each other axis's in turn; the rest belongs to the exhaustive tests."""
    params = []
    for combination in itertools.product(*map(enumerate, axes)):
        indices, values = zip(*combination)
        params.append(pytest.param(*values, marks=pytest.mark.exhaustive if sum(indices) % one_of else ()))
    return params
