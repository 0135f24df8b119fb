"""The results of benchmarks.families as a table."""

NOTE = (
    "Numbers are the largest error as a fraction of the [bound](numerics.md), at most 1: of logits in fp32 and bf16, against "
    "transformers in float64; the same in fp32, loaded from a GGUF file as llama.cpp's converter writes it (—: such a file does "
    "not say all of this configuration); of logits with weights of 8 bits, against these dequantized in float64; and of the "
    "gradient with respect to the token embedding, against transformers in float64. Greedy tokens: 64, for a single prompt and for "
    "a ragged batch of four, with each of these caches and with none."
)
COLUMNS = {"float32": "fp32", "bfloat16": "bf16", "gguf": "GGUF", "int8": "int8", "gradient": "gradient"}


def rows(cases: list[dict]) -> list[list[str]]:
    """The header and a row for each checkpoint."""
    table = [["checkpoint", *COLUMNS.values(), "same greedy tokens as transformers with cache"]]
    for case in cases:
        same = [kind for kind, agrees in case["same_tokens"].items() if agrees]
        differing = [kind for kind, agrees in case["same_tokens"].items() if not agrees]
        tokens = ", ".join(same) * bool(same) + f" DIFFERENT in {', '.join(differing)}" * bool(differing)
        shares = (case["shares"].get(column) for column in COLUMNS)
        table.append([case["family"], *("—" if share is None else f"{share:.2f}" for share in shares), tokens])
    return table


def markdown(cases: list[dict]) -> str:
    header, *table = rows(cases)
    lines = [header, ["---", *["---:"] * (len(header) - 2), "---"], *table]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{NOTE}"
