"""Attention of other libraries: what they are told, when they are chosen, and that what is forced is never ignored."""

import json
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import adajudge_kernels as ak
from adajudge_kernels import env, measurements, tune
from adajudge_kernels.refinement import libraries
from adajudge_kernels.refinement.ops import sequence_attention

PACKED = ak.SequenceLayout.packed([3, 0, 5], [4, 2, 6])


def varlen(query, key, value, bounds, scale, causal):
    """What every library computes, sequence by sequence."""
    parts = []
    for start, stop in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        q, k, v = (x[start:stop].transpose(0, 1)[None] for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def flash_attn_2(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    deterministic=False,
):
    assert deterministic
    assert window_size == (-1, -1)
    assert max_seqlen_q == max_seqlen_k == int((cu_seqlens_q[1:] - cu_seqlens_q[:-1]).max())
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert cu_seqlens_q.dtype == torch.int32
    return varlen(q, k, v, cu_seqlens_q, softmax_scale, causal)


def torch_varlen(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    num_splits=None,
):
    assert num_splits == 1
    assert window_size in ((-1, 0), (-1, -1))
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return varlen(query, key, value, cu_seq_q, scale, window_size[1] == 0)


@pytest.fixture
def stand_ins(monkeypatch):
    """Libraries that compute on the CPU what the real ones would on a GPU, with the real ones' parameters."""
    functions = {"flash-attn-2": flash_attn_2, "torch-varlen": torch_varlen}

    def function(name):
        if name not in functions:
            raise ImportError("not installed")
        return functions[name]

    serves = libraries.unserved_reason

    def unserved(name, query, layout, queries):
        on_gpu = types.SimpleNamespace(
            is_cuda=True, dtype=torch.bfloat16, shape=query.shape, device=query.device
        )
        return serves(name, on_gpu, layout, queries)

    monkeypatch.setattr(libraries, "_function", function)
    monkeypatch.setattr(libraries, "unserved_reason", unserved)
    libraries.unavailable_reason.cache_clear()
    yield functions
    libraries.unavailable_reason.cache_clear()


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", ["flash-attn-2", "torch-varlen"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_a_library_is_told_what_our_own_attention_is_told(name, causal, heads):
    query = torch.randn(PACKED.num_tokens, heads[0], 8, requires_grad=True)
    key_value = torch.randn(PACKED.num_tokens, 2, heads[1], 8, requires_grad=True)
    results = []
    for attention in (libraries.OWN, name):
        query.grad = key_value.grad = None
        with libraries.use_attention(attention):
            out = sequence_attention([query, key_value], PACKED, causal, scale=0.3)
        out.square().sum().backward()
        results.append((out.detach(), query.grad, key_value.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_library_whose_version_takes_no_scale_computes_with_the_scale_all_the_same(stand_ins):
    def without_scale(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
        return varlen(query, key, value, cu_seq_q, None, window_size[1] == 0)

    stand_ins["torch-varlen"] = without_scale
    query, key, value = torch.randn(3, PACKED.num_tokens, 2, 8)
    with libraries.use_attention("torch-varlen"):
        found = sequence_attention([query, key, value], PACKED, scale=0.3)
    assert torch.allclose(found, sequence_attention([query, key, value], PACKED, scale=0.3), atol=1e-5)


def test_a_library_whose_version_cannot_be_told_of_causality_raises(stand_ins):
    def without_causality(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None):
        raise AssertionError("it was called")

    stand_ins["torch-varlen"] = without_causality
    query, key, value = torch.randn(3, PACKED.num_tokens, 2, 8)
    with (
        libraries.use_attention("torch-varlen"),
        pytest.raises(ValueError, match="neither causality nor a window"),
    ):
        sequence_attention([query, key, value], PACKED)


@pytest.mark.usefixtures("stand_ins")
def test_a_forced_library_that_cannot_serve_raises():
    shared = ak.SequenceLayout.shared_prompts([2], [[3, 1]])
    padded = ak.SequenceLayout.padded(torch.tensor([[1, 1, 0]]), torch.tensor([[0, 1, 0]]))
    with libraries.use_attention("flash-attn-2"):
        for layout, reason in ((shared, "share prompts"), (padded, "padded")):
            with pytest.raises(ValueError, match=rf"'flash-attn-2', forced by use_attention.*{reason}"):
                sequence_attention([torch.randn(layout.num_tokens, 3, 1, 8)], layout)


def test_a_library_that_is_not_there_cannot_be_forced(monkeypatch):
    with (
        pytest.raises(ValueError, match="'flash-attn-3' cannot be used: not installed"),
        libraries.use_attention("flash-attn-3"),
    ):
        pass
    with pytest.raises(ValueError, match="unknown; expected one of adajudge, flash-attn-4"):
        libraries.use_attention("xformers").__enter__()
    monkeypatch.setenv(libraries.ATTENTION_VARIABLE, "flash-attn-3")
    with pytest.raises(ValueError, match="forced by ADAJUDGE_ATTENTION"):
        sequence_attention([torch.randn(PACKED.num_tokens, 3, 1, 8)], PACKED)


def test_a_real_library_says_what_it_cannot_serve():
    query = torch.randn(PACKED.num_tokens, 1, 8)
    assert "cuda tensors" in libraries.unserved_reason("torch-varlen", query, PACKED, "all")
    assert libraries.unserved_reason(libraries.OWN, query, PACKED, "all") is None


def test_torchs_own_takes_the_arguments_that_are_passed():
    """Of the version installed here, by its signature: the kernel itself needs a GPU."""
    import inspect

    function = libraries._function("torch-varlen")
    known = inspect.signature(function).parameters
    assert {"cu_seq_q", "cu_seq_k", "max_q", "max_k"} <= known.keys()
    assert known.keys() & {"is_causal", "window_size"}


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "attention-some-gpu.json"
    for module in (measurements, tune):
        monkeypatch.setattr(module, "measured_file", lambda kind: path)
    libraries.measured_attention.cache_clear()
    yield path
    libraries.measured_attention.cache_clear()


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(("faster", "chosen"), [(0.5, "torch-varlen"), (0.99, libraries.OWN)])
def test_what_was_measured_to_be_faster_is_chosen_later(file, faster, chosen, capsys):
    times = iter([1.0, 2.0, faster])  # ours, flash-attn-2, torch's

    def measure(call):
        call()
        return next(times)

    best = tune.tune_attention(2, 16, torch.float32, 11, torch.device("cpu"), measure)
    assert best == chosen
    tune.write_attention({libraries.key(16, torch.float32): best})
    assert json.loads(file.read_text()) == {"attention e=16 float32": chosen}
    assert libraries.measured_attention() == {"attention e=16 float32": chosen}
    assert "flash-attn-3: not installed" in capsys.readouterr().out


def test_a_broken_file_is_reported_and_not_used(file, caplog):
    for text in ("not json", '{"attention e=16 float32": "xformers"}', "[1]"):
        file.write_text(text)
        libraries.measured_attention.cache_clear()
        caplog.clear()
        assert libraries.measured_attention() == {}
        assert "is not used" in caplog.text


def test_the_environment_report_names_them():
    lines = dict(dict(env.report())["attention inside packed sequences"])
    assert lines[libraries.OWN] == "available"
    assert "not installed" in lines["flash-attn-3"]
    assert lines["chosen"].startswith(libraries.OWN)


def test_a_module_without_the_function_is_not_available(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", types.ModuleType("flash_attn_interface"))
    sys.modules["flash_attn_interface"].__spec__ = types.SimpleNamespace()
    libraries.unavailable_reason.cache_clear()
    libraries._function.cache_clear()
    assert "AttributeError" in libraries.unavailable_reason("flash-attn-3")
    libraries.unavailable_reason.cache_clear()


@pytest.mark.usefixtures("file")
def test_a_library_that_fails_is_passed_over(stand_ins, capsys):
    def broken(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False):
        raise RuntimeError("no kernel image for this GPU")

    stand_ins["flash-attn-2"] = broken
    times = iter([2.0, 1.0])

    def measure(call):
        call()
        return next(times)

    best = tune.tune_attention(2, 16, torch.float32, 11, torch.device("cpu"), measure)
    assert best == "torch-varlen"
    assert "flash-attn-2: RuntimeError no kernel image" in capsys.readouterr().out


@pytest.mark.usefixtures("stand_ins")
def test_a_backward_that_may_differ_from_run_to_run_is_not_chosen_by_itself(monkeypatch):
    monkeypatch.setattr(libraries, "measured_attention", lambda: {"attention e=8 bfloat16": "torch-varlen"})
    query = types.SimpleNamespace(
        is_cuda=True, dtype=torch.bfloat16, shape=(21, 4, 8), device=torch.device("cuda")
    )
    assert libraries.choose_attention(query, PACKED, "all").backend == libraries.OWN
    with torch.no_grad():
        assert libraries.choose_attention(query, PACKED, "all").backend == "torch-varlen"
    assert libraries.is_deterministic("flash-attn-2")


def test_an_unknown_library_is_refused_where_it_is_named_and_not_only_in_a_block():
    with pytest.raises(ValueError, match="attention 'foo' cannot be used"):
        ak.use_attention("foo")
