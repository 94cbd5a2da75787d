"""The commands that use a model: eval, generate, chat, merge, quantize. Each imports only what it needs.

Results go to stdout, progress and notes to stderr, as for all commands. Imported by: cli.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora_kit.commands import (
    held_out_rows,
    load_model,
    merge_proved,
    model_folder,
    section,
    tokenizer_of,
    warn_of_other_quantization,
)
from qlora_kit.options import (
    Adapters,
    AnyBase,
    AsJson,
    DType,
    MergeOnto,
    ModelPath,
    NewTokens,
    PlacementOption,
    Quantization,
    QuantType,
    Seed,
    SystemTurn,
    Temperature,
    TopK,
    TopP,
    print_json,
)

if TYPE_CHECKING:
    from qlora_kit.base.loader import Base
    from qlora_kit.generation import Sampling


def evaluate(
    model: ModelPath,
    data: Annotated[Path, typer.Option(help="Held-out examples, jsonl.")],
    adapter: Annotated[str | None, typer.Option(help="Adapter folder.")] = None,
    format: Annotated[str, typer.Option(help="auto | chat | alpaca | completion | text")] = "auto",
    learn: Annotated[str, typer.Option(help="completion | all: which tokens count.")] = "completion",
    seq_len: Annotated[int, typer.Option(help="Longest example, in tokens.")] = 2048,
    quantization: Quantization = "auto",
    placement: PlacementOption = "auto",
    any_base: AnyBase = False,
    as_json: AsJson = False,
) -> None:
    """Loss, perplexity and number of learned tokens on held-out data.

    Example: `qlora-kit eval --model models/m --adapter runs/r/adapter --data data/eval.jsonl`
    """
    from qlora_kit.data.batches import eval_batches
    from qlora_kit.data.tokenize import load_examples
    from qlora_kit.planning.components import AUTO_LOSS_CHUNK_TOKENS
    from qlora_kit.recipe import Data
    from qlora_kit.training.evaluate import evaluate as run_evaluation

    settings = section(Data, train=str(data), format=format, learn=learn, seq_len=seq_len)
    adapters = [adapter] if adapter else []
    examples, _ = load_examples(data, settings, tokenizer_of(model_folder(model), adapters))
    batches = eval_batches(examples, micro_batch=1, seq_len=seq_len, packing=True, pad_id=0)
    base = load_model(model, adapters, quantization, any_base, placement)
    warn_of_other_quantization(base, adapters)
    evaluation = run_evaluation(base, batches, AUTO_LOSS_CHUNK_TOKENS)
    if as_json:
        print_json(evaluation.to_json())
    else:
        print(f"loss {evaluation.loss:.4f}  perplexity {evaluation.perplexity:.3f}  tokens {evaluation.tokens:,}")


def generate(
    model: ModelPath,
    prompt: Annotated[
        list[str], typer.Option(help="What the user says; rendered with the model's chat template. May be repeated.")
    ],
    adapter: Annotated[
        list[str] | None, typer.Option(help="Adapter folder; of several each answers, side by side in one batch.")
    ] = None,
    system: SystemTurn = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as plain text, without a template.")] = False,
    max_new_tokens: NewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    quantization: Quantization = "auto",
    placement: PlacementOption = "auto",
    any_base: AnyBase = False,
) -> None:
    """Text from a base, a base with adapters, or a merged model, shown as it is made.

    Each prompt is answered by each adapter. With `--placement host` or `disk` the model need not fit on the device: its
    blocks pass once for every token. To add adapters up, `qlora-kit adapter compose --method cat` makes one of them.

    Example: `qlora-kit generate --model models/m --adapter runs/r/adapter --prompt "Why is the sky blue?"`

    Example: `qlora-kit generate --model models/m --adapter runs/a/adapter --adapter runs/b/adapter --prompt "Hello"`
    """
    import torch

    from qlora_kit.base.loader import held_weights
    from qlora_kit.chat import say
    from qlora_kit.generation import Sampling, answer

    folders = list(adapter or [])
    tokenizer = tokenizer_of(model_folder(model), folders)
    base = load_model(model, folders, quantization, any_base, placement, add_up=False)
    warn_of_other_quantization(base, folders)
    messages = [{"role": "system", "content": system}] if system else []
    asked = [text if raw else [*messages, {"role": "user", "content": text}] for text in prompt]
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    if len(asked) > 1 or len(folders) > 1:
        answers = _side_by_side(base, tokenizer, asked, len(folders), sampling)
        print("\n\n".join(_titled(prompt, folders, answers)))
        return
    torch.manual_seed(seed)
    with held_weights(base):
        answer(base, tokenizer, asked[0], sampling, say)
    say("\n")


def _side_by_side(base: Base, tokenizer: Any, asked: list[Any], adapters: int, sampling: Sampling) -> list[list[str]]:
    """For each prompt the answer of each adapter, or of the base if there is none; rows of an adapter stay together."""
    from qlora_kit.generation import generate

    names = [f"adapter-{index}" for index in range(adapters) for _ in asked]
    of_rows = names if adapters > 1 else None  # a single one is active, whatever it changes
    answers = list(generate(base, tokenizer, asked * max(adapters, 1), sampling, adapters=of_rows))
    return [answers[index :: len(asked)] for index in range(len(asked))]


def _titled(prompts: list[str], folders: list[str], answers: list[list[str]]) -> Iterator[str]:
    """Each answer under a line that says what was asked, and which adapter answered, as far as there are several."""
    for prompt, of_prompt in zip(prompts, answers):
        for folder, text in zip(folders or [""], of_prompt):
            said = [*([folder] if len(folders) > 1 else []), *([prompt] if len(prompts) > 1 else [])]
            yield f"== {': '.join(said)}\n{text}"


def chat(
    model: ModelPath,
    adapter: Adapters = None,
    system: SystemTurn = None,
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = 0,
    quantization: Quantization = "auto",
    placement: PlacementOption = "auto",
    any_base: AnyBase = False,
) -> None:
    """A conversation with a base, a base with adapters, or a merged model; from a pipe, one line is one turn.

    `/reset` forgets the conversation, `/exit` or Ctrl-D ends it, Ctrl-C ends an answer only.

    Example: `qlora-kit chat --model models/m --adapter runs/r/adapter --temperature 0.7`
    """
    from qlora_kit.chat import chat as run_chat
    from qlora_kit.chat import say, typed_lines
    from qlora_kit.generation import Sampling

    folders = list(adapter or [])
    tokenizer = tokenizer_of(model_folder(model), folders)
    base = load_model(model, folders, quantization, any_base, placement)
    warn_of_other_quantization(base, folders)
    sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed)
    run_chat(base, tokenizer, typed_lines(), say, sampling, system=system)


def merge(
    model: ModelPath,
    adapter: Annotated[Path, typer.Option(help="Adapter folder.")],
    out: Annotated[Path, typer.Option(help="New folder for the merged model.")],
    dtype: Annotated[
        DType | None,
        typer.Option(help="Of the written weights, rounded once; default: float16, of `--onto 4bit` the base's."),
    ] = None,
    onto: Annotated[
        MergeOnto,
        typer.Option(
            help="original weights, their dequantized 4-bit copies, or auto: the better by --verify, else as trained; "
            "4bit: the original, and the sum quantized as the base is, which is another model than the trained one."
        ),
    ] = MergeOnto.auto,
    verify: Annotated[
        Path | None,
        typer.Option(help="Held-out jsonl: choose by it, reload with plain transformers, compare loss and logits."),
    ] = None,
    any_base: AnyBase = False,
    as_json: AsJson = False,
) -> None:
    """Write base + adapter as an ordinary model, tensor by tensor: in 16 or 32 bits, or in 4 again on demand.

    Memory stays at a few tensors, whatever the model; killed, the same command goes on. With `--verify` the folder
    gets its name only after its tensors were compared with base and adapter, and after plain transformers, in a fresh
    process, gave the live adapter model's loss and logits (else exit 4); `--onto auto` then chooses by held-out loss.
    With `--onto 4bit` it reports what quantizing again did to loss and logits.

    Example: `qlora-kit merge --model models/m --adapter runs/r/adapter --out runs/r/merged --verify data/eval.jsonl`
    """
    from qlora_kit.export.merge import open_merge
    from qlora_kit.export.output import require_apart, require_replaceable, write_merged
    from qlora_kit.export.table import merge_table

    folder = model_folder(model)
    rows = None if verify is None else held_out_rows(folder, verify, adapter)
    opened = open_merge(folder, adapter, dtype=dtype and dtype.value, onto=onto.value, any_base=any_base)
    require_apart(out, folder, adapter)
    require_replaceable(out)
    if rows is None:
        report = write_merged(opened, out)
    else:
        report = merge_proved(opened, out, rows, choose=onto is MergeOnto.auto, any_base=any_base)
    print_json(report.to_json()) if as_json else merge_table(report, out)


def quantize(
    model: ModelPath,
    out: Annotated[Path, typer.Option(help="New folder for the 4-bit checkpoint.")],
    quant_type: Annotated[QuantType, typer.Option(help="The 4-bit type of the weights.")] = QuantType.nf4,
    double_quant: Annotated[
        bool, typer.Option(help="Quantize the scales too: 4.127 bits per weight instead of 4.5.")
    ] = True,
    dtype: Annotated[
        DType, typer.Option(help="Of what stays unquantized, and of weights before; `model.dtype` of the recipe.")
    ] = DType.bfloat16,
    as_json: AsJson = False,
) -> None:
    """Write a 4-bit checkpoint that this kit and plain transformers load.

    Memory stays at a few tensors, whatever the model. Training from it gives what training from the original gives,
    and adapters fit both.

    Example: `qlora-kit quantize --model models/m --out models/m-nf4`
    """
    from qlora_kit.base.quantize_model import quantize_model
    from qlora_kit.base.source import resolve_folder
    from qlora_kit.units import format_bytes

    folder = resolve_folder(model)
    report = quantize_model(folder, out, quant_type=quant_type.value, double_quant=double_quant, dtype=dtype.value)
    if as_json:
        print_json(report.to_json())
        return
    print(
        f"{out}: {format_bytes(report.bytes_written)} of {format_bytes(report.bytes_read)}, "
        f"{report.quantized_tensors} tensors in {report.quant_type}, {report.copied_tensors} in {report.dtype}"
    )
