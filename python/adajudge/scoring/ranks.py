"""The processes that torchrun started, as far as scoring needs to know them: who am I, and who is ready."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import Store

_LOOK_AGAIN = 0.1  # seconds
_START_LIMIT = timedelta(minutes=30)  # loading the judge on the slowest machine


class RankError(Exception):
    """Another process failed, and why."""


class Ranks:
    """One process among several that score shares of the same input; without torchrun the only one.

    They speak through torchrun's own key-value store, which begins empty with every launch. No process group is formed:
    what a rank has scored, the others see in the shared folder.

    Args:
        rank: of this process.
        size: number of processes.
        local_rank: of this process on its machine.
        store: where they leave messages; None for a single process.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, store: Store | None = None) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self._store = store

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Ranks:
        """As torchrun says it in ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``."""
        size = int(environment.get("WORLD_SIZE", "1"))
        if size == 1 or "LOCAL_RANK" not in environment:
            return cls()
        from torch.distributed import PrefixStore, rendezvous

        store, rank, size = next(rendezvous("env://", timeout=_START_LIMIT))
        return cls(rank, size, int(environment["LOCAL_RANK"]), PrefixStore("adajudge-score", store))

    @property
    def first(self) -> bool:
        """Whether this is the process that prepares and merges."""
        return self.rank == 0

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make` returns (JSON) in the first process, in every process; its error is everybody's."""
        if self._store is None:
            return make()
        if self.first:
            try:
                made = make()
            except Exception as error:
                self._store.set("made", json.dumps({"error": str(error)}))
                raise
            self._store.set("made", json.dumps({"made": made}))
            return made
        self._store.wait(["made"], _START_LIMIT)
        message = json.loads(self._store.get("made"))
        if "error" in message:
            raise RankError(f"rank 0: {message['error']}")
        return message["made"]

    def finish(self, error: str | None = None) -> None:
        """Say that this process has scored its share, or why it will not."""
        if self._store is not None:
            self._store.set(f"finished/{self.rank}", error or "")

    @contextmanager
    def told_of_errors(self) -> Iterator[None]:
        """What is raised in the ``with`` block is said to the other processes, whatever they wait for."""
        try:
            yield
        except BaseException as error:
            reason = str(error) or type(error).__name__
            with suppress(RuntimeError):  # the store is gone, and with it those who could be told
                self.finish(reason)
                if self.first and self._store is not None:
                    self._store.set("made", json.dumps({"error": reason}))
            raise

    def wait_for_others(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Until every process has finished.

        torchrun ends this process where another was killed.

        Raises:
            RankError: one of them failed, and why.
        """
        if self._store is None:
            return
        for other in range(self.size):
            while not self._store.check([f"finished/{other}"]):
                meanwhile()
                time.sleep(_LOOK_AGAIN)
            if error := self._store.get(f"finished/{other}").decode():
                raise RankError(f"rank {other}: {error}")
