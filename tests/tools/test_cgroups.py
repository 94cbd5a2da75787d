"""The limits are the kernel's: what asks for more is killed, and nothing of them is left behind."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.cgroups import Group, MemoryGroup, NoControlGroup, ReadLimit, drop_cache, entering, fill_cache

TAKE = "import sys; taken = bytearray(int(sys.argv[1]) << 20); print(len(taken))"


@pytest.fixture
def group():
    try:
        with MemoryGroup(64 << 20, "qlora_kit_test") as group:
            yield group
    except NoControlGroup as missing:
        pytest.skip(str(missing))
    assert not group.path.exists()


def take(mebibytes: int, group: Group) -> subprocess.CompletedProcess:
    command = entering([sys.executable, "-c", TAKE, str(mebibytes)], [group])
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_process_within_the_limit_runs_and_its_peak_is_known(group):
    assert take(32, group).returncode == 0
    figures = group.figures()
    assert figures["killed"] == 0
    assert 32 << 20 <= figures["max_usage_bytes"] <= 64 << 20


def test_a_process_above_the_limit_is_killed_and_counted(group):
    assert take(128, group).returncode == -9
    assert group.figures()["killed"] == 1


def test_page_cache_is_dropped_rather_than_the_process_killed(group, tmp_path):
    file = tmp_path / "large"
    file.write_bytes(bytes(160 << 20))
    drop_cache(tmp_path)
    read = [sys.executable, "-c", f"f = open({str(file)!r}, 'rb')\nwhile f.read(1 << 20): pass"]
    assert subprocess.run(entering(read, [group]), check=False).returncode == 0
    assert group.figures()["killed"] == 0


def test_a_disk_reads_no_faster_than_it_may(tmp_path):
    (tmp_path / "file").write_bytes(bytes(16 << 20))
    subprocess.run(["sync", str(tmp_path / "file")], check=True)
    try:
        with ReadLimit(tmp_path, 16 << 20, "qlora_kit_test") as limit:
            drop_cache(tmp_path)
            started = time.monotonic()
            subprocess.run(entering(["cat", str(tmp_path / "file")], [limit]), stdout=subprocess.DEVNULL, check=True)
            seconds = time.monotonic() - started
    except NoControlGroup as missing:
        pytest.skip(str(missing))
    assert seconds > 0.7


def test_without_the_controller_the_message_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("tools.cgroups.ROOT", tmp_path)
    with pytest.raises(NoControlGroup, match="systemd-run"), MemoryGroup(1 << 30):
        pass


def test_without_groups_a_command_is_itself():
    assert entering(["a", "b"], []) == ["a", "b"]


def test_filling_the_cache_reads_every_file(tmp_path: Path):
    (tmp_path / "one").write_bytes(b"1" * 1000)
    (tmp_path / "folder").mkdir()
    fill_cache(tmp_path)  # a folder in it is passed over
