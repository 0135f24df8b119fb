"""Running `fastgpt` as a user does."""

from fastgpt.cli.main import main

TOKENS = ["--max-new-tokens", "40"]


def run(capsys, *arguments):
    """(exit status, stdout, stderr) of a command."""
    try:
        main([str(argument) for argument in arguments])
        status = 0
    except SystemExit as exit:
        status = exit.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err
