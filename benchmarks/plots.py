"""Plots of the results, as SVG and PNG in their folder, on a white card that is readable on light and dark pages."""

import hashlib
import json
import math
import statistics
import textwrap
from pathlib import Path

from benchmarks.pages import PLOTS, about, figures, median, named, of_first, of_first_model, shown, tokens_per_second

OURS, LIMIT, INK, FAINT = "#0969da", "#6e7781", "#1f2328", "#d0d7de"
OTHERS = ("#d1661a", "#1a7f64", "#a13ea1", "#a8841a", "#c4314b")  # a color for each family of peers
MARKERS = "osD^v"
STYLE = {
    "font.size": 10, "text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.edgecolor": LIMIT, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y",
    "axes.axisbelow": True, "axes.titlesize": 10, "axes.titlelocation": "left", "grid.color": "#eaeef2",
    "legend.frameon": False, "legend.fontsize": 9, "lines.linewidth": 1.6, "lines.markersize": 4.5, "svg.hashsalt": "fastgpt",
}  # fmt: skip


def draw(folder: Path) -> None:
    """Draws the plots for which `folder` has results, and removes the others."""
    import matplotlib

    for name, (suite, what, _) in PLOTS.items():
        path = folder / f"{suite}.json"
        result = json.loads(path.read_text()) if path.exists() else {}
        for image in (folder / f"{name}.svg", folder / f"{name}.png"):
            image.unlink(missing_ok=True)
            if what in result:
                with matplotlib.rc_context(STYLE):
                    figure = FUNCTIONS[name](result)
                    # The digest lets a test find stale plots; without a date, equal results give equal files.
                    metadata = {"Description": digest(path)} | ({"Date": None} if image.suffix == ".svg" else {})
                    figure.savefig(image, metadata=metadata, facecolor="white", edgecolor=FAINT, dpi=150)
                    print(f"wrote {image}")


def stale(folder: Path) -> list[str]:
    """The plots in `folder` that were not drawn from its current results."""
    images = []
    for name, (suite, what, _) in PLOTS.items():
        path = folder / f"{suite}.json"
        drawable = path.exists() and what in json.loads(path.read_text())
        for image in (folder / f"{name}.svg", folder / f"{name}.png"):
            if image.exists() != drawable or drawable and digest(path).encode() not in image.read_bytes():
                images.append(image.name)
    return images


def digest(path: Path) -> str:
    return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}"


