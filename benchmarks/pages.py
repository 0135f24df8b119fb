"""Results as Markdown: the generated parts of README and docs/, and the page of each machine with all cases."""

import json
import math
from pathlib import Path

from benchmarks import numerics_table

RATIOS = (
    "Times are medians. A ratio is the other's time divided by fastgpt's: the median over rounds in which both were timed, one "
    "after the other. % of roofline is computed in the same way, from the memory bandwidth or the arithmetic of the machine in "
    "those rounds; below each table is which."
)
NOISY = "≈: noisy; the 95% confidence interval of this median is wider than ±10%."
SUITES = {  # in the order of a page
    "generate": "Generation", "attention": "Attention", "decode": "Attention over caches", "kv_cache": "Caches",
    "linear": "Linear layers", "integrations": "Models of transformers", "throughput": "Many requests",
    "embed": "Sentence embeddings",
}  # fmt: skip
TITLES = {  # of cases whose name says little by itself
    "decoding": "Decoding of whole models", "step": "Cache update and attention", "prompt": "Storing prompts",
    "one token": "Storing one token", "rope": "Rotary embedding and storing", "kind": "A decode step by kind of cache",
    "graph": "In a CUDA graph", "busy core": "With a core that another process keeps busy",
    "growth": "Growth with context", "adapter": "Overhead of a call", "whole calls": "Complete calls",
}  # fmt: skip
PLOTS = {  # name -> suite, the cases that it needs, what it shows
    "decoding": (
        "generate",
        "decoding",
        "Tokens per second by model and batch size, with transformers and the memory roofline",
    ),
    "cached_against_uncached": (
        "generate",
        "cached against uncached",
        "Time per token by context length, with and without a KV cache",
    ),
    "against_peers": (
        "generate",
        "decode",
        "Tokens per second by context length, with other libraries and the memory roofline",
    ),
    "attention": (
        "attention",
        "prefill",
        "FLOP rate of causal attention by sequence length, with PyTorch's and the roofline of arithmetic",
    ),
    "attention_over_caches": ("decode", "decode", "Read rate of attention over a KV cache by number of keys and kind of cache"),
    "cache_update": ("kv_cache", "prompt", "Rate of storing keys and values by kind of cache, with the roofline of copying"),
    "kinds_of_cache": ("kv_cache", "kind", "Memory and time of a decode step by kind of cache"),
    "many_requests": (
        "throughput",
        "many requests",
        "New tokens per second of many requests at once, with other ways to serve them",
    ),
}
MEASURED = {  # entries of a case that are no parameters
    "microseconds", "times_ours", "of_limit", "noisy", "bytes", "flops", "limit", "limit_bytes", "limit_flops", "peer_bytes",
    "absent", "targets", "times_alone",
}  # fmt: skip


def results_in(folder: Path) -> dict[str, dict]:
    """Name of a file -> what is in it."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def median(case: dict, name: str = "ours") -> float:
    """Microseconds."""
    return case["microseconds"][name][1]


def peers(case: dict) -> list[str]:
    """The names that a case was compared with, other than its limit."""
    return [name for name in case["times_ours"] if name != case.get("limit")]


def figures(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits: 0.0123, 4.56, 1,234."""
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}" if value else "0"


def time(microseconds: float) -> str:
    unit, size = ("s", 1e6) if microseconds >= 1e6 else ("ms", 1e3) if microseconds >= 1e3 else ("µs", 1)
    return f"{figures(microseconds / size)} {unit}"


def rate(case: dict) -> str:
    if "flops" not in case and "bytes" not in case:
        return "–"
    work, unit = ("flops", "FLOP/s") if "flops" in case else ("bytes", "B/s")
    speed = case[work] / median(case) * 1e6
    prefix, size = ("T", 1e12) if speed >= 1e12 else ("G", 1e9)
    return f"{figures(speed / size)} {prefix}{unit}"


def shown(name: str) -> str:
    """A name of the results as tables and plots show it."""
    return f"fastgpt{name.removeprefix('ours')}" if name.partition(",")[0] == "ours" else name


