"""The process: a socket, signals, and an end that loses no accepted request."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import uvicorn

from adajudge.scoring import Scorer
from adajudge.serving.app import create_app
from adajudge.serving.gate import Gate
from adajudge.serving.settings import Settings

_BACKLOG = 2048
_KEEP_ALIVE = 30  # seconds that an idle connection stays open


class _Server(uvicorn.Server):
    """Answers what was accepted while it refuses what is new, and ends without raising the signal once more."""

    def __init__(
        self, config: uvicorn.Config, gate: Gate, patience: float, announce: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._gate = gate
        self._patience = patience
        self._announce = announce
        self.drained = False

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The first signal drains, a second SIGINT ends at once."""
        before = {sig: signal.signal(sig, self.handle_exit) for sig in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for sig, handler in before.items():
                signal.signal(sig, handler)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        self._announce()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new work with 503 until all that was accepted is answered, then close."""
        self._gate.draining = True
        deadline = time.monotonic() + self._patience
        while self._gate.in_flight and not self.force_exit and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        self.drained = not self._gate.in_flight
        if not self.drained:
            self._gate.service.abandon()
        self.force_exit = False  # what is left is quick
        await super().shutdown(sockets)


@dataclass(frozen=True)
class Ending:
    """How a server ended.

    Args:
        drained: every accepted request was answered.
        idle: no call of the engine was left behind, in a thread that only the end of the process ends.
    """

    drained: bool
    idle: bool


def bind(host: str, port: int) -> socket.socket:
    """An address of our own, before a judge is loaded for it; connections are refused until `serve` listens.

    Args:
        host: name or address.
        port: 0 chooses a free one.

    Raises:
        OSError: the address cannot be bound.
    """
    address = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        address.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        address.bind((host, port))
    except OSError as error:
        address.close()
        hint = ": another program listens there; --port 0 chooses a free one"
        raise OSError(
            f"{host} port {port} cannot be bound: {error.strerror}{hint if error.errno == errno.EADDRINUSE else ''}"
        ) from error
    return address


def serve(
    scorer: Scorer, settings: Settings, address: socket.socket, announce: Callable[[str], None]
) -> Ending:
    """Serve until SIGTERM or SIGINT.

    Args:
        scorer: of the judge.
        settings: limits and access.
        address: of `bind`; closed at the end.
        announce: called with the server's URL once it can be reached.

    Returns:
        Whether every accepted request was answered, and whether the engine is idle.

    Raises:
        OSError: another program listens at the address since it was bound.
    """
    _allow_many_connections()
    with address:
        address.listen(_BACKLOG)
        host, port = address.getsockname()[:2]
        url = f"http://[{host}]:{port}" if address.family == socket.AF_INET6 else f"http://{host}:{port}"
        gate = create_app(scorer, settings)
        config = uvicorn.Config(
            gate,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_keep_alive=_KEEP_ALIVE,
            timeout_graceful_shutdown=5,  # what is left then are idle connections
        )
        server = _Server(config, gate, settings.timeout + 5, lambda: announce(url))
        server.run(sockets=[address])
        return Ending(server.drained, gate.service.ended)


def _allow_many_connections() -> None:
    """Clients of RLHF open a connection per response; the usual soft limit is 1,024 files."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
