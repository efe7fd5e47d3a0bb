"""What gradient release saves: `python -m bench.gradient_release`. Peaks of a GPT-2-like model's training on the CPU.

Each run is a process of its own. Bytes of gradients are counted, hence exact: all that parameters hold in `.grad` each
time that one is accumulated. The process's peak, as the system counts it, has everything else in it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

from vsgd_kernels import VSGD

RESULTS = Path(__file__).parent / "results" / "gradient_release.json"
VOCABULARY, WIDTH, LAYERS, HEADS, CONTEXT, BATCH, STEPS = 8192, 512, 8, 8, 64, 1, 2
#: Of glibc: what is freed goes back to the system at once, so that a process's peak is that of what it uses.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}
#: Settings of the runs.
RUNS = [
    {"gradient_release": released, "state_format": state_format}
    for state_format in ("fp32", "q8")
    for released in (False, True)
]


class Model(nn.Module):
    """A pre-norm transformer whose output layer shares the token embedding, as GPT-2's."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, LAYERS, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, tokens: Tensor) -> Tensor:
        """From tokens [batch, CONTEXT] to logits [batch, CONTEXT, VOCABULARY]."""
        x = self.tokens(tokens) + self.positions.weight
        return F.linear(self.layers(x, mask=self.mask, is_causal=True), self.tokens.weight)


def run(settings: dict[str, bool | str]) -> dict[str, bool | str | int]:
    """Trains some steps; the settings, and what they took, in bytes."""
    torch.manual_seed(0)
    model = Model()
    params = list(model.parameters())
    peak = 0

    def count(_: Tensor) -> None:
        nonlocal peak
        peak = max(peak, sum(param.grad.nbytes for param in params if param.grad is not None))

    for param in params:
        param.register_post_accumulate_grad_hook(count)  # before the optimizer's, which frees the gradient
    optimizer = VSGD(params, lr=1e-3, **settings)
    for _ in range(STEPS):
        tokens = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1))
        optimizer.zero_grad()
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    return {
        **settings,
        "parameters": sum(param.numel() for param in params),
        "largest_parameter_bytes": max(param.nbytes for param in params),
        "peak_gradient_bytes": peak,
        "peak_process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gradient_release", description="Measures gradient release.")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="default: %(default)s")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(run(args.run)))
        return
    rows = []
    for settings in RUNS:
        command = [sys.executable, "-m", "bench.gradient_release", "--run", json.dumps(settings)]
        result = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **ALLOCATOR})
        rows.append(json.loads(result.stdout))
    environment = {"torch": torch.__version__, "python": platform.python_version(), "dtype": "float32", **ALLOCATOR}
    args.json.write_text(json.dumps({"environment": environment, "rows": rows}, indent=2) + "\n")
    columns = ["state_format", "gradient_release", "peak_gradient_bytes", "peak_process_bytes"]
    cells = [[row[key] / 2**20 if key.endswith("bytes") else str(row[key]) for key in columns] for row in rows]
    print(f"{rows[0]['parameters']} parameters; MiB\n")
    print(tabulate(cells, columns, floatfmt=".1f"))


if __name__ == "__main__":
    main()
