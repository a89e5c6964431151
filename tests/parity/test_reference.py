"""The fast model against the literal one (`puna.testing.reference`), feature by feature, each with its switched-off
counterpart."""

import dataclasses

import pytest
import torch
from parity_helpers import (
    CHANGED,
    CHUNK,
    MAVERICK,
    SCOUT,
    SHAPES,
    TENSOR_TOLERANCE,
    assert_same,
    distance,
    strong_model,
    text,
    with_pictures,
)

from puna.model import Llama4, preset, rope
from puna.model.moe import record_routes
from puna.testing.reference import (
    Switches,
    attention_mask,
    pixel_shuffle,
    reference_forward,
    reference_image_features,
    reference_logits,
    rope_frequencies,
    temperature,
)

LENGTHS = (1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 3 * CHUNK + 5)


@pytest.fixture(scope="module", params=list(SHAPES))
def pair(request):
    """(model, its parameters by name)."""
    model = strong_model(SHAPES[request.param])
    return model, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("T", LENGTHS)
def test_text_at_chunk_borders(pair, T):
    model, state = pair
    tokens = text(model.config, T)
    with torch.no_grad(), record_routes(model) as routes:
        logits = model(tokens)
    truth = reference_forward(state, model.config, tokens)
    assert logits.dtype == torch.float32
    assert_same(logits, truth.logits)
    assert all(torch.equal(a, b) for a, b in zip(routes, truth.routes, strict=True))


def test_pictures(pair):
    model, state = pair
    tokens, tiles = with_pictures(model.config, 3 * CHUNK + 5)
    with torch.no_grad(), record_routes(model) as routes:
        logits = model(tokens, tiles)
        hidden = model.hidden(tokens, tiles)
    truth = reference_forward(state, model.config, tokens, tiles)
    assert_same(logits, truth.logits)
    assert_same(hidden, truth.hidden, "hidden")
    assert_same(model.image_features(tiles), reference_image_features(state, model.config.vision, tiles), "features")
    assert all(torch.equal(a, b) for a, b in zip(routes[: len(truth.routes)], truth.routes, strict=True))
    moved = tiles.clone()
    moved[0, 0, 0, 0] += 0.5  # one pixel of one tile
    assert distance(model(tokens, moved), logits) > 0
    assert distance(model(tokens, tiles.flip(0)), logits) > CHANGED  # tiles fill the patches in reading order


def test_float64_agrees_with_the_float64_reference():
    model = strong_model(SCOUT, dtype=torch.float64)
    tokens, tiles = with_pictures(SCOUT, 2 * CHUNK + 3)
    truth = reference_logits(dict(model.named_parameters()), SCOUT, tokens, tiles.double())
    assert model(tokens, tiles).dtype == torch.float64
    assert (
        distance(model(tokens, tiles), truth) < 1e-6
    )  # angles and temperatures are float32 in both, as in Meta's code


def test_tied_embeddings():
    config = dataclasses.replace(SCOUT, tie_embeddings=True)
    model = strong_model(config)
    state = dict(model.named_parameters())
    assert "output.weight" not in state
    tokens = text(config, CHUNK + 3)
    assert_same(model(tokens), reference_logits(state, config, tokens))


def test_a_dense_model_and_one_without_nope():
    for changes in ({"moe_layers": ()}, {"nope_layers": ()}, {"moe_layers": (0, 3), "nope_layers": (1, 2)}):
        config = dataclasses.replace(SCOUT, **changes)
        model = strong_model(config)
        tokens = text(config, 2 * CHUNK + 3)
        assert_same(model(tokens), reference_logits(dict(model.named_parameters()), config, tokens))


# Every switch of the reference but the two about packing (below).  Off must differ from the model; on must not.
SCOUT_ONLY = {"rope_scaling", "qk_norm", "qk_norm_per_head", "qk_norm_on_rope_only"}
PACKING = {"document_mask", "document_positions"}
FEATURES = [f.name for f in dataclasses.fields(Switches) if f.name not in PACKING]


@pytest.mark.parametrize("feature", FEATURES)
def test_switching_off_changes_the_output(pair, feature):
    model, state = pair
    if feature in SCOUT_ONLY and not model.config.qk_norm:
        tokens, tiles = with_pictures(model.config, 2 * CHUNK + 3)  # Maverick has neither: the switch must do nothing
        on, off = (reference_logits(state, model.config, tokens, tiles, **{feature: x}) for x in (True, False))
        assert torch.equal(on, off)
        return
    tokens, tiles = with_pictures(model.config, 3 * CHUNK + 5)
    with torch.no_grad():
        logits = model(tokens, tiles)
    assert_same(logits, reference_logits(state, model.config, tokens, tiles))
    off = reference_logits(state, model.config, tokens, tiles, **{feature: False})
    assert distance(off, logits) > CHANGED, feature


