"""Each accepted record format becomes a Row; each malformed one a RowError that names the field and the reason."""

import math

import pytest
from adajudge.data import Message, Row, RowError, parse_row

USER = {"role": "user", "content": "Hi 🙂"}
GOOD = {"role": "assistant", "content": "good"}
BAD = {"role": "assistant", "content": "bad"}
PROMPT = (Message("user", "Hi 🙂"),)


def parsed(record) -> Row:
    row = parse_row(record, 1)
    assert isinstance(row, Row), row
    return row


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "Hi 🙂", "chosen": "good", "rejected": "bad"},
        {"prompt": [USER], "chosen": "good", "rejected": BAD},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": "Hi 🙂 good", "rejected": "Hi 🙂 bad"},
        {"context": [USER], "response1": "good", "response2": "bad", "overall_preference": -1},
        {"context": [USER], "response1": "bad", "response2": "good", "overall_preference": 1},
        {
            "context": [USER],
            "completions": [{"rank": 1, "completion": [BAD]}, {"rank": 0, "completion": [GOOD]}],
        },
    ],
    ids=[
        "explicit",
        "strings",
        "mixed",
        "implicit",
        "implicit-strings",
        "helpsteer3",
        "helpsteer3-second",
        "nemo",
    ],
)
def test_every_preference_format_gives_the_same_pair(record):
    row = parsed(record)
    assert (row.kind, row.prompt, row.chosen, row.rejected, row.weight) == (
        "pair",
        PROMPT,
        "good",
        "bad",
        1.0,
    )


@pytest.mark.parametrize("record", [{"prompt": "Hi 🙂", "response": "good"}, {"messages": [USER, GOOD]}])
def test_scoring_rows_have_one_response(record):
    row = parsed(record)
    assert (row.kind, row.prompt, row.responses) == ("single", PROMPT, ("good",))


def test_candidates_keep_their_order():
    row = parsed({"prompt": "Hi 🙂", "responses": ["b", GOOD, "c"]})
    assert (row.kind, row.responses) == ("candidates", ("b", "good", "c"))


def test_more_than_two_ranked_completions_are_candidates_in_the_order_of_the_record():
    completions = [{"rank": rank, "completion": f"r{rank}"} for rank in (2, 0, 1)]
    row = parsed({"context": "Hi", "completions": completions})
    assert (row.kind, row.responses, row.ranks) == ("candidates", ("r2", "r0", "r1"), (2, 0, 1))


def test_multi_turn_and_system_messages_stay_in_order():
    turns = [{"role": "system", "content": "s"}, USER, BAD, {"role": "user", "content": "again"}]
    row = parsed({"messages": [*turns, GOOD]})
    assert [message.role for message in row.prompt] == ["system", "user", "assistant", "user"]


def test_turns_shared_by_both_sides_behind_an_explicit_prompt_join_the_prompt():
    row = parsed({"prompt": [USER], "chosen": [BAD, USER, GOOD], "rejected": [BAD, USER, BAD]})
    assert (len(row.prompt), row.chosen, row.rejected) == (3, "good", "bad")


@pytest.mark.parametrize("preference", [-3, -2, 1, 2, 3])
def test_helpsteer3_weight_is_the_square_root_of_the_preference(preference):
    row = parsed({"context": "q", "response1": "a", "response2": "b", "overall_preference": preference})
    assert row.weight == math.sqrt(abs(preference))


@pytest.mark.parametrize(
    "record",
    [
        {"context": "q", "response1": "a", "response2": "b", "overall_preference": 0},
        {"context": "q", "completions": [{"rank": 1, "completion": "a"}, {"rank": 1, "completion": "b"}]},
    ],
)
def test_a_tie_has_no_weight(record):
    assert parsed(record).tie


def test_an_implicit_prompt_never_ends_within_a_word():
    row = parsed({"chosen": "The sky is blue.", "rejected": "The sky is black."})
    assert (row.prompt[0].content, row.chosen, row.rejected) == ("The sky is", "blue.", "black.")


def test_only_a_prompt_taken_from_the_texts_is_called_implicit():
    assert parsed({"chosen": "a b", "rejected": "a c"}).implicit_prompt
    assert not parsed({"chosen": [USER, GOOD], "rejected": [USER, BAD]}).implicit_prompt
    assert not parsed({"prompt": "a", "chosen": "a b", "rejected": "a c"}).implicit_prompt


SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize("turns", [[USER], [SYSTEM, USER], [{**USER, "content": "Hi 🙂 "}]])
def test_conversations_that_repeat_the_prompt_do_not_double_it(turns):
    record = {
        "prompt": "Hi 🙂",
        "chosen": [*turns, GOOD],
        "rejected": [*turns, BAD],
        "messages": [*turns, GOOD],
    }
    assert len(parsed(record).prompt) == len(turns)


def test_conversations_go_on_from_a_system_prompt():
    assert len(parsed({"prompt": [SYSTEM], "chosen": [USER, GOOD], "rejected": [USER, BAD]}).prompt) == 2


def test_messages_may_stand_beside_the_prompt_that_they_begin_with():
    assert parsed({"prompt": "Hi 🙂", "messages": [USER, GOOD]}).prompt == PROMPT


def test_margin_is_kept():
    assert parsed({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 0.5}).margin == 0.5


def test_an_empty_prompt_string_is_one_empty_user_message():
    assert parsed({"prompt": "", "response": "a"}).prompt == (Message("user", ""),)


def test_other_columns_are_kept_as_they_are():
    row = parsed({"prompt": "q", "response": "a", "domain": "math", "n": [1]})
    assert row.extra == {"domain": "math", "n": [1]}


def test_only_a_pair_has_sides():
    with pytest.raises(ValueError, match="'single'"):
        _ = parsed({"prompt": "q", "response": "a"}).chosen


@pytest.mark.parametrize(
    ("record", "row_id"), [({"id": "x"}, "x"), ({"id": 12}, "12"), ({"id": None}, "1"), ({}, "1")]
)
def test_the_id_is_a_string_and_defaults_to_the_line(record, row_id):
    assert parsed({**record, "prompt": "q", "response": "a"}).id == row_id


