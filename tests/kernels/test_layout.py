"""SequenceLayout: where tokens are, in its three forms, and what it refuses."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings

import adajudge_kernels as ak
from adajudge_kernels import SequenceLayout, TokenRole
from adajudge_kernels.layout import CHUNK_TOKENS
from tests.kernels.batches import LAYOUTS, RAGGED, batches


def rows_of(layout, b):
    start0, stop0, start1, stop1 = layout.ranges[b].tolist()
    return [*range(start0, stop0), *range(start1, stop1)]


@pytest.mark.parametrize("kind", LAYOUTS)
@given(batch=batches())
@settings(max_examples=20, deadline=None, database=None)
def test_ranges_and_roles_name_each_sequences_tokens(kind, batch):
    layout, source = batch.lay_out(kind)
    for b, sequence in enumerate(batch.sequences):
        rows = rows_of(layout, b)
        assert source[rows].tolist() == sequence.rows
        assert (layout.roles[rows] == TokenRole.RESPONSE).tolist() == sequence.response
        assert int(layout.last_response[b]) == rows[-1]
    assert layout.prompt_lengths.tolist() == [s.response.count(False) for s in batch.sequences]
    assert layout.response_lengths.tolist() == [s.response.count(True) for s in batch.sequences]
    assert layout.max_length == max(len(s.rows) for s in batch.sequences)


@pytest.mark.parametrize("kind", LAYOUTS)
@given(batch=batches())
@settings(max_examples=20, deadline=None, database=None)
def test_every_token_is_in_one_attention_group_and_counts_from_its_sequences_start(kind, batch):
    layout, _ = batch.lay_out(kind)
    owned = [t for start, stop in layout.query_ranges.tolist() for t in range(start, stop)]
    assert sorted(owned) == (layout.roles != TokenRole.PADDING).nonzero().squeeze(1).tolist()
    positions = layout.position_ids()
    for b in range(layout.num_sequences):
        rows = rows_of(layout, b)
        assert positions[rows].tolist() == list(range(len(rows)))


@pytest.mark.parametrize("kind", LAYOUTS)
@given(batch=batches(max_length=200))
@settings(max_examples=20, deadline=None, database=None)
def test_tables_cut_every_sequence_and_group_into_chunks_and_name_a_groups_readers(kind, batch):
    layout, _ = batch.lay_out(kind)
    roles, sequences, chunks, groups, group_chunks = layout.tables
    assert torch.equal(roles, layout.roles)
    assert torch.equal(layout.tables.ranges, layout.ranges)
    assert torch.equal(layout.tables.last_response, layout.last_response)
    for owners, firsts, lengths in (
        (chunks, sequences[:, 7], [len(rows_of(layout, b)) for b in range(layout.num_sequences)]),
        (group_chunks, groups[:, 4], (groups[:, 1] - groups[:, 0]).tolist()),
    ):
        counts = [-(-length // CHUNK_TOKENS) for length in lengths]
        assert owners.tolist() == [i for i, count in enumerate(counts) for _ in range(count)]
        assert firsts.tolist() == [sum(counts[:i]) for i in range(len(counts))]
    for start, stop, first, count, _ in groups.tolist():
        token = set(range(start, stop))
        readers = [b for b in range(layout.num_sequences) if token & set(rows_of(layout, b))]
        assert not token or readers == list(range(first, first + count))


@pytest.mark.parametrize("kind", ["padded_left", "padded_right"])
def test_without_padding_is_the_packed_layout(kind):
    padded, source = RAGGED.lay_out(kind)
    kept, layout = padded.without_padding()
    packed, packed_source = RAGGED.lay_out("packed")
    assert torch.equal(source[kept], packed_source)
    for name in ("ranges", "roles", "last_response", "query_ranges", "key_ranges", "prompt_lengths"):
        assert torch.equal(getattr(layout, name), getattr(packed, name)), name


def test_indices_are_int32_and_roles_int8():
    layout, _ = RAGGED.lay_out("shared")
    assert {layout.ranges.dtype, layout.last_response.dtype, layout.key_ranges.dtype} == {torch.int32}
    assert layout.roles.dtype == torch.int8


def test_lengths_may_be_lists_or_tensors():
    lists = SequenceLayout.packed([2, 0], [1, 3])
    tensors = SequenceLayout.packed(torch.tensor([2, 0]), torch.tensor([1, 3], dtype=torch.int32))
    assert torch.equal(lists.ranges, tensors.ranges)


def test_a_prompt_without_candidates_is_read_by_no_sequence():
    layout = SequenceLayout.shared_prompts([2, 9], [[1, 4], []])
    assert layout.num_sequences == 2
    assert layout.max_length == 9


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SequenceLayout.packed([1, 2], [3, 0]), "sequence 1 has no response token"),
        (lambda: SequenceLayout.shared_prompts([1, 1], [[2], [1, 0]]), "sequence 2 has no response token"),
        (lambda: SequenceLayout.packed([1], [3, 4]), "response_lengths: 2 lengths came, expected .* 1"),
        (lambda: SequenceLayout.packed([-1], [3]), r"prompt_lengths\[0\] is negative"),
        (lambda: SequenceLayout.packed([1.5], [3]), "prompt_lengths: .*float.* expected integers"),
        (lambda: SequenceLayout.shared_prompts([1], [[1], [2]]), "response_lengths: 2 lists came"),
        (lambda: SequenceLayout.shared_prompts([1], [[-2]]), r"response_lengths\[0\]\[0\] is negative"),
        (lambda: SequenceLayout.packed([2**31], [1]), "fewer than 2\\*\\*31"),
        (lambda: SequenceLayout.padded(torch.ones(3), torch.ones(3)), r"attention_mask: \(3,\) came"),
        (lambda: SequenceLayout.padded(torch.ones(2, 3), torch.ones(2, 4)), "response_mask: shape"),
        (lambda: SequenceLayout.padded(torch.ones(2, 3), [[1]]), "response_mask: list came"),
        (
            lambda: SequenceLayout.padded(torch.tensor([[1, 1, 1], [1, 0, 1]]), torch.ones(2, 3)),
            "attention_mask: row 1 has a gap",
        ),
        (
            lambda: SequenceLayout.padded(torch.ones(2, 2), torch.tensor([[0, 1], [0, 0]])),
            "sequence 1 has no response token",
        ),
        (
            lambda: SequenceLayout.padded(torch.tensor([[1, 0]]), torch.tensor([[0, 1]])),
            "sequence 0 has no response token",
        ),
    ],
)
def test_malformed_layouts_are_named(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.fixture
def another_default_device():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def build_all(masks):
    return [
        ak.SequenceLayout.padded(*masks),
        ak.SequenceLayout.packed([1, 2], [2, 1], "cpu"),
        ak.SequenceLayout.shared_prompts([2], [[1, 2]], "cpu"),
    ]


MASKS = torch.ones(2, 3), torch.tensor([[0, 0, 1], [0, 1, 1]])


@pytest.mark.usefixtures("another_default_device")
def test_the_default_device_does_not_matter():
    for layout in build_all(MASKS):
        assert layout.device == torch.device("cpu")
        assert layout.position_ids().device == torch.device("cpu")


def test_a_layout_made_for_inference_serves_training():
    with torch.inference_mode():
        layouts = build_all([mask + 0 for mask in MASKS])
    for layout in layouts:
        hidden = torch.randn(layout.num_tokens, 4, requires_grad=True)
        ak.AdaJudgeHead(4)(hidden, layout).reward.sum().backward()
        assert hidden.grad.isfinite().all()


def test_tables_that_were_used_can_be_copied_pickled_and_moved_to_shared_memory():
    layout = SequenceLayout.shared_prompts([3, 2], [[2, 70], [1]])
    hidden = torch.randn(layout.num_tokens, 5)
    expected = ak.masked_mean_pool(hidden, layout)
    for other in (copy.copy(layout), copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
        assert torch.equal(ak.masked_mean_pool(hidden, other), expected)
    for table in layout.tables:  # as a queue between processes does: their memory is another from then on
        table.share_memory_()
        torch.full_like(table, 100)  # where they lay before
    assert torch.equal(ak.masked_mean_pool(hidden, layout), expected)
