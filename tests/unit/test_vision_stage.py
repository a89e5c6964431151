"""The tower apart: what tokens show, the loss against a literal one, and that nothing but the tower learns."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from training_helpers import CONFIG, PATCH, changed, lively_model, random_batch, values

from puna import recipes
from puna.data import DataConfig
from puna.errors import PunaError
from puna.model import VisionConfig
from puna.optim.adamw import group_of
from puna.processor.image import ImageProcessor
from puna.stages import TokenizerConfig, make_processor
from puna.stages.common import fit_model, run_stage
from puna.stages.config import StageRun
from puna.stages.pretrain import pretrain
from puna.stages.vision import LookBatches, classes, vision
from puna.tasks.looking import NOTHING, Shown, shown
from puna.tasks.pictures import EmojiPicture, Scene, by_id, scene_concepts, styles
from puna.train import TrainConfig
from puna.train.step import accumulate_gradients
from puna.train.terms import Names, iou

IMAGE = ImageProcessor(64, 16, 4)
EYE = VisionConfig(image_size=16, patch_size=4, width=16, layers=1, heads=2, mlp_width=32, adapter_width=16)


def by_pixels(scene: Scene, image: ImageProcessor) -> list[Shown]:
    """The same as `shown`, by counting the pixels of each cell in masks of the boxes."""
    masks = []
    for spot in scene.objects:
        mask = np.zeros((scene.side, scene.side), bool)
        mask[spot.top : spot.bottom, spot.left : spot.right] = True
        masks.append(mask)
    n = scene.side // image.tile  # tiles a side
    places = [(r * image.tile, c * image.tile, image.tile) for r in range(n) for c in range(n)]
    if n > 1:
        places.append((0, 0, scene.side))
    found = []
    for top, left, edge in places:
        for i in range(2):
            for j in range(2):
                y, x, cell = top + i * edge // 2, left + j * edge // 2, edge // 2
                shares = [m[y : y + cell, x : x + cell].sum() / min(cell * cell, m.sum()) for m in masks]
                best = int(np.argmax(shares))
                if shares[best] < 0.25:
                    found.append(Shown(NOTHING))
                    continue
                ys, xs = masks[best][top : top + edge, left : left + edge].nonzero()
                edges = (xs.min() / edge, ys.min() / edge, (xs.max() + 1) / edge, (ys.max() + 1) / edge)
                found.append(Shown(scene.objects[best].concept, tuple(map(float, edges))))
    return found


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("side", [64, 128])
def test_what_tokens_show_is_what_pixels_say(seed, side):
    scene = Scene(seed, "train", side)
    tokens, pixels = shown(scene, IMAGE), by_pixels(scene, IMAGE)
    assert len(tokens) == len(IMAGE.tiles(scene.open())) * IMAGE.tokens_per_tile
    assert [a.concept for a in tokens] == [b.concept for b in pixels] and any(a.concept for a in tokens)
    for a, b in zip(tokens, pixels, strict=True):
        assert (a.edges is None) == (b.edges is None) and (a.edges is None or a.edges == pytest.approx(b.edges))


def test_a_single_picture_shows_its_thing_everywhere():
    concept = scene_concepts()[0]
    assert shown(EmojiPicture(concept, styles(concept)[0], 5), IMAGE) == [Shown(concept)] * 4


WORDS = [(20,), (21, 22), (23,), (20, 24), (PATCH,)]  # of several tokens, and the last is nothing


def looked(batch):
    """A random batch as the stage's batches are: patch tokens have a class and, every second one, edges."""
    patch = batch.tokens_BT == PATCH
    edges = torch.full((*patch.shape, 4), math.nan)
    where = patch.nonzero()[::2]
    low, high = torch.rand(2, len(where), 2, generator=torch.Generator().manual_seed(1)).sort(0).values
    edges[where[:, 0], where[:, 1]] = torch.cat([low, high], 1)
    targets = torch.where(patch, torch.arange(patch.shape[1]) % len(WORDS), 0)
    return dataclasses.replace(batch, targets_BT=targets, valid_BT=patch, extra={"edges": edges})


