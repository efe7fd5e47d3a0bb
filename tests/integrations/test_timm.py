"""timm's factory.

    from timm.optim._optim_factory import default_registry
    default_registry.register(timm.optim.OptimInfo("vsgd", VSGD))
    optimizer = timm.optim.create_optimizer_v2(model, "vsgd", lr=1e-2, weight_decay=0.05, layer_decay=0.75)

StochGradAdam wants `has_betas=True` beside its name: timm drops `betas` without a word otherwise. A name must have no
underscore: timm reads what comes before it as a wrapper, as in "lookahead_vsgd".

timm imports torchvision, whose builds must match torch's; the tests have a process of their own where nothing that
looks for torchvision finds what stands in for it.
"""

import os
import subprocess
import sys
from pathlib import Path


def test_in_a_process_of_its_own():
    tests = Path(__file__).with_name("timm_process.py")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tests)],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
