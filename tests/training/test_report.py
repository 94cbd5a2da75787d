"""The page of a run says what the run's files say, stands alone, and escapes what comes from outside."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from qlora_kit.planning.components import COMPONENTS
from qlora_kit.recipe import recipe_for_model
from qlora_kit.training.metrics import read_lines
from qlora_kit.training.report import merge_command, report, write_report

MIB = 1 << 20


def run_folder(folder: Path, *, planned: bool = True, peak_mib: int = 50, train: str = "d.jsonl") -> tuple[Path, list]:
    """What a run of three steps leaves, one of them skipped: its folder, and the lines of its metrics."""
    recipe = recipe_for_model("llama-7b", [f"output={folder}/a run", f"data.train={train}"])
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    components = dict.fromkeys(COMPONENTS, 0) | {"base_nf4": 30 * MIB, "logits": 16 * MIB}
    plan = {"components": components, "peak_bytes": 46 * MIB}
    measured = {"device": "cpu", "peak_bytes": peak_mib * MIB, "interpreter_bytes": 400 * MIB, "followed_step": 1}
    measured |= {"peak_at": "backward of block 3", "components": components, "other_bytes": 4 * MIB}
    (folder / "plan.json").write_text(json.dumps(plan | {"budget_bytes": 64 * MIB} if planned else None))
    (folder / "memory.json").write_text(json.dumps({"planned": plan if planned else None, "measured": measured}))
    step = {"lr": 0.1, "tokens": 100, "step_s": 2.0, "tokens_per_s": 50.0, "device_peak_bytes": 440 * MIB}
    lines: list[dict] = [{"step": 0, "eval_loss": 4.5, "eval_tokens": 7}]
    lines += [step | {"step": 1, "loss": 3.5}, step | {"step": 2, "loss": None, "skipped": True}]
    lines += [step | {"step": 3, "loss": 2.5}, {"step": 3, "eval_loss": 2.25, "eval_tokens": 7}]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder, read_lines(folder)


def test_the_page_says_what_the_files_say(tmp_path: Path) -> None:
    write_report(*run_folder(tmp_path))
    page = (tmp_path / "report.html").read_text()
    words = re.sub("<[^>]+>", " ", page)
    for said in (
        *(
            "within the limit of 64.0 MiB: 50.0 MiB measured, 46.0 MiB planned",
            "3 steps in 6.0 s: 300 tokens, 50 a second",
        ),
        *("1 of them were skipped", "held-out loss 4.5000 -&gt; 2.2500", "best at step 3", "backward of block 3"),
        *("400.0 MiB, are counted in neither", "base_nf4", "logits", "other", "target_modules"),
    ):
        assert said in words, said
    assert page.count("<svg") == 4 and page.count('<circle class="dot"') == 2


def test_it_needs_nothing_from_outside_and_escapes(tmp_path: Path) -> None:
    page = report(*run_folder(tmp_path, train="<script>x.jsonl"))
    assert re.search(r"https?:|url\(|@import|<script|<link|<img|<iframe", page) is None


def test_the_limit_is_held_or_not(tmp_path: Path) -> None:
    assert 'class="verdict over">over the limit' in report(*run_folder(tmp_path, peak_mib=65))
    assert 'class="verdict fits">peak memory 50.0 MiB' in report(*run_folder(tmp_path, planned=False))


def test_the_merge_command_can_be_pasted(tmp_path: Path) -> None:
    recipe = recipe_for_model("m", [f"output={tmp_path}/a run"])
    assert shlex.split(merge_command(recipe))[-1] == f"{tmp_path}/a run/merged"


@pytest.mark.parametrize("planned", [True, False])
def test_every_tag_is_closed(tmp_path: Path, planned: bool) -> None:
    page = report(*run_folder(tmp_path, planned=planned))
    for tag in ("section", "div", "table", "tr", "td", "p", "figure", "svg", "main"):
        assert len(re.findall(rf"<{tag}[ >]", page)) == page.count(f"</{tag}>"), tag
