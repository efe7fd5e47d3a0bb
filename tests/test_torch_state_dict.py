"""What torch tests of its optimizers' state dicts: names, hooks, older and foreign entries, loading at any time."""

import copy

import pytest
import torch

from tests.cases import assert_same_bits, check_step, make_params, through_a_file
from tests.optimizer_infos import Problem, each_info, each_input


def assert_same_dict(one, other):
    """The same keys in the same order, and the same bits."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same_dict(one[key], other[key])
    elif isinstance(one, torch.Tensor):
        assert_same_bits([one], [other])
    else:
        assert one == other


def named(params, prefix="layer"):
    return [(f"{prefix}{i}", param) for i, param in enumerate(params)]


def go_on_alike(problem, optimizer, twin_problem, twin, steps=2):
    """From where the first problem is now."""
    twin_problem.generator.set_state(problem.generator.get_state())
    with torch.no_grad():
        for param, other in zip(problem.params, twin_problem.params, strict=True):
            other.copy_(param)
    for own, its in ((problem, optimizer), (twin_problem, twin)):
        own.train(its, steps)
    assert_same_bits(problem.params, twin_problem.params)


@each_input(torch.float32, torch.bfloat16)
def test_deterministic(info, dtype, kwargs):
    """Equal parameters that are not the same ones have equal state dicts, before a step, after, and once loaded."""
    problem, twin_problem = Problem(dtype), Problem(dtype)
    optimizer, twin = (info.optim_cls(p.params, **kwargs) for p in (problem, twin_problem))
    assert_same_dict(optimizer.state_dict(), twin.state_dict())
    problem.train(optimizer)
    twin_problem.train(twin)
    assert_same_dict(optimizer.state_dict(), twin.state_dict())
    saved = copy.deepcopy(optimizer.state_dict())
    loaded = info.optim_cls(Problem(dtype).params, lr=0.5, **{k: v for k, v in kwargs.items() if k != "lr"})
    loaded.load_state_dict(through_a_file(saved))
    assert_same_dict(loaded.state_dict(), saved)


@each_input(torch.float32, torch.bfloat16)
def test_loaded_at_any_time(info, dtype, kwargs):
    """Back to an earlier step, by an optimizer that has a plan for its present states; then to before the first."""
    problem, twin_problem = Problem(dtype), Problem(dtype, seed=1)
    optimizer, twin = (info.optim_cls(p.params, **kwargs) for p in (problem, twin_problem))
    fresh = copy.deepcopy(twin.state_dict())
    problem.train(optimizer, 2)
    twin_problem.train(twin, 5)
    twin.load_state_dict(optimizer.state_dict())
    go_on_alike(problem, optimizer, twin_problem, twin)
    twin.load_state_dict(fresh)
    assert not any(twin.state.values())
    optimizer = info.optim_cls(problem.params, **kwargs)
    go_on_alike(problem, optimizer, twin_problem, twin)


@each_info
@pytest.mark.parametrize("saved_names", [None, "layer", "other"])
@pytest.mark.parametrize("own_names", [None, "layer"])
def test_names(info, saved_names, own_names):
    """Never decide what is loaded where, and are treated as AdamW treats them."""
    results = []
    for cls in (info.optim_cls, torch.optim.AdamW):
        problem, twin_problem = Problem(), Problem(seed=1)
        optimizer, twin = (
            cls(named(p.params, prefix) if prefix else p.params, lr=1e-2)
            for p, prefix in ((problem, saved_names), (twin_problem, own_names))
        )
        problem.train(optimizer, 2)
        saved = through_a_file(optimizer.state_dict())
        twin.load_state_dict(saved)
        go_on_alike(problem, optimizer, twin_problem, twin)
        results.append([o.param_groups[0].get("param_names") for o in (optimizer, twin)])
        results[-1].append(saved["param_groups"][0].get("param_names"))
    assert results[0] == results[1]


@each_info
def test_names_in_another_order(info):
    """torch's recipe: a hook sorts what was saved by the names of the optimizer that loads."""
    params, twins = (make_params(torch.Generator().manual_seed(0)) for _ in range(2))
    optimizer = info.optim_cls(named(params), lr=1e-2)
    twin = info.optim_cls(named(twins)[::-1], lr=1e-2)
    optimizer.step()
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"state of parameter 0: expected .* of shape"):
        twin.load_state_dict(saved)

    def by_name(optimizer, state_dict):
        (group,) = state_dict["param_groups"]
        ids = dict(zip(group["param_names"], group["params"], strict=True))
        names = optimizer.param_groups[0]["param_names"]
        return {**state_dict, "state": {i: state_dict["state"][ids[name]] for i, name in enumerate(names)}}

    twin.register_load_state_dict_pre_hook(by_name)
    twin.load_state_dict(saved)
    for param, other in zip(params, twins, strict=True):
        assert_same_dict(dict(optimizer.state[param]), dict(twin.state[other]))


