"""Facts about countries: capital, currency, continent, official language, with the names each language uses.

English answers for capitals come from the CIA World Factbook (public domain); everything else, and the names in the
other eleven languages, from Unicode CLDR.
"""

from functools import lru_cache

from puna.nursery.files import read_json_xz


@lru_cache(maxsize=1)
def _facts() -> tuple[dict, ...]:
    return tuple(read_json_xz("facts/countries.json.xz"))


def facts() -> list[dict]:
    """Fact rows with keys kind ("capital", "currency", "continent", "official_language"), subject (the country's name
    in ``language``), answer, language and country (ISO 3166 code). Two rows with one kind, subject and language are
    both right."""
    return [dict(row) for row in _facts()]
