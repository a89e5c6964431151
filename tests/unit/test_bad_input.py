"""Bad input from the command line: an exit code, one line that names what was wrong and what to do, nothing lost."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bad_input_helpers import CHECKPOINT, TINY, files, is_mistake
from damage import reseal
from PIL import Image

# ---- recipes and settings -------------------------------------------------------------------------------------------

WRONG_RECIPES = {
    "syntax": ("def recipe(:\n    pass\n", "line 1"),
    "key": (TINY.replace("steps=2", "stepps=2"), "'stepps'"),
    "type": (TINY.replace("rows=2", "rows='2'"), "line 12"),
    "value": (TINY.replace("rows=2", "rows=0"), "train.rows must be at least 1"),
    "import": ("import no_such_module\n", "line 1: ModuleNotFoundError: No module named 'no_such_module'"),
    "nothing": ("def recipe():\n    pass\n", "must define a function recipe() that returns a RunConfig"),
    "no function": ("recipe = 3\n", "must define a function recipe()"),
    "binary": ("\0\1", "mine.py"),
}


@pytest.mark.parametrize("what", WRONG_RECIPES)
def test_a_wrong_recipe_file_is_told_with_its_place(puna, what):
    text, named = WRONG_RECIPES[what]
    Path("mine.py").write_text(text)
    line = is_mistake(puna("raise", "mine.py", "--name", "mine"), named)
    assert "mine.py" in line or what == "value"
    assert not Path("runs/mine").exists()


WRONG_SETTINGS = [
    ("--train.steps", "2.5", "must be a whole number"),
    ("--train.rows", "true", "'train.rows' must be int"),
    ("--train.lr", "NaN", "train.lr must be positive"),
    ("--train.threads", "-1", "train.threads must not be negative"),
    ("--model.n_kv_heads", "3", "n_heads 2 is no multiple of n_kv_heads 3"),
    ("--model.vision", "5", "'model.vision' must be an object"),
    ("--model.moe_layers", "[99]", "names a layer outside 0..3"),
    ("--data.weights", '{"text/en": "much"}', "'data.weights.text/en' must be float"),
    ("--data.weights", '{"text/xx": 1}', "unknown data source 'text/xx'; did you mean 'text/"),
    ("--data.weights", '{"text/en": -1}', "weights are finite numbers >= 0"),
    ("--data.weights", "{}", "at least one source"),
    ("--data.seq_len", "100", "multiple of the attention chunk 64"),
    ("--data.seq_len", "4096", "exceeds the model's max_context 256"),
    ("--data.options", '{"sft/addition": {"itms": 3}}', "no setting 'itms'"),
    ("--data.options", '{"sft/addition": {"items": 0}}', "whole number >= 1"),
    ("--tokenizer.vocab_size", "10", "vocab_size 10 is too small"),
    ("--train.rows", "5000", "64 packed rows, fewer than one batch of 5000; add data, or lower the batch size"),
]


@pytest.mark.parametrize(("name", "value", "named"), WRONG_SETTINGS)
def test_a_wrong_setting_names_itself_and_what_it_may_be(puna, name, value, named):
    before = files(Path("runs/tiny/pretrain"))
    stage = ("pretrain", "tiny.py", "--name", "mine") if name.startswith("--tokenizer") else ("midtrain", "tiny.py")
    is_mistake(puna(*stage, name, value), named)
    assert not list(Path("runs").glob("*/midtrain")) and not list(Path("runs/mine").glob("pretrain"))
    assert files(Path("runs/tiny/pretrain")) == before


@pytest.mark.parametrize("minutes", ["0", "-3", "nan", "inf"])
def test_impossible_minutes_are_refused(puna, monkeypatch, minutes):
    from puna import life

    monkeypatch.setattr(life, "probe", lambda *_, **__: 5000.0)
    is_mistake(puna("raise", "tiny.py", "--name", "mine", "--minutes", minutes), "--minutes", "positive", minutes)
    assert not Path("runs/mine/config.json").exists()


# ---- data -----------------------------------------------------------------------------------------------------------

WRONG_DATA = {
    "empty.txt": (b"", "empty.txt is empty", "leave it out"),
    "blank.md": (b" \n\n\t\n", "blank.md is empty", "leave it out"),
    "latin.txt": ("one\nGr\u00f6\u00dfe\n".encode("latin-1"), "latin.txt, line 2: not UTF-8", "convert the file"),
    "utf16.txt": ("hello".encode("utf-16"), "utf16.txt, line 1: not UTF-8", "convert the file"),
    "cut.jsonl": (b'{"text": "a"}\n{"text": "b', "cut.jsonl, line 2: not JSON", ""),
    "deep.jsonl": (b"[" * 100_000, "deep.jsonl, line 1: not JSON", ""),
    "half.jsonl": (b'{"text": "\\ud800 b"}\n', "half.jsonl, line 1: half a surrogate pair", "remove or replace"),
    "number.jsonl": (b'{"text": 3}\n', "number.jsonl, line 1", "must be text"),
    "role.jsonl": (b'{"messages": [{"role": "me", "content": "x"}]}\n', "role.jsonl, line 1", "user, assistant"),
    "word.docx": (b"x", "word.docx is not of a known kind", "use .txt, .md, .jsonl"),
}


@pytest.mark.parametrize("name", WRONG_DATA)
def test_wrong_data_is_named_with_its_line_before_anything_is_trained(puna, name):
    data, *named = WRONG_DATA[name]
    Path(name).write_bytes(data)
    is_mistake(puna("data", "show", f"file:{name}"), *named)
    weights = json.dumps({f"file:{name}": 1})
    is_mistake(puna("midtrain", "tiny.py", "--data.weights", weights), *named)
    assert not Path("runs/tiny/midtrain").exists() and Path(name).read_bytes() == data


def test_a_data_set_smaller_than_a_batch_says_so(puna):
    Path("small.txt").write_text("Hello there.\n")
    words = ("midtrain", "tiny.py", "--data.weights", '{"file:small.txt": 1}')
    is_mistake(puna(*words), "1 packed rows, fewer than one batch of 2", "add data, or lower the batch size")
    Path("small.txt").write_text("Hello there.\n" * 40)
    assert puna(*words)[0] == 0, "with more data the same command goes on"


def test_bytes_that_are_no_text_are_no_prompt(puna):
    is_mistake(puna("generate", "runs/tiny", b"\xff hi".decode(errors="surrogateescape")), "not valid Unicode")


# ---- pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["cut", "empty", "text", "format", "folder", "address"])
def test_a_wrong_picture_is_named(puna, what):
    Image.effect_noise((60, 60), 50).save("cut.png")
    Path("cut.png").write_bytes(Path("cut.png").read_bytes()[:-900])
    Path("empty.png").touch()
    Path("text.png").write_text("hello")
    Image.new("RGB", (9, 9)).save("format.png", format="BMP")
    name = {"folder": "runs", "address": "http://a.invalid/b.png"}.get(what, f"{what}.png")
    kinds, no_file = "not a PNG, JPEG, WebP or GIF", "no picture file"
    named = {"cut": "damaged or truncated", "empty": "empty: 0 bytes", "text": kinds, "format": kinds,
             "folder": no_file, "address": no_file}  # fmt: skip
    Image.new("RGB", (9, 9)).save("right.png")
    shown = name.replace("//", "/")  # an address is taken for a path, never fetched
    is_mistake(puna("generate", "runs/tiny", "What?", "--image", "right.png", "--image", name), named[what], shown)


# ---- checkpoints and a run's files ----------------------------------------------------------------------------------


def cut(path, by=40):
    path.write_bytes(path.read_bytes()[:-by])


DAMAGES = {
    "model cut": (lambda c: cut(c / "model.safetensors"), "model.safetensors is corrupt or truncated"),
    "model empty": (lambda c: (c / "model.safetensors").write_bytes(b""), "model.safetensors is corrupt or truncated"),
    "model gone": (lambda c: (c / "model.safetensors").unlink(), "model.safetensors"),
    "run cut": (lambda c: cut(c / "run.json"), "run.json can't be read as JSON"),
    "run list": (lambda c: (c / "run.json").write_text("[]"), "run.json holds no JSON object"),
    "run deep": (lambda c: (c / "run.json").write_text("[" * 100_000), "run.json can't be read as JSON"),
    "run keys": (lambda c: reseal(c, lambda run: [run.pop(k) for k in ("step", "finished")]),
                 "run.json lacks step and finished"),
    "key": (lambda c: reseal(c, lambda run: run["config"]["model"].update(d_modl=32)), "'d_modl'"),
    "type": (lambda c: reseal(c, lambda run: run["config"]["model"].update(vision=3)), "'vision'"),
    "float": (lambda c: reseal(c, lambda run: run["config"]["model"].update(d_model=32.5)), "'d_model'"),
    "width": (lambda c: reseal(c, lambda run: run["config"]["model"].update(d_model=64)), "has shape"),
    "tokenizer cut": (lambda c: cut(c / "tokenizer.json"), "tokenizer.json does not match its hash"),
    "processor cut": (lambda c: cut(c / "processor.json", 5), "processor.json does not match its hash"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_left_as_it_is(puna, what):
    damage, named = DAMAGES[what]
    damage(CHECKPOINT)
    before = files(Path("runs/tiny"))
    is_mistake(puna("generate", CHECKPOINT, "Hello", "--max-tokens", "2"), named, CHECKPOINT.name)
    is_mistake(puna("convert", CHECKPOINT, "out", "--to", "hf"), named)
    is_mistake(puna("sft", "tiny.py", "--name", "mine", "--init", CHECKPOINT), named)
    assert files(Path("runs/tiny")) == before and not Path("out").exists() and not Path("runs/mine/sft").exists()


def test_the_checkpoint_before_a_damaged_one_answers_with_a_warning(puna):
    right = puna("generate", "runs/tiny/pretrain", "Hello", "--max-tokens", "8")
    shutil.copytree(CHECKPOINT, CHECKPOINT.with_name("step-00000003"))
    cut(CHECKPOINT.with_name("step-00000003") / "model.safetensors")
    with pytest.warns(UserWarning, match="step-00000003/model.safetensors is corrupt.* trying the checkpoint before"):
        assert puna("generate", "runs/tiny/pretrain", "Hello", "--max-tokens", "8") == right


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "processor_config.json",
                                  "model.safetensors.index.json", "model-00001-of-00001.safetensors"])  # fmt: skip
def test_a_truncated_download_is_named(puna, name):
    cut(Path("hf") / name)
    is_mistake(puna("convert", "hf", "out", "--to", "puna"), f"hf/{name}")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("report.json", ("report", "tiny")),
        ("config.json", ("raise", "tiny.py")),
        ("config.json", ("pretrain", "tiny.py")),
        ("pretrain.json", ("pretrain", "tiny.py")),
    ],
)
def test_a_truncated_file_of_a_run_is_named_and_nothing_overwritten(puna, name, words):
    Path("runs/tiny", name).write_text('{"results": [')
    before = files(Path("runs/tiny"))
    is_mistake(puna(*words), f"runs/tiny/{name} can't be read")
    assert files(Path("runs/tiny")) == before


def test_a_real_process_prints_one_line_and_no_traceback(puna):
    cut(CHECKPOINT / "model.safetensors")
    command = [sys.executable, "-m", "puna.cli.main", "generate", str(CHECKPOINT), "-"]
    done = subprocess.run(command, capture_output=True, text=True, input="Hello")
    assert done.stdout == "" and done.stderr.count("\n") == 1
    is_mistake((done.returncode, done.stdout, done.stderr), "model.safetensors is corrupt or truncated")
