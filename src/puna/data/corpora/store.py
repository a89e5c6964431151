"""A corpus on disk: a folder of numbered parts and one JSON that says what they are.

    part-00000.parquet   documents: id, source, licence, lang, lang_score, text, pictures (zstd)
    part-00000.pictures  the pictures' files, one behind the other, where the part has any
    corpus.json          format, what it was built from and how, counts, SHA-256 of every part; written last
    dropped.jsonl        {"id", "reason", "of"} of what was left out for being a duplicate or held out

A picture stands in its text as U+FFFC; `pictures` lists (offset, length, width, height) in the order of the text, so
training reads one with one seek and never decodes a table for it. Sizes are upright ones. Nothing in a corpus depends
on the clock, on the number of workers or on where it was interrupted.
"""

import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from puna.data.corpora.clean import Document
from puna.errors import PunaError

FORMAT = 1
ABOUT = "corpus.json"
GROUP = 4 << 20  # bytes of text in a row group: what a reader holds at once
_PICTURE = pa.struct([("offset", pa.int64()), ("length", pa.int32()), ("width", pa.int32()), ("height", pa.int32())])
SCHEMA = pa.schema(
    [("id", pa.string()), ("source", pa.string()), ("licence", pa.string()), ("lang", pa.string()),
     ("lang_score", pa.float32()), ("text", pa.large_string()), ("pictures", pa.list_(_PICTURE))]
)  # fmt: skip


