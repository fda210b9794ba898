"""What the head keeps for its backward, tensor by tensor, as docs/head.md lists it."""

import pytest
import torch

import adajudge_kernels as ak

D, WIDTH, HEADS, BLOCKS = 48, 80, 3, 3
LAYOUT = ak.SequenceLayout.packed([20, 0, 31], [30, 9, 12])


def kept(call, known):
    """Bytes of the distinct tensors that a call saves for its backward, beyond those of `known`; largest first."""
    own = {x.untyped_storage().data_ptr() for x in known}
    found = {}

    def note(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        result = call()
    return result, sorted(found.values(), reverse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chain_keeps_what_the_document_says(dtype, device):
    refinement = ak.DepthGatedRefinement(D, BLOCKS, HEADS, WIDTH).to(device, dtype)
    hidden = torch.randn(LAYOUT.num_tokens, D, device=device, dtype=dtype, requires_grad=True)
    layout = LAYOUT.to(device)
    tables = [*layout.tables, *layout.attention, *layout.response_attention]
    known = [*refinement.parameters(), *tables, hidden]
    (states, *_), sizes = kept(lambda: refinement(hidden, layout), known)
    row = layout.num_tokens * dtype.itemsize
    log_sum_exp = (
        4 * HEADS * layout.num_tokens * (ak.backends.choose_backend(device, "refinement").backend == "triton")
    )
    # normed twice, query with key and value, attended, stream, gate with up, their product; H_1 to H_{K-1}.
    a_block = row * (2 * D + 3 * D + D + D + 2 * WIDTH + WIDTH) + log_sum_exp
    assert 0 <= sum(sizes) - BLOCKS * a_block - (BLOCKS - 1) * row * D <= 4096  # of the gate: O(B d)
    assert len(states) == BLOCKS


def test_recomputation_keeps_a_blocks_input_only(device):
    refinement = ak.DepthGatedRefinement(D, BLOCKS, HEADS, WIDTH).to(device).train()
    refinement.gradient_checkpointing = True
    hidden = torch.randn(LAYOUT.num_tokens, D, device=device, requires_grad=True)
    layout = LAYOUT.to(device)
    known = [*refinement.parameters(), *layout.tables, *layout.attention, hidden]
    _, sizes = kept(lambda: refinement(hidden, layout), known)
    assert sum(sizes) <= (BLOCKS - 1) * layout.num_tokens * D * 4 + 4096
