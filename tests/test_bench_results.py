"""The results page: what it says of runs whose numbers are known, and that it is the committed files'."""

import copy
import dataclasses
import json

import pytest
import torch

from bench import cases, comparison, gpu_report, models, results


def fabricated(metric="accuracy", **values):
    """Results of contenders with two learning rates, the chosen one with a value for each seed."""
    contenders = [{"name": name, "lr": [0.1, 0.2], "settings": {}} for name in values]
    runs = [
        {"contender": name, "lr": 0.2, "seed": seed, "chosen": True, "test": {metric: x}, "validation": {metric: x}}
        for name, own in values.items()
        for seed, x in enumerate(own)
    ]
    return {"metric": metric, "experiment": {"contenders": contenders, "seeds": [0, 1, 2]}, "runs": runs}


@pytest.mark.parametrize(
    ("metric", "a", "b", "said"),
    [
        ("accuracy", [0.53, 0.52, 0.54], [0.50, 0.51, 0.52],
         "A is ahead of B with all seeds, by 2.00 ± 1.00 (3) points."),
        ("accuracy", [0.50, 0.51, 0.52], [0.53, 0.52, 0.54],
         "A is behind B with all seeds, by 2.00 ± 1.00 (3) points."),
        ("loss", [2.0, 2.1, 2.2], [2.1, 2.2, 2.3], "A is ahead of B with all seeds, by 0.1000 ± 0.0000 (3) nats."),
        ("loss", [2.0, 2.3, 2.3], [2.1, 2.2, 2.2],
         "No clear difference: A is behind B by 0.0333 ± 0.1155 (3) nats, but not with all seeds."),
        ("accuracy", [0.5, 0.5, 0.5], [0.5, 0.5, 0.5],
         "No clear difference: A is behind B by 0.00 ± 0.00 (3) points, but not with all seeds."),
    ],
)  # fmt: skip
def test_comparison_of_seeds(metric, a, b, said):
    assert comparison.compare(fabricated(metric, A=a, B=b), "A", "B") == said


def test_diverged_runs_are_not_compared():
    known = fabricated(A=[0.6, 0.6, 0.6], B=[0.5, 0.5, 0.5])
    known["runs"][-1]["test"] = None
    assert "cannot be compared" in comparison.compare(known, "A", "B")
    known["runs"][1]["test"] = None  # as many are left of each, but of other seeds
    assert "cannot be compared" in comparison.compare(known, "A", "B")
    assert comparison.brief(known, "A", "B") == "some runs diverged"


def test_what_is_said_in_brief():
    assert comparison.brief(None, "A", "B") == "not run"
    known = fabricated(A=[0.53, 0.52, 0.54], B=[0.50, 0.51, 0.52], C=[0.54, 0.50, 0.56])
    assert comparison.brief(known, "A", "B") == "ahead with all 3 seeds, by 2.00 ± 1.00 (3) points"
    assert comparison.brief(known, "B", "A") == "behind with all 3 seeds, by 2.00 ± 1.00 (3) points"
    assert comparison.brief(known, "A", "C") == "no clear difference (behind by 0.33 ± 2.08 (3) points)"


def test_table_names_the_edge_of_the_grid_and_what_diverged():
    known = fabricated(A=[0.5, 0.6, 0.7])
    other = copy.deepcopy(known["runs"][0]) | {"lr": 0.1, "chosen": False, "validation": None, "test": None}
    known["runs"].insert(0, other)
    row = [cell.strip() for cell in results.table(known).splitlines()[-1].strip("|").split("|")]
    assert row == ["A", "0.2 (at the edge)", "60.00 ± 10.00 (3)", "0.1: diverged, 0.2: 50.00"]
    known["experiment"]["contenders"][0]["lr"].append(0.3)
    assert "edge" not in results.table(known)


def test_page_is_made_from_the_committed_files():
    assert results.PAGE.read_text() == results.page()


def test_gpu_tables_are_made_from_the_committed_files():
    """Each GPU's, and the README's from one of them."""
    readme = (results.RESULTS.parent.parent / "README.md").read_text()
    pages = list(results.RESULTS.glob("gpu_*.md"))
    measured = [json.loads(page.with_suffix(".json").read_text()) for page in pages]
    assert [page.read_text() for page in pages] == list(map(gpu_report.markdown, measured))
    assert [gpu_report.summary(each) in readme for each in measured].count(True) == 1


def test_committed_results_are_of_the_committed_configurations():
    names = {path.stem for path in (results.RESULTS / "train").glob("*.json")}
    for name in sorted(names):
        said = results.load(results.CONFIGS / f"{name}.toml")
        ran = results.load_results(name)["experiment"]
        assert ran == json.loads(json.dumps(dataclasses.asdict(said))), name


@pytest.mark.parametrize("path", sorted(results.CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_configuration_can_be_read(path):
    assert results.load(path).name == path.stem


@pytest.mark.parametrize(
    ("name", "settings", "shape", "outputs", "parameters"),
    [
        ("vgg", {}, (3, 32, 32), 10, cases.count(cases.CASES["vgg16"])),
        # a convolution of 9 c^2 + c, and a normalisation of 2 c, more in each of the last three stages
        (
            "vgg",
            {"depth": 19},
            (3, 64, 64),
            10,
            cases.count(cases.CASES["vgg16"]) + 9 * (256**2 + 2 * 512**2) + 3 * 1280,
        ),
        ("gpt", {}, (1024,), 50257, cases.count(cases.CASES["gpt2-124m"])),
        # a stem of 4 d k + 3 d, 8 blocks of (25 + 1 + 2) d and (d + 1 + 2) d, and the classes
        ("convmixer", {}, (3, 32, 32), 100, 256 * (12 + 3) + 8 * 256 * (28 + 259) + 100 * 257),
    ],
)
def test_model_has_the_papers_parameters(name, settings, shape, outputs, parameters):
    with torch.device("meta"):
        model = models.build(name, settings, shape, outputs)
    assert sum(param.numel() for param in model.parameters()) == parameters


def test_resnext_has_the_authors_widths():
    with torch.device("meta"):
        model = models.build("resnext", {}, (3, 32, 32), 100)
    convolutions = [
        (m.in_channels, m.out_channels, m.stride[0], m.groups) for m in model.modules() if hasattr(m, "groups")
    ]
    stages = [(64, 256, 1), (256, 512, 2), (512, 1024, 2)]
    expected = [(3, 64, 1, 1)]
    for into, out, stride in stages:
        width = 8 * out // 4
        expected += [(into, width, 1, 1), (width, width, stride, 8), (width, out, 1, 1), (into, out, stride, 1)]
    assert convolutions == expected


def test_gpt_looks_at_no_later_token(generator):
    torch.manual_seed(0)
    model = models.build("gpt", {"width": 16, "layers": 2, "heads": 2, "context": 8}, (8,), 11)
    tokens = torch.randint(11, (1, 8), generator=generator)
    changed = tokens.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 11
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])
