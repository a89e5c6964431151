"""Naming a picture in any of 12 languages: "What is this?" -> "pizza".

Names are CLDR's, as CLDR writes them. The test asks for every naming concept once, drawn in a style that no training
picture has, plain on white; the model must write the whole name, no candidates given. A synonym (CLDR keyword) also
counts, but only if at most two of all the nursery's concepts have it as name or synonym: "face" names nothing.
`shuffled` pairs each question with another concept's picture: a model that looks must then fall to chance, the most
frequent answer.
"""

from __future__ import annotations

from bisect import bisect
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate

from puna import nursery
from puna.errors import PunaError
from puna.tasks.base import Item, Task, assistant, check, most_frequent_share, normalise, user
from puna.tasks.languages import language_weights, weighted
from puna.tasks.pictures import EmojiPicture, by_id, styles
from puna.tasks.seeding import rng, shuffle_order

QUESTIONS = {
    "ar": ("ما هذا؟", "ماذا تعرض الصورة؟", "ما الذي يظهر في الصورة؟", "ما اسم هذا؟", "اذكر اسم ما تراه."),
    "de": (
        "Was ist das?",
        "Was zeigt das Bild?",
        "Was ist auf dem Bild zu sehen?",
        "Wie heißt das?",
        "Benenne, was du siehst.",
    ),
    "en": (
        "What is this?",
        "What does the picture show?",
        "What is in the picture?",
        "What is this called?",
        "Name what you see.",
    ),
    "es": (
        "¿Qué es esto?",
        "¿Qué muestra la imagen?",
        "¿Qué se ve en la imagen?",
        "¿Cómo se llama esto?",
        "Di el nombre de lo que ves.",
    ),
    "fr": (
        "Qu'est-ce que c'est ?",
        "Que montre l'image ?",
        "Que voit-on sur l'image ?",
        "Comment cela s'appelle-t-il ?",
        "Nomme ce que tu vois.",
    ),
    "hi": ("यह क्या है?", "तस्वीर में क्या है?", "तस्वीर में क्या दिख रहा है?", "इसे क्या कहते हैं?", "जो दिख रहा है, उसका नाम बताइए।"),
    "id": (
        "Apa ini?",
        "Apa yang ditunjukkan gambar ini?",
        "Apa yang ada di gambar ini?",
        "Ini disebut apa?",
        "Sebutkan apa yang kamu lihat.",
    ),
    "it": (
        "Che cos'è questo?",
        "Che cosa mostra l'immagine?",
        "Che cosa si vede nell'immagine?",
        "Come si chiama questo?",
        "Di' il nome di ciò che vedi.",
    ),
    "pt": (
        "O que é isto?",
        "O que mostra a imagem?",
        "O que se vê na imagem?",
        "Como se chama isto?",
        "Diga o nome do que você vê.",
    ),
    "th": ("นี่คืออะไร", "ภาพนี้แสดงอะไร", "ในภาพมีอะไร", "สิ่งนี้เรียกว่าอะไร", "บอกชื่อสิ่งที่คุณเห็น"),
    "tl": (
        "Ano ito?",
        "Ano ang ipinapakita ng larawan?",
        "Ano ang nasa larawan?",
        "Ano ang tawag dito?",
        "Sabihin ang pangalan ng nakikita mo.",
    ),
    "vi": (
        "Đây là gì?",
        "Hình này cho thấy gì?",
        "Trong hình có gì?",
        "Cái này gọi là gì?",
        "Hãy gọi tên thứ bạn nhìn thấy.",
    ),
}


@lru_cache(maxsize=1)
def _owners() -> dict[str, Counter]:
    """By language: in how many concepts each normalised name or synonym occurs."""
    owners = {lang: Counter() for lang in QUESTIONS}
    for concept in nursery.concepts():
        for lang, name in concept.names.items():
            if lang in owners:
                owners[lang].update({normalise(text, lang) for text in (name, *concept.synonyms.get(lang, ()))})
    return owners


