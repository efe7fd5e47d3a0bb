"""Makes docs/results.md from the files in bench/results alone, training nothing: `python -m bench.results`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

from . import atomic, iteration_cost, plots
from .comparison import METRICS, Results, at_edge, brief, compare, finals
from .experiment import load
from .metrics import ENTROPY_BINS, spread

ROOT = Path(__file__).parent.parent
CONFIGS, RESULTS, PAGE = ROOT / "bench" / "configs", ROOT / "bench" / "results", ROOT / "docs" / "results.md"

#: The configurations whose sections have a form of their own.
GAMMA, STOCH, ABLATION = "fashion_gamma", "fashion_stoch_grad_adam", "fashion_ablation"
FORMATS = "fashion_formats"
CONVMIXER, TRANSFORMER, GPT = "cifar10_convmixer_small", "shakespeare_transformer_small", "shakespeare_gpt"
ADAMW, SGD = "AdamW, no decay", "SGD, momentum 0.9"

HEAD = """# What the experiments show

This page is made by `python -m bench.results` from the files in [bench/results](../bench/results) alone; every number
is in the file that is named beside it. [bench/README.md](../bench/README.md) has the commands that made the files.
"a ± b (n)" is the mean and the sample standard deviation over n seeds; a seed chooses the network's start, the batches
and the rounding. For each optimizer the same number of learning rates was tried, with the first seed; the best on data
that was kept back from training then ran with all seeds, and what is shown was measured on test data at the end. The
seed that chose is one of those shown. "At the edge" says that the chosen rate is the smallest or largest of those
tried, so that another may be better. An accuracy on 1000 pictures that were kept back has a standard error of about a
point, so that which of two neighbouring rates is chosen is often chance.

Three seeds are few: if two optimizers were alike, one would still be ahead with all three in one of four comparisons.
So "ahead with all seeds" is a hint, and only a difference of several standard deviations more than that.
"""


def load_results(name: str) -> Results | None:
    """What `bench.train` wrote for a configuration, if it has."""
    path = RESULTS / "train" / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def setting(results: Results) -> str:
    """What was trained on what, in a sentence or two."""
    e = results["experiment"]
    parameters = results["runs"][0]["parameters"]
    model = ", ".join([e["model"], *(f"{key} {value}" for key, value in e["model_settings"].items())])
    data = ", ".join(f"{key} {value}".replace("_", " ") for key, value in results["task"].items())
    places = "; ".join(
        f"{x['device']}, {x['threads']} thread(s), torch {x['torch']}, Python {x['python']}, backend {x['backend']}"
        for x in results["environments"]
    )
    return (
        f"{model} ({parameters:,} parameters) on {e['dataset']} ({data}); {e['iterations']} iterations, the learning "
        f"rate halved every {e['halve_every']}. {places}."
    )


def table(results: Results) -> str:
    """A row a contender, and what each learning rate gave."""
    label, scale, digits, _ = METRICS[results["metric"]]
    values = finals(results)
    rows = []
    for contender in results["experiment"]["contenders"]:
        own = [run for run in results["runs"] if run["contender"] == contender["name"]]
        chosen = next((run["lr"] for run in own if run["chosen"]), None)
        first = [run for run in own if run["seed"] == results["experiment"]["seeds"][0]]
        tried = ", ".join(f"{run['lr']:g}: {_value(run, results['metric'], scale, digits)}" for run in first)
        final = (
            spread([*values[contender["name"]].values()]).text(digits, scale)
            if contender["name"] in values
            else "diverged"
        )
        lr = (
            "-" if chosen is None else f"{chosen:g}" + (" (at the edge)" if at_edge(results, contender["name"]) else "")
        )
        rows.append((contender["name"], lr, final, tried))
    kept_back = "validation " + label.removeprefix("test ")
    return tabulate(
        rows, ("optimizer", "lr", label, f"lr: {kept_back}, first seed"), tablefmt="github", disable_numparse=True
    )


def _value(run: dict[str, Any], metric: str, scale: float, digits: int) -> str:
    return f"{run['validation'][metric] * scale:.{digits}f}" if run["validation"] else "diverged"


def experiment(name: str, comparisons: list[tuple[str, str]], picture: str | None = None) -> str:
    """A section: question, setting, table, plot and comparisons."""
    results = load_results(name)
    if results is None:
        return f"`bench/configs/{name}.toml` has not been run.\n"
    files = f"[{name}.json](../bench/results/train/{name}.json), [.csv](../bench/results/train/{name}.csv)"
    said = "\n".join(f"- {compare(results, a, b)}" for a, b in comparisons)
    image = f"![{name}](../bench/results/train/{picture or name}.png)"
    return f"{setting(results)} Files: {files}.\n\n{table(results)}\n\n{image}\n\n{said}\n"


def gamma() -> str:
    """The section on the strength of the prior."""
    return experiment(GAMMA, [], f"{GAMMA}_test") + f"- {gamma_words()}\n"


def gamma_words() -> str:
    """How far apart the values of `ps` end."""
    results = load_results(GAMMA)
    if results is None:
        return "not run"
    digits = METRICS[results["metric"]][2]
    points = gamma_points(results)
    means = {ps: spread(own).mean for ps, own in points.items()}
    small = [mean for ps, mean in means.items() if ps <= 1e-7]
    if not small:
        return "diverged"
    sds = [spread(own).sd or 0.0 for own in points.values()]
    return (
        f"from {min(means):g} to 1e-7 the means lie within {max(small) - min(small):.{digits}f} points of each other, "
        f"up to {max(means):g} within {max(means.values()) - min(means.values()):.{digits}f}; the standard deviation "
        f"over seeds is {min(sds):.{digits}f} to {max(sds):.{digits}f}"
    )


def gamma_points(results: Results) -> dict[float, list[float]]:
    """The test metric's values, as they are shown, by `ps`."""
    scale = METRICS[results["metric"]][1]
    ps = {contender["name"]: contender["settings"]["ps"] for contender in results["experiment"]["contenders"]}
    return {ps[name]: [value * scale for value in values.values()] for name, values in finals(results).items()}


