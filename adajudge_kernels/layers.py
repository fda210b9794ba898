"""The layers of an AdaJudge head, stage by stage, and the head itself.

Parameters may be kept in another dtype than the states (fp32 master weights with bf16 states): matrix products
run in the dtype of the states, norms, softmax, pooling, experts and router in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adajudge_kernels.arguments import (
    MAX_DEPTHS,
    MAX_FEATURES,
    MAX_WIDTH,
    check_choice,
    check_layout,
    check_shape,
    check_size,
    check_states,
)
from adajudge_kernels.experts.ops import CombinedReward, ExpertWeights, gated_expert_combination
from adajudge_kernels.layout import SequenceLayout, TokenRole
from adajudge_kernels.pooling.ops import PooledViews, depth_gate, multi_view_pool
from adajudge_kernels.refinement.ops import (
    MAX_HEAD_SIZE,
    residual_rms_norm,
    sequence_attention,
    swiglu,
)

__all__ = [
    "AdaJudgeHead",
    "DepthGate",
    "DepthGatedRefinement",
    "ExpertCombination",
    "JudgeOutput",
    "MultiViewPooling",
    "RefinementBlock",
]


class JudgeOutput(NamedTuple):
    """What the head says of each of the B sequences, all fp32."""

    reward: Tensor  # [B]
    view_scores: Tensor  # [B, 3], s_v in the order last, mean, attention
    view_weights: Tensor  # [B, 3], the router's pi
    depth_weights: Tensor  # [B, K], alpha


class DepthGate(nn.Module):
    """``alpha = softmax(W_d c + b_d)`` over K depths, c the mean of a sequence's H0 (paper, Stage I).

    Starts uniform: W_d and b_d are zero.
    """

    def __init__(self, hidden_size: int, num_blocks: int) -> None:
        super().__init__()
        check_size("hidden_size", hidden_size, MAX_FEATURES)
        check_size("num_blocks", num_blocks, MAX_DEPTHS)
        self.weight = nn.Parameter(torch.empty(num_blocks, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_blocks))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zeros."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        """``hidden [T, d]`` -> depth weights ``[B, K]`` and prompt mean ``[B, d]``, fp32."""
        return depth_gate(hidden, self.weight, self.bias, layout)


def default_num_heads(hidden_size: int) -> int:
    """Heads of 128 features where they divide the width, else of 64 or 32, else of the most below 128 that do."""
    sizes = (128, 64, 32, *range(min(128, hidden_size), 0, -1))
    return next(hidden_size // size for size in sizes if hidden_size % size == 0)


class Projection(nn.Linear):
    """``x W^T`` in the dtype of x, without bias.

    A module of its own that is always called, so that hooks, offloading and adapters of other libraries reach it.

    Args:
        in_features: of x.
        out_features: rows of W.
        starts_at_zero: W is zero at first, not ``N(0, 1 / in_features)``.
    """

    def __init__(self, in_features: int, out_features: int, starts_at_zero: bool = False) -> None:
        self.starts_at_zero = starts_at_zero
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        """As the class says."""
        if self.starts_at_zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.normal_(self.weight, std=self.in_features**-0.5)

    def forward(self, x: Tensor, outputs: slice | None = None) -> Tensor:
        """``[T, in_features] -> [T, out_features]``, or of the outputs only those named."""
        weight = self.weight if outputs is None else self.weight[outputs]
        return F.linear(x, weight.to(x.dtype))


class RefinementBlock(nn.Module):
    """A light transformer block ``T_k``: ``u = x + Attn(RMSNorm(x))``, ``y = u + SwiGLU(RMSNorm(u))``.

    No positional encoding: the backbone's states carry position. Output and down projections start at zero, so
    the block starts as the identity.

    Args:
        hidden_size: d.
        num_heads: attention heads; default from `default_num_heads`.
        intermediate_size: width f of the SwiGLU; default d.
        causal: whether attention is causal; False excludes prompt-shared layouts.
        eps: of the norms.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int | None = None,
        intermediate_size: int | None = None,
        causal: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        check_size("hidden_size", hidden_size, MAX_FEATURES)
        heads = default_num_heads(hidden_size) if num_heads is None else num_heads
        check_size("num_heads", heads, hidden_size)
        if hidden_size % heads:
            raise ValueError(f"num_heads: {heads} came, expected a divisor of hidden_size {hidden_size}")
        if hidden_size // heads > MAX_HEAD_SIZE:
            raise ValueError(
                f"num_heads: {heads} came, which makes heads of {hidden_size // heads} features; expected at most "
                f"{MAX_HEAD_SIZE}"
            )
        width = hidden_size if intermediate_size is None else intermediate_size
        check_size("intermediate_size", width, MAX_WIDTH)
        self.hidden_size, self.num_heads, self.causal, self.eps = hidden_size, heads, causal, eps
        self.attention_norm = nn.Parameter(torch.empty(hidden_size))
        self.qkv = Projection(hidden_size, 3 * hidden_size)
        self.output = Projection(hidden_size, hidden_size, starts_at_zero=True)
        self.mlp_norm = nn.Parameter(torch.empty(hidden_size))
        self.gate_up = Projection(hidden_size, 2 * width)
        self.down = Projection(width, hidden_size, starts_at_zero=True)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Ones for the norms; the projections have a ``reset_parameters`` of their own."""
        for norm in (self.attention_norm, self.mlp_norm):
            nn.init.ones_(norm)

    def forward(
        self,
        hidden: Tensor,
        layout: SequenceLayout,
        refined: str = "all",
        update: Tensor | None = None,
        settled: bool = True,
    ) -> Tensor | Unsettled:
        """``[T, d] -> [T, d]``; rows of padding come out as zero.

        In a chain of blocks, a block's last addition is done by the next block's first norm, on the way: called with
        ``settled=False``, a block returns its parts, of which two are the next one's `hidden` and `update`.

        Args:
            hidden: H_{k-1}, or what `update` is to be added to.
            layout: where the tokens of each sequence lie.
            refined: ``"all"`` tokens, or only the ``"response"``: its states are the same up to rounding, the others come
                out as they went in, and no query and no MLP is computed for them.
            update: the addition that the block before has left, ``[T, d]``.
            settled: whether to return H_k, or `Unsettled`.
        """
        check_layout(layout)
        check_states("hidden", hidden, layout)
        check_shape("hidden", hidden, (layout.num_tokens, self.hidden_size))
        check_choice("refined", refined, ("all", "response"))
        hidden = _zero_at_padding(hidden, layout)
        update = None if update is None else _zero_at_padding(update, layout)
        result = self._advance(hidden, update, layout, refined)
        return result.settled(layout) if settled else result

    def _advance(
        self, stream: Tensor, update: Tensor | None, layout: SequenceLayout, refined: str
    ) -> Unsettled:
        entered, normed = residual_rms_norm(stream, update, self.attention_norm, self.eps)
        if refined == "all":
            rows, projections = entered, [self.qkv(normed)]
        else:
            chosen = _response_tokens(layout)
            rows = entered.index_select(0, chosen)
            projections = self._response_projections(normed, chosen)
        # Under autocast the products and what is between them are in its dtype; the stream stays in its own.
        size = self.hidden_size // self.num_heads
        heads = [x.unflatten(-1, (-1, self.num_heads, size)).squeeze(1) for x in projections]
        attended = sequence_attention(heads, layout, self.causal, queries=refined).flatten(1)
        update = self.output(attended).to(rows.dtype)
        stream, normed = residual_rms_norm(rows, update, self.mlp_norm, self.eps)
        update = self.down(swiglu(self.gate_up(normed)))
        return Unsettled(entered, stream, update.to(stream.dtype), refined)

    def _response_projections(self, normed: Tensor, chosen: Tensor) -> list[Tensor]:
        """Queries of the chosen tokens, keys and values of all."""
        queries, keys_and_values = slice(None, self.hidden_size), slice(self.hidden_size, None)
        if isinstance(self.qkv, Projection):
            return [self.qkv(normed.index_select(0, chosen), queries), self.qkv(normed, keys_and_values)]
        projected = self.qkv(normed)  # another library's layer in its place: of its outputs all or none
        return [projected[chosen, queries], projected[:, keys_and_values]]


class Unsettled(NamedTuple):
    """A block's result before its last addition: ``H_k = stream + update``."""

    entered: Tensor  # H_{k-1} [T, d]
    stream: Tensor  # of the refined tokens
    update: Tensor  # of the refined tokens
    refined: str  # "all" or "response"

    def settled(self, layout: SequenceLayout) -> Tensor:
        """``H_k``; the rows of tokens that were not refined are those of H_{k-1}."""
        if self.refined == "all":
            return _zero_at_padding(self.stream + self.update, layout)
        return self.entered.index_copy(0, _response_tokens(layout), self.stream + self.update)


