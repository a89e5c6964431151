"""Llama 4 as an executable specification: every rule once, in the plainest torch that states it.

What this is for.  `puna.model` is fast: it sorts tokens by expert, folds attention chunks into the batch and fuses
projections. This file does none of that.  Every expert runs on every token and a 0/1 mask picks the answer; every
attention mask is an explicit [B, T, S] table of booleans; rotations are multiplications of complex numbers; patches are
cut out by loops.  If the two agree, the fast one is right (tests/parity).  Read it from `reference_forward` downwards
to learn the architecture; "§n" is llama4-facts.md.

One layer (§1.6, §2.1), with h the residual stream:

    x = RMSNorm(h) ;  q, k, v = x Wq, x Wk, x Wv
    RoPE layers (three of four):  q, k rotated by position, then RMS-normalised (Scout); they see their own chunk only
    NoPE layers (every fourth):   q times 1 + 0.1 ln(floor((pos + 1) / 8192) + 1); they see everything before them
    h = h + softmax(q k' / sqrt(head_dim)) v Wo
    x = RMSNorm(h) ;  h = h + SwiGLU(x)                                  dense layer (Maverick's even layers)
                      h = h + Shared(x) + Expert_e(sigmoid(r_e) x),  e = argmax r,  r = x Wr      MoE layer

Every feature has a switch (`Switches`), so that a test can assert that it matters: a conformance test that passes with
the feature off has tested nothing.  Several switches are the bugs that real implementations had (§7.2): normalising
across heads, a sliding window instead of chunks, softmax scores, scores on the expert's output.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from puna.model.config import ModelConfig, VisionConfig

State = dict[str, Tensor]


@dataclass(frozen=True)
class Switches:
    """True everywhere is Llama 4.  Each field says what False does instead."""

    nope: bool = True  # False: every layer is a RoPE layer (rotated, chunked, normalised)
    chunk: bool = True  # False: RoPE layers see everything before them
    chunk_is_block: bool = True  # False: a sliding window of the chunk's length
    chunk_on_rope_only: bool = True  # False: NoPE layers are chunked too
    document_mask: bool = True  # False: a packed row is one long document for the masks
    document_positions: bool = True  # False: positions count from the start of the row, not of the document
    rope: bool = True  # False: no rotation at all
    rope_interleaved: bool = True  # False: pairs are (j, j + d/2), the "half-split" layout
    rope_scaling: bool = True  # False: Scout's scaling of the slow frequencies is left out
    qk_norm: bool = True  # False: no QK-norm
    qk_norm_per_head: bool = True  # False: one norm over all heads together
    qk_norm_on_rope_only: bool = True  # False: NoPE layers are normalised too
    temperature: bool = True  # False: no temperature tuning
    temperature_on_nope_only: bool = True  # False: on every layer
    top1_is_best: bool = True  # False: the second-best expert is taken
    sigmoid_score: bool = True  # False: softmax over the experts
    score_on_input: bool = True  # False: the score multiplies the expert's output
    shared_expert: bool = True  # False: routed experts only
    shared_unscaled: bool = True  # False: the shared expert's input is scaled by the score as well
    gate_first: bool = True  # False: the fused experts are read up || gate
    fusion: bool = True  # False: image features are not put in the patch tokens' places
    class_token_last: bool = True  # False: the class token (and its position row) goes first
    vision_positions: bool = True  # False: no learned positions
    vision_rope: bool = True  # False: no rotation in the vision tower
    vision_rope_2d: bool = True  # False: both halves of a head rotate by the column
    vision_rope_columns_first: bool = True  # False: rows first
    vision_norm_pre: bool = True  # False: no LayerNorm before the first layer
    vision_norm_post: bool = True  # False: no LayerNorm after the last layer
    patch_channel_major: bool = True  # False: pixels of a patch are (y, x, channel)
    shuffle_rows_outermost: bool = True  # False: pixel shuffle with the column offset outermost
    adapter_last_gelu: bool = True  # False: no activation after the adapter's last linear


@dataclass(frozen=True)
class ReferenceOutput:
    """logits_BTV and hidden_BTD (after the final norm) in the weights' dtype; routes: a [B, T] table of expert ids per
    MoE layer."""

    logits: Tensor
    hidden: Tensor
    routes: list[Tensor]


def reference_logits(
    state: State,
    config: ModelConfig,
    tokens_BT: Tensor,
    tiles: Tensor | None = None,
    doc_ids_BT: Tensor | None = None,
    **switches: bool,
) -> Tensor:
    """Logits [B, T, V] of Llama 4 for tokens [B, T]; see `reference_forward`."""
    return reference_forward(state, config, tokens_BT, tiles, doc_ids_BT, **switches).logits


def reference_forward(
    state: State,
    config: ModelConfig,
    tokens_BT: Tensor,
    tiles: Tensor | None = None,
    doc_ids_BT: Tensor | None = None,
    **switches: bool,
) -> ReferenceOutput:
    """The whole forward pass.

    state: puna's parameter names -> tensors, all float32 or all float64 (the arithmetic follows them; they may require
    gradients). tiles [N, 3, S, S], normalised to [-1, 1]: fill the positions of `config.patch_token` in reading order.
    doc_ids_BT [B, T]: documents packed in a row, -1 is padding; None: each row is one document.  What padding positions
    return is not specified.  Unknown switches raise TypeError.
    """
    on = Switches(**switches)
    B, T = tokens_BT.shape
    doc_ids_BT = torch.zeros_like(tokens_BT) if doc_ids_BT is None else doc_ids_BT
    pos_BT = positions_in_document(doc_ids_BT)
    if not on.document_positions:
        pos_BT = torch.arange(T, device=tokens_BT.device).expand(B, T)

    h_BTD = state["tok_embeddings.weight"][tokens_BT]
    if tiles is not None and on.fusion:
        features_MD = reference_image_features(state, config.vision, tiles, on).flatten(0, 1)
        h_BTD = h_BTD.masked_scatter((tokens_BT == config.patch_token)[..., None], features_MD.to(h_BTD.dtype))

    moe = moe_layers(config)
    routes: list[Tensor] = []
    for layer in range(config.n_layers):
        p = f"layers.{layer}."
        x_BTD = rms_norm(h_BTD, config.norm_eps) * state[p + "attention_norm.weight"]
        h_BTD = h_BTD + attention(state, p + "attention.", config, layer, x_BTD, pos_BT, doc_ids_BT, on)
        x_BTD = rms_norm(h_BTD, config.norm_eps) * state[p + "ffn_norm.weight"]
        if layer in moe:
            y_BTD, route_BT = mixture_of_experts(state, p + "moe.", x_BTD, on)
            routes.append(route_BT)
        else:
            y_BTD = swiglu(x_BTD, state[p + "feed_forward.w13.weight"].T, state[p + "feed_forward.w2.weight"].T)
        h_BTD = h_BTD + y_BTD
    hidden_BTD = rms_norm(h_BTD, config.norm_eps) * state["norm.weight"]
    head_VD = state["tok_embeddings.weight"] if config.tie_embeddings else state["output.weight"]
    return ReferenceOutput(hidden_BTD @ head_VD.T, hidden_BTD, routes)


# ------------------------------------------------------------------------------------------------- layers and positions


def moe_layers(config: ModelConfig) -> set[int]:
    """Layers with experts: those listed, or every `moe_step`-th: step 1 is all (Scout), step 2 is 1, 3, 5, ...
    (Maverick)."""
    if config.moe_layers is not None:
        return set(config.moe_layers)
    return {i for i in range(config.n_layers) if (i + 1) % config.moe_step == 0}


def nope_layers(config: ModelConfig) -> set[int]:
    """Layers without positions: those listed, or every fourth: 3, 7, 11, ... (§1.1)."""
    if config.nope_layers is not None:
        return set(config.nope_layers)
    return {i for i in range(config.n_layers) if (i + 1) % 4 == 0}


def positions_in_document(doc_ids_BT: Tensor) -> Tensor:
    """Position [B, T] of each token in its own document: how many earlier tokens of the row carry the same id."""
    same_BTS = doc_ids_BT[:, :, None] == doc_ids_BT[:, None, :]
    return same_BTS.tril(-1).sum(-1)


def attention_mask(pos_BT: Tensor, doc_ids_BT: Tensor, chunk: int | None, on: Switches) -> Tensor:
    """[B, T, S] booleans: may the query at T see the key at S?  Same document, not in the future, and (chunk given) the
    same block of `chunk` positions: floor(pos / chunk) equal (§1.6).  Position 8192 therefore sees only itself on a
    local layer."""
    T = pos_BT.shape[1]
    index_T = torch.arange(T, device=pos_BT.device)
    see_BTS = (index_T[:, None] >= index_T[None, :]).expand(pos_BT.shape[0], T, T)
    if on.document_mask:
        see_BTS = see_BTS & (doc_ids_BT[:, :, None] == doc_ids_BT[:, None, :])
    if chunk is not None and on.chunk_is_block:
        block_BT = pos_BT // chunk
        see_BTS = see_BTS & (block_BT[:, :, None] == block_BT[:, None, :])
    elif chunk is not None:
        see_BTS = see_BTS & (pos_BT[:, :, None] - pos_BT[:, None, :] < chunk)
    return see_BTS


def rope_frequencies(config: ModelConfig, scaled: bool) -> Tensor:
    """theta^(-2j/d) for j < d/2, in float32.  Scaling (Llama-3 type, Scout only): a wavelength L = 2 pi / f above
    original/low is slowed by `factor`, one below original/high stays, between them a linear blend; Scout's low = high =
    1 leaves no band between (§1.6)."""
    d = config.head_dim
    freq = 1.0 / config.rope_theta ** (torch.arange(0, d, 2, dtype=torch.float32) / d)
    s = config.rope_scaling
    if s is None or not scaled:
        return freq
    out = []
    for f in freq.tolist():
        wavelength = 2 * math.pi / f
        if wavelength < s.original_context / s.high_freq_factor:
            out.append(f)
        elif wavelength > s.original_context / s.low_freq_factor:
            out.append(f / s.factor)
        else:
            keep = (s.original_context / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
            out.append((1 - keep) * f / s.factor + keep * f)
    return torch.tensor(out, dtype=torch.float32)


def rotate(x_BTHd: Tensor, angle_BTJ: Tensor, interleaved: bool = True) -> Tensor:
    """Turns each pair of channels, read as one complex number, by its angle: pair j is channels (2j, 2j + 1)."""
    turn_BT1J = torch.polar(torch.ones_like(angle_BTJ), angle_BTJ)[:, :, None, :]
    if interleaved:
        pairs = torch.view_as_complex(x_BTHd.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn_BT1J).flatten(-2)
    first, second = x_BTHd.chunk(2, dim=-1)
    turned = torch.complex(first.contiguous(), second.contiguous()) * turn_BT1J
    return torch.cat((turned.real, turned.imag), dim=-1)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension; no weight."""
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)


