"""The generated world of the built-in judge: preference pairs in four domains, after RM-Bench.

Both sides of a pair have the same length and differ in a few words; what decides lies in a different place per domain:

- math: a chain of sums modulo ten; the value after the last "gives" decides (the end of the response).
- chat: the share of words on the topic that the prompt names (spread over the whole response).
- code: nested calls with three kinds of bracket; two closing brackets are swapped or not (local structure).
- safety: the prompt makes the words of one topic private; one word of the response breaks this or not (one token).

Nothing but this evidence separates the sides: length, word counts, bigrams and overlap with the prompt stay at chance
(`adajudge.builtin.checks`).
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

from adajudge.builtin.words import (
    BRACKETS,
    CHAT_PROMPTS,
    CODE_FUNCTIONS,
    CODE_PROMPTS,
    CODE_VARIABLES,
    COUNTS,
    FACTS,
    FRAMES,
    HELDOUT_CODE_NAMES,
    HELDOUT_FACTS,
    HELDOUT_PRIVATE_WORDS,
    HELDOUT_TOPIC_PAIRS,
    MATH_PROMPTS,
    SAFETY_PROMPTS,
    TOPICS,
    result,
)

DOMAINS = ("math", "chat", "code", "safety")
SPLITS = ("train", "validation", "test", "heldout")
Row = dict[str, str]


@dataclass(frozen=True)
class Draft:
    """A pair before it becomes a row: word lists, and the positions of errors on each side."""

    prompt: str
    chosen: list[str]
    rejected: list[str]
    chosen_errors: frozenset[int]
    rejected_errors: frozenset[int]
    key: str
    """What decides the split: two drafts with the same key never lie in different splits."""


def rows(domain: str, split: str, count: int, seed: int = 0) -> Iterator[Row]:
    """Yield `count` distinct pairs ``{"id", "domain", "prompt", "chosen", "rejected"}``; words separated by one space.

    The same arguments give the same rows. train, validation and test are disjoint by content (a hash of it decides), whatever
    the seed; heldout uses facts, topic pairs and words that never decide a pair of the other three (see `words`).
    """
    for number, draft in enumerate(drafts(domain, split, count, seed)):
        yield {
            "id": f"{domain}-{split}-{seed}-{number:05d}",
            "domain": domain,
            "prompt": draft.prompt,
            "chosen": " ".join(draft.chosen),
            "rejected": " ".join(draft.rejected),
        }


def drafts(domain: str, split: str, count: int, seed: int = 0) -> Iterator[Draft]:
    """The pairs of `rows` as word lists with their errors marked, for the texts that the backbone learns from."""
    if domain not in DOMAINS:
        raise ValueError(f"domain must be one of {DOMAINS}, got {domain!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    rng = random.Random(f"{domain}/{split}/{seed}")
    seen: set[str] = set()
    while len(seen) < count:
        draft = _DRAW[domain](rng, split == "heldout")
        if split != "heldout" and _split_of(draft.key) != split:
            continue
        if draft.key not in seen:
            seen.add(draft.key)
            yield draft


def example_rows(count: int = 10, seed: int = 7) -> list[Row]:
    """`count` readable pairs per domain from the test split, for examples and demonstrations."""
    return [row for domain in DOMAINS for row in rows(domain, "test", count, seed)]


def _split_of(key: str) -> str:
    bucket = blake2b(key.encode(), digest_size=4).digest()[0]
    return "train" if bucket < 208 else "validation" if bucket < 232 else "test"


def _math(rng: random.Random, heldout: bool) -> Draft:
    """A chain of three or four sums. Each earlier value is stated, then stated again after "check"; the first statement
    may be a slip, on either side alike. The last value has no check: it is right or wrong."""
    known = [fact for fact in FACTS if fact not in HELDOUT_FACTS]
    last = rng.choice(sorted(HELDOUT_FACTS) if heldout else known)
    chain = [last]
    for _ in range(rng.choice((2, 3))):  # backwards, so that the last fact is uniform and so is its value
        chain.insert(0, rng.choice([fact for fact in known if result(fact) == chain[0][0]]))

    def side(correct: bool) -> tuple[list[str], frozenset[int]]:
        words: list[str] = []
        errors = set()
        slip = rng.randrange(len(chain) - 1) if rng.random() < 0.5 else -1
        for step, fact in enumerate(chain):
            final = step == len(chain) - 1
            words += [
                "last" if final else "then" if step else "first",
                str(fact[0]),
                fact[1],
                str(fact[2]),
                "gives",
            ]
            wrong = step == slip or (final and not correct)
            if wrong:
                errors.add(len(words))
            words.append(str(_other_digit(rng, result(fact)) if wrong else result(fact)))
            words += ["."] if final else ["check", str(result(fact)), "."]
        return words, frozenset(errors)

    (chosen, chosen_errors), (rejected, rejected_errors) = side(True), side(False)
    total = str(chain[0][0]) + "".join(f" {operation} {value}" for _, operation, value in chain)
    prompt = rng.choice(MATH_PROMPTS).format(sum=total)
    return Draft(prompt, chosen, rejected, chosen_errors, rejected_errors, key=total)


def _other_digit(rng: random.Random, digit: int) -> int:
    return (digit + rng.randrange(1, 10)) % 10


CHAT_SLOTS = 14


def _chat(rng: random.Random, heldout: bool) -> Draft:
    """Fourteen slots, filled with words of two topics; the prompt names one. Chosen: nine or ten of them on topic;
    rejected: four or five, by exchanging words of the first topic for words of the second."""
    topic, other = rng.sample(list(TOPICS), 2)
    while (frozenset((topic, other)) in HELDOUT_TOPIC_PAIRS) != heldout:
        topic, other = rng.sample(list(TOPICS), 2)
    on_topic = rng.choice((9, 10))
    words, slots = _frames(rng, CHAT_SLOTS)
    rng.shuffle(slots)
    on, exchanged, off = slots[: 14 - on_topic], slots[14 - on_topic : on_topic], slots[on_topic:]
    for members, positions in ((TOPICS[topic], on + exchanged), (TOPICS[other], off)):
        for position in positions:
            words[position] = rng.choice(members)
    rejected = list(words)
    for position in exchanged:
        rejected[position] = rng.choice(TOPICS[other])
    prompt = rng.choice(CHAT_PROMPTS).format(topic=topic)
    key = f"{topic} | {' '.join(words)}"
    return Draft(prompt, words, rejected, frozenset(off), frozenset(off + exchanged), key)


SAFETY_SLOTS = 10


def _safety(rng: random.Random, heldout: bool) -> Draft:
    """Ten slots, half of them on the topic that the prompt asks for. One slot of the rejected side names a word of the
    private topic; chosen has a word of a third topic there."""
    topic, private, third = rng.sample(list(TOPICS), 3)
    harmless = [name for name in TOPICS if name != private]
    words, slots = _frames(rng, SAFETY_SLOTS)
    rng.shuffle(slots)
    for number, position in enumerate(slots):
        members = TOPICS[topic if number < SAFETY_SLOTS // 2 else rng.choice(harmless)]
        words[position] = rng.choice(_safety_words(members, heldout=False))
    position = rng.choice(slots)
    rejected = list(words)
    words[position] = rng.choice(_safety_words(TOPICS[third], heldout))
    rejected[position] = rng.choice(_safety_words(TOPICS[private], heldout))
    prompt = rng.choice(SAFETY_PROMPTS).format(topic=topic, private=private)
    key = f"{topic} {private} | {' '.join(words)}"
    return Draft(prompt, words, rejected, frozenset(), frozenset((position,)), key)


def _safety_words(members: tuple[str, ...], heldout: bool) -> list[str]:
    return [word for word in members if (word in HELDOUT_PRIVATE_WORDS) == heldout]


def _frames(rng: random.Random, slots: int) -> tuple[list[str], list[int]]:
    """Sentences with exactly `slots` slots in all, and where the slots are."""
    words: list[str] = []
    while (missing := slots - words.count("_")) > 0:
        words += rng.choice([frame for frame in FRAMES if frame.count("_") <= missing]).split()
    return words, [position for position, word in enumerate(words) if word == "_"]


def _code(rng: random.Random, heldout: bool) -> Draft:
    """Two or three assignments of nested calls; rejected swaps two unlike closing brackets of one line."""
    functions = HELDOUT_CODE_NAMES[:6] if heldout else CODE_FUNCTIONS
    variables = HELDOUT_CODE_NAMES[6:] if heldout else CODE_VARIABLES
    count = rng.choice((2, 3))
    words: list[str] = []
    closers: list[list[int]] = []
    for _ in range(count):
        start = len(words)
        words += ["set", rng.choice(variables), "to", *_call(rng, functions, variables, depth=0), ";"]
        closers.append([i for i in range(start, len(words)) if words[i] in BRACKETS.values()])
    swaps = [(a, b) for line in closers for a in line for b in line if a < b and words[a] != words[b]]
    if not swaps:
        return _code(rng, heldout)
    first, second = rng.choice(swaps)
    rejected = list(words)
    rejected[first], rejected[second] = words[second], words[first]
    prompt = rng.choice(CODE_PROMPTS).format(count=COUNTS[count])
    return Draft(prompt, words, rejected, frozenset(), frozenset((first, second)), key=" ".join(words))


def _call(
    rng: random.Random, functions: tuple[str, ...], variables: tuple[str, ...], depth: int
) -> list[str]:
    opening = rng.choice(list(BRACKETS))
    words = [rng.choice(functions), opening]
    for number in range(rng.choice((1, 2))):
        words += [","] if number else []
        nested = depth < 3 and rng.random() < 0.55
        words += _call(rng, functions, variables, depth + 1) if nested else [rng.choice(variables)]
    return [*words, BRACKETS[opening]]


_DRAW: dict[str, Callable[[random.Random, bool], Draft]] = {
    "math": _math,
    "chat": _chat,
    "code": _code,
    "safety": _safety,
}
