"""The experts' load: kept even while training in one of three ways (`train.balancing`), and measured.

An expert that gets more tokens learns more, and then gets more still. With r the router's raw logits, f_e the share of
the tokens that went to expert e, E experts, and `train.balance` as the strength s:

    bias           argmax(r + b), b_e += s sign(mean load - load_e), centred. No gradient of its own, no loss spent
                   (arXiv 2408.15664); faded to 0 over the last fifth of a stage, so that it leaves nothing to export
    auxiliary      + s E sum_e f_e P_e for every MoE layer, P_e the mean of sigmoid(r)_e / sum sigmoid(r): least where
                   even, where its value is s (arXiv 2101.03961)
    expert_choice  every expert takes the s T / E tokens with the largest r_e; a token may be taken by none (the shared
                   expert carries it) or by several (arXiv 2202.09368)

**Auxiliary.** f is the *last* step's, over all its tokens and ranks (the first has none): P is then all that a step
has to sum, and neither micro-batches nor ranks change the gradient, which a product of each micro-batch's own f and P
would not survive. A micro-batch without a valid token has no backward pass on one process, and so no part
in it; of several, all have one.

**Expert choice** is how Llama 4 was probably trained (llama4-facts.md §2.2). Whether a token is taken depends on all
tokens of the micro-batch, later ones included: training looks into the future, and a model that only ever decodes token
by token can't repeat it. So the last fifth of a stage routes each token by argmax, as everything outside training does.
Gate statistics are kept as the released checkpoints keep them, [running, global] x [mean, variance times count, count],
running with factor 0.99; of the gates of taken tokens, which is our reading. `thresholds` evaluates with them instead:
an expert runs for each token whose gate reaches its mean, which is causal.

Balance is training state: saved with checkpoints, never part of the model. Frozen routers (LoRA) are left alone: they
could not learn to do without it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from puna.model.moe import MoE, moe_layers

if TYPE_CHECKING:  # one process needs no torch.distributed
    from puna.parallel.mesh import Mesh


class Balancer:
    """What the loop asks for. This one does nothing: a strength of 0."""

    usual = 0.0  # strength where none is given

    def __init__(self, model: nn.Module, strength: float | None = None):
        self.layers = moe_layers(model)
        learns = [p.requires_grad for layer in self.layers for p in layer.router.parameters()]  # none on some stages
        self.strength = (self.usual if strength is None else strength) if any(learns) or not learns else 0.0
        self.device = next(model.parameters()).device

    def apply(self, scale: float, positions: int = 0) -> None:
        """Readies the routers for a step. scale: 1, and down to 0 at a stage's end (`optim.schedule.anneal`);
        positions: tokens of the whole step, padding included, over all ranks."""

    def adjust(self, counts: Sequence[Tensor], seen: Sequence[dict[str, Tensor]] = ()) -> None:
        """Learns from a step: tokens of each expert [E], and `MoE.seen`, one entry a layer, sums over the step."""

    def detach(self) -> None:
        """Leaves the model as it is used elsewhere: routing by raw logits."""
        for layer in self.layers:
            layer.selection_bias_E, layer.router_loss, layer.choice = None, None, None

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; restored in place."""
        return {}

    def measures(self) -> dict[str, list[float]]:
        """Numbers of the last step, one a layer."""
        return {}


class Bias(Balancer):
    """Loss-free: the bias moves the argmax while training and nothing else."""

    usual = 3e-4

    def __init__(self, model: nn.Module, strength: float | None = None):
        super().__init__(model, strength)
        self.bias = [torch.zeros(layer.n_experts, device=self.device) for layer in self.layers]

    def apply(self, scale: float, positions: int = 0) -> None:
        for layer, bias in zip(self.layers, self.bias, strict=True):
            layer.selection_bias_E = bias * scale if self.strength > 0 else None

    def adjust(self, counts: Sequence[Tensor], seen: Sequence[dict[str, Tensor]] = ()) -> None:
        if self.strength <= 0:
            return
        for count_E, bias in zip(counts, self.bias, strict=True):
            load = count_E.to(bias)
            bias += self.strength * torch.sign(load.mean() - load)
            bias -= bias.mean()

    def tensors(self) -> dict[str, Tensor]:
        return {f"balance/{i}": bias for i, bias in enumerate(self.bias)}

    def measures(self) -> dict[str, list[float]]:
        """bias: its largest less its smallest value, in logits, as the step used it."""
        applied = [layer.selection_bias_E for layer in self.layers]
        return {"bias": [float(b.max() - b.min()) for b in applied]} if applied and applied[0] is not None else {}


