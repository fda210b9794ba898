"""Text to tokens: the template is applied once, and of every token it is known whether it is prompt or response."""

import pytest
from adajudge.data import ChatTemplateError, ConversationEncoder, EncodingError, Message
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.adajudge.chat_templates.families import NAMES, TEMPLATES, family_tokenizer, word_tokenizer

TEXT = st.text(st.one_of(st.sampled_from("\n\n \tab.?[]/<|>🙂é"), st.characters(codec="utf-8")), max_size=30)
RESPONSE = TEXT.filter(str.strip)
TERMINATOR = {
    "qwen3": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "phi3.5": "<|end|>",
    "gemma": "<end_of_turn>",
    "mistral": "</s>",
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)
MULTI_TURN = [Message("user", "one"), Message("assistant", "two"), Message("user", "three")]


def user(text):
    return [Message("user", text)]


@pytest.fixture(params=NAMES)
def family(request):
    return request.param


@pytest.fixture
def tokenizer(family):
    return family_tokenizer(family)


@pytest.fixture
def encoder(tokenizer):
    return ConversationEncoder(tokenizer)


def plain_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(prompt=TEXT, response=RESPONSE)
def test_the_generation_prompt_begins_every_sequence(name, prompt, response):
    tokenizer = family_tokenizer(name)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    row = ConversationEncoder(tokenizer).encode(user(prompt), response)
    prompt_ids = plain_ids(tokenizer, rendered)
    assert row.input_ids[: len(prompt_ids)] == prompt_ids


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(prompt=TEXT, responses=st.lists(RESPONSE, min_size=2, max_size=3))
def test_the_prompt_has_the_same_tokens_for_every_response(name, prompt, responses):
    encoder = ConversationEncoder(family_tokenizer(name))
    rows = [encoder.encode(user(prompt), response.replace("</think>", "")) for response in responses]
    assert len({tuple(row.prompt_ids) for row in rows}) == 1


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma"])
@settings(max_examples=40, deadline=None)
@given(prompt=TEXT, response=RESPONSE)
def test_no_text_is_lost_or_added(name, prompt, response):
    tokenizer = family_tokenizer(name)
    encoder = ConversationEncoder(tokenizer)
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    row = encoder.encode(messages[:-1], response)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(row.input_ids) + encoder.facts.trailer == rendered


def test_the_response_runs_to_its_terminator_and_no_further(tokenizer, encoder, family):
    row = encoder.encode(user("Hi"), "Hello")
    assert tokenizer.decode(row.response_ids).strip() == "Hello" + TERMINATOR[family]


def test_the_mask_counts_prompt_and_response(encoder):
    row = encoder.encode(user("Hi"), "Hello")
    assert row.response_mask == [0] * row.prompt_length + [1] * row.response_length
    assert len(row.response_mask) == len(row)


def test_there_is_at_most_one_bos(tokenizer, encoder):
    row = encoder.encode(user("Hi"), "Hello")
    assert row.input_ids.count(tokenizer.bos_token_id) <= 1


def test_the_families_with_a_bos_begin_with_it():
    for name in ("llama3", "gemma", "mistral"):
        tokenizer = family_tokenizer(name)
        assert ConversationEncoder(tokenizer).encode(user("Hi"), "a").input_ids[0] == tokenizer.bos_token_id


def test_only_the_last_assistant_turn_is_the_response(tokenizer, encoder, family):
    row = encoder.encode(MULTI_TURN, "four")
    assert tokenizer.decode(row.response_ids).strip() == "four" + TERMINATOR[family]


def test_messages_may_be_mappings(encoder):
    mappings = [{"role": message.role, "content": message.content} for message in MULTI_TURN]
    assert encoder.encode(mappings, "four") == encoder.encode(MULTI_TURN, "four")


