"""Malformed calls: every error names the argument, what came and what was expected."""

import pytest
import torch

import adajudge_kernels as ak
from adajudge_kernels.refinement.ops import swiglu
from tests.kernels.operations import draw_experts

LAYOUT = ak.SequenceLayout.packed([2, 1], [3, 2])  # 8 tokens, 2 sequences
H = torch.zeros(8, 6)
W, B1 = torch.zeros(6), torch.zeros(1)
GATE, GATE_BIAS = torch.zeros(3, 6), torch.zeros(3)
ALPHA = torch.ones(2, 1)
EXPERTS = {name: x.float() for name, x in draw_experts(2, 6, 4, 5).items()}
VIEWS = [EXPERTS[name] for name in ("last", "mean", "attention", "prompt")]
WEIGHTS = ak.ExpertWeights(*(EXPERTS[name] for name in ak.ExpertWeights._fields))
R = torch.zeros(4)


def pool(states, alpha=ALPHA, weight=W, bias=B1, layout=LAYOUT, tokens="all"):
    return ak.multi_view_pool(states, alpha, weight, bias, layout, tokens)


HEAD = ak.AdaJudgeHead(6, expert_hidden_size=4, router_hidden_size=4)

CALLS = [
    (lambda: HEAD(None, LAYOUT), r"hidden: NoneType came, expected a tensor \[T, d\]"),
    (lambda: HEAD(H, None), "layout: NoneType came, expected a SequenceLayout"),
    (lambda: HEAD(LAYOUT, H), "layout: Tensor came, expected a SequenceLayout"),
    (lambda: HEAD(H[:, :5], LAYOUT), r"hidden: shape \(8, 5\) came, expected \[8, 6\]"),
    (lambda: HEAD(H.double(), LAYOUT), "weight: dtype torch.float32 came with hidden of torch.float64"),
    (lambda: ak.AdaJudgeHead(0), "hidden_size: 0 came, expected an integer from 1 to 16384"),
    (lambda: ak.AdaJudgeHead(20000), "hidden_size: 20000 came"),
    (lambda: ak.AdaJudgeHead("6"), "hidden_size: '6' came"),
    (lambda: ak.AdaJudgeHead(6, num_blocks=9), "num_blocks: 9 came, expected an integer from 1 to 8"),
    (lambda: ak.AdaJudgeHead(6, num_blocks=2.0), "num_blocks: 2.0 came"),
    (lambda: ak.AdaJudgeHead(6, num_heads=4), "num_heads: 4 came, expected a divisor of hidden_size 6"),
    (lambda: ak.AdaJudgeHead(6, intermediate_size=-1), "intermediate_size: -1 came"),
    (lambda: ak.AdaJudgeHead(6, expert_hidden_size=0), "expert_hidden_size: 0 came"),
    (lambda: ak.AdaJudgeHead(6, router_hidden_size=True), "router_hidden_size: True came"),
    (
        lambda: ak.SequenceLayout.packed(None, [1]),
        r"prompt_lengths: None came, expected integers of shape \[N\]",
    ),
    (lambda: ak.SequenceLayout.packed([1], "ab"), "response_lengths: 'ab' came"),
    (
        lambda: ak.SequenceLayout.shared_prompts([1], 5),
        "response_lengths: int came, expected one list per prompt",
    ),
    (lambda: ak.SequenceLayout.shared_prompts([1], None), "response_lengths: NoneType came"),
    (lambda: ak.SequenceLayout.shared_prompts([1], [5]), r"response_lengths\[0\]"),
    (
        lambda: ak.focal_bradley_terry_loss(R, R, entropy_floor=1.2),
        "entropy_floor: 1.2 came, expected at most ln 3",
    ),
    (
        lambda: ak.depth_gate(H[:7], GATE, GATE_BIAS, LAYOUT),
        r"hidden: shape \(7, 6\) came, expected \[8, d\]",
    ),
    (lambda: ak.depth_gate(H[None], GATE, GATE_BIAS, LAYOUT), r"hidden: shape \(1, 8, 6\) came"),
    (lambda: ak.depth_gate(H.long(), GATE, GATE_BIAS, LAYOUT), "hidden: dtype torch.int64 came"),
    (lambda: ak.depth_gate([1.0], GATE, GATE_BIAS, LAYOUT), "hidden: list came"),
    (
        lambda: ak.depth_gate(H, GATE[:, :5], GATE_BIAS, LAYOUT),
        r"weight: shape \(3, 5\) came, expected \[3, 6\]",
    ),
    (lambda: ak.depth_gate(H, W, GATE_BIAS, LAYOUT), r"weight: shape \(6,\) came"),
    (
        lambda: ak.depth_gate(H, torch.zeros(9, 6), torch.zeros(9), LAYOUT),
        "weight: 9 depths came, expected 1 to 8",
    ),
    (lambda: ak.depth_gate(H, GATE, GATE_BIAS[:2], LAYOUT), r"bias: shape \(2,\) came, expected \[3\]"),
    (lambda: ak.depth_gate(H, GATE, GATE_BIAS, "packed"), "layout: str came, expected a SequenceLayout"),
    (lambda: ak.depth_gate(H, GATE.double(), GATE_BIAS, LAYOUT), "weight: dtype torch.float64 came"),
    (
        lambda: ak.depth_gate(H.to("meta"), GATE, GATE_BIAS, LAYOUT),
        "hidden: on meta, but the layout is on cpu",
    ),
    (lambda: ak.depth_gate(H, GATE.to("meta"), GATE_BIAS, LAYOUT), "weight: on meta, but hidden is on cpu"),
    (lambda: pool(H), "states: Tensor came, expected a list"),
    (lambda: pool([]), "states: 0 depths came"),
    (lambda: pool([H] * 9), "states: 9 depths came"),
    (lambda: pool([H, H[:, :5]]), r"states\[1\]: shape \(8, 5\) came, expected \[8, 6\]"),
    (lambda: pool([H, H.bfloat16()], torch.ones(2, 2)), r"states\[1\]: dtype torch.bfloat16 came"),
    (lambda: pool([H], torch.ones(3, 1)), r"depth_weights: shape \(3, 1\) came, expected \[2, 1\]"),
    (lambda: pool([H], weight=W[:4]), r"attention_weight: shape \(4,\) came"),
    (lambda: pool([H], bias=torch.zeros(2)), r"attention_bias: shape \(2,\) came, expected \[1\]"),
    (
        lambda: pool([H], tokens="prompt"),
        "attention_tokens: 'prompt' came, expected one of 'all', 'response'",
    ),
    (lambda: ak.masked_mean_pool(H, LAYOUT, "last"), "tokens: 'last' came"),
    (lambda: ak.masked_mean_pool(torch.zeros(8, 16385), LAYOUT), "hidden: 16385 features came"),
    (lambda: ak.attention_pool(H, W[:5], B1, LAYOUT), r"weight: shape \(5,\) came, expected \[6\]"),
    (lambda: ak.attention_pool(H, W, B1, LAYOUT, "prompt"), "tokens: 'prompt' came"),
    (lambda: ak.gated_expert_combination(*VIEWS[:3], VIEWS[3][:1], WEIGHTS), r"prompt: shape \(1, 6\) came"),
    (lambda: ak.gated_expert_combination(*VIEWS, WEIGHTS[:7]), "weights: tuple came, expected ExpertWeights"),
    (
        lambda: ak.gated_expert_combination(*VIEWS, WEIGHTS._replace(router_out_bias=torch.zeros(4))),
        r"weights.router_out_bias: shape \(4,\) came, expected \[3\]",
    ),
    (lambda: ak.focal_bradley_terry_loss(R, R[:3]), r"rejected: shape \(3,\) came, expected \[4\]"),
    (lambda: ak.focal_bradley_terry_loss(R[None], R), r"chosen: shape \(1, 4\) came"),
    (lambda: ak.focal_bradley_terry_loss(R, R, gamma=-1.0), "gamma: -1.0 came"),
    (lambda: ak.focal_bradley_terry_loss(R, R, temperature=0.0), "temperature: 0.0 came"),
    (lambda: ak.focal_bradley_terry_loss(R, R, gamma=float("nan")), "gamma: nan came"),
    (lambda: ak.focal_bradley_terry_loss(R, R, pair_weight=R[:2]), r"pair_weight: shape \(2,\) came"),
    (
        lambda: ak.focal_bradley_terry_loss(R, R, view_weights=torch.ones(8, 2)),
        r"view_weights: shape \(8, 2\)",
    ),
    (lambda: ak.DepthGate(6, 9), "num_blocks: 9 came"),
    (lambda: ak.RefinementBlock(6, num_heads=4), "num_heads: 4 came, expected a divisor of hidden_size 6"),
    (lambda: ak.MultiViewPooling(6, "prompt"), "attention_tokens: 'prompt' came"),
    (lambda: ak.AdaJudgeHead(6, 1)(H[:, :5], LAYOUT), r"hidden: shape \(8, 5\) came, expected \[8, 6\]"),
    (lambda: ak.AdaJudgeHead(6, 1)(H[None], LAYOUT), r"hidden: shape \(1, 8, 6\) came, expected \[B, L, d\]"),
]


