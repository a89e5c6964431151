"""Talking to a model: one prompt, a conversation in the terminal, the server."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from puna.errors import PunaError

HELP = """/image PATH shows a picture, /video PATH frames of a video; /new begins again, /quit ends (so does Ctrl-D);
Ctrl-C stops an answer"""


def _engine(args):
    from puna.engine import Engine

    model, processor = _loaded(args.model)
    return Engine(model, processor, **engine_options(args))


def _loaded(path: str):
    from puna.convert import load

    model, processor = load(path)
    if processor is None:
        raise PunaError(f"{path} holds no tokenizer, so it can't read a prompt: put tokenizer.json there")
    return model, processor


def engine_options(args) -> dict:
    """What the command line says of the engine, as `Engine`'s keywords; the draft model is loaded."""
    options: dict = {}
    if args.batch_invariant:
        options["batch_invariant"] = True
    for name, given in (("cache_bytes", args.cache_mb), ("prefix_cache_bytes", args.prefix_cache_mb)):
        if given is not None:
            options[name] = given * 2**20
    if args.speculate:
        options["speculate"] = args.speculate
    if args.draft is not None:
        options["draft"], _ = _loaded(args.draft)
    return options


def _sampling(args) -> dict:
    return {name: getattr(args, name) for name in ("max_tokens", "temperature", "top_p", "top_k", "seed")}


def _message(text: str, shown: list[dict]) -> dict:
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}] if shown else text}


def _shown(kind: str, path: str, frames: int) -> dict:
    """The part of a message that shows a picture or a video; a damaged one is told before a model is read."""
    from puna.processor.image import open_picture
    from puna.processor.video import read_video

    file = Path(path).expanduser()
    try:
        if kind == "image":
            return {"type": "image", "image": open_picture(file)}
        read_video(file, frames)
        return {"type": "video", "video": file, "frames": frames}
    except PunaError as error:
        raise PunaError(str(error) if path in str(error) else f"{path}: {error}") from error


def generate(args) -> None:
    """Prints the answer to one prompt as it comes."""
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    message = _message(prompt, [_shown(kind, path, args.frames) for kind, path in args.shown])
    if args.backend == "transformers":
        if options := engine_options(args):
            raise PunaError(f"--backend transformers has no {', '.join(options)}: these are our engine's settings")
        print(_by_transformers(args.model, [message], args))
        return
    for piece in _engine(args).stream([message], **_sampling(args)):
        print(piece, end="", flush=True)
    print()


def _by_transformers(path: str, messages: list[dict], args) -> str:
    """What transformers' own Llama 4 answers, loaded from the same folder: prompt, tiles, stops and bans are ours."""
    try:
        import transformers
    except ImportError as error:
        raise PunaError("--backend transformers needs it: pip install 'puna[hf]'") from error
    import torch

    from puna.convert.huggingface import open_hf

    folder = Path(path)
    try:
        kind = json.loads((folder / "config.json").read_text())["architectures"][0]
        made = {"Llama4ForConditionalGeneration": transformers.Llama4ForConditionalGeneration,
                "Llama4ForCausalLM": transformers.Llama4ForCausalLM}[kind]  # fmt: skip
    except (OSError, ValueError, LookupError, TypeError):
        text = f"{path} is no Hugging Face folder of a Llama 4: puna convert {path} DST --to hf, then ask DST"
        raise PunaError(text) from None
    _, processor = open_hf(folder)
    if processor is None:
        raise PunaError(f"{path} holds no tokenizer, so it can't read a prompt: put tokenizer.json there")
    encoded, tokenizer = processor.encode_chat(messages, generation_prompt=True), processor.tokenizer
    model = made.from_pretrained(folder, dtype="auto").eval()
    tokens = torch.from_numpy(encoded.tokens.astype("int64"))[None]
    seen = {"pixel_values": processor.tiles(encoded.pictures).to(model.dtype)} if encoded.pictures else {}
    drawn = {"do_sample": False}
    if args.temperature > 0:
        drawn = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k or 0}
        if args.seed is not None:
            torch.manual_seed(args.seed)
    with torch.inference_mode():
        [answer] = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=args.max_tokens, use_cache=True,
            eos_token_id=sorted(tokenizer.stop_ids), pad_token_id=min(tokenizer.stop_ids), **seen, **drawn,
            suppress_tokens=sorted(set(tokenizer.special.values()) - set(tokenizer.stop_ids)),
        )  # fmt: skip
    return tokenizer.decode(answer[tokens.shape[1] :].tolist())


def chat(args) -> None:
    """A conversation; what can't be done is said and the conversation goes on."""
    engine = _engine(args)
    print(HELP)
    messages: list[dict] = []
    shown: list[dict] = []
    while True:
        try:
            line = input("\nyou> ").strip()
        except EOFError:
            print()
            return
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return
        if word == "/new":
            messages, shown = [], []
            print("a new conversation")
        elif word in ("/image", "/video"):
            try:
                shown.append(_shown(word[1:], rest.strip(), args.frames))
                print(f"goes with your next message: {', '.join(part['type'] for part in shown)}")
            except PunaError as error:
                print(f"puna: {error}")
        elif word.startswith("/"):
            print(HELP)
        elif line:
            asked = [*messages, _message(line, shown)]
            answer = _answer(engine, asked, args)
            if answer is not None:
                messages, shown = [*asked, {"role": "assistant", "content": answer}], []


def _answer(engine, messages: list[dict], args) -> str | None:
    """Prints the answer as it comes and returns it; None if it could not be given."""
    pieces: list[str] = []
    stream = engine.stream(messages, **_sampling(args))
    try:
        for piece in stream:
            pieces.append(piece)
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        stream.close()
        print(" (stopped)")
    except PunaError as error:
        print(f"puna: {error}")
        return None
    return "".join(pieces)


def serve(args) -> None:
    """Serves until it is stopped."""
    from puna.serve import Limits, serve

    serve(
        args.model, host=args.host, port=args.port, open_browser=args.open, name=args.name, engine=args.engine,
        limits=Limits.read(limit_flags(args)), keys=api_keys(args.api_keys), options=engine_options(args),
    )  # fmt: skip


def limit_flags(args) -> dict[str, int | None]:
    """The limits that the command line gave, by name."""
    from puna.serve.limits import table

    return {row.name: getattr(args, row.flag.removeprefix("--").replace("-", "_")) for row in table()}


def api_keys(path: str | None) -> list[str]:
    """The API keys in a file, one a line; # begins a comment. Never an argument: the whole machine sees those."""
    if path is None:
        return []
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PunaError(f"cannot read the API keys in {path}: {error}") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise PunaError(f"{path} holds no API key: write one a line")
    return keys
