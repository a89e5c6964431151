"""Greedy answers of vLLM and of transformers to the same conversations, for test_vllm.py; puna is not imported.

    PYTHON_WITH_VLLM vllm_answers.py FOLDER CONVERSATIONS.json ANSWERS.json MAX_TOKENS

CONVERSATIONS: a list of lists of messages in OpenAI's form, pictures as data URIs. ANSWERS: {"vllm": [[token ids]],
"transformers": the same, "prompts": token ids as vLLM expanded them, "versions"}. Both read the folder alone: its
template, its processor, its generation_config.json.
"""

import base64
import io
import json
import os
import sys

SETTINGS = {  # one process, one thread, nothing fetched, nothing reported
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}  # fmt: skip


def vllm_answers(folder, conversations, max_tokens, max_model_len):
    from vllm import LLM, SamplingParams

    engine = LLM(model=folder, dtype="float32", enforce_eager=True, block_size=32, max_num_seqs=2,
                 max_model_len=max_model_len, limit_mm_per_prompt={"image": 4}, seed=0)  # fmt: skip
    greedy = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    found = engine.chat(conversations, greedy, use_tqdm=False)
    return [list(each.outputs[0].token_ids) for each in found], [list(each.prompt_token_ids) for each in found]


def transformers_answers(folder, conversations, max_tokens):
    import torch
    import transformers
    from PIL import Image

    torch.set_num_threads(1)
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        kind = json.load(file)["architectures"][0]
    seeing = kind == "Llama4ForConditionalGeneration"
    reader = transformers.AutoProcessor if seeing else transformers.AutoTokenizer
    processor = reader.from_pretrained(folder)
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    answers, prompts = [], []
    for messages in conversations:
        pictures, plain = [], []
        for message in messages:
            parts = message["content"] if isinstance(message["content"], list) else [
                {"type": "text", "text": message["content"]}]  # fmt: skip
            for part in parts:
                if part["type"] == "image_url":
                    data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                    pictures.append(Image.open(io.BytesIO(data)).convert("RGB"))
            content = [{"type": "image"} if part["type"] == "image_url" else part for part in parts]
            plain.append({"role": message["role"], "content": content})
        text = processor.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
        shown = {"images": pictures or None} if seeing else {}
        given = processor(text=[text], add_special_tokens=False, return_tensors="pt", **shown)
        if "pixel_values" in given:
            given["pixel_values"] = given["pixel_values"].float()  # the processor always answers in bfloat16
        with torch.no_grad():
            out = model.generate(**given, do_sample=False, temperature=None, top_p=None, max_new_tokens=max_tokens)
        prompts.append(given["input_ids"][0].tolist())
        answers.append(out[0, len(prompts[-1]) :].tolist())
    return answers, prompts


def main():
    folder, source, target, max_tokens = sys.argv[1:]
    os.environ.update(SETTINGS)
    with open(source, encoding="utf-8") as file:
        conversations = json.load(file)
    theirs, prompts = transformers_answers(folder, conversations, int(max_tokens))
    length = -(-(max(map(len, prompts)) + int(max_tokens) + 1) // 32) * 32
    answers, expanded = vllm_answers(folder, conversations, int(max_tokens), length)
    import torch
    import transformers
    import vllm

    found = {"vllm": answers, "transformers": theirs, "prompts": expanded, "prompts_transformers": prompts,
             "versions": {"vllm": vllm.__version__, "transformers": transformers.__version__,
                          "torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}}  # fmt: skip
    with open(target, "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