@pytest.mark.parametrize(("call", "message"), CALLS, ids=[message[:40] for _, message in CALLS])
def test_a_malformed_call_names_its_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("value", [0.0, 89.0, 200.0, 1e4])
@pytest.mark.parametrize("sign", [-1, 1])
def test_swiglu_has_finite_gradients_for_any_gate(value, sign):
    gate_up = torch.tensor([[sign * value, 1.0]], requires_grad=True)
    swiglu(gate_up).sum().backward()
    exact = torch.tensor([[sign * value, 1.0]], dtype=torch.float64, requires_grad=True)
    (torch.nn.functional.silu(exact[:, 0]) * exact[:, 1]).sum().backward()
    assert torch.allclose(gate_up.grad.double(), exact.grad, atol=1e-6, rtol=1e-6)


def test_a_refinement_block_refuses_states_that_are_not_the_layouts():
    block, layout = ak.RefinementBlock(64), ak.SequenceLayout.packed([3], [5])
    for shape in ((20, 64), (8, 32), (1, 8, 64)):
        with pytest.raises(ValueError, match="hidden"):
            block(torch.zeros(shape), layout)
    with pytest.raises(ValueError, match="expected a SequenceLayout"):
        block(torch.zeros(8, 64), None)


@pytest.mark.parametrize(
    ("attention", "response", "name"),
    [([[0, 0, -1e9]], [[1, 0, 0]], "attention_mask"), ([[1, 1, 1]], [[-100, 7, 8]], "response_mask")],
)
def test_additive_masks_and_labels_are_no_masks(attention, response, name):
    with pytest.raises(ValueError, match=f"{name}: .* came in row 0, expected zeros and ones only"):
        ak.SequenceLayout.padded(torch.tensor(attention), torch.tensor(response))
