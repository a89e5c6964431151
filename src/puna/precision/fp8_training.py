"""Training whose large products multiply FP8 numbers: twice bfloat16's rate on a GPU that has them, the rest unchanged.

A linear layer is three products, and each is rows of one matrix times rows of another, summed along the last dimension:

    forward          y  [T, N] = x    [T, K] . w    [N, K]
    input gradient   dx [T, K] = dy   [T, N] . w^T  [K, N]
    weight gradient  dw [N, K] = dy^T [N, T] . x^T  [K, T]

Both factors are rounded to FP8 with scales from their present values (dynamic scaling), multiplied, summed in float32
and multiplied by both scales. Nothing else knows: master weights, optimizer, names and checkpoints are as without, and
in evaluation mode the products are too. The recipes:

    rowwise      a scale a row of each factor, so along what is summed; all e4m3. An outlier spoils its own row only.
    tensorwise   a scale a matrix (an expert's matrix; a batch's rows); linear layers' gradients e5m2. Cheapest to make.
    mxfp8        a power of two for every 32 numbers, through torchao: Blackwell's own format.

Quantised: attention's projections, dense layers, shared and routed experts, which do nearly all the work. Not: the
router (its argmax decides, in float32), the head (its logits are exponentiated, its rounding goes into the loss at
once), embeddings (a look-up), norms (no product), the vision tower and adapter (a small share, and with biases).

**Experts** take one grouped product on the GPU (row scales, e4m3, bfloat16 out; tensor scales are repeated). In the
weight gradient what is summed are an expert's tokens, and the kernel wants them in sixteens: rows move to places that
are multiples of 16, zeros between (`align`), computed on the device. On the CPU the same numbers go through
`torch._scaled_mm` expert by expert, slowly: it is there so that every number can be checked without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puna.errors import PunaError
from puna.model.regions import compiled
from puna.model.weights import get, matching
from puna.precision import fp8

RECIPES = ("rowwise", "tensorwise", "mxfp8")
TARGETS = ("layers.*.attention.*", "layers.*.w13*", "layers.*.w2*")
BLOCK = 16  # numbers: what the kernels want matrices to be multiples of
SMALLEST = 1e-30  # of a largest number: a gradient is divided by all of a step's tokens


@dataclass(frozen=True)
class Float8:
    """A parameter that multiplies as a recipe says; what `ops.linear` and `ops.expert_mm` are given (weights.py)."""

    parameter: Tensor
    recipe: str

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x_TK = x.flatten(0, -2)
        if self.recipe == "mxfp8":
            y_TN = _mx_linear(x_TK, self.parameter)
        else:
            y_TN = _Linear.apply(x_TK, self.parameter, self.recipe)
        y = y_TN.unflatten(0, x.shape[:-1]) if x.dim() != 2 else y_TN
        return y if bias is None else y + bias.to(y.dtype)

    def expert_mm(self, x_TD: Tensor, counts_E: Tensor) -> Tensor:
        if not x_TD.is_cuda and int(counts_E.sum()) != len(x_TD):
            raise ValueError(f"expert counts sum to {int(counts_E.sum())}, but there are {len(x_TD)} rows")
        if self.recipe == "mxfp8":
            return _mx_experts(x_TD, self.parameter, counts_E)
        return _ExpertMM.apply(x_TD, self.parameter, counts_E, self.recipe)


def attach(model: nn.Module, recipe: str) -> None:
    """From now on the model's large products are FP8 in training mode ("off": none are).

    The modules change their class, not their parameters: reading `wo.weight` in training gives a `Float8` of it.
    Errors: PunaError for what the recipe can't do: this device or type, adapters, sizes no multiple of 16 (mxfp8: 32).
    """
    detach(model)
    if recipe == "off":
        return
    if recipe not in RECIPES:
        raise PunaError(f"train.fp8 must be off, {', '.join(RECIPES)}, not {recipe!r}")
    _check_device(recipe, next(model.parameters()).device, model.dtype)
    block = 32 if recipe == "mxfp8" else BLOCK
    found: dict[str, list[str]] = {}
    for name in matching(model, TARGETS):
        weight = get(model, name)
        if weight is None:  # another stage of the pipeline has it
            continue
        if not isinstance(weight, Tensor):
            raise PunaError(f"train.fp8 {recipe} multiplies whole weights, {name} has an adapter or is integers: leave "
                            "train.fp8 off")  # fmt: skip
        if any(size % block for size in weight.shape[-2:]):
            raise PunaError(f"train.fp8 {recipe}: {name} is {list(weight.shape[-2:])}, its sizes must be multiples of "
                            f"{block}: leave train.fp8 off, or change the model's widths")  # fmt: skip
        owner, _, last = name.rpartition(".")
        found.setdefault(owner, []).append(last)
    for owner, names in found.items():
        module = model.get_submodule(owner)
        views = {last: property(_view(last, recipe)) for last in names}
        module.__class__ = type(f"Float8{type(module).__name__}", (type(module),), views | {"_float8": True})


def detach(model: nn.Module) -> None:
    """Undoes `attach`."""
    for module in model.modules():
        if getattr(module, "_float8", False):
            module.__class__ = type(module).__bases__[0]


def _view(name: str, recipe: str):
    def read(module: nn.Module):
        parameter = module._parameters[name]
        at_rest = hasattr(parameter, "to_local")  # a DTensor, which FSDP itself reads; in motion it is a plain tensor
        return Float8(parameter, recipe) if module.training and not at_rest else parameter

    return read


def _check_device(recipe: str, device: torch.device, dtype: torch.dtype) -> None:
    if recipe == "mxfp8":
        _torchao()
    if device.type in ("cpu", "meta"):
        return
    if device.type != "cuda":
        raise PunaError(f"train.fp8 {recipe}: torch multiplies no FP8 on {device.type}: leave train.fp8 off")
    major, minor = torch.cuda.get_device_capability(device)
    needed = ((10, 0),) if recipe == "mxfp8" else ((9, 0), (10, 0))
    if (major, minor) not in needed:
        cards = "a B200 (10.0)" if recipe == "mxfp8" else "an H100, H200 (9.0) or B200 (10.0)"
        raise PunaError(f"train.fp8 {recipe} needs {cards}; this GPU is {major}.{minor}: leave train.fp8 off")
    if dtype != torch.bfloat16:
        raise PunaError(f"train.fp8 {recipe} gives bfloat16 on a GPU: set train.compute_dtype bfloat16, not {dtype}")


def _quantize(x: Tensor, dim, dtype: torch.dtype = fp8.E4M3) -> tuple[Tensor, Tensor]:
    """`fp8.quantize`; on a GPU compiled into two passes over x, otherwise it would cost what the product saves."""
    function = compiled(fp8.quantize) if x.is_cuda else fp8.quantize
    q, scale = function(x, dim, dtype, SMALLEST)
    return q.contiguous(), scale


# ---- one matrix


def mm(a_MK: Tensor, b_NK: Tensor, recipe: str, a_type: torch.dtype = fp8.E4M3, fast: bool = False) -> Tensor:
    """a @ b^T from FP8 numbers, [M, N] in a's dtype. fast: the GPU may keep partial sums in fewer bits."""
    if not a_MK.numel():
        return a_MK.new_zeros(len(a_MK), len(b_NK))
    short = -a_MK.shape[1] % BLOCK
    if short:  # tokens, where they are summed
        a_MK, b_NK = F.pad(a_MK, (0, short)), F.pad(b_NK, (0, short))
    dim = -1 if recipe == "rowwise" else None
    (qa, scale_a), (qb, scale_b) = _quantize(a_MK, dim, a_type), _quantize(b_NK, dim)
    scale_b = scale_b.t() if recipe == "rowwise" else scale_b
    return torch._scaled_mm(qa, qb.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=a_MK.dtype, use_fast_accum=fast)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TK: Tensor, w_NK: Tensor, recipe: str) -> Tensor:
        ctx.save_for_backward(x_TK, w_NK)
        ctx.recipe = recipe
        return mm(x_TK, w_NK.to(x_TK.dtype), recipe, fast=True)

    @staticmethod
    def backward(ctx, dy_TN: Tensor):
        x_TK, w_NK = ctx.saved_tensors
        gradients = fp8.E5M2 if ctx.recipe == "tensorwise" else fp8.E4M3
        dx_TK = dw_NK = None
        if ctx.needs_input_grad[0]:
            dx_TK = mm(dy_TN, w_NK.to(x_TK.dtype).t(), ctx.recipe, gradients)
        if ctx.needs_input_grad[1]:
            dw_NK = mm(dy_TN.t(), x_TK.t(), ctx.recipe, gradients).to(w_NK.dtype)
        return dx_TK, dw_NK, None


