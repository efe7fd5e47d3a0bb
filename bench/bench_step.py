"""The cases under pytest-benchmark: `pytest bench/bench_step.py --benchmark-enable`.

For following one optimizer over time. To compare optimizers take `bench.step_cost`, which lets them step in turn.
"""

from __future__ import annotations

import pytest

from .cases import CASES, OPTIMIZERS, Params, count, make_params

#: Rounds: as many as step this many parameters, within bounds.
PARAMETERS, FEWEST, MOST = 1_000_000_000, 5, 100


@pytest.fixture(scope="module", params=CASES)  # of the module, so that a case's tensors are made once
def case(request: pytest.FixtureRequest) -> tuple[str, Params]:
    return request.param, make_params(CASES[request.param])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step(benchmark, case: tuple[str, Params], name: str):
    case_name, params = case
    entry = OPTIMIZERS[name]
    optimizer = entry.make(params)
    rounds = max(FEWEST, min(MOST, PARAMETERS // count(CASES[case_name])))
    benchmark.group = case_name
    benchmark.extra_info.update(parameters=count(CASES[case_name]), bytes_per_parameter=entry.bytes_per_parameter)
    benchmark.pedantic(optimizer.step, rounds=FEWEST if entry.slow else rounds, warmup_rounds=2)