def test_the_empty_think_block_is_prompt():
    tokenizer = family_tokenizer("qwen3")
    row = ConversationEncoder(tokenizer).encode(user("Hi"), "Hello")
    assert tokenizer.decode(row.prompt_ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_a_think_block_of_the_response_is_response():
    tokenizer = family_tokenizer("qwen3")
    row = ConversationEncoder(tokenizer).encode(user("Hi"), "<think>\nwhy\n</think>\n\nHello")
    assert tokenizer.decode(row.response_ids) == "<think>\nwhy\n</think>\n\nHello<|im_end|>"


def test_nothing_follows_the_terminator_of_phi():
    tokenizer = family_tokenizer("phi3.5")
    row = ConversationEncoder(tokenizer).encode(user("Hi"), "Hello")
    assert tokenizer.eos_token_id not in row.input_ids


@pytest.mark.parametrize("response", ["\nfoo", "\n\n foo"])
def test_a_merge_across_the_border_leaves_the_prompt_alone(response):
    tokenizer = family_tokenizer("qwen3")
    encoder = ConversationEncoder(tokenizer, chat_template=CHATML)
    row, other = encoder.encode(user("Hi"), response), encoder.encode(user("Hi"), "foo")
    assert plain_ids(tokenizer, tokenizer.decode(row.input_ids)) != row.input_ids  # the trap is real
    assert row.prompt_ids == other.prompt_ids
    assert tokenizer.decode(row.response_ids) == response + "<|im_end|>"


def test_a_response_behind_the_border_gets_no_word_begin_space():
    tokenizer = family_tokenizer("mistral")
    template = "{{ bos_token }}{% for m in messages %}{{ m.content + (':' if m.role == 'user' else '') }}{% endfor %}"
    encoder = ConversationEncoder(tokenizer, chat_template=template)
    row = encoder.encode(user("answer"), "hello")
    assert tokenizer.convert_ids_to_tokens(row.response_ids)[0][0] != "▁"


@pytest.mark.parametrize("header_text", ["assistant", "header"])
def test_header_text_inside_a_response_stays_response(tokenizer, encoder, header_text):
    response = f"Hello {encoder.facts.header if header_text == 'header' else header_text} again"
    assert encoder.encode(user("Hi"), response).prompt_ids == encoder.encode(user("Hi"), "Hello").prompt_ids


def test_a_system_message_stands_in_the_prompt():
    for name in ("qwen3", "llama3", "phi3.5", "mistral"):
        tokenizer = family_tokenizer(name)
        row = ConversationEncoder(tokenizer).encode([Message("system", "be kind"), *user("Hi")], "Hello")
        assert "be kind" in tokenizer.decode(row.prompt_ids)


def test_a_conversation_that_the_template_refuses_is_an_error_of_the_row():
    encoder = ConversationEncoder(family_tokenizer("gemma"))
    with pytest.raises(EncodingError, match="System role not supported") as raised:
        encoder.encode([Message("system", "be kind"), *user("Hi")], "Hello")
    assert raised.value.field == "prompt"


@pytest.mark.parametrize("name", ["qwen3", "llama3", "phi3.5"])
def test_without_a_prompt_the_header_is_all_the_prompt(name):
    tokenizer = family_tokenizer(name)
    encoder = ConversationEncoder(tokenizer)
    row = encoder.encode([], "Hello")
    header = encoder.boundary.assistant_header_ids
    assert [token_id for token_id in row.prompt_ids if token_id != tokenizer.bos_token_id] == header


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_a_template_that_needs_a_prompt_says_so(name):
    with pytest.raises(EncodingError, match="roles must alternate"):
        ConversationEncoder(family_tokenizer(name)).encode([], "Hello")


@pytest.mark.parametrize("response", ["", " \n"])
def test_an_empty_response_is_an_error(encoder, response):
    with pytest.raises(EncodingError, match="empty response"):
        encoder.encode(user("Hi"), response)


def test_a_template_that_renders_an_answered_prompt_differently_is_an_error():
    template = CHATML.replace("{% for", "{% if messages|length > 2 %}long {% endif %}{% for", 1)
    encoder = ConversationEncoder(family_tokenizer("qwen3"), chat_template=template)
    with pytest.raises(EncodingError, match="renders the prompt differently once it is answered"):
        encoder.encode([*user("Hi"), Message("system", "x")], "Hello")


R1 = CHATML.replace(
    "m.content", "(m.content.split('</think>')[-1] if m.role == 'assistant' else m.content)", 1
)
TOOL_TURN = [*user("2+2?"), Message("assistant", "I ask."), Message("tool", "4")]


def test_a_turn_that_the_template_leaves_out_is_an_error_of_the_row():
    encoder = ConversationEncoder(family_tokenizer("phi3.5"))
    with pytest.raises(EncodingError, match=r"leaves out messages\[2\] \(tool\)") as raised:
        encoder.encode([*TOOL_TURN, *user("So?")], "Four, 4.")
    assert raised.value.field == "prompt"
    as_json = CHATML.replace("m.content", "(m.content if m.role != 'tool' else m.content | tojson)", 1)
    tokenizer = family_tokenizer("qwen3")
    for template in (CHATML, as_json):
        ConversationEncoder(tokenizer, chat_template=template).encode(
            [*TOOL_TURN[:2], Message("tool", 'a\n"4"')], "Four."
        )


def test_reasoning_that_the_template_leaves_out_of_a_response_is_an_error_of_the_row():
    encoder = ConversationEncoder(family_tokenizer("qwen3"), chat_template=R1)
    with pytest.raises(EncodingError, match="leaves out a part of the response") as raised:
        encoder.encode(user("2+2?"), "<think>wrong</think>It is four.")
    assert raised.value.field == "response"
    earlier = [*user("2+2?"), Message("assistant", "<think>well</think>Four."), *user("Sure?")]
    assert encoder.encode(earlier, "Yes.").response_length  # whose reasoning no model sees again either


def test_a_template_that_prints_the_date_prints_one_date_for_ever():
    tokenizer = family_tokenizer("qwen3")
    template = "{% if strftime_now is defined %}{{ '<|im_start|>' + strftime_now('%d %b %Y') + '<|im_end|>' }}{% endif %}"
    with pytest.raises(ChatTemplateError, match="asks for today's date"):
        ConversationEncoder(tokenizer, chat_template="{% set f = '%d' %}{{ strftime_now(f) }}" + CHATML)
    template += CHATML
    row = ConversationEncoder(tokenizer, chat_template=template).encode(user("Hi"), "Hello")
    assert tokenizer.decode(row.prompt_ids).startswith("<|im_start|>26 Jul 2024<|im_end|>")


def test_unknown_words_at_the_end_are_no_padding_although_they_have_its_id():
    tokenizer = word_tokenizer(WORDS)
    tokenizer.pad_token = tokenizer.unk_token
    encoder = ConversationEncoder(tokenizer)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the"}], tokenize=False, add_generation_prompt=True
    )
    row = encoder.encode_rendered(prompt + "is blue zzz yyy")
    assert row.unknown_tokens == 2