@lru_cache(maxsize=65536)
def accepted(concept_id: str, lang: str) -> frozenset[str]:
    """The normalised answers that count: the name, and the synonyms that at most two concepts have."""
    concept = by_id()[concept_id]
    synonyms = (normalise(text, lang) for text in concept.synonyms.get(lang, ()))
    names = {normalise(concept.names[lang], lang), *(text for text in synonyms if _owners()[lang][text] <= 2)}
    return frozenset(names - {""})


class Naming(Task):
    """Pictures to name.

    lang: one language for both splits; None: training draws by `languages` (weights; default half English), the test
    asks in English.
    naming_weight: how much more often than the others a concept of the naming test set is drawn in training.
    """

    name = "naming"

    def __init__(self, lang: str | None = None, languages: dict[str, float] | None = None, naming_weight: float = 8.0):
        self.weights = language_weights(self.name, {lang: 1.0} if lang else languages)
        self.lang = lang or "en"
        if naming_weight <= 0:
            raise PunaError(f"naming: naming_weight must be above 0, got {naming_weight}")
        concepts = {lang: [c for c in nursery.concepts() if c.names.get(lang)] for lang in self.weights}
        self._ids = {lang: [c.id for c in group] for lang, group in concepts.items()}
        self._cumulative = {
            lang: list(accumulate(naming_weight if c.naming else 1.0 for c in group))
            for lang, group in concepts.items()
        }
        self._tested = [c.id for c in nursery.concepts() if c.naming and c.names.get(self.lang)]

    def size(self, split: str = "test", level: int = 0) -> int | None:
        return len(self._tested) if split == "test" else None

    def item(self, index: int, split: str = "train", seed: int = 0, level: int = 0) -> Item:
        check(self.name, index, split, level, 1, self.size(split))
        rand = rng(self.name, split, seed, index, self.lang)
        if split == "test":
            lang = self.lang
            concept = self._tested[_test_order(seed, len(self._tested))[index]]
            picture = EmojiPicture(concept, nursery.STYLE_HELD_OUT)
        else:
            lang = weighted(self.weights, rand)
            cumulative = self._cumulative[lang]
            concept = self._ids[lang][bisect(cumulative, rand.random() * cumulative[-1], hi=len(cumulative) - 1)]
            picture = EmojiPicture(concept, rand.choice(styles(concept)), rand.getrandbits(32))
        name = by_id()[concept].names[lang]
        question = rand.choice(QUESTIONS[lang])
        meta = {"task": self.name, "lang": lang, "concept": concept, "style": picture.style}
        return Item([user(question, picture), assistant(name)], name, meta)

    def grade(self, item: Item, text: str) -> float:
        """1 if the whole answer is the name or a synonym that counts, after `normalise`; else 0."""
        lang = item.meta["lang"]
        return float(normalise(text, lang) in accepted(item.meta["concept"], lang))

    def chance(self, items: Iterable[Item]) -> float:
        """Share of the most frequent answer."""
        return most_frequent_share(items)


@lru_cache(maxsize=64)
def _test_order(seed: int, n: int) -> list[int]:
    return shuffle_order(("naming test", seed), n)


def shuffled(items: Iterable[Item], seed: int = 0) -> list[Item]:
    """The same questions and answers, each with another concept's picture (meta "shown"): what a blind model scores.

    PunaError if more than half of the items show one concept.
    """
    items = list(items)
    groups: dict[str, list[int]] = {}
    for position in shuffle_order(("shuffled", seed), len(items)):
        groups.setdefault(items[position].meta["concept"], []).append(position)
    # In order of concept, a turn by the largest group's size takes every item out of its own group.
    order = [position for group in groups.values() for position in group]
    turn = max((len(group) for group in groups.values()), default=0)
    if 2 * turn > len(order):
        raise PunaError("shuffled: more than half of the items show one concept; nothing to exchange")
    mixed = list(items)
    for k, position in enumerate(order):
        other = items[order[(k + turn) % len(order)]]
        mixed[position] = items[position].with_picture(other.pictures[0], shown=other.meta["concept"])
    return mixed
