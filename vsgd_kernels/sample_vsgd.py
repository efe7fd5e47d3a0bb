"""VSGD on samples, Appendix A.3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

from . import hyperparameters, rules
from .backends.library import Snapshot
from .batch import Gradients, check_grad, check_param
from .plan import lists_of, param_name, params_of
from .samples import Intake, Samples
from .vsgd import VSGD


class SampleVSGD(VSGD):
    r"""VSGD that sees the samples of a step's gradient, and not only their mean.

    Chen, Kuzina, Esmaeili and Tomczak, "Variational Stochastic Gradient Descent for Deep Neural Networks",
    Appendix A.3: each of M gradients :math:`\hat g^{(i)}` updates the posterior by itself, and the results are
    averaged. Of the samples, only their mean :math:`\bar g` and variance :math:`v` enter: with
    :math:`q = \frac{1}{M} \sum_i (\hat g^{(i)} - \mu)^2 = (\bar g - \mu)^2 + v`, and w, σ² and ρ as in `VSGD`,

    .. math::
        \mu' &= \mu + w (\bar g - \mu)                                                              & (71) \\
        b_g' &= b_g + \rho_1 (\gamma + (\sigma^2 + w^2 q) / 2 - b_g)                                 & (73) \\
        b_{\hat g}' &= b_{\hat g} + \rho_2 (K_g \gamma + (\sigma^2 + (1 - w)^2 q) / 2 - b_{\hat g})    & (74) \\
        \theta' &= \theta (1 - \eta \lambda) - \eta \mu' / (\sqrt{\mu'^2 + \sigma^2} + \epsilon)       & (24)

    Arguments and state are `VSGD`'s; `max_grad_norm` is for the norm of the mean, and scales every sample, and
    `gradient_release` is refused. A sample is what a call of `accumulate` finds:

    - micro-batches: the gradient of each backward pass is one sample.

      >>> for micro_batch in batch:
      ...     loss(model, micro_batch).backward()  # the mean loss; not divided by the number of micro-batches
      ...     optimizer.accumulate()
      >>> optimizer.step()

    - per-sample gradients: `param.grad_sample` of shape [M, *param.shape], as Opacus sets it, or as
      ``torch.func.vmap(torch.func.grad(loss), ...)`` gives it.

      >>> for name, param in model.named_parameters():
      ...     param.grad_sample = per_sample_gradients[name]
      >>> optimizer.accumulate()
      >>> optimizer.step()

    - data-parallel processes: each feeds its own gradients, which nobody averages (DistributedDataParallel under
      `no_sync`), and `all_reduce` brings all of them together before the step.

    All samples have the same weight. Between two steps there are two numbers an element, mean and variance, where
    accumulation in `.grad` has one; both stay allocated. Samples are no part of the state dict.

    In a compiled program `accumulate`, `all_reduce` and `discard` break the graph.

    `step` takes gradients that were not accumulated as one more sample. So with none accumulated it is `VSGD`, to the
    bit; and with `torch.amp.GradScaler`, which looks at `.grad`, leave those of the last micro-batch there, and the
    unscaling to its `step`: after `unscale_`, or with no `.grad`, a step that has samples raises RuntimeError. A step
    that the scaler skips, and one whose samples are not all finite, discards its samples: they have another scale than
    the next ones.
    """

    rule = rules.SAMPLE_VSGD

    @_disable_dynamo
    @torch.no_grad()
    def accumulate(self) -> None:
        """Takes each parameter's `grad_sample`, or else its `grad` as one sample, and sets both to None.

        Raises:
            RuntimeError: no parameter has either.
            TypeError, ValueError: one of them does not fit its parameter, or the numbers of samples of the parameters
                differ; nothing is taken then.
        """
        if not (self._take_again() or self._take(_has_any)):
            raise RuntimeError("accumulate() found no parameter with a grad or grad_sample; call it after backward()")

    @_disable_dynamo
    @torch.no_grad()
    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Brings together the samples of the processes of a group; every one of them must call it, before the step.

        Gradients that were not accumulated count as one more sample. Every process has the samples of all then, and
        the parameters stay the same on all.

        Args:
            group: the processes; None stands for all of them.
        """
        self._take(_has_any)
        params = params_of(self.param_groups)
        counts = torch.tensor([self._samples_of(param).count for param in params], device=params[0].device)
        dist.all_reduce(counts, group=group)
        for param, total in zip(params, counts.tolist(), strict=True):
            if total:
                self._samples_of(param).all_reduce(total, group)

    @_disable_dynamo
    def discard(self) -> None:
        """Forgets all samples since the last step; gradients stay."""
        for samples in self._samples.values():
            samples.clear()

    def _prepare(self) -> None:
        super()._prepare()
        self._forget_prepared()

    def _forget_prepared(self) -> None:
        """Forgets what was prepared for the samples that there were."""
        self._intake: Intake | None = None  # of the last call of accumulate(), where it took gradients alone
        self._variance_of: dict[Tensor, Tensor] | None = None
        self._plain: Snapshot | None = None  # of a step on gradients alone, without samples, for which all was ready

    def _variances(self) -> dict[Tensor, Tensor]:
        if self._variance_of is None:
            self._variance_of = {param: samples.variance for param, samples in self._samples.items()}
        return self._variance_of

    def _forget_what_has_left(self) -> None:
        """Drops the samples of parameters that are in no group any more."""
        own = set(map(id, params_of(self.param_groups)))
        if not own.issuperset(map(id, self._samples)):
            self._samples = {param: samples for param, samples in self._samples.items() if id(param) in own}
            self._forget_prepared()

    def _samples_of(self, param: Tensor) -> Samples:
        samples = self._samples.get(param)
        if samples is None or not (samples.count or samples.fits(param)):
            samples = self._samples[param] = Samples.none_of(param)
            self._forget_prepared()
        return samples

    def _has_accumulated(self) -> bool:
        return any(samples.count for samples in self._samples.values())

    def _check_scaler(self) -> None:
        """Raises RuntimeError where a GradScaler, which knows `.grad` alone, has left samples out."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None or not (self._has_accumulated() or any(map(_has_samples, params_of(self.param_groups)))):
            return
        if getattr(self, "grad_scale", None) is None:
            raise RuntimeError(
                "GradScaler.unscale_() has unscaled .grad, but neither accumulated samples nor grad_sample; leave "
                "unscaling to GradScaler.step()"
            )
        if not isinstance(found_inf, Tensor):
            raise RuntimeError("GradScaler found no .grad to look at; leave those of the last micro-batch there")

    def _take(self, wanted: Callable[[Tensor], bool]) -> bool:
        """Feeds those parameters that are wanted what they have; whether there was any."""
        taken = [
            (name, param, _samples_in(name, param))
            for i, group in enumerate(self.param_groups)
            for j, param in enumerate(group["params"])
            if wanted(param)
            for name in (param_name(self.param_groups, i, j),)
        ]
        if not taken:
            return False
        lengths = {name: len(samples) for name, param, samples in taken if _has_samples(param)}
        for name, length in lengths.items():
            if length != (first := next(iter(lengths.values()))):
                raise ValueError(
                    f"grad_sample of {name} must have as many samples as that of {next(iter(lengths))}, {first}, "
                    f"got {length}"
                )
        for name, param, _ in taken:
            if not self._samples_of(param).fits(param):
                raise ValueError(
                    f"{name} has changed its shape, dtype or device since it was fed; discard() its samples"
                )
        params, samples = [param for _, param, _ in taken], [each for *_, each in taken]
        intake = Intake(params, list(map(self._samples_of, params)), samples, self._backend)
        if not lengths:
            intake.watch(lists_of(self.param_groups))
            self._intake = intake
        intake.add(Gradients.of(samples))
        for param in params:
            param.grad = None
            if _has_samples(param):
                param.grad_sample = None
        return True

    def _take_again(self) -> bool:
        """Does what `_take` would, where it is known that all is as it was the last time; whether it is."""
        intake = self._intake
        if intake is None or any(map(_has_samples, params_of(self.param_groups))):
            return False
        gradients = intake.unchanged(lists_of(self.param_groups))
        if gradients is None:
            return False
        intake.add(gradients)
        for param in intake.params:
            param.grad = None
        return True

    def _is_as_before(self, lists: list[list[Tensor]]) -> bool:
        """Whether it is known that all is as in a step on gradients alone, which has left no samples."""
        return (
            self._plain is not None
            and not any(samples.count or samples.is_old for samples in self._samples.values())
            and not any(map(_has_samples, chain(*lists)))
            and self._plain.gradients(lists, []) is not None
        )

    def _step(self) -> None:
        """Steps with the means in place of the gradients, and forgets the samples."""
        lists = lists_of(self.param_groups)
        if self._is_as_before(lists):
            super()._step()
            return
        self._forget_what_has_left()
        self._check_scaler()
        for group in self.param_groups:
            hyperparameters.settings(self.rule.hyper, group)  # refuses before anything is taken
        # One that has only a gradient is asked for its samples too, and so gets their variance.
        self._take(lambda param: _has_samples(param) or (param.grad is not None and self._samples_of(param).count > 0))
        fed = {param: samples for param, samples in self._samples.items() if samples.count}
        plain = [param for param in params_of(self.param_groups) if param.grad is not None]
        if not (fed or plain):
            raise RuntimeError(
                "no parameter was fed since the last step: call backward(), and accumulate() after each micro-batch"
            )
        for samples in chain((self._samples[param] for param in plain), fed.values()):
            samples.get_variance()
        if not fed:
            self._plain = Snapshot(lists, [])
        found_inf = getattr(self, "found_inf", None)
        try:
            for param, samples in fed.items():
                param.grad = samples.gradient(param.dtype)
            if fed and found_inf is not None:
                self.found_inf = _or_not_finite(found_inf, [samples.get_mean() for samples in fed.values()])
            super()._step()
        finally:
            for param in fed:
                param.grad = None
        self.discard()


def _has_any(param: Tensor) -> bool:
    return param.grad is not None or _has_samples(param)


def _has_samples(param: Tensor) -> bool:
    return getattr(param, "grad_sample", None) is not None


def _samples_in(name: str, param: Tensor) -> Tensor:
    """[M, *shape] what a parameter has to be taken; of several `grad_sample`, one after the other."""
    check_param(name, param)
    samples = getattr(param, "grad_sample", None)
    if samples is None:
        grad = cast(Tensor, param.grad)
        check_grad(name, param, grad)
        return grad.unsqueeze(0)
    parts = list(samples) if isinstance(samples, Sequence) else [samples]
    if not parts:
        raise ValueError(f"grad_sample of {name} must hold one or more tensors, got {samples!r}")
    for part in parts:
        if not isinstance(part, Tensor):
            raise TypeError(f"grad_sample of {name} must be a tensor, got {part!r}")
        if part.dim() != param.dim() + 1 or part.shape[1:] != param.shape or len(part) == 0:
            raise ValueError(
                f"grad_sample of {name} must have the shape [samples, {', '.join(map(str, param.shape))}], with one "
                f"or more samples, got {tuple(part.shape)}"
            )
        if part.dtype != param.dtype or part.layout != torch.strided:
            raise TypeError(f"grad_sample of {name} must be dense and {param.dtype}, got {part.layout}, {part.dtype}")
        if part.device != param.device:
            raise ValueError(f"grad_sample of {name} must be on {param.device}, got {part.device}")
    return parts[0].resolve_neg() if len(parts) == 1 else torch.cat(parts)


def _or_not_finite(found_inf: Tensor, means: list[Tensor]) -> Tensor:
    """found_inf, or 1 where one of the means is not finite."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for mean in means:
        alike.setdefault((mean.device, mean.dtype), []).append(mean)
    # They are bounded, so that no sum of magnitudes is infinite; and all sums are found in few launches.
    sums = [torch.stack(torch._foreach_norm(own, 1)) for own in alike.values()]
    bad = [(~own.isfinite()).any().to(found_inf) for own in sums]
    return torch.stack([found_inf.reshape(()), *bad]).amax()
