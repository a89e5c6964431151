"""`puna data build`: inputs to a corpus, by several workers, to be killed at any moment and gone on with.

    plan      inputs -> a list of units (inputs.py), the same each time
    read      unit -> its documents that pass the filters, and their fingerprints; by the workers, in any order
    decide    fingerprints -> which documents are copies (dedup.py); one pass, in the order of the plan
    write     unit -> its part of the corpus; by the workers again

All work lies in OUT.part. A unit's files get their names when they are whole and its .json comes last: there is no
other journal. What is done again after a kill is at most a unit per worker, and since everything written is a function
of the plan, the end is equal byte for byte, whatever the number of workers. OUT itself appears when all is done.
"""

import hashlib
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from puna import nursery
from puna.data.corpora import clean, dedup, grams, inputs, store
from puna.data.corpora.clean import PLACE, Document
from puna.errors import PunaError
from puna.fields import build as from_dict
from puna.fields import differences, to_dict
from puna.lock import lock

BATCH_CHARS, BATCH_BYTES, BATCH_DOCUMENTS = 1 << 18, 32 << 20, 2048  # of texts, of pictures; looked at together
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BuildConfig:
    """What a corpus is built from.

    inputs: [NAME=]SPEC each (inputs.py), earlier ones preferred among copies. licences: input's name -> licence, "" for
    all others. text: the column of a row's text. min_bytes, max_bytes: of a text without pictures, UTF-8. min_letters:
    least share of letters among what isn't white space. max_repeats: most of the text in lines that came before.
    languages: only these (empty: all). near: least MinHash similarity of a near-duplicate; 0: off. held_out: inputs
    whose texts must not be met, on top of the nursery's validation texts. min_side, max_aspect: of a picture, in
    pixels and as long side over short. skip_bad: count rows that can't be read instead of ending with an error.
    """

    inputs: tuple[str, ...]
    licences: Mapping[str, str] = field(default_factory=dict)
    text: str = "text"
    min_bytes: int = 50
    max_bytes: int = 100_000_000
    min_letters: float = 0.4
    max_repeats: float = 0.3
    languages: tuple[str, ...] = ()
    near: float = 0.8
    held_out: tuple[str, ...] = ()
    min_side: int = 8
    max_aspect: float = 20.0
    skip_bad: bool = False

    def __post_init__(self):
        if not self.inputs:
            raise PunaError("a corpus needs at least one input: --from PATH")
        for name in ("min_letters", "max_repeats", "near"):
            if not 0 <= getattr(self, name) <= 1:
                raise PunaError(f"{name} must lie in 0..1, not {getattr(self, name)}")
        if self.min_bytes < 0 or self.max_bytes <= self.min_bytes:
            raise PunaError(f"min_bytes {self.min_bytes} and max_bytes {self.max_bytes} leave no document")
        names = [name for name, _ in self.named]
        for name in names:
            if names.count(name) > 1 or not name or "|" in name or "/" in name:
                raise PunaError(f"two inputs are named {name!r}, or it holds / or |: give names, --from NAME=PATH")
        for name in self.licences:
            if name and name not in names:
                raise PunaError(f"licence for {name!r}, which is no input's name: {', '.join(names)}")

    @property
    def named(self) -> list[tuple[str, str]]:
        """(name, spec) of each input; the name is the last part of its path where none is given."""
        found = []
        for text in self.inputs:
            name, equals, spec = text.partition("=")
            if not equals or "/" in name or ":" in name:
                name, spec = Path(text.partition("@")[0].rstrip("/")).name.split(".")[0].removeprefix("hf:"), text
            found.append((name, spec))
        return found


def build_corpus(
    out: str | Path, config: BuildConfig, workers: int = 1, progress: Progress | None = None, fresh: bool = False
) -> store.Corpus:
    """Builds a corpus at `out`, or goes on with a build that was interrupted; a finished one is returned as it is.

    workers: processes that read and write. progress(phase, done, total): in bytes of input (phase "read") or units.
    fresh: begin anew. PunaError: bad input, another configuration was begun or finished at `out`.
    """
    out = Path(out)
    work = Path(f"{out}.part")
    with lock(work), _tidy(work):
        if fresh:
            shutil.rmtree(out if (out / store.ABOUT).exists() else work / "final", ignore_errors=True)
            _clear(work)
        if out.exists():
            if not (out / store.ABOUT).exists():
                raise PunaError(f"{out} exists and is no corpus: choose another name")
            corpus = store.Corpus(out)
            _same(corpus.about["config"], config, out)
            shutil.rmtree(work)
            return corpus
        plan = _plan(work, config)
        _state.cache_clear()  # this process may have built there before
        report = progress or (lambda phase, done, total: None)
        count = len(plan["units"])
        sizes = [max(unit["bytes"], 1) for unit in plan["units"]]
        done = 0
        for number in _each(read_unit, work, range(count), workers):
            done += sizes[number]
            report("read", done, sum(sizes))
        report("decide", 0, 1)
        keeps, dropped = _decide(work, count, config.near)
        report("decide", 1, 1)
        named = [number for number, keep in enumerate(keeps) if keep.any()]
        for i, keep in enumerate(keeps):
            np.save(work / "units" / f"{i:05d}.keep.npy", keep)
        for i, _ in enumerate(_each(write_part, work, [(n, part) for part, n in enumerate(named)], workers), 1):
            report("write", i, len(named))
        _finish(work, plan, config, len(named), dropped)
        (work / "final").rename(out)
        shutil.rmtree(work)
    return store.Corpus(out)


