"""The same prompts at every evaluation: they are answered as the engine answers, and cost the training nothing."""

import dataclasses

import pytest
import torch
from training_helpers import CONFIG, changed, job, random_batch, values

from puna.engine import Engine
from puna.eval import answers_evaluation, report
from puna.eval.answers import ASK, MAX_TOKENS, QUESTION, TEXT
from puna.model import Llama4, VisionConfig
from puna.tasks.base import user
from puna.tasks.pictures import PictureRef
from puna.train import Evaluation, metrics, train


@pytest.fixture
def model(tiny_processor):
    eye = VisionConfig(image_size=16, patch_size=4, width=16, layers=1, heads=2, mlp_width=64, adapter_width=16)
    tokenizer = tiny_processor.tokenizer
    config = dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size, patch_token=tokenizer.patch, vision=eye)
    made = Llama4(config).eval()
    with torch.no_grad():
        made.output.weight.normal_(generator=torch.Generator().manual_seed(0))
    return made


def test_four_prompts_are_answered_as_the_engine_does(model, tiny_processor):
    model.compute_dtype = torch.bfloat16
    before, random = values(model), torch.get_rng_state()
    answers = answers_evaluation(tiny_processor)(model)["answers"]
    assert [each["prompt"] for each in answers] == [TEXT, QUESTION, "", ASK]
    assert [each["picture"] is None for each in answers] == [True, True, False, False]
    assert torch.equal(random, torch.get_rng_state()) and model.compute_dtype is torch.bfloat16
    assert not changed(before, values(model))
    model.compute_dtype = None
    picture = PictureRef.from_json(answers[3]["picture"])
    for messages, each in (([user(QUESTION)], answers[1]), ([user(ASK, picture)], answers[3])):
        assert Engine(model, tiny_processor).generate([messages], max_tokens=MAX_TOKENS)[0].text == each["text"]
    assert len({each["text"] for each in answers}) > 2, "the prompt makes no difference"
    assert answers_evaluation(tiny_processor)(model)["answers"] == answers


def test_documents_go_on_without_an_end(model, tiny_processor):
    """Begun, not finished: what is asked is begin_of_text and the text, nothing behind it."""
    tokens = [tiny_processor.tokenizer.bos, *tiny_processor.tokenizer.encode(TEXT)]
    expected = Engine(model, tiny_processor).generate([tokens], max_tokens=MAX_TOKENS)[0].text
    assert answers_evaluation(tiny_processor)(model)["answers"][0]["text"] == expected


def test_a_model_that_reads_text_only_is_asked_in_text(tiny_processor):
    config = dataclasses.replace(CONFIG, vocab_size=tiny_processor.tokenizer.vocab_size, vision=None, patch_token=None)
    answers = answers_evaluation(tiny_processor)(Llama4(config).eval())["answers"]
    assert [each["prompt"] for each in answers] == [TEXT, QUESTION]


def test_they_are_lines_of_the_metrics_and_shown_in_the_report(model, tiny_processor, tmp_path):
    evaluation = Evaluation("samples", 4, answers_evaluation(tiny_processor))

    def source(step):
        batch = random_batch(step, pictures=False)
        return batch

    run = job(tmp_path / "pretrain", tiny_processor, config=model.config, source=source, evaluations=(evaluation,))
    trained = values(train(run))
    plain = job(tmp_path / "plain" / "pretrain", tiny_processor, config=model.config, source=source)
    assert not changed(trained, values(train(plain))), "answering disturbs training"
    written = [line for line in metrics.read(tmp_path / "pretrain" / "metrics.jsonl") if "answers" in line]
    assert [(line["step"], line["eval"]) for line in written] == [(4, "samples"), (8, "samples")]
    shown = report.said(tmp_path)
    assert [each["prompt"] for each in shown] == [TEXT, QUESTION, "", ASK]
    assert [when for when, _ in shown[0]["answers"]] == ["pretrain 4", "pretrain 8"]
    assert [text for _, text in shown[3]["answers"]] == [line["answers"][3]["text"] for line in written]
    assert "data:image/png" in shown[2]["picture"] and shown[0]["picture"] is None