def temperature(pos_BT: Tensor, config: ModelConfig, dtype: torch.dtype) -> Tensor:
    """1 + a ln(floor((pos + 1) / f) + 1): 1 up to position f - 2, then growing (§1.6 has test vectors)."""
    return 1 + config.attn_scale * torch.log((pos_BT + 1).div(config.floor_scale, rounding_mode="floor").to(dtype) + 1)


# ------------------------------------------------------------------------------------------------------------ attention


def attention(
    state: State,
    p: str,
    config: ModelConfig,
    layer: int,
    x_BTD: Tensor,
    pos_BT: Tensor,
    doc_ids_BT: Tensor,
    on: Switches,
) -> Tensor:
    """Grouped-query attention of one layer, in the order of §1.6: project, RoPE, QK-norm, temperature, softmax,
    project."""
    H, K, d = config.n_heads, config.n_kv_heads, config.head_dim
    local = not on.nope or layer not in nope_layers(config)
    wq, wk, wv = state[p + "wqkv.weight"].split((H * d, K * d, K * d))
    q_BTHd = (x_BTD @ wq.T).unflatten(-1, (H, d))
    k_BTKd = (x_BTD @ wk.T).unflatten(-1, (K, d))
    v_BTKd = (x_BTD @ wv.T).unflatten(-1, (K, d))

    if local and on.rope:
        angle_BTJ = pos_BT[..., None].float() * rope_frequencies(config, on.rope_scaling).to(pos_BT.device)
        q_BTHd = rotate(q_BTHd, angle_BTJ.to(x_BTD.dtype), on.rope_interleaved)
        k_BTKd = rotate(k_BTKd, angle_BTJ.to(x_BTD.dtype), on.rope_interleaved)
    if config.qk_norm and on.qk_norm and (local or not on.qk_norm_on_rope_only):
        q_BTHd = qk_norm(q_BTHd, config.norm_eps, on)
        k_BTKd = qk_norm(k_BTKd, config.norm_eps, on)
    if config.temperature_tuning and on.temperature and (not local or not on.temperature_on_nope_only):
        q_BTHd = q_BTHd * temperature(pos_BT, config, x_BTD.dtype)[:, :, None, None]

    chunked = on.chunk and (local or not on.chunk_on_rope_only)
    see_BTS = attention_mask(pos_BT, doc_ids_BT, config.chunk if chunked else None, on)
    out_heads = []
    for head in range(H):  # query head `head` reads key/value head `head // (H / K)`
        kv = head // (H // K)
        score_BTS = q_BTHd[:, :, head] @ k_BTKd[:, :, kv].transpose(1, 2) / math.sqrt(d)
        weight_BTS = score_BTS.masked_fill(~see_BTS, -math.inf).softmax(-1)
        out_heads.append(weight_BTS @ v_BTKd[:, :, kv])
    return torch.cat(out_heads, dim=-1) @ state[p + "wo.weight"].T