# ------------------------------------------------------------------------------------------------------------ plan
@contextmanager
def _tidy(work: Path) -> Iterator[None]:
    """An error before there is a plan leaves no folder behind."""
    try:
        yield
    except BaseException:
        if not (work / "plan.json").exists():
            shutil.rmtree(work, ignore_errors=True)
        raise


def _clear(work: Path) -> None:
    """Empties the folder but for its lock."""
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".lock":
            path.unlink()


def _same(known: dict, config: BuildConfig, where: Path) -> None:
    """PunaError naming what differs from the configuration that `where` was begun with."""
    named = differences(known, json.loads(json.dumps(to_dict(config))))
    if named:
        raise PunaError(f"{where} was built with other settings ({', '.join(named)}): choose another name, or --fresh")


def _plan(work: Path, config: BuildConfig) -> dict:
    """The plan: the one in `work` if it fits the configuration and the files, else made and written there."""
    plan: dict = {"config": to_dict(config), "inputs": {}, "units": []}
    for name, spec in config.named:
        units, about = inputs.plan(name, spec)
        plan["units"] += units
        plan["inputs"][name] = {"spec": spec, "units": len(units), **about}
    plan = json.loads(json.dumps(plan))  # tuples as lists, as it is read back
    path = work / "plan.json"
    if path.exists():
        known = json.loads(path.read_text("utf-8"))
        _same(known["config"], config, work)
        if known["units"] != plan["units"]:
            raise PunaError(f"the inputs have changed since {work} was begun: give --fresh to build anew")
        return known
    index = grams.HeldOut.of(text for _, text in _held_out(config))
    np.savez(work / "held.npz", hashes=index.hashes, owners=index.owners)
    store.write_text(work / "held.json", json.dumps([name for name, _ in _held_out(config)]))
    store.write_text(path, json.dumps(plan))  # last: with it the rest is there
    return plan


def _held_out(config: BuildConfig) -> Iterator[tuple[str, str]]:
    """(name, text) of what must not be in a corpus."""
    for lang in (*nursery.LANGUAGES, "code"):
        found = nursery.code("val") if lang == "code" else nursery.texts(lang, "val")
        yield from ((f"nursery/{lang}/{i}", text) for i, text in enumerate(found))
    for i, spec in enumerate(config.held_out):
        if spec == "pasture:held-out":
            from puna.data.corpora import pasture

            yield from pasture.held_out(pasture.packages(inputs.packages_folder()))
            continue
        for unit in inputs.plan(f"held-out-{i}", spec)[0]:
            for where, raw in inputs.rows(unit, config.text):
                try:
                    made = inputs.document(where, raw, unit, config.text)
                except PunaError as error:
                    raise PunaError(f"{inputs.place(where, unit)}: {error}") from None
                yield made.id, made.text


