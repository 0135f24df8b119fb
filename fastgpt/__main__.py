"""`python -m fastgpt` is the command `fastgpt`."""

from fastgpt import startup


def main() -> None:
    startup.watch()
    from fastgpt.cli.main import main as run

    startup.unwatch()
    run()


if __name__ == "__main__":
    main()
