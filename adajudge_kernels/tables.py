"""A layout as kernels want it: small index tables, computed once on the host. All int32 unless said otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adajudge_kernels import compiled

CHUNK_TOKENS = 64
"""Kernels cut a run of tokens into chunks of this many, counted from the run's own start."""


class _LayoutTables(NamedTuple):
    roles: Tensor
    sequences: Tensor
    chunks: Tensor
    groups: Tensor
    group_chunks: Tensor


class LayoutTables(_LayoutTables):
    """What a pooling kernel needs to know of a layout.

    Attributes:
        roles: int8 ``[T]``, a `TokenRole` per token slot.
        sequences: ``[B, 8]``, (start0, stop0, start1, stop1, last response token, prompt tokens, response tokens,
            number of the first chunk) per sequence.
        chunks: ``[N]``, the sequence of each chunk, sequence after sequence.
        groups: ``[G, 5]``, (start, stop, first reader, readers, number of the first chunk) per group of
            `SequenceLayout.query_ranges`: first the shared prompts, then a group for each sequence's own tokens. The
            sequences that read a group are consecutive.
        group_chunks: ``[M]``, the group of each chunk of a group.
    """

    @classmethod
    def of(cls, tables: Sequence[Tensor]) -> LayoutTables:
        """The tables by name, from an operator's list of them."""
        return tables if isinstance(tables, cls) else cls(*tables)

    def __getstate__(self) -> None:
        """Nothing but the tables is copied."""

    @cached_property
    def native(self) -> Any:
        """The compiled module's view of the tables."""
        return compiled.module.Layout(self)

    @property
    def ranges(self) -> Tensor:
        """``[B, 4]``: start0, stop0, start1, stop1."""
        return self.sequences[:, :4]

    @property
    def last_response(self) -> Tensor:
        """``[B]``: the last response token."""
        return self.sequences[:, 4]


class AttentionTables(NamedTuple):
    """What attention needs to know of a layout and of the queries that are wanted.

    Every token lies in one group. A group's queries see the range before it (a shared prompt; often empty) and its own.

    Attributes:
        groups: ``[G, 7]``, (start0, stop0, start1, stop1) as `SequenceLayout.key_ranges`, then (first, count) of the
            groups that have this one's tokens before them, and the number of the first chunk of its own range.
        key_chunks: ``[M]``, the group of each chunk of a group's own range.
        queries: ``[G, 3]``, (first, stop) of a group's rows in the query tensor, and the number of its first chunk.
        query_chunks: ``[M']``, the group of each chunk of a group's queries.
        rows: int64 ``[N]``, the token of each row of the query tensor; empty where every token has its row.
    """

    groups: Tensor
    key_chunks: Tensor
    queries: Tensor
    query_chunks: Tensor
    rows: Tensor


def pooling_tables(
    roles: Tensor, sequences: Tensor, query_ranges: Tensor, readers: Tensor, lengths: Tensor
) -> LayoutTables:
    """`sequences` are the first seven columns of the table; `lengths` the tokens of each sequence."""
    chunks, first_chunks = cut(lengths)
    group_chunks, first_group_chunks = cut(query_ranges[:, 1] - query_ranges[:, 0])
    return LayoutTables(
        roles,
        torch.cat([sequences, first_chunks[:, None]], dim=1),
        chunks,
        torch.cat([query_ranges, readers, first_group_chunks[:, None]], dim=1),
        group_chunks,
    )


def attention_tables(
    key_ranges: Tensor, readers: Tensor, num_sequences: int, chosen: Tensor | None = None
) -> AttentionTables:
    """Tables for queries of all tokens, or of those that the bool mask `chosen` ``[T]`` names.

    Args:
        key_ranges: ``[G, 4]`` of the layout. Groups of shared prompts come first, then one per sequence.
        readers: ``[G, 2]`` of the layout.
        num_sequences: B.
    """
    own, prompts = key_ranges[:, 2:], len(key_ranges) - num_sequences
    later = torch.zeros_like(readers)
    later[:prompts, 0] = readers[:prompts, 0] + prompts
    later[:prompts, 1] = readers[:prompts, 1]
    key_chunks, first_key_chunks = cut(own[:, 1] - own[:, 0])
    groups = torch.cat([key_ranges, later, first_key_chunks[:, None]], dim=1)
    if chosen is None:
        queries, rows = own, torch.zeros(0, dtype=torch.int64, device="cpu")
    else:
        before = torch.zeros(len(chosen) + 1, dtype=torch.int32, device="cpu")
        before[1:] = torch.cumsum(chosen, 0)
        queries, rows = before[own.long()], chosen.nonzero().squeeze(1)
    query_chunks, first_query_chunks = cut(queries[:, 1] - queries[:, 0])
    return AttentionTables(
        groups, key_chunks, torch.cat([queries, first_query_chunks[:, None]], dim=1), query_chunks, rows
    )


def cut(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """For runs of these lengths cut into chunks: the run of each chunk, and each run's first chunk."""
    counts = (lengths.long() + CHUNK_TOKENS - 1) // CHUNK_TOKENS
    owner = torch.repeat_interleave(torch.arange(len(counts), device="cpu"), counts)
    return int32(owner), int32(torch.cumsum(counts, 0) - counts)


def int32(values: Tensor) -> Tensor:
    """Token indices are int32; offsets of elements derived from them must be int64."""
    return values.to(torch.int32)