class Writer:
    """One part, written to temporary names and moved to its own by `close`; used as a context, an error leaves
    nothing."""

    def __init__(self, path: Path):
        self.path = path
        self.parts = [Path(f"{path}.{os.getpid()}.{kind}") for kind in ("parquet", "pictures")]
        self.rows: list[dict] = []
        self.size = self.offset = self.count = 0
        self._open = ExitStack()

    def __enter__(self) -> "Writer":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._table = self._open.enter_context(pq.ParquetWriter(self.parts[0], SCHEMA, compression="zstd"))
        self._pictures = self._open.enter_context(open(self.parts[1], "wb"))
        return self

    def add(self, source: str, document: Document, score: float) -> None:
        """A document whose pictures' sizes are known."""
        places = []
        for data, (w, h) in zip(document.pictures, document.sizes, strict=True):
            places.append({"offset": self.offset, "length": len(data), "width": w, "height": h})
            self._pictures.write(data)
            self.offset += len(data)
        row = {"id": document.id, "source": source, "licence": document.licence, "lang": document.lang,
               "lang_score": score, "text": document.text, "pictures": places}  # fmt: skip
        self.rows.append(row)
        self.count += 1
        self.size += len(document.text)
        if self.size >= GROUP:
            self._flush()

    def table(self, rows: pa.Table) -> None:
        """Rows without pictures, as they are."""
        self._table.write_table(rows)
        self.count += rows.num_rows

    def _flush(self) -> None:
        if self.rows:
            self._table.write_table(pa.Table.from_pylist(self.rows, SCHEMA))
        self.rows, self.size = [], 0

    def __exit__(self, kind: Any, *rest: Any) -> None:
        try:
            if kind is None:
                self._flush()
                self._open.close()
                names = [self.path.with_suffix(".parquet"), self.path.with_suffix(".pictures")]
                for part, name in zip(self.parts, names if self.offset else names[:1], strict=False):
                    part.rename(name)
        finally:
            self._open.close()
            for part in self.parts:
                part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """The whole text or no file of that name: `puna.processor.files.write_atomic` without what it imports."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(f"{path}.{os.getpid()}")
    scratch.write_text(text, "utf-8", newline="")
    scratch.rename(path)


def read_rows(path: Path) -> Iterator[dict]:
    """The rows of a part, a row group in memory at a time."""
    with pq.ParquetFile(path) as table:
        for i in range(table.num_row_groups):
            yield from table.read_row_group(i).to_pylist()


def filtered(source: Path, target: Path, keep: np.ndarray) -> dict:
    """Writes the rows of part `source` that `keep` (bool [rows]) names as part `target`, and counts them.

    Returns documents, bytes, pictures, picture_bytes; `groups` {"source|lang|licence": [documents, bytes, pictures]};
    `lengths` {log2 of bytes: documents}; `files` {name: sha256}.
    """
    total: Counter[str] = Counter()
    groups: dict[str, list[int]] = {}
    lengths: Counter[str] = Counter()
    blob, first = source.with_suffix(".pictures"), 0
    with Writer(target) as writer, ExitStack() as stack:
        pictures = stack.enter_context(open(blob, "rb")) if blob.exists() else None
        parts = stack.enter_context(pq.ParquetFile(source.with_suffix(".parquet")))
        for i in range(parts.num_row_groups):
            table = parts.read_row_group(i)
            first, table = first + table.num_rows, table.filter(pa.array(keep[first : first + table.num_rows]))
            if pictures is None:
                writer.table(table)
            else:
                for row in table.to_pylist():
                    writer.add(row["source"], _with_pictures(row, pictures), row["lang_score"])
            sizes = pc.binary_length(table["text"]).to_pylist()
            shown = pc.list_value_length(table["pictures"]).to_pylist()
            stored = pc.sum(pc.struct_field(pc.list_flatten(table["pictures"]), "length")).as_py() or 0
            total.update(documents=len(sizes), bytes=sum(sizes), pictures=sum(shown), picture_bytes=stored)
            lengths.update(str(max(size, 1).bit_length() - 1) for size in sizes)
            names = zip(*(table[c].to_pylist() for c in ("source", "lang", "licence")), strict=True)
            for name, size, count in zip(names, sizes, shown, strict=True):
                group = groups.setdefault("|".join(name), [0, 0, 0])
                for k, value in enumerate((1, size, count)):
                    group[k] += value
    made = [path for path in (target.with_suffix(".parquet"), target.with_suffix(".pictures")) if path.exists()]
    return {**total, "groups": groups, "lengths": lengths, "files": {path.name: sha256(path) for path in made}}


def _with_pictures(row: dict, pictures: Any) -> Document:
    """A row and the files of its pictures."""
    made = Document(row["id"], row["text"], [], row["licence"], row["lang"])
    for at in row["pictures"]:
        pictures.seek(at["offset"])
        made.pictures.append(pictures.read(at["length"]))
        made.sizes.append((at["width"], at["height"]))
    return made


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Corpus:
    """A built corpus. about: corpus.json. PunaError: no corpus there, or of another format."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.about = json.loads((self.folder / ABOUT).read_text("utf-8"))
            form = self.about["format"]
            self.fingerprint: str = self.about["fingerprint"]
        except FileNotFoundError:
            unfinished = Path(f"{self.folder}.part").is_dir()
            hint = "its build isn't finished: run the same `puna data build`" if unfinished else "see `puna data build`"
            raise PunaError(f"there is no corpus at {self.folder}: {hint}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PunaError(f"{self.folder / ABOUT} is damaged ({error}); build the corpus again") from None
        if form != FORMAT:
            raise PunaError(f"{self.folder} has format {form}, this puna reads {FORMAT}; build it again")

    @classmethod
    def find(cls, name: str) -> tuple["Corpus", str]:
        """(corpus, language or source or '') of PATH or PATH/NAME. PunaError for a name that it doesn't hold."""
        path = Path(name)
        if not (path / ABOUT).exists() and (path.parent / ABOUT).exists():
            found = cls(path.parent)
            names = sorted({part for key in found.about["groups"] for part in key.split("|")[:2]})
            if path.name not in names:
                raise PunaError(f"corpus {path.parent} has no language or source {path.name!r}: {', '.join(names)}")
            return found, path.name
        return cls(path), ""

    def by(self, column: int) -> dict[str, list[int]]:
        """[documents, bytes, pictures] by source (column 0), language (1) or licence (2), most bytes first."""
        sums: dict[str, list[int]] = {}
        for key, values in self.about["groups"].items():
            name = key.split("|")[column] or "unknown"
            sums[name] = [a + b for a, b in zip(sums.get(name, [0, 0, 0]), values, strict=True)]
        return dict(sorted(sums.items(), key=lambda item: (-item[1][1], item[0])))

    def left_out(self) -> dict[str, dict[str, int]]:
        """By input: how many rows were "read", and left out for what reason."""
        known = ("spec", "units", "files", "bytes", "ignored", "shards", "title", "packages")
        return {
            name: {k: v for k, v in entry.items() if k not in known} for name, entry in self.about["inputs"].items()
        }

    @property
    def parts(self) -> list[Path]:
        """The tables, in order."""
        return [self.folder / name for name in sorted(self.about["files"]) if name.endswith(".parquet")]

    def rows(self, only: str = "") -> Iterator[dict]:
        """All documents in order, or those of one language or source; each with its part's "part" number.

        PunaError: a part is missing or damaged.
        """
        for number, path in enumerate(self.parts):
            try:
                for row in read_rows(path):
                    if not only or only in (row["lang"], row["source"]):
                        yield row | {"part": number}
            except (OSError, pa.ArrowException) as error:
                raise PunaError(f"{path} is damaged ({str(error).splitlines()[0]}); build the corpus again") from None

    def sizes(self, only: str = "") -> np.ndarray:
        """Characters of each of `rows(only)`, int64 [documents]."""
        found = [np.empty(0, np.int64)]
        for path in self.parts:
            table = pq.read_table(path, columns=["lang", "source", "text"])
            if only:
                table = table.filter(pc.or_(pc.equal(table["lang"], only), pc.equal(table["source"], only)))
            found.append(pc.utf8_length(table["text"]).to_numpy().astype(np.int64))
        return np.concatenate(found)

    def sample(self, each: int, seed: int = 0) -> list[dict]:
        """`each` documents of every source (fewer where it has fewer in the row groups looked at), with "part"."""
        rand, found = random.Random(seed), {}
        for number, path in enumerate(self.parts):
            with pq.ParquetFile(path) as table:
                rows = table.read_row_group(rand.randrange(table.num_row_groups))
                for i in rand.sample(range(rows.num_rows), min(each, rows.num_rows)):
                    row = rows.slice(i, 1).to_pylist()[0] | {"part": number}
                    found.setdefault(row["source"], []).append(row)
        return [row for rows in found.values() for row in rand.sample(rows, min(each, len(rows)))]

    def verify(self) -> None:
        """PunaError names the first file whose SHA-256 isn't the recorded one."""
        for name, known in self.about["files"].items():
            path = self.folder / name
            if not path.is_file() or sha256(path) != known:
                raise PunaError(f"{path} is not what {ABOUT} says: build the corpus again")
