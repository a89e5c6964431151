"""The mixture: global row index -> (source, row of that source), a pure function, exact in every block of 1,024 rows.

Drawing each row's source at random gives the wanted shares only on average, and needs a generator's state to resume.
Here the global index is cut in blocks of 1,024. In *every* block source s gets the same number of rows, its quota

    q_s = 1024 * w_s / sum(w)      rounded by largest remainders, so that the quotas add up to 1,024 exactly,

and a seeded permutation of the block (order.py) says which places are whose. The r-th row of s in block b is its
running row k = b * q_s + r; the source is read in passes, pass k // n_s in an order of its own: row =
permutation(seed_s, n_s, k // n_s)[k mod n_s]. So each row of a source is seen once before any is seen twice, step s of
a run at batch B reads global rows [sB, (s+1)B), and neither ranks nor batch size nor history change what a global
index means.

Weights may change on the way: a *phase* begins at a global row with quotas of its own, and running rows go on counting,
so that what one phase has read no later one reads before its pass is over.

Source: levanter's block-deterministic mixtures (training.md §B7). Shares are of *rows*; shares of tokens follow from
how full rows are.
"""

import hashlib
import json
import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np

from puna.data.order import derive, permutation, shuffled
from puna.errors import PunaError

BLOCK = 1024
CACHED_ROWS = 1 << 16  # a source's order is kept as an array up to this size (512 KB), else computed point by point


