"""Starting the command: Ctrl-C and errors while modules are imported, help, and what is not loaded for it."""

import argparse
import functools
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from command_line import run

import fastgpt
from fastgpt import startup
from fastgpt.cli.main import COMMANDS, parser

WAITS = "print('importing', flush=True)\nimport time\ntime.sleep(600)"


def interrupted(command, folder):
    """(exit status, stdout, stderr) of a program that is interrupted when it prints a line; its modules may be in `folder`."""
    folders = os.pathsep.join([str(folder), str(Path(fastgpt.__file__).parents[1])])
    # A shell's background job ignores SIGINT, and so would its children.
    heed_interrupts = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": folders}, cwd=folder,
        preexec_fn=heed_interrupts, text=True,
    )  # fmt: skip
    line = process.stdout.readline()
    assert line, process.communicate()
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=60)
    return process.returncode, line + out, error


def started(how, folder):
    """The command `fastgpt`, as a module or an installed script."""
    (folder / "bin").mkdir()
    (folder / "bin" / "fastgpt").write_text("from fastgpt.__main__ import main\nmain()")
    return [sys.executable, *(["-m", "fastgpt"] if how == "-m" else [folder / "bin" / "fastgpt"])]


@pytest.mark.parametrize("imported, how", [("torch", "-m"), ("torch", "script"), ("tqdm", "-m"), ("tqdm", "script")])
def test_interrupted_while_it_starts(imported, how, tmp_path):
    """A module that the command imports, PyTorch or a later one, takes its time."""
    (tmp_path / f"{imported}.py").write_text(WAITS)
    command = [*started(how, tmp_path), "bench"]
    assert interrupted(command, tmp_path) == (130, "importing\n", "\nfastgpt: interrupted\n")


@pytest.mark.parametrize("how", ["-m", "script"])
@pytest.mark.parametrize(
    "code, sentence",
    [
        ("raise ImportError('libtorch.so: cannot open shared object file')", "libtorch.so: cannot open shared object file"),
        ("raise ValueError('TORCH_SETTING: expected a number')", "TORCH_SETTING: expected a number"),
        (
            "import tokenizers_of_none.models",
            "No module named 'tokenizers_of_none', which fastgpt needs: pip install tokenizers_of_none",
        ),
    ],
    ids=["ImportError", "ValueError", "a missing package"],
)
def test_errors_while_it_starts_are_one_sentence(code, sentence, how, tmp_path):
    (tmp_path / "torch.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(fastgpt.__file__).parents[1])])}
    result = subprocess.run([*started(how, tmp_path), "info"], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"fastgpt: error: {sentence}\n")


@pytest.mark.slow
def test_a_wrong_cpu_level_is_one_sentence():
    command = [sys.executable, "-m", "fastgpt", "info"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"FASTGPT_CPU_LEVEL": "foo"})
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch("fastgpt: error: FASTGPT_CPU_LEVEL: expected one of .* on this CPU, got 'foo'\n", result.stderr)


def test_a_bug_while_it_starts_keeps_its_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("{}[0]")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(fastgpt.__file__).parents[1])])}
    result = subprocess.run([*started("-m", tmp_path), "info"], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 1 and result.stderr.startswith("Traceback") and result.stderr.endswith("KeyError: 0\n")


CATCHES = """
try:
    import fastgpt
except KeyboardInterrupt:
    print("caught")
"""


@pytest.mark.parametrize("how", ["-m", "script"])
def test_a_program_that_imports_fastgpt_is_interrupted_as_ever(how, tmp_path):
    (tmp_path / "torch.py").write_text(WAITS)
    (tmp_path / "fastgpt_server.py").write_text(CATCHES)
    program = ["-m", "fastgpt_server"] if how == "-m" else [tmp_path / "fastgpt_server.py"]
    assert interrupted([sys.executable, *program, "-m", "fastgpt"], tmp_path) == (0, "importing\ncaught\n", "")


@pytest.mark.slow
def test_interrupts_and_errors_are_the_programs_own_once_it_is_loaded(tmp_path):
    """Even where it has the command's name; and no thread other than the main one sets a handler."""
    code = "import fastgpt, signal, sys\nprint(signal.getsignal(signal.SIGINT).__name__, sys.excepthook.__name__)"
    (tmp_path / "fastgpt").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(Path(fastgpt.__file__).parents[1])}
    heed_interrupts = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    result = subprocess.run(
        [sys.executable, tmp_path / "fastgpt"], capture_output=True, text=True, env=environment, preexec_fn=heed_interrupts
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "default_int_handler excepthook\n", "")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with ThreadPoolExecutor() as pool:
            pool.submit(startup.watch).result()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        for handler in (signal.SIG_IGN, lambda *_: None):  # a background job's, or the program's
            signal.signal(signal.SIGINT, handler)
            startup.watch()
            assert signal.getsignal(signal.SIGINT) is handler
            startup.unwatch()
            assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_installed_command_is_the_module():
    """Whose imports may be interrupted."""
    scripts = (Path(fastgpt.__file__).parents[1] / "pyproject.toml").read_text()
    assert '\nfastgpt = "fastgpt.__main__:main"\n' in scripts


@pytest.mark.slow
def test_help_and_module(capsys):
    result = subprocess.run([sys.executable, "-m", "fastgpt", "--help"], capture_output=True, text=True, check=True)
    assert all(command in result.stdout for command in COMMANDS)
    assert run(capsys)[0] == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_every_command_has_a_help_text(command, capsys):
    commands = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    commands.choices[command].load()
    actions = commands.choices[command]._actions
    assert all(action.help and re.search("[a-z]{3}", action.help) for action in actions)
    status, out, _ = run(capsys, command, "--help")
    assert status == 0 and all(name in out for action in actions for name in action.option_strings)


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_fits_a_terminal_of_80_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = run(capsys, *filter(None, [command]), "--help")
    assert status == 0 and max(map(len, out.splitlines())) <= 80
    assert (command == "generate") == ('\nexamples:\n  fastgpt generate "ROMEO:" --temperature 0.8 --seed 1\n' in out)