def test_an_unknown_switch_is_an_error():
    with pytest.raises(TypeError):
        reference_logits({}, SCOUT, text(SCOUT, 3), ropes=False)


# -------------------------------------------------------------------------------------------- NoPE, chunks, temperature


@pytest.mark.parametrize("name", SHAPES)
def test_nope_layers_are_every_fourth(name):
    config = preset(name)
    assert config.nope_layers == tuple(range(3, 48, 4))
    assert [m.attention.nope for m in strong_model(SHAPES[name]).layers][:5] == [False, False, False, True, False]


def test_a_chunk_border_cuts_local_layers_and_only_them():
    """Without a NoPE layer, position C sees only itself; C - 1 still sees position 0.  With one, C sees position 0
    too."""
    for nope, crosses in (((), False), ((3,), True)):
        config = dataclasses.replace(SCOUT, nope_layers=nope)
        model = strong_model(config)
        tokens = text(config, 2 * CHUNK + 1, B=1)
        changed = tokens.clone()
        changed[0, 0] = (tokens[0, 0] + 1 - 8) % 100 + 8
        gap_T = (model(tokens) - model(changed)).abs().amax(-1)[0]
        assert gap_T[CHUNK - 1] > 0
        assert (gap_T[CHUNK:] > 0).any() == crosses
        assert bool(gap_T[CHUNK] > 0) == crosses


def test_chunk_switch_acts_from_position_c_on():
    model = strong_model(dataclasses.replace(SCOUT, nope_layers=()))
    state = dict(model.named_parameters())
    tokens = text(SCOUT, CHUNK + 1)
    gap_T = (model(tokens) - reference_logits(state, model.config, tokens, chunk=False)).abs().amax(-1)[0]
    assert gap_T[CHUNK] > 1e-2 and gap_T[:CHUNK].max() < 1e-3


def test_mask_is_blocks_and_no_window():
    pos = torch.arange(7)[None]
    mask = attention_mask(pos, torch.zeros_like(pos), 3, Switches())[0].int().tolist()
    assert mask[2][:3] == [1, 1, 1] and mask[3] == [0, 0, 0, 1, 0, 0, 0] and mask[5] == [0, 0, 0, 1, 1, 1, 0]


TEMPERATURES = {
    0: 1, 8190: 1, 8191: 1.06931, 16383: 1.10986, 65535: 1.21972, 131071: 1.28332, 262143: 1.34965, 1048575: 1.48598,
    10485759: 1.71554,
}  # fmt: skip


def test_temperature_vector():
    """llama4-facts.md §1.6."""
    pos = torch.tensor([list(TEMPERATURES)])
    expected = torch.tensor([list(TEMPERATURES.values())])
    for factor in (temperature(pos, preset("scout"), torch.float64), rope.temperature(pos, preset("scout"))):
        torch.testing.assert_close(factor.float(), expected, atol=1e-5, rtol=0)


def test_temperature_acts_from_the_floor_on():
    model = strong_model(SCOUT)
    tokens = text(SCOUT, CHUNK)
    off = reference_logits(dict(model.named_parameters()), SCOUT, tokens, temperature=False)
    gap_T = (model(tokens) - off).abs().amax(-1)[0]
    assert gap_T[: SCOUT.floor_scale - 1].max() < 1e-3 and gap_T[SCOUT.floor_scale - 1] > 1e-3


def test_rope_scaling_of_scout():
    """Pairs 0..34 keep their speed, 35..63 turn 16 times slower (§1.6); Maverick is not scaled."""
    scout, plain = preset("scout"), rope_frequencies(preset("scout"), scaled=False)
    for scaled in (rope.frequencies(scout), rope_frequencies(scout, scaled=True)):
        ratio = (plain / scaled).round(decimals=4).tolist()
        assert ratio == [1.0] * 35 + [16.0] * 29
    assert torch.equal(rope.frequencies(preset("maverick")), plain)


def test_rope_scaling_with_a_blended_band():
    config = dataclasses.replace(SCOUT, rope_scaling=dataclasses.replace(SCOUT.rope_scaling, high_freq_factor=4.0))
    assert_same(rope.frequencies(config), rope_frequencies(config, True), "frequencies")
    assert distance(rope.frequencies(config), rope.frequencies(SCOUT)) > CHANGED


# -------------------------------------------------------------------------------------------------------------- packing


def pack(lengths: list[int], T: int) -> torch.Tensor:
    """Document ids of one row: documents of these lengths from the row's start (0 length: padding up to the next
    chunk)."""
    ids, used, number = torch.full((1, T), -1), 0, 0
    for length in lengths:
        if length == 0:
            used += -used % CHUNK
            continue
        ids[0, used : used + length] = number
        used, number = used + length, number + 1
    assert used <= T
    return ids


