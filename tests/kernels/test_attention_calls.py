"""What attention, norm and SwiGLU refuse, and that each is one operator each way: opcheck, double backward, one graph."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import adajudge_kernels as ak
from adajudge_kernels import SequenceLayout
from adajudge_kernels.refinement.ops import residual_rms_norm, sequence_attention, swiglu
from tests.kernels.batches import Batch
from tests.kernels.conftest import INTERPRETED
from tests.kernels.test_attention import gradients, projections

# Malformed calls

LAYOUT = SequenceLayout.packed([2, 1], [3, 2])  # 8 tokens, 5 of them of responses
Q, KV = torch.zeros(8, 4, 6), torch.zeros(8, 2, 2, 6)
K = KV[:, 0]
QKV = torch.zeros(8, 3, 4, 6)
X, W = torch.zeros(8, 6), torch.zeros(6)


def attend_to(*xs, layout=LAYOUT, **options):
    return sequence_attention(list(xs), layout, **options)


SHARED = SequenceLayout.shared_prompts([3], [[2, 3]])
MALFORMED = [
    (lambda: attend_to(Q, K, K, layout=None), "layout: NoneType came, expected a SequenceLayout"),
    (
        lambda: attend_to(Q, K, K, queries="prompt"),
        "queries: 'prompt' came, expected one of 'all', 'response'",
    ),
    (
        lambda: attend_to(),
        "projections: 0 came, expected a list of qkv, of query and key_value, or of query, key",
    ),
    (lambda: attend_to(Q, K, K, K), "projections: 4 came, expected a list"),
    (lambda: sequence_attention(Q, LAYOUT), "projections: Tensor came, expected a list"),
    (lambda: attend_to(None, K, K), r"query: NoneType came, expected a tensor \[N, H, e\]"),
    (lambda: attend_to(X, K, K), r"query: shape \(8, 6\) came, expected \[N, H, e\]"),
    (lambda: attend_to(Q.long(), K, K), "query: dtype torch.int64 came, expected float32"),
    (lambda: attend_to(Q[:7], K, K), "query: 7 rows came, expected 8 for this layout"),
    (lambda: attend_to(Q, K, K, queries="response"), "query: 8 rows came, expected 5 for this layout"),
    (
        lambda: attend_to(QKV, queries="response"),
        "qkv: 8 rows came with queries='response', expected query and key_value apart",
    ),
    (lambda: attend_to(Q[None], K, K), r"query: shape \(1, 8, 4, 6\) came, expected \[N, H, e\]"),
    (lambda: attend_to(Q, None, K), "key: NoneType came, expected a tensor"),
    (lambda: attend_to(Q, K[:7], K), r"key: shape \(7, 2, 6\) came, expected \[8, 2, 6\]"),
    (lambda: attend_to(Q, K[..., :5], K), r"key: shape \(8, 2, 5\) came, expected \[8, 2, 6\]"),
    (lambda: attend_to(Q, K, K[:, :1]), r"value: shape \(8, 1, 6\) came, expected \[8, 2, 6\]"),
    (
        lambda: attend_to(Q, K, K.bfloat16()),
        "value: dtype torch.bfloat16 came, expected torch.float32 as query",
    ),
    (lambda: attend_to(Q, K.double(), K), "key: dtype torch.float64 came with query of torch.float32"),
    (lambda: attend_to(Q[:, :3], K, K), "key: 2 heads came, expected a divisor of the 3 query heads"),
    (lambda: attend_to(Q[:, :0], K, K), "query: 0 heads came, expected at least one"),
    (lambda: attend_to(Q, K[:, :0], K[:, :0]), "key: 0 heads came, expected a divisor of the 4 query heads"),
    (lambda: attend_to(QKV[:, :, :0]), "qkv: 0 heads came, expected at least one"),
    (lambda: attend_to(Q, KV[:, :1]), r"key_value: shape \(8, 1, 2, 6\) came, expected \[8, 2, 2, 6\]"),
    (lambda: attend_to(Q, K), r"key_value: shape \(8, 2, 6\) came, expected \[T, 2, J, e\]"),
    (lambda: attend_to(QKV[:, :2]), r"qkv: shape \(8, 2, 4, 6\) came, expected \[8, 3, 4, 6\]"),
    (lambda: attend_to(Q), r"qkv: shape \(8, 4, 6\) came, expected \[T, 3, H, e\]"),
    (lambda: attend_to(QKV[:7]), r"qkv: shape \(7, 3, 4, 6\) came, expected \[8, 3, 4, 6\]"),
    (lambda: attend_to(*torch.zeros(3, 8, 1, 257)), "query: heads of 257 features came, expected 1 to 256"),
    (lambda: attend_to(*torch.zeros(3, 8, 1, 0)), "query: heads of 0 features came, expected 1 to 256"),
    (lambda: attend_to(Q.to("meta"), K, K), "query: on meta, but the layout is on cpu"),
    (lambda: attend_to(Q, K.to("meta"), K), "key: on meta, but query is on cpu"),
    (
        lambda: attend_to(*torch.zeros(3, 8, 2, 6), layout=SHARED, causal=False),
        "causal=False came with a prompt-shared",
    ),
    *(
        (
            lambda scale=scale: attend_to(Q, K, K, scale=scale),
            f"scale: {scale!r} came, expected a finite number above 0",
        )
        for scale in (0.0, -1.0, float("nan"), float("inf"), "1", True)
    ),
    (lambda: residual_rms_norm(None, None, W), r"x: NoneType came, expected a tensor \[T, d\]"),
    (lambda: residual_rms_norm(X[None], None, W), r"x: shape \(1, 8, 6\) came, expected \[T, d\]"),
    (lambda: residual_rms_norm(X.int(), None, W), "x: dtype torch.int32 came, expected float32"),
    (lambda: residual_rms_norm(X, None, W[:5]), r"weight: shape \(5,\) came, expected \[6\]"),
    (
        lambda: residual_rms_norm(X, None, W.double()),
        "weight: dtype torch.float64 came with x of torch.float32",
    ),
    (lambda: residual_rms_norm(X, None, W.to("meta")), "weight: on meta, but x is on cpu"),
    (lambda: residual_rms_norm(X, X[:7], W), r"update: shape \(7, 6\) came, expected \[8, 6\]"),
    (
        lambda: residual_rms_norm(X, X.half(), W),
        "update: dtype torch.float16 came, expected torch.float32 as x",
    ),
    (lambda: residual_rms_norm(X, X.to("meta"), W), "update: on meta, but x is on cpu"),
    (lambda: residual_rms_norm(X, X, W, -1e-6), "eps: -1e-06 came, expected a finite number at least 0"),
    (lambda: residual_rms_norm(X, X, W, None), "eps: None came, expected a finite number"),
    (lambda: swiglu(None), r"gate_up: NoneType came, expected a tensor \[T, 2f\]"),
    (lambda: swiglu(X[:, :5]), r"gate_up: shape \(8, 5\) came, expected \[T, 2f\], an even last dimension"),
    (lambda: swiglu(W), r"gate_up: shape \(6,\) came, expected \[T, 2f\]"),
    (lambda: swiglu(X.bool()), "gate_up: dtype torch.bool came, expected float32"),
]


@pytest.mark.parametrize(("call", "message"), MALFORMED, ids=[message[:45] for _, message in MALFORMED])
def test_a_malformed_call_names_its_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# One operator each way


def differentiable(*shape, device, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(device, dtype).requires_grad_()


FORMS = {
    "apart": lambda x, rows: [x(rows, 4, 8), x(9, 2, 8), x(9, 2, 8)],
    "key_value": lambda x, rows: [x(rows, 4, 8), x(9, 2, 2, 8)],
    "qkv": lambda x, rows: [x(9, 3, 2, 8)],
}


def small_call(form, kind, queries, device, dtype=torch.float32):
    """Arguments of the operator on 9 tokens (padded: 3 of them padding)."""
    if kind == "shared":
        layout = SequenceLayout.shared_prompts([3], [[4, 2]], device)
    else:
        mask = torch.ones(1, 9, device=device)
        mask[0, :3] = 0
        response = (torch.arange(9, device=device) > 4).long()[None]
        layout = SequenceLayout.padded(mask, response)
    tables = layout.attention if queries == "all" else layout.response_attention
    rows = 9 if queries == "all" else len(tables.rows)
    xs = FORMS[form](lambda *shape: differentiable(*shape, device=device, dtype=dtype), rows)
    return xs, layout, list(tables)


@pytest.mark.parametrize(
    ("form", "kind", "queries"),
    [("apart", "shared", "all"), ("key_value", "shared", "response"), ("qkv", "padded", "all")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_attention(form, kind, queries, dtype, device):
    xs, layout, tables = small_call(form, kind, queries, device, dtype)
    backend = ak.backends.choose_backend(device, "refinement").backend
    args = (xs, tables, kind == "shared", 0.3, layout.kept is not None, backend)
    torch.library.opcheck(torch.ops.adajudge.sequence_attention.default, args)


ROW_OPERATORS = {
    "rms_norm": lambda x, w: (x, w, 1e-6),
    "residual_rms_norm": lambda x, w: (x, x.detach().flip(0).requires_grad_(), w, 1e-6),
    "swiglu": lambda x, w: (x,),
}


@pytest.mark.parametrize("name", ROW_OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck_of_norm_and_swiglu(name, dtype, device):
    backend = ak.backends.choose_backend(device, "refinement").backend
    args = ROW_OPERATORS[name](
        differentiable(5, 12, device=device, dtype=dtype), differentiable(12, device=device)
    )
    torch.library.opcheck(getattr(torch.ops.adajudge, name).default, (*args, backend))


@pytest.mark.parametrize(("form", "queries"), [("apart", "response"), ("key_value", "all"), ("qkv", "all")])
def test_double_backward_is_a_clear_error(form, queries, device):
    xs, layout, _ = small_call(form, "shared", queries, device)
    out = sequence_attention(xs, layout, queries=queries)
    (gradient,) = torch.autograd.grad((out * out).sum(), xs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=r"adajudge_kernels\.sequence_attention has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("queries", ["all", "response"])
@pytest.mark.parametrize("dynamic", [True] if INTERPRETED else [None, True])
def test_one_full_graph_serves_changing_lengths(queries, dynamic, device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(query, key, value, layout):
        return sequence_attention([query, key, value], layout, queries=queries) * 2

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=counter)
    for batch in (Batch((3, 0), ((4, 1), (5,))), Batch((9, 4), ((3,), (8, 2, 2))), Batch((2,), ((70, 3),))):
        layout, _ = batch.lay_out("shared", device)
        rows = slice(None) if queries == "all" else layout.response_attention.rows
        query, key, value = projections(layout.num_tokens, size=8, device=device)
        leaves, plain = (
            [x.detach().clone().requires_grad_() for x in (query[rows], key, value)] for _ in range(2)
        )
        out, expected = compiled(*leaves, layout), call(*plain, layout)
        assert torch.equal(out, expected)
        for x, y in zip(gradients(leaves, out), gradients(plain, expected), strict=True):
            assert torch.equal(x, y)
    assert counter.frame_count <= 2  # one for the first shapes, one with symbolic shapes