# ---- experts


def grouped_mm(a_TK: Tensor, b_ENK: Tensor, counts_E: Tensor, recipe: str, fast: bool = False) -> Tensor:
    """Rows of a, sorted by expert, times their expert's b^T from FP8 numbers: [T, N] in a's dtype."""
    T, (E, N, _) = len(a_TK), b_ENK.shape
    if not a_TK.numel():
        return a_TK.new_zeros(T, N)
    whole = recipe == "tensorwise"
    (qa, scale_a), (qb, scale_b) = _quantize(a_TK, None if whole else -1), _quantize(b_ENK, (-2, -1) if whole else -1)
    scale_T, scale_EN = scale_a.expand(T, 1).flatten().contiguous(), scale_b.expand(E, N, 1)[..., 0].contiguous()
    if a_TK.is_cuda:
        return torch._scaled_grouped_mm(
            qa, qb.transpose(1, 2), scale_T, scale_EN, offs=counts_E.cumsum(0).to(torch.int32), out_dtype=a_TK.dtype,
            use_fast_accum=fast,
        )  # fmt: skip
    y_TN, start = a_TK.new_empty(T, N), 0
    for e, n in enumerate(counts_E.tolist()):
        if n:
            s = slice(start, start + n)
            y_TN[s] = torch._scaled_mm(qa[s], qb[e].t(), scale_a=scale_T[s, None], scale_b=scale_EN[e, None],
                                       out_dtype=a_TK.dtype)  # fmt: skip
            start += n
    return y_TN


