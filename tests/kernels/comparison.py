"""Running an operation forward and backward, and the contract's error bound."""

import os

import torch

from adajudge_kernels import compiled
from tests.kernels.batches import place
from tests.kernels.operations import over_tokens
from tests.summary import note_error

ABSOLUTE = 1e-6
# A prompt token that a layout holds once per candidate has its gradients rounded apart and summed in the states' dtype by
# autograd, outside the operation; plain PyTorch, which reads it once, rounds once. Triton's interpreter stores bf16 by
# cutting bits off: a whole step, not half of one, for any gradient.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
STORED = {torch.bfloat16: 2**-7} if INTERPRETED else {}
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8}


def cast(inputs, dtype, device="cpu"):
    """Leaves of `dtype` that require gradients."""
    return {name: x.to(device, dtype).detach().requires_grad_() for name, x in inputs.items()}


def weighted_sum(outputs):
    """A scalar that gives every output element its own gradient, the same for all who ask."""
    total = 0
    for i, out in enumerate(outputs):
        place = torch.arange(out.numel(), dtype=torch.float64, device=out.device)
        ramp = torch.cos(place * 1.7 + i).reshape(out.shape)
        total = total + (out * ramp.to(out)).sum()
    return total


def run_operation(operation, tokens, layout, source):
    """Outputs and gradients; `tokens` are the leaves over the batch's tokens, laid out (NaN at padding) here."""
    placed = {name: place(x, source) if over_tokens(name) else x for name, x in tokens.items()}
    for x in placed.values():
        if x.requires_grad:
            x.retain_grad()
    outputs = operation.call(placed, layout)
    weighted_sum(outputs).backward()
    padding = source < 0
    for name, x in placed.items():
        if over_tokens(name) and x.grad is not None:
            assert bool((x.grad[padding] == 0).all()), f"gradient of {name} reaches padding"
    return [out.detach() for out in outputs], {name: x.grad for name, x in tokens.items()}


def run_truth(truth, inputs, *args):
    outputs = truth(inputs, *args)
    total = weighted_sum(outputs)
    if total.requires_grad:
        total.backward()
    return [out.detach() for out in outputs], {name: x.grad for name, x in inputs.items()}


def error(ours, exact):
    """Largest absolute difference to the fp64 evaluation."""
    if ours is None or exact is None:
        return 0.0 if all(x is None or not x.any() for x in (ours, exact)) else float("inf")
    assert ours.shape == exact.shape
    return float((ours.cpu().double() - exact).abs().max()) if ours.numel() else 0.0


def assert_within_contract(ours, plain, exact, name, dtype):
    """Error at most twice that of plain PyTorch in the same dtype, plus 1e-6, for outputs and gradients.

    The worst of the operation `name` on states of `dtype` is told at the end of the run.
    """
    (outputs, gradients), (plain_outputs, plain_gradients), (truth, true_gradients) = ours, plain, exact
    for i, expected in enumerate(truth):
        bound = 2 * error(plain_outputs[i], expected) + ABSOLUTE
        if expected.numel():
            bound += STORED.get(outputs[i].dtype, 0.0) * float(expected.abs().max())
        found = error(outputs[i], expected)
        note_error(name, dtype, found, bound)
        assert found <= bound, f"output {i}: {found:.2g} > {bound:.2g}"
    for variable, expected in true_gradients.items():
        bound = 2 * error(plain_gradients[variable], expected) + ABSOLUTE
        ours_here = gradients[variable]
        if ours_here is not None and expected is not None and expected.numel():
            truncated = INTERPRETED and ours_here.dtype == torch.bfloat16
            if over_tokens(variable) or truncated:
                bound += ROUNDING.get(ours_here.dtype, 0.0) * float(expected.abs().max())
        found = error(gradients[variable], expected)
        note_error(name, dtype, found, bound)
        assert found <= bound, f"gradient of {variable}: {found:.2g} > {bound:.2g}"


def on_every_level(levels, run):
    """Results of `run`, one per instruction set of the compiled kernels."""
    for level in levels:
        compiled.module.use_level(level)
        assert compiled.module.level() == level
        yield run()


def on_several_threads(run):
    """Results of `run` with different numbers of threads."""
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            yield run()
    finally:
        torch.set_num_threads(before)


def assert_same_bits(runs):
    """Outputs and gradients of several runs are equal."""
    (outputs, gradients), *others = runs
    for other_outputs, other_gradients in others:
        assert all(torch.equal(a, b) for a, b in zip(outputs, other_outputs, strict=True))
        assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)
