"""The results of benchmarks.perplexity as a table."""

NOTE = (
    "Perplexity, and in parentheses by how much it is above that of the weights as they are stored, which take float32 there. –: "
    "rows are no multiple of the group. With int4, the token embedding and the output matrix take 8 bits. "
    "`python -m benchmarks.perplexity TEXT NAME=MODEL` measures it."
)


def label(case: dict) -> str:
    if "dtype" not in case:
        return "as stored"
    group = "rows" if case["group_size"] is None else f"groups of {case['group_size']}"
    return f"{case['dtype']}, {group}" + ", minima" * case["minima"]


def rows(cases: list[dict]) -> list[list[str]]:
    """The header and a row for each way to quantize, with a column for each model."""
    models = list(dict.fromkeys(case["model"] for case in cases))
    found = {(label(case), case["model"]): case for case in cases}
    table = [["weights", *models]]
    for name in dict.fromkeys(label(case) for case in cases):
        cells = []
        for model in models:
            case, exact = found[name, model], found["as stored", model]
            if "perplexity" not in case:
                cells.append("–")
                continue
            change = round(100 * (case["perplexity"] / exact["perplexity"] - 1), 2) + 0.0  # not -0
            cells.append(f"{case['perplexity']:.3f}" + f" ({change:+.2f}%)" * (case is not exact))
        table.append([name, *cells])
    return table


def markdown(cases: list[dict]) -> str:
    """For the documentation."""
    header, *table = rows(cases)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *table]
    measured = {case["model"]: case for case in cases if "tokens" in case}
    texts = "; ".join(f"{name}: {case['tokens']:,} tokens in windows of {case['window']:,}" for name, case in measured.items())
    texts = texts[0].upper() + texts[1:]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{NOTE} {texts}."
