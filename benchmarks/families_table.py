"""What benchmarks.families stores, as a table."""

NOTE = (
    "Logits in float32 and bfloat16: the worst error against transformers in float64, as a share of the bound; at most 1 passes. "
    "Greedy tokens: 64, of a single prompt and of a ragged batch of four, in these kinds of cache."
)


def rows(cases: list[dict]) -> list[list[str]]:
    """The header and a row for each checkpoint."""
    table = [["checkpoint", *cases[0]["shares"], "greedy tokens of transformers"]]
    for case in cases:
        same = [kind for kind, agrees in case["same_tokens"].items() if agrees]
        differing = [kind for kind, agrees in case["same_tokens"].items() if not agrees]
        tokens = ", ".join(same) * bool(same) + f" DIFFERENT in {', '.join(differing)}" * bool(differing)
        table.append([case["family"], *(f"{share:.2f}" for share in case["shares"].values()), tokens])
    return table


def markdown(cases: list[dict]) -> str:
    header, *table = rows(cases)
    lines = [header, ["---", *["---:"] * (len(header) - 2), "---"], *table]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{NOTE}"
