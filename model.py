"""The networks: one Transformer, one JEPA core, nanoJEPA, R-JEPA, T-JEPA.

Reads top to bottom: Attention, MLP, Block, Transformer; the JEPA core (context encoder, EMA target encoder,
predictor); NanoJEPA; RJEPA; the Speaker; TJEPA; the figures that tell learning from collapse. Nothing here reads files
or arguments.

Letters: B batch, T tokens, C width, V vocabulary, N targets, nh heads, hs head size. Masks say their sense:
attn_allowed (True = may attend), is_real (True = not padding), is_target (True = to be predicted).
"""

import contextlib
import copy
import functools
import itertools
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

# ----------------------------------------------------------------------------- Transformer


def rope(positions: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [..., 1, hs] of the rotary embedding (Su et al. 2021) at explicit positions [...]. The first half of
    sin is negated, as `rotate` needs it."""
    freq = 10_000.0 ** (-torch.arange(0, head_size, 2, device=positions.device).float() / head_size)
    angle = positions[..., None, None].float() * freq
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates the two halves of x [..., nh, hs], entry by entry, by the angles of `rope`; keeps x's dtype."""
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """PyTorch's RMSNorm (Zhang & Sennrich 2019) over the last dimension. On a CPU it has a backward pass of its own:
    PyTorch's goes back through each single operation there, which takes 3 to 5 times as long."""

    def forward(self, x):
        if x.device.type != "cpu" or x.dtype != torch.float32 or torch.compiler.is_compiling():
            return super().forward(x)
        return RMSNormOnCPU.apply(x, self.weight)


class RMSNormOnCPU(torch.autograd.Function):
    """y = x r w, r = 1 / rms(x), of x [..., C] and w [C], as F.rms_norm; once differentiable.

    dL/dw = sum(g x r), dL/dx = r (g w - x r^2 mean(g w x)).
    """

    @staticmethod
    def forward(ctx, x, w):
        r = x.square().mean(-1, keepdim=True).add_(torch.finfo(x.dtype).eps).rsqrt_()
        ctx.save_for_backward(x, w, r)
        return (x * r).mul_(w)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, w, r = ctx.saved_tensors
        by_w = (x * r).mul_(g)
        grad_w = by_w.reshape(-1, len(w)).sum(0)
        share = by_w.mul_(w).sum(-1, keepdim=True).mul_(r).div_(-len(w))
        return (g * w).addcmul_(x, share).mul_(r), grad_w


class KVCache:
    """Keys and values of one Attention, a slot for every position: k, v [B, nh, T_max, hs]."""

    def __init__(self, shape, device, dtype):
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    def update(self, k, v, positions):
        """Writes k, v [B, nh, T, hs] into the slots `positions` [B, T]; returns all slots."""
        slots = positions[:, None, :, None].expand_as(k)
        self.k.scatter_(2, slots, k.to(self.k.dtype))
        self.v.scatter_(2, slots, v.to(self.v.dtype))
        return self.k, self.v

    def reorder_cache(self, rows):
        """Keeps these rows, in this order; the name is transformers'."""
        self.k, self.v = self.k[rows], self.v[rows]


def attend(q, k, v, attn_allowed=None, is_causal=False):
    """softmax(q k^T / sqrt(hs)) v for q, k, v [B, nh, T, hs]: SDPA, except in bf16 on a CPU.

    There PyTorch's flash kernel is slower than in fp32; plain matrix products are 2 to 3 times as fast (bench.py).
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_allowed, is_causal=is_causal)
    if is_causal:
        attn_allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if attn_allowed is not None:
        scores = scores + torch.zeros_like(attn_allowed, dtype=q.dtype).masked_fill(~attn_allowed, float("-inf"))
    return scores.softmax(-1) @ v


VARLEN = {"cuda"}  # devices whose attention takes sequences of different lengths, laid end to end


def takes_varlen(device, head_size: int) -> bool:
    """Whether PyTorch's varlen_attn works: in half precision, on GPUs from Ampere on."""
    fits = device.type in VARLEN and torch.is_autocast_enabled(device.type) and head_size in range(8, 193, 8)
    return fits and (device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 8)


PINNED = {"cuda"}  # devices that copy from pinned memory while the CPU carries on


def to_device(x, device):
    """A tensor on the device. It goes to a GPU from pinned memory, so that the CPU need not wait for the GPU.

    The masks of a training batch stay on the CPU, which can then find positions without waiting for the GPU. Every
    function here accepts a mask on either device.
    """
    device = torch.device(device or "cpu")
    is_async = device.type in PINNED and x.device.type == "cpu"
    return (x.pin_memory() if is_async else x).to(device, non_blocking=is_async)


def flat_index(mask, device):
    """Where a mask [B, T] is True: flat positions [N] on the device."""
    return to_device(mask.flatten().nonzero()[:, 0], device)


ROW = {"cuda": 128, "cpu": 32}  # slots in a row into which short sequences are packed


def pack(is_real, slots: int):
    """Lays the real positions of B sequences, is_real bool [B, T] on the CPU, end to end in rows of at most `slots`.

    -> (their flat positions [N], their flat slots [N] in the rows, (number of rows R, slots in a row L)). No sequence
    is cut. The longest are dealt out first, back and forth over the rows, which fills them evenly. On a GPU attention
    kernels process 64 to 128 positions at a time: a chain of five on its own would leave them mostly idle.
    """
    lengths, order = is_real.sum(1).sort(descending=True, stable=True)
    n = int(lengths.sum())
    first, L = (1, -(-n // 8) * 8) if n <= slots else (-(-n // (2 * slots)) * 2, slots)
    for R in itertools.count(first, 2):  # even numbers alone: kernels are compiled for every new shape
        rounds = F.pad(lengths, (0, -len(lengths) % R)).view(-1, R)
        rounds[1::2] = rounds[1::2].flip(1)  # every other round runs backwards
        if int(rounds.sum(0).max()) <= L:
            break
    start = rounds.cumsum(0) - rounds + L * torch.arange(R)
    start[1::2] = start[1::2].flip(1)
    start = torch.empty_like(order).index_copy_(0, order, start.flatten()[: len(order)])  # (B,)
    at = (start[:, None] + is_real.cumsum(1) - 1)[is_real]
    return is_real.flatten().nonzero()[:, 0], at, (R, L)


def packed_mask(attn_allowed, kept, slots, shape):
    """The mask [R, L, L] for the rows that `pack` made, from attn_allowed [B or 1, T, T] of each single sequence."""
    T = attn_allowed.shape[-1]
    at = kept.new_full((2, shape[0] * shape[1]), -1)  # sequence and position in every slot; -1: an empty slot
    at[:, slots] = torch.stack((kept // T, kept % T))
    (b, t), own = at.view(2, *shape), torch.eye(shape[1], dtype=torch.bool, device=kept.device)
    allowed = attn_allowed[b[:, :, None] % len(attn_allowed), t[:, :, None], t[:, None]]
    return allowed & (b[:, :, None] == b[:, None]) | own


def keep(is_real):
    """is_real bool [B, T] -> the flat positions [N] to compute: the real ones, and a few more to make N a multiple of
    64, since kernels are compiled for every new shape."""
    n = -(-int(is_real.sum()) // 64) * 64
    return is_real.flatten().int().argsort(descending=True, stable=True)[:n]


class Rows(NamedTuple):
    """Where N tokens that lie end to end belong in rows of shape (B, T): their flat positions index [N], none twice.

    cu_seqlens int32 [B + 1]: where each row begins and ends among the N; given only where every row's tokens are its
    first ones, complete and in order. With it Attention reads the tokens as they lie, each row by itself, causal or
    not, without mask or cache.
    """

    index: torch.Tensor
    shape: tuple[int, int]
    cu_seqlens: torch.Tensor | None = None


def join(rows: list[Rows]) -> Rows:
    """Several sets of rows one after the other, as one set of rows of one length."""
    T, B, N, index, ends = max(r.shape[1] for r in rows), 0, 0, [], [rows[0].cu_seqlens[:1]]
    for at, (rows_here, T_here), cu_seqlens in rows:
        index.append((at // T_here + B) * T + at % T_here)
        ends.append(cu_seqlens[1:] + N)
        B, N = B + rows_here, N + len(at)
    return Rows(torch.cat(index), (B, T), torch.cat(ends))


def spread(x, kept: Rows | None):
    """x [N, ...] at the positions `kept` -> [B, T, ...], zero elsewhere."""
    if kept is None:
        return x
    index, shape, _ = kept
    out = x.new_zeros(shape[0] * shape[1], *x.shape[1:])
    # adding is faster on a CPU; on a GPU it would be atomic, which is slow in bf16
    write = out.index_add_ if x.device.type == "cpu" else out.index_copy_
    return write(0, index, x.contiguous()).view(*shape, *x.shape[1:])


class Pick(torch.autograd.Function):
    """x [B, T, ...] at the flat positions index [N], none twice -> [N, ...]; the inverse of `spread`.

    PyTorch's own indexing has to allow for repeated positions, so its backward pass adds; it is slower both ways.
    """

    @staticmethod
    def forward(ctx, x, index):
        ctx.save_for_backward(index)
        ctx.shape = x.shape[:2]
        return x.flatten(0, 1).index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return spread(grad, Rows(index, ctx.shape)), None


pick = Pick.apply


class Attention(nn.Module):
    """Multi-head self-attention (rotary), or cross-attention to a context (without positions)."""

    def __init__(self, n_embd: int, n_head: int):
        super().__init__()
        self.n_head = n_head
        self.q = nn.Linear(n_embd, n_embd, bias=False)
        self.kv = nn.Linear(n_embd, 2 * n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd, bias=False)

    def heads(self, x, cos_sin=None, kept=None):
        """x [B, T, C], or [N, C] at `kept` -> [B, nh, T, hs], rotated if cos_sin is given; [N, nh, hs] where attention
        takes the tokens end to end."""
        x = x.unflatten(-1, (self.n_head, -1))
        x = x if cos_sin is None else rotate(x, *cos_sin)
        return x if kept and kept.cu_seqlens is not None else spread(x, kept).transpose(1, 2)

    def keys(self, source, cos_sin=None, kept=None):
        """Keys and values of source, each shaped as `heads` returns them."""
        k, v = self.kv(source).chunk(2, dim=-1)
        return self.heads(k, cos_sin, kept), self.heads(v, None, kept)

    def forward(self, x, cos_sin=None, attn_allowed=None, is_causal=False, context=None, cache=None, positions=None,
                kept=None):
        """x [B, T, C] -> [B, T, C]; with `kept` (Rows) [N, C] -> [N, C].

        attn_allowed: bool [B or 1, nh or 1, T, T_keys]. context: [B, T_keys, C], or its `keys`, which can then be
        computed once for many calls.
        """
        q = self.heads(self.q(x), cos_sin, kept)
        if not isinstance(context, tuple):
            context = self.keys(x, cos_sin, kept) if context is None else self.keys(context)
        if kept and kept.cu_seqlens is not None:
            cu, T = kept.cu_seqlens, kept.shape[1]
            y = varlen_attn(q, *context, cu, cu, T, T, window_size=(-1, 0 if is_causal else -1))
            return self.proj(y.flatten(1))
        k, v = context if cache is None else cache.update(*context, positions)
        y = attend(q, k.to(q.dtype), v.to(q.dtype), attn_allowed, is_causal).transpose(1, 2).flatten(2)
        return self.proj(y if kept is None else pick(y, kept.index))


class MLP(nn.Module):
    def __init__(self, n_embd: int):
        super().__init__()
        self.fc = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.proj = nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x):
        return self.proj(F.gelu(self.fc(x), approximate="tanh"))


class Block(nn.Module):
    """Pre-norm block; with cross=True it also attends to a context."""

    def __init__(self, n_embd: int, n_head: int, dropout: float, cross: bool = False):
        super().__init__()
        self.norm_1 = RMSNorm(n_embd)
        self.attn = Attention(n_embd, n_head)
        self.norm_x = RMSNorm(n_embd) if cross else None
        self.cross = Attention(n_embd, n_head) if cross else None
        self.norm_2 = RMSNorm(n_embd)
        self.mlp = MLP(n_embd)
        self.drop = nn.Dropout(dropout)

    def forward(self, x, cos_sin, attn_allowed, is_causal, context, context_allowed, cache, positions, kept, only=None):
        """x as in Attention. only: flat positions [M]; the MLP runs on these alone and [M, C] is returned."""
        x = x + self.drop(self.attn(self.norm_1(x), cos_sin, attn_allowed, is_causal, None, cache, positions, kept))
        if self.cross is not None:
            x = x + self.drop(self.cross(self.norm_x(x), attn_allowed=context_allowed, context=context, kept=kept))
        if only is not None:
            x = pick(x, only)
        return x + self.drop(self.mlp(self.norm_2(x)))


class Transformer(nn.Module):
    """Blocks over a sequence of vectors at explicit positions; the caller brings embeddings and the mask."""

    def __init__(self, n_layer: int, n_head: int, n_embd: int, dropout: float = 0.0, cross: bool = False):
        super().__init__()
        self.n_head, self.n_embd = n_head, n_embd
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(n_embd, n_head, dropout, cross) for _ in range(n_layer))
        self.norm = RMSNorm(n_embd)

    def forward(self, x, positions=None, attn_allowed=None, is_causal=False, context=None, context_allowed=None,
                caches=None, is_real=None, kept=None, wanted=None, embed=None):
        """x [B, T, C] (of any width with `embed`) -> [B, T, C]; with `kept` (Rows) [N, C] -> [N, C].

        positions: int [B or 1, T], 0 … T-1 by default. attn_allowed: bool [B or 1, T, T_keys]. context [B, T_ctx, C]
        or its `context_keys`, with context_allowed [B, T_ctx], for cross-attention. caches: see `new_caches`.
        is_real bool [B, T]: the other positions are not computed and their output is meaningless; where short rows are
        not packed, attn_allowed or is_causal must hide them from attention. wanted bool [B, T]: all outputs but these
        may be meaningless. embed: turns the x given into x of width C; it runs on real positions alone.
        """
        (B, T), embed = kept.shape if kept else x.shape[:2], embed or (lambda x: x)
        if positions is None:
            positions = torch.arange(T, device=x.device)[None]
        room, whole, only = ROW.get(x.device.type, 0), None, None
        # in training alone: elsewhere a result may depend on what else is in its batch in its last bits at most
        short = is_real is not None and attn_allowed is not None and 2 * T <= room
        if self.training and short and caches is None and context is None:
            index, slots, shape = pack(is_real.cpu(), room)
            asked = slice(None) if wanted is None else keep(wanted.cpu().flatten()[index])
            back, only, index, slots = (to_device(t, x.device) for t in (index[asked], slots[asked], index, slots))
            whole, is_real = Rows(back, (B, T)), None
            x, embed = spread(embed(pick(x, index)), Rows(slots, shape)), lambda x: x
            positions = positions.expand(B, T).flatten()
            positions = positions.new_zeros(shape[0] * shape[1]).index_copy(0, slots, positions[index]).view(shape)
            attn_allowed = packed_mask(attn_allowed, index, slots, shape)
        attn_allowed = None if attn_allowed is None else attn_allowed[:, None]  # (B, 1, T, T_keys)
        if context_allowed is not None:
            context_allowed = to_device(context_allowed, x.device)[:, None, None]  # (B, 1, 1, T_ctx)
        assert is_real is None or kept is None, "kept follows from is_real"
        flat = kept
        if flat and (attn_allowed is not None or not takes_varlen(x.device, self.n_embd // self.n_head)):
            flat = flat._replace(cu_seqlens=None)  # attention will need rows
        if is_real is not None:
            whole = flat = Rows(to_device(keep(is_real), x.device), (B, T))
            x = pick(x, flat.index)
        x = embed(x)
        at = positions if flat is None else positions.expand(B, T).flatten()[flat.index]
        cos_sin = rope(at, self.n_embd // self.n_head)
        x = self.stack(x, cos_sin, attn_allowed, is_causal, context, context_allowed, caches, positions, flat, only)
        return x if kept else spread(x, whole)

    def stack(self, x, cos_sin, attn_allowed, is_causal, context, context_allowed, caches, positions, kept, only):
        """Blocks and final norm: the part that can be compiled, since nothing in it depends on the data's values."""
        x = self.drop(x)
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            source = context[i] if isinstance(context, list) else context
            x = block(x, cos_sin, attn_allowed, is_causal, source, context_allowed, cache, positions, kept,
                      only if i == len(self.blocks) - 1 else None)
        return self.norm(x)

    def context_keys(self, context) -> list[tuple]:
        """Each block's cross-attention keys and values of a context [B, T_ctx, C]."""
        return [block.cross.keys(context) for block in self.blocks]

    def new_caches(self, batch_size: int, max_tokens: int, device, dtype) -> list[KVCache]:
        """A KVCache for each block."""
        shape = (batch_size, self.n_head, max_tokens, self.n_embd // self.n_head)
        return [KVCache(shape, device, dtype) for _ in self.blocks]


def compile_model(model: nn.Module, by_block: bool = False):
    """Compiles every stack of blocks, R-JEPA's input adapter and the losses, in place.

    The code around them depends on the data's values and could not be one graph. by_block: each block by itself, so
    that several processes can add up some gradients while others are still being computed.
    """
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.optimize_ddp = False  # it would cut graphs at DDP's buckets
    for part in model.modules():
        if isinstance(part, Block) and by_block:
            part.forward = torch.compile(part.forward, dynamic=True)
        if isinstance(part, Transformer) and not by_block:
            part.stack = torch.compile(part.stack, dynamic=True)
        if isinstance(part, NanoJEPA):
            part.loss_and_gradient = compiled_loss()
        if isinstance(part, RJEPA):
            part.embed, part.compare = (torch.compile(f, dynamic=True) for f in (part.embed, part.compare))


def compiled_loss():
    """`loss_and_gradient`, compiled for one vocabulary size and, from the first call on, for any number of tokens."""
    compiled = torch.compile(loss_and_gradient)

    def call(logits, targets):
        for x in (logits, targets):
            torch._dynamo.maybe_mark_dynamic(x, 0)
        return compiled(logits, targets)

    return call


def init_weights(module: nn.Module, n_layer: int):
    """GPT-2's initialisation: N(0, 0.02), projections into the residual stream scaled by 1/sqrt(2 n_layer)."""
    for name, p in module.named_parameters():
        if p.dim() >= 2:
            std = 0.02 / math.sqrt(2 * n_layer) if name.endswith("proj.weight") else 0.02
            nn.init.normal_(p, 0.0, std)


# ----------------------------------------------------------------------------- JEPA core


@torch.no_grad()
def update_target(target: nn.Module, online: nn.Module, momentum: float):
    """EMA: target = momentum * target + (1 - momentum) * online; parameters averaged, buffers copied."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1.0 - momentum)
    for b_target, b_online in zip(target.buffers(), online.buffers(), strict=True):
        b_target.copy_(b_online)


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy that gets no gradient and has no dropout."""
    frozen = copy.deepcopy(module).requires_grad_(False)
    for part in frozen.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return frozen


class Predictor(nn.Module):
    """Predicts latents at hidden positions from the visible ones (I-JEPA, Assran et al. 2023, narrow Transformer).

    forward(z_context [B, S, C], positions, is_visible, is_target, segment [B, S]) -> [N, C], N = number of targets.
    Every target slot holds the same learned mask token; the slots differ in their positions alone.
    """

    def __init__(self, width: int, n_layer: int, n_head: int, n_embd: int):
        super().__init__()
        self.proj_in = nn.Linear(width, n_embd)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, n_embd))
        self.transformer = Transformer(n_layer, n_head, n_embd)
        self.proj_out = nn.Linear(n_embd, width)
        init_weights(self, n_layer)

    def forward(self, z_context, positions, is_visible, is_target, segment=None):
        is_real, hidden = is_visible | is_target, to_device(is_target, z_context.device)[..., None]
        x = torch.where(hidden, self.mask_token, self.proj_in(z_context))
        allowed = may_attend(is_real, segment, x.device)
        x = self.transformer(x, positions, allowed, is_real=is_real, wanted=is_target)
        return self.proj_out(pick(x, flat_index(is_target, x.device)))


def may_attend(visible, segment=None, device=None):
    """visible bool [B, S] -> bool [B, S, S]: every position attends to the visible ones, and to itself.

    segment int [B, S], where several sequences lie packed in a row: to those of its own segment alone. device: of the
    result.
    """
    visible = visible if device is None else to_device(visible, device)
    own = torch.eye(visible.shape[1], dtype=torch.bool, device=visible.device)  # a row without any key would be NaN
    allowed = visible[:, None, :]
    if segment is not None:
        segment = to_device(segment, visible.device)
        allowed = allowed & (segment[:, :, None] == segment[:, None, :])
    return allowed | own


class JEPA(nn.Module):
    """The three parts over a sequence of vectors: context encoder, EMA target encoder, predictor (I-JEPA, fig. 3)."""

    def __init__(self, encoder: Transformer, predictor: Predictor):
        super().__init__()
        init_weights(encoder, len(encoder.blocks))
        self.context_encoder = encoder
        self.target_encoder = frozen_copy(encoder)
        self.predictor = predictor

    def encode(self, encoder, x, positions, visible, segment=None, **more):
        """Bidirectional encoding of the visible positions [B, S] alone -> [B, S, C], meaningless at the others.

        segment: see `may_attend`; more: `wanted` and `embed`, see Transformer.
        """
        return encoder(x, positions, may_attend(visible, segment, x.device), is_real=visible, **more)

    def predict(self, x, positions, is_visible, is_target, **more):
        """z_pred [N, C] of the N targets from what is visible [B, S]. What is neither takes no part at all."""
        z_context = self.encode(self.context_encoder, x, positions, is_visible, **more)
        return self.predictor(z_context, positions, is_visible, is_target)

    def targets(self, x, positions, is_real, online: bool = False, **more):
        """Target latents [B, S, C] fp32 of every position (or those `wanted` alone), layer-normed without a learned
        scale, detached. online: by the context encoder instead, with gradient."""
        with torch.set_grad_enabled(online and torch.is_grad_enabled()):
            z = self.encode(self.context_encoder if online else self.target_encoder, x, positions, is_real, **more)
            return F.layer_norm(z.float(), z.shape[-1:])

    def update_target(self, momentum: float):
        update_target(self.target_encoder, self.context_encoder, momentum)


class Model(nn.Module):
    """What all models that train.py trains have in common; `config` holds their settings."""

    def n_params(self) -> int:
        """All parameters, an EMA copy included."""
        return sum(p.numel() for p in self.parameters())

    def update_target(self, momentum: float):
        """Nothing to do where there is no target encoder."""

    def flops_per_token(self, T: float) -> float:
        """Forward and backward, 6 N + 12 L C T (PaLM, appendix B), on rows of T tokens; N: the trained parameters."""
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return 6 * trained + 12 * self.config.n_layer * self.config.n_embd * T

    def check_rows(self, rows, what: str, shortest: int):
        """Returns the token rows. Raises ValueError where one is shorter than `shortest` or longer than block_size."""
        for i, row in enumerate(rows):
            if not shortest <= len(row) <= self.config.block_size:
                why = "is empty" if len(row) < shortest else f"has {len(row)} tokens with its special ones"
                raise ValueError(f"{what} {i} {why}; the model reads 1 to block_size={self.config.block_size}")
        return rows

    @contextlib.contextmanager
    def evaluating(self):
        """A context in eval mode; afterwards the model is back in its former mode."""
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)


# ----------------------------------------------------------------------------- nanoJEPA


def answer_row(answer: list[int], eos_id: int) -> list[int]:
    """The answer view: [EOS] as start, its tokens, [EOS]. (The question view: its tokens, [PRED].)"""
    return [eos_id, *answer, eos_id]


def pad_rows(rows: list[list[int]], fill: int, device=None) -> torch.Tensor:
    """Ragged rows -> int64 [B, T], filled on the right."""
    is_real = real_tokens(rows)
    out = torch.full(is_real.shape, fill, dtype=torch.long)
    out[is_real] = torch.tensor(list(itertools.chain.from_iterable(rows)), dtype=torch.long)
    return to_device(out, device)


def real_tokens(rows: list[list[int]], device=None) -> torch.Tensor:
    """is_real bool [B, T] that goes with `pad_rows` of the same ragged rows."""
    lengths = torch.tensor([len(row) for row in rows])
    return to_device(torch.arange(int(lengths.max())) < lengths[:, None], device)


def attn_allowed(segment: torch.Tensor) -> torch.Tensor:
    """The isolation mask, as the reference: segment int [B, T] (0 question, 1 answer, -1 padding) -> bool [B, T, T].

    Position i may attend to j where both are of one view and j is not later. [PRED] is the question's last token, so
    it sees the question and never the answer. Padding attends to itself alone (a row without keys would be NaN).
    """
    same = segment[:, :, None] == segment[:, None, :]
    return same & torch.ones_like(same[0]).tril()


def pool_weights(rows: list[list[int]], pooling: str) -> torch.Tensor:
    """Weights [B, T] by which the states of each answer row are summed into one latent.

    `last`: the closing [EOS]; `mean`: every position but the opening [EOS].
    """
    end = torch.tensor([len(row) for row in rows])[:, None]
    at = torch.arange(int(end.max()))
    first = end - 1 if pooling == "last" else torch.ones_like(end)
    return ((first <= at) & (at < end)) / (end - first)


def write(transformer, embed, eos_id: int, x, lengths, max_new_tokens: int, max_tokens: int | None = None,
          temperature: float = 0.0, seed: int = 0, **context) -> list[list[int]]:
    """Continues prompts x [B, T, C] of lengths [B] token by token, with a KV cache -> B token lists, up to [EOS].

    No id above eos_id is written. max_tokens: of prompt and text together. context: the arguments for cross-attention
    of Transformer.forward. Greedy at temperature 0, else sampled with a generator of its own.
    """
    B, T, _ = x.shape
    max_tokens = min(T + max_new_tokens, max_tokens or T + max_new_tokens)
    generator, slots = torch.Generator(x.device).manual_seed(seed), torch.arange(max_tokens, device=x.device)
    caches = transformer.new_caches(B, max_tokens, x.device, embed.weight.dtype)
    positions = slots[:T].expand(B, T)
    out, done = [], torch.zeros(B, dtype=torch.bool, device=x.device)
    while True:
        # a slot is a position: padding of the prompt lies in later slots and is overwritten before it is seen
        h = transformer(x, positions, slots <= positions[..., None], caches=caches, **context)
        h = h[torch.arange(B, device=x.device), lengths - 1] if not out else h[:, -1]
        logits = F.linear(h, embed.weight[: eos_id + 1]).float()
        if temperature > 0:
            token = torch.multinomial((logits / max(temperature, 1e-4)).softmax(-1), 1, generator=generator)
        else:
            token = logits.argmax(-1, keepdim=True)
        out.append(torch.where(done[:, None], eos_id, token))
        done |= token[:, 0] == eos_id
        positions = (lengths + len(out) - 1)[:, None]  # (B, 1), where the new token goes
        done |= positions[:, 0] >= max_tokens
        if len(out) == max_new_tokens or done.all():
            break
        positions = positions.clamp_max(max_tokens - 1)  # rows that are done may have run past the end
        x = embed(out[-1])
    tokens = torch.cat(out, dim=1).tolist()
    return [t[: t.index(eos_id)] if eos_id in t else t for t in tokens]


def in_batches(rows: list[list[int]], batch_size: int, encode) -> torch.Tensor:
    """encode(rows) in batches of rows of similar length -> [len(rows), C], in the order given."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    parts = [order[s : s + batch_size] for s in range(0, len(rows), batch_size)]
    out = torch.cat([encode([rows[i] for i in part]) for part in parts])
    return out[torch.tensor(order, device=out.device).argsort()]


class Standardize(nn.Module):
    """Per-dimension standardisation of latents [B, C]: by the batch in training, by fitted statistics otherwise.

    So a training target depends on its batch; with several processes each standardises its own. Without it all latents
    of a language model share one direction: any two have a cosine above 0.9, and predicting that direction is all that
    1 - cos teaches. Running averages would lag behind the network in training, and the lag is one more shared direction
    (measured: LOG.md).
    """

    def __init__(self, n_embd: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_embd))
        self.register_buffer("std", torch.ones(n_embd))

    def fit(self, z):
        """Takes the statistics from latents z [N, C]."""
        self.mean.copy_(z.mean(0))
        self.std.copy_(z.std(0, correction=0).clamp_min(1e-3))

    def forward(self, z):
        if self.training:
            return (z - z.mean(0)) / z.std(0, correction=0).clamp_min(1e-3)
        return (z - self.mean) / self.std


def loss_and_gradient(logits, targets):
    """Summed cross-entropy of logits [M, V] with ids [M], and its gradient with respect to them, in their dtype."""
    log_p = logits.float().log_softmax(-1)
    if torch.compiler.is_compiling():  # in a form that can become one kernel
        is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
        return -log_p.where(is_target, 0.0).sum(), (log_p.exp() - is_target.float()).to(logits.dtype)
    at = targets[:, None]
    loss = -log_p.gather(1, at).sum()
    return loss, log_p.exp_().scatter_add_(1, at, -torch.ones_like(at, dtype=log_p.dtype)).to(logits.dtype)


class TokenLoss(torch.autograd.Function):
    """Summed cross-entropy of h [M, C] @ weight [V, C]^T with ids [M]; the forward pass computes the gradients, too.

    So the logits are neither kept for the backward pass nor computed twice: those of 64 k tokens over GPT-2's
    vocabulary would take 26 GB. (The idea is that of Liger's fused linear cross-entropy, Hsu et al. 2024.)
    """

    @staticmethod
    def slice_size(n_words: int, device: str) -> int:
        """Tokens whose logits exist at a time: on a CPU, few enough for its cache if the vocabulary is small."""
        return max(512, (2**20 if device == "cpu" else 2**29) // n_words)

    @staticmethod
    def forward(ctx, h, weight, targets, loss_and_gradient):
        device, total, grads = h.device.type, 0.0, []
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else h.dtype
        size = TokenLoss.slice_size(len(weight), device)
        with torch.autocast(device, enabled=False):
            w, grad_w = weight.to(dtype), None
            for part, ids in zip(h.to(dtype).split(size), targets.split(size), strict=True):
                loss, grad = loss_and_gradient(part @ w.T, ids)
                total = total + loss
                if any(ctx.needs_input_grad[:2]):
                    grads.append((grad @ w).to(h.dtype))
                    of_part = (grad.T @ part).to(weight.dtype)
                    grad_w = of_part if grad_w is None else grad_w.add_(of_part)
        if grads:
            ctx.save_for_backward(torch.cat(grads), grad_w)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        grad_h, grad_w = ctx.saved_tensors
        return grad * grad_h, grad * grad_w, None, None


class NanoJEPA(Model):
    """Decoder-only Transformer with a latent objective: [PRED] after the question predicts the answer's latent.

    lm_loss + lambda_jepa * (1 - cos(pred_latent, answer_latent)), answer_latent detached (after LLM-JEPA, Huang et
    al. 2025, and the public nanoJEPA). Deviation from both: the views cannot see each other. They run as separate
    causal rows, which is the block-diagonal mask of `attn_allowed` without its cost. pred_latent is the final-normed
    state at [PRED], answer_latent the pooled, standardised states of the answer's own row. [EOS] and [PRED] are
    the last two ids of the vocabulary.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.eos_id, self.pred_id = config.vocab_size - 2, config.vocab_size - 1
        rows = -(-config.vocab_size // 64) * 64  # a matrix size that hardware is fast with
        self.embed = nn.Embedding(rows, config.n_embd)  # tied with the output
        self.transformer = Transformer(config.n_layer, config.n_head, config.n_embd, config.dropout)
        self.prefix = nn.Linear(config.n_embd, config.n_embd) if config.answer_context == "latent" else None
        self.standardize = Standardize(config.n_embd)
        init_weights(self, config.n_layer)
        self.loss_and_gradient = loss_and_gradient
        self.target_model = None
        if config.target_encoder == "ema":
            self.target_model = nn.ModuleList([frozen_copy(self.embed), frozen_copy(self.transformer)])

    def token_loss(self, h, loss_at, targets):
        """Summed cross-entropy of h [N, C] at loss_at [M] with the ids targets [M]."""
        h = pick(h[None], loss_at)  # (M, C)
        weight = self.embed.weight if torch.is_grad_enabled() else self.embed.weight.detach()
        return TokenLoss.apply(h, weight, targets, self.loss_and_gradient)

    def states(self, x, rows: list[Rows]):
        """Tokens x [N, C] of rows that do not see each other -> [N, C]; in a single pass where attention needs no
        padding."""
        if takes_varlen(x.device, self.config.n_embd // self.config.n_head):
            return self.transformer(x, is_causal=True, kept=join(rows))
        parts = x.split([len(r.index) for r in rows])
        return torch.cat([self.transformer(x, is_causal=True, kept=r) for x, r in zip(parts, rows, strict=True)])

    def answer_latent(self, h, pool):
        """States h [B, T, C] of answer rows, weights pool [B, T] -> standardised latent [B, C], detached."""
        z = (h.detach().float() * pool[..., None]).sum(1)
        return self.standardize(z) if self.config.standardize_target else z

    def target_latent(self, idx, pool):
        """Answer rows idx [B, T] -> answer latents [B, C] by the target encoder, without gradient."""
        embed, transformer = self.target_model or (self.embed, self.transformer)
        with torch.no_grad():
            return self.answer_latent(transformer(embed(idx), is_causal=True), pool)

    def forward(self, batch: dict) -> dict:
        """A batch of data.collate -> {"loss", "lm_loss", "jepa_loss", "cos"}: means, scalars.

        idx [N]: tokens end to end, and `rows`, a list of Rows: where they belong. They are the questions, with [PRED]
        at pred_at [B]; with answer_context = question each question has its answer behind it, with isolated the answers
        follow as Rows of their own, with latent they come in keys of the same names with `answer_` before them.
        loss_at [M]: which of the N have a token loss; targets [M]: the tokens that follow there. target_idx [B, Tt]:
        the rows that the target latent is taken from, or target_at [B, Tt]: where these lie among the N; target_pool:
        weights that pool their states. With `segment` and `positions` [B, T] (data.collate with packed=True) both views
        lie in one row and a dense mask isolates them: the reference path. It may come without `rows`: then idx is
        [B, T] with padding, and N is B T.
        """
        cfg, x = self.config, self.embed(batch["idx"])
        if "segment" in batch:
            (rows,) = batch.get("rows", [None])
            h = self.transformer(x, batch["positions"], attn_allowed(batch["segment"]), kept=rows).view(-1, x.shape[-1])
        else:
            h = self.states(x, batch["rows"])  # (N, C)
        pred = h[batch["pred_at"]]  # (B, C)
        total, count = self.token_loss(h, batch["loss_at"], batch["targets"]), len(batch["targets"])

        if "answer_idx" in batch:
            x = self.embed(batch["answer_idx"])
            x = x.index_copy(0, batch["answer_first"], self.prefix(pred).to(x.dtype))  # replaces the opening [EOS]
            h = self.states(x, batch["answer_rows"])
            total = total + self.token_loss(h, batch["answer_loss_at"], batch["answer_targets"])
            count = count + len(batch["answer_targets"])
        lm_loss = total / count

        if cfg.lambda_jepa == 0:
            return {"loss": lm_loss, "lm_loss": lm_loss}
        if "target_idx" in batch:
            target = self.target_latent(batch["target_idx"], batch["target_pool"])
        else:  # the answers' own rows have just been run
            target = self.answer_latent(h[batch["target_at"]], batch["target_pool"])
        cos = F.cosine_similarity(pred.float(), target, dim=-1).mean()
        jepa_loss = 1 - cos
        return {"loss": lm_loss + cfg.lambda_jepa * jepa_loss, "lm_loss": lm_loss, "jepa_loss": jepa_loss, "cos": cos}

    @torch.no_grad()
    def encode(self, questions: list[list[int]], answers: list[list[int]], batch_size: int = 64):
        """Token ids of texts -> (pred_latent [B, C], answer_latent [B, C]), fp32: the two isolated views.

        Special tokens are added here. The answer's latent comes from the target encoder (its EMA copy where
        config.target_encoder says so). Raises ValueError for an empty text or one longer than config.block_size.
        """
        if not 0 < len(questions) == len(answers):
            raise ValueError(f"{len(questions)} questions and {len(answers)} answers: give as many of each, at least 1")
        rows = self.check_rows([[*q, self.pred_id] for q in questions], "question", 2)
        target = self.encode_answers(answers, batch_size)
        with self.evaluating():
            return in_batches(rows, batch_size, self.predict_latent), target

    @torch.no_grad()
    def encode_answers(self, answers: list[list[int]], batch_size: int = 64) -> torch.Tensor:
        """Token ids of texts -> answer_latent [B, C], fp32; see `encode`."""
        rows = self.check_rows([answer_row(a, self.eos_id) for a in answers], "answer", 3)
        device = self.embed.weight.device

        def encode(part):
            pool = pool_weights(part, self.config.pooling).to(device)
            return self.target_latent(pad_rows(part, self.eos_id, device), pool)

        with self.evaluating():
            return in_batches(rows, batch_size, encode)

    def fit_standardize(self, answers: list[list[int]]):
        """Sets the statistics of the answer latents, for evaluation, from training answers (token ids)."""
        self.standardize.mean.zero_(), self.standardize.std.fill_(1.0)
        self.standardize.fit(self.encode_answers(answers))

    def predict_latent(self, rows: list[list[int]]) -> torch.Tensor:
        """Question rows -> pred_latent [B, C], fp32."""
        device = self.embed.weight.device
        h = self.transformer(self.embed(pad_rows(rows, self.eos_id, device)), is_causal=True)
        at = torch.tensor([len(r) - 1 for r in rows], device=device)
        return h[torch.arange(len(rows), device=device), at].float()

    @torch.no_grad()
    def generate(self, questions: list[list[int]], max_new_tokens: int, temperature: float = 0.0, seed: int = 0):
        """Answers to questions (token ids), see `write`; config.answer_context decides what an answer may see."""
        device, B = self.embed.weight.device, len(questions)
        rows = self.check_rows([[*q, self.pred_id] for q in questions], "question", 2)
        with self.evaluating():
            if self.config.answer_context == "question":
                lengths = torch.tensor([len(r) for r in rows], device=device)
                x = self.embed(pad_rows(rows, self.eos_id, device))
            else:
                lengths = torch.ones(B, dtype=torch.long, device=device)
                x = self.embed(torch.full((B, 1), self.eos_id, device=device))
                if self.prefix is not None:
                    x = self.prefix(self.predict_latent(rows))[:, None]
            return write(self.transformer, self.embed, self.eos_id, x, lengths, max_new_tokens, self.config.block_size,
                         temperature, seed)

    def update_target(self, momentum: float):
        if self.target_model is not None:
            update_target(self.target_model, nn.ModuleList([self.embed, self.transformer]), momentum)


# ----------------------------------------------------------------------------- R-JEPA


class RJEPA(Model):
    """World model over an LLM's hidden states: position 0 is the question, 1 … S-1 the reasoning steps.

    The JEPA core over standardised latents with the adapters W_in (D -> C) and W_out (C -> D). A step's energy is the
    error of its prediction when it is hidden: how badly it follows from what stands around it.
    """

    ENERGIES = ("leave_one_out", "next_step")

    def __init__(self, config):
        super().__init__()
        self.config, D, C = config, config.dim, config.n_embd
        # the last batch's wrong latents that the target encoder read, and those asked for, as shares of its right ones
        self.wrong_share = 0.0, 0.0
        self.register_buffer("h_mean", torch.zeros(D))
        self.register_buffer("h_std", torch.ones(D))
        # quantiles over verified chains: step energies for each of ENERGIES; a chain's highest next-step energy after
        # its first step
        self.register_buffer("quantiles", torch.zeros(3, 101))
        self.w_in, self.w_out = nn.Linear(D, C), nn.Linear(C, D)
        encoder = Transformer(config.n_layer, config.n_head, C, config.dropout)
        self.jepa = JEPA(encoder, Predictor(C, config.predictor_n_layer, config.n_head, config.predictor_n_embd))
        self.w_in_target = frozen_copy(self.w_in)  # belongs to the target encoder, as I-JEPA's patch embedding does
        if config.adapters_only:
            self.jepa.requires_grad_(False)

    def fit_standardize(self, h):
        """Sets mean and std per dimension from latents h [N, D]."""
        self.h_mean.copy_(h.float().mean(0))
        self.h_std.copy_(h.float().std(0).clamp_min(1e-3))

    def standardize(self, h):
        return (h.to(self.h_mean.dtype) - self.h_mean) / self.h_std

    def positions(self, h):
        return torch.arange(h.shape[1], device=h.device).expand(h.shape[:2])

    def targets(self, h, is_real, online: bool = False, wanted=None):
        """Layer-normed target latents [B, S, C] of h [B, S, D] as extracted; online: with gradient; wanted bool [B, S]:
        those alone."""
        positions = self.positions(h) if self.config.target_positions else torch.zeros_like(self.positions(h))
        embed = self.embed if online else functools.partial(self.embed, w_in=self.w_in_target)
        return self.jepa.targets(h, positions, is_real, online, wanted=wanted, embed=embed)

    def predict(self, h, is_visible, is_target):
        """z_pred [N, C] fp32 of the N targets from the visible ones of latents h [B, S, D] as extracted."""
        return self.jepa.predict(h, self.positions(h), is_visible, is_target, embed=self.embed).float()

    def embed(self, h, w_in=None):
        """Latents [..., D] as extracted -> what an encoder reads [..., C] fp32; w_in: by default the one trained."""
        return (w_in or self.w_in)(self.standardize(h)).float()

    def compare(self, z_pred, z_all, h, at, is_step, wrong=None) -> dict:
        """The parts of the loss that compare predictions z_pred [N, C] with the target latents z_all [B, S, C] at the
        flat positions at [N]; h [B, S, D], is_step bool [B, S].

        wrong: (the wrong chains' target latents [B, S, C], bool [B, S]: which of them count as negatives).
        """
        tau, (_, S, _) = self.config.tau, z_all.shape
        z_target, chain, step = pick(z_all, at), at // S, at % S
        parts = {"l1": (z_pred - z_target).abs().mean()}
        parts["variance"] = F.relu(1 - z_pred.var(0, correction=0).add(1e-4).sqrt()).mean()
        p, t = F.normalize(z_pred, dim=-1), F.normalize(z_target, dim=-1)
        column = torch.arange(-(-(len(p) + 1) // 8) * 8, device=p.device)  # other sizes are slow on a GPU
        with torch.autocast(p.device.type, enabled=False):  # bf16 would be off by up to 0.08 once divided by tau
            logits = p @ F.pad(t, (0, 0, 0, len(column) - len(t))).T / tau  # (N, more than N)
            own = (F.normalize(z_all, dim=-1)[chain] @ p[:, :, None])[..., 0] / tau  # (N, S)
        logits = logits.masked_fill(column >= len(p), float("-inf"))
        if wrong is not None:  # one more negative in the first free column: the step's counterfactual
            z_wrong, has_wrong = wrong
            own_wrong = (p * F.normalize(pick(z_wrong, at), dim=-1)).sum(-1, keepdim=True) / tau
            has_wrong = has_wrong.flatten()[at, None] & (column == len(p))
            logits = torch.where(has_wrong, own_wrong, logits)
        parts["infonce"] = F.cross_entropy(logits, torch.arange(len(p), device=p.device))
        parts["own"] = F.cross_entropy(own.masked_fill(~is_step[chain], float("-inf")), step)
        parts["reconstruction"] = (self.w_out(z_pred) - self.standardize(pick(h, at))).abs().mean()
        return parts

    def forward(self, batch: dict) -> dict:
        """A batch of latents.collate -> {"loss" and its named parts}: means, scalars.

        h [B, S, D] as extracted, any finite numbers at padding; is_real, is_visible, is_target bool [B, S] (neither
        visible nor target: hidden, but not asked for). Masks may lie on the CPU (see `to_device`). context_h, where
        given, is seen in h's place: latents of chains that the LLM has read without the hidden step.
        Where some chains have a wrong one: wrong_h and the same three masks with wrong_ before their names; is_wrong
        bool [B, S]: a counterfactual's steps from the wrong one on (it has h's masks; of 2 to 6 % of these steps the
        text is h's, the state is not); right_counts, wrong_counts bool [B, S]: the targets that the margin compares.
        """
        cfg, h, is_real, is_target = self.config, batch["h"], batch["is_real"], batch["is_target"]
        online = cfg.target_encoder == "online" and torch.is_grad_enabled()  # ablation: no stop-gradient
        hard, margin = ("wrong_h" in batch and wanted for wanted in (cfg.hard_negatives, cfg.lambda_margin > 0))
        B, device, is_step = len(h), h.device, is_real.clone()
        is_step[:, 0] = False
        # the wrong chains go through the networks behind the right ones, in the same pass
        h_all = torch.cat((h, batch["wrong_h"])) if hard or margin else h

        asked, real, self.wrong_share = is_step, is_real, (0.0, 0.0)
        if hard:
            asked_wrong = is_target & batch["is_wrong"]
            real_wrong = batch["wrong_is_real"] & asked_wrong.any(1, keepdim=True)
            self.wrong_share = tuple(float(x.sum() / is_real.sum()) for x in (real_wrong, asked_wrong))
            asked, real = torch.cat((is_step, asked_wrong)), torch.cat((is_real, real_wrong))
        z_all = self.targets(h_all[: len(real)], real, online, asked)  # (B or 2 B, S, C)
        wrong = (z_all[B:].detach(), to_device(batch["is_wrong"], device)) if hard else None

        visible, targets = batch["is_visible"], is_target
        if margin:
            counts = torch.cat((batch["right_counts"], batch["wrong_counts"]))
            is_paired = counts.any(1).view(2, B).all(0)
            read = is_paired.clone()
            read[0] = True  # even if no chain is paired: all of several processes must run the same networks
            read = read[:, None].repeat(2, 1)
            visible = torch.cat((visible, batch["wrong_is_visible"] & read[B:]))
            targets = torch.cat((is_target, batch["wrong_is_target"] & read[B:]))
        at = flat_index(is_target, device)  # (N,) of the B S positions
        seen = h_all[: len(visible)]
        if "context_h" in batch:
            seen = torch.cat((batch["context_h"], seen[B:]))
        z_pred = self.predict(seen, visible, targets)
        parts = self.compare(z_pred[: len(at)], z_all[:B], h, at, to_device(is_step, device), wrong)
        parts["margin"] = z_pred.new_zeros(())
        if margin:
            # the wrong chain should have the higher mean error; here the targets learn, too
            real = torch.cat((is_real, batch["wrong_is_real"])) & read
            z = self.targets(h_all, real, online=True, wanted=counts & read)
            right, wrong = mean_error(z_pred, z, targets, counts).view(2, B)
            weight = to_device(is_paired / is_paired.sum().clamp_min(1), device)  # (B,)
            parts["margin"] = (F.softplus((right - wrong) / cfg.margin) * weight).sum()
        loss = parts["l1"] + sum(getattr(cfg, f"lambda_{k}") * v for k, v in parts.items() if k != "l1")
        return {"loss": loss, **parts}

    @torch.no_grad()
    def hidden_steps(self, h, is_real, mode: str = "leave_one_out"):
        """Hides every step of every chain in turn -> (chain [M], step [M], z_pred [M, C], z_target [B, S, C]).

        h [B, S, D] as extracted, is_real [B, S]. leave_one_out hides the step alone, next_step all from it on.
        """
        if mode not in self.ENERGIES:
            raise ValueError(f"mode '{mode}': must be one of {', '.join(self.ENERGIES)}")
        if h.shape[-1] != self.config.dim:
            raise ValueError(f"latents of width {h.shape[-1]}; this run reads {self.config.dim} ({self.config.llm})")
        h = torch.where(is_real[..., None], h, 0.0)
        if not torch.isfinite(h).all():
            raise ValueError(f"latents that are not finite, of {self.config.llm}: try --dtype fp32")
        position = self.positions(h)
        chain, step = (is_real & (position > 0)).nonzero(as_tuple=True)
        out = []
        for c, s in zip(chain.split(2048), step.split(2048), strict=True) if len(chain) else ():
            is_target = position[c] == s[:, None]
            seen = position[c] < s[:, None] if mode == "next_step" else ~is_target
            out.append(self.predict(h[c], is_real[c] & seen, is_target))
        z_pred = torch.cat(out) if out else h.new_zeros(0, self.config.n_embd)
        return chain, step, z_pred, self.targets(h, is_real)

    @torch.no_grad()
    def predict_next(self, h, is_real):
        """z_pred [B, C] of the step that would follow each chain: latents h [B, S, D] as extracted, is_real [B, S]."""
        h, is_real = F.pad(h, (0, 0, 0, 1)), F.pad(is_real, (0, 1))
        is_target = torch.arange(h.shape[1], device=h.device) == is_real.sum(1, keepdim=True)
        return self.predict(h, is_real, is_target)

    @torch.no_grad()
    def around(self, h, is_real, step):
        """What a Speaker attends to when it says step [B] of each chain, h [B, S, D] and is_real [B, S]; it is hidden.

        -> (context [B, 1 + S, C]: the step's predicted latent, then what the context encoder makes of the others;
        allowed [B, 1 + S]; offsets [B, 1 + S] from the step).
        """
        position = self.positions(h)
        is_target = position == step[:, None]
        visible = is_real & ~is_target
        z_context = self.jepa.encode(self.jepa.context_encoder, h, position, visible, embed=self.embed)
        z_pred = self.jepa.predictor(z_context, position, visible, is_target)[:, None].float()
        allowed = torch.cat((torch.ones_like(visible[:, :1]), visible), dim=1)
        offsets = torch.cat((torch.zeros_like(position[:, :1]), position - step[:, None]), dim=1)
        return torch.cat((z_pred, z_context.float()), dim=1), allowed, offsets

    def target_of(self, h, is_real, step):
        """Target latent [B, C] of step [B] of each chain h [B, S, D], encoded with the whole chain in view."""
        return self.targets(h, is_real)[torch.arange(len(h), device=h.device), step]

    def to_llm(self, z_pred):
        """Predictions [N, C] through W_out -> latents in the LLM's own space [N, D]."""
        return self.w_out(z_pred.to(self.h_mean.dtype)) * self.h_std + self.h_mean

    def energy(self, h, is_real, mode: str = "leave_one_out"):
        """Energy [B, S] of every step: the L1 error of its predicted latent. NaN at position 0 and at padding.

        h [B, S, D] latents as extracted, is_real bool [B, S]. Deterministic: nothing is drawn.
        """
        with self.evaluating():
            chain, step, z_pred, z_target = self.hidden_steps(h, is_real, mode)
        out = torch.full(is_real.shape, float("nan"), device=h.device)
        out[chain, step] = (z_pred - z_target[chain, step]).abs().mean(-1)
        return out

    def coherence(self, energy):
        """For each leave-one-out energy the share of verified steps with a higher one, in [0, 1], by the quantiles that
        training stored."""
        q = self.quantiles[self.ENERGIES.index("leave_one_out")]
        return (1 - torch.searchsorted(q, energy.contiguous()).float() / (len(q) - 1)).clamp(0, 1)

    def update_target(self, momentum: float):
        momentum = momentum if self.config.target_encoder == "ema" else 0.0
        update_target(self.w_in_target, self.w_in, momentum)
        if not self.config.adapters_only:
            self.jepa.update_target(momentum)

    def flops_per_token(self, T: float) -> float:
        """Forward and backward of what is trained (of the encoder, on what is visible), and the target encoder's
        forward, also on the wrong chains of the last batch; the MLP of a last block only where output is asked for.
        Not counted: the margin's passes, gradients of an online target encoder and through frozen networks
        (adapters_only)."""
        cfg = self.config
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        encoder = sum(p.numel() for p in self.jepa.target_encoder.parameters())
        attention = 16 * cfg.n_layer * cfg.n_embd + 12 * cfg.predictor_n_layer * cfg.predictor_n_embd
        hidden = 0.0 if cfg.adapters_only else 0.4  # of the latents, by the presets' masks
        read, asked = self.wrong_share
        unasked = 16 * cfg.n_embd**2 * (1 / T + read - asked)
        unasked += 0.0 if cfg.adapters_only else 48 * cfg.predictor_n_embd**2 * 0.6
        return 6 * (trained - hidden * encoder) + 2 * encoder * (1 + read) + attention * T - unasked


def mean_error(z_pred, z_target, is_target, counts):
    """Mean L1 error [B] of predictions z_pred [N, C] against z_target [B, S, C], over the targets in counts [B, S]."""
    at, counts = flat_index(is_target, z_target.device), to_device(counts, z_target.device)
    error = spread((z_pred - pick(z_target, at)).abs().mean(-1), Rows(at, is_target.shape))
    return (error * counts).sum(1) / counts.sum(1).clamp_min(1)


class Guidance(Model):
    """NUDGE's head: makes a shift of the LLM's last state from the predicted next step and the current token's state.

    The LLM's own output matrix turns the shift into a bias over the vocabulary. A matrix of the head's own would have a
    row for every word, to be learnt, and to be read for every token.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.norm_z, self.norm_h = RMSNorm(config.z_dim), RMSNorm(config.h_dim)
        self.fc = nn.Linear(config.z_dim + config.h_dim, config.n_hidden)
        self.out = nn.Linear(config.n_hidden, config.h_dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # no shift before the first step of training: the LLM's own words

    def shift(self, z_pred, h):
        """z_pred [M, C], h [M, D] -> [M, D] fp32."""
        z = self.norm_z(z_pred.float()) * self.config.use_z
        x = torch.cat((z, self.norm_h(h.float())), dim=-1)
        return self.out(F.gelu(self.fc(x))).float()

    def forward(self, batch: dict) -> dict:
        """-> {"loss", "ce", "ce_llm" (cross-entropies with and without the shift), "bias" (its mean square)}.

        z_pred [M, C], h [M, D], final [M, D] (the LLM's last normed states), targets [M]; words: the LLM's function
        from such last states to logits [M, V].
        """
        final, targets = batch["final"], batch["targets"]
        moved = final + self.shift(batch["z_pred"], batch["h"]).to(final.dtype)
        with torch.autocast(final.device.type, enabled=False):  # in the LLM's own precision
            own, guided = (batch["words"](x).float() for x in (final, moved))
        parts = {"ce": F.cross_entropy(guided, targets), "ce_llm": F.cross_entropy(own, targets),
                 "bias": (guided - own).square().mean()}
        return {"loss": parts["ce"] + self.config.lambda_bias * parts["bias"], **parts}

    def flops_per_token(self, T: float) -> float:
        return 6 * self.n_params()


class Speaker(Model):
    """A causal decoder that puts vectors into words: cross-attention to a context [B, T_ctx, context_dim].

    Trained with cross-entropy, on an R-JEPA's predictions or a T-JEPA's encodings. [EOS] opens and closes a text and is
    the last but one id of the vocabulary. `offsets` [B, T_ctx]: how far each context vector is from what is spoken.
    """

    MAX_OFFSET = 8

    def __init__(self, config):
        super().__init__()
        self.config, C = config, config.n_embd
        self.eos_id = config.vocab_size - 2
        self.embed = nn.Embedding(-(-config.vocab_size // 64) * 64, C)  # tied with the output
        self.transformer = Transformer(config.n_layer, config.n_head, C, config.dropout, cross=True)
        self.offset = nn.Embedding(2 * self.MAX_OFFSET + 1, C) if config.offsets else None
        self.project = nn.Linear(config.context_dim, C)
        init_weights(self, config.n_layer)

    def prepare(self, context, offsets=None):
        """Context [B, T_ctx, context_dim] -> what cross-attention reads, [B, T_ctx, C].

        Without use_z only the number of latents and their offsets reach it; without use_prediction the first latent,
        which is an R-JEPA's prediction, does not.
        """
        seen = torch.full_like(context[:1, :, :1], self.config.use_z)  # (1, T_ctx, 1)
        seen[:, 0] *= self.config.use_prediction
        x = F.layer_norm(self.project(context * seen), (self.config.n_embd,))
        if offsets is not None:
            x = x + self.offset(offsets.clamp(-self.MAX_OFFSET, self.MAX_OFFSET) + self.MAX_OFFSET)
        return x

    def forward(self, batch: dict) -> dict:
        """-> {"loss", "lm_loss": of the text alone}.

        idx [B, T] ([EOS], then the text; before these what is read, if anything), targets [B, T] (-100: padding),
        is_text [B, T] (which targets are the text's), context, context_allowed, offsets. targets and is_text may lie
        on the CPU.
        """
        losses, is_text = self.losses(batch), batch["is_text"]
        weights = torch.where(is_text, 1.0, self.config.read_weight) * (batch["targets"] >= 0)
        weights, is_text = (to_device(x, losses.device) for x in (weights, is_text))
        return {"loss": (losses * weights).sum() / weights.sum(), "lm_loss": (losses * is_text).sum() / is_text.sum()}

    def losses(self, batch: dict) -> torch.Tensor:
        """Cross-entropy [B, T] of every token of a batch of `forward`, 0 at padding."""
        context, kept = self.prepare(batch["context"], batch.get("offsets")), batch["targets"] >= 0
        h = self.transformer(self.embed(batch["idx"]), is_causal=True, context=context,
                             context_allowed=batch["context_allowed"], is_real=kept)
        at = flat_index(kept, h.device)
        logits = F.linear(pick(h, at), self.embed.weight[: self.config.vocab_size])
        losses = F.cross_entropy(logits.float(), to_device(batch["targets"][kept], h.device), reduction="none")
        return spread(losses, Rows(at, kept.shape))

    @torch.no_grad()
    def generate(self, context, context_allowed, offsets=None, max_new_tokens: int = 64, temperature: float = 0.0,
                 seed: int = 0, prompts: list[list[int]] | None = None) -> list[list[int]]:
        """Token ids of a text for each row, without [EOS], after what it reads (`prompts`); see `write`."""
        rows = [[self.eos_id, *p, self.eos_id] if p else [self.eos_id] for p in prompts or [[]] * len(context)]
        idx, lengths = pad_rows(rows, 0, context.device), torch.tensor([len(r) for r in rows], device=context.device)
        with self.evaluating():
            context = self.transformer.context_keys(self.prepare(context, offsets))
            return write(self.transformer, self.embed, self.eos_id, self.embed(idx), lengths, max_new_tokens,
                         temperature=temperature, seed=seed, context=context, context_allowed=context_allowed)


# ----------------------------------------------------------------------------- T-JEPA


class TextEncoder(nn.Module):
    """A bidirectional Transformer over token embeddings: the part that T-JEPA trains, freezes and distils."""

    def __init__(self, vocab_size: int, n_layer: int, n_head: int, n_embd: int, dropout: float = 0.0):
        super().__init__()
        self.embed = nn.Embedding(-(-vocab_size // 64) * 64, n_embd)
        self.transformer = Transformer(n_layer, n_head, n_embd, dropout)
        init_weights(self, n_layer)

    def forward(self, idx, is_real, positions=None, segment=None):
        """idx [B, T], is_real bool [B, T] (for packed rows also positions, segment [B, T]) -> [B, T, C]."""
        return self.transformer(self.embed(idx), positions, may_attend(is_real, segment, idx.device), is_real=is_real)

    @torch.no_grad()
    def thoughts(self, rows: list[list[int]]) -> torch.Tensor:
        """Thought vectors [len(rows), C] fp32 of texts (token ids): each the mean of its tokens' outputs."""

        def encode(part):
            idx = pad_rows(part, 0, self.embed.weight.device)
            is_real = real_tokens(part, idx.device)
            z = self(idx, is_real).float() * is_real[..., None]
            return z.sum(1) / is_real.sum(1, keepdim=True)

        return in_batches(rows, 64, encode)


class TJEPA(Model):
    """JEPA over text: the latents of the tokens of masked spans, predicted from the text around them.

    Spans are whole sentences to paragraphs. Their tokens are absent from the context encoder's input: the visible ones
    are gathered and encoded alone. MSE to the layer-normed targets of the EMA encoder (I-JEPA; for text after data2vec,
    Baevski et al. 2022). Several documents lie packed in a row and never see each other.

    With config.head predictions go through a projection head and targets through its EMA copy; the head is dropped when
    the encoder is used (as in SimCLR and VICReg). config.document_share: see `document_terms`.
    """

    def __init__(self, config):
        super().__init__()
        self.config, C = config, config.n_embd
        encoder = TextEncoder(config.vocab_size, config.n_layer, config.n_head, C, config.dropout)
        self.embed, self.embed_target = encoder.embed, frozen_copy(encoder.embed)
        predictor = Predictor(C, config.predictor_n_layer, config.n_head, config.predictor_n_embd)
        self.jepa = JEPA(encoder.transformer, predictor)
        self.head = MLP(C) if config.head else nn.Identity()  # PyTorch's initialisation: it is in no residual stream
        self.head_target = frozen_copy(self.head)

    def encoder_weights(self) -> dict:
        """The weights of a TextEncoder: the EMA encoder's, which is what is evaluated, frozen and distilled."""
        parts = (("embed", self.embed_target), ("transformer", self.jepa.target_encoder))
        return {f"{name}.{k}": v for name, part in parts for k, v in part.state_dict().items()}

    @torch.no_grad()
    def encode(self, idx, is_real, positions=None, segment=None):
        """idx [B, T], is_real bool [B, T] (for packed rows also positions, segment [B, T]) -> the (EMA) encoder's
        output for every token, [B, T, C]."""
        return self.jepa.encode(self.jepa.target_encoder, self.embed_target(idx), positions, is_real, segment)

    @torch.no_grad()
    def project(self, z):
        """What `encode` returns -> layer-normed target latents [..., C] fp32, after the head where there is one."""
        return F.layer_norm(self.head_target(z).float(), z.shape[-1:])

    def targets(self, idx, positions, segment):
        """Layer-normed target latents [B, T, C] fp32 of every token."""
        return self.project(self.encode(idx, segment >= 0, positions, segment))

    def see(self, idx, positions, segment, is_target, **counts):
        """-> (the context encoder's output for the visible tokens [B, T, C], visible [B, T]); it runs on them alone."""
        visible = (segment >= 0) & ~is_target
        kept = visible.int().argsort(dim=1, descending=True, stable=True)[:, : int(visible.sum(1).max())]
        at = to_device(kept, idx.device)
        z = self.jepa.encode(self.jepa.context_encoder, self.embed(idx.gather(1, at)), positions.gather(1, at),
                             visible.gather(1, kept), segment.gather(1, kept))  # (B, T_visible, C)
        return z.new_zeros(*idx.shape, z.shape[-1]).scatter(1, at[..., None].expand_as(z), z), visible

    def predict(self, idx, positions, segment, is_target, seen=None, **counts):
        """z_pred [N, C] fp32 of the N hidden tokens; seen: the result of `see`, where it is there already."""
        z_context, visible = seen or self.see(idx, positions, segment, is_target)
        return self.head(self.jepa.predictor(z_context, positions, visible, is_target, segment)).float()

    def forward(self, batch: dict) -> dict:
        """idx, positions, segment (-1: padding) int [B, T], is_target bool [B, T] -> {"loss" and its named parts}; the
        last two may lie on the CPU.

        mse: to the hidden tokens' target latents, standardised over the batch if config says so. Against collapse:
        variance and covariance (VICReg, Bardes et al. 2022, eq. 1, 4) of the context encoder's output for the visible
        tokens (after the head, where there is one), and with config.document_share the `document_terms` of it.
        """
        cfg, seen = self.config, self.see(**batch)
        z_context, visible = seen
        z_pred = self.predict(**batch, seen=seen)
        z_target = self.targets(batch["idx"], batch["positions"], batch["segment"])
        z_target = pick(z_target, flat_index(batch["is_target"], z_target.device))
        if cfg.standardize_target:
            z_target = (z_target - z_target.mean(0)) / z_target.std(0, correction=0).clamp_min(1e-3)
        with torch.autocast(z_context.device.type, enabled=False):
            z = self.head(pick(z_context, flat_index(visible, z_context.device)).float())
            z = z - z.mean(0)
            cov = z.T @ z / len(z)  # (C, C)
            std = cov.diagonal().add(1e-4).sqrt()
            parts = {"mse": F.mse_loss(z_pred, z_target), "variance": F.relu(1 - std).mean(),
                     "covariance": off_diagonal(cov)}
            if cfg.document_share:
                row = torch.arange(len(visible), device=visible.device)[:, None] * visible.shape[1]
                parts |= document_terms(z / std, (batch["segment"] + row)[visible], cfg.document_share)
        loss = parts["mse"] + sum(getattr(cfg, f"lambda_{k}") * v for k, v in parts.items() if k != "mse")
        return {"loss": loss, **parts}

    def update_target(self, momentum: float):
        targets, online = (self.embed_target, self.head_target), (self.embed, self.head)
        update_target(nn.ModuleList(targets), nn.ModuleList(online), momentum)
        self.jepa.update_target(momentum)

    def flops_per_token(self, T: float) -> float:
        """Forward and backward of the predictor, a head and, on the visible half, the encoder; the targets' forward."""
        cfg, parts = self.config, (self.jepa.context_encoder, self.jepa.predictor, self.head)
        encoder, predictor, head = (sum(p.numel() for p in part.parameters()) for part in parts)
        attention = 7 * cfg.n_layer * cfg.n_embd + 12 * cfg.predictor_n_layer * cfg.predictor_n_embd
        return 3 * encoder + 2 * encoder + 6 * predictor + 8 * head + attention * T


def off_diagonal(cov):
    """Sum of squares off the diagonal of a matrix [C, C], divided by C."""
    return (cov.square().sum() - cov.diagonal().square().sum()) / len(cov)


def document_terms(z, document, share: float) -> dict:
    """Losses that spread latents within documents and between them: z [N, C] standardised per dimension, document [N].

    document: the share of each dimension's variance that lies between documents (0: every token for itself, 1: a
    document is one vector) should be `share`; the squared distance from it. decorrelation: `off_diagonal` of the
    correlations of the documents' means, and of tokens less their document's mean; a smaller scale cannot lower it.
    With D documents the part of the means is at least about C / D: it makes a batch's documents orthogonal. So a larger
    batch is another loss, and with a single document both terms mean nothing.
    """
    names, number = document.unique(return_inverse=True)
    belongs = F.one_hot(to_device(number, z.device), len(names)).to(z)  # (N, D)
    between = belongs @ (belongs.T @ z / belongs.sum(0)[:, None])
    correlations, std = [], []
    for part in (between, z - between):
        std.append(part.square().mean(0).clamp_min(1e-4).sqrt())
        correlations.append((part / std[-1]).T @ (part / std[-1]) / len(z))
    return {"document": (std[0].square() - share).square().mean(),
            "decorrelation": sum(off_diagonal(c) for c in correlations)}


class DistilledEncoder(Model):
    """A TextEncoder that learns a teacher's outputs, through a projection, by MSE: JEPA-to-JEPA distillation."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.student = TextEncoder(config.vocab_size, config.n_layer, config.n_head, config.n_embd, config.dropout)
        self.project = nn.Linear(config.n_embd, config.teacher_dim)

    def encoder_weights(self) -> dict:
        return self.student.state_dict()

    def forward(self, batch: dict) -> dict:
        """idx, positions, segment [B, T], z_teacher [B, T, C_teacher] layer-normed -> {"loss", "mse", "cos"}."""
        is_real = batch["segment"] >= 0
        z, z_teacher = self.student(batch["idx"], is_real, batch["positions"], batch["segment"]), batch["z_teacher"]
        at = flat_index(is_real, z.device)
        z, z_teacher = self.project(pick(z, at)).float(), pick(z_teacher, at)
        mse = F.mse_loss(z, z_teacher)
        return {"loss": mse, "mse": mse, "cos": F.cosine_similarity(z, z_teacher, dim=-1).mean()}

    def flops_per_token(self, T: float) -> float:
        """Embeddings are looked up, not multiplied by."""
        return super().flops_per_token(T) - 6 * self.student.embed.weight.numel()


class SpeakingTJEPA(Model):
    """T-JEPA's second phase: a TextEncoder reads the question, a Speaker that attends to it writes the response."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        shape = (config.vocab_size, config.encoder_n_layer, config.encoder_n_head, config.encoder_n_embd)
        self.text_encoder = TextEncoder(*shape, config.dropout if config.train_encoder else 0.0)
        self.text_encoder.requires_grad_(config.train_encoder)
        self.speaker = Speaker(config)
        self.eos_id = self.speaker.eos_id

    def encoder_weights(self) -> dict:
        return self.text_encoder.state_dict()

    def encode(self, idx, is_real):
        """Questions idx [B, T], is_real bool [B, T] -> the context for the Speaker, [B, T, C]."""
        with torch.set_grad_enabled(self.config.train_encoder and torch.is_grad_enabled()):
            return self.text_encoder(idx, is_real)

    def forward(self, batch: dict) -> dict:
        """A batch of Speaker.forward with question [B, T] and context_allowed [B, T] in place of the context."""
        return self.speaker(batch | {"context": self.encode(batch["question"], batch["context_allowed"])})

    @torch.no_grad()
    def generate(self, questions: list[list[int]], max_new_tokens: int, temperature: float = 0.0, seed: int = 0):
        """Responses to questions (token ids) -> list of token lists, up to [EOS]; see Speaker.generate."""
        idx = pad_rows(self.check_rows(questions, "question", 1), 0, self.text_encoder.embed.weight.device)
        allowed = real_tokens(questions, idx.device)
        with self.evaluating():
            return self.speaker.generate(self.encode(idx, allowed), allowed, None, max_new_tokens, temperature, seed)

    def flops_per_token(self, T: float) -> float:
        """Of the Speaker alone; the questions' tokens do not count."""
        return self.speaker.flops_per_token(T)


# ----------------------------------------------------------------------------- optimiser, MFU

PEAK_FLOPS = {  # dense bf16, from the makers' data sheets; the first whose words are all in the device's name
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12, "4090 Laptop": None, "H200": 989e12, "GH200": 989e12,
    "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12, "3090": 71e12, "A10G": 70e12,
}


def configure_optimizers(model: nn.Module, config) -> torch.optim.AdamW:
    """AdamW with decay on matrices only; the fused kernel."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)


def estimate_mfu(flops_per_s: float, device_name: str) -> float | None:
    """Share of the device's peak in [0, 1]; None for a device whose peak is not in PEAK_FLOPS."""
    words = set(device_name.replace("-", " ").split())
    peak = next((v for k, v in PEAK_FLOPS.items() if words.issuperset(k.split())), None)
    return None if peak is None else flops_per_s / peak


# ----------------------------------------------------------------------------- learning or collapse?


def latent_figures(z_pred, z_target, z_copy, error: str = "l1") -> dict:
    """Learning or collapse? z_pred, z_target, z_copy (the target of a neighbour) [N, C], N at least 2.

    The error, `l1` or `mse`, beside those of the best constant (the targets' median, or mean) and of copying the
    neighbour; effective_rank and mean per-dimension std of predictions and targets; the predictions' mean cosine over
    different pairs.
    """
    p, n = F.normalize(z_pred.double(), dim=-1), len(z_pred)
    measure = {"l1": F.l1_loss, "mse": F.mse_loss}[error]
    constant = z_target.median(0).values if error == "l1" else z_target.mean(0)
    return {
        error: float(measure(z_pred, z_target)), f"{error}_copy": float(measure(z_copy, z_target)),
        f"{error}_predict_mean": float(measure(constant.expand_as(z_target), z_target)),
        "effective_rank": effective_rank(z_pred),
        "std": float(z_pred.std(0).mean()), "mean_cos": float((p.sum(0).square().sum() - n) / (n * (n - 1))),
        "target_effective_rank": effective_rank(z_target), "target_std": float(z_target.std(0).mean()), "n": n,
    }


def effective_rank(z: torch.Tensor) -> float:
    """RankMe (Garrido et al. 2023, eq. 2): exp of the entropy of the normalised singular values of z [N, C]."""
    z = z.cpu().double()  # fp64, which MPS lacks; singular values from the smaller product: the rows are many
    s = torch.linalg.eigvalsh(z.T @ z if len(z) > z.shape[1] else z @ z.T).clamp_min(0).sqrt()
    p = s / s.sum().clamp_min(1e-12) + 1e-12
    return float(torch.exp(-(p * p.log()).sum()))


def alignment(pred: torch.Tensor, target: torch.Tensor) -> dict:
    """Do predicted latents find their own targets? pred, target [N, C], N >= 2, row i belongs to row i.

    cos_matched, cos_mismatched (mean over all other rows), gap; retrieval_top1 (own target is the nearest by cosine; a
    tie of m counts 1/m, so chance stays 1/N with duplicate targets), its 95 % interval (Wilson), chance_top1;
    effective_rank and std (mean per-dimension std after layer norm: 0 = collapsed, 1 = as spread as possible) of
    predictions and targets; predict_mean_cos: what the best constant prediction would reach.
    """
    n = len(pred)
    pred, target = pred.cpu(), target.cpu()  # fp64 below, which MPS lacks
    p, t = F.normalize(pred.double(), dim=-1), F.normalize(target.double(), dim=-1)
    sim = p @ t.T
    own = sim.diagonal()
    best = sim >= sim.max(dim=1, keepdim=True).values - 1e-9
    top1 = float((best.diagonal().double() / best.sum(1)).mean())
    mismatched = float((sim.sum() - own.sum()) / (n * (n - 1)))
    lo, hi = wilson(top1, n)

    def std(z):
        return float(F.layer_norm(z.float(), z.shape[-1:]).std(0).mean())

    return {
        "cos_matched": float(own.mean()), "cos_mismatched": mismatched, "gap": float(own.mean()) - mismatched,
        "retrieval_top1": top1, "retrieval_ci95": [lo, hi], "chance_top1": 1 / n,
        "effective_rank": effective_rank(pred), "std": std(pred),
        "target_effective_rank": effective_rank(target), "target_std": std(target),
        "predict_mean_cos": float(t.mean(0).norm()), "n": n,
    }


def wilson(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927)."""
    z = 1.96
    mid = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, mid - half), min(1.0, mid + half)
