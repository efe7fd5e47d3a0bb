"""Who is told of a step as by torch's optimizers: hooks, profilers, observers."""

import json

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tests.optimizer_infos import each_info, leaf


@each_info
def test_all_hooks_in_order(info):
    """The global ones around the optimizer's; one before the step may exchange the closure."""
    param = leaf()
    optimizer = info.optim_cls([param], lr=1e-2)
    seen = []

    def note(name, result=None):
        def hook(_, args, kwargs):
            seen.append((name, torch.equal(param, torch.ones(3))))
            return result

        return hook

    def closure():
        param.grad = torch.ones(3)
        return 5.0

    handles = [
        optimizer.register_step_post_hook(note("post")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre", ((optimizer, closure), {}))),
        register_optimizer_step_pre_hook(note("global pre")),
    ]
    try:
        assert optimizer.step(lambda: 3.0) == 5.0
    finally:
        for handle in handles:
            handle.remove()
    # torch runs the optimizer's own before the global ones after a step.
    assert seen == [("global pre", True), ("pre", True), ("post", False), ("global post", False)]
    optimizer.step(closure)
    assert len(seen) == 4


@each_info
def test_named_in_profiles(info):
    param = leaf()
    optimizer = info.optim_cls([param], lr=1e-2)
    param.grad = torch.ones(3)
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = [event.name for event in profile.function_events]
    assert [names.count(f"Optimizer.{method}#{info.name}.{method}") for method in ("step", "zero_grad")] == [1, 1]


@each_info
def test_observed(info, tmp_path):
    """By an observer that is no profiler, in the scope in which torch's optimizers are."""
    found = []
    for optimizer_class in (info.optim_cls, torch.optim.AdamW):
        param = leaf()
        optimizer = optimizer_class([param], lr=1e-2)
        param.grad = torch.ones(3)
        path = tmp_path / f"{optimizer_class.__name__}.json"
        observer = torch.profiler.ExecutionTraceObserver().register_callback(str(path))
        observer.start()
        optimizer.step()
        observer.stop()
        observer.unregister_callback()
        (node,) = (n for n in json.loads(path.read_text())["nodes"] if n["name"].startswith("Optimizer.step#"))
        found.append((node["name"], [attr["value"] for attr in node["attrs"] if attr["name"] == "scope"]))
    (own, scope), (_, torchs) = found
    assert (own, scope) == (f"Optimizer.step#{info.name}.step", torchs)


@each_info
def test_hook_of_the_closure(info):
    """One that it registers is called in the same step."""
    param = leaf()
    optimizer = info.optim_cls([param], lr=1e-2)
    seen = []

    def closure():
        param.grad = torch.ones(3)
        optimizer.register_step_post_hook(lambda *_: seen.append(torch.equal(param, torch.ones(3))))

    optimizer.step(closure)
    assert seen == [False]
