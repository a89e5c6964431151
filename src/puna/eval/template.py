"""The report's page: one template, one style sheet, no script, nothing from outside. jinja2 escapes everything."""

STYLE = """
:root { color-scheme: light dark;
  --bg: light-dark(#fbf9f5, #1a1815); --surface: light-dark(#fff, #24211d); --sunk: light-dark(#f2ede3, #2d2924);
  --ink: light-dark(#29241d, #ece6db); --quiet: light-dark(#6f6659, #a59b8d); --line: light-dark(#e6dfd2, #3a342c);
  --good: light-dark(#2c7448, #7cc795); --bad: light-dark(#a3362a, #f0988c);
  --t0: light-dark(#9c5f12, #e3a848); --t1: light-dark(#23707c, #6fbecb); --t2: light-dark(#7b477f, #cf9ed3);
  --t3: light-dark(#56702a, #a9c676); }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.6 ui-sans-serif, -apple-system, "Segoe UI", Roboto, "Noto Sans", system-ui, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 3rem 1.25rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -.02em; margin: 0; }
h2 { font-size: 1.25rem; letter-spacing: -.01em; margin: 3.2rem 0 .4rem; }
h3 { font-size: .92rem; margin: 0 0 .3rem; font-weight: 600; }
p { max-width: 46rem; margin: .4rem 0 1rem; } .quiet { color: var(--quiet); } small { font-size: .82rem; }
code, pre { font: .82rem/1.5 ui-monospace, "SF Mono", Menlo, "Liberation Mono", monospace; }
.verdict { font-size: 1.15rem; margin: 1.2rem 0 .3rem; }
.facts { display: flex; flex-wrap: wrap; gap: .3rem 2rem; margin: 1rem 0; padding: 0; list-style: none; }
.facts b { display: block; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .93rem; }
th { text-align: left; color: var(--quiet); font-weight: 500; font-size: .82rem; }
th, td { padding: .42rem .8rem .42rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th.n, td.n { text-align: right; } td.wrap { white-space: normal; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
.bar { width: 150px; height: 16px; display: block; } .track { fill: var(--sunk); } .fill { fill: var(--quiet); }
.fill.good { fill: var(--good); } .fill.bad { fill: var(--bad); }
.bar .chance { stroke: var(--quiet); stroke-width: 1.5; stroke-dasharray: 2 2; }
.bar .goal { stroke: var(--ink); stroke-width: 2; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr)); gap: 1.6rem; }
.charts > div { min-width: 0; } .chart { width: 100%; height: auto; display: block; }
.chart text { font-size: 11px; fill: var(--quiet); } .chart .grid { stroke: var(--line); }
.chart .break { stroke: var(--quiet); stroke-dasharray: 3 4; opacity: .6; } .chart .stage { font-size: 10.5px; }
.chart .heat { fill: var(--t0); }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .line.faint { stroke-width: 1; opacity: .3; }
.line.t0 { stroke: var(--t0); } .line.t1 { stroke: var(--t1); } .line.t2 { stroke: var(--t2); }
.line.t3 { stroke: var(--t3); } .line.tq { stroke: var(--quiet); opacity: .55; stroke-width: 1.1; }
.chart .name.t0, .dot.t0 { fill: var(--t0); } .chart .name.t1, .dot.t1 { fill: var(--t1); }
.chart .name.t2, .dot.t2 { fill: var(--t2); } .chart .name.t3, .dot.t3 { fill: var(--t3); }
.dot.tq { fill: var(--quiet); } .chart .name { font-weight: 600; }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(14.5rem, 1fr)); gap: 1rem; margin-top: 1rem; }
figure { margin: 0; background: var(--surface); border: 1px solid var(--line); border-radius: .9rem; padding: .9rem;
  min-width: 0; overflow-wrap: anywhere; }
figure svg { width: 100%; max-height: 13rem; display: block; border-radius: .5rem; margin-bottom: .6rem; }
.said { stroke: #e4572e; } .true { stroke: #1f9d55; stroke-dasharray: 30 22; }
.said, .true { fill: none; stroke-width: 12; }
figcaption p { margin: 0 0 .35rem; line-height: 1.45; } figcaption .ask { color: var(--quiet); font-size: .88rem; }
.share { display: flex; height: 1.1rem; border-radius: .4rem; overflow: hidden; margin: .3rem 0 .5rem; gap: 2px; }
.share i { display: block; }
details { margin-top: 1rem; } summary { cursor: pointer; color: var(--quiet); }
pre { background: var(--sunk); border-radius: .7rem; padding: 1rem; overflow-x: auto; }
@media print { main { padding-top: 0; } details { display: none; } }
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ model.name }} · puna report</title>
<style>{{ style }}</style>
</head>
<body><main>
<header>
<h1>{{ model.name }}</h1>
<p class="quiet">A Llama-4-architecture model raised by puna {{ versions.puna }} in {{ raised }}
on {{ device.gpu or device.cpu }}, {{ device.threads }} threads.</p>
<p class="verdict" id="verdict">{% if goals %}<b>{{ met }} of {{ goals }} goals met.</b>
{% if missed %}<span class="bad">Not met:</span> {{ missed | join(", ") }}.{% endif %}
{% else %}<b>No goals were set for this run.</b>{% endif %}</p>
</header>

<section><h2>What was measured</h2>
<p>Every answer is freely generated, greedily; nothing is chosen for the model. <b>Chance</b> (dashed) is what one
reaches without looking: the most frequent answer, the best constant box, one of the codes; for bits per byte the add-½
unigram of the language's own training tokens. ± is one standard error. Rows in bits per byte, and the one with
exchanged pictures, are better when lower.</p>
<div class="scroll"><table id="results">
<tr><th>row<th class="n">measured<th class="n">±<th><th class="n">chance<th class="n">goal<th>verdict
<th class="n">n</tr>
{% for r in headline %}<tr><td>{{ r.name }}{% if r.note %} <small class="quiet">{{ r.note }}</small>{% endif %}
<td class="n">{{ r.shown }}<td class="n quiet">{{ r.error }}<td>{{ r.bar }}<td class="n">{{ r.chance }}
<td class="n">{{ r.goal }}<td>{{ r.verdict }}<td class="n quiet">{{ r.n }}</tr>
{% endfor %}</table></div></section>

{% if languages %}<section><h2>Twelve languages</h2>
<p>Naming pictures, and bits per byte of held-out text (its goal in every language: below chance).</p>
<div class="scroll"><table id="languages">
<tr><th>language<th class="n">naming<th class="n">±<th class="n">chance<th class="n">n<th><th class="n">bits per byte
<th class="n">±<th class="n">chance<th class="n">below chance<th class="n">goal<th>verdict</tr>
{% for l in languages %}<tr><td>{{ l.lang }}<td class="n">{{ l.naming.shown }}<td class="n quiet">{{ l.naming.error }}
<td class="n">{{ l.naming.chance }}<td class="n quiet">{{ l.naming.n }}<td>{{ l.naming.verdict }}
<td class="n">{{ l.bpb.shown }}<td class="n quiet">{{ l.bpb.error }}<td class="n">{{ l.bpb.chance }}
<td class="n">{{ l.below }}<td class="n">{{ l.bpb.goal }}<td>{{ l.bpb.verdict }}</tr>
{% endfor %}</table></div></section>{% endif %}

{% if samples %}<section><h2>Answers</h2>
<p>Items chosen before the run, right or wrong. Boxes:
<span style="color:#e4572e">what the model said</span>
and, dashed, <span style="color:#1f9d55">the truth</span>.</p>
<div class="samples">{% for s in samples %}<figure>{{ s.picture }}<figcaption>
<p class="ask" dir="auto">{{ s.question }}</p><p dir="auto"><b>{{ s.text or "(nothing)" }}</b></p>
<p><small>{% if s.right %}<span class="good">right</span>{% else %}<span class="bad">wrong</span>
<span class="quiet" dir="auto">· expected {{ s.expected }}</span>{% endif %}
<span class="quiet">· {{ s.row }}</span></small></p></figcaption></figure>
{% endfor %}</div></section>{% endif %}

<section><h2>The model</h2>
<ul class="facts">{% for label, value in facts %}<li><small class="quiet">{{ label }}</small><b>{{ value }}</b></li>
{% endfor %}</ul>
{% if model.sha256 %}<p><small class="quiet">Checkpoint {{ model.checkpoint }}{% if not model.finished %}
(not finished){% endif %}, SHA-256 over its tensors' hashes <code>{{ model.sha256 }}</code></small></p>{% endif %}
</section>

{% if charts %}<section><h2>How it learned</h2>
<p class="quiet"><small>Over optimizer steps; dashed lines are where a stage begins.</small></p>
<div class="charts">{% for title, chart in charts %}<div><h3>{{ title }}</h3>{{ chart }}</div>
{% endfor %}</div></section>{% endif %}

{% if said %}<section><h2>What it said while it learned</h2>
<p class="quiet"><small>The same prompts at every evaluation, answered greedily. An empty prompt is a picture with
nothing beside it, at the beginning of a document.</small></p>
<div class="samples" id="said">{% for s in said %}<figure>{{ s.picture or "" }}<figcaption>
<p class="ask">{{ s.prompt or "(the picture alone)" }}</p>
{% for when, text in s.answers %}<p><small class="quiet">{{ when }}</small><br>{{ text or "(nothing)" }}</p>
{% endfor %}</figcaption></figure>{% endfor %}</div></section>{% endif %}

{% if stages %}<section><h2>Time and work</h2>
<div class="scroll"><table id="stages"><tr><th>stage<th class="n">steps<th class="n">tokens<th class="n">learned from
<th class="n">row length<th class="n">training time<th class="n">tokens/s<th class="n">FLOPs<th class="n">FLOP/s
<th class="n">last loss<th class="n">skipped</tr>
{% for s in stages %}<tr><td>{{ s.name }}<td class="n">{{ s.steps }}<td class="n">{{ s.tokens }}
<td class="n">{{ s.valid }}
<td class="n">{{ s.seq_len }}<td class="n">{{ s.time }}<td class="n">{{ s.rate }}<td class="n">{{ s.flops }}
<td class="n">{{ s.speed }}<td class="n">{{ s.loss }}<td class="n">{{ s.skipped }}</tr>
{% endfor %}</table></div>
{% if parts %}<p class="quiet"><small>This command:
{% for name, took in parts %}{{ name }} {{ took }}{{ "." if loop.last else " · " }}{% endfor %}</small></p>{% endif %}
<p class="quiet"><small>FLOPs of a token, forward and backward = 6 N + 12 Σ<sub>layers</sub> H d k: N the active
parameters without the input embedding, H d the width of all query heads, k the mean number of keys a query sees:
(T + 1) / 2 in global layers, within chunks in local ones. {% if tiles %}The vision tower's work per tile is added.
{% else %}The vision tower's work is not counted.{% endif %}</small></p></section>

<section><h2>What it read</h2>
{% for s in stages if s.mixture %}<h3>{{ s.name }}</h3>
<div class="share" aria-hidden="true">{% for m in s.mixture %}<i style="flex:{{ m.tokens }};background:{{ m.colour }}"
title="{{ m.name }}"></i>{% endfor %}</div>
<div class="scroll"><table class="mixture"><tr><th>capability<th class="n">tokens<th class="n">share<th>sources</tr>
{% for m in s.mixture %}<tr><td><i style="display:inline-block;width:.7em;height:.7em;border-radius:.2em;background:{{
m.colour }}"></i> {{ m.name }}<td class="n">{{ m.shown }}<td class="n">{{ m.share }}<td class="wrap"><small
class="quiet">{{ m.sources }}</small></tr>
{% endfor %}</table></div>{% endfor %}
<p class="quiet"><small>{{ counting }}</small></p></section>{% endif %}

<section><h2>Made with</h2>
<p><small class="quiet">commit <code>{{ commit }}</code> · {% for name, value in versions.items() %}{{ name }}
{{ value }}{% if not loop.last %} · {% endif %}{% endfor %}<br>{{ device.cpu }}, {{ device.cores }} cores,
{{ device.threads }} threads</small></p>
<details><summary>The whole configuration</summary><pre>{{ configuration }}</pre></details></section>
</main></body></html>
"""