# --------------------------------------------------------------------------------------------------------- workers
def _each(task: Callable, work: Path, items: Iterable, workers: int) -> Iterator:
    """What `task(work, item)` gives for every item, as they are done. PunaError: the first failure; or a worker that
    was killed."""
    items = list(items)
    if workers <= 1 or len(items) < 2:
        for item in items:
            yield task(work, item)
        return
    pool = ProcessPoolExecutor(min(workers, len(items)), get_context("spawn"), _begin_worker)
    try:
        for future in as_completed([pool.submit(task, work, item) for item in items]):
            yield future.result()
    except BrokenProcessPool:
        raise PunaError("a worker was killed, perhaps for its memory: run it again, with fewer --workers") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin_worker() -> None:
    """One thread a worker; and no worker outlives the command, or it would write into what goes on after it."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    pa.set_cpu_count(1)

    def follow() -> None:
        wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@lru_cache(maxsize=1)
def _state(work: Path) -> tuple[BuildConfig, list[dict], grams.HeldOut, list[str]]:
    """(configuration, units, held-out index, held-out names) of a plan."""
    plan = json.loads((work / "plan.json").read_text("utf-8"))
    index = np.load(work / "held.npz")
    names = json.loads((work / "held.json").read_text("utf-8"))
    return from_dict(BuildConfig, plan["config"]), plan["units"], grams.HeldOut(index["hashes"], index["owners"]), names


# ------------------------------------------------------------------------------------------------------------ read
def read_unit(work: Path, number: int) -> int:
    """Reads unit `number` into work/units, unless it is there; returns the number."""
    place = work / "units" / f"{number:05d}"
    journal = place.with_suffix(".json")
    if journal.exists():
        return number
    config, units, held, names = _state(work)
    unit, counts, dropped = units[number], Counter(), []
    kept: dict[str, list[np.ndarray]] = {name: [] for name in dedup.NAMES}
    signatures = Path(f"{place}.{os.getpid()}.signatures")
    with store.Writer(place) as writer, open(signatures, "wb") as minima:
        for batch in _batches(unit, config, counts):
            found = grams.words([clean.composed(d.text) if d.lang == "code" else d.text for d in batch], composed=True)
            collisions = held.check(found)
            rows, sizes = grams.signatures(found)
            stay = []
            for i, document in enumerate(batch):
                reason, score = _judge(document, config, found.letters[i] / max(found.visible[i], 1))
                if not reason and i in collisions:
                    owner, count = collisions[i]
                    reason = "held-out text"
                    dropped.append({"id": document.id, "reason": reason, "of": names[owner], "grams": count})
                if reason:
                    counts[reason] += 1
                else:
                    writer.add(unit["input"], document, score)
                    stay.append(i)
            minima.write(rows[stay].tobytes())
            kept["hashes"].append(np.array([_hash(batch[i]) for i in stay], np.uint64).reshape(-1, 2))
            kept["bands"].append(grams.bands(rows[stay]))
            kept["near"].append(np.array([sizes[i] > 0 and not batch[i].pictures for i in stay], bool))
    signatures.rename(f"{place}.signatures")
    empty = {"hashes": np.empty((0, 2), np.uint64), "bands": np.empty((0, grams.BANDS), np.uint64),
             "near": np.empty(0, bool)}  # fmt: skip
    for name, parts in kept.items():
        array = np.concatenate([empty[name], *parts])
        scratch = Path(f"{place}.{os.getpid()}.npy")
        np.save(scratch, array.T.copy() if name == "bands" else array)  # a band lies in one piece
        scratch.rename(f"{place}.{name}.npy")
    store.write_text(journal, json.dumps({"counts": counts, "dropped": dropped}))
    return number


def _batches(unit: dict, config: BuildConfig, counts: Counter) -> Iterator[list[Document]]:
    """The unit's documents that can be read and have a fitting size, in batches."""
    batch, chars, size = [], 0, 0
    for where, raw in inputs.rows(unit, config.text):
        counts["read"] += 1
        try:
            document = inputs.document(where, raw, unit, config.text)
            document.text = clean.plain(document.text, len(document.pictures), document.lang == "code")
        except PunaError as error:
            if not config.skip_bad:
                at = inputs.place(where, unit)
                raise PunaError(f"{at}: {error} (--skip-bad counts such rows and goes on)") from None
            counts["damaged"] += 1
            continue
        document.licence = document.licence or config.licences.get(unit["input"], config.licences.get("", ""))
        reason = _fits(document, config, counts)
        if reason:
            counts[reason] += 1
            continue
        batch.append(document)
        chars, size = chars + len(document.text), size + sum(map(len, document.pictures))
        if chars >= BATCH_CHARS or size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, chars, size = [], 0, 0
    if batch:
        yield batch


def _fits(document: Document, config: BuildConfig, counts: Counter) -> str:
    """Why the document is left out before its words are looked at, or nothing."""
    if document.pictures:
        had_text = bool(document.text.replace(PLACE, "").strip())
        if not clean.check_pictures(document, config.min_side, config.max_aspect, counts):
            return "picture"
        return "" if had_text else "no text"
    if not document.text.strip():
        return "empty"
    size = len(document.text.encode())
    return "short" if size < config.min_bytes else "long" if size > config.max_bytes else ""


def _judge(document: Document, config: BuildConfig, letters: float) -> tuple[str, float]:
    """(why it is left out or nothing, the language's score); its language is set."""
    if document.lang == "code":
        return "", 1.0
    if not document.pictures:
        if letters < config.min_letters:
            return "few letters", 0.0
        if clean.repeated(document.text) > config.max_repeats:
            return "repeated lines", 0.0
    score = 1.0
    if not document.lang:
        document.lang, score = clean.language(document.text.replace(PLACE, " "))
    return "language" if config.languages and document.lang not in config.languages else "", score


