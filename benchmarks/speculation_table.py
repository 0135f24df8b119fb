"""The results of benchmarks.speculation as a table."""


def markdown(cases: list[dict]) -> str:
    lines = [
        "| model | text | tok/s without | with | ratio | tokens a pass |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        *(
            f"| {case['model']} | {case['text']} | {case['plain']:.1f} | {case['speculative']:.1f} | "
            f"{case['speculative'] / case['plain']:.2f} | {case['tokens_per_pass']:.2f} |"
            for case in cases
        ),
    ]
    return "\n".join(lines)