def quotas(weights: Mapping[str, float], block: int = BLOCK) -> dict[str, int]:
    """Rows per block for each source, largest remainders first (ties: the earlier name). They add up to `block`."""
    total = sum(weights.values())
    exact = {name: block * weight / total for name, weight in weights.items()}
    result = {name: math.floor(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (result[name] - exact[name], name))
    for name in by_remainder[: block - sum(result.values())]:
        result[name] += 1
    return result


class _Phase:
    """One set of weights, in force from global row `first` on; `before`: rows of each source read until then."""

    def __init__(self, first: int, weights: Mapping[str, float], sizes: Mapping[str, int], seed: int, before: Mapping):
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise PunaError(f"data source {name!r} has weight {weight}; weights are finite numbers >= 0")
        self.first, self.before = first, dict(before)
        self.weights = {name: float(weights[name]) for name in sorted(weights) if weights[name] > 0}
        if not self.weights:
            raise PunaError("the weights of the data sources sum to 0; give at least one source a positive weight")
        for name in self.weights:
            if name not in sizes:
                raise PunaError(f"unknown data source {name!r}; there are: {', '.join(sorted(sizes)) or 'none'}")
            if sizes[name] < 1:
                raise PunaError(f"data source {name!r} is empty; give it data or weight 0")
        self.quotas = quotas(self.weights)
        for name, quota in self.quotas.items():
            if quota == 0:
                raise PunaError(
                    f"data source {name!r} gets less than one row in {BLOCK}; raise its weight or set it to 0"
                )
        self.names = tuple(self.weights)
        self._owner_J = np.repeat(np.arange(len(self.names)), [self.quotas[name] for name in self.names])
        self._block_seed = derive("block", seed)
        self._layout = lru_cache(maxsize=64)(self._block_layout)

    def _block_layout(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """For one block: owner [1024] (index of the source at each place) and rank [1024] (how many of its rows came
        before)."""
        owner_J = self._owner_J[permutation(self._block_seed, BLOCK, block)]
        rank_J = np.empty(BLOCK, dtype=np.int64)
        for source in range(len(self.names)):
            mine = owner_J == source
            rank_J[mine] = np.arange(mine.sum())
        return owner_J, rank_J

    def running(self, index: int) -> tuple[str, int]:
        """(source, how many of its rows come before) of a global row of this phase."""
        block, place = divmod(index - self.first, BLOCK)
        owner_J, rank_J = self._layout(block)
        name = self.names[owner_J[place]]
        return name, self.before.get(name, 0) + block * self.quotas[name] + int(rank_J[place])

    def counts(self, rows: int) -> dict[str, int]:
        """How many of all global rows up to this phase's first `rows` each source provides."""
        blocks, rest = divmod(rows, BLOCK)
        owner_J = self._layout(blocks)[0][:rest]
        result = dict(self.before)
        for i, name in enumerate(self.names):
            result[name] = result.get(name, 0) + blocks * self.quotas[name] + int((owner_J == i).sum())
        return result


class Mixture:
    """Which source and row each global row index reads.

    weights: source -> share of rows (any positive scale; 0 leaves a source out). sizes: source -> number of rows it
    has. then: (first global row, weights) of later phases, in order; a source goes on where the phase before left it.
    PunaError: a weight that isn't a finite number >= 0, weights that sum to 0, a source that isn't in `sizes`, an empty
    one, or a share so small that it would never be read (under one row in 1,024). ValueError: phases out of order.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        sizes: Mapping[str, int],
        seed: int = 0,
        then: Sequence[tuple[int, Mapping[str, float]]] = (),
    ):
        self._first = [0, *(first for first, _ in then)]
        if any(a >= b for a, b in pairwise(self._first)):
            raise ValueError(f"phases begin at rows {self._first}; each must begin after the one before")
        self._phases = [_Phase(0, weights, sizes, seed, {})]
        for first, later in then:
            last = self._phases[-1]
            self._phases.append(_Phase(first, later, sizes, seed, last.counts(first - last.first)))
        self.names = tuple(sorted({name for phase in self._phases for name in phase.names}))
        self.sizes = {name: int(sizes[name]) for name in self.names}
        self.seed = seed
        self._seeds = {name: derive("source", seed, name) for name in self.names}

    def _phase(self, index: int) -> _Phase:
        return self._phases[bisect(self._first, index) - 1]

    def locate(self, index: int) -> tuple[str, int]:
        """(source, row in that source) of global row `index` >= 0."""
        name, running = self.running(index)
        size, seed = self.sizes[name], self._seeds[name]
        epoch, place = divmod(running, size)
        if size > CACHED_ROWS:
            return name, int(shuffled(place, size, seed, epoch))
        return name, int(permutation(seed, size, epoch)[place])

    def running(self, index: int) -> tuple[str, int]:
        """(source, how many of its rows come before) of global row `index`; that number // rows is the pass it is
        in."""
        if index < 0:
            raise ValueError(f"row index {index} is negative")
        return self._phase(index).running(index)

    def counts(self, rows: int) -> dict[str, int]:
        """How many of the first `rows` global rows each source provides."""
        phase = self._phase(max(rows - 1, 0))
        counts = phase.counts(rows - phase.first)
        return {name: counts.get(name, 0) for name in self.names}

    def check_batch(self, batch_rows: int) -> None:
        """PunaError when all sources together hold fewer rows than one batch reads: every batch would repeat itself."""
        total = sum(self.sizes.values())
        if total < batch_rows:
            raise PunaError(
                f"the data set has {total} packed rows, fewer than one batch of {batch_rows}; "
                "add data, or lower the batch size or the sequence length"
            )

    def fingerprint(self) -> str:
        """sha256 of all that decides the order: block size, seed, weights, sizes. Equal fingerprints read equal
        rows."""
        phases = [(phase.first, phase.weights) for phase in self._phases]
        state = {"block": BLOCK, "seed": self.seed, "phases": phases, "sizes": self.sizes}
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

    def show(self, rows: int, tokens: Mapping[str, int] | None = None) -> str:
        """A tree in plain text of what the first `rows` global rows read.

        Per source: its share of rows, rows read, tokens read (if `tokens` gives each source's tokens, padding not
        counted), and passes over the source. Names with a slash ('text/en') are grouped by what comes before it.
        """
        counts = self.counts(rows)
        leaves = {
            name: (
                counts[name],
                None if tokens is None else round(counts[name] * tokens[name] / self.sizes[name]),
                counts[name] / self.sizes[name],
            )
            for name in self.names
        }
        total = sum(leaf[1] for leaf in leaves.values()) if tokens is not None else None
        lines = [f"mixture · {rows:,} rows" + (f" · {total:,} tokens" if tokens is not None else "")]
        groups: dict[str, list[str]] = {}
        for name in self.names:
            whole = "/" not in name or name.startswith(("file:", "corpus:"))  # a path, not a family of sources
            groups.setdefault(name if whole else name.split("/")[0], []).append(name)
        width = max(len(name) for name in [*self.names, *groups]) + 4
        for g, (group, members) in enumerate(groups.items()):
            last_group = g == len(groups) - 1
            alone = members == [group]
            summed = [sum(leaves[name][0] for name in members), None, None]
            if tokens is not None:
                summed[1] = sum(leaves[name][1] for name in members)
            label = ("└─ " if last_group else "├─ ") + group
            lines.append(_line(label, width, rows, leaves[group] if alone else tuple(summed)))
            for m, name in enumerate([] if alone else members):
                stem = ("   " if last_group else "│  ") + ("└─ " if m == len(members) - 1 else "├─ ")
                lines.append(_line(stem + name.split("/", 1)[1], width, rows, leaves[name]))
        return "\n".join(lines)


def _line(label: str, width: int, rows: int, leaf: tuple[int, int | None, float | None]) -> str:
    """One line of the tree: label, share of rows, rows, tokens where known, passes over the source where it is a
    leaf."""
    count, tokens, epochs = leaf
    text = f"{label:<{width}} {100 * count / max(rows, 1):5.1f} %  {count:>10,} rows"
    if tokens is not None:
        text += f"  {tokens:>14,} tokens"
    return text + (f"  {epochs:8.2f} epochs" if epochs is not None else "")
