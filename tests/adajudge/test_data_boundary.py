"""The response mask read off the token ids is the encoder's own, on every template and either side of padding."""

import json

import pytest
import torch
from adajudge.data import (
    ConversationEncoder,
    Message,
    TurnBoundary,
    pad_rows,
    response_mask_from_header,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.adajudge.chat_templates.families import NAMES, family_tokenizer

TEXT = st.text(st.one_of(st.sampled_from("\n\n ab.?🙂"), st.characters(codec="utf-8")), max_size=20)
BOUNDARY = TurnBoundary([1, 2, 3], scaffold_ids=[8, 7], turn_end_ids=[9], header_white_space=1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(conversations=st.lists(st.tuples(TEXT, TEXT, TEXT.filter(str.strip)), min_size=1, max_size=3))
def test_header_and_encoder_agree(name, side, conversations):
    tokenizer = family_tokenizer(name)
    encoder = ConversationEncoder(tokenizer)
    rows = []
    for first, second, response in conversations:
        turns = [Message("user", first), Message("assistant", second + "."), Message("user", second + "?")]
        rows.append(encoder.encode(turns, response))
    batch = pad_rows(rows, pad_token_id=tokenizer.eos_token_id, padding_side=side)  # pad == eos
    derived = response_mask_from_header(batch["input_ids"], batch["attention_mask"], encoder.boundary)
    assert torch.equal(derived, batch["response_mask"])


OTHER_TEMPLATES = {
    "no generation prompt": (
        "qwen3",
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|endoftext|>{{ '\n' }}{% endfor %}",
    ),
    "header with the question": (
        "llama3",
        "{% for m in messages %}{{ m.content }}<|eot_id|>"
        "{% if m.role == 'user' %}<|start_header_id|>assistant<|end_header_id|>{% endif %}{% endfor %}",
    ),
    "thinking generation prompt": (
        "qwen3",
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}"
        "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' else '' }}{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}",
    ),
    "space before the terminator": (
        "mistral",
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
    ),
    "no special tokens": (
        "qwen3",
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
    ),
}


@pytest.mark.parametrize("response", ["Hello", "\nHello", " Hello"])
@pytest.mark.parametrize("case", OTHER_TEMPLATES)
def test_header_and_encoder_agree_on_unusual_templates(case, response):
    name, template = OTHER_TEMPLATES[case]
    tokenizer = family_tokenizer(name)
    encoder = ConversationEncoder(tokenizer, chat_template=template)
    row = encoder.encode([Message("user", "Hi"), Message("assistant", "so"), Message("user", "Hi")], response)
    assert encoder.boundary.response_span(row.input_ids) == (row.prompt_length, len(row))
    assert response.strip() in tokenizer.decode(row.response_ids)


@pytest.mark.parametrize("name", NAMES)
def test_header_text_in_a_response_misleads_the_header_so_an_explicit_mask_is_needed(name):
    tokenizer = family_tokenizer(name)
    encoder = ConversationEncoder(tokenizer)
    row = encoder.encode([Message("user", "Hi")], f"Hello {encoder.facts.header} again")
    assert encoder.boundary.response_span(row.input_ids)[0] > row.prompt_length


@pytest.mark.parametrize("name", NAMES)
def test_ids_with_template_text_behind_the_terminator_end_at_the_terminator(name):
    tokenizer = family_tokenizer(name)
    encoder = ConversationEncoder(tokenizer)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    row = encoder.encode(messages[:1], "Hello")
    assert encoder.boundary.response_span(ids) == (row.prompt_length, len(row))


@pytest.mark.parametrize(
    ("ids", "span"),
    [
        ([5, 1, 2, 3, 4, 9], (4, 6)),
        ([5, 1, 2, 3, 8, 7, 4, 9], (6, 8)),
        ([1, 2, 3, 4, 9, 5, 1, 2, 3, 6, 9], (9, 11)),
        ([1, 2, 3, 4, 9, 5, 5], (3, 5)),
        ([1, 2, 3, 4, 4], (3, 5)),
        ([1, 2, 33, 4, 9], (2, 5)),
        ([1, 2, 3, 8, 4, 9], (3, 6)),
        ([1, 2, 3, 9], (3, 4)),
    ],
    ids=[
        "plain",
        "scaffold",
        "several turns",
        "text behind the terminator",
        "no terminator",
        "white space merged into the response",
        "begin of a scaffold only",
        "a turn ended at once",
    ],
)
def test_the_span_of_the_last_turn(ids, span):
    assert BOUNDARY.response_span(ids) == span


def test_a_second_terminator_may_be_of_a_turn_that_is_no_response():
    with pytest.raises(ValueError, match="more than one end of turn"):
        BOUNDARY.response_span([1, 2, 3, 4, 9, 4, 9, 5])


def test_a_template_without_terminator_ends_with_the_last_token():
    assert TurnBoundary([1]).response_span([5, 1, 4, 4]) == (2, 4)


def test_padding_is_known_from_the_attention_mask_alone():
    ids = torch.tensor([[1, 2, 3, 4, 9, 9, 1, 2, 3]])  # header tokens lie in the padding
    mask = response_mask_from_header(ids, torch.tensor([[1] * 5 + [0] * 4]), BOUNDARY)
    assert mask[0].tolist() == [False, False, False, True, True, False, False, False, False]


@pytest.mark.parametrize(
    ("second", "reason"), [([5, 5, 5, 5], "no assistant header"), ([5, 1, 2, 3], "no response token")]
)
def test_a_row_without_a_response_is_named(second, reason):
    ids = torch.tensor([[1, 2, 3, 4], second])
    with pytest.raises(ValueError, match=f"row 1: .*{reason}.*pass response_mask"):
        response_mask_from_header(ids, torch.ones_like(ids), BOUNDARY)


def test_shapes_that_do_not_match_are_named():
    with pytest.raises(ValueError, match=r"\(1, 4\) and \(1, 3\)"):
        response_mask_from_header(torch.ones(1, 4), torch.ones(1, 3), BOUNDARY)


def test_no_rows_have_an_empty_mask():
    ids = torch.ones(0, 4, dtype=torch.long)
    assert response_mask_from_header(ids, ids, BOUNDARY).shape == (0, 4)


def test_a_boundary_survives_a_json_configuration():
    assert TurnBoundary.from_dict(json.loads(json.dumps(BOUNDARY.to_dict()))) == BOUNDARY


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"assistant_header_ids": []}, "assistant_header_ids"),
        ({"assistant_header_ids": [1], "header_white_space": 1}, "header_white_space"),
    ],
)
def test_a_boundary_that_could_never_be_found_is_refused(values, name):
    with pytest.raises(ValueError, match=name):
        TurnBoundary(**values)