def qk_norm(x_BTHd: Tensor, eps: float, on: Switches) -> Tensor:
    """RMS over the channels of one head, without a weight.  A rotation keeps lengths, so before or after RoPE is the
    same number."""
    if on.qk_norm_per_head:
        return rms_norm(x_BTHd, eps)
    return rms_norm(x_BTHd.flatten(-2), eps).view_as(x_BTHd)


# --------------------------------------------------------------------------------------------- feed-forward and experts


def swiglu(x: Tensor, w13: Tensor, w2: Tensor, gate_first: bool = True) -> Tensor:
    """(SiLU(x W1) * (x W3)) W2 with input-major weights; w13 [D, 2F] holds the gate W1 in its first half, the
    up-projection W3 in its second."""
    first, second = (x @ w13).chunk(2, dim=-1)
    gate, up = (first, second) if gate_first else (second, first)
    return (torch.nn.functional.silu(gate) * up) @ w2


def mixture_of_experts(state: State, p: str, x_BTD: Tensor, on: Switches) -> tuple[Tensor, Tensor]:
    """Shared(x) + Expert_e(sigmoid(r_e) x) with e the argmax of the raw logits r (§2.1); also the table of chosen
    experts [B, T].

    The score multiplies the expert's *input*: SwiGLU is not linear, so this is not a weighting of its output, and it is
    how gradient reaches the router.  No capacity, no dropping, no renormalisation.
    """
    logits_BTE = x_BTD @ state[p + "router.weight"].T
    order_BTE = logits_BTE.argsort(-1, descending=True)
    chosen_BT = order_BTE[..., 0 if on.top1_is_best else 1]
    probability_BTE = logits_BTE.sigmoid() if on.sigmoid_score else logits_BTE.softmax(-1)
    score_BT1 = probability_BTE.gather(-1, chosen_BT[..., None])

    w13_EDF, w2_EFD = state[p + "experts.w13"], state[p + "experts.w2"]
    routed_BTD = torch.zeros_like(x_BTD)
    for e in range(w13_EDF.shape[0]):
        mine_BT1 = (chosen_BT == e)[..., None].to(x_BTD.dtype)
        if on.score_on_input:
            y_BTD = swiglu(x_BTD * score_BT1, w13_EDF[e], w2_EFD[e], on.gate_first)
        else:
            y_BTD = swiglu(x_BTD, w13_EDF[e], w2_EFD[e], on.gate_first) * score_BT1
        routed_BTD = routed_BTD + mine_BT1 * y_BTD
    if not on.shared_expert:
        return routed_BTD, chosen_BT
    shared_in_BTD = x_BTD if on.shared_unscaled else x_BTD * score_BT1
    return swiglu(
        shared_in_BTD, state[p + "shared.w13.weight"].T, state[p + "shared.w2.weight"].T
    ) + routed_BTD, chosen_BT


