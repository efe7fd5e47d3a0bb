"""The training script: configurations, schedule, choice of learning rates, runs that are interrupted and resumed."""

import dataclasses
import json
import re

import pytest
import torch

from bench import datasets, experiment, runs, tasks, train

CONFIG = """
question = "?"
dataset = "digits"
model = "convnet"
iterations = 12
halve_every = 5
evaluations = 4
seeds = [0, 1]
[model_settings]
width = 24
[data]
batch = 16
augmentation = "crop-flip"
held_back = 40
[[optimizer]]
class = "VSGD"
lr = [0.001, 0.01]
settings = { state_format = "q8" }
[[optimizer]]
class = "SGD"
lr = [0.1, 1e30]
"""
TEXT = {
    "digits": "shakespeare",
    "convnet": "gpt",
    "width = 24": "width = 64\nlayers = 1\nheads = 2\ncontext = 8",
    'batch = 16\naugmentation = "crop-flip"\nheld_back = 40': "batch = 4\ncontext = 8",
}
CPU = torch.device("cpu")


@pytest.fixture
def images(monkeypatch):
    """Random pictures in the place of the digits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (120, 1, 8, 8), generator=generator, dtype=torch.uint8)
    y = torch.arange(120) % 10
    data = datasets.Images(x[:100], y[:100], x[100:], y[100:], 10)
    monkeypatch.setitem(datasets.DATASETS, "digits", lambda cache: data)
    return data


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def text():
    """Random characters, many enough for the embedding's states to be coded."""
    characters = torch.randint(100, (1000,), generator=torch.Generator().manual_seed(0))
    return datasets.Text(characters[:800], characters[800:900], characters[900:], 100)


@pytest.fixture(params=["images", "text"])
def make(request, config, tmp_path):
    """Makes runs of the first optimizer, each with a folder of its own."""
    if request.param == "text":
        said = CONFIG
        for old, new in TEXT.items():
            said = said.replace(old, new)
        config.write_text(said)
    plan = experiment.load(config)
    task = tasks.make_task(request.getfixturevalue(request.param), plan.data)
    return task, lambda name: runs.Run(plan, plan.contenders[0], 0.01, 1, CPU, tmp_path / name)


def measured(record):
    return {key: value for key, value in record.items() if key != "training_seconds"}


@pytest.mark.parametrize("at", [1, 5, 11])
def test_interrupted_run_resumes_to_the_bit(make, monkeypatch, at):
    task, run_in = make
    expected = runs.execute(run_in("whole"), task)
    draw, calls = task.training_batch, []

    def interrupt_once(seed, iteration):
        calls.append(iteration)
        if iteration == at and calls.count(at) == 1:
            raise KeyboardInterrupt
        return draw(seed, iteration)

    monkeypatch.setattr(task, "training_batch", interrupt_once)
    run = run_in("interrupted")
    with pytest.raises(KeyboardInterrupt):
        runs.execute(run, task)
    assert run.record() is None
    assert measured(runs.execute(run, task)) == measured(expected)
    # it did go on from the checkpoint after every third iteration
    assert calls[calls.index(at) + 1] == at // 3 * 3
    assert [path.name for path in run.path("").parent.iterdir()] == [run.path(".json").name]


def test_ended_run_is_not_run_again(make, monkeypatch):
    task, run_in = make
    first = runs.execute(run_in("once"), task)
    monkeypatch.setattr(task, "training_batch", None)
    assert runs.execute(run_in("once"), task) == first


def test_ended_run_is_found_by_what_it_was(make):
    """By its settings, rate, seed and kind of device, and not by its optimizer's name."""
    task, run_in = make
    run = run_in("once")
    record = runs.execute(run, task)
    renamed = dataclasses.replace(run, contender=dataclasses.replace(run.contender, name="V/SGD"))
    for change in ({"device": torch.device("cuda")}, {"lr": 0.01000001}, {"seed": 2}):
        assert dataclasses.replace(run, **change).record() is None
    run.path(".json").rename(renamed.path(".json"))
    assert renamed.record() == {**record, "contender": "V/SGD"}