def card(result: dict, title: str, panels: int, height: float = 3.3, **options):
    """A figure with a title, a row of axes, and the machine and versions below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained", linewidth=2)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08, wspace=0.03)
    figure.suptitle(title, x=0.012, ha="left", fontsize=11, weight="bold")
    figure.supxlabel(textwrap.fill(about(result), 150), x=0.012, ha="left", fontsize=8, color=LIMIT)
    return figure, figure.subplots(1, panels, squeeze=False, **options)[0]


def curves(axis, lines: dict[str, list[tuple]], unit: str, label: str, colors: dict, scale: str = "log") -> None:
    """Draws lines over lengths, each labeled at its end.

    Args:
        lines: name -> points (length, value).
        colors: color of each family of names, which share their first word; new families are added.
    """
    lines = {name: sorted(points) for name, points in lines.items() if points}
    lengths = sorted({length for points in lines.values() for length, _ in points})
    axis.set(xlabel=label, ylabel=unit, xscale=scale)
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.minorticks_off()
    drawn, ends = [], []
    for name, points in lines.items():
        family = name.replace(",", " ").split()[0]
        color = {"ours": OURS, "limit": LIMIT}.get(family) or colors.setdefault(family, OTHERS[len(colors) % len(OTHERS)])
        look = {"linestyle": ":"} if name == "limit" else {"marker": MARKERS[drawn.count(family) % len(MARKERS)]}
        axis.plot(
            *zip(*points), color=color, **look, **{"linewidth": 2.6, "zorder": 3} if name.partition(",")[0] == "ours" else {}
        )
        drawn.append(family)
        ends.append((points[-1][1], "roofline" if name == "limit" else shown(name), color))
    top = 1.06 * max(value for points in lines.values() for _, value in points)
    axis.set_ylim(0, top)
    lowest = 0.0  # labels must not overlap: each is placed above the one below it
    for value, name, color in sorted(ends):
        place = max(value / top, lowest)
        lowest = place + 0.075
        axis.annotate(name, (1.03, place), xycoords="axes fraction", color=color, fontsize=9, va="center")


def rates(cases: list[dict], length: str, work: str) -> tuple[dict[str, list[tuple]], str]:
    """name -> points (length, work per second), for the limit, ours and the peers; and the unit."""
    lines = {"limit": [], "ours": []}
    for case in cases:
        for name in case["microseconds"]:
            line, amount = ("limit", case[f"limit_{work}"]) if name == case["limit"] else (name, case[work])
            lines.setdefault(line, []).append((case[length], amount / median(case, name) / 1000))
    scale, prefix = (1000, "T") if max(rate for _, rate in lines["limit"]) > 3000 else (1, "G")
    unit = prefix + {"bytes": "B/s", "flops": "FLOP/s"}[work]
    return {name: [(x, rate / scale) for x, rate in points] for name, points in lines.items()}, unit


def cached_against_uncached(result: dict):
    """Milliseconds per token by context length: measured points, fitted lines, and the ratio at each context."""
    measured = of_first(result["cached against uncached"])
    fits = {line["model"]: line for line in of_first(result["growth"])}
    models = list(dict.fromkeys(case["model"] for case in measured))
    figure, axes = card(result, f"Time per token with and without a KV cache, batch {measured[0]['batch']}", len(models))
    for axis, model in zip(axes, models):
        cases = sorted((case for case in measured if case["model"] == model), key=lambda case: case["context"])
        contexts = [case["context"] for case in cases]
        is_log = contexts[-1] > 100 * contexts[0]
        along = [contexts[0] * (contexts[-1] / contexts[0]) ** (i / 50) for i in range(51)] if is_log else contexts
        top = max(median(case, "uncached") for case in cases) / 1000
        for name, key, color in (("uncached", "uncached", OTHERS[0]), ("cached", "ours", OURS)):
            times = [median(case, key) / 1000 for case in cases]
            axis.plot(contexts, times, "o", color=color)
            if model in fits:
                line = fits[model][name]
                axis.plot(along, [(line["start"] + line["slope"] * context) / 1000 for context in along], color=color)
            axis.annotate(name, (contexts[-1], times[-1]), (6, 0), textcoords="offset points", color=color, va="center")
        for case in cases:
            place = (case["context"], median(case, "uncached") / 1000)
            if is_log or place[0] > 0.1 * contexts[-1]:  # below, labels would overlap
                axis.annotate(
                    f"{figures(case['times_ours']['uncached'][1], 2)}x", place, (-5, 3), textcoords="offset points",
                    ha="right", fontsize=9,
                )  # fmt: skip
        axis.set(title=named(model), xlabel="context (tokens)", ylabel="ms per token")
        if is_log:
            axis.set(xscale="log", yscale="log")
            axis.set_xticks(contexts, [f"{context:,}" for context in contexts])
            axis.yaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()
        else:
            axis.set(xlim=0, ylim=(0, 1.1 * top))
    return figure


def decoding(result: dict):
    """Tokens per second, for batch 1 by the bytes that a step reads, with the memory roofline; and for batches."""
    cases = sorted(result["decoding"], key=lambda case: case["bytes"])
    panels = [part for part in ([c for c in cases if c["batch"] == 1], [c for c in cases if c["batch"] > 1]) if part]
    rate = statistics.median(case["limit_bytes"] / median(case, case["limit"]) for case in cases)  # bytes/µs
    figure, axes = card(result, "Decoding: tokens per second, sampling included", len(panels), 4.2)
    names = list(dict.fromkeys(name for case in cases for name in case["microseconds"] if name != case["limit"]))
    looks = dict(zip(names, zip([OURS, *OTHERS], MARKERS)))
    for axis, part in zip(axes, panels):
        single = part[0]["batch"] == 1
        timed = {name: [(i, case) for i, case in enumerate(part) if name in case["microseconds"]] for name in names}
        timed = {name: places for name, places in timed.items() if places}
        for i, (name, places) in enumerate(timed.items()):
            rates, (color, marker) = [tokens_per_second(case, name) for _, case in places], looks[name]
            if single:
                axis.plot([case["bytes"] / 1e9 for _, case in places], rates, f"{marker}-", color=color, label=shown(name))
            else:
                height = 0.84 / len(timed)
                heights = [row + (i - (len(timed) - 1) / 2) * height for row, _ in places]
                axis.barh(heights, rates, 0.92 * height, color=color, label=shown(name))
                for at, value in zip(heights, rates):
                    axis.annotate(f"{value:,.0f}", (value, at), (4, 0), textcoords="offset points", fontsize=7, va="center")
        limits = [case["batch"] * 1e6 * rate / case["bytes"] for case in part]
        label = "roofline: reading weights and cache once"
        if single:
            sizes = [case["bytes"] / 1e9 for case in part]
            axis.plot(sizes, limits, ":", color=LIMIT, label=label)
            axis.set(xscale="log", yscale="log", title="batch 1, by GB read per step")
            # Every second label is placed lower, since some models have nearly the same size.
            ticks = [f"{named(case['model'])}\n{size:.2g}" for case, size in zip(part, sizes)]
            axis.set_xticks(sizes, ["\n\n" * (i % 2) + tick for i, tick in enumerate(ticks)], fontsize=7)
            axis.minorticks_off()
        else:
            rows = range(len(part))
            axis.vlines(limits, [row - 0.45 for row in rows], [row + 0.45 for row in rows], LIMIT, ":", label=label)
            ticks = [f"{named(case['model'])}\nbatch {case['batch']}" for case in part]
            contexts = ", ".join(f"{context:,}" for context in sorted({case["context"] for case in part}))
            axis.set(yticks=rows, yticklabels=ticks, ylim=(len(part) - 0.5, -0.5), title=f"{contexts} tokens of context")
            axis.grid(visible=False)
            axis.margins(x=0.12)
        (axis.yaxis if single else axis.xaxis).set_major_formatter("{x:,.0f}")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.27 if single else -0.14), ncols=2, fontsize=7)
    return figure


def by_weight_size(cases: list[dict]) -> dict[int, dict[str, dict[int, int]]]:
    """Bytes of a weight -> name -> context -> bytes that a step reads, of cases in one dtype."""
    ours = 4 if cases[0]["dtype"] == "float32" else 2
    size_of, sizes = {}, {}
    for case in cases:
        for name, amount in {"ours": case["bytes"], **case["peer_bytes"]}.items():
            distances = {size: abs(math.log(ours * amount / case["bytes"] / size)) for size in (4, 2, 1)}
            size = size_of.setdefault(name, min(distances, key=distances.get))  # at the shortest context, nearly all is weights
            sizes.setdefault(size, {}).setdefault(name, {})[case["context"]] = amount
    return sizes


def against_peers(result: dict):
    """Tokens per second by context length, a panel for each weight size, with the memory roofline. A panel is of the first dtype in
    which the model itself has weights of that size, or else of the first one."""
    first = of_first_model(result["decode"])[0]
    panels = {}  # bytes of a weight -> cases, name -> context -> bytes
    of_model = [case for case in result["decode"] if (case["model"], case["batch"]) == (first["model"], first["batch"])]
    for dtype in dict.fromkeys(case["dtype"] for case in of_model):
        cases = sorted((case for case in of_model if case["dtype"] == dtype), key=lambda case: case["context"])
        for size, amounts in by_weight_size(cases).items():
            if size not in panels or "ours" in amounts and "ours" not in panels[size][1]:
                panels[size] = cases, amounts
    figure, axes = card(result, f"Decoding with {named(first['model'])}, batch {first['batch']}", len(panels), 3.5)
    colors = {}
    for axis, (size, (cases, amounts)) in zip(axes, sorted(panels.items(), reverse=True)):
        rate = statistics.median(case["limit_bytes"] / median(case, case["limit"]) for case in cases)  # bytes/µs
        lines = {"limit": [], **{name: [] for name in amounts}}
        for case in cases:
            least = min(of_context[case["context"]] for of_context in amounts.values() if case["context"] in of_context)
            lines["limit"].append((case["context"], 1e6 * rate / least))
            for name in amounts.keys() & case["microseconds"]:
                lines[name].append((case["context"], 1e6 / median(case, name)))
        curves(axis, lines, "tokens per second" if axis is axes[0] else "", "context (tokens)", colors, "linear")
        axis.set(title=f"{8 * size}-bit weights", xlim=0)
    return figure


def attention(result: dict):
    """FLOP rate by sequence length, a panel for each dtype and head dim with several lengths."""
    panels = {}
    for case in result["prefill"]:
        panels.setdefault((case["dtype"], case["head_dim"]), []).append(case)
    panels = {key: cases for key, cases in panels.items() if len(cases) > 1} or panels
    first, colors = result["prefill"][0], {}
    title = f"Causal attention, batch {first['batch']}, {first['heads']} heads"
    figure, axes = card(result, title, min(3, len(panels)))
    for axis, ((dtype, head_dim), cases) in zip(axes, panels.items()):
        curves(axis, *rates(cases, "T", "flops"), "sequence length (tokens)", colors)
        axis.set(title=f"{dtype}, head dim {head_dim}")
    return figure


def attention_over_caches(result: dict):
    """Rate of reading keys and values: by their number, and by the kind of cache for 8,192 of them."""
    first = result["decode"][0]
    usual = [case for case in result["decode"] if (case["batch"], case["kv_heads"]) == (first["batch"], first["kv_heads"])]
    figure, axes = card(result, f"Attention of one query over a KV cache, {first['heads']} heads of {first['head_dim']}", 2)
    curves(axes[0], *rates([case for case in usual if case["kind"] == first["kind"]], "keys", "bytes"), "keys", {})
    axes[0].set(title=first["kind"])
    keys = statistics.mode(case["keys"] for case in usual)
    kinds = [case for case in usual if case["keys"] == keys]
    of_kinds, unit = rates(kinds, "kind", "bytes")
    values, limit = ([rate for _, rate in of_kinds[name]] for name in ("ours", "limit"))
    bars(axes[1], [case["kind"] for case in kinds], {"ours": values}, f"{unit}, {keys:,} keys", limit)
    return figure


def cache_update(result: dict):
    """Rate of storing keys and values of prompts (bytes read and written), by kind of cache."""
    cases = [case for case in result["prompt"] if case["layout"] == "token-major"]
    figure, (axis,) = card(result, f"Storing keys and values of prompts, {cases[0]['bytes'] / 1e6:.0f} MB read and written", 1)
    lines, unit = rates(cases, "kind", "bytes")
    values = {name: [rate for _, rate in lines[name]] for name in ("ours", "reference", "limit")}
    limit = values.pop("limit")
    bars(axis, [case["kind"] for case in cases], values, unit, limit)
    return figure


def kinds_of_cache(result: dict):
    """Memory of a cache and time of a decode step, by kind of cache."""
    cases = result["kind"]
    first, names = cases[0], [case["kind"] for case in cases]
    title = (
        f"Kinds of cache: {first['batch']} sequences of 20 to 1,000 tokens, {first['layers']} layers of {first['heads']} heads"
    )
    figure, axes = card(result, title, 2, sharey=True)
    needed = first["tokens"] * first["token_bytes"] / 1e6
    bars(axes[0], names, {"ours": [case["cache_bytes"] / 1e6 for case in cases]}, "MB", [needed], "needed by the tokens")
    bars(axes[1], names, {"ours": [median(case) / 1000 for case in cases]}, "ms per decode step: updates and attention")
    return figure


def many_requests(result: dict):
    """New tokens per second of requests of mixed lengths, beside other ways to serve them."""
    case = result["many requests"][0]
    names = list(case["microseconds"])
    title = f"{case['requests']} requests at once, {case['prompt_tokens']:,} tokens in and {case['new_tokens']:,} out"
    figure, (axis,) = card(result, title, 1, height=2.4)
    rates = [case["new_tokens"] * 1e6 / median(case, name) for name in names]
    unit = f"new tokens per second, {named(case['model'])} in {case['dtype']}"
    bars(axis, [shown(name) for name in names], {"ours": rates}, unit)
    for bar, name in zip(axis.patches, names):
        if name.partition(",")[0] != "ours":
            bar.set_color(OTHERS[0])
    return figure


def bars(
    axis, labels, series: dict[str, list[float]], unit: str, limit: list[float] = (), limit_name: str = "roofline"
) -> None:
    """Horizontal bars with their values, grouped by label; a line at the median of `limit`."""
    height = 0.84 / len(series)
    for i, (name, values) in enumerate(series.items()):
        places = [row + (i - (len(series) - 1) / 2) * height for row in range(len(labels))]
        axis.barh(places, values, 0.92 * height, color=OURS if name == "ours" else OTHERS[i - 1], label=shown(name))
        for place, value in zip(places, values):  # inside the bar, if it is long enough
            within = value > 0.15 * max(map(max, series.values()))
            axis.annotate(
                figures(value, 2), (value, place), (-4 if within else 4, 0), textcoords="offset points", fontsize=9,
                va="center_baseline", ha="right" if within else "left", color="white" if within else INK,
            )  # fmt: skip
    axis.set(xlabel=unit, yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.5, -0.5))
    axis.grid(False)
    if limit:
        at = statistics.median(limit)
        axis.axvline(at, color=LIMIT, linestyle=":", zorder=0.5, label=f"{limit_name}, {figures(at)}")
    if limit or len(series) > 1:
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)


FUNCTIONS = {
    function.__name__: function
    for function in (
        decoding,
        cached_against_uncached,
        against_peers,
        attention,
        attention_over_caches,
        cache_update,
        kinds_of_cache,
        many_requests,
    )  # fmt: skip
}
