"""`gpu_check` claims nothing where there is no accelerator."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is one")
def test_without_an_accelerator_it_says_so_and_writes_nothing(tmp_path):
    out = tmp_path / "found.json"
    arguments = ["-m", "tools.gpu_check", "--dir", str(tmp_path / "d"), "--out", str(out)]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (4, "")
    assert "no accelerator here" in done.stderr
    assert not out.exists()
