"""Standard output and standard error, either of which may be missing, closed or full."""

import errno
import os
import sys

NO_ROOM = {errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EDQUOT}  # errors of the file behind a stream


def print_stderr(line: str) -> None:
    """Prints a line on standard error, or nowhere in a program without one: a daemon, or one without a console."""
    if sys.stderr is not None:
        print(line, file=sys.stderr)


def discard_stdout() -> None:
    """Standard output goes nowhere from now on, so that flushing it at exit cannot fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_of_stdout(error: OSError) -> bool:
    """Whether an error is about writing to standard output: unlike that of a file, it has no name."""
    return error.errno in NO_ROOM and error.filename is None and sys.stdout is not None
