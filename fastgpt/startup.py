"""Ctrl-C while PyTorch is imported, which takes seconds: nothing of what the command would do about it is there yet."""

import os
import signal
import sys


def interrupted(*_) -> None:
    os.write(2, b"\nfastgpt: interrupted\n")
    os._exit(130)


def watch() -> None:
    """Where Python was started as the command, ends it with one line on Ctrl-C, until `unwatch`."""
    script = os.path.basename(sys.argv[0]).partition(".")[0] == "fastgpt" if sys.argv else False
    words = sys.orig_argv
    module = sys.argv[:1] == ["-m"] and ("-mfastgpt" in words or ("-m", "fastgpt") in zip(words, words[1:]))
    if (script or module) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupted)


def unwatch() -> None:
    if signal.getsignal(signal.SIGINT) is interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
