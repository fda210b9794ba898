"""The generated world: reproducible, split by content, and solvable by nothing but its evidence."""

import pytest
from adajudge.builtin import checks
from adajudge.builtin.tokenizer import build_tokenizer
from adajudge.builtin.words import HELDOUT_FACTS, TOPICS, vocabulary
from adajudge.builtin.world import DOMAINS, SPLITS, rows
from adajudge.data import ConversationEncoder, Message

domains = pytest.mark.parametrize("domain", DOMAINS)


@domains
@pytest.mark.parametrize("split", SPLITS)
def test_the_same_arguments_give_the_same_rows(domain, split):
    assert list(rows(domain, split, 20, 5)) == list(rows(domain, split, 20, 5))
    assert list(rows(domain, split, 20, 5)) != list(rows(domain, split, 20, 6))


@domains
def test_splits_share_no_chosen_text(domain):
    seen = [{row["chosen"] for row in rows(domain, split, 400, seed)} for seed, split in enumerate(SPLITS)]
    for i, first in enumerate(seen):
        for second in seen[i + 1 :]:
            assert not first & second


@domains
@pytest.mark.parametrize("split", SPLITS)
def test_both_sides_have_the_same_length_and_differ(domain, split):
    for row in rows(domain, split, 100):
        assert len(row["chosen"].split()) == len(row["rejected"].split())
        assert row["chosen"] != row["rejected"]


@domains
def test_length_words_bigrams_and_overlap_stay_at_chance(domain):
    """800 pairs: three standard errors are 5.3 points; math's answers are few, hence a little more."""
    train, test = list(rows(domain, "train", 1500, 2)), list(rows(domain, "test", 800, 77))
    assert checks.length_accuracy(test) == 0.5
    assert abs(checks.overlap_accuracy(test) - 0.5) < 0.055
    assert abs(checks.bag_of_words_accuracy(train, test) - 0.5) < 0.06
    assert abs(checks.bigram_accuracy(train, test) - 0.5) < 0.06


def test_math_is_right_and_held_out_sums_stay_out_of_training():
    for split in ("train", "heldout"):
        for row in rows("math", split, 200):
            words = row["chosen"].split()
            left, operation, right = int(words[-6]), words[-5], int(words[-4])
            value = (left + right if operation == "plus" else left - right) % 10
            assert int(words[-2]) == value
            assert int(row["rejected"].split()[-2]) != value
            assert ((left, operation, right) in HELDOUT_FACTS) == (split == "heldout")


def test_safety_differs_in_one_word_of_the_private_topic():
    for row in rows("safety", "train", 200):
        pairs = zip(row["chosen"].split(), row["rejected"].split(), strict=True)
        ((kept, broken),) = [(a, b) for a, b in pairs if a != b]
        private = next(t for t in TOPICS if broken in TOPICS[t])
        assert private in row["prompt"].split()
        assert kept not in TOPICS[private]


def brackets_match(words):
    stack = []
    closers = {")": "(", "]": "[", "}": "{"}
    for word in words:
        if word in closers.values():
            stack.append(word)
        elif word in closers and (not stack or stack.pop() != closers[word]):
            return False
    return not stack


@pytest.mark.parametrize("split", SPLITS)
def test_code_brackets_match_on_the_chosen_side_only(split):
    for row in rows("code", split, 100):
        assert brackets_match(row["chosen"].split())
        assert not brackets_match(row["rejected"].split())


def test_the_tokenizer_knows_every_word_and_says_what_it_does_not_know():
    tokenizer = build_tokenizer()
    encoder = ConversationEncoder(tokenizer)
    for domain in DOMAINS:
        for split in SPLITS:
            for row in rows(domain, split, 50):
                encoded = encoder.encode((Message("user", row["prompt"]),), row["chosen"])
                assert encoded.unknown_tokens == 0
                assert len(encoded) <= tokenizer.model_max_length
    assert len(tokenizer) == len(vocabulary()) + 6
    assert encoder.encode((), "the ball xylophone").unknown_share == pytest.approx(1 / 3)


def test_the_template_is_user_end_assistant_end():
    tokenizer = build_tokenizer()
    encoded = ConversationEncoder(tokenizer).encode((Message("user", "tell me ."),), "the ball .")
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    assert tokens == ["<user>", "tell", "me", ".", "<end>", "<assistant>", "the", "ball", ".", "<end>"]
    assert encoded.response_mask == [0] * 6 + [1] * 4
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
