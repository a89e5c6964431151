"""`puna data`: list the sources, build a corpus, look into either."""

from __future__ import annotations

import os
from itertools import islice, pairwise
from pathlib import Path

from puna.cli import show
from puna.cli.settings import read
from puna.errors import PunaError
from puna.fields import build, nearest

SHOWN = 400  # characters of a sample


def build_(args) -> None:
    """Builds a corpus; a killed build goes on."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from puna.data.corpora import BuildConfig, build_corpus, pasture

    licences = dict(text.rpartition("=")[::2] for text in args.licence)
    given = {name: getattr(args, name) for name in BUILD_OPTIONS if getattr(args, name) is not None}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    if args.inputs:
        given["inputs"] = tuple(args.inputs)
    elif Path(args.out).name == "pasture":
        given = pasture.config() | given
    else:
        raise PunaError(f"what is {args.out} to be built from? --from PATH (only the pasture is known by its name)")
    config = BuildConfig(licences=licences, skip_bad=args.skip_bad, **given)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    with show.bar(*columns) as bar:
        tasks = {phase: bar.add_task(phase, total=None) for phase in ("read", "decide", "write")}

        def progress(phase: str, done: int, total: int) -> None:
            bar.update(tasks[phase], completed=done, total=total)

        corpus = build_corpus(args.out, config, args.workers or os.cpu_count() or 1, progress, args.fresh)
    show.corpus(corpus)
    print(f"\ntrain on it as corpus:{args.out}, look into it with `puna data show {args.out}`")


BUILD_OPTIONS = ("text", "min_bytes", "max_bytes", "min_letters", "max_repeats", "languages", "near", "held_out",
                 "min_side", "max_aspect")  # fmt: skip


def ls(args) -> None:
    """All sources, the nursery's languages with their sizes, its origins with their licences."""
    from puna import nursery
    from puna.data.sources import names

    manifest = nursery.manifest()
    print("sources (with file:PATH for text or JSONL of your own, corpus:PATH for what `puna data build` made)")
    groups: dict[str, list[str]] = {}
    for name in names():
        group, slash, rest = name.partition("/")
        groups.setdefault(group + slash, []).append(rest)
    show.table(("name", "of"), [(group, " ".join(rest)) for group, rest in groups.items()])
    print()
    columns = ("train_bytes", "train_documents", "val_bytes", "val_documents", "prose_bytes")
    show.table(
        ("text", *(column.replace("_", " ") for column in columns)),
        [(lang, *(f"{entry.get(c, 0):,}" for c in columns)) for lang, entry in manifest["languages"].items()],
    )
    print(f"\n{len(nursery.concepts()):,} things in {len(nursery.STYLES_TRAIN)} + 1 styles of pictures\n")
    show.table(("origin", "licence", "what"),
               [(name, s["licence"], s["title"]) for name, s in manifest["sources"].items()])  # fmt: skip


def show_(args) -> None:
    """A recipe's mixture, a corpus, or samples of a source; with --html also as a page."""
    from puna.recipes import RECIPES

    folder = Path(args.name.removeprefix("corpus:"))
    if args.name in RECIPES or args.name.endswith((".py", ".json")):
        page = _show_mixture(args.name, args.html)
    elif args.name.startswith("corpus:") or (folder / "corpus.json").exists() or Path(f"{folder}.part").exists():
        page = _show_corpus(folder, args.samples, args.html)
    elif args.html:
        raise PunaError(f"--html is for a corpus or a recipe; {args.name} is neither")
    else:
        _show_source(args.name, args.split, args.samples)
    if args.html:
        from puna.processor.files import write_atomic

        write_atomic(args.html, page)
        print(f"\npage     {args.html}")


def _show_corpus(folder: Path, samples: int, html: str | None) -> str:
    from puna.data.corpora import Corpus

    corpus = Corpus(folder)
    show.corpus(corpus)
    if html:
        from puna.eval.data_page import corpus_page

        return corpus_page(corpus, samples)
    print()
    for row in corpus.sample(1)[:samples]:
        _sample(f"{row['id']} ({row['lang']})\n" + row["text"].replace("\ufffc", "[picture]"))
    return ""


def _show_mixture(recipe: str, html: str | None) -> str:
    from puna.data import DataConfig

    values, one_stage, _ = read(recipe)
    parts = {k: v for k, v in values.items() if isinstance(v, dict) and "data" in v and "train" in v}
    found = []
    for name, part in ({values["stage"]: values} if one_stage else parts).items():
        data, steps, rows = build(DataConfig, part["data"], "data."), part["train"]["steps"], part["train"]["rows"]
        mixture = data.mixture(dict.fromkeys(data.used, rows * steps), steps, rows)
        for first, last in pairwise([*data.begins(steps), steps]):
            when = f"steps {first:,} to {last:,}, " if data.then else ""
            total = (last - first) * rows
            found.append(f"{name}: {when}{total:,} rows of {data.seq_len} tokens")
            print(found[-1])
            before, after = mixture.counts(first * rows), mixture.counts(last * rows)
            given = {source: after[source] - before[source] for source in mixture.names}
            show.table(("source", "share of rows", "rows"),
                       [(k, f"{100 * v / total:.1f} %", v) for k, v in given.items() if v])  # fmt: skip
            print()
            found[-1] = (found[-1], given)
    if not html:
        return ""
    from puna.eval.data_page import mixture_page

    return mixture_page(recipe, found)


def _show_source(name: str, split: str, samples: int) -> None:
    from puna import tasks
    from puna.data import files
    from puna.data.sources import names, texts

    if name not in names() and not name.startswith("file:"):
        raise PunaError(f"unknown data source {name!r}; did you mean {nearest(name, names())!r}? See `puna data ls`")
    if name in tasks.DOCUMENTS:
        for segments in islice(tasks.DOCUMENTS[name]().documents(), samples):
            _sample("".join(s if isinstance(s, str) else _drawn(s) for s in segments))
    elif name.startswith("sft/"):
        if name == "sft/needle":
            task = tasks.task("needle", length=2000, count=len)
        else:
            task = tasks.task(name.removeprefix("sft/"))
        for item in islice(task.items("test" if split == "val" else "train"), samples):
            _sample(_talk(item.messages))
    elif name.startswith("file:"):
        documents = list(files.documents(name.removeprefix("file:")))
        chats = sum(not isinstance(document, str) for document in documents)
        print(f"{name}: {len(documents) - chats:,} texts, {chats:,} conversations\n")
        for document in documents[:samples]:
            _sample(document if isinstance(document, str) else _talk(document.messages))
    else:
        documents = texts(name, split)
        size = sum(len(text.encode()) for text in documents)
        print(f"{name} ({split}): {len(documents):,} documents, {size:,} bytes of UTF-8\n")
        for text in documents[:samples]:
            _sample(text)


def _sample(text: str) -> None:
    print(text[:SHOWN] + (f" … ({len(text):,} characters)" if len(text) > SHOWN else ""))
    print("-" * 40)


def _talk(messages: list[dict]) -> str:
    return "\n".join(f"{m['role']}: {_content(m.get('content') or '')}" for m in messages)


def _drawn(picture) -> str:
    w, h = picture.size
    return f"[picture {w}x{h} {picture.to_json()}]"


def _content(content) -> str:
    if isinstance(content, str):
        return content
    return " ".join(_drawn(part["image"]) if "image" in part else str(part.get("text", part)) for part in content)
