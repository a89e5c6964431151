"""The command line: what is parsed, what is called, what is printed, and what becomes of mistakes."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from PIL import Image

from puna.cli.main import main
from puna.cli.settings import split_overrides
from puna.errors import PunaError
from puna.lock import lock

TINY = """
from puna.data import DataConfig
from puna.model import ModelConfig, VisionConfig
from puna.stages import RunConfig, StageConfig, TokenizerConfig
from puna.train import TrainConfig


def recipe():
    eye = VisionConfig(image_size=16, patch_size=4, width=16, layers=1, heads=2, mlp_width=64, adapter_width=16)
    model = ModelConfig(vocab_size=400, d_model=32, n_layers=4, n_heads=2, n_kv_heads=1, head_dim=16, expert_width=32,
                        dense_width=32, n_experts=2, chunk=64, max_context=256, vision=eye)
    train = TrainConfig(steps=2, rows=2, warmup=1, checkpoint_every=2, eval_every=4, threads=1, compute_dtype="float32")
    data = DataConfig(64, {"sft/addition": 1.0}, options={"sft/addition": {"items": 64}})
    stage = StageConfig(data, train)
    return RunConfig("tiny", model, TokenizerConfig(400, chars=3000, code_chars=3000), stage, stage, stage)
"""


@pytest.fixture
def puna(tmp_path, monkeypatch, capsys):
    """puna(*words) -> (exit code, stdout, stderr), in a folder of its own that holds the recipe tiny.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    (tmp_path / "tiny.py").write_text(TINY)

    def run(*words):
        capsys.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as exit:  # argparse
            code = exit.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def quick(monkeypatch):
    """Stages without their evaluations during training."""
    from puna import nursery
    from puna.stages import common

    monkeypatch.setattr(nursery, "verify", lambda: 0)
    monkeypatch.setattr(common, "bpb_evaluation", lambda *_, **__: lambda model: {"bpb/en": 3.0})


def test_parsing_needs_no_torch():
    program = (
        "import sys; from puna.cli.main import build_parser; build_parser().format_help(); "
        "heavy = {'torch', 'numpy', 'PIL', 'fastapi'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["rase"], "'raise'"),
        (["recipe", "shw"], "'show'"),
        (["raise", "--fersh"], "--fresh"),
        (["serve", "m", "--prot", "1"], "--port"),
        (["convert", "a", "b", "--to", "huf"], "'hf'"),
        (["generate", "m", "two", "words"], "quotes"),
        (["serve", "m", "--port", "70000"], "0..65535"),
        (["generate", "m", "p", "--train.steps", "3"], "--train.steps"),
        ([], "COMMAND"),
    ],
)
def test_a_wrong_command_line_is_exit_2_with_the_nearest_word(puna, words, nearest):
    code, out, err = puna(*words)
    assert code == 2 and nearest in err and not out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["raise", "nano_scot"], "did you mean 'nano_scout'"),
        (["raise", "none.py"], "no recipe file none.py"),
        (["raise", "none.json"], "no file none.json"),
        (["raise", "tiny.py", "--name", "../up"], "folder's name"),
        (["recipe", "show", "tiny.py", "--pretrain.train.stepps", "3"], "did you mean 'pretrain.train.steps'"),
        (["recipe", "show", "tiny.py", "--pretrain.train.steps", "many"], "must be like 2"),
        (["recipe", "show", "tiny.py", "--pretrain.train.steps"], "needs a value"),
        (["recipe", "show", "tiny.py", "--model.n_heads", "0"], "n_heads"),
        (["sft", "tiny.py"], "puna midtrain"),
        (["sft", "tiny.py", "--init", "nowhere"], "no model at nowhere"),
        (["generate", "nowhere", "hello"], "no model at nowhere"),
        (["generate", "nowhere", "hello", "--image", "no.png"], "no.png"),
        (["serve", "nowhere", "--port", "0"], "no model at nowhere"),
        (["convert", "nowhere", "there", "--to", "meta"], "no model at nowhere"),
        (["convert", "nowhere", "there", "--to", "hf", "--fp8"], "--fp8 is for --to meta"),
        (["convert", "nowhere", "there", "--to", "puna", "--shards", "2"], "--shards is for --to meta"),
        (["convert", "nowhere", "there", "--to", "hf"], "no model at nowhere"),
        (["convert", "nowhere", ".", "--to", "hf"], "exists already"),
        (["report", "nowhere"], "no run nowhere"),
        (["recipe", "cp", "nano_scot", "my.py"], "'nano_scout'"),
        (["recipe", "cp", "nano_scout", "tiny.py"], "exists already"),
        (["data", "show", "text/xx"], "text/"),
        (["data", "show", "file:none.txt"], "none.txt"),
        (["tokenizer", "stats", "nowhere"], "no tokenizer.json"),
    ],
)
def test_a_mistake_is_one_line_and_exit_1(puna, words, expected):
    code, _, err = puna(*words)
    assert code == 1
    assert err.startswith("puna: error: ") and err.count("\n") == 1
    assert expected in err


