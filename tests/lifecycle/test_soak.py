"""`kill -9` at random moments of every stage and of a conversion: the same command goes on, and nothing is lost.

Five kills here; PUNA_SOAK=N (or `-m slow`: 50) spreads N over the stages and the conversion. Moments are drawn from the
whole time a command takes, start-up, data, steps, checkpoints, evaluation and report included, and from the same seed
each time it is run with the same N; the time a kill really falls into is the machine's own. test_soak_data.py does the
same to the building of corpora and to larger conversions.
"""

import random
import shutil
import time

from lifecycle_helpers import checkpoints, differing, killed, losses, puna, same_course

STAGES = {"pretrain": 36, "midtrain": 24, "sft": 24}
PARTS = (*STAGES, "convert")


def progress(run):
    """How far a run is, in a word."""
    for stage in reversed(STAGES):
        if (run / stage).is_dir():
            return f"{stage} step {len(losses(run / stage))}, checkpoints {checkpoints(run / stage)}"
    return "before the first stage"


def soak_a_life(whole, folder, rand, kills):
    """Kills `puna raise` in each stage as often as `kills` says, then lets it end; returns how many really fell."""
    command, run, done = ("raise", "tiny.py"), folder / "runs" / "tiny", 0
    for stage, count in kills.items():
        for _ in range(count):
            before, had = losses(run / stage), max(checkpoints(run / stage), default=0)
            # From the start of the process on, or from a few steps behind where the last kill left the stage.
            late = rand.random() < 0.75
            goal = min(len(before) + rand.randrange(3), STAGES[stage] - 1) if late else -1
            delay = rand.uniform(0, 0.3) if late else rand.uniform(0.2, 6.0)
            fell = killed(folder, command, delay, lambda s=stage, g=goal: g < 0 or len(losses(run / s)) > g)
            done += fell
            verdict = "fell" if fell else "came too late"
            print(f"kill {done:3}  aimed at {stage:8}  {verdict}: {progress(run)}", flush=True)
            assert losses(run / stage)[:had] == before[:had], "steps behind a checkpoint were done again"
    out = puna(folder, *command)
    assert "goals met" in out
    for stage, steps in STAGES.items():
        assert differing(run / stage, whole / stage, steps) == [], stage
        same_course(run / stage, whole / stage)
        assert checkpoints(run / stage) == [steps] and not list((run / stage).glob(".step-*"))
    return done


def soak_a_conversion(whole, folder, rand, count):
    """Kills `puna convert` `count` times, ends each and compares every file; returns how many kills fell."""
    source, done = str(whole), 0
    for number in range(count):
        form = ("hf", "puna", "meta")[number % 3]
        words = ("convert", source, "out", "--to", form, *(("--shards", "1") if form == "meta" else ()))
        right = folder / f"right-{form}"
        if not right.exists():
            begun = time.monotonic()
            puna(folder, *words)
            (folder / "out").rename(right)
            took = time.monotonic() - begun
            (folder / f"{form}.seconds").write_text(str(took))
        took = float((folder / f"{form}.seconds").read_text())
        if rand.random() < 0.3:  # at any time of start-up too
            fell = killed(folder, words, took * rand.uniform(0.1, 1.0))
        else:  # a conversion of a tiny model takes a few hundredths of a second
            fell = killed(folder, words, rand.uniform(0, 0.05), lambda: (folder / ".out.part").exists())
        done += fell
        state = "complete" if (folder / "out").exists() else "begun" if (folder / ".out.part").exists() else "not begun"
        print(f"kill of convert --to {form}: {'fell' if fell else 'came too late'}, {state}", flush=True)
        if not (folder / "out").exists():
            puna(folder, *words)
        files = [{p.name: p.read_bytes() for p in f.iterdir()} for f in (folder / "out", right)]
        assert files[0] == files[1] and len(files[0]) > 3 and not (folder / ".out.part").exists(), form
        shutil.rmtree(folder / "out")
    return done


def test_killed_at_random_moments_everything_ends_bitwise_the_same(whole, tmp_path, kills):
    rand = random.Random(kills)
    each = {part: kills // len(PARTS) + (i < kills % len(PARTS)) for i, part in enumerate(PARTS)}
    print(f"{kills} kills: {each}")
    count = each.pop("convert")
    fell = soak_a_life(whole, tmp_path, rand, each) + soak_a_conversion(whole, tmp_path, rand, count)
    print(f"{fell} of {kills} kills fell; all stages and conversions ended bitwise the same")
    assert fell >= kills // 2, "most kills came after the end: nothing was tried"
