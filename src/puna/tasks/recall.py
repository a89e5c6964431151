"""Say again what was just said: a few codes, then all of them in any order.

The smallest lesson of looking something up, and the first of three (docs/LOG.md has the numbers): the code of one
thing, then of several that must be told apart, both within one attention chunk, where a look-up spans a hundred
tokens and is found by every layer; then `needle`, where it spans thousands of tokens of text and only global layers
reach. Asked for at once in long texts, codes are never learnt: attention over a thousand tokens that does not yet know
what to look for gives each a thousandth of its weight, and as much of the gradient.

Half of the text is answers, so that a step of 2,048 tokens looks up some four hundred digits. The task follows the
associative recall of Arora et al. (arXiv 2312.04927), in sentences and with the keys of `needle`.
"""

from __future__ import annotations

from collections.abc import Iterable

from puna.errors import PunaError
from puna.tasks.base import Item, Task, assistant, check, user
from puna.tasks.needle import KEYS, QUESTION, QUESTION_ALL, SENTENCE, chance_of_codes, grade_code
from puna.tasks.seeding import log_even, rng


class Recall(Task):
    """Codes listed and recalled.

    fewest, most: how many codes a list holds, as often 2 or 3 as 4 to 6; 8 and their answers fit a chunk of 256 tokens.
    A training item asks for all of them at once, answered in any order; a test item for one. tests: how many test
    items.
    """

    name = "recall"

    def __init__(self, fewest: int = 1, most: int = 8, tests: int = 100):
        if not 1 <= fewest <= most <= len(KEYS) or tests < 1:
            raise PunaError(
                f"recall: needs 1 <= fewest <= most <= {len(KEYS)} and tests >= 1, got {fewest}, {most} and {tests}"
            )
        self.fewest, self.most, self.tests = fewest, most, tests

    def size(self, split: str = "test", level: int = 0) -> int | None:
        return self.tests if split == "test" else None

    def item(self, index: int, split: str = "train", seed: int = 0, level: int = 0) -> Item:
        check(self.name, index, split, level, 1, self.size(split))
        rand = rng(self.name, split, seed, index)
        keys = rand.sample(KEYS, log_even(rand, self.fewest, self.most))
        values = rand.sample(range(10000, 100000), len(keys))
        said = [SENTENCE.format(key=key, value=value) for key, value in zip(keys, values, strict=True)]
        listed = " ".join(said)
        order = rand.sample(range(len(keys)), len(keys))
        asked = order[0]
        if split == "train":
            question, answer = QUESTION_ALL, " ".join(said[i] for i in order)
        else:
            question, answer = QUESTION.format(key=keys[asked]), said[asked]
        meta = {"task": self.name, "lang": "en", "key": keys[asked], "keys": len(keys)}
        return Item([user(f"{listed}\n\n{question}"), assistant(answer)], str(values[asked]), meta)

    def grade(self, item: Item, text: str) -> float:
        """1 if the only 5-digit number in `text` is the asked code; else 0. (A training item asks for all its codes;
        only one of them is its `answer`.)"""
        return grade_code(item.answer, text)

    def chance(self, items: Iterable[Item]) -> float:
        """Naming one of the listed codes blindly."""
        return chance_of_codes(items)
