"""Talking to a model: one prompt, a conversation in the terminal, the server."""

from __future__ import annotations

import sys
from pathlib import Path

from puna.errors import PunaError

HELP = "/image PATH shows a picture, /new begins again, /quit ends (so does Ctrl-D); Ctrl-C stops an answer"


def _engine(path: str):
    from puna.convert import load
    from puna.engine import Engine

    model, processor = load(path)
    if processor is None:
        raise PunaError(f"{path} holds no tokenizer, so it can't read a prompt: put tokenizer.json there")
    return Engine(model, processor)


def _sampling(args) -> dict:
    return {name: getattr(args, name) for name in ("max_tokens", "temperature", "top_p", "top_k", "seed")}


def _message(text: str, pictures: list) -> dict:
    if not pictures:
        return {"role": "user", "content": text}
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _picture(path: str):
    from puna.processor.image import open_picture

    try:
        return open_picture(Path(path).expanduser())
    except PunaError as error:
        raise PunaError(str(error) if path in str(error) else f"{path}: {error}") from error


def generate(args) -> None:
    """Prints the answer to one prompt as it comes."""
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    message = _message(prompt, [_picture(path) for path in args.image])
    for piece in _engine(args.model).stream([message], **_sampling(args)):
        print(piece, end="", flush=True)
    print()


def chat(args) -> None:
    """A conversation; what can't be done is said and the conversation goes on."""
    engine = _engine(args.model)
    print(HELP)
    messages: list[dict] = []
    pictures: list = []
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
            messages, pictures = [], []
            print("a new conversation")
        elif word == "/image":
            try:
                pictures.append(_picture(rest.strip()))
                print(f"{len(pictures)} picture(s) go with your next message")
            except PunaError as error:
                print(f"puna: {error}")
        elif word.startswith("/"):
            print(HELP)
        elif line:
            asked = [*messages, _message(line, pictures)]
            answer = _answer(engine, asked, args)
            if answer is not None:
                messages, pictures = [*asked, {"role": "assistant", "content": answer}], []


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
    from puna.serve import serve

    serve(args.model, host=args.host, port=args.port, open_browser=args.open)
