"""Fixtures that several test files share, and the rule that tests marked `gpu` need a GPU."""

import signal

import pytest
import torch

# A shell's background job ignores SIGINT, and so would what the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def same_random_numbers():
    """What a test draws is the same in every run, whatever ran before it."""
    torch.manual_seed(0)
