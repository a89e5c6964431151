"""Not fresh weights but trained ones: after real steps on pictures and text, what is exported is what was trained.

Training moves all that initial values leave special (a head of zeros, norms of one), packs documents, and holds a
balance bias that must not leave home. The export must give the same logits without any of it.
"""

import dataclasses

import pytest
import torch
from parity_helpers import CHANGED, CHUNK, SHAPES, assert_same, distance
from PIL import Image

import puna
from puna.convert import export_hf, load_hf
from puna.data import Batches, Mixture, pack
from puna.model import Llama4
from puna.model.moe import moe_layers, record_routes
from puna.train import Job, TrainConfig, train
from puna.train.metrics import read

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

STEPS, SEQ_LEN = 40, 2 * CHUNK
COLOURS = ("red", "green", "blue", "white", "black", "orange", "purple", "yellow")


def picture(colour, other="white"):
    """32 x 32, the upper half of another colour: four tiles and one of the whole."""
    image = Image.new("RGB", (32, 32), colour)
    image.paste(Image.new("RGB", (32, 16), other), (0, 0))
    return image


def documents():
    """Captioned pictures and sums."""
    seen = [[picture(a, b), f"{b} above, {a} below"] for a in COLOURS for b in COLOURS]
    return seen + [[f"{a} + {b} = {a + b}\n"] for a in range(20) for b in range(20)]


@pytest.fixture(scope="module", params=list(SHAPES))
def life(request, tmp_path_factory, tiny_processor):
    """(initial model, trained model, stage folder, batches) of a shape, after `STEPS` real steps."""
    folder, tokenizer = tmp_path_factory.mktemp(request.param), tiny_processor.tokenizer
    config = dataclasses.replace(SHAPES[request.param], vocab_size=tokenizer.vocab_size, patch_token=tokenizer.patch)
    encoded = tiny_processor.encode_documents(documents())
    rows = pack(encoded, SEQ_LEN, config.chunk, tokenizer.pad, image=(tokenizer.image_start, tokenizer.image_end))
    batches = Batches({"all": rows}, Mixture({"all": 1.0}, {"all": len(rows)}), tiny_processor, 8, prefetch=0)
    settings = TrainConfig(steps=STEPS, rows=8, accumulate=2, lr=1e-2, lr_adapter=0.1, warmup=2, balance=0.05,
                           threads=1, slice=128, compute_dtype="float32", checkpoint_every=1000)  # fmt: skip
    record = {"model": config.to_dict()}
    model = Llama4(config, seed=1)
    job = Job("stage", folder / "stage", model, tiny_processor, batches, settings, record, quiet=True)
    return Llama4(config, seed=1), train(job), folder / "stage", batches


def documents_of(model, processor, count=6):
    """Token rows and tiles of some whole conversations with pictures, the longest over several chunks."""
    for i in range(count):
        content = []
        for n in range(i + 1):
            content += [
                {"type": "image", "image": picture(COLOURS[n], COLOURS[n - 3])},
                {"type": "text", "text": "what?"},
            ]
        encoded = processor.encode_chat([{"role": "user", "content": content}], generation_prompt=True)
        yield torch.from_numpy(encoded.tokens).long()[None], processor.tiles(encoded.pictures)


def test_training_was_real(life):
    initial, model, stage, batches = life
    lines = [line for line in read(stage / "metrics.jsonl") if "loss" in line]
    assert len(lines) == STEPS and not any(line["skipped"] for line in lines)
    assert lines[0]["loss"] == pytest.approx(torch.tensor(float(model.config.vocab_size)).log().item(), rel=1e-4)
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert sum(line["tiles"] > 0 for line in lines) > STEPS / 2
    assert any(line["router/flip_share"] > 0 for line in lines)
    before = dict(initial.named_parameters())
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert not still, "a parameter never moved, so its export proves nothing"


def test_a_trained_model_is_the_same_in_transformers(life, tmp_path, tiny_processor):
    initial, model, stage, _ = life
    loaded, processor = puna.load(stage)  # as `puna convert` does
    folder = export_hf(loaded, processor, tmp_path / "hf")
    other, info = transformers.Llama4ForConditionalGeneration.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    other.eval()
    lengths = []
    with torch.no_grad():
        for tokens, tiles in documents_of(model, tiny_processor):
            lengths.append(tokens.shape[1])
            ours = model(tokens, tiles)
            theirs = other(input_ids=tokens, pixel_values=tiles, use_cache=False).logits
            assert_same(ours, theirs)
            assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
            assert distance(initial.eval()(tokens, tiles), theirs) > 0.5  # fresh weights would not do
            assert distance(model(tokens, -tiles), theirs) > CHANGED  # nor another picture
        tokens = torch.randint(10, 500, (2, 3 * CHUNK + 5), generator=torch.Generator().manual_seed(0))
        assert_same(model(tokens), other(input_ids=tokens, use_cache=False).logits)
    assert min(lengths) < 2 * CHUNK and max(lengths) > 4 * CHUNK


def test_a_document_packed_among_others_is_the_same_alone_in_transformers(life, tmp_path):
    """What training saw in packed rows is what the exported model answers for the document alone."""
    _, model, _, batches = life
    folder = export_hf(model, None, tmp_path / "hf")
    other = transformers.Llama4ForConditionalGeneration.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    batch, seen = batches(0), 0
    with torch.no_grad():
        packed = model(batch.tokens_BT, batch.tiles, batch.doc_ids_BT)
        tiles_of_row = torch.split(batch.tiles, batch.tiles_B)
        per_tile = model.config.vision.tokens_per_tile
        for row, tiles in enumerate(tiles_of_row):
            used = 0
            for doc in range(int(batch.doc_ids_BT[row].max()) + 1):
                place = (batch.doc_ids_BT[row] == doc).nonzero().squeeze(-1)
                assert len(place) == int(place[-1] - place[0]) + 1
                tokens = batch.tokens_BT[row, place][None]
                count = int((tokens == model.config.patch_token).sum()) // per_tile
                pictures = {"pixel_values": tiles[used : used + count]} if count else {}
                assert_same(packed[row, place][None], other(input_ids=tokens, use_cache=False, **pictures).logits)
                used, seen = used + count, seen + 1
            assert used == len(tiles)
    assert seen > 2 * len(batch.row_sources), "rows hold several documents"


def test_the_balance_bias_stays_at_home(life, tmp_path):
    """Routes of the trained model are those of its raw logits, before and after the journey."""
    _, model, _, batches = life
    assert not model.training and all(layer.selection_bias_E is None for layer in moe_layers(model))
    folder = export_hf(model, None, tmp_path / "hf")
    again, _ = load_hf(folder)
    batch = batches(1)

    def routes(each):
        with torch.no_grad(), record_routes(each) as found:
            each(batch.tokens_BT, batch.tiles, batch.doc_ids_BT)
        return torch.stack(found)

    assert torch.equal(routes(model), routes(again))
    for layer in moe_layers(model):
        layer.selection_bias_E = torch.arange(layer.n_experts).float() * 10
    assert torch.equal(routes(model.eval()), routes(again))
    assert not torch.equal(routes(model.train()), routes(again))
    for layer in moe_layers(model.eval()):
        layer.selection_bias_E = None
