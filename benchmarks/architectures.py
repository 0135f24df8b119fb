"""Models of transformers with fastgpt's attention, compared with eager attention on the same small random weights.

python -m benchmarks.architectures     prints what tests/integrations/test_transformers_models.py requires, for each architecture, and
                                       writes results/<machine>/architectures.json

Exits with 1 if a share of the numerics contract's bound is above 1, or tokens differ.
"""

import math
import sys
from pathlib import Path

import torch
import transformers

import fastgpt.integrations.transformers as ft
from benchmarks import pages, report
from benchmarks.table import aligned

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # for its helpers

from architectures import ARCHITECTURES, COMPILED, agreement, compiled, gradients, outputs, shares, unserved  # noqa: E402


def measured(name: str) -> dict:
    """A case: `shares` are the largest fractions for each padding; `tokens`: cache -> whether greedy tokens are the same."""
    architecture, case = ARCHITECTURES[name], {"architecture": name, "model": ARCHITECTURES[name].model}
    if why := unserved(name):
        return case | {"unserved": why}
    case |= {"calls": {}, "shares": {}, "gradient_shares": {}, "tokens": {}}
    for padding in (None, *architecture.padding):
        for function, key in ((outputs, "shares"), (gradients, "gradient_shares")):
            calls, found = shares(name, padding, function)
            case[key][str(padding)] = worst(found)
        case["calls"] |= calls
        if architecture.generates and padding != "right":
            for cache, same in agreement(name, padding).items():
                case["tokens"][cache] = same and case["tokens"].get(cache, True)
        if name in COMPILED and padding != "left":
            case.setdefault("compiled", {})[str(padding)] = worst(compiled(name, padding)[1])
    return case


def worst(found: dict[str, float]) -> float:
    return float(f"{max(math.inf if math.isnan(share) else share for share in found.values()):.3g}")


def passes(case: dict) -> bool:
    numbers = [share for key in ("shares", "gradient_shares", "compiled") for share in case.get(key, {}).values()]
    return all(share <= 1 for share in numbers) and all(case.get("tokens", {}).values())


def main() -> None:
    about = report.machine()
    torch.set_num_threads(1)  # the models are small
    transformers.logging.set_verbosity_error()
    ft.register()
    cases = []
    for name in ARCHITECTURES:
        cases.append(measured(name))
        print(name, "" if passes(cases[-1]) else "fails", flush=True)
    result = {"architectures": cases}
    rows = pages.architecture_rows(result)
    print("", aligned(rows, "lll" + "r" * (len(rows[0]) - 3)), "", sep="\n")
    report.store("architectures", result, about)
    sys.exit(not all(map(passes, cases)))


if __name__ == "__main__":
    main()
