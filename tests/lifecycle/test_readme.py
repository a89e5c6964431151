"""README's commands on people's own models, conversations and texts, as they stand there, on tiny stand-ins.

Only sizes are changed: a model of 50 thousand parameters lies where README says Scout, steps and rows are few.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
from lifecycle_helpers import begin, puna

from puna import load, nursery

README = Path(__file__).parents[2] / "README.md"
SMALLER = (
    ("nano_scout", "tiny.py"),
    ("--train.steps 200", "--train.steps 2"),
    ("--data.seq_len 4096", "--data.seq_len 128"),
)
SCOUT = "Llama-4-Scout-17B-16E-Instruct"


def commands(title: str) -> list[list[str]]:
    """The words of each `$ puna ...` line of a section."""
    section = re.search(rf"^## {title}\n(.*?)(?=^## )", README.read_text(encoding="utf-8"), re.S | re.M)[1]
    lines = re.findall(r"^\$ puna (.*)$", section, re.M)
    for big, small in SMALLER:
        lines = [line.replace(big, small) for line in lines]
    return [shlex.split(line) for line in lines]


@pytest.fixture(scope="module", params=["meta", "hf"])
def place(request, whole, tmp_path_factory):
    """A folder in which Scout's stand-in lies as Meta or Hugging Face would publish it, and a person's own data."""
    folder = tmp_path_factory.mktemp(request.param)
    puna(folder, "convert", str(whole), SCOUT, "--to", request.param)
    talk = {
        "messages": [{"role": "user", "content": "What grazes here?"}, {"role": "assistant", "content": "A llama."}]
    }
    (folder / "talks.jsonl").write_text((json.dumps(talk) + "\n") * 40, encoding="utf-8")
    (folder / "texts").mkdir()
    text = "".join(nursery.texts("en"))
    parts = [text[at : at + 1500] for at in range(0, 72 * 1500, 1500)]
    for number, part in enumerate(parts[:12]):
        (folder / "texts" / f"{number}.txt").write_text(part, encoding="utf-8")
    rows = [json.dumps({"text": part}) for part in parts[12:]]
    (folder / "pages.jsonl").write_text("\n".join([*rows, rows[0]]) + "\n", encoding="utf-8")
    return folder


def test_scout_is_loaded_converted_quantised_fine_tuned_and_leaves_home(place):
    for words in commands("Load Meta's Scout") + commands("Fine-tune it on your conversations"):
        out = puna(place, *words)
        if words[0] == "generate":
            assert out.strip(), words
    model, processor = load(place / "tuned")
    before, _ = load(place / SCOUT)
    moved = [name for name, p in model.named_parameters() if not p.equal(dict(before.named_parameters())[name])]
    assert processor is not None and moved, "nothing was learnt"
    assert (place / "scout-int4" / "run.json").is_file() and (place / "scout" / "config.json").is_file()


def test_a_corpus_of_ones_own_is_built_shown_and_trained_on(place):
    build, shown, train = commands("Bring your own corpus")
    puna(place, *build)
    written = json.loads((place / "corpus" / "corpus.json").read_text(encoding="utf-8"))
    assert written, "no account of what was kept"
    assert "notes" in puna(place, *shown)
    assert "step 2 of 2" in puna(place, *train)
    assert list((place / "runs" / "ours" / "pretrain").glob("step-*"))


def test_a_wrong_row_is_named_before_anything_is_trained(place):
    rows = (place / "talks.jsonl").read_text(encoding="utf-8").splitlines()
    (place / "talks.jsonl").write_text("\n".join(rows[:6] + ['{"messages": []}'] + rows[6:]) + "\n", encoding="utf-8")
    instead = {"mine": "other", "scout-int4": SCOUT}
    words = [instead.get(word, word) for word in commands("Fine-tune it on your conversations")[0]]
    process = begin(place, *words)
    _, err = process.communicate()
    assert process.returncode != 0 and "line 7" in err and "talks.jsonl" in err and "Traceback" not in err
    assert not list((place / "runs" / "other").glob("sft/step-*"))
