"""A needle in a haystack: one 5-digit code among several, hidden in real text.

The haystack is real prose of the nursery (its training texts for training, its held-out texts for the test) into
which five or more sentences like "The code of the red lamp is 48213." are put, each with another thing and another
value; the question asks for one of them, so finding *a* number is not enough. The answer is the whole sentence: what
stands before its digits is then the same in both places, and the code is what once followed it. The depth of the asked
one is uniform over the text (stratified in the test), which shows a model that only reads the beginning or the end.
`length` counts the whole question in tokens by the caller's `count`; level k doubles it k times, so the test at level 1
is twice the training length. Source of the test: Kamradt 2023, with the keyed values of RULER (arXiv 2404.06654).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache

from puna import nursery
from puna.errors import PunaError
from puna.tasks.base import Item, Task, assistant, check, user
from puna.tasks.languages import check_languages
from puna.tasks.seeding import log_even, rng

_COLOURS = "red blue green yellow black white brown golden silver purple pink orange"
_THINGS = (
    "lamp chair door box bottle coat hat clock key bag cup plate boat car bell book drum flag gate glove horse kite "
    "ladder mirror needle piano ring rope shoe spoon table tent tower train wheel window"
)
COLOURS, THINGS = tuple(_COLOURS.split()), tuple(_THINGS.split())
KEYS = tuple(f"{colour} {thing}" for colour in COLOURS for thing in THINGS)
SENTENCE = "The code of the {key} is {value}."
QUESTION = "What is the code of the {key}?"
QUESTION_ALL = "What are the codes?"
LEVELS = 8
TURN = 14  # tokens that another question costs besides its text and its answer's: headers and ends of turn
_BREAK = re.compile(r"(?<=[.!?;:])\s+|\n+")
_TOO_LONG = 400  # characters; a longer stretch without a break is cut at spaces


@lru_cache(maxsize=32)
def sentences(lang: str, split: str) -> tuple[tuple[str, ...], ...]:
    """The documents of nursery texts in one language, cut into sentences; split "train" or "test" (held-out texts)."""
    documents = []
    for text in nursery.texts(lang, "val" if split == "test" else "train"):
        pieces = []
        for piece in _BREAK.split(text):
            while len(piece) > _TOO_LONG:
                cut = piece.rfind(" ", 1, _TOO_LONG)
                cut = cut if cut > 0 else _TOO_LONG
                pieces.append(piece[:cut].strip())
                piece = piece[cut:].strip()
            pieces.append(piece.strip())
        documents.append(tuple(piece for piece in pieces if piece))
    return tuple(document for document in documents if document)


def grade_code(code: str, text: str) -> float:
    """1 if `code` is the only 5-digit number in `text`; else 0."""
    return float(set(re.findall(r"(?<!\d)\d{5}(?!\d)", text, re.ASCII)) == {code})


def chance_of_codes(items: Iterable[Item]) -> float:
    """Naming one of an item's codes blindly: the mean of 1 / (number of codes). PunaError on no items."""
    shares = [1 / item.meta["keys"] for item in items]
    if not shares:
        raise PunaError("a chance level needs at least one item")
    return sum(shares) / len(shares)


