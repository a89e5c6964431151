"""The same few prompts at every evaluation: what a model says while it learns, next to the curves.

A loss of 2.1 says little to a person; the sentence a model makes of it says much. Half of the prompts are beginnings of
documents, which pre-training can go on with; half are questions, which only fine-tuning can answer. Both kinds are
asked with and without a picture, greedily, in one batch, so that answers differ from step to step by learning alone.
They are a line of metrics.jsonl: `{"step", "eval": "samples", "answers": [{"prompt", "picture", "text"}]}`.
"""

from __future__ import annotations

from collections.abc import Callable

from puna import nursery
from puna.engine import Engine
from puna.model import Llama4
from puna.processor import Processor
from puna.processor.chat import Encoded
from puna.tasks.base import user
from puna.tasks.pictures import EmojiPicture

TEXT = "In the beginning"
QUESTION = "What is 23 + 45?"
ASK = "What is this?"
MAX_TOKENS = 24


def answers_evaluation(processor: Processor) -> Callable[[Llama4], dict]:
    """An evaluation for the training loop: model -> {"answers": [...]}. The picture is of a style that is never
    trained on. It draws no random number and leaves the model as it was."""
    concept = next(c for c in nursery.concepts() if c.naming)
    picture = EmojiPicture(concept.id, nursery.STYLE_HELD_OUT)
    asked: list[tuple[str, EmojiPicture | None, object]] = [
        (TEXT, None, _begun(processor, [TEXT])),
        (QUESTION, None, [user(QUESTION)]),
    ]
    seen = [("", picture, lambda: _begun(processor, [picture])), (ASK, picture, lambda: [user(ASK, picture)])]

    def evaluate(model: Llama4) -> dict:
        sees = model.vision is not None and processor.image is not None
        prompts = asked + ([(text, shown, make()) for text, shown, make in seen] if sees else [])
        computed, model.compute_dtype = model.compute_dtype, None
        try:
            engine = Engine(model, processor, max_batch=len(prompts), max_context=min(1024, model.config.max_context))
            done = engine.generate([prompt for _, _, prompt in prompts], max_tokens=MAX_TOKENS)
        finally:
            model.compute_dtype = computed
        return {"answers": [
            {"prompt": text, "picture": None if shown is None else shown.to_json(), "text": each.text}
            for (text, shown, _), each in zip(prompts, done, strict=True)
        ]}  # fmt: skip

    return evaluate


def _begun(processor: Processor, segments: list) -> Encoded:
    """A document without its end."""
    whole = processor.encode_document(segments)
    return Encoded(whole.tokens[:-1], whole.loss[:-1], whole.pictures)
