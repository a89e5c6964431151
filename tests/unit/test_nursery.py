"""The nursery's promises: what is in it, under which licences, unchanged, and never trained on what is tested."""

import time
from collections import Counter

import numpy as np
import pytest

from puna import nursery
from puna.errors import PunaError
from puna.nursery import files, pictures
from puna.nursery.heldout import HeldOut, exclude, grams, words

SEVEN = (*nursery.STYLES_TRAIN, nursery.STYLE_HELD_OUT)


def test_the_files_are_the_manifests_and_fit_the_limit():
    listed = nursery.manifest()["files"]
    found = {p.relative_to(files.DATA).as_posix(): p for p in files.DATA.rglob("*") if p.is_file()}
    assert set(found) == {*listed, "manifest.json"}
    assert nursery.verify() == len(listed)
    assert sum(path.stat().st_size for path in found.values()) <= nursery.SIZE_LIMIT == 12_000_000


def test_verify_notices_one_changed_byte(tmp_path, monkeypatch):
    name = "names/concepts.json.xz"
    (tmp_path / "names").mkdir()
    content = bytearray((files.DATA / name).read_bytes())
    content[100] ^= 1
    (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(files, "manifest", lambda: {"files": {name: nursery.manifest()["files"][name]}})
    monkeypatch.setattr(files, "DATA", tmp_path)
    with pytest.raises(PunaError, match="concepts.json.xz has SHA-256"):
        files.verify()
    (tmp_path / name).unlink()
    with pytest.raises(PunaError, match="missing"):
        files.verify()


def test_every_source_has_an_allowed_licence_beside_it():
    manifest = nursery.manifest()
    owned = set()
    for name, source in manifest["sources"].items():
        assert source["licence"] in nursery.LICENCES_ALLOWED, name
        notice = (files.DATA / source["licence_file"]).read_text("utf-8")
        assert source["licence"] in notice and source["title"] in notice
        assert len(source["package_sha256"]) == len(source["packages"]) > 0
        assert all("==" in package for package in source["packages"])
        owned.add(source["licence_file"].rsplit("/", 1)[0])
    assert not any("GPL" in licence or "GFDL" in licence or "NC" in licence for licence in nursery.LICENCES_ALLOWED)
    for path in manifest["files"]:
        assert path.rsplit("/", 1)[0] in owned, f"{path} lies in no source's folder"


def test_concepts_and_their_names():
    found = nursery.concepts()
    assert len(found) >= 700 and len({concept.id for concept in found}) == len(found)
    assert sum(len(concept.styles) for concept in found) >= 2000
    for concept in found:
        assert set(concept.names) == set(nursery.LANGUAGES) and all(concept.names.values())
        assert len(concept.styles) >= 3 and nursery.STYLE_HELD_OUT not in concept.styles
    groups = Counter(concept.group.split("/")[0] for concept in found)
    assert "flags" not in groups and "symbols" not in groups and len(groups) >= 6


def test_naming_concepts_are_plain_unique_and_drawn_by_all():
    every = nursery.concepts()
    naming = [concept for concept in every if concept.naming]
    assert 160 <= len(naming) <= 200
    for concept in naming:
        assert 1 <= len(concept.names["en"].split()) <= 2
        assert concept.styles == nursery.STYLES_TRAIN
        assert nursery.picture(concept.id, nursery.STYLE_HELD_OUT).size == (64, 64)
    for language in nursery.LANGUAGES:
        names = Counter(concept.names[language].casefold() for concept in every)
        assert all(names[concept.names[language].casefold()] == 1 for concept in naming), language


def test_synonyms_belong_to_at_most_two_concepts():
    for language in nursery.LANGUAGES:
        carriers = Counter()
        for concept in nursery.concepts():
            assert concept.names[language] not in concept.synonyms[language]
            carriers.update({word.casefold() for word in concept.synonyms[language]})
        assert max(carriers.values()) <= 2 and len(carriers) > 200, language


def test_held_out_style_is_never_a_training_style():
    assert nursery.STYLE_HELD_OUT == "noto" and nursery.STYLE_HELD_OUT not in nursery.STYLES_TRAIN
    assert len(nursery.STYLES_TRAIN) == len(set(nursery.STYLES_TRAIN)) >= 3


def test_pictures_are_drawings_and_differ_between_styles_and_concepts():
    counts = nursery.manifest()["pictures"]["styles"]
    found = nursery.concepts()
    for style in SEVEN:
        drawn = [c for c in found if style in c.styles or style == nursery.STYLE_HELD_OUT]
        assert len(drawn) == counts[style]
        seen = set()
        for concept in drawn[::9]:
            image = nursery.picture(concept.id, style)
            assert image.mode == "RGBA" and image.size == (64, 64)
            alpha = image.getchannel("A")
            low, high = alpha.getextrema()
            assert high > 200 and alpha.histogram()[255] < 64 * 64, (concept.names["en"], style)
            left, top, right, bottom = alpha.point(lambda a: 255 * (a > 40)).getbbox()
            assert max(right - left, bottom - top) >= 40, (concept.names["en"], style)
            seen.add(image.tobytes())
        assert len(seen) == len(drawn[::9])
    pizza = next(concept for concept in found if concept.names["en"] == "pizza")
    assert len({nursery.picture(pizza.id, style).tobytes() for style in SEVEN}) == len(SEVEN)


def test_the_picture_is_the_one_named():
    """A tomato is red, a cucumber green and a banana yellow in every style: cells are not shifted."""
    ids = {concept.names["en"]: concept.id for concept in nursery.concepts()}

    def mean(name, style):
        image = nursery.picture(ids[name], style)
        pixels = np.asarray(image, dtype=float).reshape(-1, 4)
        solid = pixels[(pixels[:, 3] > 200) & (pixels[:, :3].max(1) > 60)]
        return solid[:, :3].mean(0)

    for style in SEVEN:
        red, green, blue = mean("tomato", style)
        assert red > green + 40 and red > blue + 40, style
        red, green, blue = mean("cucumber", style)
        assert green > red + 10 and green > blue + 10, style
        red, green, blue = mean("banana", style)
        assert min(red, green) > blue + 40, style


def test_a_picture_is_fresh_and_fast():
    concept = nursery.concepts()[0]
    first = nursery.picture(concept.id, "twemoji")
    before = first.tobytes()
    first.paste((0, 0, 0, 255), (0, 0, 64, 64))
    assert nursery.picture(concept.id, "twemoji").tobytes() == before
    times = []
    for _ in range(50):
        start = time.perf_counter()
        nursery.picture(concept.id, "twemoji")
        times.append(time.perf_counter() - start)
    assert sorted(times)[25] < 0.3e-3


def test_unknown_pictures_are_explained():
    with pytest.raises(PunaError, match="unknown picture style"):
        nursery.picture(nursery.concepts()[0].id, "crayon")
    with pytest.raises(PunaError, match="no picture of concept 'zzz'"):
        nursery.picture("zzz", "twemoji")
    newer = next(concept for concept in nursery.concepts() if "emojione" not in concept.styles)
    with pytest.raises(PunaError, match="Concept.styles"):
        nursery.picture(newer.id, "emojione")


@pytest.mark.parametrize("language", nursery.LANGUAGES)
def test_texts(language):
    train, val = nursery.texts(language), nursery.texts(language, "val")
    entry = nursery.manifest()["languages"][language]
    assert sum(len(text.encode()) for text in train) == entry["train_bytes"] > 200_000
    assert sum(len(text.encode()) for text in val) == entry["val_bytes"]
    assert len(val) >= 2 and 8_000 < len(val[0].encode()) < 30_000  # the Universal Declaration
    assert entry.get("little_prose", False) == (entry["prose_bytes"] < 200_000)
    assert max(map(len, train)) > 4_000 and min(map(len, train)) < 1_000
    assert not set(train) & set(val)


def test_texts_are_in_their_language():
    """Scripts where they tell, else words that only this language uses often."""
    blocks = {"ar": ("\u0600", "\u06ff"), "hi": ("\u0900", "\u097f"), "th": ("\u0e00", "\u0e7f")}
    for language, (low, high) in blocks.items():
        letters = [c for text in nursery.texts(language)[::5] for c in text if c.isalpha()]
        assert sum(low <= c <= high for c in letters) > 0.6 * len(letters), language
    frequent = {
        **{"de": "und", "en": "the", "es": "los", "fr": "les", "id": "yang", "it": "della", "pt": "não", "tl": "ang"},
        "vi": "của",
    }
    share = {}
    for language in frequent:
        count = Counter(word for text in nursery.texts(language)[::3] for word in words(text))
        share[language] = {word: count[word] / count.total() for word in frequent.values()}
    for language, word in frequent.items():
        assert max(frequent, key=lambda other: share[other][word]) == language, word


def test_declaration_comes_first_and_is_never_trained_on():
    assert nursery.texts("en", "val")[0].startswith("Universal Declaration of Human Rights")
    assert "all members of the human family" in nursery.texts("en", "val")[0]  # the preamble too
    assert not any("barbarous acts which have outraged the conscience" in text for text in nursery.texts("en"))


def test_code_is_python():
    train, val = nursery.code(), nursery.code("val")
    assert sum(map(len, train)) > 800_000 and val
    for text in (*train[::10], *val):
        compile(text, "module", "exec")


def test_unknown_language_and_split():
    with pytest.raises(PunaError, match="no texts in 'nl'"):
        nursery.texts("nl")
    with pytest.raises(PunaError, match="unknown split 'test'"):
        nursery.texts("en", "test")


def test_training_text_shares_no_thirteen_words_with_validation():
    held = HeldOut(
        (f"{language}/{i}", text)
        for language in nursery.LANGUAGES
        for i, text in enumerate(nursery.texts(language, "val"))
    )
    assert len(held) > 20_000
    code = HeldOut((str(i), text) for i, text in enumerate(nursery.code("val")))
    for language in nursery.LANGUAGES:
        for i, text in enumerate(nursery.texts(language)):
            assert held.collision(f"{language}/{i}", text) is None
    for i, text in enumerate(nursery.code()):
        assert held.collision(str(i), text) is None and code.collision(str(i), text) is None


@pytest.mark.parametrize("language", nursery.LANGUAGES)
def test_a_planted_overlap_is_caught_in_every_language(language):
    declaration = nursery.texts(language, "val")[0]
    clean = nursery.texts(language)[:3]
    middle = declaration[len(declaration) // 2 :][:300]
    train = [(str(i), text) for i, text in enumerate(clean)] + [("planted", clean[0] + "\n" + middle)]
    kept, collisions = exclude(train, [("declaration", declaration)])
    assert kept == ["0", "1", "2"]
    assert [(c.train, c.held_out) for c in collisions] == [("planted", "declaration")] and collisions[0].count > 1


def test_thirteen_words_not_twelve_and_no_digits_or_markup():
    text = "one two three four five six seven eight nine ten eleven twelve thirteen"
    assert len(list(grams(text))) == 1 and not list(grams(text.replace(" thirteen", "")))
    held = HeldOut([("h", text)])
    disguised = "Intro 7. <b>One</b> two, THREE 99 four five six seven eight\nnine ten — eleven twelve <i>thirteen</i>"
    assert held.collision("t", disguised).held_out == "h"
    assert held.collision("t", text.replace("seven", "other")) is None
    assert words("x < y and <em>a1b</em> हिन्दी") == ["x", "y", "and", "a", "b", "हिन्दी"]


def test_facts():
    rows = nursery.facts()
    english = [row for row in rows if row["language"] == "en"]
    assert len(english) >= 150 and {row["language"] for row in rows} == set(nursery.LANGUAGES)
    assert all(row["subject"] and row["answer"] for row in rows)

    def ask(kind, subject, language="en"):
        return [r["answer"] for r in rows if (r["kind"], r["subject"], r["language"]) == (kind, subject, language)]

    assert ask("capital", "Kenya") == ["Nairobi"]
    assert ask("capital", "Frankreich", "de") == ["Paris"]
    assert ask("currency", "Japan") == ["Japanese Yen"]
    assert ask("continent", "Brasil", "pt") == ["América do Sul"]
    assert ask("official_language", "Brazil") == ["Portuguese"]
    assert set(ask("capital", "South Africa")) == {"Pretoria", "Cape Town", "Bloemfontein"}


def test_answers_are_copies():
    nursery.facts()[0]["answer"] = "changed"
    nursery.manifest()["files"].clear()
    nursery.texts("en").clear()
    nursery.concepts().clear()
    assert nursery.facts()[0]["answer"] != "changed" and nursery.manifest()["files"]
    assert nursery.texts("en") and nursery.concepts()


def test_cells_cover_the_sheets():
    for style in SEVEN:
        sheet = pictures._sheet(style)
        assert sheet.width == pictures.COLUMNS * pictures.CELL and sheet.height % pictures.CELL == 0
