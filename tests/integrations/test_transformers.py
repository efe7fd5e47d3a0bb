"""Hugging Face's Trainer, by both of its routes.

    trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=(VSGD, {"lr": 1e-2}))
    trainer.train()
    trainer.train(resume_from_checkpoint=True)  # in a new process, after an interruption

or `optimizers=(VSGD(model.parameters(), lr=1e-2), scheduler)`. With the first route the Trainer makes the scheduler of
`args` and the groups with and without weight decay; `learning_rate` of `args` is not read.
"""

import sys

import pytest
import torch

from tests.integrations.common import CLIP, MICRO_BATCH, STEPS, assert_same_training, make_scheduler
from vsgd_kernels import VSGD

if sys.version_info < (3, 11):
    pytest.skip("transformers 5 needs Python 3.11", allow_module_level=True)

import transformers

ACCUMULATE = 2
LENGTH = 12


def make_model(dtype=torch.float32, dropout=0.0):
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    config.attention_dropout = dropout
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(dtype)


def make_data():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(96, (STEPS * ACCUMULATE * MICRO_BATCH, LENGTH), generator=generator)
    return [{"input_ids": row, "labels": row} for row in tokens]


def make_groups(model, weight_decay):
    """As the Trainer forms them: no decay of norms."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
    ]


def make_trainer(folder, model, settings, route, sampling="random", callbacks=()):
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=STEPS // 2,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=ACCUMULATE,
        max_grad_norm=CLIP,
        weight_decay=0.1,
        train_sampling_strategy=sampling,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    if route == "class":
        chosen = {"optimizer_cls_and_kwargs": (VSGD, settings)}
    else:
        optimizer = VSGD(make_groups(model, 0.1), **settings)
        chosen = {"optimizers": (optimizer, make_scheduler(optimizer))}
    return transformers.Trainer(model, args, train_dataset=make_data(), callbacks=list(callbacks), **chosen)


class Interruption(transformers.TrainerCallback):
    """A process that dies some steps after its checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == STEPS // 2 + 2:
            raise InterruptedError


def train_plainly(model, optimizer, scheduler):
    """What the Trainer does, as a loop; data in their order."""
    model.train()
    rows = iter(make_data())
    for _ in range(STEPS):
        micro_batches = [torch.stack([next(rows)["input_ids"] for _ in range(MICRO_BATCH)]) for _ in range(ACCUMULATE)]
        tokens = ACCUMULATE * MICRO_BATCH * (LENGTH - 1)
        for batch in micro_batches:
            model(input_ids=batch, labels=batch, num_items_in_batch=torch.tensor(tokens)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        model.zero_grad()


@pytest.fixture(params=["class", "instance"])
def route(request):
    """How the Trainer comes by its optimizer."""
    return request.param


def test_equals_a_loop(tmp_path, route):
    trainer = make_trainer(tmp_path, make_model(), {"lr": 1e-2}, route, sampling="sequential")
    trainer.train()
    model = make_model()
    optimizer = VSGD(make_groups(model, 0.1), lr=1e-2)
    if route == "class":
        scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 0, STEPS)
    else:
        scheduler = make_scheduler(optimizer)
    train_plainly(model, optimizer, scheduler)
    assert_same_training(trainer.optimizer.optimizer, optimizer)


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"state_format": "q8"}),
        (torch.bfloat16, {"state_format": "packed16", "master_weights": None}),
    ],
    ids=["float32", "bfloat16, q8", "bfloat16, packed16, None"],
)
def test_resume_is_exact(tmp_path, route, dtype, settings):
    """With dropout, whose random state is saved too."""
    settings = {"lr": 1e-2, **settings}

    def make(folder, **more):
        return make_trainer(tmp_path / folder, make_model(dtype, dropout=0.1), settings, route, **more)

    whole = make("whole")
    whole.train()
    with pytest.raises(InterruptedError):
        make("halves", callbacks=[Interruption()]).train()
    resumed = make("halves")
    resumed.train(resume_from_checkpoint=True)
    assert_same_training(resumed.optimizer.optimizer, whole.optimizer.optimizer)
