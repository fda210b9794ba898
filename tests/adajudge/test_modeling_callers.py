"""Callers that tokenise by themselves (TRL, OpenRLHF): the score is the Scorer's, or the call is refused."""

import pytest
import torch
from adajudge import AdaJudgeConfig, AdaJudgeForSequenceClassification, Scorer
from adajudge.data import ConversationEncoder

from tests.adajudge.chat_templates.families import NAMES, family_tokenizer
from tests.adajudge.judges import BACKBONES

PROMPTS = ("Hello", "Which colour has the sky, and why is it so?")
RESPONSE = "The sky is blue."


def judge_of(tokenizer):
    torch.manual_seed(0)
    backbone = BACKBONES["qwen3"]()
    backbone.vocab_size = len(tokenizer)
    config = AdaJudgeConfig(
        backbone_config=backbone,
        num_blocks=2,
        expert_hidden_size=8,
        router_hidden_size=8,
        turn_boundary=ConversationEncoder(tokenizer).boundary,
        pad_token_id=tokenizer.pad_token_id,
    )
    judge = AdaJudgeForSequenceClassification(config).eval()
    for parameter in judge.head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return judge


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_ids_and_mask_alone_score_like_the_scorer(name, side):
    tokenizer = family_tokenizer(name)
    tokenizer.padding_side = side
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    judge = judge_of(tokenizer)
    scorer = Scorer(judge, tokenizer)
    expected = [scorer.score_response(prompt, RESPONSE).reward for prompt in PROMPTS]
    conversations = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": RESPONSE}]
        for prompt in PROMPTS
    ]
    texts = [tokenizer.apply_chat_template(c, tokenize=False) for c in conversations]
    batch = tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        rewards = judge(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    assert torch.allclose(rewards, torch.tensor(expected), atol=1e-5, rtol=0)
    assert abs(expected[0] - expected[1]) > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_without_its_mask_is_refused(side):
    tokenizer = family_tokenizer("qwen3")
    judge = judge_of(tokenizer)
    ids = ConversationEncoder(tokenizer).encode([{"role": "user", "content": "Hello"}], RESPONSE).input_ids
    padding = [tokenizer.pad_token_id] * 2
    padded = torch.tensor(
        [ids + padding, [*ids, *ids[-2:]]] if side == "right" else [padding + ids, ids[:2] + ids]
    )
    with pytest.raises(ValueError, match="attention_mask: none came, but row 0"):
        judge(input_ids=padded)
    assert judge(input_ids=torch.tensor([ids])).logits.isfinite().all()


def test_a_turn_may_end_with_the_pad_token():
    """Many tokenizers pad with the token that ends a turn: one of them at the end of a row is no padding."""
    tokenizer = family_tokenizer("qwen3")
    judge = judge_of(tokenizer)
    judge.config.pad_token_id = judge.config.turn_boundary["turn_end_ids"][-1]
    ids = ConversationEncoder(tokenizer).encode([{"role": "user", "content": "Hello"}], RESPONSE).input_ids
    assert judge(input_ids=torch.tensor([ids])).logits.isfinite().all()
    for padded in ([*ids, judge.config.pad_token_id], [judge.config.pad_token_id, *ids]):
        with pytest.raises(ValueError, match="pad token"):
            judge(input_ids=torch.tensor([padded]))


def test_a_turn_behind_the_response_is_refused_without_a_mask():
    tokenizer = family_tokenizer("qwen3")
    judge = judge_of(tokenizer)
    turns = [("user", "Hello"), ("assistant", RESPONSE), ("user", "Hello")]
    text = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False)
    with pytest.raises(ValueError, match="more than one end of turn"):
        judge(**tokenizer(text, add_special_tokens=False, return_tensors="pt"))


@pytest.mark.parametrize("name", ["responses_mask", "atention_mask"])
def test_a_misspelled_argument_is_not_swallowed(name):
    tokenizer = family_tokenizer("qwen3")
    judge = judge_of(tokenizer)
    ids = torch.tensor(
        [ConversationEncoder(tokenizer).encode([{"role": "user", "content": "Hello"}], RESPONSE).input_ids]
    )
    with pytest.raises(TypeError, match=name):
        judge(ids, **{name: torch.ones_like(ids)})
    assert judge(ids, token_type_ids=torch.zeros_like(ids)).logits.isfinite().all()