PACKINGS = {
    "short documents share chunks": [10, 22, 30, 0, 5, 20, 7],
    "a long one starts on a chunk": [20, 0, CHUNK + 9, 0, 2 * CHUNK, 12],
    "off the grid": [10, CHUNK + 3, 17, 40],
    "one document": [4 * CHUNK + 9],
    "shorter than a chunk": [7, 9],
}


@pytest.mark.parametrize("name", PACKINGS)
def test_packed_documents_equal_each_alone(pair, name):
    model, state = pair
    T = 20 if name == "shorter than a chunk" else 6 * CHUNK + 3
    ids = pack(PACKINGS[name], T).expand(2, T).clone()
    tokens = text(model.config, T)
    with torch.no_grad():
        packed = model(tokens, doc_ids_BT=ids)
        truth = reference_logits(state, model.config, tokens, doc_ids_BT=ids)
        valid = ids >= 0
        assert_same(packed[valid], truth[valid])
        for document in range(int(ids.max()) + 1):
            place = ids[0] == document
            assert_same(packed[:, place], model(tokens[:, place]))
        if len(PACKINGS[name]) > 1:
            for switch in PACKING:
                if switch == "document_positions" and T < CHUNK:
                    continue  # below chunk and floor only differences of positions matter
                off = reference_logits(state, model.config, tokens, doc_ids_BT=ids, **{switch: False})
                assert distance(off[valid], packed[valid]) > CHANGED, switch
            assert distance(model(tokens)[valid], packed[valid]) > CHANGED


def test_packed_pictures(pair):
    model, state = pair
    tokens, tiles = with_pictures(model.config, 3 * CHUNK)
    ids = torch.cat((torch.zeros(2, 20), torch.ones(2, 2 * CHUNK), torch.full((2, 12), 2)), 1).long()
    assert_same(model(tokens, tiles, ids), reference_logits(state, model.config, tokens, tiles, ids))


# --------------------------------------------------------------------------------------------------------------- vision


def test_class_token_is_last_and_dropped():
    """§3.1: changing the class token changes every feature, though it is dropped at the end; its position row is the
    last."""
    model = strong_model(SCOUT)
    tiles = torch.rand(2, 3, 16, 16) * 2 - 1
    before = model.image_features(tiles)
    assert before.shape == (2, SCOUT.vision.tokens_per_tile, SCOUT.d_model)
    with torch.no_grad():
        model.vision.positional_embedding[-1, 0] += 1
        after = model.image_features(tiles)
        model.vision.positional_embedding[-1, 0] -= 1
        model.vision.class_embedding[0] += 1
    assert distance(after, before) > CHANGED
    assert_same(model.image_features(tiles), after, "features")


def test_pixel_shuffle_is_space_to_depth_row_outermost():
    """§3.2: output (p, q), channel dr*2W + dc*W + k comes from patch (2p + dr, 2q + dc), channel k."""
    from puna.model.vision import pixel_shuffle as fast

    grid, width = 4, 3
    x = torch.arange(grid * grid * width).float().view(1, grid * grid, width)
    out = pixel_shuffle(x, grid, 2)
    assert torch.equal(out, fast(x, 2))
    for p in range(2):
        for q in range(2):
            for dr in range(2):
                for dc in range(2):
                    patch = (2 * p + dr) * grid + 2 * q + dc
                    start = dr * 2 * width + dc * width
                    assert torch.equal(out[0, 2 * p + q, start : start + width], x[0, patch])


def test_as_many_features_as_patches():
    model = strong_model(SCOUT)
    tokens, tiles = with_pictures(SCOUT, 50)
    for wrong in (tiles[:2], None):
        with pytest.raises(ValueError, match="patch"):
            model(tokens, wrong)
    with pytest.raises(ValueError, match="vision"):
        strong_model(dataclasses.replace(SCOUT, vision=None))(tokens, tiles)


# ------------------------------------------------------------------------------------------------------------ gradients


