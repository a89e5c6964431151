"""`puna`: the commands, their arguments, and what becomes of errors.

Exit codes: 0 done; 1 a PunaError (one line on stderr, what was wrong and what to do); 2 a wrong command line;
3 `puna plan --must-fit` where nothing fits; 128 + n stopped by signal n with everything saved (`puna raise` again goes
on). Anything else is a bug and keeps its traceback. torch and its like are imported inside the commands, so that
`puna --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from importlib import import_module

from puna import __version__
from puna.cli.settings import split_overrides
from puna.errors import PunaError
from puna.fields import nearest

STAGES = {
    "vision": "train the vision tower alone: which names fit what its tokens see",
    "pretrain": "pre-train: text, code and pictures together",
    "midtrain": "mid-train: the same loss on longer documents",
    "sft": "fine-tune on conversations",
}


SFT = """

your own conversations, one JSON object a line, pictures by path (from the file's folder) or data URL:
  {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]}
  {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "cat.png"}},
                {"type": "text", "text": "What is it?"}]}, {"role": "assistant", "content": "A cat."}]}
  {"conversations": [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A cat."}],
   "images": ["cat.png"]}
every row is checked before anything is trained. For example:
  puna sft --init MODEL --data my.jsonl --name mine --train.steps 200 --train.lr 1e-5 --data.seq_len 4096
  puna convert runs/mine DST --to hf
docs/finetuning.md tells more."""


class Plain(argparse.HelpFormatter):
    """Leaves the lines of an epilog as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        first, *rest = text.split("\n\n", 1)
        return super()._fill_text(first, width, indent) + "".join(f"\n\n{part}" for part in rest)


class Parser(argparse.ArgumentParser):
    """ArgumentParser whose errors name the nearest valid word, and whose options are never abbreviated."""

    def __init__(self, *args, **kwargs):
        self.option_names: list[str] = []
        super().__init__(*args, **{"allow_abbrev": False} | kwargs)

    def add_argument(self, *names, **kwargs):
        self.option_names += [name for name in names if name.startswith("--")]
        return super().add_argument(*names, **kwargs)

    def error(self, message: str):
        found = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if found:
            valid = [word.strip(" '\"") for word in found.group(2).split(",")]
            word = found.group(1)
            message = f"there is no {word!r}; did you mean {nearest(word, valid)!r}? ({', '.join(valid)})"
        super().error(message)

    def unknown(self, words: list[str]):
        """Ends with an error about arguments nobody took."""
        first = words[0]
        if first.startswith("--"):
            guess = nearest(first.split("=")[0], self.option_names)
            self.error(f"no option {first.split('=')[0]}; did you mean {guess}?")
        self.error(f"too many arguments: {' '.join(words)}; put text with spaces in quotes")


def port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError("a port lies in 0..65535 (0: any free one)")
    return number


def count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return number


def build_parser() -> Parser:
    """All commands. Each names the function that does it as 'module:function' of this package."""
    top = Parser(prog="puna", description="The whole life of a Llama 4, from real data to a chat page that sees.",
                 epilog="puna COMMAND --help tells more.")  # fmt: skip
    top.add_argument("--version", action="version", version=f"puna {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, run: str, text: str, group=commands, **kwargs) -> Parser:
        parser = group.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", **kwargs)
        parser.set_defaults(run=run, parser=parser)
        return parser

    settings = "any setting can be given as --part.name VALUE: see `puna recipe show NAME` for all of them"
    p = command("raise", "train:raise_", "raise a model: tokenizer, pretrain, midtrain, sft, evaluation, report",
                epilog=settings)  # fmt: skip
    _recipe(p)
    p.add_argument("--minutes", type=float, metavar="N", help="scale the steps to about N minutes on this machine")
    p.add_argument("--serve", action="store_true", help="open the chat page afterwards")
    p.add_argument("--port", type=port, default=8000, help="of the chat page (default 8000)")
    for stage, text in STAGES.items():
        p = command(stage, "train:stage", text, epilog=settings + SFT * (stage == "sft"), formatter_class=Plain)
        _recipe(p)
        p.add_argument("--init", metavar="MODEL", help="start from this model (default: the run's stage before): a "
                       "run, stage, checkpoint, Hugging Face or Meta folder")  # fmt: skip
        p.add_argument("--data", metavar="FILE", help="train on this file or folder alone (text, JSONL of texts or "
                       "chats), not the recipe's mixture; short for --data.weights '{\"file:FILE\": 1}'")  # fmt: skip

    p = command("generate", "talk:generate", "answer one prompt")
    _model(p)
    p.add_argument("prompt", metavar="PROMPT", help="what to say to the model; - reads standard input")
    for kind, text in (("image", "a picture"), ("video", "frames of a video (pip install 'puna[video]')")):
        p.add_argument(f"--{kind}", action="append", default=[], metavar="PATH", dest="shown",
                       type=lambda path, kind=kind: (kind, path), help=f"show {text}; repeatable")  # fmt: skip
    _sampling(p)
    p.add_argument("--backend", choices=("puna", "transformers"), default="puna",
                   help="transformers: let it answer from an exported folder, as a check of ours")  # fmt: skip
    _engine(p)
    p = command("chat", "talk:chat", "talk to a model in the terminal")
    _model(p)
    _sampling(p)
    _engine(p)
    p = command("serve", "talk:serve", "serve an OpenAI-compatible API and the chat page")
    _model(p)
    p.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1: this machine alone")
    p.add_argument("--port", type=port, default=8000, help="default 8000; 0: any free one")
    p.add_argument("--open", action="store_true", help="open the page in a browser")
    _serving(p)
    _engine(p)

    p = command("convert", "tools:convert", "write a model in another format")
    p.add_argument("source", metavar="SRC", help="a run, stage, checkpoint, Hugging Face or Meta folder")
    p.add_argument("target", metavar="DST", help="the folder to write")
    p.add_argument("--to", required=True, choices=("puna", "hf", "meta", "peft"),
                   help="the format; peft: the adapters of a LoRA run alone; all others: with them added")  # fmt: skip
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of all weights (default: as they are)")
    p.add_argument("--shards", type=count, metavar="N", help="--to meta: files (default: the most that fit, up to 8)")
    p.add_argument("--fp8", action="store_true", help="--to meta: routed experts in fp8, as in Meta's Maverick FP8")
    p = command("quantize", "tools:quantize", "write a model whose experts are integers, for puna.load and LoRA")
    p.add_argument("source", metavar="SRC", help="a run, stage, checkpoint, Hugging Face or Meta folder")
    p.add_argument("target", metavar="DST", help="the folder to write")
    p.add_argument("--to", required=True, choices=("int4", "int8"), help="numbers in groups of 128 with a scale")
    p.add_argument("--targets", metavar="PATTERNS", help="parameter names, with commas between (default: "
                   "*.moe.experts.*,*.moe.shared.*)")  # fmt: skip
    p.add_argument("--report", action="store_true", help="then measure perplexity and tasks before and after")
    p = command("plan", "plan:plan", "what a model needs on given GPUs: memory, communication, time, dollars",
                epilog=settings)  # fmt: skip
    _plan(p)
    p = command("report", "tools:report", "show a run's results, or several runs beside each other")
    p.add_argument("folders", nargs="+", metavar="RUN", help="a run's folder or its name in runs/")
    p.add_argument("--out", metavar="FILE.html", help="write the page there (several runs: default compare.html)")

    verbs = _group(commands, "recipe", "list, show and copy recipes")
    command("ls", "tools:recipe_ls", "list the recipes", verbs)
    p = command("show", "tools:recipe_show", "print a recipe's resolved settings as JSON", verbs, epilog=settings)
    p.add_argument("recipe", metavar="NAME")
    p = command("cp", "tools:recipe_cp", "copy a recipe's code into a file of your own", verbs)
    p.add_argument("recipe", metavar="NAME")
    p.add_argument("file", metavar="FILE", help="a new .py file")

    verbs = _group(commands, "data", "list, build and look into data")
    command("ls", "data:ls", "list all data sources", verbs)
    p = command("build", "data:build_", "build a corpus from files, folders, datasets or object storage", verbs)
    p.add_argument(
        "out", metavar="OUT", help="the corpus's new folder, train on it as corpus:OUT; pasture: from pinned packages"
    )
    _build(p)
    p = command("show", "data:show_", "look into a source, a corpus or a recipe's mixture", verbs)
    p.add_argument("name", metavar="NAME", help="a source (text/en, sft/naming, file:PATH ...), a corpus or a recipe")
    p.add_argument("--samples", type=int, default=3, metavar="N", help="documents to print (default 3)")
    p.add_argument("--split", choices=("train", "val"), default="train")
    p.add_argument("--html", metavar="FILE", help="write a page with samples and pictures (corpus or recipe)")

    verbs = _group(commands, "tokenizer", "train a tokenizer, measure one")
    p = command("train", "tools:tokenizer_train", "train a recipe's tokenizer", verbs, epilog=settings)
    p.add_argument("recipe", nargs="?", default="nano_scout", metavar="RECIPE")
    p.add_argument("--out", required=True, metavar="FOLDER", help="where tokenizer.json and processor.json go")
    p = command("stats", "tools:tokenizer_stats", "tokens per word and bytes per token, by language", verbs)
    p.add_argument("tokenizer", metavar="PATH", help="a tokenizer.json or tokenizer.model, or a folder that holds one")
    p.add_argument("--against", action="append", default=[], metavar="PATH",
                   help="another file of ranks or tokenizer.json, or o200k (repeatable)")  # fmt: skip
    p.add_argument("--out", metavar="FILE", help="write the numbers as JSON, too")
    return top


def _group(commands, name: str, text: str):
    parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(parser=parser)
    return parser.add_subparsers(dest="verb", metavar="VERB", required=True)


def _serving(p: Parser) -> None:
    from puna.serve.limits import table

    p.add_argument("--engine", choices=("puna", "vllm"), default="puna",
                   help="vllm: serve an exported folder with vLLM, where it is installed (default puna)")  # fmt: skip
    p.add_argument("--name", metavar="NAME", help="of the model in the API (default: the folder's)")
    p.add_argument("--api-keys", metavar="FILE", help="a file of API keys, one a line; every address but /health then "
                   "wants one. PUNA_API_KEY in the environment is one more")  # fmt: skip
    limits = p.add_argument_group("limits", "what a request may hold, ask and take; also by the variable in brackets")
    for row in table():
        text = f"{row.doc} (default {row.default}) [{row.variable}]"
        limits.add_argument(row.flag, type=count, metavar="N", help=text)


def _engine(p: Parser) -> None:
    add = p.add_argument_group("engine", "our engine's own settings (docs/serving.md)").add_argument
    add("--batch-invariant", action="store_true", help="equal bits whatever else runs; several times slower")
    add("--speculate", type=count, metavar="N",
        help="guess N tokens at a time and check them at once, from the text itself, or by --draft")  # fmt: skip
    add("--draft", metavar="MODEL", help="a small model with the same tokenizer that guesses (4 tokens at a time, "
        "where --speculate says nothing else)")  # fmt: skip
    add("--cache-mb", type=count, metavar="N", help="most memory for keys and values of global layers, MiB "
        "(default: what all places can need); beyond it the youngest answers wait")  # fmt: skip
    add("--prefix-cache-mb", type=int, metavar="N",
        help="of these, kept for prompts that begin alike, MiB (default 128; 0: none)")  # fmt: skip


def _build(p: Parser) -> None:
    p.add_argument("--from", dest="inputs", nargs="+", metavar="[NAME=]SPEC",
                   help="files, folders, patterns, URLs, hf:DATASET; of copies the one named first stays")  # fmt: skip
    p.add_argument("--workers", type=count, metavar="N", help="processes (default: one a core)")
    p.add_argument("--licence", action="append", default=[], metavar="[NAME=]LICENCE", help="of an input, or of all")
    p.add_argument("--text-column", dest="text", metavar="NAME", help="of a row's text (default text)")
    p.add_argument("--min-bytes", type=int, metavar="N", help="of a text without pictures (default 50)")
    p.add_argument("--max-bytes", type=int, metavar="N", help="of a text without pictures (default 100,000,000)")
    p.add_argument("--min-letters", type=float, metavar="X", help="share of what isn't white space (default 0.4)")
    p.add_argument("--max-repeats", type=float, metavar="X", help="share in lines that came before (default 0.3)")
    p.add_argument("--languages", nargs="+", metavar="LANG", help="keep only these (default: all)")
    p.add_argument("--near", type=float, metavar="X", help="similarity of a near-duplicate (default 0.8; 0: off)")
    p.add_argument("--held-out", nargs="+", metavar="SPEC", help="texts that must not be met: no 13 words in a row")
    p.add_argument("--min-side", type=int, metavar="N", help="of a picture, in pixels (default 8)")
    p.add_argument("--max-aspect", type=float, metavar="X", help="long over short side of a picture (default 20)")
    p.add_argument("--skip-bad", action="store_true", help="count rows that can't be read, and go on")
    p.add_argument("--fresh", action="store_true", help="throw away what is there and start over")


def _plan(p: Parser) -> None:
    p.add_argument("recipe", metavar="MODEL", help="a preset (scout, maverick, behemoth ...), a recipe, a run's "
                   ".json or a model's folder")  # fmt: skip
    p.add_argument("--gpus", required=True, metavar="NxKIND", help="such as 8xh100; kinds are in the table of hardware")
    p.add_argument("--for", dest="purpose", choices=("training", "serving"), default="training",
                   help="default training")  # fmt: skip
    p.add_argument("--context", type=count, metavar="N", help="tokens of a row or a conversation (default 8192)")
    p.add_argument("--batch", type=count, metavar="N", help="training: rows a step (default: 16M tokens, or 2,048 a "
                   "GPU where that is more); serving: sequences at once (default: what fits, up to 256)")  # fmt: skip
    p.add_argument("--precision", metavar="NAME", help="training: mixed, fp8, bfloat16, float32 (default mixed); "
                   "serving: float32, bf16, fp8, int8, int4 (default: the largest from bf16 on that fits)")  # fmt: skip
    p.add_argument("--layout", metavar="NAME=N,...", help="training: this one alone, such as dp_shard=32,tp=2,ep=4")
    p.add_argument("--recompute", type=int, choices=(0, 1, 2, 4), help="training: every n-th layer runs forward twice, "
                   "0: none (default: as few as fit)")  # fmt: skip
    p.add_argument("--tiles", type=float, metavar="X", help="training: tiles of pictures in a row (default 0)")
    p.add_argument("--imbalance", type=float, metavar="X", help="training: tokens of the busiest experts' rank over "
                   "the mean (default 1)")  # fmt: skip
    p.add_argument("--tokens", type=float, metavar="N", help="training: of the whole run (default 1e12)")
    p.add_argument("--cache", metavar="NAME", help="serving: keys and values in bf16, fp8 or float32 (default bf16)")
    p.add_argument("--hardware", metavar="FILE.toml", help="your own table of GPUs, links and prices")
    p.add_argument("--json", metavar="FILE", help="write everything there, too")
    p.add_argument("--must-fit", action="store_true", help="exit with 3 where it does not fit")


def _recipe(p: Parser) -> None:
    p.add_argument("recipe", nargs="?", default="nano_scout", metavar="RECIPE",
                   help="a recipe's name, a .py file with a function recipe(), or a run's resolved .json")  # fmt: skip
    p.add_argument("--name", help="the run is kept in runs/NAME (default: the recipe's name)")
    p.add_argument("--seed", type=int, help="of weights and order")
    p.add_argument("--fresh", action="store_true", help="throw away what is there and start over")
    p.add_argument("--track", action="append", default=[], choices=("tensorboard", "trackio", "wandb"),
                   help="send the metrics there too (repeatable; pip install 'puna[track]')")  # fmt: skip


def _model(p: Parser) -> None:
    p.add_argument("model", metavar="MODEL", help="a run, stage, checkpoint, Hugging Face or Meta folder")


def _sampling(p: Parser) -> None:
    p.add_argument("--frames", type=count, default=8, metavar="N", help="of a video, evenly spaced (default 8)")
    p.add_argument("--max-tokens", type=int, default=256, metavar="N", help="default 256")
    p.add_argument("--temperature", type=float, default=0.0, metavar="X", help="default 0: always the likeliest token")
    p.add_argument("--top-p", type=float, default=1.0, metavar="X")
    p.add_argument("--top-k", type=int, default=0, metavar="N", help="default 0: off")
    p.add_argument("--seed", type=int, metavar="N", help="of the random draws")


def main(argv: list[str] | None = None) -> int:
    """Runs one command line; returns the exit code."""
    words, overrides = split_overrides(list(sys.argv[1:] if argv is None else argv))
    parser = build_parser()
    args, rest = parser.parse_known_args(words)
    if rest:
        args.parser.unknown(rest)
    if overrides and not (hasattr(args, "recipe") and args.parser.epilog):
        args.parser.error(f"this command takes no settings such as --{overrides[0][0]}")
    args.overrides = overrides
    warnings.formatwarning = lambda message, *_, **__: f"puna: warning: {message}\n"
    module, function = args.run.split(":")
    try:
        code = getattr(import_module(f"puna.cli.{module}"), function)(args)
        sys.stdout.flush()
        return code or 0
    except PunaError as error:
        print(f"puna: error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `puna recipe show X | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("\npuna: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        loop = sys.modules.get("puna.train.loop")  # a Stopped comes from there, so it is imported by then
        if loop is None or not isinstance(error, loop.Stopped):
            raise
        print(f"puna: {error}", file=sys.stderr)
        return error.code


if __name__ == "__main__":
    sys.exit(main())
