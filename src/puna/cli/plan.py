"""`puna plan`: what a model needs on given hardware."""

from __future__ import annotations

import json
from pathlib import Path

from puna.errors import PunaError
from puna.fields import nearest

FOR = {  # options that one of the two purposes has
    "training": ("layout", "recompute", "tiles", "imbalance", "tokens"),
    "serving": ("cache",),
}


def plan(args) -> int:
    """Prints a plan; 3 with --must-fit where nothing fits, else 0."""
    from puna.plan import hardware, show

    for purpose, options in FOR.items():
        for option in options:
            if purpose != args.purpose and getattr(args, option) is not None:
                raise PunaError(f"--{option} is for --for {purpose} alone")
    table = hardware.load(args.hardware)
    cluster = hardware.cluster(args.gpus, table)
    config, defaults = _model(args)
    console = show.make_console()
    context = args.context or defaults.get("seq_len", 8192)
    if context > config.max_context:
        raise PunaError(f"--context {context:,} is more than {args.recipe}'s {config.max_context:,}")
    show.model(console, config, args.recipe, cluster, context)
    plans, precisions, smallest, work = globals()[f"_{args.purpose}"](args, config, cluster, context, defaults, console)
    if not plans[0].fits:
        show.misses(console, config, plans[0], precisions, smallest)
    if table.prices:
        console.print(f"\nprices: {table.prices}; peaks and bandwidths: {cluster.gpu.source}")
    if args.json:
        from puna.processor.files import write_atomic

        values = show.as_json(config, cluster, work, plans, precisions, smallest)
        write_atomic(Path(args.json), json.dumps(values, indent=1) + "\n")
    return 3 if args.must_fit and not plans[0].fits else 0


def _training(args, config, cluster, context, defaults, console):
    from puna.plan import layout, show, training

    default = defaults.get("batch") or -(-max(2**24, 2048 * cluster.count) // context)
    work = training.Work(
        context, args.batch or default, args.precision or "mixed",
        args.tiles or 0.0, defaults.get("slice", 1024), args.imbalance or 1.0,
    )  # fmt: skip
    fixed = layout.check(config, layout.parse(args.layout), cluster.count, context) if args.layout else None
    plans = training.suggest(config, cluster, work, fixed, args.recompute)
    show.training(console, plans, args.tokens or 1e12)
    if plans[0].fits:
        return plans, [], None, work
    fitting = training.precisions_that_fit(config, cluster, work)
    return plans, fitting, training.smallest(config, cluster, work), work


def _serving(args, config, cluster, context, defaults, console):
    from puna.plan import serving, show

    work = serving.ServingWork(context, args.batch or 0, args.precision or "bf16", args.cache or "bf16")
    if args.precision is None:  # the largest that fits
        tries = [serving.serve(config, cluster, w) for w in serving.every_precision(work)]
        made = next((made for made in tries if made.fits), tries[0])
        if made.precision != "bf16" and made.fits:
            console.print(f"\nbf16 does not fit: {tries[0].over / 1e9:,.2f} GB are missing on each GPU")
        work = serving.ServingWork(context, work.batch, made.precision, work.cache)
    made = serving.serve(config, cluster, work)
    show.serving(console, made)
    if made.fits:
        return [made], [], None, work
    return [made], serving.precisions_that_fit(config, cluster, work), serving.smallest(config, cluster, work), work


def _model(args):
    """(the configuration that a preset, recipe or model folder means, what a recipe says about its training)."""
    from puna.model.config import PRESETS, preset
    from puna.recipes import RECIPES

    name = args.recipe
    if name in RECIPES or name.endswith((".py", ".json")):
        from puna.cli.settings import run_config

        run = run_config(args)
        stage = run.pretrain
        return run.model, {"seq_len": stage.data.seq_len, "batch": stage.train.rows, "slice": stage.train.slice}
    if args.overrides:
        raise PunaError(f"{name} is no recipe: settings such as --{args.overrides[0][0]} are a recipe's")
    if name in PRESETS:
        return preset(name), {}
    if Path(name).exists():
        from puna.convert import open_model

        return open_model(name)[0].config, {}
    raise PunaError(f"there is no model, recipe or folder {name!r}; did you mean "
                    f"{nearest(name, [*PRESETS, *RECIPES])!r}?")  # fmt: skip
