"""The results of benchmarks.numerics as tables."""

NOTE = (
    "The largest error of results / of gradients, as a fraction of the bound; at most 1 passes. Exact: the same bits as the "
    "reference. –: not measured."
)
IMPLEMENTATIONS = {"cpp": "C++", "triton": "Triton", "cuda": "CUDA"}


def rows(numerics: dict, by_feature: bool) -> list[list[str]]:
    """The header and a row for each operation (or feature of it) and implementation: the largest fractions for each dtype."""
    cases = [case | {"operation": name} for name, found in numerics.items() if isinstance(found, list) for case in found]
    dtypes = list(dict.fromkeys(case["dtype"] for case in cases))
    found = {}
    for case in cases:
        implementation = f"{IMPLEMENTATIONS[case['implementation']]}, {case['on']}"
        row = (case["operation"], *[case["feature"]] * by_feature, implementation)
        found.setdefault(row[:-1], {}).setdefault(row, {}).setdefault(case["dtype"], []).append(case)
    table = [["operation", *["feature"] * by_feature, "implementation", *dtypes]]
    for implementations in found.values():  # grouped by feature
        table += [[*row, *(worst(by_dtype.get(dtype, [])) for dtype in dtypes)] for row, by_dtype in implementations.items()]
    return table


def worst(cases: list[dict]) -> str:
    """The largest fractions of results / of gradients, and whether results that must be exact are."""
    shares = [item for case in cases for item in case.get("shares", {}).items()]
    exact = [case["exact"] for case in cases if "exact" in case]
    parts = [[share for name, share in shares if name.startswith("d") == gradient] for gradient in (False, True)]
    words = ["exact" if all(exact) else "differs"] * bool(exact)
    words += [" / ".join(f"{max(part):.2f}" for part in parts if part)] * bool(shares)
    return ", ".join(words) or "–"


def markdown(numerics: dict) -> str:
    """For the documentation: the largest over all features, of operations that have been measured."""
    header, *table = rows(numerics, by_feature=False)
    table = [row for row in table if any(cell != "–" for cell in row[2:])]
    lines = [header, ["---", "---", *["---:"] * (len(header) - 2)], *([f"`{name}`", *cells] for name, *cells in table)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{text}\n\n{NOTE} The largest over all features; `python -m benchmarks.numerics` measures and shows each."