def test_interrupts_and_signals_have_their_codes(puna, monkeypatch):
    from puna.cli import tools
    from puna.train.loop import Stopped

    def raises(error):
        def run(args):
            raise error

        return run

    monkeypatch.setattr(tools, "recipe_ls", raises(KeyboardInterrupt()))
    assert puna("recipe", "ls")[0] == 130
    monkeypatch.setattr(tools, "recipe_ls", raises(Stopped(signal.SIGTERM, 7)))
    code, _, err = puna("recipe", "ls")
    assert code == 128 + signal.SIGTERM and "after step 7" in err
    monkeypatch.setattr(tools, "recipe_ls", raises(KeyError("bug")))
    with pytest.raises(KeyError):  # a bug keeps its traceback
        puna("recipe", "ls")


def test_settings_are_taken_out_of_the_words():
    words = ["raise", "--a.b", "1", "tiny", "--name", "x", "--c.d.e/f=2=3", "--seed=1.5", "--", "--g.h", "2"]
    rest, found = split_overrides(words)
    assert found == [("a.b", "1"), ("c.d.e/f", "2=3")]
    assert rest == ["raise", "tiny", "--name", "x", "--seed=1.5", "--", "--g.h", "2"]


def test_settings_and_seed_reach_the_recipe_and_json_comes_back(puna, tmp_path):
    plain = json.loads(puna("recipe", "show", "tiny.py")[1])
    text = puna("recipe", "show", "tiny.py", "--sft.train.lr", "1e-4", "--pretrain.data.weights", '{"code": 2}')[1]
    changed = json.loads(text)
    assert changed["sft"]["train"]["lr"] == 1e-4 != plain["sft"]["train"]["lr"]
    assert changed["pretrain"]["data"] == plain["pretrain"]["data"] | {"weights": {"code": 2.0}, "options": {}}
    phase = '[{"after": 0.5, "weights": {"text/en": 1}}]'
    text = puna("recipe", "show", "tiny.py", "--sft.data.then", phase)[1]
    assert json.loads(text)["sft"]["data"]["then"] == [{"after": 0.5, "weights": {"text/en": 1.0}}]
    given = ("--sft.data.weights", '{"code": 1}', "--sft.data.then", '[{"after": 0.5, "weights": {"sft/addition": 1}}]')
    options = plain["sft"]["data"]["options"]
    kept = json.loads(puna("recipe", "show", "tiny.py", *given)[1])["sft"]["data"]
    assert kept["options"] == options and "sft/addition" in options, "a later phase reads it"
    assert len(kept["then"]) == 1, "phases that were given stay"
    (tmp_path / "back.json").write_text(text)
    assert puna("recipe", "show", "back.json")[1] == text
    for broken in ("{", "[]", '{"a": 1}'):
        (tmp_path / "back.json").write_text(broken)
        assert puna("recipe", "show", "back.json")[0] == 1


def test_recipe_ls_and_a_copy_is_a_recipe(puna):
    code, out, _ = puna("recipe", "ls")
    assert code == 0 and "nano_scout" in out and "nano_maverick" in out
    assert puna("recipe", "cp", "nano_maverick", "mine.py")[0] == 0
    assert puna("recipe", "show", "mine.py")[1] == puna("recipe", "show", "nano_maverick")[1]


