"""Country facts from CLDR (names, currencies, continents, official languages) and the World Factbook (capitals).

Only the 193 members of the United Nations, and only what has one plain answer: capitals are left out where governments
disagree on them, currencies and languages where a country has several. A capital has a name in another language where
CLDR translates it as a time zone's city.
"""

import json
import re
import unicodedata
from collections import Counter

from puna.nursery.building.fetch import Packages
from puna.nursery.building.prose import countries, field
from puna.nursery.files import LANGUAGES

CODE = {language: language for language in LANGUAGES} | {"tl": "fil"}
CONTINENTS = ("002", "003", "005", "009", "142", "150")  # UN M.49: Africa, the Americas, Oceania, Asia, Europe
CONTESTED = {"IL", "MM"}
LANGUAGE_UNSETTLED = {"BF", "ET", "ME", "ML", "NE"}  # changed of late, or more than CLDR lists
REGIONAL = 5  # percent of people whose regional official language makes "the official language" ambiguous


def supplemental(packages: Packages, name: str) -> dict:
    path = packages["cldr-core"] / "supplemental" / f"{name}.json"
    return json.loads(path.read_text("utf-8"))["supplemental"][name]


def localised(packages: Packages, package: str, language: str, name: str, *path: str) -> dict:
    code = CODE[language]
    value = json.loads((packages[package] / "main" / code / f"{name}.json").read_text("utf-8"))["main"][code]
    for part in path:
        value = value[part]
    return value


def fold(name: str) -> str:
    """A name without accents, case and punctuation, for comparing spellings."""
    return "".join(c for c in unicodedata.normalize("NFKD", name).casefold() if c.isalpha())


def capitals(packages: Packages) -> dict[str, list[str]]:
    """ISO code -> the capital's names in English; several only where a country has several capitals."""
    mappings = json.loads((packages["cldr-core"] / "supplemental" / "codeMappings.json").read_text("utf-8"))
    members = supplemental(packages, "territoryContainment")["UN"]["_contains"]
    iso = {mappings["supplemental"]["codeMappings"][code].get("_fips10", code): code for code in members}
    found = {}
    for name, country in countries(packages):
        text = field(country, "Government/Capital/name").split("; note")[0]
        parts = [part.split(" (")[0].split(" in ")[0].strip() for part in re.split(r";|\),", text)]
        if text and not text.startswith("no official"):
            found[iso.get(name.split("/")[1].upper(), "")] = [part for part in parts if part]
    return found


def cities(packages: Packages, language: str) -> dict[str, str]:
    """Time zone -> its city's name, of the zones CLDR translates; a zone's last part is its name unless given."""
    zones = localised(packages, "cldr-dates-full", language, "timeZoneNames", "dates", "timeZoneNames", "zone")
    found: dict[str, str] = {}

    def walk(node: dict, path: str) -> None:
        for name, inner in node.items():
            if isinstance(inner, dict):
                walk(inner, f"{path}/{name}")
        if node.get("_type") == "zone" and "exemplarCity" in node:
            found[path] = node["exemplarCity"]

    walk(zones, "")
    return found


def continents(packages: Packages) -> dict[str, str]:
    """ISO code -> M.49 code of its continent."""
    contained = supplemental(packages, "territoryContainment")
    found: dict[str, str] = {}

    def walk(code: str, continent: str) -> None:
        for inner in contained.get(code, {}).get("_contains", ()):
            found.setdefault(inner, continent)
            walk(inner, continent)

    for continent in CONTINENTS:
        walk(continent, continent)
    return found


def only(items: list[str]) -> str | None:
    return items[0] if len(items) == 1 else None


def build_facts(packages: Packages) -> list[dict]:
    """Rows {kind, subject, answer, language, country}, in the order of countries, kinds and languages."""
    members = sorted(supplemental(packages, "territoryContainment")["UN"]["_contains"])
    region = supplemental(packages, "currencyData")["region"]
    people = supplemental(packages, "territoryInfo")
    capital, continent = capitals(packages), continents(packages)
    zone_names = {language: cities(packages, language) for language in LANGUAGES}
    for path in zone_names["th"]:  # every zone: Thai spells none of them as the zone's identifier does
        for language in set(LANGUAGES) - {"ar", "hi", "th"}:
            zone_names[language].setdefault(path, path.rsplit("/", 1)[-1].replace("_", " "))
    spelt = Counter(fold(city) for city in zone_names["en"].values())
    zone = {fold(city): path for path, city in zone_names["en"].items() if spelt[fold(city)] == 1}
    territory, currency = {}, {}
    for language in LANGUAGES:
        territory[language] = localised(
            packages, "cldr-localenames-full", language, "territories", "localeDisplayNames", "territories"
        )
        currency[language] = localised(packages, "cldr-numbers-full", language, "currencies", "numbers", "currencies")
    english = localised(packages, "cldr-localenames-full", "en", "languages", "localeDisplayNames", "languages")

    rows: list[dict] = []
    for country in members:
        money = only([
            code for entry in region.get(country, ()) for code, dates in entry.items()
            if "_to" not in dates and dates.get("_tender") != "false"
        ])  # fmt: skip
        spoken = only([
            language for language, entry in people[country].get("languagePopulation", {}).items()
            if entry.get("_officialStatus") in ("official", "de_facto_official")
            or "_officialStatus" in entry and float(entry["_populationPercent"]) > REGIONAL
        ])  # fmt: skip
        for language in LANGUAGES:
            names = [] if country in CONTESTED else capital.get(country, [])
            if language != "en":
                names = [zone_names[language].get(zone.get(fold(name), ""), "").split(" (")[0] for name in names[:1]]
            answers = [("capital", name) for name in names if name]
            if money:
                answers.append(("currency", currency[language][money]["displayName"]))
            answers.append(("continent", territory[language][continent[country]]))
            if language == "en" and spoken and country not in LANGUAGE_UNSETTLED:
                answers.append(("official_language", english[spoken.split("_")[0]]))
            subject = territory[language][country]
            rows += [
                {"kind": kind, "subject": subject, "answer": answer, "language": language, "country": country}
                for kind, answer in answers
            ]
    return rows
