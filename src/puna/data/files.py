"""A user's own text: a file, or a folder of files, checked line by line.

    name.txt, name.md   one document
    name.jsonl          one document a line: {"text": "..."} or a conversation, in one of two shapes (chats.py)
    folder              every such file in it and below, in order of path

A mistake in the data is told with file and line, before anything is trained on it.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from puna.data.chats import BadRows, Chat, chat
from puna.errors import PunaError

SUFFIXES = (".txt", ".md", ".jsonl")


def documents(path: str | Path, bad: BadRows | None = None) -> Iterator[str | Chat]:
    """Texts and conversations of a file or folder, in order, read as they are asked for.

    bad: collects what is wrong with rows, for the caller to `check`; None: they are an error at the end.
    PunaError: nothing there, an unknown kind of file, not UTF-8, empty, a line that isn't JSON or lacks its fields.
    """
    rows = BadRows() if bad is None else bad
    for file in paths(path):
        if file.suffix == ".jsonl":
            yield from _lines(file, rows)
        else:
            yield _read(file)
    if bad is None:
        rows.check()


def paths(path: str | Path) -> list[Path]:
    """The files that are read for `path`. PunaError where there are none."""
    path = Path(path)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not found:
            raise PunaError(f"folder {path} holds no {', '.join(SUFFIXES)} file")
        return found
    if not path.is_file():
        raise PunaError(f"data file {path} does not exist")
    if path.suffix not in SUFFIXES:
        raise PunaError(f"data file {path} is not of a known kind; use {', '.join(SUFFIXES)} or a folder of them")
    return [path]


def sha256(path: str | Path) -> str:
    """Hex hash over names and contents of all files read for `path`."""
    total = hashlib.sha256()
    for file in paths(path):
        try:
            with open(file, "rb") as data:
                total.update(file.name.encode() + b"\0" + hashlib.file_digest(data, "sha256").digest())
        except OSError as error:
            raise PunaError(f"can't read data file {file}: {error.strerror}") from error
    return total.hexdigest()


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise PunaError(f"can't read data file {file}: {error.strerror}") from error


def _read(file: Path) -> str:
    """A text file, without a byte order mark."""
    data = _bytes(file)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PunaError(f"{file}, line {line}: {_not_utf8(error)}") from error
    if not text.strip():
        raise PunaError(f"data file {file} is empty (line 1); give it text or leave it out")
    return text


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x}); convert the file to UTF-8"


def _lines(file: Path, bad: BadRows) -> Iterator[str | Chat]:
    """The documents of a JSONL file; blank lines are skipped."""
    offset, empty = 0, True
    try:
        # Of a file opened for bytes only \n ends a line; text's splitlines() would cut at U+2028, which JSON allows.
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    empty, document = False, None
                    where = f"{file}, line {number}"
                    with bad.at(where):
                        document = _document(line if number > 1 else line.removeprefix(b"\xef\xbb\xbf"), file, offset,
                                             where)  # fmt: skip
                    if document is not None:
                        yield document
                offset += len(line)
    except OSError as error:
        raise PunaError(f"can't read data file {file}: {error.strerror}") from error
    if empty:
        raise PunaError(f"data file {file} is empty (line 1); give it text or leave it out")


def _document(line: bytes, file: Path, offset: int, where: str) -> str | Chat:
    """The document of one line of JSON. PunaError: what is wrong with it."""
    try:
        record = json.loads(line.decode())
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise PunaError(_not_utf8(error)) from error
    except UnicodeEncodeError:
        raise PunaError("half a surrogate pair (\\ud800 ...) is no text; remove or replace it") from None
    except (ValueError, RecursionError) as error:
        raise PunaError(f"not JSON ({error})") from error
    if not isinstance(record, dict) or sum(key in record for key in ("text", "messages", "conversations")) != 1:
        raise PunaError('needs "text", "messages" (OpenAI) or "conversations" (ShareGPT), and one of them only')
    if "text" not in record:
        return chat(record, file, offset, where)
    if not isinstance(record["text"], str) or not record["text"].strip():
        raise PunaError('"text" must be text, and not empty')
    return record["text"]