def align(counts_E: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places for sorted rows such that each expert's begin and end at a multiple of 16, and none has fewer than 16.

    Returns (place of each row [T], end of each expert's places [E], the expert of every 16 places, E behind the last).
    There are T rounded up + 16 E places, whatever the counts: nothing has to leave the device to know.
    """
    wide_E = counts_E.add(BLOCK - 1).div(BLOCK, rounding_mode="floor").clamp(min=1) * BLOCK
    ends_E, own_E = wide_E.cumsum(0), counts_E.cumsum(0)
    row_T = torch.arange(rows, device=counts_E.device)
    expert_T = torch.searchsorted(own_E, row_T, right=True)
    places = -(-rows // BLOCK) * BLOCK + BLOCK * len(counts_E)
    first_b = torch.arange(0, places, BLOCK, device=counts_E.device)
    shift_E = ends_E - wide_E - own_E + counts_E
    return row_T + shift_E[expert_T], ends_E, torch.searchsorted(ends_E, first_b, right=True)


def _columns(x_TD: Tensor, place_T: Tensor, expert_b: Tensor, experts: int, whole: bool) -> tuple[Tensor, Tensor]:
    """x^T in e4m3 over aligned places, [D, P], with a scale for every expert's column (whole: one): float32 [E, D]."""
    D, wide = x_TD.shape[1], x_TD.float()
    x_bD = wide.new_zeros(len(expert_b) * BLOCK, D).index_copy(0, place_T, wide).view(-1, BLOCK, D)
    largest_bD = x_bD.abs().amax(1)
    if whole:
        largest_ED = largest_bD.amax().expand(experts + 1, D)
    else:  # the last row is that of the places behind all experts'
        index_bD = expert_b[:, None].expand_as(largest_bD)
        largest_ED = wide.new_zeros(experts + 1, D).scatter_reduce(0, index_bD, largest_bD, "amax")
    scale_ED = largest_ED.clamp(min=SMALLEST) / fp8.LARGEST
    q_bD = (x_bD / scale_ED[expert_b][:, None]).clamp(-fp8.LARGEST, fp8.LARGEST).to(fp8.E4M3)
    return q_bD.flatten(0, 1).t().contiguous(), scale_ED[:experts].contiguous()


def grouped_outer(x_TD: Tensor, dy_TF: Tensor, counts_E: Tensor, recipe: str) -> Tensor:
    """x[s_e]^T @ dy[s_e] of every expert's rows from FP8 numbers: [E, D, F] in x's dtype, zeros without rows."""
    E, D, F_ = len(counts_E), x_TD.shape[1], dy_TF.shape[1]
    if not len(x_TD):
        return x_TD.new_zeros(E, D, F_)
    place_T, ends_E, expert_b = align(counts_E, len(x_TD))
    columns = compiled(_columns) if x_TD.is_cuda else _columns
    qx_DP, scale_ED = columns(x_TD, place_T, expert_b, E, recipe == "tensorwise")
    qy_FP, scale_EF = columns(dy_TF, place_T, expert_b, E, recipe == "tensorwise")
    if x_TD.is_cuda:
        return torch._scaled_grouped_mm(qx_DP, qy_FP.t(), scale_ED.flatten(), scale_EF.flatten(),
                                        offs=ends_E.to(torch.int32), out_dtype=x_TD.dtype)  # fmt: skip
    dw_EDF, start = x_TD.new_empty(E, D, F_), 0
    for e, end in enumerate(ends_E.tolist()):
        s = slice(start, end)
        qx_Dn, qy_Fn = qx_DP[:, s].contiguous(), qy_FP[:, s].contiguous()
        dw_EDF[e] = torch._scaled_mm(qx_Dn, qy_Fn.t(), scale_a=scale_ED[e, :, None], scale_b=scale_EF[e, None],
                                     out_dtype=x_TD.dtype)  # fmt: skip
        start = end
    return dw_EDF


class _ExpertMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, w_EDF: Tensor, counts_E: Tensor, recipe: str) -> Tensor:
        ctx.save_for_backward(x_TD, w_EDF, counts_E)
        ctx.recipe = recipe
        return grouped_mm(x_TD, w_EDF.to(x_TD.dtype).transpose(1, 2), counts_E, recipe, fast=True)

    @staticmethod
    def backward(ctx, dy_TF: Tensor):
        x_TD, w_EDF, counts_E = ctx.saved_tensors
        dx_TD = dw_EDF = None
        if ctx.needs_input_grad[0]:
            dx_TD = grouped_mm(dy_TF, w_EDF.to(x_TD.dtype), counts_E, ctx.recipe)
        if ctx.needs_input_grad[1]:
            dw_EDF = grouped_outer(x_TD, dy_TF, counts_E, ctx.recipe).to(w_EDF.dtype)
        return dx_TD, dw_EDF, None, None


# ---- MXFP8


def _torchao():
    """torchao's MXFP8 products (prototypes there, so all that is used of them is in this section)."""
    try:
        from torchao.prototype.moe_training import mxfp8_grouped_mm, mxfp8_linear
        from torchao.prototype.mx_formats.config import ScaleCalculationMode
        from torchao.quantization.quantize_.common import KernelPreference
    except ImportError as error:
        raise PunaError(f"train.fp8 mxfp8 needs torchao 0.18: pip install 'puna[fp8]' ({error})") from error
    return mxfp8_linear, mxfp8_grouped_mm, ScaleCalculationMode.RCEIL, KernelPreference


def _mx_linear(x_TK: Tensor, w_NK: Tensor) -> Tensor:
    linear, _, mode, kernels = _torchao()
    if not len(x_TK):
        return F.linear(x_TK, w_NK.to(x_TK.dtype))
    short = -len(x_TK) % 32  # the weight gradient sums over tokens, in 32s
    prefer = kernels.AUTO if x_TK.is_cuda else kernels.EMULATED
    x_PK, w_NK = F.pad(x_TK, (0, 0, 0, short)).contiguous(), w_NK.to(x_TK.dtype).contiguous()
    y_TN = linear._to_mxfp8_then_scaled_mm(x_PK, w_NK, prefer, mode)
    return y_TN[: len(x_TK)]


def _mx_experts(x_TD: Tensor, w_EDF: Tensor, counts_E: Tensor) -> Tensor:
    _, experts, mode, kernels = _torchao()
    if not len(x_TD):
        return x_TD.new_zeros(0, w_EDF.shape[2]) + (x_TD.sum() + w_EDF.sum()).to(x_TD.dtype) * 0
    w_EFD = w_EDF.to(torch.bfloat16).transpose(1, 2).contiguous()  # read as [E, D, F], every expert column by column
    y_TF = experts._to_mxfp8_then_scaled_grouped_mm(
        x_TD.to(torch.bfloat16), w_EFD.transpose(1, 2), counts_E.cumsum(0).to(torch.int32), scale_calculation_mode=mode,
        kernel_preference=kernels.AUTO if x_TD.is_cuda else kernels.EMULATED, pad_token_groups_for_grouped_mm=True,
    )  # fmt: skip
    return y_TF.to(x_TD.dtype)
