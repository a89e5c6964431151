"""`puna.load`: one function for every kind of model folder, told apart by what lies in it.

run.json + model.safetensors   a checkpoint
step-00000120/ ...             a stage: its newest checkpoint that is not damaged
[vision/] pretrain/ midtrain/ sft/   a run: its last finished stage
config.json                    a Hugging Face folder
adapter_config.json            adapters of PEFT's over one
params.json, *.pth             a folder of Meta's

`open_model` finds and checks the parameters without reading them: what `load` fills a model from and what
`puna convert` moves into other files.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch

from puna.convert import peft
from puna.convert.adapters import base_path, base_record, is_adapter, read_adapter, storage
from puna.convert.huggingface import open_hf
from puna.convert.layout import FileStore
from puna.convert.meta import is_meta, open_meta
from puna.convert.puna import MODEL_FILE, RUN_FILE, STEP, CorruptCheckpoint, load_checkpoint, open_checkpoint, read_run
from puna.convert.tensors import fill
from puna.convert.views import Adapters, Dequantizing, Merging, Quantizing, View, Watched
from puna.errors import PunaError
from puna.model import Llama4, ModelConfig, lora
from puna.precision.quantized import Quantization
from puna.processor import Processor

Found = TypeVar("Found")
STAGES = ("sft", "midtrain", "pretrain", "vision")  # the furthest in a model's life first


def load(
    path: str | os.PathLike, dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    quantize: str | None = None,
) -> tuple[Llama4, Processor | None]:  # fmt: skip
    """Loads a model: a run folder, a stage folder, a checkpoint folder, a Hugging Face folder (or an adapter of PEFT's)
    or a folder of Meta's.

    dtype: of the parameters; None keeps the stored type.  device: None is torch's default device.  quantize: "int4" or
    "int8" turns routed and shared experts into integers while they are read (precision/quantized.py).  What was stored
    as integers stays so, and adapters stay beside their base (`model.lora.merge` adds them).
    Returns (model in evaluation mode, processor); the processor is None where the folder holds no tokenizer.
    Errors: PunaError in one line with what to do.  A damaged newest checkpoint of a stage is skipped with a warning;
    one that was named is an error that names the tensor.
    """
    wish = None if quantize is None else Quantization(quantize)
    model, processor = _at(path, lambda folder: _load(folder, dtype, device, wish))
    return model.eval(), processor


def open_model(path: str | os.PathLike) -> tuple[FileStore | View, Processor | None]:
    """The same folders as `load`, found and checked but not read: (store, processor). Its parameters are plain ones:
    integers are brought back and adapters added as they are read."""
    return with_model(path, lambda store, processor: (store, processor))


def with_model(path: str | os.PathLike, use: Callable[[FileStore | View, Processor | None], Found]) -> Found:
    """`use(store, processor)` of what `open_model` finds. Damage of a stage's newest checkpoint may show only while
    `use` reads it: then there is a warning, and `use` is called again with the checkpoint before."""
    return _at(path, lambda folder: use(*_open(folder)))


def load_base(path: str | os.PathLike, base: str, expected: Mapping[str, str] | None = None) -> tuple[Llama4, dict]:
    """The model that adapters are to be trained beside, and what to keep about it in run.json.

    base: a LoRAConfig's. expected: hashes of the base of an earlier start; another base is a PunaError.
    """
    dtype, scheme = storage(base)
    wish = None if scheme is None else Quantization(scheme)
    model, hashes = _at(path, lambda folder: _watched(folder, dtype, None, wish, expected))
    return model, base_record(path, scheme, hashes)


def _at(path: str | os.PathLike, read: Callable[[Path], Found]) -> Found:
    """What `read` makes of the folder that `path` means; of a stage's checkpoints the newest that is whole."""
    folder = find(path)
    return _newest(folder, read) if checkpoints(folder) else read(folder)


def _load(folder: Path, dtype, device, wish: Quantization | None) -> tuple[Llama4, Processor | None]:
    """A folder as it was trained or stored."""
    found = _adapted(folder)
    if found is not None:
        if wish is not None:
            raise PunaError(f"{folder} holds adapters over a base of its own: leave quantize out")
        base, adapters, _, place = found
        wish = Quantization(base["quantize"]) if base["quantize"] else None
        model, _ = _at(place, lambda inner: _watched(inner, dtype, device, wish, base["hashes"]))
        device = model.tok_embeddings.weight.device
        lora.put(model, {name: (A.to(device), B.to(device), scale) for name, (A, B, scale) in adapters.items()})
        return model, _processor(folder) or open_model(place)[1]
    if wish is None and _is_checkpoint(folder):
        return load_checkpoint(folder, dtype, device)
    store, processor = _stored(folder)
    store, quantization = _quantized(store, wish, folder)
    return fill(store, dtype, device, quantization), processor


def _watched(folder: Path, dtype, device, wish: Quantization | None, expected: Mapping[str, str] | None):
    """(model, hash of every tensor as stored) of a base; one that is itself adapted counts with its adapters added."""
    store, _ = _base(folder)
    watched = Watched(store, str(folder), expected)
    source, quantization = _quantized(watched, wish, folder)
    return fill(source, dtype, device, quantization), watched.hashes


def _quantized(store: FileStore | View, wish: Quantization | None, folder: Path):
    """(the store as it is to be held, its quantisation)."""
    inner = store.store if isinstance(store, Watched) else store
    have = getattr(inner, "quantization", None)
    if have is not None and wish is not None and have.scheme != wish.scheme:
        raise PunaError(f"{folder} is stored as {have.scheme} already: it can't become {wish.scheme}")
    return (store, have) if have is not None or wish is None else (Quantizing(store, wish), wish)


def _open(folder: Path) -> tuple[FileStore | View, Processor | None]:
    """The plain parameters of a folder."""
    found = _adapted(folder)
    if found is not None:
        base, adapters, table, place = found
        store, processor = _at(place, _base)
        watched = Watched(store, str(place), base["hashes"])
        if getattr(store, "quantization", None) is not None:
            watched = Dequantizing(watched, store.quantization)
        elif base["quantize"]:
            quantization = Quantization(base["quantize"])
            watched = Dequantizing(Quantizing(watched, quantization), quantization)
        return Merging(watched, adapters, table), _processor(folder) or processor
    store, processor = _stored(folder)
    quantization = getattr(store, "quantization", None)
    return (store if quantization is None else Dequantizing(store, quantization)), processor


def _base(folder: Path) -> tuple[FileStore | View, Processor | None]:
    """What an adapter stands beside: a folder's tensors as they are stored, one that is adapted itself as a whole."""
    return _open(folder) if _adapted(folder) else _stored(folder)


def _stored(folder: Path) -> tuple[FileStore, Processor | None]:
    """What lies in the files of a folder that holds a whole model."""
    if _is_checkpoint(folder):
        return open_checkpoint(folder)
    return open_meta(folder) if is_meta(folder) else open_hf(folder)


def _adapted(folder: Path):
    """(base, adapters, where they lie, the base's place) of a folder of adapters, or None."""
    if checkpoints(folder):
        return _newest(folder, _adapted)
    if is_adapter(folder):
        base, adapters, table = read_adapter(folder)
        return base, adapters, table, base_path(base, folder)
    if peft.is_peft(folder):
        place = peft.base_of(folder)
        adapters, table = peft.read(folder, _at(place, _base)[0].config)
        return {"quantize": None, "hashes": None}, adapters, table, place
    return None


def open_adapters(path: str | os.PathLike) -> tuple[ModelConfig, Adapters, Path]:
    """(the model's configuration, its adapters, the folder of their base). PunaError for a model without adapters."""
    found = _adapted(find(path))
    if found is None:
        raise PunaError(f"{path} has no adapters: they are what a stage with --lora.rank trains")
    return _at(found[3], _base)[0].config, found[1], found[3]


def _processor(folder: Path) -> Processor | None:
    has = (folder / "tokenizer.json").is_file() and (folder / "processor.json").is_file()
    return Processor.load(folder) if has else None


def find(path: str | os.PathLike) -> Path:
    """The checkpoint, stage, Hugging Face or Meta folder that `path` means. Errors: PunaError if there is no model."""
    folder = Path(path).expanduser()
    if not folder.exists():
        raise PunaError(f"there is no model at {folder}: check the path")
    if not folder.is_dir():
        raise PunaError(f"{folder} is a file: give the folder it lies in")
    if _is_checkpoint(folder) or checkpoints(folder):
        return folder
    stages = [stage for stage in STAGES if checkpoints(folder / stage)]
    if stages:
        for stage in stages:
            if _finished(folder / stage):
                return folder / stage
        raise PunaError(f"no stage of {folder} is finished yet: let it run on, or load {folder / stages[0]} as it is")
    if is_meta(folder) or peft.is_peft(folder) or (folder / "config.json").is_file():
        return folder
    if (folder / MODEL_FILE).is_file():
        raise PunaError(
            f"{folder} holds {MODEL_FILE} but neither {RUN_FILE} (puna) nor config.json (Hugging Face): restore it"
        )
    raise PunaError(
        f"{folder} holds no model: expected run.json, step-* folders, stage folders, config.json or params.json"
    )


def identity(store: FileStore | View) -> str:
    """Which files a store reads: paths, sizes and times of change, so that a conversion knows its source again."""
    files = sorted({stored.path.resolve() for stored in store.table.values()})
    return "\n".join(f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files)


def _is_checkpoint(folder: Path) -> bool:
    files = ((folder / MODEL_FILE).is_file(), is_adapter(folder), bool(STEP.search(folder.name)))
    return (folder / RUN_FILE).is_file() and any(files)


def checkpoints(stage: Path) -> list[Path]:
    """The `step-*` folders of a stage, newest first; empty if it has none (or is none)."""
    if not stage.is_dir():
        return []
    found = [
        (int(match.group(1)), folder)
        for folder in stage.iterdir()
        if folder.is_dir() and (match := STEP.fullmatch(folder.name))
    ]
    return [folder for _, folder in sorted(found, reverse=True)]


def _newest(stage: Path, read: Callable[[Path], Found]) -> Found:
    """What `read` makes of the newest checkpoint of a stage that is not damaged."""
    damage = None
    for folder in checkpoints(stage):
        try:
            return read(folder)
        except CorruptCheckpoint as error:
            warnings.warn(f"{error}; trying the checkpoint before it", stacklevel=4)
            damage = damage or error
    raise PunaError(f"all checkpoints of {stage} are damaged; the newest: {damage}")


def _finished(stage: Path) -> bool:
    """Whether the newest checkpoint with a readable run.json says so."""
    for folder in checkpoints(stage):
        try:
            return read_run(folder).get("finished") is True
        except CorruptCheckpoint as error:
            warnings.warn(str(error), stacklevel=5)
    return False
