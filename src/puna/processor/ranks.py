"""`tokenizer.model`: Meta's (and tiktoken's) form of byte-level BPE, read into merges and written back.

A line is a token's bytes in base64 and its *rank*, which is its id. There is no list of merges: to encode a word,
tiktoken joins, again and again, the two neighbours whose joined bytes have the lowest rank, the leftmost first. The
`tokenizers` library wants pairs instead: *this* token beside *that* one, in order of preference. Both do the same if
every token t is given the one pair that tiktoken would join last on the bytes of t alone:

    before t is made somewhere in a word, nothing was joined across its two ends (else t would not be made), and each
    join inside had the lowest rank in the word, hence inside: what happens to t alone. So the same pair is left.

A token that never comes about this way, since joins inside it lead elsewhere, is found only when it is a whole word of
the split pattern; `ignore_merges` looks whole words up first, as tiktoken does.

Source: llama4-facts.md §4.1.
"""

from __future__ import annotations

import base64
import binascii
import gzip
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

from puna.errors import PunaError
from puna.processor.files import read_text


def read_ranks(path: str | os.PathLike) -> list[bytes]:
    """The tokens of a ``tokenizer.model`` in order of their ids; of its gzip, where the name ends so. Raises
    `PunaError` naming the line that is wrong."""
    tokens: list[bytes] = []
    for number, line in enumerate(_text(Path(path)).splitlines(), 1):
        if not line.strip():
            continue
        try:
            text, rank = line.split()
            token = base64.b64decode(text, validate=True)
            if not token or int(rank) != len(tokens):
                raise ValueError
        except (ValueError, binascii.Error):
            raise PunaError(f"{path}, line {number}: not a token in base64 and the rank {len(tokens)}") from None
        tokens.append(token)
    if len(set(tokens)) < len(tokens) or not {bytes([b]) for b in range(256)} <= set(tokens):
        raise PunaError(f"{path} is damaged: a token stands there twice, or some single bytes do not")
    return tokens


def _text(path: Path) -> str:
    if path.suffix != ".gz":
        return read_text(path, "tokenizer")
    try:
        return gzip.decompress(path.read_bytes()).decode("ascii")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise PunaError(f"cannot read tokenizer {path}: {error}") from error


def write_ranks(tokens: Iterable[bytes]) -> str:
    """The text of a ``tokenizer.model`` of these tokens."""
    return "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))


def merges(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """The pair that makes each token, in order of rank; none for tokens that no joining makes."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    found = []
    for token in tokens:
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        if len(pairs) > 1:  # a single pair is either the right one or never met
            pairs = _joined(token, ranks)
        found += pairs
    return found


def _joined(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """[the two parts] that joining in order of rank leaves of `token`; [] if it leaves more."""
    never, get = len(ranks), ranks.get
    ends = list(range(len(token) + 1))  # the parts' borders
    joins = [get(token[i : i + 2], never) for i in range(len(token) - 1)]  # rank of part i joined with the next
    while len(ends) > 3:
        rank = min(joins)
        if rank == never:
            return []
        i = joins.index(rank)
        del ends[i + 1], joins[i]
        if i < len(joins):
            joins[i] = get(token[ends[i] : ends[i + 2]], never)
        if i:
            joins[i - 1] = get(token[ends[i - 1] : ends[i + 1]], never)
    return [(token[: ends[1]], token[ends[1] :])]
