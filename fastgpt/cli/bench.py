"""`fastgpt bench`: times generation and its operations."""

import argparse
import json
import sys

import torch
from tqdm import tqdm

from fastgpt.bench import suite
from fastgpt.checks import require_number
from fastgpt.cli.arguments import add_device, device_of, number
from fastgpt.folders import SHIPPED_MODEL


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s [options]"
    parser.description = (
        "Times generation and its operations, and compares them with PyTorch's and with this machine's roofline."
    )
    add = parser.add_argument
    add_device(add)
    add("--only", default="", metavar="TEXT", help="cases with TEXT in their names: GPT-2, attention, one token, ... (all)")
    add("--seconds", type=number, default=90.0, metavar="S", help="time to spend; each case has at least seven rounds (90)")
    add("--json", action="store_true", help="print one JSON object instead of the table")


def run(options: argparse.Namespace) -> None:
    require_number("seconds", options.seconds, least=0)
    device_limits = suite.DeviceLimits(device_of(options.device))
    cases = [case for case in suite.cases(device_limits, SHIPPED_MODEL) if options.only in f"{case.section}, {case.name}"]
    if not cases:
        raise ValueError(f"only: expected text in the name of a case, got {options.only!r}")
    torch.manual_seed(0)
    results = []
    try:
        with tqdm(cases, unit="case", leave=False, disable=sys.stderr is None or None) as bar:
            for case in bar:
                bar.set_description(case.name)
                results.append(suite.measure(case, device_limits, options.seconds / len(cases)))
    finally:  # on Ctrl-C, what there is so far
        machine = suite.machine(device_limits)
        if options.json:
            print(json.dumps({"machine": machine, "cases": results}))
        elif results:
            print(suite.table(machine, results))
    if any("problem" in result for result in results):
        sys.exit(1)
