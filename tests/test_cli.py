"""The contract of the command line: commands, options, files, exit codes; and one run from end to end.

Most commands run in this process through the program's own `main`, since each new one would import torch for seconds;
training, stopping and the proved merge are real processes.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main

from qlora_kit import cli, files
from qlora_kit.base.shards import Shards, save_tensors
from qlora_kit.recipe import load_recipe

# The contract: command -> options. Adding an option is free; a change here is a decision that CHANGELOG.md records.
CONTRACT = {
    "plan": "--budget --gpu --stack --data --html --simulate --set --json",
    "train": "--set --resume",
    "profile": "--steps --out --set --json",
    "eval": "--model --adapter --data --format --json",
    "generate": "--model --adapter --prompt --max-new-tokens --temperature --top-p --top-k --seed --placement",
    "chat": "--model --adapter --system --max-new-tokens --temperature --top-p --top-k --seed --placement",
    "merge": "--model --adapter --out --dtype --onto --verify --json",
    "quantize": "--model --out",
    "export gguf": "--model --adapter --out --dtype --lora --onto --any-base --json",
    "adapter show": "--json --png",
    "adapter compose": "--weights --method --rank --density --seed --out --json",
    "adapter resize": "--rank --energy --out --json",
    "recipes list": "",
    "recipes show": "",
    "recipes copy": "",
    "doctor": "--json",
    "selftest": "",
}
MERGE_CHOICES = [
    *[("--dtype", choice) for choice in ("float16", "bfloat16", "float32")],
    *[("--onto", choice) for choice in ("auto", "original", "dequantized", "4bit")],
]
COMPONENTS = (
    "base_nf4 quant_constants base_unquantized adapter gradients optimizer activations logits workspace runtime"
)
PLAN_KEYS = (
    "schema fits budget_bytes peak_bytes peak_phase components phases trainable_parameters total_parameters "
    "trainable_percent resident_blocks streamed_blocks settings suggestions estimated room roomy"
)
STEP_KEYS = "step loss lr grad_norm tokens tokens_per_s step_s device_peak_bytes host_rss_bytes"
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def write_rows(path: Path, count: int, wrong: dict[int, dict[str, Any]] | None = None) -> Path:
    """Chats about sums; line -> row for lines that are to be something else."""
    rows: list[dict[str, Any]] = []
    for number in range(1, count + 1):
        turns = [("user", f"{number % 7} + {number % 5} ?"), ("assistant", f"it is {number % 7 + number % 5} .")]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    for line, row in (wrong or {}).items():
        rows[line - 1] = row
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_tokenizer(folder: Path) -> None:
    """One token a printable ASCII character, after <pad>, <s> and </s>: 98 of the tiny models' 128 ids."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    vocabulary = {text: index for index, text in enumerate([*special, *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE
    )
    wrapped.save_pretrained(str(folder))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite a model's weights after `change` has changed the tensors by name."""
    shards = Shards([folder / "model.safetensors"])
    tensors = {name: shards.read(name) for name in shards.entries}
    change(tensors)
    save_tensors(folder / "model.safetensors", tensors, {"format": "pt"})


@dataclass(frozen=True)
class Place:
    """A folder with a model, data and a recipe in it.

    Attributes:
        model, train, eval, recipe: what lies in `folder`.
        output: where the recipe's run would go.
    """

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def train(self) -> Path:
        return self.folder / "train.jsonl"

    @property
    def eval(self) -> Path:
        return self.folder / "eval.jsonl"

    @property
    def recipe(self) -> Path:
        return self.folder / "r.yaml"

    @property
    def output(self) -> Path:
        return self.folder / "run"

    def leftovers(self) -> list[str]:
        """What a writer that failed or was stopped would have left, anywhere below."""
        return [path.name for path in self.folder.rglob("*.partial")]


