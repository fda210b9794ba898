"""torch.compile, opcheck and fake tensors: each operation is one opaque node each way."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import adajudge_kernels as ak
from tests.kernels.batches import LAYOUTS, RAGGED, Batch
from tests.kernels.comparison import cast, weighted_sum
from tests.kernels.conftest import INTERPRETED
from tests.kernels.operations import POOLING, ROWWISE

pooling = pytest.mark.parametrize("operation", POOLING, ids=lambda op: op.name)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("operation", POOLING[:3] if INTERPRETED else POOLING, ids=lambda op: op.name)
def test_one_full_graph_serves_changing_lengths(operation, device):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(operation.call, fullgraph=True, backend=counter)
    for batch in (
        RAGGED,
        Batch((9, 4), ((3, 1, 2), (8,))),
        Batch((1, 7), ((30, 2), (11, 5))),
        Batch((6,), ((2, 3),)),
    ):
        layout, _ = batch.lay_out("shared", device)
        drawn = operation.draw(batch, 10, 2)
        ours, plain = cast(drawn, torch.float32, device), cast(drawn, torch.float32, device)
        outputs, expected = compiled(ours, layout), operation.call(plain, layout)
        weighted_sum(outputs).backward()
        weighted_sum(expected).backward()
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
        assert all(torch.equal(ours[name].grad, plain[name].grad) for name in drawn)
    assert counter.frame_count <= 2  # one for the first shapes, one with symbolic shapes


@pytest.mark.parametrize(("name", "draw", "call", "truth"), ROWWISE, ids=[op[0] for op in ROWWISE])
def test_rowwise_operations_compile_to_one_graph(name, draw, call, truth, device):
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 8):
        drawn = draw(rows)
        ours, plain = cast(drawn, torch.float32, device), cast(drawn, torch.float32, device)
        outputs, expected = compiled(ours), call(plain)
        weighted_sum(outputs).backward()
        weighted_sum(expected).backward()
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
        assert all(torch.equal(ours[key].grad, plain[key].grad) for key in drawn)


def test_forcing_another_backend_recompiles(device):
    layout, _ = RAGGED.lay_out("shared", device)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda x: ak.masked_mean_pool(x, layout), fullgraph=True, backend=counter)
    states = torch.zeros(RAGGED.num_tokens, 4, device=device)
    compiled(states)  # forced by the fixture
    from adajudge_kernels import backends

    forced, backends._forced = backends._forced, {}
    try:
        compiled(states)
    finally:
        backends._forced = forced
    assert counter.frame_count == 2


@pytest.mark.parametrize("kind", ["padded_left", "shared"] if INTERPRETED else LAYOUTS)
def test_the_whole_head_compiles_to_one_graph(kind, device):
    layout, source = RAGGED.lay_out(kind, device)
    head = ak.AdaJudgeHead(32, num_blocks=2, expert_hidden_size=16, router_hidden_size=16).to(device)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    hidden = torch.randn(RAGGED.num_tokens, 32, device=device)[source.clamp(min=0)].requires_grad_()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")(hidden, layout)
    assert torch.allclose(compiled.reward, head(hidden, layout).reward, atol=1e-5)
    compiled.reward.sum().backward()
    assert hidden.grad.isfinite().all()


def arguments(layout, d, device, dtype):
    hidden = torch.randn(layout.num_tokens, d, device=device, dtype=dtype, requires_grad=True)
    weight = torch.randn(d, device=device, requires_grad=True)
    bias = torch.zeros(1, device=device, requires_grad=True)
    return hidden, weight, bias


OPERATORS = {
    "depth_gate": lambda h, w, b, x, tail: (
        (h, torch.randn(2, 5, requires_grad=True), torch.randn(2), list(x.tables), x.max_length, *tail)
    ),
    "masked_mean_pool": lambda h, w, b, x, tail: (h, list(x.tables), x.max_length, "all", *tail),
    "attention_pool": lambda h, w, b, x, tail: (h, w, b, list(x.tables), x.max_length, False, *tail),
    "multi_view_pool": lambda h, w, b, x, tail: (
        (
            [h, h.detach()],
            torch.rand(x.num_sequences, 2),
            w,
            b,
            list(x.tables),
            x.max_length,
            True,
            *tail,
        )
    ),
    "focal_bradley_terry_loss": lambda h, w, b, x, tail: (
        (
            torch.randn(4, requires_grad=True),
            torch.randn(4),
            None,
            torch.rand(8, 3),
            2.0,
            1.0,
            0.5,
            0.1,
            True,
            *tail,
        )
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(name, dtype, device):
    family = "loss" if name.endswith("loss") else "pooling"
    backend = ak.backends.choose_backend(device, family).backend
    layout, _ = RAGGED.lay_out("shared", device)
    args = OPERATORS[name](*arguments(layout, 5, device, dtype), layout, (backend,))
    args = torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: x.to(device), args)
    torch.library.opcheck(getattr(torch.ops.adajudge, name).default, args)


def test_opcheck_of_the_experts(device):
    backend = ak.backends.choose_backend(device, "experts").backend
    drawn = [x.float().to(device).requires_grad_() for x in ROWWISE[0][1](3).values()]
    args = (*drawn[:4], drawn[4:], backend)
    torch.library.opcheck(torch.ops.adajudge.gated_expert_combination.default, args)


def test_the_head_trains_under_the_default_compiler(device):
    """Inductor checks the strides that the fakes promise; states may lie in memory in any order."""
    layout, source = RAGGED.lay_out("shared", device)
    torch.manual_seed(0)
    head = ak.AdaJudgeHead(16, num_blocks=2, expert_hidden_size=8, router_hidden_size=8).to(device)
    states = torch.randn(16, len(source), device=device).T
    plain, ours = (states.detach().requires_grad_() for _ in range(2))
    head(plain, layout).reward.sum().backward()
    with torch._inductor.config.patch(force_disable_caches=True):
        torch.compile(head, fullgraph=True)(ours, layout).reward.sum().backward()
    assert torch.allclose(ours.grad, plain.grad, atol=1e-5)


@pooling
def test_transforms_of_torch_func_are_a_clear_error(operation, device):
    inputs = cast(operation.draw(Batch((3,), ((2,),)), 6, 2), torch.float32, device)
    layout, _ = Batch((3,), ((2,),)).lay_out("packed", device)
    name = next(iter(inputs))

    def scalar(x):
        return operation.call({**inputs, name: x}, layout)[0].sum()

    x = inputs[name].detach()
    for transform in (
        lambda: torch.func.grad(scalar)(x),
        lambda: torch.func.jvp(scalar, (x,), (torch.ones_like(x),)),
        lambda: torch.func.vmap(scalar)(x[None]),
    ):
        with pytest.raises(RuntimeError, match=r"no torch\.func transform"):
            transform()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="no forward-mode differentiation"):
            scalar(dual)


@pytest.mark.filterwarnings("ignore")  # torch deprecates its tracer, which people still export with
def test_a_traced_function_calls_the_operator(device):
    layout = ak.SequenceLayout.packed([2], [3]).to(device)
    traced = torch.jit.trace(
        lambda x: ak.masked_mean_pool(x, layout), torch.ones(5, 4, device=device), check_trace=False
    )
    assert "adajudge::masked_mean_pool" in str(traced.graph)
    x = torch.randn(5, 4, device=device)
    assert torch.equal(traced(x), ak.masked_mean_pool(x, layout))