def entropies() -> str:
    """The section on StochGradAdam and the certainty of its predictions."""
    results = load_results(STOCH)
    if results is None:
        return experiment(STOCH, [])
    means, sure = [], []
    for name, own in plots.chosen_runs(results).items():
        if not own:
            continue
        means.append(f"{spread([run['test']['entropy_mean'] for run in own]).text(4)} with {name}")
        histograms = [run["test"]["entropy_histogram"] for run in own]
        sure.append(f"{spread([counts[0] / sum(counts) for counts in histograms]).text(1, 100)} % with {name}")
    words = (
        f"- The mean normalised entropy of a prediction on the test set (0 is certain, 1 knows nothing) is "
        f"{', '.join(means)}; the share of predictions below {1 / ENTROPY_BINS:g} is {', '.join(sure)}.\n"
    )
    image = f"\n![normalised entropy](../bench/results/train/{STOCH}_entropy.png)\n"
    return experiment(STOCH, [("StochGradAdam", "Adam")]) + words + image


def draw() -> None:
    """The plots that are not one run of `bench.train`'s own."""
    folder = RESULTS / "train"
    if (results := load_results(GAMMA)) is not None:
        points, label = gamma_points(results), METRICS[results["metric"]][0]
        atomic.write(folder / f"{GAMMA}_test.png", lambda path: plots.versus(points, "ps", label, path))
    if (results := load_results(STOCH)) is not None:
        atomic.write(folder / f"{STOCH}_entropy.png", lambda path: plots.entropies(results, path))


def iteration_costs() -> str:
    """The section on the cost of an iteration."""
    parts = []
    for kind in ("cpu", "cuda"):
        if (path := RESULTS / f"iteration_cost_{kind}.json").exists():
            table = iteration_cost.render(json.loads(path.read_text()))
            parts.append(f"File: [{path.name}](../bench/results/{path.name}). {table}\n- {iteration_words(kind)}\n")
    return "\n".join(parts) or "It has not been measured.\n"


def iteration_words(kind: str) -> str:
    """What an iteration costs with fused VSGD, over one with fused AdamW."""
    path = RESULTS / f"iteration_cost_{kind}.json"
    if not path.exists():
        return f"not measured on {kind}"
    measured = json.loads(path.read_text())
    fused = [row for row in measured["rows"] if row["optimizer"] == "vsgd (fused)"]
    said = (f"{row['network']} {round(row['ratio'] - 1, 3) + 0.0:+.1%}" for row in fused)
    return f"fused VSGD over fused AdamW on {measured['environment']['device']}: {', '.join(said)}"