class Needle(Task):
    """One of several codes to find in real text.

    length: tokens of the user's text (haystack and question) by `count`, at level 0; level k asks for length * 2**k.
    count: text -> number of tokens. keys: (fewest, most) different codes in a text, at least 5; fewer where a short
    text has no room for the most. fewest: training texts hold from so many on, few more often than many: of two codes
    one is found sooner than of eight. languages: of the haystack, drawn evenly. shortest: training lengths lie in
    [shortest * length, length], as many between 300 and 400 as between 600 and 800. tests: how many test items.
    turns: the most codes a training text is asked for, one after the other; the length holds all questions. every:
    share of the training texts that are asked for all their codes at once, in any order: the densest lesson.
    """

    name = "needle"

    def __init__(
        self,
        length: int,
        count: Callable[[str], int],
        keys: tuple[int, int] = (5, 8),
        languages: Iterable[str] = ("en",),
        shortest: float = 0.5,
        tests: int = 100,
        turns: int = 1,
        every: float = 0.0,
        fewest: int | None = None,
    ):
        self.turns, self.every = turns, every
        self.length, self.count, self.keys, self.shortest, self.tests = length, count, tuple(keys), shortest, tests
        self.languages = tuple(languages)
        check_languages("needle", self.languages)
        if not 5 <= self.keys[0] <= self.keys[1] <= len(KEYS):
            raise PunaError(f"needle: keys {self.keys} must be (fewest, most) with fewest at least 5")
        self.fewest = self.keys[0] if fewest is None else fewest
        if not 1 <= self.fewest <= self.keys[1]:
            raise PunaError(f"needle: fewest must be 1 to {self.keys[1]}, the most codes of a text, not {fewest}")
        if turns < 1 or not 0 <= every <= 1:
            raise PunaError(f"needle: turns must be at least 1 and every in 0..1, got {turns} and {every}")
        if not 0 < shortest <= 1 or tests < 1 or not self.languages:
            raise PunaError("needle: needs 0 < shortest <= 1, tests >= 1 and at least one language")
        self._counts: dict[str, int] = {}
        self._sentence = self._cost(SENTENCE.format(key="golden mirror", value=12345)) + 2
        least = self._sentence * (self.keys[0] + 3)
        if least > length * shortest:
            raise PunaError(
                f"needle: {length} tokens (shortest {length * shortest:.0f}) hold no {self.keys[0]} codes and text; "
                f"give a length of at least {round(least / shortest + 1)}"
            )

    def size(self, split: str = "test", level: int = 0) -> int | None:
        return self.tests if split == "test" else None

    def item(self, index: int, split: str = "train", seed: int = 0, level: int = 0) -> Item:
        check(self.name, index, split, level, LEVELS, self.size(split))
        rand = rng(self.name, split, seed, index, level)
        longest = self.length * 2**level
        length = longest if split == "test" else log_even(rand, round(self.shortest * longest), longest)
        lang = rand.choice(self.languages)
        listed = split == "train" and rand.random() < self.every
        said = 2 if listed else 1  # times that every code is written
        most = max(self.keys[0], min(self.keys[1], length // self._sentence // said - 3))  # leave room for text
        number = rand.randint(self.keys[0], most) if split == "test" else log_even(rand, self.fewest, most)
        keys = rand.sample(KEYS, number)
        depth = (index + rand.random()) / self.tests if split == "test" else rand.random()
        depths = [depth, *(rand.random() for _ in keys[1:])]
        values: list[int] = []
        asked = 1 if split == "test" else rand.randint(1, self.turns)
        questions = [QUESTION_ALL] if listed else [QUESTION.format(key=key) for key in keys[:asked]]
        later = sum(self._cost(question) + self._sentence + TURN for question in questions[1:])
        later += (len(keys) - 1) * self._sentence if listed else 0  # the other sentences of the answer
        used = sum(self._cost(SENTENCE.format(key=key, value=54321)) for key in keys)
        used += self._cost(questions[0]) + later
        hay = self._hay(rand, lang, split, length - used)
        while len(values) < len(keys):
            value = rand.randint(10000, 99999)
            if value not in values and not any(str(value) in piece for piece in hay):
                values.append(value)
        needles = [SENTENCE.format(key=key, value=value) for key, value in zip(keys, values, strict=True)]
        while True:
            text = _insert(hay, needles, depths)
            whole = f"{text}\n\n{questions[0]}"
            if self.count(whole) + later <= length or not hay:
                break
            hay.pop()  # pieces' counts add up only roughly; give way at the end
        meta = {
            "task": self.name,
            "lang": lang,
            "key": keys[len(questions) - 1],
            "keys": len(keys),
            "depth": text.index(needles[0]) / max(1, len(text) - len(needles[0])),
            "length": length,
        }
        messages = []
        answers = [" ".join(rand.sample(needles, len(needles)))] if listed else needles
        for text, answer in zip([whole, *questions[1:]], answers, strict=False):
            messages += [user(text), assistant(answer)]
        return Item(messages, str(values[len(questions) - 1]), meta)

    def grade(self, item: Item, text: str) -> float:
        """1 if the only 5-digit number in `text` is the asked code; else 0."""
        return grade_code(item.answer, text)

    def chance(self, items: Iterable[Item]) -> float:
        """Naming one of the codes in the text blindly."""
        return chance_of_codes(items)

    def _cost(self, piece: str) -> int:
        """Tokens of a piece with the space after it; remembered, since pieces come again."""
        if piece not in self._counts:
            if len(self._counts) > 100_000:
                self._counts.clear()
            self._counts[piece] = self.count(f" {piece}")
        return self._counts[piece]

    def _hay(self, rand, lang: str, split: str, budget: int) -> list[str]:
        """Sentences of consecutive real text of about `budget` tokens, from a random place on, document after
        document."""
        documents = sentences(lang, split)
        if not documents:
            raise PunaError(f"needle: the nursery has no {split} text in {lang!r}")
        document = rand.randrange(len(documents))
        start = rand.randrange(len(documents[document]))
        hay: list[str] = []
        while True:
            for piece in documents[document % len(documents)][start:]:
                budget -= self._cost(piece)
                if budget < 0:
                    return hay
                hay.append(piece)
            document, start = document + 1, 0


def _insert(hay: list[str], needles: list[str], depths: list[float]) -> str:
    """One text: each needle after the sentence in which its depth (share of the characters) falls."""
    ends, total = [], 0
    for piece in hay:
        total += len(piece) + 1
        ends.append(total)
    gaps: dict[int, list[str]] = {}
    for needle, depth in zip(needles, depths, strict=True):
        aim = depth * total
        gap = min(range(len(hay) + 1), key=lambda g: abs((ends[g - 1] if g else 0) - aim))
        gaps.setdefault(gap, []).append(needle)
    pieces = list(gaps.get(0, []))
    for gap, piece in enumerate(hay, start=1):
        pieces.append(piece)
        pieces.extend(gaps.get(gap, []))
    return " ".join(pieces)
