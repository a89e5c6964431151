"""Bits per byte: how many bits a model needs for a byte of held-out text.

    bits per byte = sum over tokens of -log2 p(token | what came before) / bytes of the text

Unlike a loss per token it compares models with different tokenizers, and languages with different scripts (nanochat
and The Pile, arXiv 2101.00027 §3.1, use it so). A document is cut in windows of `window` tokens, each starting with
begin_of_text and seeing nothing of the window before; every token of the text is predicted once, no other is counted.

Chance is a model that knows how often each token occurs in that language's training text and nothing else:

    p(token) = (count + 1/2) / (total + V/2)        add-1/2, the Krichevsky-Trofimov estimate

The standard error is that of a ratio of sums over windows: sqrt(n / (n - 1) * sum (bits_w - R bytes_w)^2) / sum bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from puna.errors import PunaError
from puna.model import Llama4
from puna.processor import Processor, Tokenizer

SLICE = 1024  # positions whose logits exist at once


class BitsPerByte(NamedTuple):
    """bits per byte, tokens predicted, bytes they stand for, standard error (0 for a single window)."""

    bpb: float
    n_tokens: int
    n_bytes: int
    stderr: float


def windows(tokenizer: Tokenizer, documents: Sequence[str], window: int) -> list[list[int]]:
    """Token ids of every window, each starting with begin_of_text; at most `window` long. PunaError on no text."""
    if window < 2:
        raise PunaError(f"a window holds begin_of_text and a token to predict: at least 2 tokens, not {window}")
    room = window - 1
    cut = [
        [tokenizer.bos, *ids[start : start + room]]
        for ids in tokenizer.encode_batch(list(documents))
        for start in range(0, len(ids), room)
    ]
    if not cut:
        raise PunaError("bits per byte need text: all documents are empty")
    return cut


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes each id stands for, int64 [V]."""
    return np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)], np.int64)


@torch.inference_mode()
def window_bits(model: Llama4, cut: Sequence[Sequence[int]], pad: int, batch_rows: int = 8) -> np.ndarray:
    """Bits the model needs for the tokens after the first of each window: float64 [n]. Windows of like length share a
    batch; padding belongs to no document; logits are made `SLICE` positions at a time."""
    device = model.tok_embeddings.weight.device
    bits_n = np.zeros(len(cut))
    order = sorted(range(len(cut)), key=lambda i: -len(cut[i]))
    for start in range(0, len(order), batch_rows):
        chosen = order[start : start + batch_rows]
        width = len(cut[chosen[0]])
        tokens_BT = torch.full((len(chosen), width), pad, dtype=torch.int64)
        docs_BT = torch.full((len(chosen), width), -1, dtype=torch.int64)
        for row, index in enumerate(chosen):
            tokens_BT[row, : len(cut[index])] = torch.tensor(cut[index])
            docs_BT[row, : len(cut[index])] = 0
        hidden_BTD = model.hidden(tokens_BT.to(device), doc_ids_BT=docs_BT.to(device))
        row_m, place_m = (docs_BT[:, 1:] >= 0).nonzero(as_tuple=True)
        hidden_mD = hidden_BTD[row_m.to(device), place_m.to(device)]
        target_m = tokens_BT[row_m, place_m + 1].to(device)
        nats_m = torch.cat([
            F.cross_entropy(model.head(hidden_mD[at : at + SLICE]), target_m[at : at + SLICE], reduction="none")
            for at in range(0, len(target_m), SLICE)
        ])  # fmt: skip
        sums_B = torch.zeros(len(chosen), dtype=torch.float64).index_add_(0, row_m, nats_m.double().cpu())
        bits_n[chosen] = sums_B.numpy() / math.log(2)
    return bits_n


