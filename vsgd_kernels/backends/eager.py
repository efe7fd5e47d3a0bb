"""The eager backend: the reference, one tensor after the other, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import graphs, reference, state_formats
from ..batch import Batch, Gradients, SampleBatch
from ..formats import extra_bits, is_16_bit, load_param, master_noise, store_param
from ..noise import Noise
from ..philox import words
from ..rules import arithmetic_dtype


class EagerBackend:
    """Plain torch operations: everywhere available, slow, with temporaries of a parameter's size."""

    name = "eager"
    device_types: tuple[str, ...] | None = None
    alignment: int | None = None

    def why_unavailable(self) -> str | None:
        """It always is available."""
        return None

    def prepare(self, batch: Batch, grads: list[Tensor]) -> Batch:
        """Nothing to prepare."""
        return batch

    def norm(self, prepared: Batch, grads: Gradients) -> None:
        """Torch finds it."""
        return None

    @torch.no_grad()
    def run(self, prepared: Batch, grads: Gradients, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Steps the batch.

        Raises:
            RuntimeError: a CUDA graph is being captured; step counts and scalars are read on the host.
        """
        if graphs.capturing():
            raise RuntimeError(
                "backend='eager' reads scalars on the host, so a CUDA graph cannot be made of its step()"
            )
        if found_inf is not None and found_inf.item():
            return
        scale = 1.0 if grad_scale is None else grad_scale.item()
        b = prepared
        update = reference.RULES[b.rule.name]
        rows = b.read_hyper().tolist()
        columns = zip(
            b.params, b.lows, grads.tensors, b.states, b.blocks, b.steps, b.groups, b.keys, b.seeds, b.places,
            b.variances, strict=True,
        )  # fmt: skip
        for param, low, grad, states, blocks, step, group, key, seed, place, variance in columns:
            step += 1
            dtype = arithmetic_dtype(param.dtype)
            scalars = b.rule.scalars(step.item(), rows[group], dtype)
            factor = scalars.sign / scale
            ghat = reference.bounded(grad.to(dtype) * factor)
            old = tuple(state_formats.decode(b.rule, states, blocks))
            extra = [words(seed, place, int(step.item()), states[0])] if b.rule.draws else []
            extra += [] if variance is None else [reference.bounded_variance(variance * factor * factor)]
            theta, new = update(load_param(param, low), ghat, old, scalars, *extra)
            noise = Noise.of(key, int(step.item()))
            rounds = is_16_bit(param.dtype) and extra_bits(low) < 16
            store_param(param, low, theta, master_noise(noise, states) if rounds else None)
            state_formats.encode(b.rule, new, states, blocks, noise)

    def prepare_samples(self, batch: SampleBatch, samples: list[Tensor]) -> SampleBatch:
        """Nothing to prepare."""
        return batch

    @torch.no_grad()
    def add_samples(self, prepared: SampleBatch, samples: Gradients, counts: list[int]) -> None:
        """Adds them."""
        for mean, variance, own, count in zip(prepared.means, prepared.variances, samples.tensors, counts, strict=True):
            for number, sample in enumerate(own, count + 1):
                new = reference.add_sample(mean, variance, reference.bounded(sample.to(mean.dtype)), number)
                mean.copy_(new[0])
                variance.copy_(new[1])