def _hash(document: Document) -> tuple[int, int]:
    digest = hashlib.blake2b(document.text.encode(), digest_size=16)
    for data in document.pictures:
        digest.update(hashlib.blake2b(data).digest())
    return int.from_bytes(digest.digest()[:8], "little"), int.from_bytes(digest.digest()[8:], "little")


# ---------------------------------------------------------------------------------------------------- decide, write
def _decide(work: Path, count: int, near: float) -> tuple[list[np.ndarray], dict[int, list[dict]]]:
    """(which documents of each unit stay, what is dropped as a copy and of what)."""
    places = [work / "units" / f"{number:05d}" for number in range(count)]
    prints = dedup.Fingerprints(places)
    original, exact = dedup.originals(prints, near)
    copies = original != np.arange(len(original))
    wanted = np.unique(np.concatenate([np.flatnonzero(copies), original[copies]]))
    ids: dict[int, str] = {}
    for unit, place in enumerate(places):
        first, stop = prints.first[unit], prints.first[unit + 1]
        mine = wanted[(wanted >= first) & (wanted < stop)]
        if len(mine):
            column = pq.read_table(f"{place}.parquet", columns=["id"])["id"]
            ids |= {int(i): column[int(i - first)].as_py() for i in mine}
    dropped: dict[int, list[dict]] = {number: [] for number in range(count)}
    for i in np.flatnonzero(copies).tolist():
        unit = int(np.searchsorted(prints.first, i, "right")) - 1
        reason = "duplicate" if exact[i] else "near-duplicate"
        dropped[unit].append({"id": ids[i], "reason": reason, "of": ids[int(original[i])]})
    return [~copies[a:b] for a, b in zip(prints.first[:-1], prints.first[1:], strict=True)], dropped


def write_part(work: Path, item: tuple[int, int]) -> None:
    """Writes unit `item[0]` as part `item[1]` of the corpus, unless it is there."""
    number, part = item
    journal = work / "parts" / f"{part:05d}.json"
    if not journal.exists():
        place = work / "units" / f"{number:05d}"
        keep = np.load(f"{place}.keep.npy")
        made = store.filtered(place, work / "final" / f"part-{part:05d}", keep)
        store.write_text(journal, json.dumps(made))


def _finish(work: Path, plan: dict, config: BuildConfig, parts: int, dropped: dict[int, list[dict]]) -> None:
    """dropped.jsonl and corpus.json."""
    about: dict = {"format": store.FORMAT, "config": to_dict(config), "inputs": {}, "groups": {}, "files": {}}
    reasons: dict[str, Counter] = {name: Counter() for name in plan["inputs"]}
    lines = []
    for number, unit in enumerate(plan["units"]):
        journal = json.loads((work / "units" / f"{number:05d}.json").read_text("utf-8"))
        reasons[unit["input"]].update(journal["counts"])
        reasons[unit["input"]].update(entry["reason"] for entry in dropped[number])
        lines += [json.dumps(entry, ensure_ascii=False) + "\n" for entry in (*journal["dropped"], *dropped[number])]
    for name, known in plan["inputs"].items():
        about["inputs"][name] = {**known, **{key: reasons[name][key] for key in sorted(reasons[name])}}
    totals, lengths = Counter(documents=0, bytes=0, pictures=0, picture_bytes=0), Counter()
    for part in range(parts):
        made = json.loads((work / "parts" / f"{part:05d}.json").read_text("utf-8"))
        about["files"] |= made["files"]
        lengths.update(made["lengths"])
        totals.update({key: made[key] for key in totals})
        for key, values in made["groups"].items():
            about["groups"][key] = [a + b for a, b in zip(about["groups"].get(key, [0, 0, 0]), values, strict=True)]
    if not totals["documents"]:
        counted = ", ".join(f"{key} {value}" for key, value in sum(reasons.values(), Counter()).items())
        raise PunaError(f"no document is left of what was read ({counted}): look at the filters")
    (work / "final").mkdir(exist_ok=True)
    store.write_text(work / "final" / "dropped.jsonl", "".join(lines))
    about["files"]["dropped.jsonl"] = store.sha256(work / "final" / "dropped.jsonl")
    about |= dict(totals) | {"lengths": {key: lengths[key] for key in sorted(lengths, key=int)}}
    about["groups"] = {key: about["groups"][key] for key in sorted(about["groups"])}
    about["files"] = {key: about["files"][key] for key in sorted(about["files"])}
    about["fingerprint"] = hashlib.sha256(json.dumps(about["files"]).encode()).hexdigest()
    store.write_text(work / "final" / store.ABOUT, json.dumps(about, ensure_ascii=False, indent=1) + "\n")
    for path in (work / "final").iterdir():  # what a killed worker had begun
        if path.name not in about["files"] and path.name != store.ABOUT:
            path.unlink()