class Auxiliary(Balancer):
    """Switch's loss on the router; not faded, since it moves no route by itself."""

    usual = 1e-2

    def __init__(self, model: nn.Module, strength: float | None = None):
        super().__init__(model, strength)
        self.shares = [torch.zeros(m.n_experts, device=self.device) for m in self.layers]
        self.values: list[float] = []

    def apply(self, scale: float, positions: int = 0) -> None:
        for layer, share_E in zip(self.layers, self.shares, strict=True):
            if self.strength > 0:
                weight_E = self.strength * layer.n_experts / positions * share_E
                layer.router_loss = partial(self._loss, layer, weight_E)

    @staticmethod
    def _loss(layer: MoE, weight_E: Tensor, logits_TE: Tensor) -> Tensor:
        gate_TE = torch.sigmoid(logits_TE)
        probability_E = (gate_TE / gate_TE.sum(dim=1, keepdim=True)).sum(dim=0)
        layer.seen = {"probability": probability_E.detach()}
        return (weight_E * probability_E).sum()

    def adjust(self, counts: Sequence[Tensor], seen: Sequence[dict[str, Tensor]] = ()) -> None:
        self.values = []
        for count_E, share_E, each in zip(counts, self.shares, seen, strict=True):
            tokens = count_E.sum()
            if "probability" in each and tokens:
                share_E.copy_(count_E / tokens)
                self.values.append(len(share_E) * float((share_E * each["probability"] / tokens).sum()))

    def tensors(self) -> dict[str, Tensor]:
        return {f"share/{i}": share for i, share in enumerate(self.shares)}

    def measures(self) -> dict[str, list[float]]:
        """auxiliary: E sum_e f_e P_e with the step's own f; 1 is even, E is one expert for all."""
        return {"auxiliary": self.values} if self.values else {}


