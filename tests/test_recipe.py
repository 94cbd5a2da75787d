"""Claims about recipes: what is read, what each default is, and how every mistake is worded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from qlora_kit import recipe as module
from qlora_kit.errors import RecipeError
from qlora_kit.recipe import Recipe, known_keys, load_recipe, recipe_for_model
from qlora_kit.recipe_yaml import RECIPE_BYTES_LIMIT

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
SMALLEST = "model: {path: m}\ndata: {train: t.jsonl}\n"

# The contract: every key, and its default unless the value stands in USERS_OWN. Adding a key is free; changing a line
# here is a decision that CHANGELOG.md records.
CONTRACT = """
model:
  path: HuggingFaceTB/SmolLM2-135M-Instruct
  revision: null
  quantization: nf4
  double_quant: true
adapter:
  method: lora
  rank: 16
  alpha: 32
  dropout: 0.0
  target_modules: all-linear
  dtype: bfloat16
  init: gaussian
data:
  train: data/train.jsonl
  eval: data/eval.jsonl
  format: auto
  seq_len: 1024
  packing: true
  learn: completion
memory:
  budget: auto
  placement: auto
  gradient_checkpointing: true
  activation_offload: false
  loss_chunk_tokens: auto
train:
  steps: 200
  micro_batch: 1
  grad_accumulation: 8
  optimizer: paged_adamw_8bit
  lr: 2.0e-4
  schedule: cosine
  warmup: 0.03
  weight_decay: 0.0
  max_grad_norm: 1.0
  eval_every: 50
  save_every: 50
  keep_checkpoints: 2
  seed: 0
  device: auto