def test_data_ls_and_show(puna, tmp_path):
    code, out, _ = puna("data", "ls")
    assert code == 0 and "captions" in out and "Unicode-3.0" in out
    assert "hello there" not in puna("data", "show", "text/en", "--samples", "1")[1]
    (tmp_path / "own.txt").write_text("hello there\n")
    assert "hello there" in puna("data", "show", "file:own.txt")[1]
    one, two = (puna("data", "show", "sft/addition", "--samples", n)[1] for n in (1, 2))
    assert two.startswith(one) and two.count("assistant:") == 2
    assert "picture 64x64" in puna("data", "show", "captions", "--samples", "5")[1]
    assert "100.0 %" in puna("data", "show", "tiny.py")[1]


def test_tokenizer_train_and_stats(puna, tmp_path):
    assert puna("tokenizer", "train", "tiny.py", "--out", "tok", "--tokenizer.vocab_size", "420")[0] == 0
    code, out, _ = puna("tokenizer", "stats", "tok")
    assert code == 0 and "420 tokens" in out and "th " in out
    first = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line}
    assert float(first["en"][2]) > 1 and first["en"][3] == "1.000" and first["th"][-1] == "character"
    assert puna("tokenizer", "train", "tiny.py", "--out", "more", "--tokenizer.vocab_size", "700")[0] == 0
    code, out, _ = puna("tokenizer", "stats", "tok", "--against", "more/tokenizer.json", "--out", "fit.json")
    assert code == 0 and out.count("\nen ") == 2
    rows = json.loads((tmp_path / "fit.json").read_text())["results"]
    value = {(row["name"], row["unit"]): row["value"] for row in rows}
    assert value["more/tokenizer.json/en", "bytes/token"] > value["tok/en", "bytes/token"] > 1
    assert value["more/tokenizer.json/en", "tokens/word"] < value["tok/en", "tokens/word"]
    assert ("tok/th", "tokens/character") in value and len(rows) == 2 * 2 * 13
    assert puna("tokenizer", "stats", "tok", "--against", "tok")[0] == 1
    code, _, err = puna("tokenizer", "stats", "tok", "--against", "nowhere.model")
    assert code == 1 and "no tokenizer at nowhere.model" in err
    assert puna("tokenizer", "train", "tiny.py", "--out", "tok")[0] == 1


def test_a_stage_alone_runs_once_and_holds_to_its_settings(puna, quick, tmp_path):
    weights = tmp_path / "runs/tiny/pretrain/step-00000002/model.safetensors"
    code, out, _ = puna("pretrain", "tiny.py")
    assert code == 0 and "finished, step 2 of 2" in out and "bpb/en 3" in out
    first, written = weights.read_bytes(), weights.stat().st_mtime_ns
    assert puna("pretrain", "tiny.py")[1] == out
    assert weights.stat().st_mtime_ns == written, "a finished stage was trained again"
    code, _, err = puna("pretrain", "tiny.py", "--train.lr", "0.01")
    assert code == 1 and "train.lr" in err and "--fresh" in err and "--name" in err
    assert puna("pretrain", "tiny.py", "--train.lr", "0.01", "--fresh")[0] == 0
    assert weights.read_bytes() != first
    assert puna("pretrain", "runs/tiny/pretrain.json", "--name", "again")[0] == 0  # resolved settings given back
    assert (tmp_path / "runs/again/pretrain/step-00000002/model.safetensors").read_bytes() == weights.read_bytes()


def test_stages_follow_one_another_or_init(puna, quick, tmp_path):
    assert puna("pretrain", "tiny.py")[0] == 0
    code, out, _ = puna("midtrain", "tiny.py")
    assert code == 0 and "midtrain: finished" in out
    assert puna("sft", "tiny.py", "--name", "tuned", "--init", "runs/tiny")[0] == 0
    record = json.loads((tmp_path / "runs/tuned/sft/step-00000002/run.json").read_text())
    assert record["config"]["init"] == "runs/tiny"
    assert not (tmp_path / "runs/tuned/tokenizer").exists(), "with --init the tokenizer is the model's own"
    code, _, err = puna("sft", "tiny.py", "--name", "tuned")
    assert code == 1 and "midtrain" in err
    assert "init" in puna("sft", "tiny.py", "--name", "tuned", "--init", "runs/tiny/pretrain")[2]
    assert "--model" in puna("sft", "tiny.py", "--name", "x", "--init", "runs/tiny", "--model.d_model", "64")[2]
    code, out, _ = puna("report", "tuned")
    assert code == 0 and "sft: finished" in out
    for form in ("puna", "hf"):
        assert puna("convert", "runs/tuned", form, "--to", form)[0] == 0
    assert puna("convert", "hf", "meta", "--to", "meta", "--shards", "1")[0] == 0
    _same_weights("puna", "hf")
    _same_weights("hf", "meta")
    assert puna("convert", "meta", "fp8", "--to", "meta", "--shards", "1", "--fp8", "--dtype", "bfloat16")[0] == 0
    assert "no tokenizer" not in puna("generate", "fp8", "hello", "--max-tokens", "2")[2]


