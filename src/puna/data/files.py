"""A user's own text: a file, or a folder of files, checked line by line.

    name.txt, name.md   one document
    name.jsonl          one document a line: {"text": "..."} or
                        a conversation {"messages": [{"role": "user", "content": "..."}, ...]}
    folder              every such file in it and below, in order of path

A mistake in the data is told with file and line, before anything is trained on it.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from puna.errors import PunaError

SUFFIXES = (".txt", ".md", ".jsonl")


def documents(path: str | Path) -> Iterator[str | list[dict]]:
    """Texts and conversations (lists of chat messages) of a file or folder, in order.

    PunaError: nothing there, an unknown kind of file, not UTF-8, empty, a line that isn't JSON or lacks its fields.
    """
    for file in paths(path):
        text = _read(file)
        if file.suffix == ".jsonl":
            yield from _lines(file, text)
        else:
            yield text


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
        total.update(file.name.encode() + b"\0" + hashlib.sha256(_bytes(file)).digest())
    return total.hexdigest()


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise PunaError(f"can't read data file {file}: {error.strerror}") from error


def _read(file: Path) -> str:
    """The file as text, without a byte order mark."""
    data = _bytes(file)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PunaError(
            f"{file}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x}); convert the file to UTF-8"
        ) from error
    if not text.strip():
        raise PunaError(f"data file {file} is empty (line 1); give it text or leave it out")
    return text


def _lines(file: Path, text: str) -> Iterator[str | list[dict]]:
    """The documents of a JSONL file; blank lines are skipped."""
    # Only \n ends a line of JSONL: splitlines() would also cut at U+2028, which JSON allows inside strings.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            record = json.loads(line)
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise PunaError(f"{where}: half a surrogate pair (\\ud800 ...) is no text; remove or replace it") from None
        except (ValueError, RecursionError) as error:
            raise PunaError(f"{where}: not JSON ({error})") from error
        if not isinstance(record, dict) or ("text" in record) == ("messages" in record):
            raise PunaError(f'{where}: needs either "text" or "messages"')
        if "text" in record:
            if not isinstance(record["text"], str) or not record["text"].strip():
                raise PunaError(f'{where}: "text" must be text, and not empty')
            yield record["text"]
        else:
            yield _conversation(record["messages"], where)


def _conversation(messages: object, where: str) -> list[dict]:
    """Chat messages with text only, at least one of them the assistant's."""
    if not isinstance(messages, list) or not messages:
        raise PunaError(f'{where}: "messages" must be a list of messages, and not empty')
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant", "tool"):
            raise PunaError(f'{where}: each message needs a "role": system, user, assistant or tool')
        if not isinstance(message.get("content"), str):
            raise PunaError(f'{where}: each message needs "content" that is text')
        if message["role"] in ("system", "user") and not message["content"].strip():
            raise PunaError(f"{where}: a {message['role']} message is empty")
    if not any(message["role"] == "assistant" for message in messages):
        raise PunaError(f"{where}: no assistant message, so there is nothing to learn")
    return messages
