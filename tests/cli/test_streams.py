"""Standard output and error: text as it comes, a reader that leaves, and streams that are full or missing."""

import functools
import os
import pty
import select
import signal
import subprocess
import sys

import pytest
from command_line import TOKENS, run

from fastgpt.checkpoints import loading

STOPS_HALFWAY = """
import itertools, sys, time
from fastgpt.cli.main import main
from fastgpt.generation import sampling

steps, sample = itertools.count(), sampling.Sampler.__call__

def sample_or_wait(sampler, logits):
    if next(steps) == 20:
        time.sleep(3600)
    return sample(sampler, logits)

sampling.Sampler.__call__ = sample_or_wait
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_text_streams_as_it_comes():
    """Through a terminal: the first characters are there before a later step, which waits to be interrupted."""
    reader, writer = pty.openpty()
    command = [sys.executable, "-c", STOPS_HALFWAY, "generate", "ROMEO:", *TOKENS]
    # A shell's background job ignores SIGINT, and so would its children.
    heed_interrupts = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE, preexec_fn=heed_interrupts)
    os.close(writer)
    first = b""
    while len(first) < 10:
        assert select.select([reader], [], [], 300)[0], f"only {first!r}"
        first += os.read(reader, 10)
    assert first.startswith(b"ROMEO:") and process.poll() is None
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=600)
    assert process.returncode == 130 and error.strip() == b"fastgpt: interrupted"
    os.close(reader)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 10])
def test_a_closed_pipe_is_not_an_error(count):
    """As `| head -c 10` does; nor is its status an error."""
    command = [sys.executable, "-m", "fastgpt", "generate", "A", "--max-new-tokens", "400"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(count).startswith(b"A")
    process.stdout.close()
    assert process.wait(timeout=600) == 0 and process.stderr.read() == b""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that is always full")
def test_an_output_that_is_full_is_an_error_in_one_line():
    command = [sys.executable, "-m", "fastgpt", "generate", "A", "--max-new-tokens", "1"]
    with open("/dev/full", "wb") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    expected = "fastgpt: error: standard output cannot be written to: No space left on device\n"
    assert (result.returncode, result.stderr) == (2, expected)


def test_without_standard_output(capsys, monkeypatch):
    """As processes beyond the first and daemons are."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        status, _, error = run(capsys, "generate", "A", "--max-new-tokens", 2)
    assert status == 0 and error.startswith("2 tokens, ")


def test_without_standard_error(tmp_path, capsys, monkeypatch):
    """As programs without a console are: nothing that belongs there comes elsewhere."""
    monkeypatch.setattr(loading, "SHOW_PROGRESS", 0)
    (tmp_path / "text.txt").write_text("ab\n" * 50)
    sizes = {"layers": 1, "heads": 1, "width": 8, "context": 8, "steps": 1, "batch-size": 2, "eval-windows": 1}
    arguments = [part for name, size in sizes.items() for part in (f"--{name}", size)]
    for names in (("stderr",), ("stdin", "stdout", "stderr")):
        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(sys, name, None)
            bad = run(capsys, "generate", "A", "--top-k", 0)
            generated = run(capsys, "generate", "A", "--max-new-tokens", 2, "--temperature", 0)
            trained = run(capsys, "train", "--text", tmp_path / "text.txt", "--out", tmp_path / names[0], *arguments)
        assert (bad[0], bad[1]) == (2, "") and generated[0] == trained[0] == 0
        assert "tok/s" not in generated[1]
