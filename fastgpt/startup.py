"""Ctrl-C and errors while the command `fastgpt` is loading, before its own handlers are: a traceback would not help.

Importing PyTorch takes seconds, and it may be missing, or a setting may be wrong. Applies to the command only, until it is
loaded: a program that imports fastgpt keeps its signal handlers and its tracebacks.
"""

import contextlib
import os
import signal
import sys
from types import TracebackType


def is_command() -> bool:
    """Whether Python was started as `fastgpt` or `python -m fastgpt`; called while the package is imported."""
    argv, words = getattr(sys, "argv", None) or [""], sys.orig_argv
    if argv[0] == "-m":  # its value while Python imports the package to find the module
        return "-mfastgpt" in words or ("-m", "fastgpt") in zip(words, words[1:])
    return os.path.basename(argv[0]) in ("fastgpt", "fastgpt.exe")


def watch() -> None:
    """Until `unwatch`, Ctrl-C ends the process with one line and status 130, and an import error or a wrong setting with one
    line and status 2, as `fastgpt.cli.main` does.

    A SIGINT that is already ignored or handled, and another sys.excepthook, stay as they are.
    """
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _failed
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            signal.signal(signal.SIGINT, _interrupted)


def unwatch() -> None:
    """Undoes `watch`."""
    if sys.excepthook is _failed:
        sys.excepthook = sys.__excepthook__
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupted(*_) -> None:
    with contextlib.suppress(OSError):  # there may be no standard error
        os.write(2, b"\nfastgpt: interrupted\n")
    os._exit(130)  # an exception might be caught by a module that is being imported


def _failed(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """A sys.excepthook: one line and status 2 for a wrong setting or installation, a traceback and status 1 for a bug."""
    if not isinstance(error, (ImportError, OSError, ValueError)):
        sys.__excepthook__(kind, error, traceback)
        return
    if sys.stderr is not None:
        print(f"fastgpt: error: {sentence(error)}", file=sys.stderr)
    sys.exit(2)  # Python takes the exit status from a hook that raises SystemExit


def sentence(error: BaseException) -> str:
    """The message of an error, and of a missing package how to get it."""
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("fastgpt"):
        return f"{error}, which fastgpt needs: pip install {error.name.partition('.')[0]}"
    return str(error)
