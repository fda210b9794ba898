"""Fused layers for AdaJudge reward models: depth-gated refinement, three pooled views, gated experts."""

from adajudge_kernels._version import __version__
from adajudge_kernels.backends import available_backends, use_backend
from adajudge_kernels.experts.ops import CombinedReward, ExpertWeights, gated_expert_combination
from adajudge_kernels.layers import (
    AdaJudgeHead,
    DepthGate,
    DepthGatedRefinement,
    ExpertCombination,
    JudgeOutput,
    MultiViewPooling,
    RefinementBlock,
)
from adajudge_kernels.layout import SequenceLayout, TokenRole
from adajudge_kernels.loss.ops import focal_bradley_terry_loss
from adajudge_kernels.pooling.ops import (
    PooledViews,
    attention_pool,
    depth_gate,
    masked_mean_pool,
    multi_view_pool,
)
from adajudge_kernels.refinement.libraries import use_attention

__all__ = [
    "AdaJudgeHead",
    "CombinedReward",
    "DepthGate",
    "DepthGatedRefinement",
    "ExpertCombination",
    "ExpertWeights",
    "JudgeOutput",
    "MultiViewPooling",
    "PooledViews",
    "RefinementBlock",
    "SequenceLayout",
    "TokenRole",
    "__version__",
    "attention_pool",
    "available_backends",
    "depth_gate",
    "focal_bradley_terry_loss",
    "gated_expert_combination",
    "masked_mean_pool",
    "multi_view_pool",
    "use_attention",
    "use_backend",
]
