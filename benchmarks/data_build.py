"""`puna data build` and tokenization: MB of raw text per second and core, and how much memory a build takes.

    python benchmarks/data_build.py --out FILE [--quick] [--megabytes 200]

The text is the nursery's in twelve languages with the words of each document in another order, copy after copy: real
words, lengths and scripts, and nothing that the near-duplicate pass could drop early. A tenth are exact and near
copies. The build is a process of its own with one worker, from JSONL through filters, language identification, 13-grams
and MinHash to the finished corpus; then the corpus is tokenised as training does it, with one thread. Seconds are CPU
seconds, so other work on the machine counts little; the wall clock's are given beside. Goal (issue "Data for real"):
5 MB/s a core through dedup and tokenization together.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from pathlib import Path

os.environ |= {"RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}  # a core each: before the libraries start

from puna import nursery
from puna.data.corpora import BuildConfig, Corpus, build_corpus
from puna.data.sources import encode_texts
from puna.eval.record import commit, device, versions
from puna.processor import Processor, Tokenizer
from puna.processor.files import write_atomic

GOAL = 5.0  # MB/s a core


def write_text(path: Path, size: int) -> None:
    """`size` bytes of JSONL."""
    documents = [text for lang in nursery.LANGUAGES for text in nursery.texts(lang)]
    rand, written, last = random.Random(0), 0, documents[0]
    with open(path, "w", encoding="utf-8") as file:
        while written < size:
            if rand.random() < 0.1:
                text = last if rand.random() < 0.5 else last + " And one more line."
            else:
                lines = rand.choice(documents).split("\n")
                words = [word for line in lines for word in line.split(" ")]
                rand.shuffle(words)
                order = iter(words)
                text = last = "\n".join(" ".join(next(order) for _ in line.split(" ")) for line in lines)
            written += file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def spent(pid: int, status: tuple) -> tuple[float, int]:
    """(CPU seconds, peak resident bytes) of a process that was waited for."""
    usage = status[2]
    if status[1]:
        raise SystemExit(f"the build ended with status {status[1]}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def build(source: Path, out: Path) -> tuple[float, float, int]:
    """(wall seconds, CPU seconds, peak bytes) of a build in a process of its own."""
    begin = time.perf_counter()
    pid = os.fork()
    if not pid:
        build_corpus(out, BuildConfig((str(source),)))
        os._exit(0)
    cpu, peak = spent(pid, os.wait4(pid, 0))
    return time.perf_counter() - begin, cpu, peak


def tokenise(corpus: Corpus, processor: Processor) -> tuple[float, float, int]:
    """(wall seconds, CPU seconds, tokens) of encoding all its texts."""
    begin, cpu, count, group = time.perf_counter(), time.process_time(), 0, []
    for row in corpus.rows():
        group.append(row["text"])
        if len(group) == 256:
            count += sum(len(each.tokens) for each in encode_texts(processor, group))
            group = []
    count += sum(len(each.tokens) for each in encode_texts(processor, group))
    return time.perf_counter() - begin, time.process_time() - cpu, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--quick", action="store_true", help="40 MB instead of 200")
    parser.add_argument("--megabytes", type=int)
    args = parser.parse_args()
    begin, size = time.perf_counter(), (args.megabytes or (40 if args.quick else 200)) * 10**6
    processor = Processor(Tokenizer.train((t[:4000] for lang in nursery.LANGUAGES for t in nursery.texts(lang)), 8192))
    rates: dict[str, list[float]] = {"build": [], "build, wall": [], "tokenize": [], "both": []}
    peaks = []
    with tempfile.TemporaryDirectory(dir=args.out.resolve().parent) as place:
        source = Path(place) / "text.jsonl"
        write_text(source, size)
        with open(source, encoding="utf-8") as lines:
            raw = sum(len(json.loads(line)["text"].encode()) for line in lines) / 1e6
        for turn in range(3):
            wall, cpu, peak = build(source, Path(place) / f"corpus-{turn}")
            corpus = Corpus(Path(place) / f"corpus-{turn}")
            _, token_cpu, tokens = tokenise(corpus, processor)
            kept = corpus.about["bytes"] / 1e6
            rates["build"].append(raw / cpu)
            rates["build, wall"].append(raw / wall)
            rates["tokenize"].append(kept / token_cpu)
            rates["both"].append(raw / (cpu + token_cpu))
            peaks.append(peak)
            print(f"round {turn + 1}: " + ", ".join(f"{k} {v[-1]:.2f} MB/s" for k, v in rates.items()), flush=True)
    rows = []
    for name, values in rates.items():
        middle = sorted(values)[1]
        row = {"name": f"{name}: raw text a core", "value": middle, "unit": "MB/s", "n": 3, "values": values}
        rows.append(row | ({"goal": GOAL, "met": middle >= GOAL} if name == "both" else {}))
    rows.append({"name": "build: peak memory", "value": max(peaks) / 1e6, "unit": "MB", "n": 3})
    config = {"megabytes": size / 1e6, "dropped": corpus.left_out(), "tokens": tokens}
    result = {"commit": commit(), "versions": versions(), "device": device(), "config": config,
              "seconds": time.perf_counter() - begin, "results": rows}  # fmt: skip
    write_atomic(args.out, json.dumps(result, indent=1) + "\n")
    for row in rows:
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items() if k != "values"})
    goals = [row["met"] for row in rows if "met" in row]
    print(f"{sum(goals)} of {len(goals)} goals met")


if __name__ == "__main__":
    main()