def gradients(model, tokens, tiles, ids):
    """Routes of one forward pass; leaves the gradient of a random combination of log-probabilities in the
    parameters."""
    weight = torch.randn(*tokens.shape, model.config.vocab_size, generator=torch.Generator().manual_seed(3))
    with record_routes(model) as routes:
        (model(tokens, tiles, ids).log_softmax(-1) * weight).mean().backward()
    state = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    truth = reference_logits(state, model.config, tokens, tiles, ids)
    (truth.log_softmax(-1) * weight).mean().backward()
    return routes, {n: t.grad for n, t in state.items()}


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_equal_the_reference(name):
    """Every parameter's gradient, pictures and packing included, against the float64 reference's autograd; router, all
    used experts (and no other) and vision tower get one."""
    config = SHAPES[name]
    tokens, tiles = with_pictures(config, 3 * CHUNK)
    ids = torch.cat((torch.zeros(2, 20), torch.ones(2, 2 * CHUNK), torch.full((2, 12), 2)), 1).long()
    model = strong_model(config, gain=1.0)  # gentler: without QK-norm, rounding alone reaches 1e-5 at the usual gain
    routes, truth = gradients(model, tokens, tiles, ids)
    for n, p in model.named_parameters():
        assert float(p.grad.norm()) > 0, f"no gradient reaches {n}"
        assert distance(p.grad, truth[n]) <= TENSOR_TOLERANCE, (n, distance(p.grad, truth[n]))
    moe = [layer.moe for layer in model.layers if hasattr(layer, "moe")]
    for layer, route in zip(moe, routes, strict=True):
        reached = layer.experts.w13.grad.flatten(1).norm(dim=1) > 0
        assert reached.nonzero().flatten().tolist() == route.unique().tolist()
    assert max(len(route.unique()) for route in routes) > 1

    sharp = strong_model(config, dtype=torch.float64)
    _, truth = gradients(sharp, tokens, tiles.double(), ids)
    for n, p in sharp.named_parameters():
        assert distance(p.grad, truth[n]) <= 5e-6, n


def test_an_expert_without_tokens_has_gradient_zero():
    """Not what uninitialised memory happens to hold: torch's deterministic mode fills that with NaN."""
    model = strong_model(MAVERICK, gain=1.0)
    tokens = text(MAVERICK, 3, B=1)
    torch.use_deterministic_algorithms(True)
    try:
        with record_routes(model) as routes:
            model(tokens).square().mean().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    for layer, route in zip((layer for layer in model.layers if hasattr(layer, "moe")), routes, strict=True):
        used = torch.zeros(MAVERICK.n_experts, dtype=torch.bool)
        used[route] = True
        assert not used.all()
        for w in (layer.moe.experts.w13, layer.moe.experts.w2):
            assert torch.equal(w.grad.flatten(1).norm(dim=1) > 0, used) and (w.grad[~used] == 0).all()


def test_the_router_learns_through_the_expert_s_input():
    """The score is the router's only path to the loss, so another way of using it is another gradient."""
    model = strong_model(SCOUT, gain=1.0)
    state = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    tokens = text(SCOUT, 40)
    model(tokens).square().mean().backward()
    reference_logits(state, SCOUT, tokens, score_on_input=False).square().mean().backward()
    for name, p in model.named_parameters():
        if name.endswith("router.weight"):
            assert float(p.grad.norm()) > 0
            assert distance(p.grad, state[name].grad) > 0.1, name


# --------------------------------------------------------------------------------------------------------------- counts


def meta(name: str):
    with torch.device("meta"):
        return Llama4(preset(name)).parameter_count()


def test_scout_count():
    """llama4-facts.md §1.3, every row."""
    n = meta("scout")
    assert (n.embedding, n.head, n.attention) == (1_034_485_760, 1_034_485_760, 3_019_898_880)
    assert (n.dense_ffn, n.routed_experts, n.shared_experts) == (0, 96_636_764_160, 6_039_797_760)
    assert (n.routers, n.norms, n.text, n.vision) == (3_932_160, 496_640, 107_769_861_120, 871_932_416)
    assert (n.active, n.active_without_embedding) == (17_172_894_720, 16_138_408_960)
    assert n.total == 108_641_793_536


def test_maverick_count():
    """llama4-facts.md §1.3, every row."""
    n = meta("maverick")
    assert (n.embedding, n.head, n.attention) == (1_034_485_760, 1_034_485_760, 3_019_898_880)
    assert (n.dense_ffn, n.routed_experts, n.shared_experts) == (6_039_797_760, 386_547_056_640, 3_019_898_880)
    assert (n.routers, n.norms, n.text, n.vision) == (15_728_640, 496_640, 400_711_848_960, 871_932_416)
    assert (n.active, n.active_without_embedding) == (17_184_691_200, 16_150_205_440)
    assert n.total == 401_583_781_376


def test_count_is_of_the_parameters():
    """The parts add up to what a materialised model holds, and only Maverick's odd layers have experts."""
    for config in (SCOUT, MAVERICK):
        model = strong_model(config)
        assert model.parameter_count().total == sum(p.numel() for p in model.parameters())
    assert preset("scout").moe_layers == tuple(range(48)) and preset("maverick").moe_layers == tuple(range(1, 48, 2))
    assert [hasattr(layer, "moe") for layer in strong_model(MAVERICK).layers] == [False, True] * 3


def test_behemoth_meets_what_was_published():
    """288B active, nearly 2T in all, 16 experts: the rest is our assumption."""
    n = meta("behemoth")
    assert 284e9 < n.active < 292e9 and 1.9e12 < n.total < 2.0e12 and preset("behemoth").n_experts == 16
