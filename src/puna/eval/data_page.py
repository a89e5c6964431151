"""What data look like, as one HTML page: a corpus's sources, languages, lengths and samples with their pictures; or a
recipe's mixture, stage by stage.

The page stands alone, in the report's style: no script, nothing from outside, every text escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from puna.data.corpora import Corpus
from puna.data.corpus import segments
from puna.eval.plots import number
from puna.eval.template import STYLE

CHARS, SIDE = 600, 320  # of a sample: characters, pixels of a picture
LINES = 60  # of a table: the rest is counted
HUES = ("var(--t0)", "var(--t1)", "var(--t2)", "var(--t3)", "var(--quiet)")
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }} · puna data</title><style>{{ style }}
figure img { max-width: 100%; max-height: 13rem; border-radius: .4rem; display: block; margin: .4rem 0; }
figure p { white-space: pre-wrap; } .columns { display: flex; align-items: flex-end; gap: 3px; height: 9rem; }
.columns i { flex: 1; background: var(--t1); border-radius: .2rem .2rem 0 0; min-height: 1px; }
.names { display: flex; gap: 3px; } .names span { flex: 1; text-align: center; font-size: .7rem; }</style></head>
<body><main><header><h1>{{ title }}</h1><p class="verdict">{{ verdict }}</p></header>
{% for part in tables %}<section><h2>{{ part.title }}</h2>
{% if part.shares %}<div class="share" aria-hidden="true">{% for name, share in part.shares %}<i
style="flex:{{ share }};background:{{ hues[loop.index0 % hues|length] }}" title="{{ name }}"></i>{% endfor %}</div>
{% endif %}<div class="scroll"><table><tr>
{% for h in part.head %}<th{% if not loop.first %} class="n"{% endif %}>{{ h }}{% endfor %}</tr>
{% for row in part.rows %}<tr>{% for c in row %}<td{% if not loop.first %} class="n"{% endif %}>{{ c }}
{% endfor %}</tr>{% endfor %}</table></div></section>{% endfor %}
{% if lengths %}<section><h2>Lengths</h2><p class="quiet">Documents by bytes of text, each column twice the one
before.</p><div class="columns">{% for name, count, height in lengths %}<i style="height:{{ height }}%"
title="{{ name }} bytes: {{ count }} documents"></i>{% endfor %}</div><div class="names quiet">{% for name, _, _ in
lengths %}<span>{{ name }}</span>{% endfor %}</div></section>{% endif %}
{% if samples %}<section><h2>Samples</h2><div class="samples">{% for s in samples %}<figure><figcaption><small
class="quiet">{{ s.id }} · {{ s.lang }} · {{ s.licence }}</small></figcaption>{% for part in s.parts %}
{% if part.text is defined %}<p dir="auto">{{ part.text }}</p>
{% else %}<img alt="" src="{{ part.image }}">{% endif %}{% endfor %}</figure>
{% endfor %}</div></section>{% endif %}</main></body></html>
"""


def render(title: str, verdict: str, tables: Sequence[Mapping], lengths: Sequence = (), samples: Sequence = ()) -> str:
    """The page of its parts."""
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(PAGE)
    return template.render(title=title, verdict=verdict, tables=tables, lengths=lengths, samples=samples, hues=HUES,
                           style=Markup(STYLE))  # fmt: skip


def corpus_page(corpus: Corpus, each: int = 3, seed: int = 0) -> str:
    """A corpus, with `each` samples of every source."""
    about, tables = corpus.about, []
    for i, title in enumerate(("Sources", "Languages", "Licences")):
        found = corpus.by(i)
        rows = [(name, f"{d:,}", f"{b:,}", f"{100 * b / max(about['bytes'], 1):.1f} %", f"{p:,}")
                for name, (d, b, p) in found.items()]  # fmt: skip
        more = [(f"and {len(rows) - LINES} more", "", "", "", "")] if len(rows) > LINES else []
        shares = [(name, b) for name, (_, b, _) in found.items() if b]
        tables.append({"title": title, "head": (title[:-1].lower(), "documents", "bytes", "share", "pictures"),
                       "rows": rows[:LINES] + more, "shares": shares})  # fmt: skip
    left = corpus.left_out()
    reasons = sorted({reason for entry in left.values() for reason in entry} - {"read"})
    rows = [(name, *(f"{entry.get(r, 0):,}" for r in ("read", *reasons))) for name, entry in left.items()]
    tables.append({"title": "Left out", "head": ("of", "read", *reasons), "rows": rows, "shares": []})
    counts = {int(key): count for key, count in about["lengths"].items()}
    span, most = range(min(counts), max(counts) + 1), max(counts.values())
    lengths = [
        (f"{2**k:,}" if k < 14 else number(2**k), f"{counts.get(k, 0):,}", 100 * counts.get(k, 0) / most) for k in span
    ]
    verdict = f"{about['documents']:,} documents, {about['bytes']:,} bytes of text, {about['pictures']:,} pictures"
    samples = [_sample(corpus, row) for row in corpus.sample(each, seed)]
    return render(corpus.folder.name, verdict, tables, lengths, samples)


def mixture_page(name: str, parts: Sequence[tuple[str, Mapping[str, int]]]) -> str:
    """A recipe's mixture: (what part of it, source -> rows) each."""
    tables = []
    for title, rows in parts:
        total = sum(rows.values())
        shown = [(source, f"{count:,}", f"{100 * count / total:.1f} %") for source, count in rows.items() if count]
        tables.append({"title": title, "head": ("source", "rows", "share"), "rows": shown,
                       "shares": [(source, count) for source, count in rows.items() if count]})  # fmt: skip
    return render(name, "What each stage reads", tables)


def _sample(corpus: Corpus, row: Mapping[str, Any]) -> dict[str, Any]:
    """A document's beginning, with the pictures in it."""
    parts, left = [], CHARS
    for segment in segments(corpus, row):
        if isinstance(segment, str):
            parts.append({"text": segment[:left] + (" …" if len(segment) > left else "")})
            left -= len(segment)
        else:
            parts.append({"image": _small(segment.open())})
        if left <= 0 or len(parts) > 12:
            break
    return {"id": row["id"], "lang": row["lang"], "licence": row["licence"] or "licence unknown", "parts": parts}


def _small(picture: Image.Image) -> str:
    """A data URL of the picture, shrunk. What was stored is never sent on: it is decoded and written anew."""
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
