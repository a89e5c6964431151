"""What a task is: items with a question and a checkable answer, and a grade.

A task is a *pure function of (split, seed, index)*: `item(i)` can be asked for at any i, in any order, on any
machine, and gives the same item, so a data stream resumes from one integer and two ranks never disagree. Training
splits are endless, test splits are finite and share nothing with training that the task promises to hold out (pairs
of numbers, a drawing style, scenes, texts). The same object makes SFT conversations, evaluation questions and (later)
RL prompts; `grade` is the one judge of all three.

Random numbers come from `seeding.rng`, keyed by task, split, seed and index.
"""

from __future__ import annotations

import unicodedata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count as count_from

from puna.errors import PunaError
from puna.tasks.pictures import PictureRef

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Item:
    """One question with its answer.

    messages: chat messages in the processor's form, user turns and a final assistant turn whose text is the model
    answer.
    answer: the bare expected answer (a name, a number, a box), which `Task.grade` compares with.
    meta: JSON-able facts about the item (concept, language, depth ...), for tables and debugging.
    """

    messages: list[dict]
    answer: str
    meta: dict = field(default_factory=dict)

    @property
    def prompt(self) -> list[dict]:
        """The messages up to the final assistant turn: what a model is given."""
        return self.messages[:-1]

    @property
    def pictures(self) -> list[PictureRef]:
        """All pictures, in reading order."""
        return [
            part["image"]
            for message in self.messages
            if not isinstance(message["content"], str)
            for part in message["content"]
            if part["type"] == "image"
        ]

    def with_picture(self, picture: PictureRef, **meta) -> Item:
        """The same item with every picture replaced by `picture`; `meta` is added to its facts."""

        def swap(content):
            if isinstance(content, str):
                return content
            return [{"type": "image", "image": picture} if part["type"] == "image" else part for part in content]

        messages = [{**message, "content": swap(message["content"])} for message in self.messages]
        return Item(messages, self.answer, {**self.meta, **meta})

    def to_json(self) -> dict:
        """Plain dicts, lists and text; pictures as their recipe, not their pixels."""

        def plain(content):
            if isinstance(content, str):
                return content
            return [{**p, "image": p["image"].to_json()} if p["type"] == "image" else dict(p) for p in content]

        messages = [{**message, "content": plain(message["content"])} for message in self.messages]
        return {"messages": messages, "answer": self.answer, "meta": dict(self.meta)}

    @classmethod
    def from_json(cls, data: dict) -> Item:
        """The inverse of `to_json`."""

        def lively(content):
            if isinstance(content, str):
                return content
            return [
                {**p, "image": PictureRef.from_json(p["image"])} if p["type"] == "image" else dict(p) for p in content
            ]

        messages = [{**message, "content": lively(message["content"])} for message in data["messages"]]
        return cls(messages, data["answer"], dict(data["meta"]))


class Task(ABC):
    """A source of items with a judge. Subclasses give `name`, `size`, `item` and `grade`."""

    name: str

    @abstractmethod
    def size(self, split: str = "test", level: int = 0) -> int | None:
        """How many items a split has; None for the endless training split."""

    @abstractmethod
    def item(self, index: int, split: str = "train", seed: int = 0, level: int = 0) -> Item:
        """Item `index` of the split: a pure function of its arguments.

        Raises PunaError for an unknown split or level, IndexError past a test split's end.
        """

    @abstractmethod
    def grade(self, item: Item, text: str) -> float:
        """How good `text` is as the answer to `item`, in [0, 1]."""

    def items(self, split: str = "train", seed: int = 0, level: int = 0, start: int = 0) -> Iterator[Item]:
        """Items from `start` on: endless for "train", finite for "test"."""
        size = self.size(split, level)
        for index in count_from(start) if size is None else range(start, size):
            yield self.item(index, split, seed, level)


def check(name: str, index: int, split: str, level: int, levels: int, size: int | None) -> None:
    """Refuse what `Task.item` cannot give: unknown split or level (PunaError), index out of range (IndexError)."""
    if split not in SPLITS:
        raise PunaError(f"task {name}: unknown split {split!r}; choose 'train' or 'test'")
    if not 0 <= level < levels:
        raise PunaError(f"task {name}: level {level} does not exist; choose 0 to {levels - 1}")
    if index < 0 or (size is not None and index >= size):
        raise IndexError(
            f"task {name}: no item {index} in split {split!r}" + (f" of {size}" if size is not None else "")
        )


def user(text: str, *pictures: PictureRef) -> dict:
    """A user turn: pictures first, then the text."""
    if not pictures:
        return {"role": "user", "content": text}
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def assistant(text: str) -> dict:
    """An assistant turn."""
    return {"role": "assistant", "content": text}


ARTICLES = {
    "de": "der die das den dem des ein eine einen einem einer",
    "en": "a an the",
    "es": "el la los las un una unos unas",
    "fr": "le la les l un une des du",
    "it": "il lo la i gli le l un uno una",
    "pt": "o a os as um uma uns umas",
    "tl": "ang isang mga",
}
ARTICLES = {lang: frozenset(words.split()) for lang, words in ARTICLES.items()}


def normalise(text: str, lang: str = "en") -> str:
    """Compare-ready text: NFKC, case-folded, punctuation to spaces, format characters dropped, leading articles
    dropped.

    Letters and combining marks (Devanagari and Thai vowels) stay. A text that is only an article stays as it is.
    """
    kept = []
    for char in unicodedata.normalize("NFKC", text).casefold():
        category = unicodedata.category(char)
        if category == "Cf":
            continue
        kept.append(" " if category[0] in "PSZC" else char)
    words = "".join(kept).split()
    articles = ARTICLES.get(lang, frozenset())
    while len(words) > 1 and words[0] in articles:
        words = words[1:]
    return " ".join(words)


def most_frequent_share(items: Iterable[Item]) -> float:
    """Chance level of always giving the most frequent answer: its share among the items. PunaError on no items."""
    counts = Counter(normalise(item.answer, item.meta.get("lang", "en")) for item in items)
    if not counts:
        raise PunaError("a chance level needs at least one item")
    return max(counts.values()) / counts.total()
