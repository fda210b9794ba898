"""Running an operation forward and backward, and the contract's error bound."""

import os
from statistics import median

import torch

from adajudge_kernels import compiled
from tests.kernels.batches import place
from tests.kernels.operations import over_tokens
from tests.summary import note_error

ABSOLUTE = 1e-6
# Of 640 comparisons of correct kernels, on states far from zero, 44 are refused without and 4 with so many.
NUDGES = 7
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


def by_name(result):
    outputs, gradients = result
    return {f"output {i}": out for i, out in enumerate(outputs)} | {
        f"gradient of {name}": gradient for name, gradient in gradients.items()
    }


def nudged(inputs, seed):
    """Every number moved by one unit in its last place, up or down."""
    generator = torch.Generator().manual_seed(seed)
    up = {name: torch.rand(x.shape, generator=generator) < 0.5 for name, x in inputs.items()}
    infinity = torch.tensor(float("inf"))
    return {
        name: torch.nextafter(x, torch.where(up[name], infinity, -infinity).to(x))
        for name, x in inputs.items()
    }


def plain_and_exact(truth, inputs, dtype, args):
    """Plain PyTorch in `dtype` and in fp64."""
    return (by_name(run_truth(truth, cast(inputs, which), *args)) for which in (dtype, torch.float64))


def storing(name, ours, exact):
    """What a value may be off for being stored in its dtype alone (see STORED and ROUNDING)."""
    if ours is None or exact is None or not exact.numel():
        return 0.0
    if name.startswith("output"):
        return STORED.get(ours.dtype, 0.0) * float(exact.abs().max())
    truncated = INTERPRETED and ours.dtype == torch.bfloat16
    rounded = over_tokens(name.removeprefix("gradient of ")) or truncated
    return ROUNDING.get(ours.dtype, 0.0) * float(exact.abs().max()) if rounded else 0.0


def assert_within_contract(ours, truth, inputs, name, dtype, *args):
    """Error at most twice that of plain PyTorch in the same dtype, plus 1e-6, for outputs and gradients.

    `ours`: outputs and gradients of the operation `name` on `inputs`, which are in `dtype`; `truth(inputs, *args)` is plain
    PyTorch. How near that comes to fp64 on one set of numbers is partly luck: of two equally good orders of the same
    additions, one is more than twice as far off in one to seven cases of a hundred. Where plain PyTorch's error on these
    very numbers would refuse, its largest over inputs that differ from them in the last place decides.

    The worst is told at the end of the run.
    """
    ours = by_name(ours)
    plain, exact = plain_and_exact(truth, inputs, dtype, args)
    found = {value: error(ours[value], exact[value]) for value in exact}
    granted = {}
    for seed in range(1 + NUDGES):
        if seed:
            plain, exact = plain_and_exact(truth, nudged(inputs, seed), dtype, args)
        for value in exact:
            bound = (
                2 * error(plain[value], exact[value]) + ABSOLUTE + storing(value, ours[value], exact[value])
            )
            granted[value] = max(granted.get(value, 0.0), bound)
        if all(found[value] <= granted[value] for value in found):
            break
    for value in found:
        note_error(name, dtype, found[value], granted[value])
        assert found[value] <= granted[value], f"{value}: {found[value]:.2g} > {granted[value]:.2g}"


def compare(operation, inputs, batch, kind, dtype, device):
    """An operation over tokens keeps the bound on `batch` laid out as `kind`."""
    layout, source = batch.lay_out(kind, device)
    rounded = {name: x.to(dtype) for name, x in inputs.items()}
    ours = run_operation(operation, cast(rounded, dtype, device), layout, source)
    assert_within_contract(ours, operation.truth, rounded, operation.name, dtype, batch.sequences)


def compare_rowwise(name, call, truth, inputs, dtype, device):
    """An operation over rows keeps the bound."""
    rounded = {key: x.to(dtype) for key, x in inputs.items()}
    ours = run_truth(call, cast(rounded, dtype, device))
    assert_within_contract(ours, truth, rounded, name, dtype)


def far_from_zero(inputs, shift):
    """States as models have them, in place: with a ``"mean"``, or with a feature far larger than the others (``"outlier"``)."""
    for name, x in inputs.items():
        if over_tokens(name):
            x[:, slice(None) if shift == "mean" else 7] += 4 if shift == "mean" else 50
    return inputs


def usual_errors(operation, draw, batch, device, draws):
    """Of every output and gradient on fp32 inputs, laid out ``"shared"``: median error and plain PyTorch's, over draws."""
    layout, source = batch.lay_out("shared", device)
    errors = {}
    for seed in range(draws):
        torch.manual_seed(seed)
        inputs = {name: x.float() for name, x in draw().items()}
        ours = by_name(run_operation(operation, cast(inputs, torch.float32, device), layout, source))
        plain, exact = plain_and_exact(operation.truth, inputs, torch.float32, (batch.sequences,))
        for value, expected in exact.items():
            pair = error(ours[value], expected), error(plain[value], expected)
            errors.setdefault(value, []).append(pair)
    return {value: [median(column) for column in zip(*pairs, strict=True)] for value, pairs in errors.items()}


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
