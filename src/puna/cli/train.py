"""`puna raise` and the stages one by one."""

from __future__ import annotations

import os
import shutil
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from puna.cli import show
from puna.cli.settings import claim, must_equal, run_config, run_folder, stage_config
from puna.errors import PunaError
from puna.fields import build, to_dict


def raise_(args) -> None:
    """Raises a model, or goes on with it, and shows its report."""
    from puna import life
    from puna.parallel.layout import world_size
    from puna.train import trackers

    if world_size() > 1:
        raise PunaError("puna raise runs on one process: under torchrun, train its stages one by one")
    run = run_config(args)
    folder = run_folder(run.name)
    trackers.check(tuple(args.track))
    report = life.raise_model(run, folder, minutes=args.minutes, fresh=args.fresh, track=tuple(args.track))
    show.report(report)
    print(f"\nreport   {folder / 'report.html'}\ntalk     puna chat {folder}\nserve    puna serve {folder} --open")
    if args.serve:
        from puna.serve import serve

        serve(folder, port=args.port, open_browser=True)


def stage(args) -> None:
    """Trains one stage in runs/NAME/<stage>, or goes on with it; a finished one is only shown. Started by torchrun,
    each process does its part, and the main one speaks."""
    from puna.parallel.layout import Layout, world_size
    from puna.train import trackers

    name = args.command
    run, init = stage_config(args, name)
    trackers.check(tuple(args.track))
    folder = run_folder(run.name)
    if world_size() > 1 or _one_gpu():
        from puna.parallel.mesh import processes

        with processes(run.parallel) as mesh:
            if not mesh.is_main:
                warnings.simplefilter("ignore")  # what all see, the main one says
            _train(args, name, run, init, folder, mesh)
            main = mesh.is_main
    else:
        if replace(run.parallel, dp_shard=run.parallel.dp_shard or 1) != Layout(dp_shard=1):
            raise PunaError("parallel: there is one process: start several with torchrun, or leave --parallel out")
        _train(args, name, run, init, folder, None)
        main = True
    if main:
        show.stage(folder / name)


def _one_gpu() -> bool:
    """Whether torchrun started this process alone on a machine with a GPU: a process of one, whose model is there."""
    if "RANK" not in os.environ:
        return False
    import torch

    return torch.cuda.is_available()


def _train(args, name: str, run, init: str | None, folder: Path, mesh) -> None:
    from puna import nursery
    from puna.lock import lock
    from puna.stages import RUN, make_processor
    from puna.stages.common import fit_model, is_finished

    main = mesh is None or mesh.is_main
    with lock(folder) if main else nullcontext():
        with mesh.main_first() if mesh else nullcontext():
            if args.fresh and main:
                shutil.rmtree(folder / name, ignore_errors=True)
                (folder / f"{name}.json").unlink(missing_ok=True)
            source = Path(init) if init else _before(folder, name, run.after)
            model, processor = _start(source) if source else (None, None)
            if init:
                if any(path.startswith("model.") for path, _ in args.overrides):
                    raise PunaError(f"with --init the model is that of {init}: leave --model settings out")
                run = run.with_model(model)
            if main:
                _claim(folder, run, name, init)
            if is_finished(folder, name):
                return
            if processor is None:
                processor = make_processor(run.tokenizer, run.model.vision, folder / "tokenizer", run.seed)
            nursery.verify()
        validation = {lang: nursery.texts(lang, "val")[:1] for lang in nursery.LANGUAGES}
        RUN[name](run.with_model(model or fit_model(run.model, processor)), folder, processor, init,
                  validation=validation, track=tuple(args.track), mesh=mesh)  # fmt: skip


def _before(folder: Path, name: str, after: str | None) -> Path | None:
    """The stage of this run that `name` starts from, finished; None for the first. after: the one it must be."""
    from puna.stages import STAGES
    from puna.stages.common import is_finished

    earlier = STAGES[: STAGES.index(name)]
    if name == "pretrain":
        earlier = (after,) if after else ()
    for stage in reversed(earlier):
        if (folder / stage).is_dir():
            if not is_finished(folder, stage):
                raise PunaError(
                    f"{folder / stage} is not finished: let `puna {stage}` run on, or give --init {folder / stage}"
                )
            return folder / stage
    if earlier:
        raise PunaError(f"{name} starts from a model: run `puna {earlier[-1]}` first, or give --init MODEL")
    return None


def _start(source: Path):
    """(ModelConfig, Processor) of the model to start from; its weights are not read."""
    from puna.convert.load import open_model

    store, processor = open_model(source)
    if processor is None:
        raise PunaError(f"{source} holds no tokenizer, so there is nothing to read data with: put tokenizer.json there")
    return store.config, processor


def _claim(folder: Path, run, name: str, init: str | None) -> None:
    """Holds this stage to the configuration it was begun with, whether alone or by `puna raise`."""
    from puna.convert.tensors import read_json
    from puna.stages import RunConfig

    def settings(run) -> dict:  # how many processes there are may change on the way
        return {key: value for key, value in to_dict(run).items() if key != "parallel"}

    asked = {"run": settings(run), "init": init}
    whole = folder / "config.json"
    if whole.is_file():
        raised = build(RunConfig, read_json(whole)["run"]).stage(name)
        must_equal({"run": settings(raised), "init": None}, asked, whole)
    claim(folder / f"{name}.json", asked)