def test_damaged_record_is_named(make):
    _, run_in = make
    run = run_in("damaged")
    run.path(".json").parent.mkdir(parents=True)
    run.path(".json").write_text('{"lr": ')
    with pytest.raises(RuntimeError, match=r"\.json is no record of a run \(.*\); delete it"):
        run.record()


def test_damaged_checkpoint_is_named(make):
    task, run_in = make
    run = run_in("damaged")
    run.path(".pt").parent.mkdir(parents=True)
    run.path(".pt").write_bytes(b"PK no zip")
    with pytest.raises(RuntimeError, match=r"\.pt is no checkpoint of this run"):
        runs.execute(run, task)


def test_learning_rate_is_halved(make):
    task, run_in = make
    history = runs.execute(run_in("schedule"), task)["history"]
    # after 3, 6, 9 and 12 iterations, of which the 5th and 10th halve it
    assert [(h["iteration"], h["lr"]) for h in history] == [(3, 0.01), (6, 0.005), (9, 0.005), (12, 0.0025)]


def test_every_learning_rate_is_tried_and_the_best_repeated(config, images, tmp_path):
    out = tmp_path / "out"
    assert train.main([str(config), "--out", str(out), "--cache", str(tmp_path / "cache")]) == 0
    results = json.loads((out / "tiny.json").read_text())
    sgd = [(r["lr"], r["seed"], r["chosen"]) for r in results["runs"] if r["contender"] == "SGD"]
    assert sgd == [(0.1, 0, True), (1e30, 0, False), (0.1, 1, True)]
    # 1e30 has diverged, and is not measured
    diverged = [r for r in results["runs"] if r["lr"] == 1e30]
    assert [(r["diverged_at"], r["test"]) for r in diverged] == [(3, None)]
    assert results["environments"][0]["torch"] == torch.__version__
    lines = (out / "tiny.csv").read_text().splitlines()
    assert len(lines) == 1 + 6
    row = dict(zip(lines[0].split(","), lines[-1].split(","), strict=True))
    assert float(row["test_accuracy"]) == results["runs"][-1]["test"]["accuracy"]
    assert sorted(path.name for path in out.iterdir()) == ["tiny.csv", "tiny.json", "tiny.png"]


def test_what_diverges_in_its_last_step_is_not_chosen(config, images, tmp_path):
    """The loss of that iteration is of the parameters before it."""
    config.write_text(CONFIG.replace("iterations = 12", "iterations = 1"))
    assert train.main([str(config), "--out", str(tmp_path), "--cache", str(tmp_path / "cache")]) == 0
    results = json.loads((tmp_path / "tiny.json").read_text())
    ended = [(r["lr"], r["diverged_at"], r["chosen"]) for r in results["runs"] if r["contender"] == "SGD"]
    assert ended == [(0.1, None, True), (1e30, 1, False), (0.1, None, True)]


def test_results_have_every_setting(config, images, tmp_path):
    config.write_text(CONFIG.replace("held_back = 40", "held_back = 30"))
    assert train.main([str(config), "--out", str(tmp_path), "--cache", str(tmp_path / "cache")]) == 0
    results = json.loads((tmp_path / "tiny.json").read_text())
    assert results["task"] == {"batch": 16, "augmentation": "crop-flip", "examples": 70, "held_back": 30}
    vsgd, sgd = (results["hyperparameters"][name] for name in ("VSGD", "SGD"))
    assert (vsgd["ghattg"], vsgd["state_format"], sgd["momentum"]) == (30.0, "q8", 0)


