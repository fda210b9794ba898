"""What several test workers need and one of them makes."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def once(tmp_path_factory, name: str, make: Callable[[Path], Path]) -> Path:
    """What `make` returns for a new folder, made by the first worker of a run that comes here."""
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if base.name.startswith("popen-") else base) / name
    with locked(shared):
        made = shared / "made"
        if not made.exists():
            made.write_text(str(make(shared)))
        return Path(made.read_text())
