"""Ctrl-C while the command `fastgpt` is loading: importing PyTorch takes seconds, and a traceback from there would not help.

Applies to the command only, until it is loaded: a program that imports fastgpt keeps its signal handlers.
"""

import contextlib
import os
import signal
import sys


def is_command() -> bool:
    """Whether Python was started as `fastgpt` or `python -m fastgpt`; called while the package is imported."""
    argv, words = getattr(sys, "argv", None) or [""], sys.orig_argv
    if argv[0] == "-m":  # its value while Python imports the package to find the module
        return "-mfastgpt" in words or ("-m", "fastgpt") in zip(words, words[1:])
    return os.path.basename(argv[0]) in ("fastgpt", "fastgpt.exe")


def watch() -> None:
    """Makes Ctrl-C end the process with one line and status 130 until `unwatch`, unless SIGINT is ignored or handled already."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            signal.signal(signal.SIGINT, _interrupted)


def unwatch() -> None:
    """Undoes `watch`."""
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupted(*_) -> None:
    with contextlib.suppress(OSError):  # there may be no standard error
        os.write(2, b"\nfastgpt: interrupted\n")
    os._exit(130)  # an exception might be caught by a module that is being imported