def literal(model, batch) -> float:
    """The loss of `Names`, token by token."""
    features = model.image_features(batch.tiles).flatten(0, 1).detach().double()
    table = model.tok_embeddings.weight.detach().double()
    total, length = 0.0, float(table.norm(dim=-1).mean())
    directions = Names(model, WORDS).directions_4D.double()
    classes = [sum(table[word] / table[word].norm() for word in words) for words in WORDS]
    places = batch.valid_BT.nonzero().tolist()
    for f, (b, t) in zip(features, places, strict=True):
        cosines = [float(f @ each / f.norm() / each.norm()) for each in classes]
        target = int(batch.targets_BT[b, t])
        weight = 0.1 if target == len(WORDS) - 1 else 1.0
        total += weight * (math.log(sum(math.exp(c * 15) for c in cosines)) - 15 * cosines[target])
        total += 0.1 * (float(f.norm()) / length - 1) ** 2
        true = batch.extra["edges"][b, t].tolist()
        if not math.isnan(true[0]):
            told = [0.5 + 2 * float(f @ direction / f.norm()) for direction in directions]
            total += 1.5 * sum(abs(a - b) for a, b in zip(told, true, strict=True)) + 1.8 * (1 - overlap(told, true))
    return total


def overlap(a, b) -> float:
    """IoU of two boxes, by what they share."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / (sum(max(x[2] - x[0], 0) * max(x[3] - x[1], 0) for x in (a, b)) - shared)


def test_the_loss_is_the_literal_one_whatever_the_slices():
    model, batch = lively_model(), looked(random_batch())
    count = int(batch.valid_BT.sum())
    expected = literal(model, batch)
    for slices in (1, 3, 1024):
        total, metrics = accumulate_gradients(model, batch, Names(model, WORDS), count, slices)
        assert float(total) == pytest.approx(expected, rel=1e-5)
        assert int(metrics["edges"]) == count // 2
        assert int(metrics["something"]) == int((batch.targets_BT[batch.valid_BT] < len(WORDS) - 1).sum()) < count
    without = dataclasses.replace(batch, extra={"edges": torch.full_like(batch.extra["edges"], math.nan)})
    assert float(accumulate_gradients(model, without, Names(model, WORDS), count, 1024)[0]) < expected - 1e-3


def test_boxes_overlap():
    box = torch.tensor([[0.0, 0.0, 0.5, 0.5]])
    others = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.25, 0.0, 0.75, 0.5], [0.6, 0.6, 0.9, 0.9], [0.4, 0.4, 0.1, 0.1]])
    assert iou(others, box.expand(4, 4)).tolist() == pytest.approx([1, 1 / 3, 0, 0])


def test_nothing_but_the_tower_gets_a_gradient():
    model, batch = lively_model(), looked(random_batch())
    accumulate_gradients(model, batch, Names(model, WORDS), 8, 1024)
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {name for name, _ in model.named_parameters() if name.startswith("vision.")}


def test_micro_batches_take_their_own_part_of_what_a_loss_needs_besides():
    batch = looked(random_batch())
    parts = batch.split(2)
    joined = torch.cat([part.extra["edges"] for part in parts])
    assert torch.equal(joined.nan_to_num(9.0), batch.extra["edges"].nan_to_num(9.0))


@pytest.fixture(scope="module")
def run_and_processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    processor = make_processor(TokenizerConfig(400, chars=3000, code_chars=3000), EYE, folder / "tokenizer", 0)
    model = fit_model(dataclasses.replace(CONFIG, vision=EYE, chunk=64), processor)
    data = DataConfig(128, {"captions": 0.5, "scenes": 0.5}, 0, {"captions": {"items": 60}, "scenes": {"items": 20}})
    train = TrainConfig(steps=4, rows=2, lr=3e-3, warmup=1, checkpoint_every=2, threads=1, compute_dtype="float32")
    return StageRun("vision", "v", model, TokenizerConfig(400), data, train), processor


def test_only_the_tower_learns_and_pretraining_begins_with_it(tmp_path, run_and_processor):
    run, processor = run_and_processor
    from puna.model import Llama4

    before = values(Llama4(run.model, seed=0))
    model = vision(run, tmp_path, processor, quiet=True)
    learnt = changed(before, values(model))
    assert learnt == {name for name in before if name.startswith("vision.")}
    assert all(p.requires_grad for p in model.parameters()), "the next stage learns all"
    text = dataclasses.replace(run.data, weights={"captions": 1.0}, options={"captions": {"items": 60}})
    frozen = dataclasses.replace(run.train, steps=1, lr=1e-12)
    after = dataclasses.replace(run, stage="pretrain", data=text, train=frozen, after="vision")
    with pytest.raises(PunaError, match="run `puna vision`, or --init"):
        pretrain(after, tmp_path / "other", processor, quiet=True)
    start = pretrain(after, tmp_path, processor, quiet=True)
    name = "vision.projector.weight"
    assert torch.allclose(start.state_dict()[name], model.state_dict()[name], atol=1e-6)
    assert not torch.allclose(start.state_dict()[name], before[name], atol=1e-4)


def test_a_tower_whose_rates_are_zero_stays_as_it_is(tmp_path, run_and_processor):
    run, processor = run_and_processor
    from puna.model import Llama4

    before = values(Llama4(run.model, seed=0))
    text = dataclasses.replace(run.data, weights={"captions": 1.0}, options={"captions": {"items": 60}})
    still = dataclasses.replace(run.train, steps=2, lr_vision=0.0, lr_sight=0.0, lr_adapter=0.0)
    for train, everything in ((still, False), (dataclasses.replace(still, lr_sight=1.0), True)):
        after = dataclasses.replace(run, stage="pretrain", data=text, train=train)
        model = pretrain(after, tmp_path / str(everything), processor, quiet=True)
        assert all(p.requires_grad for p in model.parameters()), "the next stage may learn all"
        learnt = {name for name in changed(before, values(model)) if name.startswith("vision.")}
        norms = {name for name in before if group_of(name, model.get_parameter(name)) == "sight"}
        assert learnt == (norms if everything else set())
        assert "layers.0.attention.wqkv.weight" in changed(before, values(model))


def test_a_still_tower_is_for_one_process(tmp_path, run_and_processor):
    run, processor = run_and_processor
    still = dataclasses.replace(run.train, lr_vision=0.0, lr_sight=0.0, lr_adapter=0.0)
    run = dataclasses.replace(run, stage="pretrain", train=still)
    with pytest.raises(PunaError, match="lr_adapter of 0 .* leave torchrun out"):
        run_stage(run, tmp_path, processor, mesh=SimpleNamespace(is_main=True), quiet=True)


def test_targets_are_names_at_patch_tokens_and_depend_on_the_step_alone(tmp_path, run_and_processor, monkeypatch):
    run, processor = run_and_processor
    seen = []
    monkeypatch.setattr("puna.stages.common.train", lambda job: seen.append(job) or job.model)
    vision(run, tmp_path, processor, quiet=True)
    batches = seen[0].source
    assert isinstance(batches, LookBatches)
    batch, again = batches.build(1), batches.build(1)
    assert torch.equal(batch.targets_BT, again.targets_BT) and torch.equal(batch.tiles, again.tiles)
    patch = batch.tokens_BT == processor.tokenizer.patch
    assert batch.valid_BT.any() and not (batch.valid_BT & ~patch).any()
    assert torch.equal(batch.doc_ids_BT >= 0, patch)
    names, class_of = classes(processor)
    assert names[-1] == (processor.tokenizer.patch,) and len(set(names)) == len(names)
    assert all(processor.tokenizer.decode(names[class_of[c]]) == by_id()[c].names["en"] for c in list(by_id())[:50])
    shown_here = set(batch.targets_BT[batch.valid_BT].tolist())
    assert len(names) - 1 in shown_here and len(shown_here) > 3, "nothing, and several things"
    known = batch.extra["edges"].isfinite().all(-1)
    assert known.any() and not (known & ~batch.valid_BT).any()
    batches.close()


def test_without_a_tower_or_without_the_stage_it_says_so(tmp_path, run_and_processor):
    run, processor = run_and_processor
    blind = run.with_model(dataclasses.replace(run.model, vision=None))
    with pytest.raises(PunaError, match="model.vision is none"):
        vision(blind, tmp_path, processor, quiet=True)
    with pytest.raises(PunaError, match="has no stage 'vision': it has pretrain, midtrain, sft"):
        recipes.get("nano_scout", 12).stage("vision")
    assert recipes.get("nano_scout", 60).stages == ("vision", "pretrain", "midtrain", "sft")


def test_other_pictures_show_nothing_known():
    class Photo(EmojiPicture.__mro__[1]):
        kind = "photo of a test"
        size = (64, 64)

        def open(self):
            return Image.new("RGB", self.size)

    assert shown(Photo(), IMAGE) == [Shown()] * 4
