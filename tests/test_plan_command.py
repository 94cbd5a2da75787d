"""What `plan` answers beside the plan: which recipe to copy, and what a data file changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_kit import prepared
from qlora_kit.errors import DiskError, RecipeError
from qlora_kit.plan_command import Answer, answer, nearest_recipe
from qlora_kit.planning.hardware import GIB
from qlora_kit.prepared import Promise

TEXT = "# {name}\n{promise}\nmodel:\n  path: {model}  # or a folder\n"
RECIPES = {
    "llama-70b-24gb": ("meta-llama/Llama-3.1-70B", 22.5, "rtx-4090"),
    "llama-8b-24gb": ("meta-llama/Llama-3.1-8B", 22.5, "rtx-4090"),
    "llama-8b-24gb-32k": ("meta-llama/Llama-3.1-8B", 22.5, "rtx-4090"),
    "llama-8b-8gb": ("meta-llama/Llama-3.1-8B", 7.5, "rtx-3070"),
    "qwen-cpu": ("Qwen/Qwen2.5-0.5B", 4, "cpu"),
    "unknown": ("somebody/something", 24, "rtx-4090"),
}


def text(name: str, model: str, budget_gib: float, card: str) -> str:
    promise = Promise(0, int(budget_gib * GIB), card, 0, 0, 0, 0)
    return TEXT.format(name=name, model=model, promise=promise)


@pytest.fixture(autouse=True)
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "recipes"
    folder.mkdir()
    for name, (model, budget_gib, card) in RECIPES.items():
        (folder / f"{name}.yaml").write_text(text(name, model, budget_gib, card))
    monkeypatch.setattr(prepared, "recipes_folder", lambda: folder)
    return folder


def planned(model: str, gpu: str | None = None, budget: str | None = None) -> Answer:
    overrides = [] if gpu else ["train.device=cpu"]
    return answer(model, overrides, budget, gpu)


@pytest.mark.parametrize(
    ("model", "gpu", "budget", "expected"),
    [
        ("llama-3.1-70b", "rtx-4090", None, "llama-70b-24gb"),
        ("qwen2.5-72b", "rtx-3090", None, "llama-70b-24gb"),
        ("llama-3.1-8b", "rtx-4090", None, "llama-8b-24gb"),  # of equals the shortest name
        ("qwen3-8b", "rtx-3070", None, "llama-8b-8gb"),
        ("llama-3.1-8b", "h100", None, "llama-8b-24gb"),
        ("smollm2-135m", None, "8GiB", "qwen-cpu"),
    ],
)
def test_the_nearest_recipe_in_model_and_memory_is_named(
    model: str, gpu: str | None, budget: str | None, expected: str
) -> None:
    found = planned(model, gpu, budget)
    assert nearest_recipe(found.plan) == expected
    assert found.next_step == f"qlora-kit recipes copy {expected} my.yaml, then put your model and data into it"


def test_what_a_recipes_head_promises_is_its_memory(recipes: Path) -> None:
    (recipes / "headed.yaml").write_text(text("n", "gpt2", 10, "rtx-3080-10gb"))
    assert nearest_recipe(planned("gpt2", "rtx-3080-10gb").plan) == "headed"


def test_without_a_recipe_for_the_device_the_list_is_named(recipes: Path) -> None:
    (recipes / "qwen-cpu.yaml").unlink()
    (recipes / "llama-8b-8gb.yaml").unlink()
    assert planned("smollm2-135m", budget="8GiB").next_step.startswith("qlora-kit recipes list")


def test_a_recipe_is_followed_by_its_training(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: {path: gpt2}\ndata: {train: t}\n")
    assert answer(str(mine), [], gpu="rtx-4090").next_step == f"qlora-kit train {mine}"


def test_mixtral_is_planned_and_its_experts_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned("mixtral-8x7b", "h100")
    assert found.plan.base_parameters == 46_702_792_704
    assert found.plan.components["base_nf4"] == (46_702_792_704 - 2 * 32000 * 4096 - 65 * 4096) // 2
    said = capsys.readouterr().err
    assert "'mixtral' is not one that this kit trains" in said and "experts count as linears of their own" in said
    assert "does not train" in found.next_step


def test_a_data_file_needs_a_local_model() -> None:
    with pytest.raises(RecipeError, match=r"--data t.jsonl: token lengths need .*'gpt2' is no local folder"):
        answer("gpt2", [], gpu="rtx-4090", data=Path("t.jsonl"))


def test_html_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    found = planned("gpt2", "rtx-4090")
    found.write_html(tmp_path / "new" / "plan.html")
    assert (tmp_path / "new" / "plan.html").read_text().endswith("</html>\n")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["plan.html"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(DiskError, match=r"file/plan.html: cannot write"):
        found.write_html(tmp_path / "file" / "plan.html")