def furnish(folder: Path, base: Path) -> Place:
    """Put a copy of a tiny model, a tokenizer, data and a recipe into `folder`."""
    place = Place(folder)
    shutil.copytree(base, place.model)
    write_tokenizer(place.model)
    write_rows(place.train, 40)
    write_rows(place.eval, 6)
    place.recipe.write_text(
        f"model: {{path: {place.model}}}\n"
        "adapter: {rank: 4, alpha: 8}\n"
        f"data: {{train: {place.train}, eval: {place.eval}, seq_len: 64}}\n"
        "train: {steps: 3, grad_accumulation: 1, lr: 1.0e-2, eval_every: null, save_every: 2, device: cpu}\n"
        f"output: {place.output}\n"
    )
    return place


@pytest.fixture
def place(tmp_path: Path, tiny_model: Callable[..., Path]) -> Place:
    return furnish(tmp_path, tiny_model("llama", torch.bfloat16))


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


Qlora = Callable[..., Ended]


@pytest.fixture
def qlora(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Qlora:
    """`qlora("plan", target)` in this process, through the program's own `main`."""

    def call(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["qlora-kit", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capfd.readouterr()
        assert isinstance(end.value.code, int)
        return Ended(end.value.code, out, err)

    return call


def complaint(ended: Ended, code: int) -> str:
    """The one line of a command that ended as it should for a user's mistake; notes of progress are left out."""
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err
    assert ended.out == ""
    (line,) = [line for line in ended.err.splitlines() if line.startswith("qlora-kit ")]
    return line


# ------------------------------------------------------------------------------------------------ the frozen surface


def command(path: str) -> Any:
    """The click command of `recipes show`."""
    found: Any = typer.main.get_command(cli.app)
    for word in path.split():
        found = found.commands[word]
    return found


@pytest.mark.parametrize("path", CONTRACT)
def test_every_command_of_the_contract_has_its_options_and_its_help(path: str) -> None:
    options = {name for parameter in command(path).params for name in parameter.opts}
    assert set(CONTRACT[path].split()) <= options
    assert len(command(path).help) > 20


@pytest.mark.parametrize(("option", "choice"), MERGE_CHOICES)
def test_every_choice_of_the_contract_is_taken_and_no_other(qlora: Qlora, option: str, choice: str) -> None:
    merge = ["merge", "--model", "./nowhere", "--adapter", "a", "--out", "o"]
    assert "nowhere: no such folder" in complaint(qlora(*merge, option, choice), 4)
    assert qlora(*merge, option, f"{choice}x").code == 2


@pytest.mark.parametrize("arguments", [["fine-tune"], ["train"], ["train", "r.yaml", "--epochs", "3"], ["eval"]])
def test_a_wrong_command_line_ends_with_2_and_points_at_the_help(qlora: Qlora, arguments: list[str]) -> None:
    ended = qlora(*arguments)
    assert ended.code == 2
    assert ended.out == ""
    assert "--help" in ended.err
    assert "Traceback" not in ended.err


def test_the_version_is_printed(qlora: Qlora) -> None:
    assert qlora("--version").out.split()[0] == "qlora-kit"


# ------------------------------------------------------------------------------------------------ plan, recipes, doctor


def test_plan_json_is_one_object_with_the_contracts_keys(qlora: Qlora) -> None:
    ended = qlora("plan", "llama-2-7b", "--gpu", "rtx-4090", "--json")
    plan = json.loads(ended.out)
    assert (ended.code, ended.err, ended.out.count("\n")) == (0, "", 1)
    assert list(plan) == PLAN_KEYS.split()
    assert list(plan["components"]) == COMPONENTS.split()
    assert set(plan["phases"]) == {"load", "train", "eval", "save", "merge"}
    assert all(set(phase) == {"device_bytes", "host_bytes", "disk_bytes"} for phase in plan["phases"].values())
    assert sum(plan["components"].values()) == plan["phases"]["train"]["device_bytes"]


def test_plan_json_that_does_not_fit_is_still_one_object_and_ends_with_6(qlora: Qlora) -> None:
    ended = qlora("plan", "llama-2-7b", "--budget", "1GiB", "--json")
    assert (ended.code, json.loads(ended.out)["fits"]) == (6, False)


def test_a_plan_for_a_data_file_is_one_for_its_longest_row(qlora: Qlora, place: Place) -> None:
    settings = ["--set", "data.packing=false", "--set", "data.seq_len=128"]
    ended = qlora("plan", place.recipe, "--data", place.train, *settings, "--json")
    made = json.loads(ended.out)
    assert (ended.code, ended.out.count("\n"), made["data"]["documents"]) == (0, 1, 40)
    assert made["settings"]["data"]["seq_len"] == made["data"]["longest_row"] < 128
    assert "6 documents" in qlora("plan", place.recipe, "--data", place.eval).out


def test_a_plan_is_also_written_as_html(qlora: Qlora, tmp_path: Path) -> None:
    ended = qlora("plan", "llama-2-7b", "--gpu", "rtx-4090", "--html", tmp_path / "plan.html")
    assert ended.code == 0 and "fits: " in ended.out
    assert "fits: " in (tmp_path / "plan.html").read_text()
    assert "plan.html: cannot write" in complaint(qlora("plan", "gpt2", "--html", "/proc/plan.html"), 5)


def test_plan_names_the_closed_forms_from_a_config_alone(qlora: Qlora) -> None:
    settings = ["--set", "adapter.rank=8", "--set", "adapter.target_modules=[q_proj, v_proj]"]
    assert "4,194,304 of" in qlora("plan", "llama-7b", "--gpu", "rtx-4090", *settings).out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["nosuch.yaml"], 2, "nosuch.yaml: no such recipe"),
        (["llama-2-7b", "--budget", "much"], 2, "--budget: 'much' is not a size"),
        (["llama-2-7b", "--budget", "9" * 400], 2, "is more bytes than"),
        (["llama-2-7b", "--gpu", "rtx-4091"], 2, "rtx-4090"),
        (["llama-2-7b", "--stack", "pfet"], 2, "--stack: one of kit, peft, peft-liger, litgpt, found 'pfet'; did you"),
        (["llama-2-7b", "--set", "adapter.rnak=3"], 2, "did you mean 'adapter.rank'?"),
        (["llama-2-7c"], 4, "llama-2-7c: no such folder, config.json or known model; did you mean 'llama-2-7b'?"),
    ],
)
def test_plan_words_each_mistake(qlora: Qlora, arguments: list[str], code: int, said: str) -> None:
    assert said in complaint(qlora("plan", *arguments), code)


