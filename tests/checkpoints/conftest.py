"""A checkpoint that most files here edit."""

import pytest
from checkpoint_files import LLAMA, write


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model", LLAMA)
