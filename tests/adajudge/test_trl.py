"""TRL's GRPO trainer with the judge itself as its reward model: the rewards that it trains on are the Scorer's."""

import importlib.util
from pathlib import Path

import pytest
import torch
from adajudge import Scorer
from adajudge.data import Message

pytest.importorskip("trl", reason="needs trl, of the extra dev")
EXAMPLE = Path(__file__).parents[2] / "examples/grpo.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("grpo", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_grpo_trains_on_the_rewards_of_the_scorer(example, tmp_path):
    judge, tokenizer = example.judge_and_tokenizer()
    scorer = Scorer(judge, tokenizer, unknown_limit=1.0)
    given, expected, answers = [], [], []
    judge.register_forward_hook(lambda module, args, out: given.append(out.logits[:, 0].clone()))

    def scorer_reward(prompts, completions, **_):
        """A reward function that calls the Scorer: the other way to use a judge here."""
        (judged,) = given[len(expected) :]  # TRL has just called the judge on these completions
        rewards = [
            scorer.score_response([Message(**m) for m in prompt], completion[0]["content"]).reward
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        del given[len(expected) + 1 :]  # the Scorer's own calls
        assert judged.tolist() == pytest.approx(rewards, abs=2e-5)
        expected.append(rewards)
        answers.extend(completion[0]["content"] for completion in completions)
        return rewards

    options = {"output_dir": str(tmp_path), "use_cpu": True, "disable_tqdm": True, "seed": 1}
    trainer = example.make_trainer(judge, tokenizer, [scorer_reward], **options)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert len(expected) == 3
    assert len(set(answers)) > 6
    assert torch.tensor(expected).std() > 0.01
    judge_name = next(name for name in trainer.reward_func_names if name != "scorer_reward")
    logged = [entry for entry in trainer.state.log_history if f"rewards/{judge_name}/mean" in entry]
    assert len(logged) == 3
    for entry, rewards in zip(logged, expected, strict=True):
        mean = torch.tensor(rewards).mean().item()
        assert entry[f"rewards/{judge_name}/mean"] == pytest.approx(mean, abs=1e-4)
        assert entry["rewards/scorer_reward/mean"] == pytest.approx(mean, abs=1e-4)
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
