"""Names and pictures of the concepts: CLDR annotations joined with seven emoji artists' drawings by code points.

Vector drawings are rasterised at 192 px, cut to what is drawn, and brought to 62 of 64 px with Lanczos, so that a style
cannot be told by its margins. The held-out style is stored as published (64 px). Sheets are lossy WebP with alpha.
"""

import io
import json
import re
from collections import Counter
from pathlib import Path

from PIL import Image

from puna.nursery.building.fetch import Packages, tool
from puna.nursery.building.selection import NAMING_MAX, is_concept, may_be_named
from puna.nursery.files import LANGUAGES
from puna.nursery.pictures import CELL, COLUMNS, STYLE_HELD_OUT, STYLES_TRAIN

CLDR_CODE = {language: language for language in LANGUAGES} | {"tl": "fil"}
FILL = 62  # pixels of the longer side of what is drawn
QUALITY = 80  # WebP quality of the sheets


def key(points: str) -> str:
    """Code points without the presentation selector: "1F46E-200D-FE0F" -> "1f46e-200d"."""
    return "-".join(point for point in points.lower().split("-") if point != "fe0f")


def annotations(packages: Packages, language: str) -> dict[str, tuple[str, list[str]]]:
    """CLDR's name and keywords of each emoji: key -> (name, keywords)."""
    code, found = CLDR_CODE[language], {}
    for package, folder, top in (
        ("cldr-annotations-full", "annotations", "annotations"),
        ("cldr-annotations-derived-full", "annotationsDerived", "annotationsDerived"),
    ):
        path = packages[package] / folder / code / "annotations.json"
        for emoji, entry in json.loads(path.read_text("utf-8"))[top]["annotations"].items():
            if "tts" in entry:
                found[key("-".join(f"{ord(c):x}" for c in emoji))] = (entry["tts"][0], entry.get("default", []))
    return found


def by_key(folder: Path, suffix: str) -> dict[str, Path]:
    return {key(path.stem): path for path in folder.glob(f"*{suffix}")}


def sources(packages: Packages) -> dict[str, dict[str, Path]]:
    """Style -> key (or, for fluentui, slug) -> file."""
    fluent = packages["fluentui-emoji"] / "icons"
    return {
        "twemoji": by_key(packages["@twemoji/svg"], ".svg"),
        "openmoji": by_key(packages["openmoji"] / "color" / "svg", ".svg"),
        "fluent3d": by_key(packages["@lobehub/fluent-emoji-3d"] / "assets", ".webp"),
        "fluentflat": {path.stem: path for path in (fluent / "flat").glob("*.svg")},
        "fluentshaded": {path.stem: path for path in (fluent / "modern").glob("*.svg")},
        "emojione": by_key(packages["emojione"] / "assets" / "png_128x128", ".png"),
        STYLE_HELD_OUT: by_key(packages["emoji-datasource-google"] / "img" / "google" / "64", ".png"),
    }


def slug(name: str) -> str:
    plain = name.lower().translate(str.maketrans("ñéôã", "neoa", "’."))
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def find(style: str, files: dict[str, Path], concept: str, names: list[str]) -> Path | None:
    """The style's file for a concept; fluentui's files go by name instead of code points."""
    if style in ("fluentflat", "fluentshaded"):
        stems = [slug(name) + tail for name in names for tail in ("", "-default")]
        return next((files[stem] for stem in stems if stem in files), None)
    return files.get(concept)