def not_run() -> str:
    """The configurations that nobody has run."""
    rows = []
    for path in sorted(CONFIGS.glob("*.toml")):
        if load_results(path.stem) is None:
            e = load(path)
            trials = len(e.contenders) * (len(e.contenders[0].lr) + len(e.seeds) - 1)
            rows.append((f"`{path.stem}.toml`", e.model, e.dataset, f"{e.iterations:,}", trials))
    return tabulate(
        rows, ("configuration", "model", "data", "iterations", "runs"), tablefmt="github", disable_numparse=True
    )


def in_short() -> str:
    """The papers' claims, and what the committed runs say of each."""
    networks = {CONVMIXER: "ConvMixer", TRANSFORMER: "transformer", GPT: "larger transformer", ABLATION: "convnet"}

    def said(a: str, b: str, *names: str) -> str:
        found = []
        for name in names:
            results = load_results(name)
            edge = [x for x in (a, b) if results is not None and at_edge(results, x)]
            note = f" (at the edge of its rates: {' and '.join(edge)})" if edge else ""
            found.append(f"{networks.get(name, 'convnet')}: {brief(results, a, b)}{note}")
        return "; ".join(found)

    rows = [
        ("VSGD ends better than Adam", said("VSGD", ADAMW, CONVMIXER, TRANSFORMER, GPT)),
        ("VSGD ends better than SGD", said("VSGD", SGD, CONVMIXER, TRANSFORMER)),
        ("VSGD ends better than ConstantVSGD", said("VSGD", "ConstantVSGD", CONVMIXER, TRANSFORMER, ABLATION)),
        ("below 1e-7 the prior's strength matters little", gamma_words()),
        ("StochGradAdam ends better than Adam", said("StochGradAdam", "Adam", STOCH)),
        ("an iteration costs a few percent more than Adam's", "; ".join(map(iteration_words, ("cpu", "cuda")))),
    ]
    return tabulate(rows, ("the papers' claim", "here, in small experiments"), tablefmt="github")


def page() -> str:
    """The whole page."""
    against = [("VSGD", other) for other in (ADAMW, SGD, "ConstantVSGD")]
    variants = [("VSGD", "ConstantVSGD"), ("shape_offset 0", "VSGD")]
    formats = [("bf16 states", "VSGD"), ("q8 states", "VSGD")]
    return f"""{HEAD}
## In short

{in_short()}

What follows is far smaller than the papers' experiments, and says nothing about theirs.

## Does VSGD end in a better place than AdamW and SGD?

The paper: yes, on VGG, ConvMixer and ResNeXt, and than its constant variant by about half a point.

### A small ConvMixer on CIFAR-10

{experiment(CONVMIXER, against)}
### A character transformer on Shakespeare's works

{experiment(TRANSFORMER, against)}
### A larger transformer on the same works

On a GPU, with coded states beside VSGD's own; the runs of each optimizer ran beside those of the others.

{experiment(GPT, [("VSGD", ADAMW), *((f"VSGD, {style} states", "VSGD") for style in ("q8", "packed16"))])}
## How much does the strength of the prior matter?

The paper's gamma, here `ps`. Its Table 5: not much below 1e-7. A stronger prior makes steps shorter, so that each
strength has its own learning rate; the last column shows what one rate for all would have given.

{gamma()}
## What do the learned gain and shape_offset change?

{experiment(ABLATION, variants)}
## What do the state formats change?

One learning rate for all. [formats.md](formats.md) has a transformer's losses.

{experiment(FORMATS, formats)}
## Is StochGradAdam better than Adam, and more certain?

Its paper: yes, both.

{entropies()}
## What does an iteration cost?

The paper's Table 2: 0.41 s with VSGD and 0.38 s with Adam for VGG16, 8 % more, with code that is not fused. A larger
batch makes the optimizer's share smaller, and on a CPU the batches here are far smaller than the paper's.

{iteration_costs()}
## What was too large to try

These configurations are ready for a GPU and nobody has run them. CIFAR-100 and Tiny ImageNet could not be fetched where
the page was made, so that their loaders were tested on small files of the same format only. The learning rates are from
the range of the paper's Table 3, as many for every optimizer, and there is no search over weight decays. Networks,
batches, iterations and alterations of pictures are those of the authors' code.

{not_run()}
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.results", description=__doc__.splitlines()[0])
    parser.parse_args(argv)
    draw()
    atomic.write_text(PAGE, page())


if __name__ == "__main__":
    main()
