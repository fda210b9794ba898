"""The head under PEFT's adapters and accelerate's offloading, both real."""

import copy

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import LoraConfig, get_peft_model

import adajudge_kernels as ak

LAYOUT = ak.SequenceLayout.shared_prompts([4], [[3, 2]])


@pytest.fixture(params=["all", "response"])
def head(request):
    torch.manual_seed(0)
    head = ak.AdaJudgeHead(32, num_blocks=2, attention_tokens=request.param)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return head.eval()


def test_adapters_on_the_projections_count_and_merge(head):
    hidden = torch.randn(LAYOUT.num_tokens, 32)
    before = head(hidden, LAYOUT).reward.detach()
    targets = ["qkv", "output", "gate_up", "down"]
    adapted = get_peft_model(
        copy.deepcopy(head), LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    )
    out = adapted(hidden, LAYOUT)
    assert not torch.allclose(out.reward, before, atol=1e-2)
    out.reward.sum().backward()
    matrices = {name: p.grad for name, p in adapted.named_parameters() if "lora_" in name}
    assert len(matrices) == 2 * 2 * len(targets)
    assert all(gradient.abs().sum() > 0 for gradient in matrices.values())
    merged = adapted.merge_and_unload()
    assert torch.allclose(merged(hidden, LAYOUT).reward, out.reward, atol=1e-4)


@pytest.mark.parametrize("offload", [cpu_offload, disk_offload])
def test_offloaded_weights_are_there_when_they_are_used(head, offload, tmp_path):
    hidden = torch.randn(LAYOUT.num_tokens, 32)
    before = head(hidden, LAYOUT).reward.detach()
    options = {"offload_dir": str(tmp_path)} if offload is disk_offload else {}
    offload(head, execution_device=torch.device("cpu"), **options)
    assert {p.device.type for p in head.parameters()} == {"meta"}
    assert torch.equal(head(hidden, LAYOUT).reward, before)
