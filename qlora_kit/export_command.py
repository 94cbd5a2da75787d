"""The command `export`: a model for other programs. Imports only what it needs. Imported by: cli."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qlora_kit.commands import model_folder
from qlora_kit.errors import RecipeError
from qlora_kit.options import AnyBase, AsJson, GgufType, ModelPath, Onto, print_json

export_app = typer.Typer(help="Write a model for other programs.", no_args_is_help=True)


@export_app.callback()
def _export() -> None:
    pass


@export_app.command()
def gguf(
    model: ModelPath,
    out: Annotated[Path, typer.Option(help="New file, as a rule *.gguf.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder, merged in on the way.")] = None,
    dtype: Annotated[
        GgufType, typer.Option(help="Of the matrices; vectors are f32. q8_0: 8.5 bits a weight.")
    ] = GgufType.f16,
    lora: Annotated[
        bool, typer.Option("--lora", help="Write the adapter alone, in f32, to be added to the base's GGUF.")
    ] = False,
    onto: Annotated[
        Onto,
        typer.Option(
            help="original weights, their dequantized 4-bit copies, or auto: what the adapter was trained beside."
        ),
    ] = Onto.auto,
    any_base: AnyBase = False,
    as_json: AsJson = False,
) -> None:
    """Write a GGUF file for llama.cpp, Ollama and their kin: from a merged folder, or straight from base + adapter.

    Tokenizer and chat template go with it; beside it stands a Modelfile for Ollama whose template was checked to give
    the token ids that training gave. What llama.cpp would compute otherwise is refused. Memory stays at one tensor.

    Example: `qlora-kit export gguf --model models/m --adapter runs/r/adapter --out m.gguf --dtype q8_0`
    """
    from qlora_kit.export.gguf import export_gguf, export_gguf_adapter
    from qlora_kit.units import format_bytes

    folder = model_folder(model)
    if lora and adapter is None:
        raise RecipeError("--lora: writes an adapter; name it with --adapter")
    if lora and adapter is not None:
        report = export_gguf_adapter(folder, adapter, out, any_base=any_base)
    else:
        report = export_gguf(folder, out, adapter=adapter, dtype=dtype.value, onto=onto.value, any_base=any_base)
    modelfile = None if lora else _modelfile(folder, out)
    if as_json:
        print_json(report.to_json() | {"modelfile": None if modelfile is None else str(modelfile)})
        return
    print(
        f"{out}: {format_bytes(report.bytes_written)}, {report.tensors} tensors of {report.architecture} in "
        f"{report.dtype}, {report.merged_tensors} merged"
    )
    if modelfile is not None:
        print(f"{modelfile}: for Ollama; `ollama create NAME -f {modelfile}`")


def _modelfile(folder: Path, out: Path) -> Path | None:
    """The Modelfile beside `out`; None, and a note why, where the chat template cannot be said in Go's language."""
    from qlora_kit.console import note
    from qlora_kit.data.tokenize import load_tokenizer
    from qlora_kit.export.ollama import write_modelfile

    path, tokenizer = out.with_name(f"{out.stem}.Modelfile"), load_tokenizer(folder)
    if write_modelfile(path, out, tokenizer):
        return path
    found = "no chat template" if not tokenizer.chat_template else "a chat template that is not fixed text around turns"
    note(f"no Modelfile for Ollama was written: the tokenizer has {found}; llama.cpp reads the one in the file itself")
    return None