def render(path: Path, style: str) -> Image.Image:
    """RGBA 64 x 64 of one drawing."""
    if path.suffix == ".svg":
        svg = path.read_text("utf-8")
        png = tool("resvg_py").svg_to_bytes(svg_string=svg, width=192, height=192, skip_system_fonts=True)
        image = Image.open(io.BytesIO(png)).convert("RGBA")
    else:
        image = Image.open(path).convert("RGBA")
    if style == STYLE_HELD_OUT:
        return image if image.size == (CELL, CELL) else image.resize((CELL, CELL), Image.LANCZOS)
    box = image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()
    if box is None:
        raise ValueError(f"{path} draws nothing")
    image = image.crop(box)
    scale = FILL / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    cell = Image.new("RGBA", (CELL, CELL))
    # premultiplied, so that transparent pixels' colours do not bleed into the edge
    small = image.convert("RGBa").resize(size, Image.LANCZOS).convert("RGBA")
    cell.paste(small, ((CELL - size[0]) // 2, (CELL - size[1]) // 2))
    return cell


def choose(packages: Packages) -> tuple[list[dict], dict[tuple[str, str], Path]]:
    """The concepts' rows (without cells) and the file of each (concept, style)."""
    words = {language: annotations(packages, language) for language in LANGUAGES}
    artists = sources(packages)
    rows, files = [], {}
    for entry in json.loads((packages["openmoji"] / "data" / "openmoji.json").read_text("utf-8")):
        concept = key(entry["hexcode"])
        if entry["skintone"] or not all(concept in words[language] for language in LANGUAGES):
            continue
        english = words["en"][concept][0]
        if not is_concept(english, entry["group"], entry["subgroups"]):
            continue
        drawn = {style: find(style, artists[style], concept, [entry["annotation"], english]) for style in artists}
        if any(drawn[style] is None for style in drawn if style != "emojione"):
            continue
        files.update({(concept, style): path for style, path in drawn.items() if path})
        rows.append({
            "id": concept,
            "names": {language: words[language][concept][0] for language in LANGUAGES},
            "keywords": {language: words[language][concept][1] for language in LANGUAGES},
            "group": f"{entry['group']}/{entry['subgroups']}",
            "drawn": [style for style, path in drawn.items() if path],
        })  # fmt: skip
    return rows, files


def mark_naming(rows: list[dict]) -> None:
    """Set ``naming``: short plain names, drawn by every artist, unique in each language among the naming concepts."""
    candidates = [
        row
        for row in rows
        if may_be_named(row["names"]["en"], row["group"].split("/")[1])
        and set(row["drawn"]) == {*STYLES_TRAIN, STYLE_HELD_OUT}
    ]
    seen = {language: Counter(row["names"][language].casefold() for row in rows) for language in LANGUAGES}
    clear = [row for row in candidates if all(seen[lang][row["names"][lang].casefold()] == 1 for lang in LANGUAGES)]
    clear.sort(key=lambda row: len(row["names"]["en"].split()))  # one-word names first; the sort is stable
    chosen = {row["id"] for row in clear[:NAMING_MAX]}
    for row in rows:
        row["naming"] = row["id"] in chosen


def add_synonyms(rows: list[dict]) -> None:
    """Turn keywords into synonyms: a keyword counts if at most two concepts carry it (as name or keyword)."""
    for language in LANGUAGES:
        carriers = Counter()
        for row in rows:
            carriers.update({w.casefold() for w in (row["names"][language], *row["keywords"][language])})
        for row in rows:
            own = row["names"][language].casefold()
            kept = [w for w in row["keywords"][language] if w.casefold() != own and carriers[w.casefold()] <= 2]
            row.setdefault("synonyms", {})[language] = kept
    for row in rows:
        del row["keywords"]


def build_pictures(packages: Packages, data: Path) -> list[dict]:
    """Write the contact sheets under ``data/pictures`` and return the concepts' rows with their cells."""
    rows, files = choose(packages)
    mark_naming(rows)
    add_synonyms(rows)
    for row in rows:
        row["cells"] = {}
    for style in (*STYLES_TRAIN, STYLE_HELD_OUT):
        drawn = [row for row in rows if style in row["drawn"]]
        sheet = Image.new("RGBA", (COLUMNS * CELL, -(-len(drawn) // COLUMNS) * CELL))
        for cell, row in enumerate(drawn):
            row["cells"][style] = cell
            y, x = divmod(cell, COLUMNS)
            sheet.paste(render(files[row["id"], style], style), (x * CELL, y * CELL))
        target = data / "pictures" / style / "sheet.webp"
        target.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(target, quality=QUALITY, alpha_quality=90, method=6)
        print(f"{style}: {len(drawn)} pictures, {target.stat().st_size:,} bytes", flush=True)
    for row in rows:
        del row["drawn"]
    return rows