COMPARE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ runs | map(attribute="name") | join(" · ") }} · puna runs</title>
<style>{{ style }}</style>
</head>
<body><main>
<header><h1>{{ runs | length }} runs beside each other</h1></header>
<section><div class="scroll"><table id="runs"><tr><th>run<th>stages<th class="n">steps<th class="n">tokens
<th class="n">FLOPs<th class="n">training time<th class="n">tokens/s</tr>
{% for r in runs %}<tr><td><i style="display:inline-block;width:.7em;height:.7em;border-radius:.2em;background:{{
tones[loop.index0] }}"></i> {{ r.name }}<td>{{ r.stages }}<td class="n">{{ r.steps }}<td class="n">{{ r.tokens }}
<td class="n">{{ r.flops }}<td class="n">{{ r.seconds }}<td class="n">{{ r.rate }}</tr>
{% endfor %}</table></div></section>

{% if rows %}<section><h2>What they can do</h2>
<div class="scroll"><table id="rows"><tr><th>row{% for r in runs %}<th class="n">{{ r.name }}{% endfor %}</tr>
{% for name, cells in rows %}<tr><td>{{ name }}{% for c in cells %}<td class="n">{% if c %}{{ c.shown }}
{% if c.error %}<small class="quiet">± {{ c.error }}</small>{% endif %}{% else %}<span class="quiet">–</span>{% endif %}
{% endfor %}</tr>
{% endfor %}</table></div></section>{% endif %}

<section><h2>How they learned</h2>
<p class="quiet"><small>All stages one after the other. At equal FLOPs the lower loss is the better recipe.</small></p>
<div class="charts">{% for title, chart in charts %}<div><h3>{{ title }}</h3>{{ chart }}</div>
{% endfor %}</div></section>

<section><h2>Where their settings differ</h2>
{% if differences %}<div class="scroll"><table id="differences"><tr><th>setting{% for r in runs %}<th>{{ r.name }}
{% endfor %}</tr>
{% for path, values in differences %}<tr><td><code>{{ path }}</code>{% for v in values %}<td class="wrap"><code>{{ v
}}</code>{% endfor %}</tr>
{% endfor %}</table></div>{% else %}<p>Nowhere.</p>{% endif %}</section>
</main></body></html>
"""