HELPSTEER = {"context": "q", "response1": "a", "response2": "b"}
MALFORMED = {
    "not an object": (["a"], "row", "expected an object, got a list"),
    "no known format": ({"text": "a"}, "row", "keys found: text"),
    "no keys": ({}, "row", "keys found: none"),
    "no response": ({"prompt": "q"}, "response", "missing field"),
    "null response": ({"prompt": "q", "response": None}, "response", "missing field"),
    "no prompt": ({"response": "a"}, "prompt", "missing field"),
    "no rejected": ({"prompt": "q", "chosen": "a"}, "rejected", "missing field"),
    "no preference": (HELPSTEER, "overall_preference", "missing field"),
    "number as response": (
        {"prompt": "q", "response": 3},
        "response",
        "expected a string or a list of messages",
    ),
    "number as prompt": ({"prompt": 3.5, "response": "a"}, "prompt", "got a number"),
    "boolean as prompt": ({"prompt": True, "response": "a"}, "prompt", "got a boolean"),
    "object as responses": ({"prompt": "q", "responses": {}}, "responses", "expected a list, got an object"),
    "no responses": ({"prompt": "q", "responses": []}, "responses", "at least 1"),
    "strings as messages": ({"messages": ["a"]}, "messages[0]", "got a string"),
    "text as messages": ({"messages": "a"}, "messages", "expected a list of messages"),
    "no messages": ({"messages": []}, "messages", "empty list"),
    "list of texts as chosen": ({"prompt": "q", "chosen": ["a"], "rejected": "b"}, "chosen[0]", "a message"),
    "content parts": ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "got a list"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content", "missing field"),
    "unknown role": ({"messages": [{"role": "human", "content": "a"}]}, "messages[0].role", "'human'"),
    "last role": ({"messages": [GOOD, USER]}, "messages[1].role", "'assistant', got 'user'"),
    "empty response": ({"prompt": "q", "response": ""}, "response", "empty"),
    "blank response": ({"prompt": "q", "response": " \n"}, "response", "only white space"),
    "empty candidate": ({"prompt": "q", "responses": ["a", ""]}, "responses[1]", "empty"),
    "empty last message": ({"messages": [{**GOOD, "content": ""}]}, "messages[0].content", "empty"),
    "several turns as response": ({"prompt": "q", "response": [USER, GOOD]}, "response", "2 messages"),
    "sides diverge early": ({"chosen": [USER, GOOD], "rejected": [BAD, BAD]}, "rejected", "differ before"),
    "nothing shared": ({"chosen": "a b", "rejected": "c d"}, "prompt", "missing field"),
    "prompt under another name": (
        {"question": "q", "chosen": "a b", "rejected": "a c"},
        "prompt",
        "'question'",
    ),
    "prompt of conversations under another name": (
        {"question": "q", "chosen": [GOOD], "rejected": [BAD]},
        "prompt",
        "'question'",
    ),
    "responses alone": ({"chosen": [GOOD], "rejected": "b"}, "prompt", "responses alone"),
    "prompt in the messages only": (
        {"messages": [USER], "chosen": [GOOD], "rejected": [BAD]},
        "prompt",
        "missing",
    ),
    "messages of something else": (
        {"prompt": "q", "messages": [USER, GOOD], "chosen": "good", "rejected": "b"},
        "messages",
        "not the prompt and the chosen",
    ),
    "texts beside messages": (
        {"messages": [USER, GOOD], "chosen": "the ball", "rejected": "the tree"},
        "messages",
        "not the prompt",
    ),
    "prompt repeated in both texts": (
        {"prompt": "tell me about it", "chosen": "tell me about it . a", "rejected": "tell me about it . b"},
        "chosen",
        "begin with the prompt",
    ),
    "prompt and context": (
        {"prompt": "q", "context": "c", "response1": "a", "response2": "b", "overall_preference": 1},
        "row",
        "both prompt and context",
    ),
    "system column": ({"system": "s", "prompt": "q", "response": "a"}, "system", "first message"),
    "two system messages": (
        {
            "prompt": [SYSTEM],
            "chosen": [{**SYSTEM, "content": "t"}, USER, GOOD],
            "rejected": [{**SYSTEM, "content": "t"}, USER, BAD],
        },
        "chosen[0]",
        "another system message",
    ),
    "null prompt": ({"prompt": None, "chosen": "a b", "rejected": "a c"}, "prompt", "null"),
    "another prompt in the conversations": (
        {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        "chosen[0]",
        "another user message",
    ),
    "another prompt in the messages": (
        {"prompt": "q", "messages": [USER, GOOD]},
        "messages[0]",
        "another user",
    ),
    "prompt before the messages": (
        {"prompt": "q", "messages": [BAD, USER, GOOD]},
        "prompt",
        "not in 'messages'",
    ),
    "response and responses": (
        {"prompt": "q", "response": "a", "responses": ["b"]},
        "row",
        "several formats: responses, response",
    ),
    "response and messages": ({"messages": [USER, GOOD], "response": "a"}, "row", "several formats"),
    "tool call": (
        {"messages": [USER, {**GOOD, "tool_calls": [{}]}]},
        "messages[1].tool_calls",
        "content only",
    ),
    "one side is the prompt": ({"chosen": "a b", "rejected": "a"}, "rejected", "empty"),
    "margin not finite": (
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": math.nan},
        "margin",
        "nan",
    ),
    "margin too large": ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 10**400}, "margin", "inf"),
    "margin not a number": (
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": "1"},
        "margin",
        "a string",
    ),
    "preference out of range": ({**HELPSTEER, "overall_preference": 4}, "overall_preference", "-3 to 3"),
    "one completion": ({"context": "q", "completions": [{}]}, "completions", "at least 2"),
    "no rank": ({"context": "q", "completions": [{"completion": "a"}, {}]}, "completions[0].rank", "missing"),
    "id of a wrong type": ({"id": [1], "prompt": "q", "response": "a"}, "id", "got a list"),
    "empty id": ({"id": "", "prompt": "q", "response": "a"}, "id", "empty"),
    "half a surrogate pair": ({"prompt": "q", "response": "\ud83d"}, "response", "surrogate"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_record_is_named_by_field_and_reason(case):
    record, field, reason = MALFORMED[case]
    error = parse_row(record, 7)
    assert isinstance(error, RowError)
    assert (error.line, error.id, error.field) == (7, "7", field)
    assert reason in error.reason


def test_an_error_carries_the_explicit_id():
    error = parse_row({"id": "x", "prompt": "q"}, 7)
    assert str(error) == "line 7 (id 'x'), field 'response': missing field"


def test_a_row_makes_errors_about_itself():
    row = parsed({"id": "x", "prompt": "q", "response": "a"})
    assert row.error("response", "too long") == RowError(1, "x", "response", "too long")


@pytest.mark.parametrize("name", ["tools", "images", "documents", "chat_template_kwargs"])
def test_a_column_that_would_change_the_conversation_is_refused(name):
    row = {"prompt": "a", "response": "b"}
    error = parse_row(row | {name: [{"x": 1}]}, 7)
    assert isinstance(error, RowError)
    assert (error.field, error.reason) == (name, "no judge would see it; expected no such column")
    assert not isinstance(parse_row(row | {name: []}, 7), RowError)
