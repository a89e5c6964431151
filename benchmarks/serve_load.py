"""A mixed load on `puna serve`: 32 clients with text, pictures, streams, shapes, aborts and bad requests at once.

    python benchmarks/serve_load.py --out FILE [--quick] [--model MODEL] [--clients 32]

The server is a process of its own, `puna serve` as a user starts it, with a small random model that sees unless --model
names another. Every client asks again and again, each time something else: to warm up (a fifth of the time, at least
20 s: caches, the prefix cache's 2 MiB among them, buffers and the allocator fill), then for 5 minutes (--quick: 30
seconds). What must hold: no 5xx; every bad request is its 4xx; afterwards no place, slot or page is taken; and the
process's memory is within 2 % of what it was after the warm-up. Latencies are printed as p50 and p99, from the request
to its first token (streams) and to its end. Goals: issue "The engine and the server".
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import io
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
from PIL import Image

from puna.eval.record import commit, device, versions
from puna.processor.files import write_atomic

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
TEXT = re.compile(rb'"(content|delta)":"[^"]')  # of a streamed event, which holds a token's text
MEMORY = "process_resident_memory_bytes"
IDLE = ("puna_server_places_taken", "puna_server_body_bytes_held", "puna_engine_waiting", "puna_engine_active")


def small_model(folder: Path) -> Path:
    """An export of a random model of 3 M parameters that sees, with a tokenizer trained on the nursery's README."""
    import torch

    from puna.convert import export_hf
    from puna.model import Llama4, ModelConfig, VisionConfig
    from puna.processor import ImageProcessor, Processor, Tokenizer

    torch.manual_seed(0)
    texts = [path.read_text() for path in Path(__file__).resolve().parents[1].glob("*.md")]
    tokenizer = Tokenizer.train([line for text in texts for line in text.splitlines() if line], 1000)
    vision = VisionConfig(image_size=32, patch_size=8, width=64, layers=2, heads=2, mlp_width=256, adapter_width=64)
    config = ModelConfig(
        tokenizer.vocab_size, d_model=128, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=32, expert_width=128,
        dense_width=256, n_experts=8, chunk=128, max_context=2048, patch_token=tokenizer.patch, vision=vision,
    )  # fmt: skip
    model = Llama4(config).eval()
    with torch.no_grad():
        model.output.weight.normal_(0, 0.1)
    export_hf(model, Processor(tokenizer, ImageProcessor(tile=32, patch=8, max_tiles=4)), folder)
    return folder


def picture(rng: random.Random) -> str:
    buffer = io.BytesIO()
    colour = tuple(rng.randrange(256) for _ in range(3))
    Image.new("RGB", (rng.randint(8, 120), rng.randint(8, 120)), colour).save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def requests(rng: random.Random) -> tuple[str, str, dict, int]:
    """(kind, address, body, the status it must get); a client leaves the kind "abort" in the middle."""
    known = ("llama", "where", "is", "the", "cat", "count", "12", "grass", "why", "then")
    words = " ".join(rng.choices(known, k=rng.randint(2, 60)))
    messages = [{"role": "user", "content": words}]
    sampled = {"max_tokens": rng.randint(4, 48), "temperature": rng.choice([0, 0.7, 1.0]), "seed": rng.randrange(99)}
    seen = [{"type": "image_url", "image_url": {"url": picture(rng)}}, {"type": "text", "text": words}]
    schema = {"type": "array", "items": {"type": "integer"}, "maxItems": 4}
    shape = {"type": "json_schema", "json_schema": {"schema": schema}}
    bad = rng.choice([
        {"messages": []}, {"messages": messages, "temperature": -1}, {"messages": messages, "nonsense": 1},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}]},
        {"messages": [{"role": "user", "content": "long " * 4000}]}, {"messages": messages, "max_tokens": 10**9},
        {"messages": messages, "regex": "(unclosed"},
    ])  # fmt: skip
    return rng.choice([
        ("whole", CHAT, {"messages": messages, **sampled}, 200),
        ("stream", CHAT, {"messages": messages, "stream": True, **sampled}, 200),
        ("picture", CHAT, {"messages": [{"role": "user", "content": seen}], "stream": True, **sampled}, 200),
        ("n", CHAT, {"messages": messages, "n": 2, "logprobs": True, "top_logprobs": 3, **sampled}, 200),
        ("shape", CHAT, {"messages": messages, "response_format": shape, **sampled}, 200),
        ("text", COMPLETIONS, {"prompt": words, **sampled}, 200),
        ("response", RESPONSES, {"input": words, "stream": True, "max_output_tokens": sampled["max_tokens"]}, 200),
        ("abort", CHAT, {"messages": messages, "stream": True, **sampled, "max_tokens": 400}, 200),
        ("bad", CHAT, bad, 400),
    ])  # fmt: skip


