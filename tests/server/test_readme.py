"""README's examples of clients, as they stand there, against a server: curl, Python, JavaScript.

JavaScript's needs node and the `openai` package: `npm install openai` in a folder, and PUNA_NODE_MODULES=FOLDER/
node_modules in the environment; without them that one is skipped.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from server_fakes import FakeEngine, running

from puna.serve import create_app

README = Path(__file__).parents[2] / "README.md"
ANSWER = "It is 42."


@pytest.fixture(scope="module")
def url():
    with running(create_app(FakeEngine(lambda messages: ANSWER), "nano_scout")) as url:
        yield url


def example(language, has):
    """README's code block of a language that contains `has`."""
    blocks = re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.S)
    [found] = [block for block in blocks if has in block]
    return found


def run(command, url, folder, code=None, **environment):
    result = subprocess.run(
        command, cwd=folder, text=True, capture_output=True, timeout=120, env={**os.environ, **environment}, input=code
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_curl(url, tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("no curl here")
    code = example("console", "$ curl").removeprefix("$ ").replace("http://127.0.0.1:8000", url)
    assert ANSWER in run(["sh", "-s"], url, tmp_path, code)


def test_python(url, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "picture.png")
    code = example("python", "from openai").replace("http://127.0.0.1:8000", url)
    assert run([sys.executable, "-"], url, tmp_path, code) == f"{ANSWER}\n"


def test_javascript(url, tmp_path):
    modules = os.environ.get("PUNA_NODE_MODULES", "")
    if shutil.which("node") is None or not (Path(modules) / "openai").is_dir():
        pytest.skip("needs node, and PUNA_NODE_MODULES with the openai package")
    (tmp_path / "node_modules").symlink_to(Path(modules).resolve())
    (tmp_path / "example.mjs").write_text(example("javascript", "openai").replace("http://127.0.0.1:8000", url))
    assert run(["node", "example.mjs"], url, tmp_path) == ANSWER


def test_every_line_of_what_is_defended_names_tests_that_exist():
    root = README.parent
    lines = [line for line in (root / "SECURITY.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert len(lines) > 15
    for line in lines:
        what, tests = line.strip("| ").split(" | ")
        file = ""
        for name in re.findall(r"`([^`]+)`", tests):
            path, _, test = name.partition("::")
            file = path or file
            found = next(p for p in (root / "tests/server" / file, root / file) if p.exists())
            assert not test or re.search(rf"^(def|class) {test}\b", found.read_text(), re.M), (what, name)
