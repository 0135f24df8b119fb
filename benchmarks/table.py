"""Tables for the terminal."""


def aligned(rows: list[list[str]], alignment: str) -> str:
    """The rows under one another. alignment: "l" or "r" for each column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    place = {"l": str.ljust, "r": str.rjust}
    return "\n".join(
        "  ".join(place[side](cell, width) for side, cell, width in zip(alignment, row, widths, strict=True)).rstrip()
        for row in rows
    )
