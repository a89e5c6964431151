"""Closed-book facts: "What is the capital of Kenya?" -> "Nairobi".

Every fact is in training (nobody can derive a capital); what the test holds out is the *phrasing*: each kind's last
template in a language is never trained on, so the test asks whether the fact was learnt or only the sentence. Outside
English the templates name the country on its own ("Pays : France. Quelle est la capitale ?"), which is right whatever
article or case the language would need.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from puna import nursery
from puna.errors import PunaError
from puna.tasks.base import Item, Task, assistant, check, most_frequent_share, normalise, user
from puna.tasks.languages import language_weights, weighted
from puna.tasks.seeding import rng, shuffle_order

# The last template of each kind is the test's.
ENGLISH = {
    "capital": (
        "What is the capital of {subject}?",
        "Name the capital of {subject}.",
        "Which city is the capital of {subject}?",
        "Country: {subject}. What is the capital?",
        "Tell me the capital city of {subject}.",
    ),
    "currency": (
        "What is the currency of {subject}?",
        "Which currency is used in {subject}?",
        "Country: {subject}. What is the currency?",
        "What money do people use in {subject}?",
    ),
    "continent": (
        "Which continent is {subject} on?",
        "What continent does {subject} belong to?",
        "Country: {subject}. Which continent?",
        "On which continent is {subject}?",
    ),
    "official_language": (
        "What is an official language of {subject}?",
        "Name an official language of {subject}.",
        "Country: {subject}. What is the official language?",
        "Which language is official in {subject}?",
    ),
}
ANY_KIND = (
    "What is the {kind} of {subject}?",
    "Name the {kind} of {subject}.",
    "{subject}: what is the {kind}?",
    "Tell me the {kind} of {subject}.",
)
# language: (country, capital?, currency?, continent?, official language?)
SHORT = {
    "ar": ("البلد: {subject}.", "ما العاصمة؟", "ما العملة؟", "في أي قارة؟", "ما اللغة الرسمية؟"),
    "de": (
        "Land: {subject}.",
        "Was ist die Hauptstadt?",
        "Was ist die Währung?",
        "Auf welchem Kontinent?",
        "Was ist die Amtssprache?",
    ),
    "es": (
        "País: {subject}.",
        "¿Cuál es la capital?",
        "¿Cuál es la moneda?",
        "¿En qué continente está?",
        "¿Cuál es el idioma oficial?",
    ),
    "fr": (
        "Pays : {subject}.",
        "Quelle est la capitale ?",
        "Quelle est la monnaie ?",
        "Sur quel continent ?",
        "Quelle est la langue officielle ?",
    ),
    "hi": ("देश: {subject}।", "राजधानी क्या है?", "मुद्रा क्या है?", "किस महाद्वीप में है?", "राजभाषा क्या है?"),
    "id": ("Negara: {subject}.", "Apa ibu kotanya?", "Apa mata uangnya?", "Di benua mana?", "Apa bahasa resminya?"),
    "it": (
        "Paese: {subject}.",
        "Qual è la capitale?",
        "Qual è la valuta?",
        "In quale continente?",
        "Qual è la lingua ufficiale?",
    ),
    "pt": (
        "País: {subject}.",
        "Qual é a capital?",
        "Qual é a moeda?",
        "Em que continente?",
        "Qual é a língua oficial?",
    ),
    "th": ("ประเทศ: {subject}", "เมืองหลวงคืออะไร", "สกุลเงินคืออะไร", "อยู่ในทวีปใด", "ภาษาราชการคืออะไร"),
    "tl": ("Bansa: {subject}.", "Ano ang kabisera?", "Ano ang pera?", "Saang kontinente?", "Ano ang opisyal na wika?"),
    "vi": (
        "Quốc gia: {subject}.",
        "Thủ đô là gì?",
        "Đơn vị tiền tệ là gì?",
        "Thuộc châu lục nào?",
        "Ngôn ngữ chính thức là gì?",
    ),
}
_SHORT_KINDS = {"capital": 1, "currency": 2, "continent": 3, "official_language": 4}


def templates(kind: str, lang: str) -> tuple[str, ...]:
    """The ways to ask for `kind` in `lang`, the test's last; English where there are none in that language."""
    if lang in SHORT and kind in _SHORT_KINDS:
        country, question = SHORT[lang][0], SHORT[lang][_SHORT_KINDS[kind]]
        return f"{country} {question}", f"{country}\n{question}", f"{question} {country}"
    return ENGLISH.get(kind) or tuple(t.replace("{kind}", kind.replace("_", " ")) for t in ANY_KIND)


@lru_cache(maxsize=1)
def _answers() -> dict[tuple[str, str, str], list[str]]:
    """(kind, subject, language) -> answers, in the nursery's order."""
    answers: dict[tuple[str, str, str], list[str]] = {}
    for fact in nursery.facts():
        answers.setdefault((fact["kind"], fact["subject"], fact["language"]), []).append(fact["answer"])
    return answers


class Facts(Task):
    """Questions about the nursery's facts.

    languages: weights for training (default half English); the test asks every fact of the languages named.
    kinds: only these kinds of facts (default all).
    """

    name = "facts"

    def __init__(self, languages: dict[str, float] | None = None, kinds: Iterable[str] | None = None):
        weights = language_weights(self.name, languages)
        known = {key[0] for key in _answers()}
        kinds = known if kinds is None else set(kinds)
        if kinds - known:
            missing = sorted(kinds - known)[0]
            raise PunaError(f"facts: no facts of kind {missing!r}; choose from {', '.join(sorted(known))}")
        self._keys = [key for key in _answers() if key[0] in kinds and weights.get(key[2])]
        self._by_language = {lang: [key for key in self._keys if key[2] == lang] for lang in weights}
        self.weights = {lang: weight for lang, weight in weights.items() if self._by_language[lang]}
        if not self._keys:
            raise PunaError("facts: no facts of these kinds in these languages; give others or leave them out")

    def size(self, split: str = "test", level: int = 0) -> int | None:
        return len(self._keys) if split == "test" else None

    def item(self, index: int, split: str = "train", seed: int = 0, level: int = 0) -> Item:
        check(self.name, index, split, level, 1, self.size(split))
        rand = rng(self.name, split, seed, index)
        if split == "test":
            key = self._keys[_test_order(seed, len(self._keys))[index]]
        else:
            key = rand.choice(self._by_language[weighted(self.weights, rand)])
        kind, subject, lang = key
        *trained, tested = templates(kind, lang)
        question = (tested if split == "test" else rand.choice(trained)).replace("{subject}", subject)
        answer = _answers()[key][0]
        meta = {"task": self.name, "lang": lang, "kind": kind, "subject": subject}
        return Item([user(question), assistant(answer)], answer, meta)

    def grade(self, item: Item, text: str) -> float:
        """1 if the whole answer, normalised, is one of the fact's answers; else 0."""
        lang = item.meta["lang"]
        answers = _answers()[item.meta["kind"], item.meta["subject"], lang]
        return float(normalise(text, lang) in {normalise(answer, lang) for answer in answers})

    def chance(self, items: Iterable[Item]) -> float:
        """Share of the most frequent answer."""
        return most_frequent_share(items)


@lru_cache(maxsize=64)
def _test_order(seed: int, n: int) -> list[int]:
    return shuffle_order(("facts test", seed), n)