def test_choice_follows_the_metric():
    records = [
        {"lr": 1.0, "validation": {"accuracy": 0.3, "loss": 2.0}},
        {"lr": 2.0, "validation": {"accuracy": 0.2, "loss": 1.0}},
        {"lr": 3.0, "validation": None},
    ]
    assert train.choose(records, tasks.ImageTask) == 1.0
    assert train.choose(records, tasks.TextTask) == 2.0
    assert train.choose(records[2:], tasks.TextTask) is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"digits"', '"mnist"', "dataset must be one of .*got 'mnist'"),
        ('"convnet"', '"alexnet"', "model must be one of .*got 'alexnet'"),
        ('class = "SGD"', 'class = "Lion"', "class must be one of .*got 'Lion'"),
        ("[0.1, 1e30]", "[0.1]", "the same number of learning rates, got"),
        ("[0.1, 1e30]", "[0.1, -1.0]", "lr must be different positive numbers, got"),
        ("[0.1, 1e30]", "[0.1, inf]", "lr must be different positive numbers, got"),
        ("halve_every = 5", "halve_every = 0", "halve_every must be .*got 0"),
        ("iterations = 12", "iterations = true", "iterations must be .*got True"),
        ("seeds = [0, 1]", "seeds = []", "seeds must be .*got"),
        ("seeds = [0, 1]", "seeds = [0, 0]", "seeds must be different .*got"),
        ("seeds = [0, 1]", "seeds = 3", "seeds must be a list, got 3"),
        ('"digits"', '["digits"]', r"dataset must be a string, got \['digits'\]"),
        ('class = "SGD"', 'class = "SGD"\nname = 3', "name must be a string, got 3"),
        ('class = "SGD"', 'class = "SGD"\nsettings = { momentun = 1 }', "optimizer 'SGD': .*momentun"),
        ("batch = 16", "batch = 0", "batch must be .*got 0"),
        ("batch = 16", "batch = 1.5", "batch must be .*got 1.5"),
        ("held_back = 40", "held_back = -40", "held_back must be .*got -40"),
        ("held_back = 40", "held_back = 40\nexamples = 0", "examples must be .*got 0"),
        ("halve_every = 5", "halved = 5", "halved"),
        ("width = 24", "depth = 2", "model 'convnet' does not take the settings"),
        ("batch = 16", "batch = 1000", "do not fit 100"),
        ('"crop-flip"', '"mixup"', "augmentation must be one of .*got 'mixup'"),
        ("q8", "q7", "q7"),
        ('question = "?"', "question = ?", "is no TOML"),
    ],
)
def test_bad_configuration_is_refused(config, images, tmp_path, capsys, old, new, message):
    config.write_text(CONFIG.replace(old, new))
    out = tmp_path / "out"
    assert train.main([str(config), "--out", str(out), "--cache", str(tmp_path / "cache")]) == 1
    (error,) = capsys.readouterr().err.splitlines()  # nothing was trained before
    assert re.match(f"error: .*{message}", error)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads must be a whole number of at least 1, got 0"),
        (["--device", "abacus"], "--device must be cpu or cuda, got 'abacus'"),
        (["--out", "FILE/out"], "FILE"),
        (["missing.toml"], "missing.toml cannot be read"),
    ],
)
def test_bad_arguments_are_refused_before_training(config, images, tmp_path, capsys, arguments, message):
    (tmp_path / "FILE").touch()
    arguments = [argument.replace("FILE", str(tmp_path / "FILE")) for argument in arguments]
    configs = [str(config), *(argument for argument in arguments if argument.endswith(".toml"))]
    options = [argument for argument in arguments if argument not in configs]
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    assert train.main([*configs, *out, "--cache", str(tmp_path / "cache"), *options]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert message in error


def test_a_changed_setting_is_another_run(config):
    plan = experiment.load(config)
    config.write_text(CONFIG.replace("width = 24", "width = 25"))
    other = experiment.load(config)
    assert plan.fingerprint(plan.contenders[0], CPU) != other.fingerprint(other.contenders[0], CPU)
    assert plan.fingerprint(plan.contenders[0], CPU) != plan.fingerprint(plan.contenders[1], CPU)
