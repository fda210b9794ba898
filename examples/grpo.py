"""TRL's GRPO with a judge as its reward model: a few steps, offline, on any machine. Needs ``pip install trl``.

The policy is a tiny random model that talks in the built-in judge's words; put your own models in `policy_and_tokenizer` and
`judge_and_tokenizer`.
"""

import torch
from adajudge import AdaJudgeForSequenceClassification
from adajudge.data import load_tokenizer
from adajudge.scoring import BUILT_IN_JUDGE
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

PROMPTS = ["tell me about sport .", "what is 8 plus 1 plus 6 minus 4 ?"]


def judge_and_tokenizer():
    """The built-in judge, in fp32: its file has the backbone in fp16."""
    judge = AdaJudgeForSequenceClassification.from_pretrained(str(BUILT_IN_JUDGE), dtype=torch.float32)
    return judge, load_tokenizer(BUILT_IN_JUDGE)


def policy_and_tokenizer():
    """A policy that knows nothing yet."""
    tokenizer = load_tokenizer(BUILT_IN_JUDGE)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    special = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **sizes, **heads, **special)), tokenizer


def make_trainer(judge, judge_tokenizer, other_rewards=(), **options):
    """A GRPO trainer with the judge, and other reward functions if any; `options` are those of `trl.GRPOConfig`."""
    policy, tokenizer = policy_and_tokenizer()
    prompts = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
    arguments = {
        "output_dir": "out/grpo",
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 12,
        "logging_steps": 1,
        "bf16": False,  # TRL's default is True, and the judge would compute in bf16 too
        "report_to": "none",
        "save_strategy": "no",
        **options,
    }
    return GRPOTrainer(
        model=policy,
        processing_class=tokenizer,
        # The judge itself. TRL renders prompt and completion with the judge's chat template and reads `logits[:, 0]`; where the
        # response begins the judge finds by itself (`config.turn_boundary`).
        reward_funcs=[judge, *other_rewards],
        reward_processing_classes=[judge_tokenizer, *(None for _ in other_rewards)],
        args=GRPOConfig(**arguments),
        train_dataset=Dataset.from_list(prompts),
    )


if __name__ == "__main__":
    make_trainer(*judge_and_tokenizer()).train()