output: runs/smollm2-gsm8k
"""
USERS_OWN = {"model.path", "data.train", "data.eval", "train.steps", "output"}
ADDED = {  # later than the contract
    *("memory.resident_blocks", "memory.embeddings", "memory.keep_dequantized", "memory.micro_batches_together"),
    *("memory.host_blocks", "memory.mlp_tile_tokens", "memory.on_oom", "adapter.start_from"),
    "adapter.modules_to_save",
    *("model.dtype", "model.keep_quantized", "train.epochs", "train.trackers", "train.master_weights"),
}
CHOICES = [
    *[("model.quantization", value) for value in ("nf4", "fp4", "none")],
    *[("adapter.target_modules", value) for value in ("all-linear", "[q_proj, v_proj]", "'.*_proj'")],
    *[("data.eval", value) for value in ("data/eval.jsonl", "0.02", "null")],
    *[("data.format", value) for value in ("auto", "chat", "alpaca", "completion", "text")],
    *[("data.learn", value) for value in ("completion", "all")],
    *[("memory.budget", value) for value in ("auto", "24GiB", "1000")],
    *[("memory.placement", value) for value in ("auto", "device", "host", "disk")],
    *[("memory.embeddings", value) for value in ("auto", "device", "host", "disk")],
    *[("memory.gradient_checkpointing", value) for value in ("true", "false", "auto", "0", "12")],
    *[("memory.activation_offload", value) for value in ("false", "true", "host", "disk")],
    *[("memory.keep_dequantized", value) for value in ("auto", "true", "false")],
    *[("memory.mlp_tile_tokens", value) for value in ("auto", "full", "512")],
    *[("memory.micro_batches_together", value) for value in ("auto", "1", "8")],
    *[("memory.loss_chunk_tokens", value) for value in ("auto", "full", "512")],
    *[("memory.on_oom", value) for value in ("fail", "split")],
    *[("train.optimizer", value) for value in ("paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw")],
    *[("train.master_weights", value) for value in ("true", "false")],
    *[("train.schedule", value) for value in ("cosine", "linear", "constant")],
    *[("train.device", value) for value in ("auto", "cpu", "cuda", "xpu", "mps")],
    *[(key, "null") for key in ("train.max_grad_norm", "train.eval_every", "train.save_every")],
]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load(tmp_path: Path, text: str = SMALLEST, *overrides: str) -> Recipe:
    return load_recipe(write(tmp_path, text), overrides)


def complaint(tmp_path: Path, text: str, *overrides: str) -> str:
    """What is said of a recipe, without its folder."""
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value).replace(f"{tmp_path}/", "")


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for key, value in values.items():
        pairs |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return pairs


# ------------------------------------------------------------------------------------------------ what is there


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_prepared_recipe_loads_and_begins_with_what_it_is_for(path: Path) -> None:
    assert load_recipe(path).model.path
    assert re.match(r"# \w.{20,}", path.read_text())


def test_every_key_of_the_contract_exists_and_no_other_but_those_noted() -> None:
    assert set(known_keys()) == set(flat(yaml.safe_load(CONTRACT))) | ADDED


def test_every_default_is_the_contracts(tmp_path: Path) -> None:
    defaults, contract = flat(load(tmp_path).model_dump()), flat(yaml.safe_load(CONTRACT))
    assert {key: defaults[key] for key in contract if key not in USERS_OWN} == {
        key: value for key, value in contract.items() if key not in USERS_OWN
    }


@pytest.mark.parametrize(("key", "value"), CHOICES)
def test_every_choice_of_the_contract_is_taken(tmp_path: Path, key: str, value: str) -> None:
    load(tmp_path, SMALLEST, f"{key}={value}")


def test_the_contracts_recipe_loads_as_it_is_written(tmp_path: Path) -> None:
    loaded = flat(load(tmp_path, CONTRACT).model_dump())
    assert {key: loaded[key] for key in loaded if key not in ADDED} == flat(yaml.safe_load(CONTRACT))


def test_the_branch_is_scaled_by_alpha_over_rank(tmp_path: Path) -> None:
    assert load(tmp_path, SMALLEST, "adapter.rank=8", "adapter.alpha=32").adapter.scale == 4


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "+1e-4", ".1e-3", "1.0e-4", "0.0001"])
def test_a_number_with_an_exponent_is_a_number(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, f"{SMALLEST}train: {{lr: {text}}}").train.lr == 1e-4


def test_sizes_are_read_in_their_units(tmp_path: Path) -> None:
    assert load(tmp_path, f"{SMALLEST}memory: {{budget: 22.5GiB}}").memory.budget == 45 * 2**29


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("adapter:\n  rnak: 3\n", "r.yaml:4: unknown key 'adapter.rnak'; did you mean 'adapter.rank'?"),
        ("outptu: x\n", "r.yaml:3: unknown key 'outptu'; did you mean 'output'?"),
        ("lora: {rank: 3}\n", "r.yaml:3: unknown key 'lora'"),
        ("adapter:\n  rank: 3\n  rank: 4\n", "r.yaml:5: key 'adapter.rank' is given twice (first in line 4)"),
        ("output: a\noutput: b\n", "r.yaml:4: key 'output' is given twice (first in line 3)"),
        ("adapter: &a\n  rank: 3\ntrain: *a\n", "r.yaml:5: not valid YAML: aliases are not supported in recipes"),
        ("adapter: [rank\n", "r.yaml:4: not valid YAML: "),
        ("adapter:\n\trank: 3\n", "r.yaml:4: not valid YAML: found character '\\t' that cannot start any token"),
        ("output: !!python/object/apply:os.system [x]\n", "r.yaml:3: not valid YAML: could not determine a construc"),
        ("adapter: {rank: many}\n", "r.yaml:3: adapter.rank: input should be a valid integer, unable to parse"),
        ("adapter:\n  rank: 0\n", "r.yaml:4: adapter.rank: input should be greater than 0, found 0"),
        ("adapter:\n  rank: 1.5\n", "r.yaml:4: adapter.rank: input should be a valid integer, got a number with"),
        ("adapter:\n  rank: yes\n", "r.yaml:4: adapter.rank: takes no true or false (yes, no, on, off), found True"),
        ("adapter: lora\n", "r.yaml:3: adapter: a section with keys of its own expected, found 'lora'"),
        ("adapter:\n", "r.yaml:3: adapter: a section with keys of its own expected, found None"),
        ("train:\n  lr: .nan\n", "r.yaml:4: train.lr: input should be a finite number, found nan"),
        ("train: {optimizer: adamv}\n", "r.yaml:3: train.optimizer: one of paged_adamw_8bit, paged_adamw_32bit, ad"),
        ("train:\n  steps: 3\n  epochs: 1\n", "r.yaml:3: train: give steps or epochs, not both"),
        ("train: {keep_checkpoints: 1}\n", "r.yaml:3: train.keep_checkpoints: input should be greater than or eq"),
        ("memory: {budget: 24 apples}\n", "r.yaml:3: memory.budget: '24 apples' is not a size; write it like 24Gi"),
        ("memory: {placement: gpu}\n", "r.yaml:3: memory.placement: input should be 'auto', 'device', 'host' or '"),
        ("memory: {loss_chunk_tokens: 0}\n", "r.yaml:3: memory.loss_chunk_tokens: auto, full or a positive number"),
        ("adapter: {target_modules: [q, 3]}\n", "r.yaml:3: adapter.target_modules: input should be a valid string,"),
        ("output: 2024-99-99\n", "r.yaml: not valid YAML: month must be in 1..12"),
        ("output: m/runs\n", "r.yaml: output 'm/runs' lies in the base model's folder 'm'"),
        ("output: ./x/../m\n", "r.yaml: output './x/../m' lies in the base model's folder 'm'"),
    ],
)
def test_a_mistake_is_one_line_with_file_line_and_key(tmp_path: Path, text: str, said: str) -> None:
    found = complaint(tmp_path, SMALLEST + text)
    assert found.startswith(said)
    assert "\n" not in found


@pytest.mark.parametrize("eval", [0, 1, 2.5, -0.1, "[a]", "true"])
def test_a_fraction_that_is_none_is_refused_in_its_line(tmp_path: Path, eval: object) -> None:
    found = complaint(tmp_path, f"model: {{path: m}}\ndata:\n  train: t\n  eval: {eval}\n")
    assert re.match(r"r.yaml:4: data.eval: [^\n]+, found [^\n]+$", found)


def test_several_mistakes_are_told_at_once_one_line_each(tmp_path: Path) -> None:
    found = complaint(tmp_path, "model: {}\ndata: {train: t, sequence: 3}\nadapter: {rank: x}\n").splitlines()
    assert [line.split(":")[1] for line in found] == ["1", "3", "2"]


@pytest.mark.parametrize("text", ["", "# nothing\n"])
def test_an_empty_recipe_is_told_what_it_lacks(tmp_path: Path, text: str) -> None:
    assert complaint(tmp_path, text) == "r.yaml: key 'model' is missing\nr.yaml: key 'data' is missing"


@pytest.mark.parametrize("text", ["- a\n", "words\n", "3\n"])
def test_a_recipe_is_a_mapping(tmp_path: Path, text: str) -> None:
    assert complaint(tmp_path, text).startswith("r.yaml:1: a recipe is a mapping of sections, found ")


@pytest.mark.parametrize("text", ["[" * 5000, "a: " + "9" * 5000, "\0", "a: 1\n---\nb: 2\n", "? [1]\n: 2\n"])
def test_hostile_yaml_is_an_error_of_the_recipe(tmp_path: Path, text: str) -> None:
    assert complaint(tmp_path, text).startswith("r.yaml")


def test_a_file_that_is_no_recipe_is_refused_by_its_size_before_it_is_read(tmp_path: Path) -> None:
    assert "larger than 1048576 bytes" in complaint(tmp_path, SMALLEST + "#" * RECIPE_BYTES_LIMIT)
    load(tmp_path, SMALLEST + "#" * (RECIPE_BYTES_LIMIT - len(SMALLEST)))


def test_a_missing_folder_or_undecodable_recipe_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"output: caf\xe9\n")
    for name, said in (("gone.yaml", "no such recipe"), (".", "cannot read"), ("latin.yaml", "cannot read")):
        with pytest.raises(RecipeError, match=said):
            load_recipe(tmp_path / name)


# ------------------------------------------------------------------------------------------------ --set


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("adapter.rank=32", 32),
        (" adapter.rank =32", 32),
        ("train.lr=1e-4", 1e-4),
        ("data.packing=false", False),
        ("data.eval=0.02", 0.02),
        ("data.eval=e.jsonl", "e.jsonl"),
        ("train.max_grad_norm=null", None),
        ("train.eval_every=", None),
        ("adapter.target_modules=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("model.path=a=b", "a=b"),
        ("memory.budget=24GiB", 24 * 2**30),
    ],
)
def test_set_takes_dotted_keys_and_typed_values(tmp_path: Path, override: str, value: object) -> None:
    key = override.partition("=")[0].strip()
    assert flat(load(tmp_path, SMALLEST, override).model_dump())[key] == value


def test_set_goes_before_the_file_and_the_last_one_wins(tmp_path: Path) -> None:
    text = f"{SMALLEST}adapter: {{rank: 4, alpha: 8}}"
    adapter = load(tmp_path, text, "adapter.rank=5", "adapter.rank=6").adapter
    assert (adapter.rank, adapter.alpha) == (6, 8)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("adapter.rnak=3", "--set adapter.rnak: unknown key 'adapter.rnak'; did you mean 'adapter.rank'?"),
        ("adapter.rank=x", "--set adapter.rank: input should be a valid integer"),
        ("adapter.rank.deep=3", "--set adapter.rank: input should be a valid integer"),
        ("output.deep=3", "--set output: input should be a valid string"),
        ("adapter=5", "--set adapter: a section with keys of its own expected, found 5"),
        ("data.eval=2.0", "--set data.eval: a fraction lies between 0 and 1, found 2.0"),
        ("memory.loss_chunk_tokens=all", "--set memory.loss_chunk_tokens: auto, full or a positive number of tokens"),
        ("adapter.rank", "--set 'adapter.rank': expected key=value, such as adapter.rank=32"),
        ("=3", "--set '=3': expected key=value"),
        ("data.train=[", "--set 'data.train=[': the value is not valid YAML"),
        ("output=2024-99-99", "--set 'output=2024-99-99': the value is not valid YAML"),
        ("output=" + "[" * 5000, "--set 'output=[[["),
        ("output=*a", "--set 'output=*a': the value is not valid YAML"),
    ],
)
def test_a_wrong_option_is_named_as_it_was_given(tmp_path: Path, override: str, said: str) -> None:
    assert complaint(tmp_path, SMALLEST, override).startswith(said)


def test_set_below_a_value_of_the_file_is_refused(tmp_path: Path) -> None:
    found = complaint(tmp_path, f"{SMALLEST}adapter: {{rank: 4}}\n", "adapter.rank.x=3")
    assert found == "--set 'adapter.rank.x=3': 'rank' is not a section"


# ------------------------------------------------------------------------------------------------ writing, bare models


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.lr=1e-5", "train.epochs=2", "memory.budget=24GiB", "data.eval=0.02"),
        ("adapter.target_modules=[q_proj, v_proj]", "train.max_grad_norm=null", "train.trackers=[tensorboard]"),
        ('model.revision="12e4567"', 'output="1e5"', 'data.train="null"', "model.path='a: #b'"),
        ("output=ünï/" + "long " * 60,),
    ],
)
def test_a_recipe_reads_back_as_it_was_written(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    first = load(tmp_path, SMALLEST, *overrides)
    again = load(tmp_path, first.to_yaml())
    assert again == first
    assert set(known_keys()) == set(flat(yaml.safe_load(again.to_yaml())))


def test_a_recipe_cannot_be_changed_once_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(tmp_path).adapter.rank = 3  # type: ignore[misc]


def test_a_bare_model_has_the_defaults(tmp_path: Path) -> None:
    assert recipe_for_model("llama-2-7b", ["adapter.rank=8"]).adapter.rank == 8
    assert recipe_for_model("llama-2-7b").train == load(tmp_path).train


def test_planning_the_model_folder_that_one_stands_in_is_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tmp_path not in Path(recipe_for_model(".").output).parents


def test_every_section_says_what_it_is() -> None:
    sections = [module.Model, module.Adapter, module.Data, module.Memory, module.Train]
    assert all(section.__doc__ for section in sections)
