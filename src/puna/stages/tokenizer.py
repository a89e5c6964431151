"""A run's tokenizer: BPE on equal characters of every language and of code, so that no language swallows the merges.

The names of the nursery's things are read many times over (`NAMES`), so that most of them become one token. A name in
letters is a chain of guesses that other names share; a name in one token is the class itself, and a young eye learns it
several times sooner (docs/LOG.md). So are the words that every conversation repeats (`TURNS`): half of a short answer's
tokens would be pieces of "assistant".
"""

from __future__ import annotations

import itertools
from pathlib import Path

from puna import nursery
from puna.data.sources import texts
from puna.model import VisionConfig
from puna.processor import ImageProcessor, Processor, Tokenizer
from puna.stages.config import TokenizerConfig
from puna.tasks.needle import COLOURS, THINGS

MAX_TILES = 4  # of a nano's pictures; Llama 4's own limit is 16
TURNS = (  # what conversations repeat
    "user", "assistant", "ipython", "system", '<box label="dog">', "</box>", "What is this?", "Where is the dog?",
    "Find the dog.", "Point to the dog.", "Locate the dog.", "Show me the dog.",
    "What is the code of the red lamp? The code of the red lamp is 1.",
    *(f"the {word}" for word in (*COLOURS, *THINGS)),
)  # fmt: skip
TURN_READINGS = 300
NAMES = {"asked": 100, "en": 60, "others": 10}  # readings of an English name that the naming test asks, or not; others


def training_text(config: TokenizerConfig, seed: int = 0):
    """Documents to learn merges from."""
    languages = (texts(f"text/{lang}", max_chars=config.chars, seed=seed) for lang in nursery.LANGUAGES)
    names = (
        name
        for concept in nursery.concepts()
        for lang, name in concept.names.items()
        for _ in range(NAMES["others" if lang != "en" else "asked" if concept.naming else "en"])
    )
    code = texts("code", max_chars=config.code_chars, seed=seed)
    return itertools.chain(names, TURNS * TURN_READINGS, code, itertools.chain.from_iterable(languages))


def make_processor(config: TokenizerConfig, vision: VisionConfig | None, folder: Path, seed: int = 0) -> Processor:
    """The processor in `folder`, trained there first if it is missing."""
    if (folder / "tokenizer.json").is_file() and (folder / "processor.json").is_file():
        return Processor.load(folder)
    tokenizer = Tokenizer.train(
        training_text(config, seed), config.vocab_size, special=config.special, digits=config.digits
    )
    image = ImageProcessor(vision.image_size, vision.patch_size, MAX_TILES) if vision else None
    processor = Processor(tokenizer, image)
    processor.save(folder)
    return processor
