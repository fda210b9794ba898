"""Batches: what is real is said by masks and lengths alone, on either side of padding, packed or shared."""

import pytest
import torch
from adajudge.data import (
    EncodedPair,
    EncodedRow,
    PairCollator,
    group_by_prompt,
    pack_rows,
    pack_shared_prompts,
    pad_pairs,
    pad_rows,
)

from adajudge_kernels.layout import SequenceLayout

LONG = EncodedRow([5, 6, 7, 8, 9], 3)
SHORT = EncodedRow([5, 9, 0], 1)  # ends with the padding token's own id


@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_select_exactly_the_tokens_of_each_row(side):
    batch = pad_rows([LONG, SHORT], pad_token_id=0, padding_side=side)
    for i, row in enumerate((LONG, SHORT)):
        assert batch["input_ids"][i][batch["attention_mask"][i].bool()].tolist() == row.input_ids
        assert batch["input_ids"][i][batch["response_mask"][i]].tolist() == row.response_ids


@pytest.mark.parametrize(("side", "column"), [("left", 0), ("right", -1)])
def test_padding_lies_on_the_side_asked_for(side, column):
    batch = pad_rows([LONG, SHORT], pad_token_id=0, padding_side=side)
    assert batch["attention_mask"][:, column].tolist() == [1, 0]


def test_an_unknown_padding_side_is_refused():
    with pytest.raises(ValueError, match="'middle'"):
        pad_rows([LONG], pad_token_id=0, padding_side="middle")


def test_no_rows_make_an_empty_batch():
    assert pad_rows([], pad_token_id=0)["input_ids"].shape == (0, 0)


def test_pairs_are_all_chosen_sides_then_all_rejected_ones():
    pairs = [EncodedPair(LONG, SHORT, 2.0), EncodedPair(SHORT, SHORT)]
    batch = pad_pairs(pairs, pad_token_id=0)
    assert batch["attention_mask"].sum(1).tolist() == [5, 3, 3, 3]
    assert batch["pair_weight"].tolist() == [2.0, 1.0]


def test_the_collator_is_pad_pairs():
    pairs = [EncodedPair(LONG, SHORT)]
    collated = PairCollator(7, "left")(pairs)
    expected = pad_pairs(pairs, pad_token_id=7, padding_side="left")
    assert all(torch.equal(collated[name], expected[name]) for name in expected)


def test_packed_positions_restart_with_every_row():
    packed = pack_rows([LONG, SHORT])
    assert packed.input_ids.tolist() == [LONG.input_ids + SHORT.input_ids]
    assert packed.layout.position_ids().tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert packed.layout.prompt_lengths.tolist() == [LONG.prompt_length, SHORT.prompt_length]
    assert packed.layout.response_lengths.tolist() == [LONG.response_length, SHORT.response_length]


def test_shared_prompts_lie_there_once_and_every_response_counts_on_from_them():
    other = EncodedRow([5, 6, 7, 4], 3)
    packed = pack_shared_prompts([[LONG, other], [SHORT]])
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 4, 5, 9, 0]]
    assert packed.layout.position_ids().tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2]
    assert packed.layout.prompt_lengths.tolist() == [3, 3, 1]
    assert packed.layout.response_lengths.tolist() == [2, 1, 2]


def test_different_prompts_cannot_be_shared():
    with pytest.raises(ValueError, match="group 0: the prompt tokens of row 1"):
        pack_shared_prompts([[LONG, SHORT]])


def test_an_empty_group_is_refused():
    with pytest.raises(ValueError, match="group 1 is empty"):
        pack_shared_prompts([[LONG], []])


def test_rows_with_equal_prompts_are_grouped_in_order():
    assert group_by_prompt([LONG, SHORT, LONG, SHORT]) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_describe_the_padded_tokens_to_the_kernels(side):
    batch = pad_rows([LONG, SHORT], pad_token_id=0, padding_side=side)
    assert SequenceLayout.padded(batch["attention_mask"], batch["response_mask"]).num_sequences == 2
