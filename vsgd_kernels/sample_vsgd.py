"""VSGD on samples, Appendix A.3."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

from . import graphs, intake, rules
from .backends.seen import Seen
from .batch import Gradients
from .intake import Found, Intake, has_samples
from .plan import lists_of, params_of
from .samples import Samples, all_reduce
from .stepper import check_capture
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

    `step` takes gradients that were not accumulated as one more sample, and raises RuntimeError where there is nothing
    to be taken. So with none accumulated it is `VSGD`, to the bit; and with `torch.amp.GradScaler`, which looks at
    `.grad`, leave those of the last micro-batch there, and the unscaling to its `step`: after `unscale_`, or with no
    `.grad`, a step that has samples raises RuntimeError. A step that the scaler skips, and one whose samples are not
    all finite, discards its samples: they have another scale than the next ones.
    """

    rule = rules.SAMPLE_VSGD

    @_disable_dynamo
    @torch.no_grad()
    def accumulate(self) -> None:
        """Takes each parameter's `grad_sample`, or else its `grad` as one sample, and sets both to None.

        Raises:
            RuntimeError: no parameter has either; or a CUDA graph is being captured, and the host counts samples.
            TypeError, ValueError: one of them does not fit its parameter, or the numbers of samples of the parameters
                differ; nothing is taken then.
        """
        if not self._take_all():
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
        self._take_all()
        every = [self._samples_of(param) for param in params_of(self.param_groups)]
        counts = torch.tensor([own.count for own in every], device=every[0].variance.device)
        dist.all_reduce(counts, group=group)
        fed = [(own, total) for own, total in zip(every, counts.tolist(), strict=True) if total]
        all_reduce([own for own, _ in fed], [total for _, total in fed], group)

    @_disable_dynamo
    def discard(self) -> None:
        """Forgets all samples since the last step; gradients stay."""
        for samples in self._samples.values():
            samples.clear()
            if self._stepper.has_captured:  # its replays would read the variance as it is
                samples.get_variance()

    def _prepare(self) -> None:
        super()._prepare()
        if "_samples" not in self.__dict__:
            self._samples: dict[Tensor, Samples] = {}
        self._forget_prepared()

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy keep."""
        return {**super().__getstate__(), "_samples": self._samples}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores what `__getstate__` kept, or takes what `load_state_dict` loaded, which has no samples."""
        self._samples = {}
        super().__setstate__(state)

    def _forget_prepared(self) -> None:
        """Forgets what was prepared for the samples that there were."""
        self._intake: Intake | None = None  # of the last time that all gradients were taken
        self._variance_of: dict[Tensor, Tensor] | None = None
        self._plain: Seen | None = None  # a step on gradients alone, for which all was ready

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
            if graphs.capturing():
                raise RuntimeError(
                    "a CUDA graph is being captured, and there is no variance of a parameter's samples yet: its memory "
                    "would be the graph's, and 0 only from the first replay on; take a step before the capture"
                )
            samples = self._samples[param] = Samples.none_of(param)
            self._forget_prepared()
        return samples

    def _has_accumulated(self) -> bool:
        return any(samples.count for samples in self._samples.values())

    def _are_samples_given(self) -> bool:
        return any(map(has_samples, params_of(self.param_groups)))

    def _check_scaler(self) -> None:
        """Raises RuntimeError where a GradScaler, which knows `.grad` alone, has left samples out."""
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None or not (self._has_accumulated() or self._are_samples_given()):
            return
        if getattr(self, "grad_scale", None) is None:
            raise RuntimeError(
                "GradScaler.unscale_() has unscaled .grad, but neither accumulated samples nor grad_sample; leave "
                "unscaling to GradScaler.step()"
            )
        if not isinstance(found_inf, Tensor):
            raise RuntimeError("GradScaler found no .grad to look at; leave those of the last micro-batch there")

    def _take_all(self) -> bool:
        """Feeds parameters all that they have; whether that was anything."""
        _check_not_capturing()
        known = self._intake
        if known is not None and not self._are_samples_given():
            gradients = known.unchanged(self.param_groups)
            if gradients is not None:
                known.add(gradients)
                for param in known.params:
                    param.grad = None
                return True
        found = intake.find(self.param_groups)
        if not found:
            return False
        new = self._prepare_intake(found)
        if not any(has_samples(each.param) for each in found):
            new.watch(self.param_groups)
            self._intake = new
        self._take(new, found)
        return True

    def _prepare_intake(self, found: list[Found]) -> Intake:
        own = [self._samples_of(each.param) for each in found]
        for each, samples in zip(found, own, strict=True):
            if not samples.fits(each.param):
                raise ValueError(
                    f"{each.name} has changed its shape, dtype or device since it was fed; discard() its samples"
                )
        with torch.inference_mode(False):  # outside, what was made inside could not be written to
            return Intake(found, own, self._backend)

    def _take(self, new: Intake, found: list[Found]) -> None:
        new.add(Gradients.of([each.samples for each in found]))
        for each in found:
            each.param.grad = None
            if has_samples(each.param):
                each.param.grad_sample = None  # type: ignore[attr-defined]

    def _take_what_belongs_to_samples(self) -> None:
        """Feeds parameters what they have, but not those that have a gradient alone and were fed nothing."""

        def belongs(param: Tensor) -> bool:
            return has_samples(param) or self._samples_of(param).count > 0

        something = [param for param in params_of(self.param_groups) if param.grad is not None or has_samples(param)]
        belonging = list(map(belongs, something))
        if something and all(belonging):
            self._take_all()
        elif any(belonging):
            found = [each for each in intake.find(self.param_groups) if belongs(each.param)]
            self._take(self._prepare_intake(found), found)

    def _is_as_before(self) -> bool:
        """Whether it is known that all is as in a step on gradients alone, which has left no samples."""
        return (
            self._plain is not None
            and not any(samples.count or samples.is_old for samples in self._samples.values())
            and not self._are_samples_given()
            and self._plain.gradients(lists_of(self.param_groups)) is not None
        )

    def _step(self) -> None:
        """Steps with the means in place of the gradients, and forgets the samples."""
        if self._is_as_before():
            super()._step()
            return
        self._plain = None
        self._forget_what_has_left()
        self._check_scaler()
        scope = self._scope()  # refuses settings before anything is taken
        if graphs.capturing():
            check_capture(scope)
            if self._has_accumulated() or self._are_samples_given():
                _check_not_capturing()
        self._take_what_belongs_to_samples()
        fed = {param: samples for param, samples in self._samples.items() if samples.count}
        if not fed and all(param.grad is None for param in params_of(self.param_groups)):
            raise RuntimeError(
                "no parameter was fed since the last step: call backward(), and accumulate() after each micro-batch"
            )
        for samples in self._samples.values():
            samples.get_variance()
        if not fed:
            self._plain = Seen(lists_of(self.param_groups))
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


def _check_not_capturing() -> None:
    if graphs.capturing():
        raise RuntimeError(
            "a CUDA graph is being captured, and samples are counted on the host; feed them, and take the step that "
            "they are for, outside of the graph"
        )


def _or_not_finite(found_inf: Tensor, means: list[Tensor]) -> Tensor:
    """found_inf, or 1 where one of the means is not finite."""
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for mean in means:
        alike.setdefault((mean.device, mean.dtype), []).append(mean)
    # They are bounded, so that no sum of magnitudes is infinite; and all sums are found in few launches.
    sums = [torch.stack(torch._foreach_norm(own, 1)) for own in alike.values()]
    bad = [(~own.isfinite()).any().to(found_inf) for own in sums]
    return torch.stack([found_inf.reshape(()), *bad]).amax()
