"""A side that computes less than the others is refused before it is timed; honest sides pass."""

import dataclasses

import pytest
import torch

from benchmarks import eager
from benchmarks.case import OURS, DifferentResults
from benchmarks.test_depth_gate import gate_case
from benchmarks.test_experts import experts_case
from benchmarks.test_head import head_case
from benchmarks.test_loss import loss_case
from benchmarks.test_pooling import equal_lengths, pooling_case, ragged, six_candidates
from benchmarks.test_scoring import scoring_case, training_case

CPU = torch.device("cpu")
BATCHES = {"packed": (ragged, (200,)), "shared": (six_candidates, (2,)), "equal": (equal_lengths, (3, 21))}
backwards = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def pooling(batch, dtype=torch.float32):
    return pooling_case("pooling", *BATCHES[batch], 16, 2, dtype, CPU, 1)


def gate(dtype=torch.float32):
    return gate_case(200, 16, 3, dtype, CPU, 1)


def experts(dtype=torch.float32):
    return experts_case(3, 32, dtype, CPU, 1)


def with_eager(case, run):
    """The case with another way to compute its eager side, of the honest one and the leaves."""
    honest = case.sides["eager"]
    case.sides["eager"] = dataclasses.replace(honest, run=lambda *leaves: run(honest.run, *leaves))
    return case


@pytest.mark.parametrize("side", [OURS, "adajudge_kernels padded", "eager", "eager products", "eager packed"])
@pytest.mark.parametrize("batch", BATCHES)
@both_dtypes
@backwards
def test_honest_pooling_passes(batch, side, dtype, backward):
    case = pooling(batch, dtype)
    if batch == "shared":
        assert "eager packed" not in case.sides  # it would read a prompt for one of its responses
        side = {"eager packed": "eager"}.get(side, side)
    case.check(side, backward)


@pytest.mark.parametrize("side", [OURS, "eager"])
@pytest.mark.parametrize("build", [gate, experts])
@both_dtypes
@backwards
def test_honest_gates_and_experts_pass(build, side, dtype, backward):
    build(dtype).check(side, backward)


@pytest.mark.parametrize("side", [OURS, "eager"])
@backwards
def test_honest_losses_pass(side, backward):
    loss_case(40, CPU, 1).check(side, backward)


@pytest.mark.parametrize("side", [OURS, "eager", "eager packed"])
@both_dtypes
@backwards
def test_honest_refinement_passes(side, dtype, backward):
    head_case("refinement", 200, 0.1, 16, 2, dtype, CPU, 1).check(side, backward)


@pytest.mark.parametrize("side", [OURS, "eager"])
@pytest.mark.parametrize("tokens", [200, 600])
@both_dtypes
@backwards
def test_honest_heads_pass(side, tokens, dtype, backward):
    head_case("head", tokens, 0.3, 64, 3, dtype, CPU, 1).check(side, backward)


def training(dtype):
    return training_case("tiny", 2, 0.1, 3, dtype, CPU, 1)


@pytest.mark.parametrize("side", [OURS, "padded"])
@both_dtypes
def test_honest_training_steps_pass(side, dtype):
    training(dtype).check(side, True)


def constant(x):
    """x without a derivative, as autograd sees it: zero, not none."""
    return x.detach() + 0 * x


@pytest.mark.parametrize(
    ("stage", "without"),
    [
        ("eager_pooling", lambda last, mean, attention: (last, mean, constant(attention))),
        ("eager_refinement", lambda states, weights, prompt: (states, constant(weights), prompt)),
        (
            "eager_refinement",
            lambda states, weights, prompt: ([*states[:-1], constant(states[-1])], weights, prompt),
        ),
    ],
    ids=["attention view", "depth weights", "last state"],
)
@both_dtypes
def test_a_training_step_that_leaves_out_a_gradient_is_refused(stage, without, dtype, monkeypatch):
    """The same loss to the last bit, less of its derivative."""
    case = training(dtype)
    case.check("padded", True)  # and keeps the exact gradients
    honest = getattr(eager, stage)
    monkeypatch.setattr(eager, stage, lambda *arguments: without(*honest(*arguments)))
    with pytest.raises(DifferentResults, match=r"training step, padded: gradient [0-9]+ is off by"):
        case.check("padded", True)


def test_a_whole_judge_without_the_attention_view_is_refused(monkeypatch):
    case, side = scoring_case("tiny", 1, 8, 2, torch.float32, CPU, 1), "padded, sorted by length"
    case.check(side, False)  # and keeps the exact rewards
    pooling_of = eager.eager_pooling

    def without_attention(*arguments):
        last, mean, _ = pooling_of(*arguments)
        return last, mean, mean

    monkeypatch.setattr(eager, "eager_pooling", without_attention)
    with pytest.raises(DifferentResults, match="scoring, padded, sorted by length: output 0 is off by"):
        case.check(side, False)


@pytest.mark.parametrize("batch", BATCHES)
@both_dtypes
@backwards
def test_pooling_without_the_attention_view_is_refused(batch, dtype, backward):
    def without_attention(honest, *states):
        last, mean, _ = honest(*states)
        return last, mean, mean

    with pytest.raises(DifferentResults, match="pooling, eager: output 2 is off by"):
        with_eager(pooling(batch, dtype), without_attention).check("eager", backward)


@pytest.mark.parametrize("batch", BATCHES)
def test_pooling_that_leaves_out_a_gradient_is_refused(batch):
    def without_gradient(honest, *states):
        last, mean, attention = honest(*states)
        return last, mean, attention.detach()

    case = with_eager(pooling(batch), without_gradient)
    case.check("eager", False)
    with pytest.raises(DifferentResults, match="pooling, eager: gradient 0 is off by"):
        case.check("eager", True)


@backwards
def test_a_gate_with_uniform_weights_is_refused(backward):
    def uniform(honest, hidden):
        weights, prompt_mean = honest(hidden)
        return 0 * weights + 1 / weights.shape[1], prompt_mean

    with pytest.raises(DifferentResults, match="depth gate, eager: output 0 is off by"):
        with_eager(gate(), uniform).check("eager", backward)


@both_dtypes
def test_small_gradients_that_are_left_out_are_refused(dtype):
    """Small beside the case's other gradients: a view's that only the router reads."""

    def without_prompt(honest, *leaves):
        return honest(*leaves[:3], leaves[3].detach() + 0 * leaves[3], *leaves[4:])

    with pytest.raises(DifferentResults, match="experts, B=16, eager: gradient 3 is off by"):
        with_eager(experts_case(16, 256, dtype, CPU, 1), without_prompt).check("eager", True)


@both_dtypes
@backwards
def test_experts_with_a_uniform_router_are_refused(dtype, backward):
    def uniform(honest, *leaves):
        *others, weight, bias = leaves
        return honest(*others, 0 * weight, 0 * bias)

    with pytest.raises(DifferentResults, match="experts, B=3, eager: output 0 is off by"):
        with_eager(experts(dtype), uniform).check("eager", backward)


@backwards
def test_a_loss_without_its_entropy_term_is_refused(backward):
    def without_entropy(honest, chosen, rejected, view_weights):
        return honest(chosen, rejected, 0 * view_weights + 1 / 3)  # above the floor

    with pytest.raises(DifferentResults, match="loss, 40 pairs, eager: output 0 is off by"):
        with_eager(loss_case(40, CPU, 1), without_entropy).check("eager", backward)
