"""What a query may see, as two numbers: its keys are `first` ... `last`, both of them places in the row.

Everything Llama 4 hides is outside such a run: later tokens, other documents of a packed row, earlier chunks. So
nobody needs a matrix of T x S truth values (at 256k tokens 64 billion); each kernel makes of the two numbers what it
wants: short rows on a CPU one additive mask a batch, long ones a small mask for each block of queries (`attend.py`),
a GPU the list of 128 x 128 blocks that are seen whole, in part or not at all (FlexAttention, arXiv 2412.05496).

    places       0 1 2 3 4 5 6 7          query 5 sees 4 and 5, the second document so far:
    documents    a a a a b b b c          first = 0 0 0 0 4 4 4 7, last = 0 1 2 3 4 5 6 7

Where processes share a row (`parallel/context.py`), a process has some of its queries and all of its keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLEX_BLOCK = 128


class Span:
    """The keys that each query sees. first_BT: int64 [B, T]; last_T: int64 [T], not falling; keys: S, how many exist.

    Every query sees at least one key (first <= last), else its softmax would be 0 / 0.
    """

    def __init__(self, first_BT: Tensor, last_T: Tensor, keys: int):
        self.first_BT, self.last_T, self.keys = first_BT, last_T, keys
        self._made: dict = {}  # masks are the same for all layers of a batch

    def cut(self, places_T: Tensor) -> Span:
        """The queries at these places, the same keys."""
        return Span(self.first_BT[:, places_T], self.last_T[places_T], self.keys)

    def visible(self, start: int, stop: int, low: int = 0, high: int | None = None) -> Tensor:
        """bool [B, stop - start, high - low]: what the queries start ... stop-1 see of the keys low ... high-1."""
        key_S = torch.arange(low, self.keys if high is None else high, device=self.last_T.device)
        return (key_S >= self.first_BT[:, start:stop, None]) & (key_S <= self.last_T[start:stop, None])

    def seen(self, start: int, stop: int) -> tuple[int, int]:
        """(low, high): queries start ... stop-1 see no key outside low ... high-1."""
        return int(self.first_BT[:, start:stop].min()), int(self.last_T[stop - 1]) + 1

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Additive, [B, 1, T, S]: 0 where a query looks, else minus infinity. Made once."""
        if dtype not in self._made:
            self._made[dtype] = additive(self.visible(0, len(self.last_T)), dtype)
        return self._made[dtype]

    def blocks(self):
        """FlexAttention's `BlockMask`, [B, 1, T, S], found from the numbers without a matrix. Made once."""
        if "blocks" not in self._made:
            self._made["blocks"] = _block_mask(self)
        return self._made["blocks"]


def additive(visible_BTS: Tensor, dtype: torch.dtype) -> Tensor:
    """Boolean visibility as an additive mask [B, 1, T, S]."""
    mask = torch.zeros(visible_BTS.shape, dtype=dtype, device=visible_BTS.device)
    return mask.masked_fill_(~visible_BTS, float("-inf"))[:, None]


def _block_mask(span: Span):
    from torch.nn.attention.flex_attention import BlockMask

    first, last, S = span.first_BT, span.last_T, span.keys
    B, T = first.shape
    low, high = (_by_block(x.expand(B, T)) for x in (first, last))
    start = torch.arange(0, S, FLEX_BLOCK, device=last.device)
    end = start + FLEX_BLOCK - 1
    some = (end >= low.amin(-1, keepdim=True)) & (start <= high.amax(-1, keepdim=True))  # [B, T / 128, S / 128]
    whole = (start >= low.amax(-1, keepdim=True)) & (end <= high.amin(-1, keepdim=True))

    def look(b, h, q, k):
        return (k >= first[b, q]) & (k <= last[q])

    partly, fully = (_listed(blocks[:, None]) for blocks in (some & ~whole, whole))
    return BlockMask.from_kv_blocks(*partly, *fully, BLOCK_SIZE=FLEX_BLOCK, mask_mod=look, seq_lengths=(T, S))


def _by_block(x_BT: Tensor) -> Tensor:
    """[B, T] -> [B, T / 128, 128], the last number repeated to the end of its block."""
    missing = -x_BT.shape[1] % FLEX_BLOCK
    return torch.cat([x_BT, x_BT[:, -1:].expand(-1, missing)], dim=1).unflatten(1, (-1, FLEX_BLOCK))


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(how many, which first): bool [..., n] as FlexAttention wants it, int32."""
    order = torch.argsort(blocks.to(torch.int8), dim=-1, descending=True, stable=True)
    return blocks.sum(-1).to(torch.int32), order.to(torch.int32)