class ExpertChoice(Balancer):
    """Experts take tokens while scale is 1; then tokens take experts."""

    usual = 1.0  # experts that an average token is taken by

    def __init__(self, model: nn.Module, strength: float | None = None):
        super().__init__(model, strength)
        self.gates = [torch.zeros(2, 3, m.n_experts, dtype=torch.float64, device=self.device) for m in self.layers]
        self.untaken: list[float] = []

    def apply(self, scale: float, positions: int = 0) -> None:
        for layer in self.layers:
            layer.choice = partial(self._take, layer) if self.strength > 0 and scale == 1 else None

    def _take(self, layer: MoE, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        T, E = logits_TE.shape
        each = min(T, max(1, round(self.strength * T / E)))
        logit_nE, token_nE = logits_TE.topk(each, dim=0)
        gate_nE = torch.sigmoid(logit_nE.double())
        taken_T = torch.zeros(T, dtype=torch.int64, device=logits_TE.device).index_fill_(0, token_nE.flatten(), 1)
        sums = [torch.full_like(gate_nE[0], each), gate_nE.sum(dim=0), gate_nE.square().sum(dim=0)]
        layer.seen = {"gates": torch.stack(sums), "untaken": T - taken_T.sum()}
        return token_nE.T.flatten(), torch.arange(E, device=logits_TE.device).repeat_interleave(each)

    def adjust(self, counts: Sequence[Tensor], seen: Sequence[dict[str, Tensor]] = ()) -> None:
        self.untaken = []
        for count_E, gates, each in zip(counts, self.gates, seen, strict=True):
            if "gates" not in each:
                continue
            n_E, sum_E, square_E = each["gates"]
            mean_E = sum_E / n_E
            step = torch.stack([mean_E, square_E - n_E * mean_E.square(), n_E])
            running, whole = gates
            running.copy_(torch.lerp(running, step, 0.01) if running[2].any() else step)
            total_E, apart_E = whole[2] + n_E, mean_E - whole[0]
            whole[1] += step[1] + apart_E.square() * whole[2] * n_E / total_E
            whole[0] += apart_E * n_E / total_E
            whole[2] = total_E
            self.untaken.append(float(each["untaken"] / count_E.sum()))

    def tensors(self) -> dict[str, Tensor]:
        return {f"gates/{i}": gates for i, gates in enumerate(self.gates)}

    def measures(self) -> dict[str, list[float]]:
        """untaken: share of tokens that no expert took; gate: mean gate of taken tokens (running)."""
        if not self.untaken:
            return {}
        return {"untaken": self.untaken, "gate": [float(gates[0, 0].mean()) for gates in self.gates]}


BALANCING = {"bias": Bias, "auxiliary": Auxiliary, "expert_choice": ExpertChoice}


@contextmanager
def thresholds(model: nn.Module, gates: Sequence[Tensor]):
    """Within it an expert runs for each token whose gate reaches the expert's running mean; gates: [2, 3, E], one entry
    a MoE layer (`ExpertChoice.gates`, or `gates/N` of a checkpoint)."""

    def above(mean_E: Tensor, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        return (torch.sigmoid(logits_TE) >= mean_E).nonzero(as_tuple=True)

    layers = moe_layers(model)
    before = [layer.choice for layer in layers]
    try:
        for layer, each in zip(layers, gates, strict=True):
            layer.choice = partial(above, each[0, 0])
        yield
    finally:
        for layer, choice in zip(layers, before, strict=True):
            layer.choice = choice


def _add_by_name(sums: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    for name, value in more.items():
        sums[name] = sums[name] + value if name in sums else value.clone()


class Routes:
    """What the routers did in one optimizer step: sums over its micro-batches, after `gather` of all processes."""

    def __init__(self, model: nn.Module):
        self.layers = moe_layers(model)
        device = next(model.parameters()).device
        self.counts = [torch.zeros(m.n_experts, dtype=torch.int64, device=device) for m in self.layers]
        self.flips = torch.zeros((), dtype=torch.int64, device=device)
        self.seen: list[dict[str, Tensor]] = [{} for _ in self.layers]

    @contextmanager
    def watch(self):
        """Around a micro-batch. Where the text model does not run (a term may need the vision tower alone), it adds
        nothing."""
        for layer in self.layers:
            layer.counts_E, layer.flips, layer.seen = None, None, {}
        yield
        for layer, count_E, seen in zip(self.layers, self.counts, self.seen, strict=True):
            if layer.counts_E is not None:
                count_E += layer.counts_E
            if layer.flips is not None:
                self.flips += layer.flips
            _add_by_name(seen, layer.seen)

    def add(self, other: Routes) -> None:
        """The sums of another's micro-batches too."""
        for count_E, more_E, seen, noted in zip(self.counts, other.counts, self.seen, other.seen, strict=True):
            count_E += more_E
            _add_by_name(seen, noted)
        self.flips += other.flips

    def gather(self, mesh: Mesh) -> None:
        """Sums over all processes, in one message."""
        device = self.flips.device  # a pipeline's stage notes nothing of the others' layers
        noted = [(i, name, tuple(value.shape)) for i, seen in enumerate(self.seen) for name, value in seen.items()]
        for i, name, shape in mesh.union(noted):
            self.seen[i].setdefault(name, torch.zeros(shape, dtype=torch.float64, device=device))
        each = [*self.counts, self.flips, *(seen[name] for seen in self.seen for name in sorted(seen))]
        flat = mesh.sum(torch.cat([value.flatten().double() for value in each]))
        for value, part in zip(each, flat.split([value.numel() for value in each]), strict=True):
            value.copy_(part.view_as(value))


def router_metrics(counts: Sequence[Tensor], flips: Tensor) -> dict[str, float | dict[str, list[float]]]:
    """How evenly a step's tokens went to the experts: per MoE layer, and the layers' mean. With load_e the share of
    the tokens times E (1 is even):

        max_load   the busiest expert's load: its layer takes that much longer
        entropy    -sum p ln p / ln E of the shares p = load / E: 1 is even, 0 is one expert for all
        dead       the share of experts without a token

    and `flip_share`, the routes that balancing changed. "router/layers" has a list by layer of each. Where experts take
    tokens, the load is that of the tokens' own first choices, which is what evaluation will see.
    """
    if not any(int(count.sum()) for count in counts):  # no experts, or a term that needs the vision tower alone
        return {}
    counts_LE = torch.stack(list(counts)).cpu().double()
    share_LE = counts_LE / counts_LE.sum(dim=1, keepdim=True).clamp_min(1)
    n_experts = counts_LE.shape[1]
    entropy_L = -torch.special.xlogy(share_LE, share_LE).sum(dim=1) / max(math.log(n_experts), 1e-9)
    layers = {
        "max_load": share_LE.max(dim=1).values * n_experts,
        "entropy": entropy_L.clamp(0, 1),
        "dead": (counts_LE == 0).double().mean(dim=1),
    }
    means = {f"router/{name}": float(value_L.mean()) for name, value_L in layers.items()}
    rounded = {name: [round(x, 4) for x in value_L.tolist()] for name, value_L in layers.items()}
    return means | {"router/flip_share": float(flips) / max(1, int(counts_LE.sum())), "router/layers": rounded}


def balance_metrics(balancer: Balancer, metrics: dict) -> None:
    """Adds the balancer's own measures to a step's metrics: a list by layer of each, and the mean."""
    if "router/layers" in metrics:
        for name, value_L in balancer.measures().items():
            metrics[f"router/{name}"] = sum(value_L) / len(value_L)
            metrics["router/layers"][name] = [round(x, 6) for x in value_L]
