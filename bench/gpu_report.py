"""The results of `python -m bench.gpu` as a table and a plot: `python -m bench.gpu_report bench/results/gpu_….json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .cases import BASELINE

COLUMNS = {
    "case": "case",
    "optimizer": "optimizer",
    "device_ms": "device ms",
    "device_ratio": f"/ {BASELINE}",
    "byte_limit_ratio": "byte limit",
    "gb_per_s": "GB/s",
    "of_copy": "of a copy's",
    "step_ms": "step ms",
    "step_ratio": f"/ {BASELINE}",
    "host_us": "host µs",
    "launches": "launches",
    "peak_mib": "peak MiB",
}
FORMATS = {
    "device_ms": ".3f",
    "device_ratio": ".2f",
    "step_ms": ".3f",
    "step_ratio": ".2f",
    "byte_limit_ratio": ".3f",
    "gb_per_s": ".0f",
    "of_copy": ".0%",
    "host_us": ".0f",
    "peak_mib": ".1f",
}


def markdown(results: dict[str, Any]) -> str:
    """What it was measured on, and a table."""
    env = results["environment"]
    lines = [
        f"{env['gpu']}, driver {env['driver']}, CUDA {env['cuda']}, torch {env['torch']}, triton {env['triton']}, "
        f"{env['cpu']}; float32 parameters. A copy within the device reaches {env['copy_gb_per_s']:.0f} GB/s. "
        "device ms is the time that the device takes for a `step()` that the host has queued before (not measured "
        "where its kernels are too many for the queue), and GB/s are the bytes of the byte limit in that time; step ms "
        "is that of one step among many with nothing between them, where the device may wait for the host; host µs is "
        "how long one keeps the host; peak MiB is what it allocates in passing.",
        "",
        "| " + " | ".join(COLUMNS.values()) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for row in results["rows"]:
        shown = {**row, "of_copy": row["gb_per_s"] and row["gb_per_s"] / env["copy_gb_per_s"]}
        cells = ("-" if shown[key] is None else format(shown[key], FORMATS.get(key, "")) for key in COLUMNS)
        lines.append("| " + " | ".join(cells) + " |")
    if results["left_out"]:
        lines += ["", f"No time was left for: {'; '.join(results['left_out'])}."]
    return "\n".join(lines) + "\n"


#: The README's table: cases, and what stands beside the baseline.
SUMMARY_CASES = {
    "gpt-1.3b": "transformer, 1.3B",
    "gpt2-124m": "GPT-2, 124M",
    "resnet50": "ResNet-50, 26M",
    "vgg16": "VGG16, 15M",
    "1gib": "one tensor of 268M",
}
SUMMARY_OPTIMIZERS = {
    "vsgd (triton)": "VSGD",
    "vsgd (triton, bf16)": "bf16 states",
    "vsgd (triton, q8)": "q8 states",
    "vsgd (triton, packed16)": "packed16 states",
}


def summary(results: dict[str, Any]) -> str:
    """The README's table: device times, and their ratios to the baseline's beside the byte limits."""
    rows = {(row["case"], row["optimizer"]): row for row in results["rows"]}
    limits = (rows[next(iter(SUMMARY_CASES)), name]["byte_limit_ratio"] for name in SUMMARY_OPTIMIZERS)
    heads = (f"{title} (limit {limit:.3f})" for title, limit in zip(SUMMARY_OPTIMIZERS.values(), limits, strict=True))
    lines = [f"| shapes | AdamW fused | {' | '.join(heads)} |", "|" + "---|" * (2 + len(SUMMARY_OPTIMIZERS))]
    for case, title in SUMMARY_CASES.items():
        own = (rows[case, name] for name in SUMMARY_OPTIMIZERS)
        cells = (f"{row['device_ms']:.2f} ms, **{row['device_ratio']:.2f}**" for row in own)
        lines.append(f"| {title} | {rows[case, BASELINE]['device_ms']:.2f} ms | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars: device time over the baseline's for each case of large tensors and each optimizer, and its byte limit."""
    import matplotlib.pyplot as plt

    rows = [row for row in results["rows"] if row["device_ratio"] is not None and row["parameters"] >= 10**7]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    names = list(dict.fromkeys(row["optimizer"] for row in rows))
    figure, axes = plt.subplots(figsize=(12, 5))
    width = 0.85 / len(names)
    for i, name in enumerate(names):
        own = {row["case"]: row for row in rows if row["optimizer"] == name}
        at = [cases.index(case) + (i - (len(names) - 1) / 2) * width for case in own]
        ratios = [row["device_ratio"] for row in own.values()]
        axes.bar(at, ratios, 0.9 * width, label=name, color=plt.get_cmap("tab20")(i))
        limits = [row["byte_limit_ratio"] for row in own.values()]
        axes.hlines(limits, [x - width / 2 for x in at], [x + width / 2 for x in at], color="black", linewidth=1.2)
    axes.hlines([], [], [], color="black", label="byte limit")
    axes.set_xticks(range(len(cases)), cases)
    axes.set_ylabel(f"device time / {BASELINE}")
    axes.set_title(f"One step, float32 parameters, {results['environment']['gpu']}")
    axes.legend(ncols=7, fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.07), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(results: dict[str, Any], folder: Path) -> None:
    """Writes JSON, Markdown and, where matplotlib is there, PNG, named after the GPU."""
    name = "gpu_" + "_".join(results["environment"]["gpu"].lower().split())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / f"{name}.md").write_text(markdown(results))
    try:
        plot(results, folder / f"{name}.png")
    except ImportError:
        print(
            f"no plot: matplotlib is missing; where it is, `python -m bench.gpu_report {folder / name}.json` draws it"
        )


if __name__ == "__main__":
    for argument in map(Path, sys.argv[1:]):
        write(json.loads(argument.read_text()), argument.parent)