def test_recipes_are_listed_shown_and_copied(qlora: Qlora, tmp_path: Path) -> None:
    listed = json.loads(qlora("recipes", "list", "--json").out)["recipes"]
    assert "quickstart" in [entry["name"] for entry in listed]
    assert "quickstart" in qlora("recipes", "list").out
    assert qlora("recipes").out == qlora("recipes", "list").out
    shown = qlora("recipes", "show", "quickstart").out
    assert qlora("recipes", "copy", "quickstart", tmp_path / "mine.yaml").code == 0
    assert (tmp_path / "mine.yaml").read_text() == shown
    load_recipe(tmp_path / "mine.yaml")


def test_a_recipe_of_the_users_is_never_overwritten(qlora: Qlora, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("mine")
    assert "already exists" in complaint(qlora("recipes", "copy", "quickstart", tmp_path / "mine.yaml"), 2)
    assert (tmp_path / "mine.yaml").read_text() == "mine"


@pytest.mark.parametrize("below", ["file/r.yaml", "x" * 300])
def test_a_copy_that_cannot_be_written_ends_with_5(qlora: Qlora, tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("x")
    ended = qlora("recipes", "copy", "quickstart", tmp_path / below)
    assert ended.code == 5
    assert ended.err.count("\n") == 1
    assert "Traceback" not in ended.err


def test_an_unknown_recipe_name_is_answered_with_the_known_ones(qlora: Qlora) -> None:
    assert "did you mean 'quickstart'?" in complaint(qlora("recipes", "show", "quikstart"), 2)


def test_doctor_json_names_what_is_here_and_what_is_missing(qlora: Qlora) -> None:
    ended = qlora("doctor", "--json")
    report = json.loads(ended.out)
    assert (ended.code, ended.out.count("\n")) == (0, 1)
    assert {"qlora_kit", "python", "packages", "host_bytes", "accelerator", "nf4", "problems"} <= set(report)
    assert report["packages"]["torch"] == torch.__version__
    assert report["nf4"] is True


def test_doctor_for_people_ends_with_a_verdict(qlora: Qlora, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_kit.doctor.MINIMUM_HOST_BYTES", 1 << 60)
    lines = qlora("doctor").out.splitlines()
    assert lines[-1].endswith("problem(s)")
    assert any(line.startswith("problem ") and "of host memory is free" in line for line in lines)


# ------------------------------------------------------------------------------------------------ mistakes


def test_an_unknown_key_ends_with_2_before_anything_is_written(qlora: Qlora, place: Place) -> None:
    place.recipe.write_text(place.recipe.read_text().replace("rank", "rnak"))
    said = complaint(qlora("train", place.recipe), 2)
    assert said == f"qlora-kit train: {place.recipe}:2: unknown key 'adapter.rnak'; did you mean 'adapter.rank'?"
    assert not place.output.exists()


def test_a_missing_recipe_ends_with_2(qlora: Qlora, tmp_path: Path) -> None:
    assert f"{tmp_path / 'r.yaml'}: no such recipe" in complaint(qlora("train", tmp_path / "r.yaml"), 2)


@pytest.mark.parametrize("which", ["train", "eval"])
def test_missing_data_ends_with_3_and_names_the_file(qlora: Qlora, place: Place, which: str) -> None:
    getattr(place, which).unlink()
    assert str(getattr(place, which)) in complaint(qlora("train", place.recipe), 3)
    nothing_half_written(place)


def test_a_wrong_role_in_line_4817_ends_with_3_and_names_file_line_and_field(qlora: Qlora, place: Place) -> None:
    wrong = {"messages": [{"role": "user", "content": "a"}, {"role": "asistant", "content": "b"}]}
    write_rows(place.train, 5000, {4817: wrong})
    said = complaint(qlora("train", place.recipe), 3)
    assert f"{place.train}:4817: messages[1].role: found 'asistant'" in said
    assert "did you mean 'assistant'?" in said
    nothing_half_written(place)


def nothing_half_written(place: Place) -> None:
    """No weights, no partial files; what is in the output folder is whole and does not stand in a next run's way."""
    assert place.leftovers() == []
    assert {path.name for path in place.output.iterdir()} <= {".lock", "recipe.yaml", "plan.json"}
    for path in place.output.glob("*.yaml"):
        load_recipe(path)
    for path in place.output.glob("*.json"):
        json.loads(path.read_text())


def test_a_missing_base_tensor_ends_with_4_and_is_named(qlora: Qlora, place: Place) -> None:
    edit_weights(place.model, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "tensor 'model.layers.1.mlp.up_proj.weight' is missing" in complaint(qlora("train", place.recipe), 4)
    nothing_half_written(place)


def test_a_base_cut_off_ends_with_4_and_names_the_file(qlora: Qlora, place: Place) -> None:
    weights = place.model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert str(weights) in complaint(qlora("eval", "--model", place.model, "--data", place.eval), 4)


def test_a_folder_without_a_model_ends_with_4(qlora: Qlora, place: Place, tmp_path: Path) -> None:
    for model in (tmp_path / "nowhere", tmp_path):
        complaint(qlora("eval", "--model", model, "--data", place.eval), 4)


@pytest.mark.parametrize("name", ["eval", "generate", "merge", "train"])
def test_a_wrong_field_of_the_models_config_ends_with_4_and_is_named(qlora: Qlora, place: Place, name: str) -> None:
    config = json.loads((place.model / "config.json").read_text())
    (place.model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": "two"}))
    options = {"eval": ["--data", place.eval], "generate": ["--prompt", "a"], "merge": ["--adapter", "a", "--out", "o"]}
    arguments = [place.recipe] if name == "train" else ["--model", place.model, *options[name]]
    said = complaint(qlora(name, *arguments), 4)
    assert f"{place.model / 'config.json'}: config field 'num_hidden_layers': expected an integer" in said


def test_what_does_not_fit_ends_with_6_before_anything_is_written(qlora: Qlora, place: Place) -> None:
    ended = qlora("train", place.recipe, "--set", "memory.budget=100KiB")
    assert "does not fit: " in complaint(ended, 6)
    assert "100.0 KiB allowed" in ended.err
    assert not place.output.exists()


def test_what_would_fit_is_said_with_what_does_not(qlora: Qlora, place: Place) -> None:
    recipe = ["--set", "model.path=llama-2-7b", "--set", "train.device=cuda", "--set", "memory.budget=4.5GiB"]
    recipe += ["--set", "memory.placement=device"]
    ended = qlora("train", place.recipe, *recipe, "--set", "data.seq_len=4096")
    assert ended.code == 6
    assert "\n  --set memory.placement=auto" in ended.err
    assert "\n  --set data.seq_len=" in ended.err


@pytest.mark.parametrize("name", ["adapter", "checkpoints", "metrics.jsonl"])
def test_an_output_that_holds_a_run_ends_with_2_and_is_left_alone(qlora: Qlora, place: Place, name: str) -> None:
    (place.output / name).mkdir(parents=True)
    said = complaint(qlora("train", place.recipe), 2)
    assert f"{place.output} already holds a run" in said
    assert "--resume" in said
    assert (place.output / name).is_dir()


def test_a_locked_run_folder_ends_with_9_and_names_the_holder(qlora: Qlora, place: Place) -> None:
    with files.lock(place.output):
        assert f"locked by process {os.getpid()}" in complaint(qlora("train", place.recipe), 9)
    assert [path.name for path in place.output.iterdir()] == [".lock"]


def test_nothing_to_resume_ends_with_8(qlora: Qlora, place: Place) -> None:
    assert "no usable checkpoint" in complaint(qlora("train", place.recipe, "--resume"), 8)


def test_an_output_that_is_a_file_ends_with_5(qlora: Qlora, place: Place) -> None:
    place.output.write_text("mine")
    complaint(qlora("train", place.recipe), 5)
    assert place.output.read_text() == "mine"


def test_a_base_of_infinities_ends_with_7(qlora: Qlora, place: Place) -> None:
    edit_weights(place.model, lambda tensors: tensors["model.norm.weight"].fill_(float("inf")))
    complaint(qlora("eval", "--model", place.model, "--data", place.eval), 7)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--format", "csv"], "--format: "),
        (["--seq-len", "0"], "--seq-len: "),
        (["--learn", "some"], "--learn: "),
        (["--quantization", "int8"], "--quantization: auto, nf4, fp4 or none, found 'int8'"),
    ],
)
def test_a_wrong_option_of_eval_ends_with_2_and_is_named(
    qlora: Qlora, place: Place, options: list[str], said: str
) -> None:
    assert said in complaint(qlora("eval", "--model", place.model, "--data", place.eval, *options), 2)


def test_a_keyboard_interrupt_ends_with_130(qlora: Qlora, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qlora_kit.prepared.prepared_recipes", interrupt)
    ended = qlora("recipes", "list")
    assert ended.code == 130
    assert "Traceback" not in ended.err


# ------------------------------------------------------------------------------------------------ a run, end to end


@dataclass(frozen=True)
class Story:
    """What a run from end to end left: its folder, and how each of its processes ended."""

    place: Place
    ended: dict[str, Ended]

    @property
    def adapter(self) -> Path:
        return self.place.output / "adapter"

    @property
    def trained(self) -> list[object]:
        """The options that name the trained model."""
        return ["--model", self.place.model, "--adapter", self.adapter]


def process(*arguments: object) -> Ended:
    """`python -m qlora_kit ...` in a process of its own."""
    command = [sys.executable, "-m", "qlora_kit", *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return Ended(run.returncode, run.stdout, run.stderr)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Story:
    place = furnish(tmp_path_factory.mktemp("story"), tiny_model("llama", torch.bfloat16))
    made = Story(place, {"train": process("train", place.recipe)})
    merged = ["--out", place.output / "merged", "--verify", place.eval, "--json"]
    made.ended["merge"] = process("merge", *made.trained, *merged)
    return made


@pytest.mark.parametrize("name", ["train", "merge"])
def test_each_process_of_the_story_ends_well(story: Story, name: str) -> None:
    assert story.ended[name].code == 0, story.ended[name].err
    assert "Traceback" not in story.ended[name].err
    assert story.place.leftovers() == []


def test_a_runs_folder_holds_what_the_contract_says(story: Story) -> None:
    output = story.place.output
    assert {"recipe.yaml", "plan.json", "metrics.jsonl", "memory.json"} <= {path.name for path in output.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in story.adapter.iterdir()}
    assert sorted(path.name for path in (output / "checkpoints").iterdir()) == ["step-000002", "step-000003"]
    assert all((path / "MANIFEST.json").is_file() for path in (output / "checkpoints").iterdir())
    assert list(json.loads((output / "plan.json").read_text())) == PLAN_KEYS.split()
    users_own = {"budget", "loss_chunk_tokens", "mlp_tile_tokens", "on_oom"}
    decided = json.loads((output / "plan.json").read_text())["settings"]["memory"]  # what `auto` came to
    as_run = [f"memory.{key}={json.dumps(decided[key])}" for key in decided.keys() - users_own]
    assert load_recipe(output / "recipe.yaml") == load_recipe(story.place.recipe, as_run)


def test_the_metrics_have_the_contracts_keys_one_line_a_step(story: Story) -> None:
    lines = [json.loads(line) for line in (story.place.output / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "eval_loss" not in line]
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert all(set(STEP_KEYS.split()) <= set(line) for line in steps)
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 3]


def test_three_steps_lower_the_held_out_loss_and_eval_finds_the_same(qlora: Qlora, story: Story) -> None:
    lines = [json.loads(line) for line in (story.place.output / "metrics.jsonl").read_text().splitlines()]
    first, last = [line["eval_loss"] for line in lines if "eval_loss" in line]
    ended = qlora("eval", *story.trained, "--data", story.place.eval, "--json")
    evaluated = json.loads(ended.out)
    assert (ended.code, ended.out.count("\n")) == (0, 1)
    assert last < first - 0.02
    assert evaluated["loss"] == pytest.approx(last, abs=0.01)
    assert evaluated["perplexity"] == pytest.approx(math.exp(evaluated["loss"]))


def test_json_stands_alone_on_stdout_and_words_go_to_stderr(story: Story) -> None:
    assert story.ended["merge"].out.count("\n") == 1
    assert isinstance(json.loads(story.ended["merge"].out), dict)
    assert f"{story.place.train}: 40 rows" in story.ended["train"].err
    assert "rows" not in story.ended["train"].out


def test_a_runs_memory_is_planned_beside_measured_component_by_component(story: Story) -> None:
    memory = json.loads((story.place.output / "memory.json").read_text())
    planned, measured = memory["planned"]["components"], memory["measured"]["components"]
    assert list(planned) == COMPONENTS.split()
    static = ("base_nf4", "quant_constants", "base_unquantized", "adapter", "optimizer")
    assert {name: measured[name] for name in static} == {name: planned[name] for name in static}
    assert memory["measured"]["peak_bytes"] > 0


def test_a_profile_measures_what_was_planned_and_saves_nothing_but_its_report(qlora: Qlora, place: Place) -> None:
    ended = qlora("profile", place.recipe, "--steps", 1, "--json", "--out", place.folder / "p")
    assert (ended.code, ended.out.count("\n")) == (0, 1), ended.err
    said = json.loads(ended.out)
    for side in ("planned", "measured"):
        assert list(said[side]["components"]) == COMPONENTS.split()
        assert said[side]["peak_bytes"] >= sum(said[side]["components"].values()) > 0
    for name in ("base_nf4", "quant_constants", "base_unquantized", "adapter", "optimizer"):
        assert said["measured"]["components"][name] == said["planned"]["components"][name]
    assert said["tokens_per_s"] > 0
    assert {path.name for path in (place.folder / "p").iterdir()} == {"report.html", "timeline.png"}
    assert not place.output.exists()


def test_a_profile_for_people_ends_with_the_table(qlora: Qlora, place: Place) -> None:
    ended = qlora("profile", place.recipe, "--steps", 1)
    assert ended.code == 0, ended.err
    assert ended.out.splitlines()[-1].split()[0] == "total"
    assert "tokens/s on cpu" in ended.out


def test_a_plan_is_simulated_beside_itself(qlora: Qlora, place: Place) -> None:
    ended = qlora("plan", place.recipe, "--simulate", "--json")
    said = json.loads(ended.out)
    assert (ended.code, list(said)) == (0, [*PLAN_KEYS.split(), "simulated"])
    assert said["simulated"]["fits"] is True
    assert set(said["simulated"]["phases"]) == {"train", "eval"}
    assert said["simulated"]["components"]["base_nf4"] == said["components"]["base_nf4"]
    assert "it runs; the peak of a step is in: " in qlora("plan", place.recipe, "--simulate").out


def test_a_simulation_that_runs_out_of_memory_ends_with_6(qlora: Qlora, place: Place) -> None:
    ended = qlora("plan", place.recipe, "--simulate", "--budget", "400KiB")
    assert ended.code == 6
    assert "OUT OF MEMORY in: " in ended.out


def test_the_end_of_training_says_loss_memory_and_what_comes_next(story: Story) -> None:
    said = story.ended["train"].out
    assert "held-out loss" in said
    assert "MiB measured, " in said and "  base_nf4 " in said
    assert str(story.adapter) in said
    assert f"qlora-kit merge --model {story.place.model}" in said


def test_generate_prints_the_answer_alone(qlora: Qlora, story: Story) -> None:
    ended = qlora("generate", *story.trained, "--prompt", "1 + 1 ?", "--max-new-tokens", 4)
    assert ended.code == 0, ended.err
    assert ended.out.endswith("\n")
    assert len(ended.out) <= 5


def test_generate_answers_each_prompt_with_each_adapter(qlora: Qlora, story: Story, tmp_path: Path) -> None:
    short, other = ["--max-new-tokens", 4], tmp_path / "other"
    shutil.copytree(story.adapter, other)
    weights = Shards([other / "adapter_model.safetensors"])
    turned = {name: weights.read(name) * (-1 if "lora_B" in name else 1) for name in weights.entries}
    save_tensors(other / "adapter_model.safetensors", turned, {"format": "pt"})
    prompts = ["1 + 1 ?", "2 + 3 ?"]
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    ended = qlora("generate", *story.trained, "--adapter", other, *asked, *short)
    assert ended.code == 0, ended.err
    expected = []
    for prompt in prompts:
        for adapter in (story.adapter, other):
            alone = qlora("generate", "--model", story.place.model, "--adapter", adapter, "--prompt", prompt, *short)
            expected.append(f"== {adapter}: {prompt}\n{alone.out}")
    assert ended.out == "\n".join(expected)


@pytest.mark.parametrize("placement", ["device", "disk"])
def test_eval_and_generate_give_the_same_wherever_the_blocks_live(
    placement: str, qlora: Qlora, story: Story, tmp_path: Path
) -> None:
    nf4 = tmp_path / "nf4"
    assert qlora("quantize", "--model", story.place.model, "--out", nf4).code == 0
    model = ["--model", nf4, "--adapter", story.adapter, "--placement", placement]
    loss = json.loads(qlora("eval", *model, "--data", story.place.eval, "--json").out)["loss"]
    assert loss == json.loads(qlora("eval", *story.trained, "--data", story.place.eval, "--json").out)["loss"]
    said = qlora("generate", *model, "--prompt", "1 + 1 ?", "--max-new-tokens", 4).out
    assert said == qlora("generate", *story.trained, "--prompt", "1 + 1 ?", "--max-new-tokens", 4).out


def test_the_merged_model_answers_as_the_adapter_model_does(qlora: Qlora, story: Story) -> None:
    data = ["--data", story.place.eval, "--json"]
    merged = json.loads(qlora("eval", "--model", story.place.output / "merged", *data).out)
    assert merged["loss"] == pytest.approx(json.loads(qlora("eval", *story.trained, *data).out)["loss"], abs=0.01)


def test_the_merged_model_is_proved_and_is_whole(story: Story) -> None:
    report, merged = json.loads(story.ended["merge"].out), story.place.output / "merged"
    assert report["proof"]["passed"] is True
    assert (report["dtype"], report["merged_tensors"]) == ("float16", 14)
    assert {"config.json", "model.safetensors", "merge_report.json", "tokenizer.json"} <= {
        path.name for path in merged.iterdir()
    }
    assert {entry.dtype for entry in Shards([merged / "model.safetensors"]).entries.values()} == {torch.float16}


def test_the_same_merge_again_finds_it_whole(qlora: Qlora, story: Story) -> None:
    merged = story.place.output / "merged"
    before = (merged / "model.safetensors").stat()
    assert qlora("merge", *story.trained, "--out", merged).code == 0
    assert (merged / "model.safetensors").stat() == before


def test_a_merge_onto_what_is_not_one_ends_with_5_and_leaves_it(qlora: Qlora, story: Story, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "already exists" in complaint(qlora("merge", *story.trained, "--out", tmp_path), 5)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_data_that_is_to_prove_a_merge_is_read_before_the_merge(qlora: Qlora, story: Story, tmp_path: Path) -> None:
    arguments = ["merge", *story.trained, "--out", tmp_path / "out", "--verify", tmp_path / "nosuch.jsonl"]
    assert "nosuch.jsonl: no such data file" in complaint(qlora(*arguments), 3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["eval", "generate", "merge"])
def test_an_adapter_of_another_base_ends_with_4_and_writes_nothing(
    qlora: Qlora, story: Story, place: Place, name: str
) -> None:
    edit_weights(place.model, lambda tensors: tensors["model.norm.weight"].add_(1))
    options = {"eval": ["--data", place.eval], "generate": ["--prompt", "a"], "merge": ["--out", place.folder / "out"]}
    said = complaint(qlora(name, "--model", place.model, "--adapter", story.adapter, *options[name]), 4)
    assert "trained on base" in said
    assert "--any-base" in said
    assert not (place.folder / "out").exists()


def test_a_folder_that_is_no_adapter_ends_with_4(qlora: Qlora, place: Place) -> None:
    arguments = ["eval", "--model", place.model, "--adapter", place.model, "--data", place.eval]
    assert "this is not an adapter folder" in complaint(qlora(*arguments), 4)


@pytest.mark.parametrize(("key", "value"), [("dtype", "float8"), ("quantization", "int3")])
def test_a_record_of_nonsense_beside_an_adapter_ends_with_4_and_is_named(
    qlora: Qlora, story: Story, place: Place, key: str, value: str
) -> None:
    adapter = shutil.copytree(story.adapter, place.folder / "adapter")
    record = json.loads((adapter / "qlora_kit.json").read_text())
    (adapter / "qlora_kit.json").write_text(json.dumps(record | {key: value}))
    said = complaint(qlora("eval", "--model", place.model, "--adapter", adapter, "--data", place.eval), 4)
    assert f"{adapter / 'qlora_kit.json'}: {key}: " in said


def test_sigterm_saves_the_state_and_ends_with_143(place: Place) -> None:
    endless = ["--set", "train.steps=100000", "--set", "train.save_every=null", "--set", "data.eval=null"]
    command = [sys.executable, "-m", "qlora_kit", "train", str(place.recipe), *endless]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    metrics, deadline = place.output / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.is_file() and metrics.stat().st_size) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 143, err
    assert "continue with --resume" in err
    assert len(list((place.output / "checkpoints").glob("step-*/MANIFEST.json"))) == 1
    assert place.leftovers() == []
