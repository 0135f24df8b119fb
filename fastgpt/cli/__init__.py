"""The command line, `fastgpt` or `python -m fastgpt`: one module per command, and what they share."""
