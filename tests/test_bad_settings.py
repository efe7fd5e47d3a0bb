"""Settings that only some rules have are refused as VSGD's are (test_bad_input.py)."""

import math
import re

import pytest
import torch

from tests.test_bad_input import assert_refused, leaf
from vsgd_kernels import VSGD, ConstantVSGD, StochGradAdam


@pytest.mark.parametrize(
    ("rule", "name", "value", "error", "match"),
    [
        (ConstantVSGD, "tau", 0.0, ValueError, r"tau must be in \(0, 1\], got 0.0"),
        (ConstantVSGD, "ghattg", 0.0, ValueError, "ghattg must be greater than 0 and finite, got 0.0"),
        (ConstantVSGD, "ps", -1e-8, ValueError, "ps must be greater than 0 and finite, got -1e-08"),
        (StochGradAdam, "sampling_rate", 0.0, ValueError, r"sampling_rate must be in \(0, 1\], got 0.0"),
        (StochGradAdam, "sampling_rate", 1.01, ValueError, r"sampling_rate must be in \(0, 1\], got 1.01"),
        (StochGradAdam, "sampling_rate", math.nan, ValueError, r"sampling_rate must be in \(0, 1\], got nan"),
        (StochGradAdam, "decay", 0.0, ValueError, r"decay must be in \(0, 1\], got 0.0"),
        (StochGradAdam, "decay", 1.5, ValueError, r"decay must be in \(0, 1\], got 1.5"),
        (StochGradAdam, "betas", (1.0, 0.999), ValueError, r"betas\[0\] must be in \[0, 1\), got 1.0"),
        (StochGradAdam, "betas", (0.9, -0.1), ValueError, r"betas\[1\] must be in \[0, 1\), got -0.1"),
        (StochGradAdam, "betas", (0.9, "x"), TypeError, r"betas\[1\] must be a real number, got 'x'"),
        (StochGradAdam, "betas", (0.9,), TypeError, r"betas must be a pair of numbers, got \(0.9,\)"),
        (StochGradAdam, "betas", 0.9, TypeError, "betas must be a pair of numbers, got 0.9"),
        (StochGradAdam, "seed", -1, ValueError, r"seed must be at least 0 and below 2\^63, got -1"),
    ],
)
def test_settings_of_the_other_rules(rule, name, value, error, match):
    """In the constructor, in a group, and at the step, before anything is written."""
    with pytest.raises(error, match=match):
        rule([leaf()], **{name: value})
    with pytest.raises(error, match=match):
        rule([{"params": [leaf()], name: value}])
    param = leaf()
    param.grad = torch.ones(3)
    optimizer = rule([param])
    optimizer.param_groups[0][name] = value
    assert_refused(optimizer, [param], error, match)


@pytest.mark.parametrize("name", ["state_format", "master_weights"])
@pytest.mark.parametrize("value", [["q8"], {}], ids=str)
def test_names_that_are_no_strings(name, value):
    with pytest.raises(ValueError, match=f"{name} must be one of .*, got {re.escape(repr(value))}"):
        VSGD([leaf()], **{name: value})
