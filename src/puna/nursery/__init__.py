"""The nursery: real data that ships with puna, at most 12 MB, every source under a free licence.

Text in 12 languages and Python code, 904 things named in 12 languages and drawn in seven styles, and facts about
countries. Quick start and tests need nothing else. See docs/data.md; ``python -m puna.nursery.build`` rebuilds it.
"""

from puna.nursery.files import LANGUAGES, LICENCES_ALLOWED, SIZE_LIMIT, manifest, verify
from puna.nursery.pictures import STYLE_HELD_OUT, STYLES_TRAIN, Concept, concepts, picture
from puna.nursery.text import code, texts
from puna.nursery.world import facts

__all__ = [
    "LANGUAGES",
    "LICENCES_ALLOWED",
    "SIZE_LIMIT",
    "STYLES_TRAIN",
    "STYLE_HELD_OUT",
    "Concept",
    "code",
    "concepts",
    "facts",
    "manifest",
    "picture",
    "texts",
    "verify",
]
