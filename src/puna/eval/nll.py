"""Bits per byte: how well a model predicts text, whatever its tokenizer.

    bpb = -sum log2 p(token | before) / number of UTF-8 bytes

Documents are read in windows of a fixed number of tokens, each beginning with begin_of_text; every token of the text is
predicted once. The chance level is what counting alone gives: the add-1/2 unigram of the language's own training
tokens, p(t) = (c_t + 1/2) / (N + V/2), on the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from puna.model import Llama4
from puna.processor import Processor

SLICE = 1024


def windows(processor: Processor, documents: Sequence[str], window: int) -> list[list[int]]:
    """Token windows of at most `window` tokens, begin_of_text included."""
    bos, found = processor.tokenizer.bos, []
    for ids in processor.tokenizer.encode_batch(list(documents)):
        found += [[bos, *ids[i : i + window - 1]] for i in range(0, len(ids), window - 1)]
    return found


@torch.inference_mode()
def token_bits(model: Llama4, processor: Processor, documents: Sequence[str], window: int, rows: int = 8) -> np.ndarray:
    """Bits of every text token, in order."""
    model.eval()
    device, pad = model.tok_embeddings.weight.device, processor.tokenizer.pad
    parts = windows(processor, documents, window)
    result = []
    for start in range(0, len(parts), rows):
        group = parts[start : start + rows]
        width = max(map(len, group))
        tokens_BT = torch.full((len(group), width), pad, dtype=torch.int64)
        for i, part in enumerate(group):
            tokens_BT[i, : len(part)] = torch.tensor(part)
        tokens_BT = tokens_BT.to(device)
        hidden_BTD = model.hidden(tokens_BT)
        for i, part in enumerate(group):
            for at in range(0, len(part) - 1, SLICE):
                end = min(at + SLICE, len(part) - 1)
                logits = model.head(hidden_BTD[i, at:end])
                nll = F.cross_entropy(logits, tokens_BT[i, at + 1 : end + 1], reduction="none")
                result.append((nll / math.log(2)).cpu().double().numpy())
    return np.concatenate(result) if result else np.zeros(0)


def bits_per_byte(model: Llama4, processor: Processor, documents: Sequence[str], window: int):
    """(bits per byte, tokens, standard error over tokens)."""
    bits = token_bits(model, processor, documents, window)
    size = sum(len(d.encode()) for d in documents)
    error = float(bits.std() * math.sqrt(len(bits)) / size) if len(bits) > 1 else 0.0
    return float(bits.sum() / size), len(bits), error


def unigram_bits_per_byte(processor: Processor, training: Sequence[str], documents: Sequence[str]) -> float:
    """The chance level: add-1/2 unigram of the training tokens on the documents' tokens."""
    V = processor.tokenizer.vocab_size
    counts = np.zeros(V)
    for ids in processor.tokenizer.encode_batch(list(training)):
        counts += np.bincount(ids, minlength=V)
    log2 = np.log2((counts + 0.5) / (counts.sum() + V / 2))
    tokens = [t for ids in processor.tokenizer.encode_batch(list(documents)) for t in ids]
    return float(-log2[tokens].sum() / sum(len(d.encode()) for d in documents))


def bpb_evaluation(processor: Processor, documents: Mapping[str, Sequence[str]], window: int, max_chars: int = 4000):
    """An evaluation for the training loop: model -> {language: bits per byte} on the beginning of each text."""
    short = {lang: ["\n".join(texts)[:max_chars]] for lang, texts in documents.items() if texts}

    def run(model: Llama4) -> dict[str, float]:
        return {lang: bits_per_byte(model, processor, texts, window)[0] for lang, texts in short.items()}

    return run


Evaluate = Callable[[Llama4], dict[str, float]]
