"""Llama 4's control tokens: names, order, and the regular expression that cuts text before BPE.

Llama 4 keeps 200,000 ids for byte-level BPE and places 2,048 *special* tokens right behind them. We keep the rule and
let the base vocabulary vary: id = base + position in this list. Two lists exist:

* ``full``: all 2,048 names in Meta's order, so that a 200,000-token base gives Meta's ids exactly;
* ``compact``: only the tokens that do something today, same names and same order, for nano models whose whole
  vocabulary is smaller than Meta's reserve.

Source: llama4-facts.md §4.1 (names and ids).
"""

# The split pattern, built part by part from the description in llama4-facts.md §4.1 (o200k style). A *word* is cut
# where lower case turns to upper case, which keeps CamelCase identifiers in pieces; letters without case (Lo: Arabic,
# Hindi, Thai ...), modifier letters (Lm) and combining marks (M) may stand on either side of the border.
_LEAD = r"[^\r\n\p{L}\p{N}]?"  # one leading space or symbol belongs to the word after it
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT_PATTERN = "|".join(
    (
        f"{_LEAD}{_UPPER}*{_LOWER}+{_CONTRACTION}",  # (a) a word with a lower-case tail
        f"{_LEAD}{_UPPER}+{_LOWER}*{_CONTRACTION}",  # (b) a word led by upper case
        r"\p{N}{1,3}",  # (c) one to three digits
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",  # (d) symbols with the line ends or slashes behind them
        r"\s*[\r\n]+",  # (e) white space up to its last line end
        r"\s+(?!\S)",  # (f) white space, leaving one blank to the next word
        r"\s+",  # (g) what white space remains
    )
)


def _reserved(family: str, count: int, start: int = 0) -> list[str]:
    return [f"<|{family}_reserved_special_token_{i}|>" for i in range(start, start + count)]


def _full() -> tuple[str, ...]:
    basic = ["begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix"]
    turns = ["header_start", "header_end", "eom", "eot", "step"]
    names = [f"<|{name}|>" for name in basic + turns]
    names += _reserved("text_post_train", 6)
    names += ["<|python_start|>", "<|python_end|>", "<|finetune_right_pad|>"]
    names += _reserved("text_post_train", 61, start=8)  # 6 and 7 do not exist
    names += ["<|image_start|>", "<|image_end|>", *_reserved("vision", 2)]
    names += ["<|tile_x_separator|>", "<|tile_y_separator|>", *_reserved("vision", 4, start=2)]
    names += ["<|image|>", *_reserved("vision", 1, start=6), "<|patch|>", *_reserved("vision", 1041, start=7)]
    names += [*_reserved("reasoning", 8), "<|reasoning_thinking_start|>", "<|reasoning_thinking_end|>"]
    names += [f"<|reserved_special_token_{i}|>" for i in range(904)]
    return tuple(names)


FULL = _full()
"""All 2,048 special tokens in id order."""

_FUNCTIONAL = frozenset(
    f"<|{name}|>"
    for name in (
        "begin_of_text", "end_of_text", "fim_prefix", "fim_middle", "fim_suffix", "header_start", "header_end", "eom",
        "eot", "python_start", "python_end", "finetune_right_pad", "image_start", "image_end", "tile_x_separator",
        "tile_y_separator", "image", "patch",
    )
)  # fmt: skip
COMPACT = tuple(name for name in FULL if name in _FUNCTIONAL)
"""The tokens with a function, in the order of `FULL`."""

LAYOUTS = {"full": FULL, "compact": COMPACT}

ATTRIBUTES = {
    "bos": ("<|begin_of_text|>",),
    "end_of_text": ("<|end_of_text|>",),
    "header_start": ("<|header_start|>",),
    "header_end": ("<|header_end|>",),
    "eom": ("<|eom|>",),
    "eot": ("<|eot|>",),
    # Meta's string first; the Hugging Face files write the same token with `_id` behind it (llama4-facts.md §4.1).
    "pad": ("<|finetune_right_pad|>", "<|finetune_right_pad_id|>"),
    "image_start": ("<|image_start|>",),
    "image_end": ("<|image_end|>",),
    "image": ("<|image|>",),
    "patch": ("<|patch|>",),
    "tile_x": ("<|tile_x_separator|>",),
    "tile_y": ("<|tile_y_separator|>",),
}
"""Attribute of `Tokenizer` -> the strings it may be written as, best first."""