def test_a_template_without_a_place_for_the_answer_is_refused():
    template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}Bot:{% endif %}"
    )
    with pytest.raises(ChatTemplateError, match="differently from the beginning"):
        ConversationEncoder(family_tokenizer("qwen3"), chat_template=template)


def test_a_tokenizer_without_template_says_how_to_give_one():
    with pytest.raises(ChatTemplateError, match="chat_template="):
        ConversationEncoder(word_tokenizer(""))


@pytest.mark.parametrize("as_path", [True, False])
def test_a_template_can_be_given_as_text_or_path(as_path):
    path = TEMPLATES / "qwen3.jinja"
    tokenizer = family_tokenizer("qwen3")
    encoder = ConversationEncoder(tokenizer, chat_template=str(path) if as_path else path.read_text())
    assert encoder.encode(user("Hi"), "a") == ConversationEncoder(tokenizer).encode(user("Hi"), "a")


def test_a_template_path_that_does_not_exist_is_named():
    with pytest.raises(ChatTemplateError, match=r"no-such\.jinja"):
        ConversationEncoder(family_tokenizer("qwen3"), chat_template="no-such.jinja")


def test_a_template_that_is_not_jinja_is_refused():
    with pytest.raises(ChatTemplateError, match="not valid Jinja"):
        ConversationEncoder(family_tokenizer("qwen3"), chat_template="{% for %}")


# Truncation


def test_an_overlong_prompt_keeps_its_bos_and_loses_its_oldest_tokens():
    tokenizer = family_tokenizer("llama3")
    whole = ConversationEncoder(tokenizer).encode(user("word " * 50), "Hello")
    cut = ConversationEncoder(tokenizer, max_length=20).encode(user("word " * 50), "Hello")
    assert len(cut) == 20
    assert cut.input_ids == whole.input_ids[:1] + whole.input_ids[-19:]
    assert cut.prompt_tokens_cut == len(whole) - 20


def test_an_overlong_prompt_never_costs_the_response_a_token(tokenizer, encoder):
    whole = encoder.encode(user("word " * 50), "Hello there")
    lead = encoder.boundary.assistant_header_ids + encoder.boundary.scaffold_ids
    least = whole.response_length + len(lead) + (whole.input_ids[0] == tokenizer.bos_token_id)
    for max_length in range(least, len(whole)):
        cut = ConversationEncoder(tokenizer, max_length).encode(user("word " * 50), "Hello there")
        assert (cut.response_ids, len(cut), cut.truncated) == (whole.response_ids, max_length, True)
        assert cut.prompt_ids[-len(lead) :] == lead


def test_a_response_never_loses_its_header(tokenizer, encoder):
    """Without it the judge would see no answer, and say something all the same."""
    whole = encoder.encode(user("word " * 50), "Hello there")
    lead = encoder.boundary.assistant_header_ids + encoder.boundary.scaffold_ids
    for max_length in range(whole.response_length, whole.response_length + len(lead)):
        with pytest.raises(EncodingError, match="more stand before it"):
            ConversationEncoder(tokenizer, max_length).encode(user("word " * 50), "Hello there")