def _response_tokens(layout: SequenceLayout) -> Tensor:
    """int64 indices of the response tokens, in their order."""
    assert layout.response_attention is not None  # as check_layout says
    return layout.response_attention.rows


def _zero_at_padding(x: Tensor, layout: SequenceLayout) -> Tensor:
    """Zero where there is padding, and so is the gradient: nothing that lies there may meet a weight's gradient."""
    if not layout.has_padding:
        return x
    return torch.where((layout.roles != TokenRole.PADDING)[:, None], x, 0)


class DepthGatedRefinement(nn.Module):
    """K refinement blocks in series and the gate that weighs them (paper, Stage I).

    Args:
        hidden_size: d.
        num_blocks: K, 1 to 8.
        num_heads: attention heads of a block; default from `default_num_heads`.
        intermediate_size: width f of a block's SwiGLU; default d.
        causal: whether attention is causal; False excludes prompt-shared layouts.
    """

    def __init__(
        self,
        hidden_size: int,
        num_blocks: int = 3,
        num_heads: int | None = None,
        intermediate_size: int | None = None,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.gate = DepthGate(hidden_size, num_blocks)
        self.blocks = nn.ModuleList(
            RefinementBlock(hidden_size, num_heads, intermediate_size, causal) for _ in range(num_blocks)
        )
        self.gradient_checkpointing = False

    def forward(
        self, hidden: Tensor, layout: SequenceLayout, read: str = "all"
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """``hidden [T, d]`` -> states ``H_1..H_K``, depth weights ``[B, K]``, prompt mean ``[B, d]``.

        The weighted sum of the states is left to `MultiViewPooling`, which never writes it.

        Args:
            hidden: H0.
            layout: where the tokens of each sequence lie.
            read: which tokens of the states are read afterwards, ``"all"`` or the ``"response"``. The last block
                refines no others; the rows of H_K that are not read hold H_{K-1}.
        """
        check_layout(layout)
        check_choice("read", read, ("all", "response"))
        depth_weights, prompt_mean = self.gate(hidden, layout)
        last = len(self.blocks) - 1
        states: list[Tensor] = []
        update: Tensor | None = None
        for k, block in enumerate(self.blocks):
            refined = read if k == last else "all"
            if self.gradient_checkpointing and self.training:  # of a block only its input is kept
                hidden = checkpoint(block, hidden, layout, refined, use_reentrant=False)
                states.append(hidden)
                continue
            result = block(hidden, layout, refined, update, settled=False)
            entered, hidden, update, _ = result
            states += [_zero_at_padding(entered, layout)] if k else []
            states += [result.settled(layout)] if k == last else []
        return states, depth_weights, prompt_mean


class MultiViewPooling(nn.Module):
    """Last, mean and attention view of the depth-weighted states (paper, Stage II).

    Args:
        hidden_size: d.
        attention_tokens: ``"all"`` tokens of the sequence, or only its ``"response"``.
    """

    def __init__(self, hidden_size: int, attention_tokens: str = "all") -> None:
        super().__init__()
        check_size("hidden_size", hidden_size, MAX_FEATURES)
        check_choice("attention_tokens", attention_tokens, ("all", "response"))
        self.attention_tokens = attention_tokens
        self.attention_weight = nn.Parameter(torch.empty(hidden_size))
        self.attention_bias = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zeros: every token counts alike at first."""
        nn.init.zeros_(self.attention_weight)
        nn.init.zeros_(self.attention_bias)

    def forward(self, states: list[Tensor], depth_weights: Tensor, layout: SequenceLayout) -> PooledViews:
        """K states ``[T, d]``, depth weights ``[B, K]`` -> `PooledViews`, each ``[B, d]`` fp32."""
        return multi_view_pool(
            states, depth_weights, self.attention_weight, self.attention_bias, layout, self.attention_tokens
        )


class ExpertCombination(nn.Module):
    """Three view MLPs and the router that mixes their scores (paper, Stage III).

    The router's output layer starts at zero, so all views count alike at first.

    Args:
        hidden_size: d.
        expert_hidden_size: h of each view MLP.
        router_hidden_size: h_r of the router.
    """

    def __init__(
        self, hidden_size: int, expert_hidden_size: int = 256, router_hidden_size: int = 256
    ) -> None:
        super().__init__()
        check_size("hidden_size", hidden_size, MAX_FEATURES)
        check_size("expert_hidden_size", expert_hidden_size, MAX_WIDTH)
        check_size("router_hidden_size", router_hidden_size, MAX_WIDTH)
        d, h, h_r = hidden_size, expert_hidden_size, router_hidden_size
        self.view_in_weight = nn.Parameter(torch.empty(3, h, d))
        self.view_in_bias = nn.Parameter(torch.empty(3, h))
        self.view_out_weight = nn.Parameter(torch.empty(3, h))
        self.view_out_bias = nn.Parameter(torch.empty(3))
        self.router_in_weight = nn.Parameter(torch.empty(h_r, 4 * d))
        self.router_in_bias = nn.Parameter(torch.empty(h_r))
        self.router_out_weight = nn.Parameter(torch.empty(3, h_r))
        self.router_out_bias = nn.Parameter(torch.empty(3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Hidden layers ``N(0, 1/fan_in)``; biases and the router's output layer zero."""
        for weight in (self.view_in_weight, self.view_out_weight, self.router_in_weight):
            nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
        for name in (
            "view_in_bias",
            "view_out_bias",
            "router_in_bias",
            "router_out_weight",
            "router_out_bias",
        ):
            nn.init.zeros_(getattr(self, name))

    @property
    def weights(self) -> ExpertWeights:
        """The parameters in the order the operation takes them."""
        return ExpertWeights(*(getattr(self, name) for name in ExpertWeights._fields))

    def forward(self, views: PooledViews, prompt_mean: Tensor) -> CombinedReward:
        """Three views and the prompt mean, each ``[B, d]`` -> reward, view scores and view weights, fp32."""
        return gated_expert_combination(*views, prompt_mean, self.weights)


class AdaJudgeHead(nn.Module):
    """Token states in, rewards out: refinement, three views, gated experts (the whole of the paper's model).

    Args:
        hidden_size: d of the backbone.
        num_blocks: K refinement blocks, 1 to 8.
        num_heads: attention heads of a block; default heads of 128 (or 64, 32) features.
        intermediate_size: SwiGLU width of a block; default d.
        expert_hidden_size: h of the view MLPs.
        router_hidden_size: h_r of the router.
        causal: causal refinement attention; False is bidirectional and excludes prompt-shared layouts.
        attention_tokens: what the attention view sees: ``"all"`` tokens or the ``"response"``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_blocks: int = 3,
        num_heads: int | None = None,
        intermediate_size: int | None = None,
        expert_hidden_size: int = 256,
        router_hidden_size: int = 256,
        causal: bool = True,
        attention_tokens: str = "all",
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.refinement = DepthGatedRefinement(hidden_size, num_blocks, num_heads, intermediate_size, causal)
        self.pooling = MultiViewPooling(hidden_size, attention_tokens)
        self.experts = ExpertCombination(hidden_size, expert_hidden_size, router_hidden_size)

    def forward(self, hidden: Tensor, layout: SequenceLayout) -> JudgeOutput:
        """Score every sequence of `layout`.

        Args:
            hidden: H0, ``[T, d]``; or ``[B, L, d]`` with a padded layout of that shape.
            layout: where the tokens of each sequence lie. Padding is taken out before the blocks: no arithmetic
                is spent on it, and nothing in it can reach a result.

        Raises:
            ValueError: hidden does not fit the layout or the head; or a prompt-shared layout with a
                bidirectional head.
        """
        check_layout(layout)
        if isinstance(hidden, Tensor) and hidden.dim() == 3:
            if tuple(hidden.shape[:2]) != layout.padded_shape:
                raise ValueError(
                    f"hidden: shape {tuple(hidden.shape)} came, expected [B, L, d] with a padded layout of that "
                    f"B and L; this layout's (B, L) is {layout.padded_shape}"
                )
            check_shape("hidden", hidden, (*layout.padded_shape, self.hidden_size))
            hidden = hidden.flatten(0, 1)
        check_states("hidden", hidden, layout)
        check_shape("hidden", hidden, (layout.num_tokens, self.hidden_size))
        kept, layout = layout.without_padding()
        if kept is not None:
            hidden = hidden[kept]
        states, depth_weights, prompt_mean = self.refinement(hidden, layout, self.pooling.attention_tokens)
        views = self.pooling(states, depth_weights, layout)
        reward, view_scores, view_weights = self.experts(views, prompt_mean)
        return JudgeOutput(reward, view_scores, view_weights, depth_weights)
