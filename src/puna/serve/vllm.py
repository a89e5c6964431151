"""`puna serve --engine vllm`: vLLM makes the answers, everything else stays ours.

The same addresses, checks, limits, keys and page; only `prepare` and `submit` go to vLLM's `AsyncLLM` in this process,
which runs an event loop of its own in a thread. Prompts are encoded by our own processor and handed over as token ids,
one `<|image|>` for each picture, which vLLM's processor widens: so text of users can't become control tokens there
either, as it would through a chat template.

What vLLM does not know is an error, not silence: a folder that is no export, and limits that vLLM would not keep.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
import queue
import threading
from dataclasses import dataclass
from pathlib import Path

from puna.engine.sampler import Sampling
from puna.errors import PunaError
from puna.serve.limits import Limits

log = logging.getLogger("puna.serve")


def load_vllm(model_path: str | Path, limits: Limits):
    """(a `VllmThread`, what create_app wants to know about the model). Raises PunaError."""
    folder = Path(model_path)
    try:
        config = json.loads((folder / "config.json").read_text())
        model_type = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise PunaError(f"{folder} is no exported model: puna convert {folder} DST --to hf, then serve DST") from None
    if model_type != "llama4":
        raise PunaError(f"{folder} holds a {model_type!r} model; --engine vllm serves Llama 4 exports")
    try:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
    except ImportError as error:
        raise PunaError(f"vLLM is not installed here ({error}): see docs/serving.md, or leave out --engine") from None
    from puna.convert.huggingface import open_hf

    _, processor = open_hf(folder)  # reads no weights, but their headers
    if processor is None:
        raise PunaError(f"{folder} holds no tokenizer, so it cannot chat")
    text = config.get("text_config") or config
    pictures = bool(config.get("vision_config")) and processor.image is not None
    options = {"max_num_seqs": limits.running, "enable_log_requests": False}
    block = math.gcd(text.get("attention_chunk_size") or 128, 128)  # must divide the chunk; vLLM's CPU default is 128
    if block < 128:
        options["block_size"] = block
    if pictures:
        options["limit_mm_per_prompt"] = {"image": limits.pictures}
    thread = VllmThread(lambda: AsyncLLM.from_engine_args(AsyncEngineArgs(model=str(folder), **options)), processor)
    facts = {
        "tokenizer": processor.tokenizer, "pictures": pictures,
        "context": min(thread.context, text.get("max_position_embeddings", thread.context)),
    }  # fmt: skip
    return thread, facts


@dataclass(frozen=True)
class _Prompt:
    tokens: list[int]
    given: dict  # as vLLM takes it
    salt: str | None


@dataclass(frozen=True)
class _End:
    cached_tokens: int


@dataclass(frozen=True)
class _Event:
    text: str
    token: int | None = None
    logprob: float | None = None
    top_logprobs: tuple = ()
    finish_reason: str | None = None
    completion: _End | None = None


class _Handle:
    """One request: iterate over its events, or abort it."""

    def __init__(self, prompt_tokens: int, abort):
        self.prompt_tokens, self.abort = prompt_tokens, abort
        self.events: queue.SimpleQueue = queue.SimpleQueue()

    def __iter__(self):
        while True:
            event = self.events.get()
            if isinstance(event, Exception):
                raise event
            yield event
            if event.finish_reason:
                return


class VllmThread:
    """vLLM's engine behind the interface of `puna.engine.EngineThread`."""

    def __init__(self, make, processor):
        """make(): the AsyncLLM, made within its loop's thread."""
        self.processor, self._numbers, self._running = processor, itertools.count(1), 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="puna-vllm", daemon=True)
        self._thread.start()

        async def made():
            return make()

        self.engine = asyncio.run_coroutine_threadsafe(made(), self._loop).result()
        self.context = self.engine.model_config.max_model_len

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self.engine.errored

    def stats(self) -> dict:
        return {"active": self._running}

    def prepare(self, prompt, salt: str | None = None) -> _Prompt:
        if isinstance(prompt[0], dict):
            encoded = self.processor.encode_chat(prompt, generation_prompt=True)
            tokens, pictures = encoded.tokens.tolist(), encoded.pictures
        else:
            tokens, pictures = [int(token) for token in prompt], []
            if not all(0 <= token < self.processor.tokenizer.vocab_size for token in tokens):
                raise PunaError(f"a prompt's token ids must lie in 0..{self.processor.tokenizer.vocab_size - 1}")
        if len(tokens) >= self.context:
            raise PunaError(f"the prompt has {len(tokens)} tokens, the context holds {self.context} with the answer")
        given: dict = {"prompt_token_ids": self._narrowed(tokens) if pictures else tokens}
        if pictures:
            given["multi_modal_data"] = {"image": list(pictures)}
        if salt:
            given["cache_salt"] = salt
        return _Prompt(tokens, given, salt)

    def _narrowed(self, tokens: list[int]) -> list[int]:
        """The ids with one `<|image|>` for each picture's run from <|image_start|> to <|image_end|>."""
        tokenizer, narrow, inside = self.processor.tokenizer, [], False
        for token in tokens:
            if token == tokenizer.image_start:
                inside = True
                narrow.append(tokenizer.image)
            elif not inside:
                narrow.append(token)
            inside = inside and token != tokenizer.image_end
        return narrow

    def submit(self, prompt, sampling: Sampling, salt: str | None = None) -> _Handle:
        prompt = prompt if isinstance(prompt, _Prompt) else self.prepare(prompt, salt)
        room = self.context - len(prompt.tokens)
        if sampling.max_tokens is not None and sampling.max_tokens > room:
            raise PunaError(
                f"{len(prompt.tokens)} prompt tokens and max_tokens {sampling.max_tokens} do not fit in the "
                f"context of {self.context}: shorten the prompt or lower max_tokens"
            )
        id = f"answer-{next(self._numbers)}"
        parameters = vllm_sampling(sampling, room, self.processor.tokenizer)
        handle = _Handle(
            len(prompt.tokens), lambda: asyncio.run_coroutine_threadsafe(self.engine.abort(id), self._loop)
        )
        asyncio.run_coroutine_threadsafe(self._answer(id, prompt, parameters, sampling, handle), self._loop)
        return handle

    async def _answer(self, id: str, prompt: _Prompt, parameters, sampling: Sampling, handle: _Handle) -> None:
        self._running += 1
        try:
            async for output in self.engine.generate(prompt.given, parameters, id):
                answer = output.outputs[0]
                for i, token in enumerate(answer.token_ids):
                    chosen = answer.logprobs[i] if answer.logprobs else {}
                    logprob = chosen[token].logprob if token in chosen else None
                    top = sorted(((t, c.logprob) for t, c in chosen.items()), key=lambda pair: -pair[1])
                    text = answer.text if i == len(answer.token_ids) - 1 else ""
                    handle.events.put(_Event(text, token, logprob, tuple(top[: sampling.top_logprobs])))
                if answer.finish_reason is not None:
                    left = "" if answer.token_ids else answer.text
                    end = _End(output.num_cached_tokens or 0)
                    handle.events.put(_Event(left, finish_reason=answer.finish_reason, completion=end))
                    return
            handle.events.put(_Event("", finish_reason="abort"))
        except asyncio.CancelledError:
            handle.events.put(_Event("", finish_reason="abort"))
        except ValueError as error:  # what vLLM refuses
            handle.events.put(PunaError(str(error).splitlines()[0][:300]))
        except Exception as error:
            log.exception("vLLM failed on a request")
            handle.events.put(error)
        finally:
            self._running -= 1

    def close(self) -> None:
        self.engine.shutdown()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()