def _same_weights(one, other):
    import torch

    from puna import load

    models = [dict(load(path)[0].named_parameters()) for path in (one, other)]
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


def test_an_unfinished_stage_is_no_start(puna, quick, monkeypatch):
    from puna.stages import common

    assert puna("pretrain", "tiny.py")[0] == 0
    monkeypatch.setattr(common, "is_finished", lambda folder, stage: False)
    code, _, err = puna("midtrain", "tiny.py")
    assert code == 1 and "not finished" in err and "--init" in err


def test_a_stage_of_a_raised_run_holds_to_that_run(puna, quick, tmp_path):
    run = json.loads(puna("recipe", "show", "tiny.py", "--pretrain.train.lr", "0.01")[1])
    (tmp_path / "runs/tiny").mkdir(parents=True)
    (tmp_path / "runs/tiny/config.json").write_text(json.dumps({"asked": {}, "run": run}))
    code, _, err = puna("pretrain", "tiny.py")
    assert code == 1 and "train.lr" in err
    assert puna("pretrain", "runs/tiny/config.json")[0] == 0


REPORT = {
    "results": [
        {"name": "naming/en", "value": 0.5, "n": 200, "stderr": 0.035, "chance": 0.005, "goal": 0.35, "met": True},
        {"name": "addition/2digit", "value": 0.1, "n": 90, "stderr": 0.03, "chance": 0.0, "goal": 0.8, "met": False},
        {"name": "grounding/iou50", "value": 0.2, "n": 90, "stderr": 0.04, "chance": 0.1, "goal": None, "met": None},
    ]
}


def test_raise_calls_life_and_shows_the_report(puna, monkeypatch):
    from puna import life, serve

    calls = []
    monkeypatch.setattr(life, "raise_model", lambda *args, **kwargs: calls.append((args, kwargs)) or REPORT)
    monkeypatch.setattr(serve, "serve", lambda *args, **kwargs: calls.append((args, kwargs)))
    words = ("raise", "tiny.py", "--name", "mine", "--minutes", "1.5", "--seed", "3", "--sft.train.steps", "7")
    code, out, _ = puna(*words)
    assert code == 0 and len(calls) == 1
    (run, folder), options = calls[0]
    assert (run.name, run.seed, run.sft.train.steps, run.pretrain.train.steps) == ("mine", 3, 7, 2)
    assert folder.as_posix() == "runs/mine" and options == {"minutes": 1.5, "fresh": False, "track": ()}
    assert "1 of 2 goals met" in out and "runs/mine/report.html" in out
    assert puna("raise", "tiny.py", "--serve", "--fresh", "--port", "0")[0] == 0
    assert calls[1][1] == {"minutes": None, "fresh": True, "track": ()}
    assert calls[2][1] == {"port": 0, "open_browser": True}


class FakeEngine:
    """Records what it is asked; answers in two pieces."""

    def __init__(self):
        self.asked = []

    def stream(self, messages, **sampling):
        self.asked.append((messages, sampling))
        if messages[-1]["content"] == "too long":
            raise PunaError("the context is full: begin a new conversation")
        yield "forty"
        if messages[-1]["content"] == "stop me":
            raise KeyboardInterrupt
        yield "-two"


@pytest.fixture
def engine(monkeypatch):
    from puna.cli import talk

    fake = FakeEngine()
    monkeypatch.setattr(talk, "_engine", lambda path: fake)
    return fake


