"""A real engine behind a real socket: a small model that sees, sharp enough for its answers to depend on the prompt."""

import contextlib
import time

import openai
import torch
from server_fakes import running

from puna.engine import Engine, EngineThread
from puna.model import Llama4, ModelConfig, VisionConfig
from puna.serve import create_app
from puna.serve.limits import Limits


def lively_model(processor, max_context=512):
    """Random but sharp, so that answers depend on the prompt; it never ends an answer by itself."""
    torch.manual_seed(0)
    tokenizer = processor.tokenizer
    vision = VisionConfig(image_size=16, patch_size=4, width=32, layers=1, heads=2, mlp_width=128, adapter_width=32)
    model = Llama4(
        ModelConfig(
            tokenizer.vocab_size, d_model=32, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=8, expert_width=32,
            dense_width=32, n_experts=4, chunk=32, floor_scale=8, max_context=max_context, patch_token=tokenizer.patch,
            vision=vision,
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(3)
        model.output.weight.normal_(generator=torch.Generator().manual_seed(0))
        model.output.weight[list(tokenizer.stop_ids)] = 0
    return model


class Served:
    """A running server: its URL, client and app, its engine, how many answers each step advanced, what was aborted."""

    def __init__(self, thread, app, url):
        self.thread, self.app, self.url = thread, app, url
        self.engine, self.together, self.aborted, self.pause = thread.engine, [], [], 0.0
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30)
        step, abort = self.engine.step, self.engine.abort

        def counted_step():
            time.sleep(self.pause)
            self.together.append(len(self.engine.scheduler.active))
            return step()

        def recorded_abort(id):
            was_running = abort(id)
            self.aborted += [id] * was_running
            return was_running

        self.engine.step, self.engine.abort = counted_step, recorded_abort

    def ask(self, content="Where is the cat?", max_tokens=16, **options):
        messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
        return self.client.chat.completions.create(model="tiny", messages=messages, max_tokens=max_tokens, **options)

    def text(self, *args, **options):
        return self.ask(*args, **options).choices[0].message.content


@contextlib.contextmanager
def serving(processor, max_batch=4, model=None, engine=None, **limits):
    """A `Served`; engine: options of the Engine."""
    torch.set_num_threads(1)
    model = model or lively_model(processor)
    with EngineThread(Engine(model, processor, max_batch=max_batch, **(engine or {}))) as thread:
        app = create_app(
            thread, "tiny", "0" * 64, context=512, tokenizer=processor.tokenizer, limits=Limits(**limits)
        )
        with running(app) as url:
            served = Served(thread, app, url)
            with served.client:
                yield served