def vllm_sampling(sampling: Sampling, room: int, tokenizer):
    """Our `Sampling` as vLLM's. Control tokens that don't end an answer are banned, as our engine bans them."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    shape = None
    if sampling.constraint is not None:
        kind, text = sampling.constraint.kind, sampling.constraint.text
        fields = {"json_object": {"json_object": True}, "json_schema": {"json": text}, "regex": {"regex": text}}
        shape = StructuredOutputsParams(**fields[kind])
    banned = sorted(set(tokenizer.special.values()) - set(tokenizer.stop_ids))
    return SamplingParams(
        max_tokens=room if sampling.max_tokens is None else sampling.max_tokens,
        temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k or -1, min_p=sampling.min_p,
        frequency_penalty=sampling.frequency_penalty, presence_penalty=sampling.presence_penalty,
        repetition_penalty=sampling.repetition_penalty, seed=sampling.seed, stop=list(sampling.stop) or None,
        stop_token_ids=sorted(tokenizer.stop_ids), logprobs=max(sampling.top_logprobs, 0),
        logit_bias={token: -100.0 for token in banned} | dict(sampling.logit_bias), structured_outputs=shape,
        output_kind=RequestOutputKind.DELTA, detokenize=True, skip_special_tokens=True,
    )  # fmt: skip