def test_generate_sends_pictures_and_sampling(puna, engine, tmp_path):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "red.png")
    code, out, _ = puna("generate", "m", "What?", "--image", "red.png", "--temperature", "0.5", "--top-k", "3",
                        "--top-p", "0.9", "--seed", "1", "--max-tokens", "5")  # fmt: skip
    assert (code, out) == (0, "forty-two\n")
    [message], sampling = engine.asked[0]
    assert [part["type"] for part in message["content"]] == ["image", "text"]
    assert message["content"][0]["image"].size == (20, 10)
    assert sampling == {"max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 1}


def test_generate_shows_videos_and_pictures_in_their_order(puna, engine, tmp_path, monkeypatch):
    pages = [Image.new("RGB", (20, 10), color) for color in ("red", "green", "blue")]
    pages[0].save("red.png")
    pages[0].save("film.gif", save_all=True, append_images=pages[1:], duration=500)
    code, out, _ = puna("generate", "m", "What?", "--video", "film.gif", "--image", "red.png", "--frames", "2")
    assert (code, out) == (0, "forty-two\n")
    [message], _ = engine.asked[0]
    assert [part["type"] for part in message["content"]] == ["video", "image", "text"]
    assert message["content"][0] == {"type": "video", "video": Path("film.gif"), "frames": 2}
    Path("half.gif").write_bytes(Path("film.gif").read_bytes()[:40])
    Path("film.mp4").write_bytes(b"\0\0\0\x18ftypisom" + bytes(50))
    monkeypatch.setitem(sys.modules, "av", None)
    wrong = {"half.gif": "damaged", "no.gif": "cannot read the video no.gif: No such file",
             "red.png": "not an MP4, WebM, GIF or WebP", "film.mp4": "pip install 'puna[video]'"}  # fmt: skip
    for name, why in wrong.items():
        code, out, err = puna("generate", "m", "What?", "--video", name)
        assert code == 1 and name in err and why in err and len(err.splitlines()) == 1
    assert len(engine.asked) == 1, "told before a model is read"


def test_chat_keeps_a_conversation(puna, engine, monkeypatch, tmp_path):
    Image.new("RGB", (20, 10), "red").save(tmp_path / "red.png")
    pages = [Image.new("RGB", (20, 10), color) for color in ("red", "green")]
    pages[0].save("a film.gif", save_all=True, append_images=pages[1:], duration=500)
    lines = iter(["one", "/image no.png", "/video red.png", "/image red.png", "/video a film.gif", "two", "too long",
                  "stop me", "/new", "three", "/help"])  # fmt: skip

    def typed(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    code, out, _ = puna("chat", "m")
    assert "red.png: the video is not" in out and "your next message: image, video\n" in out
    assert code == 0 and "no.png" in out and "the context is full" in out and "(stopped)" in out
    roles = [[m["role"][0] for m in messages] for messages, _ in engine.asked]
    # the failed question leaves nothing behind; the stopped answer stays; /new forgets
    assert roles == [["u"], ["u", "a", "u"], ["u", "a", "u", "a", "u"], ["u", "a", "u", "a", "u"], ["u"]]
    assert engine.asked[1][0][1]["content"] == "forty-two"
    assert [part["type"] for part in engine.asked[1][0][2]["content"]] == ["image", "video", "text"]


def test_one_process_holds_a_run(tmp_path):
    with lock(tmp_path / "run") as folder:
        assert folder.is_dir()
        with pytest.raises(PunaError, match=f"process {os.getpid()}"), lock(tmp_path / "run"):
            pass
    with lock(tmp_path / "run"):  # free again
        pass
    with pytest.raises(PunaError, match="cannot use"), lock("/dev/null/run"):
        pass


def test_a_killed_process_frees_its_run(tmp_path):
    program = (
        "import sys, time; from puna.lock import lock\n"
        "with lock(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", program, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(PunaError, match=f"process {holder.pid}"), lock(tmp_path / "run"):
            pass
    finally:
        holder.kill()
        holder.wait()
    for _ in range(50):
        try:
            with lock(tmp_path / "run"):
                return
        except PunaError:
            time.sleep(0.1)
    pytest.fail("the lock of a killed process stayed")


def test_a_command_on_a_held_run_is_an_error(puna, quick):
    with lock("runs/tiny"):
        code, _, err = puna("pretrain", "tiny.py")
    assert code == 1 and "in use by process" in err
