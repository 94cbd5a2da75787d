"""Hard limits from the kernel: a memory limit and a reading speed for one process, by control groups (version 1).

Why: a memory limit that is only measured afterwards proves less than one that kills; and a fast disk hides what a slow
one costs. How: a group below the one that this process is in, so that what holds here goes on to hold; the child joins
it before its interpreter starts (`entering`), and it is removed when the child has ended, on Ctrl-C too. The memory
group also counts the page cache that the child fills; the kernel drops that cache before it kills.
Needs root and the controllers below /sys/fs/cgroup. Imported by: tools.harness, prove_fit, bench_streaming.
"""

from __future__ import annotations

import abc
import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from qlora_kit.errors import QLoRAKitError

ROOT = Path("/sys/fs/cgroup")
REMOVAL_SECONDS = 5.0  # a group of a process that was just killed stays busy for a moment


class NoControlGroup(QLoRAKitError):
    """The kernel gives no such limit to this user."""


class Group(abc.ABC):
    """One control group of one controller, for as long as its with-block lasts.

    Raises: NoControlGroup: not root, or the controller is not there (another version of control groups, a container).
    """

    controller = ""

    def __init__(self, name: str = "qlora_kit") -> None:
        self.path = _own_group(self.controller) / f"{name}_{os.getpid()}"

    def __enter__(self) -> Group:
        try:
            self.path.mkdir()
            self.set_up()
        except OSError as problem:
            self.__exit__()
            raise NoControlGroup(
                f"{self.path}: cannot make a control group ({problem.strerror}): this needs root and the "
                f"{self.controller} controller of version 1; elsewhere, run without the limit, inside a limit of your "
                "own: systemd-run --scope -p MemoryMax=3G ..."
            ) from problem
        return self

    def __exit__(self, *unused: object) -> None:
        end = time.monotonic() + REMOVAL_SECONDS
        while self.path.is_dir() and time.monotonic() < end:
            with contextlib.suppress(OSError):
                self.path.rmdir()
                return
            time.sleep(0.05)

    @abc.abstractmethod
    def set_up(self) -> None:
        """Write the limits into the group's files."""


def _own_group(controller: str) -> Path:
    """The folder of the group that this process is in; the controller's root where that is not to be seen."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            folder = ROOT / controller / path.lstrip("/")
            if controller in controllers.split(",") and folder.is_dir():
                return folder
    return ROOT / controller


class MemoryGroup(Group):
    """At most `limit_bytes` of memory, swap included, page cache included; what asks for more is killed."""

    controller = "memory"

    def __init__(self, limit_bytes: int, name: str = "qlora_kit") -> None:
        super().__init__(name)
        self.limit_bytes = limit_bytes

    def set_up(self) -> None:
        (self.path / "memory.limit_in_bytes").write_text(str(self.limit_bytes))
        swap = self.path / "memory.memsw.limit_in_bytes"
        if swap.exists():
            swap.write_text(str(self.limit_bytes))

    def figures(self) -> dict[str, int]:
        """Bytes: the limit, and most in use, page cache included; processes that the kernel killed for it."""
        control = dict(line.split() for line in (self.path / "memory.oom_control").read_text().splitlines())
        most = int((self.path / "memory.max_usage_in_bytes").read_text())
        return {"limit_bytes": self.limit_bytes, "max_usage_bytes": most, "killed": int(control["oom_kill"])}


class ReadLimit(Group):
    """At most `bytes_per_second` read from the disk that holds `folder`; what is in the page cache costs nothing."""

    controller = "blkio"

    def __init__(self, folder: Path, bytes_per_second: int, name: str = "qlora_kit") -> None:
        super().__init__(name)
        self.rule = f"{_disk(folder)} {bytes_per_second}"

    def set_up(self) -> None:
        (self.path / "blkio.throttle.read_bps_device").write_text(self.rule)


def _disk(folder: Path) -> str:
    """`major:minor` of the whole disk below a folder; a partition itself cannot be limited."""
    number = os.stat(folder).st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    link = Path("/sys/dev/block") / device
    return (link.resolve().parent / "dev").read_text().strip() if (link / "partition").exists() else device


def entering(command: Sequence[str], groups: Sequence[Group]) -> list[str]:
    """The command, run by a shell that first puts itself into the groups: everything it ever takes is counted."""
    if not groups:
        return list(command)
    joins = "".join(f"echo $$ > '{group.path}/cgroup.procs' && " for group in groups)
    return ["/bin/sh", "-c", f'{joins}exec "$@"', "sh", *command]


def drop_cache(folder: Path) -> None:
    """Let go of the page cache of the files in a folder, as far as nobody else uses it: the next read is a cold one."""
    for path in sorted(folder.iterdir()):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fill_cache(folder: Path) -> None:
    """Read the files of a folder once: later reads find them in memory, as long as there is room."""
    buffer = bytearray(8 << 20)
    for path in sorted(folder.iterdir()):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


@contextlib.contextmanager
def always_cold(folder: Path, every_seconds: float = 0.1) -> Iterator[None]:
    """Within the block the files of a folder are kept out of the page cache, so that each use reads the disk."""
    import threading

    ended = threading.Event()

    def drop() -> None:
        while not ended.wait(every_seconds):
            drop_cache(folder)

    drop_cache(folder)
    thread = threading.Thread(target=drop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
