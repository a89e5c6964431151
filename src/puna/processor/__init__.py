"""Text and pictures in, tensors out: everything between people and the model's token ids.

`Processor` joins the three parts: `tokenizer` (BPE and control tokens; `ranks` reads Meta's file), `image` (pictures to
tiles; `video` makes pictures of a film) and `chat` (the conversation format; `tools` are its function calls).
`grounding` is the written form of boxes. On disk a processor is two files, ``tokenizer.json`` and ``processor.json``.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from puna.errors import PunaError
from puna.processor.chat import CHAT_TEMPLATE, Encoded, Given, Segment, is_picture, layout, render
from puna.processor.files import read_text, write_atomic
from puna.processor.grounding import Box, format_box, iou, parse_boxes, to_normalised, to_pixels
from puna.processor.image import Canvas, ImageProcessor, open_picture, to_rgb
from puna.processor.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "CHAT_TEMPLATE", "Box", "Canvas", "Encoded", "Given", "ImageProcessor", "Processor", "StreamDecoder", "Tokenizer",
    "format_box", "iou", "join", "open_picture", "parse_boxes", "to_normalised", "to_pixels", "to_rgb",
]  # fmt: skip

FILE_NAME = "processor.json"
FORMAT = 1


class Processor:
    """A `tokenizer` and an `image` processor (None: the model reads text only)."""

    def __init__(self, tokenizer: Tokenizer, image: ImageProcessor | None = None) -> None:
        self.tokenizer = tokenizer
        self.image = image
        self._fixed: dict[str, list[int]] = {}  # ids of the few texts every conversation holds

    # ---------------------------------------------------------------- files
    def save(self, folder: str | os.PathLike) -> None:
        """Write ``tokenizer.json`` and ``processor.json`` into `folder`, each atomically."""
        self.tokenizer.save(Path(folder) / "tokenizer.json")
        image = None if self.image is None else dataclasses.asdict(self.image)
        write_atomic(Path(folder) / FILE_NAME, json.dumps({"format": FORMAT, "image": image}, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Processor:
        """Read what `save` wrote. Raises `PunaError` for missing or damaged files."""
        path = Path(folder) / FILE_NAME
        try:
            record = json.loads(read_text(path, "processor"))
            if record["format"] != FORMAT:
                raise PunaError(f"{path} has format {record['format']!r}, this puna reads {FORMAT}: use a newer puna")
            image = None if record["image"] is None else ImageProcessor(**record["image"])
        except PunaError as error:
            raise error if str(path) in str(error) else PunaError(f"{path}: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise PunaError(f"{path} is damaged: {error}") from error
        return cls(Tokenizer.load(Path(folder) / "tokenizer.json"), image)

    # ---------------------------------------------------------------- text and layout
    def encode_chat(
        self, messages: Sequence[dict], generation_prompt: bool = False, tools: Sequence[dict] | None = None,
        tool_form: str = "pythonic",
    ) -> Encoded:  # fmt: skip
        """A conversation's tokens (see `puna.processor.chat`). Loss falls on what the assistant says and on the token
        that ends its turn. generation_prompt: end with the header of an answer to come. tools: functions to offer, in
        OpenAI's form; tool_form: how calls are written (see `puna.processor.tools`)."""
        tile = None if self.image is None else self.image.tile
        return self._assemble(
            render(self.tokenizer, messages, generation_prompt, tools, tool_form, tile), self._encode_text
        )

    def encode_document(self, segments: Sequence) -> Encoded:
        """A pre-training document of texts and pictures: begin_of_text, the segments, end_of_text. Loss falls on text
        and on end_of_text, not on `Given` text, begin_of_text or any token of a picture's layout."""
        return self.encode_documents([segments])[0]

    def encode_documents(self, documents: Iterable[Sequence]) -> list[Encoded]:
        """`encode_document` of many, their texts tokenised together on all cores."""
        documents = [self._checked(segments, number) for number, segments in enumerate(documents, 1)]
        texts = [segment for segments in documents for segment in segments if isinstance(segment, str)]
        encoded = iter(self.tokenizer.encode_batch(texts))
        return [self._assemble(self._document(segments), lambda _: next(encoded)) for segments in documents]

    def tiles(self, pictures: Sequence) -> torch.Tensor | None:
        """All tiles of `pictures` in the order of their patch tokens: float32 [N, 3, S, S] in [-1, 1]; None for
        none."""
        if not pictures:
            return None
        return join([self._image().tiles(_opened(picture)) for picture in pictures])

    # ---------------------------------------------------------------- inside
    def _image(self) -> ImageProcessor:
        if self.image is None:
            raise PunaError("this model reads text only: leave the pictures out")
        return self.image

    def _encode_text(self, text: str) -> list[int]:
        if len(text) > 9:  # not a role, not the line ends behind a header
            return self.tokenizer.encode(text)
        if text not in self._fixed:
            if len(self._fixed) >= 256:
                return self.tokenizer.encode(text)
            self._fixed[text] = self.tokenizer.encode(text)
        return self._fixed[text]

    def _checked(self, segments: Sequence, number: int) -> list:
        segments = [segments] if isinstance(segments, str) else list(segments)
        if not segments:
            raise PunaError(f"document {number} is empty")
        for segment in segments:
            if not isinstance(segment, str) and not is_picture(segment):
                raise PunaError(f"document {number}: a segment is text or a picture, not {type(segment).__name__}")
        return segments

    def _document(self, segments: list) -> Iterable[Segment]:
        yield Segment("control", self.tokenizer.bos)
        for segment in segments:
            if isinstance(segment, str):
                yield Segment("text", segment, not isinstance(segment, Given))
            else:
                yield Segment("picture", segment)
        yield Segment("control", self.tokenizer.end_of_text, True)

    def _assemble(self, segments: Iterable[Segment], encode: object) -> Encoded:
        tokens: list[int] = []
        loss: list[bool] = []
        pictures: list = []
        for segment in segments:
            if segment.kind == "control":
                ids, learn = [segment.value], segment.loss
            elif segment.kind == "text":
                ids, learn = encode(segment.value), segment.loss
            else:
                ids, learn = layout(self.tokenizer, self._image(), segment.value.size), False
                pictures.append(segment.value)
            tokens += ids
            loss += [learn] * len(ids)
        return Encoded(np.array(tokens, np.int32), np.array(loss, np.bool_), pictures)


def join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """CPU tensors one behind the other, by numpy and so by this thread alone.

    A parallel operator of torch in a background thread starts OpenMP threads of its own; with more of them than cores
    the training thread's sleep at every barrier instead of spinning (docs/LOG.md: steps took half as long again).
    """
    return torch.from_numpy(np.concatenate([part.numpy() for part in parts]))


def _opened(picture: object) -> Image.Image:
    """A picture's pixels; a lazily drawn one must have the size its tokens were laid out for."""
    if isinstance(picture, Image.Image):
        return picture
    image = picture.open()
    if tuple(image.size) != tuple(picture.size):
        raise PunaError(f"a picture announced as {tuple(picture.size)} pixels opened as {tuple(image.size)}")
    return image