class Load:
    """What the clients saw."""

    def __init__(self):
        self.statuses: collections.Counter = collections.Counter()
        self.wrong: list[str] = []
        self.first: list[float] = []
        self.whole: list[float] = []
        self.tokens = 0

    async def client(self, http: httpx.AsyncClient, number: int, end: float) -> None:
        rng = random.Random(number)
        while time.monotonic() < end:
            kind, path, body, expected = requests(rng)
            began, first, said = time.monotonic(), None, []
            async with http.stream("POST", path, json=body) as response:
                async for piece in response.aiter_bytes():
                    if first is None and TEXT.search(piece):
                        first = time.monotonic() - began
                    said.append(piece)
                    if kind == "abort" and (len(said) > 3 or rng.random() < 0.2):
                        break
            self.statuses[response.status_code] += 1
            if response.status_code == 429:
                await asyncio.sleep(float(response.headers["retry-after"]))
            elif response.status_code != expected or b'"server_error"' in b"".join(said):
                self.wrong.append(f"{kind}: {response.status_code} {b''.join(said)[-300:]!r}")
            elif kind not in ("bad", "abort"):
                self.whole.append(time.monotonic() - began)
                if body.get("stream") and first is not None:
                    self.first.append(first)


async def numbers(http: httpx.AsyncClient) -> dict[str, float]:
    text = (await http.get("/metrics")).text
    return {name: float(value) for name, value in re.findall(r"^(\w+) ([\d.e+-]+)$", text, re.M)}


async def run(url: str, clients: int, warm_up: float, seconds: float) -> tuple[Load, dict]:
    """The load (errors of the warm-up among its own), and of the server: its numbers before and after it, when all is
    quiet, and its memory at each tenth.
"""
    load = Load()
    limits = httpx.Limits(max_connections=clients + 4)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:

        async def quiet() -> dict[str, float]:
            end = time.monotonic() + 30
            while True:
                now = await numbers(http)
                if not any(now.get(name) for name in IDLE) or time.monotonic() > end:
                    return now
                await asyncio.sleep(0.1)

        end = time.monotonic() + warm_up
        await asyncio.gather(*(load.client(http, -1 - number, end) for number in range(clients)))
        load.first.clear()
        load.whole.clear()
        before = await quiet()
        end = time.monotonic() + seconds
        tasks = [asyncio.create_task(load.client(http, number, end)) for number in range(clients)]
        memory = [before[MEMORY]]
        for _ in range(10):
            await asyncio.sleep(max(0.0, seconds / 10))
            memory.append((await numbers(http))[MEMORY])
        await asyncio.gather(*tasks)
        return load, {"memory": memory, "before": before, "end": await quiet()}


def percentile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--quick", action="store_true", help="30 seconds")
    parser.add_argument("--seconds", type=float, help="default 300, 30 with --quick")
    parser.add_argument("--model", help="a folder that puna serve takes (default: a small random model)")
    parser.add_argument("--clients", type=int, default=32)
    args = parser.parse_args()
    begin, seconds = time.perf_counter(), args.seconds or (30 if args.quick else 300)
    warm_up = max(20.0, seconds / 5)
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or str(small_model(Path(folder) / "model"))
        command = [sys.executable, "-m", "puna", "serve", model, "--port", "0", "--name", "load"]
        command += ["--prefix-cache-mb", "2"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
        try:
            url = re.search(r"http://\S+", server.stdout.readline())[0]
            load, seen = asyncio.run(run(url, args.clients, warm_up, seconds))
            server.send_signal(signal.SIGTERM)
            code = server.wait(60)
        finally:
            server.kill()
    end = seen["end"]
    growth = end[MEMORY] / seen["memory"][0] - 1
    errors = sum(n for status, n in load.statuses.items() if status >= 500)
    left = sum(end.get(name, 0) for name in IDLE)
    made = end["puna_answer_tokens_total"] - seen["before"]["puna_answer_tokens_total"]
    must = (  # name, value, goal, met
        ("responses of 5xx", errors, 0, errors == 0),
        ("answers other than they must be", len(load.wrong), 0, not load.wrong),
        ("places, slots and waiting requests left", left, 0, left == 0),
        ("memory after the load over before", growth, 0.02, abs(growth) <= 0.02),
        ("exit code after SIGTERM", code, 0, code == 0),
    )
    n = load.statuses.total()
    rows = [{"name": a, "value": v, "unit": "", "n": n, "goal": goal, "met": met} for a, v, goal, met in must]
    facts = [
        {"name": f"{name}, p{q:.0%}".replace("%", ""), "value": percentile(values, q), "unit": "s", "n": len(values)}
        for name, values in (("first token", load.first), ("whole answer", load.whole)) for q in (0.5, 0.99)
    ] + [
        {"name": "answer tokens", "value": made / seconds, "unit": "tokens/s", "n": int(made)},
        {"name": "mean whole answer", "value": statistics.fmean(load.whole or [0]), "unit": "s", "n": len(load.whole)},
    ]  # fmt: skip
    config = {"seconds": seconds, "warm-up seconds": warm_up, "clients": args.clients,
              "model": args.model or "random, 3 M parameters",
              "megabytes at each tenth": [round(n / 1e6, 1) for n in (*seen["memory"], end[MEMORY])],
              "statuses": {str(k): v for k, v in sorted(load.statuses.items())}}  # fmt: skip
    result = {"commit": commit(), "versions": versions(), "device": device(), "config": config,
              "seconds": time.perf_counter() - begin, "results": rows + facts}  # fmt: skip
    write_atomic(args.out, json.dumps(result, indent=1) + "\n")
    for text in load.wrong[:10]:
        print(text)
    print("statuses:", config["statuses"], "memory, MB:", *config["megabytes at each tenth"])
    for row in rows + facts:
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    print(f"{sum(row['met'] for row in rows)} of {len(rows)} goals met")


if __name__ == "__main__":
    main()