def ratio(bits_n: np.ndarray, cut: Sequence[Sequence[int]], lengths_V: np.ndarray) -> BitsPerByte:
    """Bits and windows as one number with its standard error."""
    bytes_n = np.array([lengths_V[list(ids[1:])].sum() for ids in cut], np.float64)
    total, n = bytes_n.sum(), len(cut)
    value = bits_n.sum() / total
    spread = math.sqrt(n / (n - 1) * ((bits_n - value * bytes_n) ** 2).sum()) / total if n > 1 else 0.0
    return BitsPerByte(float(value), sum(len(ids) - 1 for ids in cut), int(total), float(spread))


def bits_per_byte(
    model: Llama4, processor: Processor, documents: Sequence[str], window: int, batch_rows: int = 8
) -> BitsPerByte:
    """Bits per byte of `documents` in windows of `window` tokens. PunaError when there is no text."""
    tokenizer = processor.tokenizer
    cut = windows(tokenizer, documents, window)
    return ratio(window_bits(model, cut, tokenizer.pad, batch_rows), cut, byte_lengths(tokenizer))


def token_counts(tokenizer: Tokenizer, documents: Iterable[str], max_chars: int = 0) -> np.ndarray:
    """How often each id occurs: int64 [V]. max_chars: stop after so many characters (0: never)."""
    counts_V = np.zeros(tokenizer.vocab_size, np.int64)
    group, left = [], max_chars or math.inf
    for document in documents:
        if left <= 0:
            break
        document = document if len(document) <= left else document[: int(left)]
        left -= len(document)
        group.append(document)
        if len(group) == 256:
            counts_V += _count(tokenizer, group)
            group = []
    return counts_V + _count(tokenizer, group)


def _count(tokenizer: Tokenizer, group: list[str]) -> np.ndarray:
    ids = [ids.astype(np.int64) for ids in tokenizer.encode_arrays(group)] if group else []
    return np.bincount(np.concatenate(ids or [np.zeros(0, np.int64)]), minlength=tokenizer.vocab_size)


def unigram_bits_per_byte(train_counts_V: np.ndarray, val_ids: Sequence[int], lengths_V: np.ndarray) -> float:
    """Bits per byte of token ids under the add-1/2 unigram of `train_counts_V` (int [V]); lengths_V: bytes of each id.

    PunaError when `val_ids` stand for no byte.
    """
    ids = np.asarray(val_ids, np.int64)
    total = lengths_V[ids].sum() if len(ids) else 0
    if not total:
        raise PunaError("bits per byte need text: there are no tokens")
    bits_V = math.log2(train_counts_V.sum() + len(train_counts_V) / 2) - np.log2(train_counts_V + 0.5)
    return float(bits_V[ids].sum() / total)


def bpb_evaluation(
    processor: Processor, texts: Mapping[str, Sequence[str]], window: int = 512, max_bytes: int = 4096,
    batch_rows: int = 8,
) -> Callable[[Llama4], dict[str, float]]:  # fmt: skip
    """An evaluation for the training loop: model -> {"bpb/<name>": bits per byte} over the first `max_bytes` bytes of
    each of `texts`. The text is cut once, here; all languages share batches, so it costs one short forward pass."""
    tokenizer = processor.tokenizer
    lengths_V = byte_lengths(tokenizer)
    cut = {name: windows(tokenizer, head(documents, max_bytes), window) for name, documents in texts.items()}
    everything = [ids for some in cut.values() for ids in some]

    def evaluate(model: Llama4) -> dict[str, float]:
        bits_n, at, values = window_bits(model, everything, tokenizer.pad, batch_rows), 0, {}
        for name, some in cut.items():
            values[f"bpb/{name}"] = ratio(bits_n[at : at + len(some)], some, lengths_V).bpb
            at += len(some)
        return values

    return evaluate


def head(documents: Iterable[str], max_bytes: int) -> list[str]:
    """The first documents, the last one cut, of at most `max_bytes` bytes of UTF-8; 0: all."""
    if not max_bytes:
        return list(documents)
    chosen, left = [], max_bytes
    for document in documents:
        data = document.encode()
        if left <= 0:
            break
        chosen.append(document if len(data) <= left else data[:left].decode(errors="ignore"))
        left -= len(data)
    return chosen
