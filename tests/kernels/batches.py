"""One batch of sequences in each of its layouts, and the map from token slots to its tokens."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from adajudge_kernels import SequenceLayout
from tests.kernels.naive import Sequence

LAYOUTS = ("packed", "padded_left", "padded_right", "shared")


@dataclass(frozen=True)
class Batch:
    """Prompts and, for each, its candidates' response lengths. Tokens are numbered as in the shared layout."""

    prompts: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]

    @property
    def num_tokens(self):
        return sum(self.prompts) + sum(map(sum, self.responses))

    @property
    def sequences(self):
        result, position = [], 0
        for prompt, responses in zip(self.prompts, self.responses, strict=True):
            prompt_rows = list(range(position, position + prompt))
            position += prompt
            for response in responses:
                rows = list(range(position, position + response))
                position += response
                result.append(Sequence(prompt_rows + rows, [False] * prompt + [True] * response))
        return result

    def lay_out(self, kind, device="cpu"):
        """The layout, and for each of its token slots the token that lies there, -1 for padding."""
        sequences = self.sequences
        if kind == "shared":
            layout = SequenceLayout.shared_prompts(
                list(self.prompts), [list(r) for r in self.responses], device
            )
            return layout, torch.arange(self.num_tokens, device=device)
        if kind == "packed":
            lengths = [(s.response.count(False), s.response.count(True)) for s in sequences]
            layout = SequenceLayout.packed([p for p, _ in lengths], [r for _, r in lengths], device)
            return layout, torch.tensor([row for s in sequences for row in s.rows], dtype=torch.long).to(
                device
            )
        longest = max((len(s.rows) for s in sequences), default=0) + 2
        source = torch.full((len(sequences), longest), -1)
        response = torch.zeros(len(sequences), longest)
        for b, s in enumerate(sequences):
            begin = longest - len(s.rows) if kind == "padded_left" else 0
            source[b, begin : begin + len(s.rows)] = torch.tensor(s.rows, dtype=torch.long)
            response[b, begin : begin + len(s.rows)] = torch.tensor(s.response, dtype=torch.float)
        source, response = source.to(device), response.to(device)
        return SequenceLayout.padded(source >= 0, response), source.flatten()

    def only(self, index):
        """The batch of one sequence of this batch (its tokens are `sequences[index].rows`)."""
        sequence = self.sequences[index]
        return Batch((sequence.response.count(False),), ((sequence.response.count(True),),))


RAGGED = Batch((3, 0, 6), ((4, 1), (5,), (2, 9, 1)))
LONG = Batch((70, 5), ((130, 1), (63,)))


def place(tokens, source):
    """States of a layout from the batch's tokens ``[N, d]``; NaN at padding."""
    return torch.where((source >= 0)[:, None], tokens[source.clamp(min=0)], float("nan"))


def drawn_widths(most):  # each is a compilation, where kernels are compiled
    return st.sampled_from([1, 7, 24, 48, 70]) if torch.cuda.is_available() else st.integers(1, most)


@st.composite
def batches(draw, max_prompts=3, max_length=40):
    prompts = draw(st.lists(st.integers(0, max_length), min_size=1, max_size=max_prompts))
    lengths = st.lists(st.integers(1, max_length), min_size=1, max_size=3)
    return Batch(tuple(prompts), tuple(tuple(draw(lengths)) for _ in prompts))


@st.composite
def lengths_with_unread_prompts(draw, max_prompts=3, max_length=40):
    """As `batches`, with prompts that no candidate reads."""
    batch = draw(batches(max_prompts, max_length))
    unread = draw(st.integers(0, max_length))
    at = draw(st.integers(0, len(batch.prompts)))
    return Batch(
        (*batch.prompts[:at], unread, *batch.prompts[at:]),
        (*batch.responses[:at], (), *batch.responses[at:]),
    )
