"""`python -m fastgpt` is the command `fastgpt`."""

from fastgpt.cli import main

main()
