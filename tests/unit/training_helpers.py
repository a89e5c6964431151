"""A tiny model with every kind of parameter, random batches with pictures, jobs for the training loop, and checkpoints
of a model in training."""

from __future__ import annotations

import dataclasses

import torch

from puna.data import Batch
from puna.model import Llama4, ModelConfig, VisionConfig
from puna.optim import build_adamw
from puna.optim.adamw import set_lr
from puna.train import Job, TrainConfig, checkpoint
from puna.train.balance import Bias
from puna.train.step import train_step
from puna.train.terms import NextToken

PATCH = 7
EYE = VisionConfig(image_size=8, patch_size=2, width=16, layers=2, heads=2, mlp_width=32, adapter_width=24)
CONFIG = ModelConfig(
    vocab_size=96, d_model=32, n_layers=4, n_heads=2, n_kv_heads=1, head_dim=16, expert_width=24, dense_width=48,
    n_experts=4, moe_step=2, chunk=16, floor_scale=16, max_context=256, patch_token=PATCH, vision=EYE,
)  # fmt: skip
TRAIN = TrainConfig(
    steps=8, rows=4, accumulate=2, lr=1e-2, warmup=2, balance=0.02, threads=1, slice=16, checkpoint_every=2, keep=2,
    eval_every=4, compute_dtype="float32",
)  # fmt: skip


def lively_model(seed: int = 0, dtype: torch.dtype = torch.float32, config: ModelConfig = CONFIG) -> Llama4:
    """A model whose head is random instead of zero, so that the first gradient reaches every parameter."""
    model = Llama4(config, seed=seed).to(dtype).train()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head = model.output.weight
        head.copy_(torch.randn(head.shape, generator=generator) * head.shape[1] ** -0.5)
    return model


def random_batch(seed: int = 0, rows: int = 4, T: int = 24, valid: float = 0.7, pictures: bool = True) -> Batch:
    """Random tokens in two documents a row with some padding behind; a picture in every second row."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(PATCH + 1, CONFIG.vocab_size, (rows, T), generator=generator)
    docs = (torch.arange(T) >= T // 2).long().expand(rows, T).clone()
    docs[:, T - 3 :] = -1
    learnt = (torch.rand(rows, T, generator=generator) < valid) & (docs >= 0)
    targets = torch.randint(PATCH + 1, CONFIG.vocab_size, (rows, T), generator=generator) * learnt
    tiles_B = tuple(int(pictures and row % 2 == 0) for row in range(rows))
    for row, count in enumerate(tiles_B):
        tokens[row, 2 : 2 + 4 * count] = PATCH
    tiles = torch.rand(sum(tiles_B), 3, 8, 8, generator=generator) * 2 - 1 if any(tiles_B) else None
    names = tuple("seen" if count else "text" for count in tiles_B)
    return Batch(tokens, targets, learnt, docs, tiles, tiles_B, names, tuple(range(seed * rows, (seed + 1) * rows)))


def job(folder, processor=None, seed: int = 0, config: ModelConfig = CONFIG, source=random_batch, **train) -> Job:
    """A job on random batches; keywords change `TRAIN` or, by their names, the job."""
    fields = {f.name for f in dataclasses.fields(Job)}
    given = {key: train.pop(key) for key in list(train) if key in fields}
    model = Llama4(config, seed=seed)
    settings = dataclasses.replace(TRAIN, **train)
    record = {"model": config.to_dict(), "train": dataclasses.asdict(settings)}
    return Job(**{"name": "test", "folder": folder, "model": model, "processor": processor, "source": source,
                  "train": settings, "record": record, "quiet": True} | given)  # fmt: skip


def values(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every parameter."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of tensors that are not bitwise equal."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


class State:
    """A model in training: `step()` moves all that a checkpoint holds."""

    def __init__(self, seed=0, config=CONFIG, processor=None):
        self.model = Llama4(config, seed=seed).train()
        self.optimizer = build_adamw(self.model, 1e-2, 0.1, (0.9, 0.99), 1e-8)
        self.balancer, self.processor, self.done = Bias(self.model, 0.01), processor, 0
        set_lr(self.optimizer, 1.0)

    def step(self, pictures=True):
        batch = random_batch(self.done, pictures=pictures)
        result = train_step(self.model, self.optimizer, [batch], NextToken(), 1.0, 1000)
        self.balancer.adjust(result.counts)
        torch.rand(1)  # a step may draw
        self.done += 1

    def save(self, stage, finished=False):
        return checkpoint.save(stage, self.done, finished, {"model": self.model.config.to_dict()}, *self.parts)

    @property
    def parts(self):
        return self.model, self.processor, self.optimizer, self.balancer

    def resume(self, stage):
        run = checkpoint.resume(stage, self.model, self.optimizer, self.balancer)
        self.done = run["step"] if run else 0
        return run

    def tensors(self):
        return values(self.model) | {
            name: tensor.clone()
            for name, tensor in checkpoint.training_tensors(self.model, self.optimizer, self.balancer).items()
        }


def three_checkpoints(stage) -> dict[int, dict[str, torch.Tensor]]:
    """Saves steps 1 to 3 of a training in `stage`; returns what each holds."""
    state, held = State(), {}
    for _ in range(3):
        state.step()
        state.save(stage)
        held[state.done] = state.tensors()
    return held


def same(state: State, held: dict[str, torch.Tensor]) -> bool:
    """Whether a training is bitwise where `held` was taken."""
    return not changed(held, state.tensors())