def ratio(case: dict, name: str) -> str:
    """The time of another, divided by ours."""
    if name not in case["times_ours"]:
        return "–"
    value = case["times_ours"][name][1]
    return f"{'≈' * (name in case['noisy'])}{value:,.{2 if value < 10 else 1 if value < 100 else 0}f}x"


def of_limit(case: dict) -> str:
    """% of roofline."""
    return f"{'≈' * (case['limit'] in case['noisy'])}{case['of_limit'][1]:.0%}" if "limit" in case else "–"


def named(model: str) -> str:
    """A model by its full name."""
    return NAMES.get(model, model)


NAMES = {
    "gpt2-124m": "GPT-2 124M", "gpt2-124m, 16k positions": "GPT-2 124M, 16k positions", "gpt2-xl": "GPT-2 XL",
    "smollm2-135m": "SmolLM2 135M", "llama-160m": "Llama 160M", "llama-1b": "Llama 1B", "llama-8b": "Llama 8B", "shipped": "the shipped model",
}  # fmt: skip


def table(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A table in Markdown, with the first `left` columns aligned left and the others right."""
    lines = [header, ["---"] * left + ["---:"] * (len(header) - left), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def about(result: dict) -> str:
    """The machine and the versions."""
    machine = result["machine"]
    processor = f"{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}, {machine['cpu_level']}"
    fastgpt = f"{machine['fastgpt']} ({machine['commit']})"
    versions = {"torch": machine["torch"], **machine["peers"], "fastgpt": fastgpt}
    parts = [machine.get("gpu"), processor, ", ".join(f"{name} {version}" for name, version in versions.items())]
    return "; ".join(part for part in parts if part)


def plot(folder: Path, name: str, within: str) -> str:
    """The plot of that name as an image, if there is one; within: path of the folder, relative to the page."""
    return f"![{PLOTS[name][2]}]({within}{name}.svg)" if (folder / f"{name}.svg").exists() else ""


def rooflines(cases: list[dict]) -> list[str]:
    """A sentence that names the limits of cases, with their dtypes where these matter; or none, if there are no limits."""
    dtypes = {}
    for case in cases:
        if "limit" in case:
            dtypes.setdefault(case["limit"], {})[case.get("dtype")] = None
    several = len({dtype for of_limit in dtypes.values() for dtype in of_limit}) > 1 and len(dtypes) > 1
    names = [f"{limit}" + f" ({', '.join(map(str, of_limit))})" * several for limit, of_limit in dtypes.items()]
    return [f"Roofline: {'; '.join(names)}."] * bool(names)


def with_notes(text: str, result: dict, *notes: str) -> str:
    """A table followed by its notes."""
    cut = sum(why == "not finished" or why.startswith("failed") for why in result["left_out"].values())
    notes = [*notes, *[NOISY] * ("≈" in text), *[f"Incomplete: {cut} benchmarks were not finished or failed."] * bool(cut)]
    return f"{text}\n\n{' '.join(notes)}" if notes else text


def of_first_model(cases: list[dict]) -> list[dict]:
    """The cases of the first model, with the smallest batch, in the dtype of the first."""
    return of_first([case for case in cases if case["model"] == cases[0]["model"]])


def of_first(cases: list[dict]) -> list[dict]:
    """The cases with the smallest batch, in the dtype of the first."""
    batch = min((case["batch"] for case in cases), default=0)
    return [case for case in cases if (case["batch"], case["dtype"]) == (batch, cases[0]["dtype"])]


def cached_against_uncached(result: dict) -> str:
    measured = of_first(result["cached against uncached"])
    cases = {(case["model"], case["context"]): case for case in measured}
    models = list(dict.fromkeys(model for model, _ in cases))
    rows = []
    for context in sorted({context for _, context in cases}):
        rows.append([f"{context:,}"])
        for model in models:
            case = cases.get((model, context))
            rows[-1] += [time(median(case)), time(median(case, "uncached")), ratio(case, "uncached")] if case else ["–"] * 3
    header = ["context (tokens)"]
    for model in models:
        header += [f"{named(model)}, cached", "uncached", "speed-up"]
    notes = ["Time per token, batch {batch}, {dtype}.".format(**measured[0])]
    for line in of_first(result["growth"]):
        slopes = (line[name]["slope"] for name in ("cached", "uncached"))
        cached, uncached = (time(slope) if slope > 0 else "too little to be measured" for slope in slopes)
        notes.append(f"Each token of context adds {cached} cached and {uncached} uncached to {named(line['model'])}.")
    if memory := {case["mode"]: case for case in of_first(result.get("memory", []))}:
        cached, uncached = (figures(memory[mode]["bytes"] / 1e6) for mode in ("cached", "uncached"))
        one = f"With {memory['cached']['context']:,} tokens of context, {named(memory['cached']['model'])} needs up to {cached} MB"
        notes.append(f"{one} beyond its weights cached, and {uncached} MB uncached.")
    return with_notes(table(header, rows, 0), result, *notes)


def decoding(result: dict) -> str:
    """Tokens per second of every case, % of roofline, and ratios, each followed by its target."""
    cases = result["decoding"]
    names = list(dict.fromkeys(name for case in cases for name in peers(case)))
    rows = []
    for case in cases:
        aims = case["targets"]
        where = f" on an {aims['on']}" if "on" in aims else ""
        ours = f"**{tokens_per_second(case):,.0f}**" + aim(aims, "tokens_per_second", "{:,}" + where)
        times = [ratio(case, name) + aim(aims.get("times", {}), name, "{}x") for name in names]
        label = f"{named(case['model'])}, batch {case['batch']}, {case['context']:,} tokens"
        rows.append([label, ours, of_limit(case) + aim(aims, "of_limit", "{:.0%}"), *times])
    notes = ["Targets in parentheses. Random weights in {dtype}; the roofline is reading weights and cache once per step."]
    notes[0] = notes[0].format(**cases[0])
    absent = [(name, why) for case in cases for name, why in case["absent"].items()]
    notes += [f"–: {listed(absent)}."] * bool(absent)
    return with_notes(table(["decoding", "tokens/s", "% of roofline", *map(shown, names)], rows), result, *notes)


def aim(aims: dict, name: str, form: str) -> str:
    return f" ({form.format(aims[name])})" if name in aims else ""


def tokens_per_second(case: dict, name: str = "ours") -> float:
    return case["batch"] * 1e6 / median(case, name)


def against_peers(result: dict) -> str:
    decode, prefill = (of_first_model(result.get(what, [])) for what in ("decode", "prefill"))
    first, cases = decode[0], decode + prefill
    names = list(dict.fromkeys(name for case in cases for name in peers(case)))
    header = [
        named(first["model"]),
        *(f"decode at {c['context']:,}" for c in decode),
        *(f"prefill of {c['T']:,}" for c in prefill),
    ]
    ours = [f"**{figures(1e6 / median(c))} tok/s**" for c in decode] + [f"**{time(median(c))}**" for c in prefill]
    rows = [[f"**fastgpt**, {first['dtype']}", *ours], ["% of roofline", *map(of_limit, cases)]]
    rows += [[name, *(ratio(case, name) for case in cases)] for name in names]
    return with_notes(table(header, rows), result, *rooflines(cases), *whole_calls(result))


def busy_core(cases: list[dict]) -> str:
    """A table for each model and dtype: tokens per second of every library while a core is busy and while none is, and how many
    times those of its one thread with all cores idle."""
    groups = {}
    for case in cases:
        groups.setdefault((case["model"], case["dtype"]), []).append(case)
    tables = []
    for (model, dtype), settings in groups.items():
        header = [f"{named(model)}, {dtype}"]
        for case in settings:
            threads = f"{case['threads']} thread{'s' * (case['threads'] > 1)}"
            header.append(f"{threads}, {'one core busy' if case['busy'] else 'all cores idle'}")
        rows = [
            [shown(name), *(f"{figures(1e6 / median(c, name))} ({c['times_alone'][name][1]:.2f}x)" for c in settings)]
            for name in settings[0]["microseconds"]
        ]
        tables.append(table(header, rows))
    note = "Tokens per second of decode steps with {context} tokens of context, and in parentheses how many times those of one thread "
    return "\n\n".join([note.format(**cases[0]) + "of the same library with all cores idle.", *tables])


def whole_calls(result: dict) -> list[str]:
    """A sentence on complete calls of `generate`, prefill included, or none."""
    cases = of_first(result.get("whole calls", []))
    models = dict.fromkeys(case["model"] for case in cases)
    ratios = [
        f"{named(model)} " + ", ".join(f"{ratio(c, 'transformers')} at {c['T']:,}" for c in cases if c["model"] == model)
        for model in models
    ]
    return (
        [
            f"Complete calls of `generate`, {cases[0]['new_tokens']} new tokens, transformers' time divided by fastgpt's: "
            f"{'; '.join(ratios)} prompt tokens."
        ]
        if cases
        else []
    )


def attention(result: dict) -> str:
    """Prefill and training, for one head dim: all lengths in the first dtype, and 2,048 in the others."""
    first = result["prefill"][0]
    rows, shown_cases = [], []
    names = {"prefill": "causal", "forward and backward": "with gradients", "window": "window of {window:,}"}
    for what, name in names.items():
        for case in sorted(result.get(what, []), key=lambda case: (case["dtype"] != first["dtype"], case["T"])):
            usual = case["dtype"] == first["dtype"]
            if case["head_dim"] == first["head_dim"] and (usual or what == "prefill" and case["T"] == 2048):
                label = f"{name}, {{T:,}} tokens".format(**case) + f", {case['dtype']}" * (not usual)
                rows.append([label, *compared(case)])
                shown_cases.append(case)
    what = "Batch {batch}, {heads} heads of {head_dim}, {dtype}".format(**first)
    return with_notes(table([what, *COMPARED], rows), result, *rooflines(shown_cases))


def attention_over_caches(result: dict) -> str:
    """One query per sequence: all lengths with the first kind of cache and heads, and 8,192 keys with the others."""
    first = result["decode"][0]
    rows = []
    for case in result["decode"]:
        differs = [name for name in ("kind", "kv_heads", "batch") if case[name] != first[name]]
        if not differs or case["keys"] == 8192 and case["batch"] == 1:
            heads = f", {case['heads']} heads of {case['head_dim']}, {case['kv_heads']} KV heads" * ("kv_heads" in differs)
            rows.append([f"{case['keys']:,} keys" + f", {case['kind']}" * ("kind" in differs) + heads, *compared(case)])
    what = "Batch {batch}, {heads} heads of {head_dim}, {kind}".format(**first)
    return with_notes(table([what, *COMPARED], rows), result)


COMPARED = ["fastgpt", "rate", "% of roofline", "fastest alternative", "ratio"]


def compared(case: dict) -> list[str]:
    """Our time, rate and % of roofline, and the fastest alternative."""
    others = [name for name in peers(case) if name != "reference" and not name.startswith("ours")] or peers(case)
    if not others:
        return [time(median(case)), rate(case), of_limit(case), "–", "–"]
    best = min(others, key=lambda name: case["times_ours"][name][1])
    return [time(median(case)), rate(case), of_limit(case), shown(best), ratio(case, best)]


def cache_updates(result: dict) -> str:
    """Storing tokens and prompts in the layout of a decoder."""
    rows = []
    names = {
        "one token": "one token, batch {batch}", "prompt": "prompts of {tokens}, {kind}",
        "rope": "with rotary embedding, {tokens}, batch {batch}",
    }  # fmt: skip
    for what, name in names.items():
        for case in result.get(what, []):
            if case.get("layout") in (None, "token-major"):
                tokens = "one token" if case.get("T") == 1 else f"{case.get('T', 0):,} tokens"
                rows.append([name.format(tokens=tokens, **case), *compared(case)])
    return with_notes(table(["{heads} heads of {head_dim}, {dtype}".format(**result["prompt"][0]), *COMPARED], rows), result)


def models_of_transformers(result: dict) -> str:
    """Times of models with fastgpt's attention, ratios to PyTorch's, and the ratio that no attention could exceed."""
    rows = []
    for what in ("generation", "forward", "training"):
        for case in result.get(what, []):
            rows.append([f"{what}, {case['model']}", f"{case['T']:,}" + f" x {case['batch']}" * (case["batch"] > 1)])
            rows[-1][0] += f", padded {case['padding']}" * (case["padding"] != "none")
            sdpa, least = (case["times_ours"].get(name) for name in ("sdpa", "no attention"))
            bound = f"{sdpa[1] / least[1]:.2f}x" if least else "–"
            rows[-1] += [time(median(case)), ratio(case, "sdpa"), bound, ratio(case, "ours, dynamic cache")]
    header = ["transformers, {dtype}".format(**case), "tokens", "fastgpt", "SDPA", "upper bound", "fastgpt, dynamic cache"]
    notes = [
        "The same weights and layers with fastgpt's attention and cache, and with PyTorch's SDPA and a dynamic cache. The upper "
        "bound is the ratio if attention and the cache took no time. Generation is the prompt and 64 new tokens."
    ]
    if adapter := result.get("adapter"):
        notes.append(f"A call of attention over one token takes {time(median(adapter[0]))} through transformers.")
    return with_notes(table(header, rows), result, *notes)


PARTS = {  # marker -> its plot and its table
    "cached against uncached": ("cached_against_uncached", cached_against_uncached),
    "against peers": ("against_peers", against_peers),
    "attention": ("attention", attention),
    "attention over caches": ("attention_over_caches", attention_over_caches),
    "cache updates": ("cache_update", cache_updates),
}


GPU_PARTS = {"decoding": ("decoding", decoding), **PARTS}


def parts(folder: Path, results: dict[str, dict], within: str, shown_parts: dict = PARTS) -> dict[str, str]:
    """Marker -> plot and table, as far as there are results."""
    texts = {}
    if "integrations" in results:
        texts["models of transformers"] = models_of_transformers(results["integrations"])
    for marker, (name, shown) in shown_parts.items():
        suite, what, _ = PLOTS[name]
        if what in results.get(suite, {}):
            texts[marker] = "\n\n".join(text for text in (plot(folder, name, within), shown(results[suite])) if text)
    return texts


def page(folder: Path, results: dict[str, dict]) -> str:
    """The page of a machine: every case of every suite."""
    suites = {suite: results[suite] for suite in SUITES if suite in results}
    machine = next(iter(suites.values()))["machine"]
    made = "Made by `python -m benchmarks.report` from the JSON files here."
    lines = [f"# {machine.get('gpu') or machine['cpu']}", RATIOS, made]
    for suite, result in suites.items():
        lines += [f"## {SUITES[suite]}", f"{about(result)}."]
        for kind, reasons in (("Absent", result["machine"]["absent"]), ("Left out", result["left_out"])):
            lines += [f"{kind}: {listed(reasons.items())}."] * bool(reasons)
        lines += [text for name in PLOTS if PLOTS[name][0] == suite if (text := plot(folder, name, ""))]
        for what, cases in result.items():
            if isinstance(cases, list):
                lines += [
                    f"### {TITLES.get(what, what[0].upper() + what[1:])}",
                    ALL_CASES.get(what, every)(cases),
                ]
    if "numerics" in results:
        header, *rows = numerics_table.rows(results["numerics"], by_feature=True)
        lines += ["## Numerics", f"{about(results['numerics'])}. {numerics_table.NOTE}", table(header, rows, 3)]
    if "architectures" in results:
        header, *rows = architecture_rows(results["architectures"])
        lines += ["## Architectures of transformers", f"{about(results['architectures'])}. {PARITY}", table(header, rows, 3)]
    return "\n\n".join(lines) + "\n"


PARITY = (
    "Small models with random weights, with fastgpt's attention compared with eager attention in float64: the largest error of "
    "outputs / of gradients as a fraction of the bound (at most 1 passes), and whether 32 greedy tokens are the same with each "
    "cache. Compiled: outputs, in a single graph. Made by `python -m benchmarks.architectures`."
)


def architecture_rows(result: dict) -> list[list[str]]:
    """The header and a row for each architecture."""
    sides, caches = ("None", "left", "right"), ("dynamic", "static", "ours")
    header = ["architecture", "model", "served by", "no padding", "left padding", "right padding"]
    rows = [[*header, *(f"tokens, {shown(cache)}" for cache in caches), "compiled"]]
    words = {True: "same", False: "differ"}
    for case in result["architectures"]:
        row = [case["architecture"], case["model"], case.get("unserved") or ", ".join(case["calls"])]
        pairs = [[case.get(key, {}).get(side) for key in ("shares", "gradient_shares")] for side in sides]
        row += [" / ".join(f"{share:.2f}" for share in pair) if pair[0] is not None else "–" for pair in pairs]
        row += [words.get(case.get("tokens", {}).get(cache), "–") for cache in caches]
        rows.append([*row, f"{max(case['compiled'].values()):.2f}" if case.get("compiled") else "–"])
    return rows


def architectures(result: dict) -> str:
    """Which architectures are served, and how accurately, in a paragraph."""
    cases = result["architectures"]
    served, others = ([case for case in cases if ("unserved" in case) is unserved] for unserved in (False, True))
    worst = [
        f"{max(shares):.2f} of the bound for {of}"
        for key, of in (("shares", "outputs"), ("gradient_shares", "gradients"))
        if (shares := [share for case in served for share in case.get(key, {}).values()])
    ]
    errors = f"the largest error is {', '.join(worst)}; " if worst else ""
    caches = [case["tokens"] for case in served if case["tokens"]]
    same = sum(all(tokens.values()) for tokens in caches)
    compiled = [case["architecture"] for case in served if "compiled" in case]
    return (
        f"{len(served)} architectures are served: {', '.join(case['architecture'] for case in served)}. Small models with random "
        f"weights, without padding and padded on the left and right, compared with eager attention in float64: {errors}"
        f"32 greedy tokens are the same with a dynamic, a static and fastgpt's cache for {same} of the {len(caches)} that generate; "
        f"{listed_words(compiled)} also compile to a single graph. Not served: "
        f"{', '.join(case['architecture'] for case in others)}, whose attention does not go through transformers' AttentionInterface."
    )


def listed_words(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else "".join(words)


def listed(reasons) -> str:
    """Pairs (name, reason) as text, names grouped by reason."""
    by = {}
    for name, why in reasons:
        by.setdefault(why, []).append(name)
    return "; ".join(f"{', '.join(dict.fromkeys(names))} ({why})" for why, names in by.items())


def every(cases: list[dict]) -> str:
    """All cases: parameters that differ, our time and rate, % of roofline, ratios to all others."""
    timed = "microseconds" in cases[0]
    parameters = [name for name in dict.fromkeys(name for case in cases for name in case) if name not in MEASURED]
    differing = [name for name in parameters if len({case.get(name) for case in cases}) > 1]
    others = list(dict.fromkeys(name for case in cases if timed for name in peers(case)))
    header = [*differing, *(["fastgpt", "rate", "% of roofline", *map(shown, others)] if timed else ["MB"])]
    rows = []
    for case in cases:
        values = (case.get(name, "–") for name in differing)
        rows.append([f"{value:,}" if isinstance(value, int) else str(value) for value in values])
        if timed:
            rows[-1] += [time(median(case)), rate(case), of_limit(case), *(ratio(case, name) for name in others)]
        else:
            rows[-1].append(figures(case["bytes"] / 1e6))
    kept = [i for i in range(len(header)) if any(row[i] != "–" for row in rows)]
    header, rows = [header[i] for i in kept], [[row[i] for i in kept] for row in rows]
    same = ", ".join(f"{name} {cases[0][name]}" for name in parameters if name not in differing)
    absent = [(name, why) for case in cases for name, why in case.get("absent", {}).items() if name in others]
    text = (f"{same[0].upper()}{same[1:]}.\n\n" if same else "") + table(header, rows, len(differing))
    notes = [*rooflines(cases), *[f"–: {listed(absent)}."] * bool(absent), *[NOISY] * ("≈" in text)]
    return "\n\n".join([text, *[" ".join(notes)] * bool(notes)])


def growth(lines: list[dict]) -> str:
    """Least-squares fits of the time per token over context."""
    each = "per token of context"
    rows = []
    for line in lines:
        fits = [part for name in ("cached", "uncached") for part in (line[name]["start"], line[name]["slope"])]
        contexts = "{} to {}".format(*line["contexts"])
        rows.append([line["model"], line["dtype"], str(line["batch"]), contexts, *map(time, fits)])
    return table(["model", "dtype", "batch", "contexts", "cached, intercept", each, "uncached, intercept", each], rows, 4)


ALL_CASES = {"growth": growth, "busy core": busy_core}  # what has a table of its own on the page of a machine