@each_info
def test_older_state_dicts(info):
    """One that lacks entries of a group, as all did before there were those, has their defaults."""
    for entry in info.not_og_supported_flags:
        problem, twin_problem = Problem(), Problem(seed=1)
        optimizer, twin = (info.optim_cls(p.params, lr=1e-2) for p in (problem, twin_problem))
        problem.train(optimizer, 2)
        saved = copy.deepcopy(optimizer.state_dict())
        del saved["param_groups"][0][entry]
        twin.load_state_dict(saved)
        assert twin.param_groups[0][entry] == optimizer.defaults[entry]
        go_on_alike(problem, optimizer, twin_problem, twin)


@each_info
@pytest.mark.parametrize("kind", [int, float, torch.tensor, lambda n: torch.tensor([float(n)], dtype=torch.float64)])
def test_step_counts_of_other_kinds(info, kind):
    problem, twin_problem = Problem(), Problem(seed=1)
    optimizer, twin = (info.optim_cls(p.params, lr=1e-2) for p in (problem, twin_problem))
    problem.train(optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = kind(int(state["step"]))
    twin.load_state_dict(saved)
    go_on_alike(problem, optimizer, twin_problem, twin)
    assert_same_dict(optimizer.state_dict(), twin.state_dict())


@each_info
@pytest.mark.parametrize("capturable", [False, True])
def test_tensor_lr(info, capturable):
    """Is loaded as a tensor, and is then the optimizer's own."""
    problem, twin_problem = Problem(), Problem(seed=1)
    optimizer = info.optim_cls(problem.params, lr=torch.tensor(1e-2), capturable=capturable)
    twin = info.optim_cls(twin_problem.params, lr=0.5)
    problem.train(optimizer, 2)
    saved = optimizer.state_dict()
    twin.load_state_dict(saved)
    go_on_alike(problem, optimizer, twin_problem, twin)
    assert twin.param_groups[0]["capturable"] is capturable
    saved["param_groups"][0]["lr"].fill_(7.0)
    assert twin.param_groups[0]["lr"].item() == pytest.approx(1e-2)
    twin.param_groups[0]["lr"].fill_(3e-3)
    twin_problem.random_gradients()
    check_step(twin, twin_problem.params)


@each_info
def test_entries_of_others(info):
    """Group entries that it does not know, and state that belongs to no parameter, are kept as by AdamW."""
    kept = []
    for cls in (info.optim_cls, torch.optim.AdamW):
        params = make_params(torch.Generator().manual_seed(0))
        optimizer = cls([{"params": params, "name": "decoder"}], lr=1e-2)
        optimizer.state["epoch"] = 7
        optimizer.state["notes"] = {"seen": torch.ones(2, dtype=torch.float64)}
        optimizer.step()
        saved = through_a_file(optimizer.state_dict())
        saved["param_groups"][0]["fused"] = None
        saved["param_groups"][0]["mine"] = [1, 2]
        twin = cls(make_params(torch.Generator().manual_seed(0)), lr=0.5)
        twin.load_state_dict(saved)
        twin.step()
        group = twin.param_groups[0]
        kept.append([group["name"], group["fused"], group["mine"], group["lr"], twin.state["epoch"]])
        kept[-1].append(twin.state_dict()["state"]["notes"]["seen"].tolist())
    assert kept[0] == kept[1] == ["decoder", None, [1, 2], 1e-2, 7, [1.0, 1.0]]


@each_info
def test_state_dict_hooks(info):
    """Those before see the optimizer, those after the dict, in order, and may return another; handles remove them."""
    params = make_params(torch.Generator().manual_seed(0))
    optimizer = info.optim_cls(params, lr=1e-2)
    optimizer.step()
    plain = copy.deepcopy(optimizer.state_dict())
    seen = []
    handles = [
        optimizer.register_state_dict_pre_hook(lambda o: seen.append(("pre", o is optimizer))),
        optimizer.register_state_dict_post_hook(lambda o, d: seen.append(("post", list(d["state"])))),
        optimizer.register_state_dict_post_hook(lambda o, d: {**d, "version": 2}),
        optimizer.register_state_dict_post_hook(lambda o, d: seen.append(("first", "version" in d)), prepend=True),
    ]
    saved = optimizer.state_dict()
    assert seen == [("pre", True), ("first", False), ("post", [0, 1, 2])]
    assert saved.pop("version") == 2
    assert_same_dict(saved, plain)
    for handle in handles:
        handle.remove()
    assert_same_dict(optimizer.state_dict(), plain)
    assert len(seen) == 3


@each_info
def test_load_state_dict_hooks(info):
    """In order, whatever loads before; a dict that one of them returns is what is loaded; handles remove them."""
    params = make_params(torch.Generator().manual_seed(0))
    optimizer = info.optim_cls(params, lr=1e-2)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    seen = []

    def set_lr(lr):
        def hook(_, state_dict):
            seen.append(state_dict["param_groups"][0]["lr"])
            return {**state_dict, "param_groups": [{**state_dict["param_groups"][0], "lr": lr}]}

        return hook

    handles = [
        optimizer.register_load_state_dict_pre_hook(set_lr(0.3)),
        optimizer.register_load_state_dict_pre_hook(set_lr(0.2), prepend=True),
        optimizer.register_load_state_dict_post_hook(lambda o: seen.append(("after", o.param_groups[0]["lr"]))),
        optimizer.register_load_state_dict_post_hook(lambda o: seen.append("first after"), prepend=True),
    ]
    for _ in range(2):
        seen.clear()
        optimizer.load_state_dict(saved)
        assert seen == [1e-2, 0.2, "first after", ("after", 0.3)]
    for handle in handles:
        handle.remove()
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert len(seen) == 4


@each_info
def test_groups_that_were_added(info):
    """Parameters of all groups in order, each with its settings, also where they were one group before."""
    params, twins = (make_params(torch.Generator().manual_seed(0)) for _ in range(2))
    optimizer = info.optim_cls(params[:1], lr=1e-2)
    optimizer.add_param_group({"params": params[1:], "lr": 3e-3, "weight_decay": 0.1})
    optimizer.step()
    saved = through_a_file(optimizer.state_dict())
    assert [group["params"] for group in saved["param_groups"]] == [[0], [1, 2]]
    with pytest.raises(ValueError, match="different number of parameter groups"):
        info.optim_cls(twins, lr=0.5).load_state_dict(saved)
    twin = info.optim_cls([{"params": twins[:1]}, {"params": twins[1:]}], lr=0.5)
    twin.load_state_dict(saved)
    with torch.no_grad():
        for param, other in zip(params, twins, strict=True):
            other.copy_(param)
    check_step(twin, twins)
    optimizer.step()
    assert_same_bits(params, twins)
    assert [group["lr"] for group in twin.param_groups] == [1e-2, 3e-3]