def test_a_sequence_that_fits_is_not_truncated(tokenizer, encoder):
    whole = encoder.encode(user("Hi"), "Hello")
    assert ConversationEncoder(tokenizer, len(whole)).encode(user("Hi"), "Hello") == whole
    assert not whole.truncated


def test_a_response_that_does_not_fit_is_an_error(tokenizer):
    with pytest.raises(EncodingError, match="max_length is 8") as raised:
        ConversationEncoder(tokenizer, 8).encode(user("Hi"), "word " * 20)
    assert raised.value.field == "response"


def test_a_response_cut_on_request_keeps_the_header_and_its_own_beginning(tokenizer, encoder):
    whole = encoder.encode(user("Hi"), "word " * 40)
    cut = ConversationEncoder(tokenizer, 30, truncate_response=True).encode(user("Hi"), "word " * 40)
    lead = encoder.boundary.assistant_header_ids + encoder.boundary.scaffold_ids
    assert len(cut) == 30
    assert cut.prompt_ids[-len(lead) :] == lead
    assert cut.response_ids == whole.response_ids[: cut.response_length]
    assert cut.response_tokens_cut == whole.response_length - cut.response_length > 0


def test_a_response_cut_on_request_leaves_the_prompt_half_of_the_length(tokenizer, encoder):
    cutting = ConversationEncoder(tokenizer, 64, truncate_response=True)
    short, long = user("Hi"), user("word " * 100)
    for count in (50, 60, 200):  # fits only with less of the prompt, and not at all
        cut = cutting.encode(short, "word " * count)
        assert cut.prompt_ids == encoder.encode(short, "x").prompt_ids
        assert len(cut) == 64
    assert cutting.encode(long, "word " * 200).prompt_length == 32


def test_one_token_is_a_response(tokenizer):
    cut = ConversationEncoder(tokenizer, 1, truncate_response=True).encode(user("Hi"), "word " * 40)
    assert (cut.prompt_length, cut.response_length) == (0, 1)


def test_a_max_length_below_one_is_refused(tokenizer):
    with pytest.raises(ValueError, match="max_length: expected at least 1, got 0"):
        ConversationEncoder(tokenizer, 0)


# Unknown words

WORDS = (
    "{% for m in messages %}{{ '<|' + m.role + '|> ' + m.content + ' <|end|> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("prompt", "response", "share"), [("the sky", "is blue", 0), ("the moon", "is green", 0.5), ("x", "y", 1)]
)
def test_the_share_of_unknown_words_leaves_special_tokens_out(prompt, response, share):
    row = ConversationEncoder(word_tokenizer(WORDS)).encode(user(prompt), response)
    assert row.unknown_share == share


def test_a_byte_level_tokenizer_knows_everything():
    row = ConversationEncoder(family_tokenizer("qwen3")).encode(user("żółć 🙂"), "日本語")
    assert row.unknown_tokens == 0


# Text that is rendered already


def test_rendered_text_gives_the_same_tokens(tokenizer, encoder):
    messages = [{"role": m.role, "content": m.content} for m in MULTI_TURN]
    text = tokenizer.apply_chat_template(
        [*messages, {"role": "assistant", "content": "four"}], tokenize=False
    )
    assert encoder.encode_rendered(text) == encoder.encode(MULTI_TURN, "four")


@pytest.mark.parametrize("name", ["qwen3", "phi3.5", "gemma", "mistral"])
def test_padding_in_rendered_text_is_dropped(name):
    tokenizer = family_tokenizer(name)
    encoder = ConversationEncoder(tokenizer)
    row = encoder.encode(user("Hi"), "Hello")
    padding = [tokenizer.pad_token_id] * 3
    text = tokenizer.decode(padding + row.input_ids + padding)
    assert encoder.encode_rendered(text).response_ids == row.response_ids


def test_a_rendered_generation_without_terminator_ends_with_its_last_token(tokenizer, encoder):
    row = encoder.encode(user("Hi"), "Hello there")
    text = tokenizer.decode(row.input_ids[:-1])
    assert encoder.encode_rendered(text).response_ids == row.response_ids[:-1]


@pytest.mark.parametrize("text", ["", "no header at all"])
def test_rendered_text_without_an_assistant_turn_is_an_error(encoder, text):
    with pytest.raises(EncodingError, match="no assistant header"):
        encoder.encode_rendered(text)