# -------------------------------------------------------------------------------------------------- vision (§3.1, §3.2)


def reference_image_features(state: State, vision: VisionConfig, tiles: Tensor, on: Switches | None = None) -> Tensor:
    """Tiles [N, 3, S, S] -> [N, tokens_per_tile, d_model]: patches, class token last, 34 layers, class token dropped,
    pixel shuffle, adapter, projector."""
    on = on or Switches()
    tiles = tiles.to(state["vision.class_embedding"].dtype)
    N, G = len(tiles), vision.image_size // vision.patch_size
    x_NPW = cut_patches(tiles, vision.patch_size, on.patch_channel_major) @ state["vision.patch_embedding.weight"].T
    class_N1W = state["vision.class_embedding"].expand(N, 1, -1)
    positions = state["vision.positional_embedding"]
    angle_PJ = vision_angles(G, x_NPW.shape[-1] // vision.heads, vision.rope_theta, on).to(x_NPW.dtype)
    if on.class_token_last:
        x_NPW = torch.cat((x_NPW, class_N1W), dim=1)
    else:
        x_NPW = torch.cat((class_N1W, x_NPW), dim=1)
    if on.vision_positions:
        x_NPW = x_NPW + positions
    if on.vision_norm_pre:
        x_NPW = layer_norm(state, "vision.norm_pre.", x_NPW, vision.norm_eps)
    for layer in range(vision.layers):
        p = f"vision.layers.{layer}."
        x_NPW = x_NPW + vision_attention(
            state, p + "attention.", layer_norm(state, p + "norm1.", x_NPW, vision.norm_eps), angle_PJ, vision, on
        )
        y_NPW = linear(state, p + "mlp.fc1.", layer_norm(state, p + "norm2.", x_NPW, vision.norm_eps))
        x_NPW = x_NPW + linear(state, p + "mlp.fc2.", gelu(y_NPW))
    if on.vision_norm_post:
        x_NPW = layer_norm(state, "vision.norm_post.", x_NPW, vision.norm_eps)
    x_NPW = x_NPW[:, :-1] if on.class_token_last else x_NPW[:, 1:]

    x_NQC = pixel_shuffle(x_NPW, G, round(1 / vision.pixel_shuffle), on.shuffle_rows_outermost)
    x_NQA = gelu(x_NQC @ state["vision.adapter.fc1.weight"].T) @ state["vision.adapter.fc2.weight"].T
    if on.adapter_last_gelu:
        x_NQA = gelu(x_NQA)
    return x_NQA @ state["vision.projector.weight"].T


def cut_patches(tiles: Tensor, size: int, channel_major: bool = True) -> Tensor:
    """[N, 3, S, S] -> [N, patches, 3 size^2]: patches in reading order, a patch's numbers in the order (channel, y,
    x)."""
    G = tiles.shape[-1] // size
    patches = []
    for row in range(G):
        for col in range(G):
            patch = tiles[:, :, row * size : (row + 1) * size, col * size : (col + 1) * size]
            patches.append((patch if channel_major else patch.permute(0, 2, 3, 1)).flatten(1))
    return torch.stack(patches, dim=1)


def vision_angles(grid: int, head_dim: int, theta: float, on: Switches) -> Tensor:
    """[patches + 1, head_dim / 2] angles: the first half of the pairs turns by (column + 1) f_j, the second by (row +
    1) f_j, with
    f_j = theta^(-2j / (head_dim/2)); the class token does not turn (§3.1)."""
    half = head_dim // 2
    freq = 1.0 / theta ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
    rows = []
    for patch in range(grid * grid):
        row, col = patch // grid, patch % grid
        by_col, by_row = (col + 1) * freq, (row + 1) * freq
        if not on.vision_rope_2d:
            by_row = by_col
        rows.append(torch.cat((by_col, by_row) if on.vision_rope_columns_first else (by_row, by_col)))
    still = torch.zeros(1, 2 * len(freq))
    table = torch.stack(rows)
    table = torch.cat((table, still) if on.class_token_last else (still, table))
    return table if on.vision_rope else torch.zeros_like(table)


def vision_attention(
    state: State, p: str, x_NPW: Tensor, angle_PJ: Tensor, vision: VisionConfig, on: Switches
) -> Tensor:
    """Full attention among the patches and class token of one tile: no mask, biases, 2-D RoPE, 1/sqrt(head_dim)."""
    q, k, v = (linear(state, p + name + ".", x_NPW).unflatten(-1, (vision.heads, -1)) for name in ("wq", "wk", "wv"))
    angle = angle_PJ.expand(len(x_NPW), -1, -1)
    q, k, v = (t.transpose(1, 2) for t in (rotate(q, angle), rotate(k, angle), v))
    weight_NHPP = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return linear(state, p + "wo.", (weight_NHPP @ v).transpose(1, 2).flatten(-2))


def pixel_shuffle(x_NPW: Tensor, grid: int, r: int, rows_outermost: bool = True) -> Tensor:
    """Space to depth: each r x r square of patches becomes one token; channels are (row offset, column offset, channel)
    (§3.2)."""
    x = x_NPW.unflatten(1, (grid, grid))
    offsets = [(i, j) for i in range(r) for j in range(r)]
    parts = [x[:, i::r, j::r] if rows_outermost else x[:, j::r, i::r] for i, j in offsets]
    return torch.cat(parts, dim=-1).flatten(1, 2)


def layer_norm(state: State, p: str, x: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps) * state[p + "weight"] + state[p + "bias"]


def linear(state: State, p: str, x: Tensor) -> Tensor:
    """x W' + b."""
    return x @ state[p + "weight"].T + state[p + "bias"]


def gelu(x: Tensor) -> Tensor:
    """x * Phi(x), the exact (erf) form."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
