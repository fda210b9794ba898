"""Limits and access of a server."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


@dataclass(frozen=True)
class Settings:
    """What a server accepts.

    Args:
        model_name: the judge's name in answers.
        api_key: what clients must send; ``None``: no key.
        check_host: refuse requests whose ``Host`` is not this machine's loopback (a web page that points a name of its own
            at 127.0.0.1 would otherwise reach a server without a key).
        max_body_mb: size of a request's body in MiB, 413 above.
        max_rows: responses a request asks scores for, 413 above.
        max_queue: responses accepted and not yet answered, 429 above.
        max_batch_wait_ms: how long a request waits for others to be packed with.
        timeout: seconds from the first byte of a request to its answer, 504 after.
    """

    model_name: str = "adajudge"
    api_key: str | None = None
    check_host: bool = True
    max_body_mb: float = 64.0
    max_rows: int = 8192
    max_queue: int = 16384
    max_batch_wait_ms: float = 3.0
    timeout: float = 150.0

    def __post_init__(self) -> None:
        """Refuse what can never work."""
        for name in ("max_body_mb", "max_rows", "max_queue", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: {getattr(self, name)} came, expected more than 0")
        if not 0 <= self.max_batch_wait_ms <= 1000:
            raise ValueError(f"max_batch_wait_ms: {self.max_batch_wait_ms} came, expected 0 to 1000")
        if self.max_queue < self.max_rows:
            raise ValueError(
                f"max_queue: {self.max_queue} came, expected at least max_rows ({self.max_rows}); "
                "a request of that many rows could never be accepted"
            )
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("api_key: it is empty; expected a key, or none at all")
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("api_key: expected printable ASCII characters; others cannot go in a header")

    @property
    def max_body(self) -> int:
        """`max_body_mb` in bytes."""
        return int(self.max_body_mb * 2**20)

    def accepts_host(self, host: str) -> bool:
        """Whether a request with this ``Host`` header is for us."""
        if not self.check_host or self.api_key is not None:
            return True
        name = host.rpartition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
        return is_loopback(name)
