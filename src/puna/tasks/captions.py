"""Pre-training documents with pictures in them: early fusion's food.

Llama 4 is trained on interleaved text and pictures from the first step (llama4-facts.md §2). A document here is a
list of segments, text or picture, in one of several shapes: a picture and its name; a picture and its name in several
languages; pictures listed with their names; a sentence with the picture inside; a picture with its name and keywords.
Pictures are augmented, of training styles only: the held-out style never appears. Only text is predicted, so a name
comes after its picture except where the sentence asks for it.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator
from itertools import accumulate
from itertools import count as count_from

from puna import nursery
from puna.errors import PunaError
from puna.tasks.languages import language_weights, weighted
from puna.tasks.pictures import EmojiPicture, PictureRef, styles
from puna.tasks.seeding import rng

# Around a picture: before it, and after it up to the name. The name ends the sentence, so it needs no article or case.
SENTENCES = {
    "ar": (("هذه الصورة ", " تُظهر: {name}."), ("صورة: ", " ({name})")),
    "de": (("Dieses Bild ", " zeigt: {name}."), ("Bild: ", " ({name})")),
    "en": (("This picture ", " shows: {name}."), ("Picture: ", " ({name})")),
    "es": (("Esta imagen ", " muestra: {name}."), ("Imagen: ", " ({name})")),
    "fr": (("Cette image ", " montre : {name}."), ("Image : ", " ({name})")),
    "hi": (("इस तस्वीर ", " में है: {name}।"), ("तस्वीर: ", " ({name})")),
    "id": (("Gambar ini ", " menunjukkan: {name}."), ("Gambar: ", " ({name})")),
    "it": (("Questa immagine ", " mostra: {name}."), ("Immagine: ", " ({name})")),
    "pt": (("Esta imagem ", " mostra: {name}."), ("Imagem: ", " ({name})")),
    "th": (("ภาพนี้ ", " แสดง: {name}"), ("ภาพ: ", " ({name})")),
    "tl": (("Ang larawang ito ", " ay nagpapakita ng: {name}."), ("Larawan: ", " ({name})")),
    "vi": (("Hình này ", " cho thấy: {name}."), ("Hình: ", " ({name})")),
}
SHAPES = {"name": 40, "list": 3, "sentence": 2, "languages": 1, "keywords": 1}


class Captions:
    """Interleaved documents, endless: `document(i)` is a pure function of (seed, i).

    languages: weights (default half English). naming_weight: how much more often a concept of the naming test set is
    drawn.
    """

    name = "captions"

    def __init__(self, languages: dict[str, float] | None = None, naming_weight: float = 8.0):
        self.weights = language_weights(self.name, languages)
        if naming_weight <= 0:
            raise PunaError(f"captions: naming_weight must be above 0, got {naming_weight}")
        self._concepts = nursery.concepts()
        self._cumulative = list(accumulate(naming_weight if c.naming else 1.0 for c in self._concepts))

    def document(self, index: int, seed: int = 0) -> list[str | PictureRef]:
        """Document `index`: segments of text and pictures, at least one of each, beginning with a picture or text."""
        rand = rng(self.name, seed, index)
        lang = weighted(self.weights, rand)
        shape = weighted(SHAPES, rand)
        concept = self._draw(rand, lang)
        picture, name = self._picture(rand, concept), concept.names[lang]
        if shape == "sentence":
            before, after = rand.choice(SENTENCES[lang])
            return [before, picture, after.format(name=name)]
        if shape == "languages":
            others = rand.sample([other for other in concept.names if other != lang], min(3, len(concept.names) - 1))
            return [picture, "".join(f"\n{code}: {concept.names[code]}" for code in (lang, *others)).removeprefix("\n")]
        if shape == "keywords" and concept.synonyms.get(lang):
            return [picture, f"{name}: {', '.join(concept.synonyms[lang])}"]
        if shape == "list":
            segments: list[str | PictureRef] = [picture, name]
            for _ in range(rand.randint(1, 3)):
                concept = self._draw(rand, lang)
                segments[-1] += "\n"
                segments += [self._picture(rand, concept), concept.names[lang]]
            return segments
        return [picture, name]

    def documents(self, seed: int = 0, start: int = 0) -> Iterator[list[str | PictureRef]]:
        """Documents from `start` on, without end."""
        for index in count_from(start):
            yield self.document(index, seed)

    def _draw(self, rand, lang: str):
        while True:
            at = bisect(self._cumulative, rand.random() * self._cumulative[-1], hi=len(self._cumulative) - 1)
            if self._concepts[at].names.get(lang):
                return self._concepts[at]

    def _picture(self, rand, concept) -> EmojiPicture:
        return EmojiPicture(concept.id, rand.choice(styles(concept.id)), rand.getrandbits(32))
