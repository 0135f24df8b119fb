"""Plots of the results, as SVG beside them."""

import json
from pathlib import Path

COLOURS = {"memory": "#4c78a8", "time": "#f58518"}


def draw(results: Path) -> None:
    """Draws the plots of every machine under `results`."""
    for name, plot in (("kv_cache", kinds_of_cache), ("attention_cpu", attention_on_the_cpu)):
        for path in results.glob(f"*/{name}.json"):
            plot(json.loads(path.read_text()), path.with_suffix(".svg"))


def kinds_of_cache(result: dict, path: Path) -> None:
    """Memory and time of a decode step, by kind of cache."""
    from matplotlib import pyplot

    cases = result["kind"]
    names = [case["kind"] for case in cases]
    panels = {
        "memory": ("memory (MB)", [case["cache_bytes"] / 1e6 for case in cases]),
        "time": ("time of a decode step (ms)", [case["microseconds"]["ours"][1] / 1000 for case in cases]),
    }
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 2.8), sharey=True, layout="constrained")
    for axis, (name, (label, values)) in zip(axes, panels.items()):
        bars = axis.barh(names, values, color=COLOURS[name])
        axis.bar_label(bars, [f"{value:.0f}" if value >= 10 else f"{value:.1f}" for value in values], padding=3)
        axis.set_xlabel(label)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    needed = cases[0]["tokens"] * cases[0]["token_bytes"] / 1e6
    axes[0].axvline(needed, color="grey", linestyle=":", linewidth=1)
    axes[0].annotate("what the tokens need", (needed, -0.45), (4, 0), textcoords="offset points", color="grey", fontsize=8)
    axes[0].invert_yaxis()
    about = result["machine"]
    figure.suptitle(
        f"64 sequences of 20 to 1,000 tokens, one layer of 12 heads of 64, fp32; {about['cpu']}, "
        f"{about['threads']} threads",
        fontsize=9,
    )
    save(figure, path)


def attention_on_the_cpu(result: dict, path: Path) -> None:
    """Speed by length, of causal attention and of one token, beside scaled_dot_product_attention and the limits."""
    from matplotlib import pyplot

    heads = result["decode"][0]["heads"]
    panels = {
        "causal attention (GFLOP/s)": (result["prefill"], "T", "flops", "matrix product", "tokens"),
        "one token (GB/s)": (
            [case for case in result["decode"] if case["heads"] == heads], "keys", "bytes", "reading", "keys",
        ),
    }  # fmt: skip
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3), layout="constrained")
    for axis, (title, (cases, length, work, limit, label)) in zip(axes, panels.items()):
        lengths = [case[length] for case in cases]
        for name, colour in (("ours", COLOURS["memory"]), ("SDPA", COLOURS["time"]), (limit, "grey")):
            amount = f"limit_{work}" if name == limit else work
            speeds = [case[amount] / case["microseconds"][name][1] / 1000 for case in cases]
            style = {"linestyle": ":"} if name == limit else {"marker": "o"}
            axis.plot(lengths, speeds, color=colour, label=name, **style)
        axis.set(xscale="log", xlabel=label, ylabel=title, ylim=0)
        axis.set_xticks(lengths, [f"{number:,}" for number in lengths], minor=False)
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    about = result["machine"]
    figure.suptitle(f"Batch 1, {heads}, fp32; {about['cpu']}, {about['threads']} threads", fontsize=9)
    save(figure, path)


def save(figure, path: Path) -> None:
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "fastgpt"  # the same file for the same results
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    pyplot.close(figure)
    print(f"wrote {path}")
