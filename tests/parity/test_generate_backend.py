"""`puna generate --backend transformers` is a check: greedy, both say the same of a folder, of text and pictures."""

import dataclasses

import pytest
from parity_helpers import SCOUT, strong_model
from PIL import Image

from puna.cli.main import main
from puna.convert import export_hf


@pytest.mark.parametrize("picture", [False, True])
def test_both_backends_say_the_same(tiny_processor, tmp_path, capsys, picture):
    tokenizer = tiny_processor.tokenizer
    config = dataclasses.replace(SCOUT, vocab_size=tokenizer.vocab_size, patch_token=tokenizer.patch)
    processor = type(tiny_processor)(tokenizer, dataclasses.replace(
        tiny_processor.image, tile=config.vision.image_size, patch=config.vision.patch_size
    ))  # fmt: skip
    export_hf(strong_model(config), processor, tmp_path / "model")
    Image.effect_noise((60, 40), 90).save(tmp_path / "a.png")
    shown = ["--image", str(tmp_path / "a.png")] if picture else []
    said = []
    for backend in ("puna", "transformers"):
        arguments = ["generate", str(tmp_path / "model"), "What is this?", *shown, "--max-tokens", "24"]
        assert main([*arguments, "--temperature", "0", "--backend", backend]) in (0, None)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and len(said[0]) > 5


def test_a_folder_that_is_no_export(tmp_path, capsys):
    assert main(["generate", str(tmp_path), "Hello", "--backend", "transformers"]) == 1
    assert "puna convert" in capsys.readouterr().err
