"""The results of benchmarks.families as a table."""

NOTE = "Greedy tokens: 64, for a single prompt and for a ragged batch of four, with each of these caches and with none."
SHARES = "Logits: the largest error against transformers in float64, as a fraction of the bound; at most 1 passes. "
NO_SHARES = "`python -m benchmarks.families` also measures the errors of logits. "


def rows(cases: list[dict]) -> list[list[str]]:
    """The header and a row for each checkpoint."""
    dtypes = list(dict.fromkeys(dtype for case in cases for dtype in case.get("shares", {})))  # none: tokens only
    table = [["checkpoint", *dtypes, "same greedy tokens as transformers with cache"]]
    for case in cases:
        same = [kind for kind, agrees in case["same_tokens"].items() if agrees]
        differing = [kind for kind, agrees in case["same_tokens"].items() if not agrees]
        tokens = ", ".join(same) * bool(same) + f" DIFFERENT in {', '.join(differing)}" * bool(differing)
        table.append([case["family"], *(f"{case['shares'][dtype]:.2f}" for dtype in dtypes), tokens])
    return table


def markdown(cases: list[dict]) -> str:
    header, *table = rows(cases)
    lines = [header, ["---", *["---:"] * (len(header) - 2), "---"], *table]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{SHARES if len(header) > 2 else NO_SHARES}{NOTE}"
