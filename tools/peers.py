"""The processes in which `bench_peers` runs the others: peft's usual recipe, and trl's SFTTrainer.

    python -m tools.peers peft|trl RECIPE --steps N

Both read this kit's recipe (rank, alpha, learning rate, sequence length, optimizer) and see its very batches, in order.
peft: `BitsAndBytesConfig` (NF4, double quantization, bf16 compute), `prepare_model_for_kbit_training` with gradient
checkpointing (not reentrant), `LoraConfig` on all linears, bitsandbytes' 8-bit AdamW, bf16 autocast as transformers'
Trainer has it. trl, its memory options on: `SFTTrainer`, which as of 1.16 never holds whole logits and keeps its
adapters in bf16, with gradient checkpointing (not reentrant) and an 8-bit optimizer; on an accelerator also activations
offloaded and the optimizer paged. A folder that is quantized already is loaded as it is. Imported by nobody.
"""

from __future__ import annotations

import argparse
import queue
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any

import torch

from qlora_kit.base.source import libraries
from qlora_kit.data.batches import Batches
from qlora_kit.planning.shapes import model_shapes, read_config
from qlora_kit.recipe import Recipe, load_recipe
from tools.harness import Answer, Questions, random_examples, serve

MODULES = {
    "peft": ("bitsandbytes.optim", "peft"),
    "trl": ("bitsandbytes.optim", "peft", "trl.trainer.sft_trainer", "datasets"),
}


def device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def kit_batches(recipe: Recipe, steps: int) -> Batches:
    """The batches that this kit's run has."""
    train = recipe.train
    vocabulary = model_shapes(*read_config(recipe.model.path)).vocabulary
    count = steps * train.grad_accumulation * train.micro_batch
    return Batches(
        random_examples(count, recipe.data.seq_len, vocabulary),
        micro_batch=train.micro_batch,
        grad_accumulation=train.grad_accumulation,
        seq_len=recipe.data.seq_len,
        packing=recipe.data.packing,
        seed=train.seed,
        pad_id=0,
    )


def quantized_model(recipe: Recipe) -> Any:
    """transformers' model on bitsandbytes' linears."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": device()}}
    if "quantization_config" not in read_config(recipe.model.path)[0]:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return AutoModelForCausalLM.from_pretrained(recipe.model.path, **options)


def lora_config(recipe: Recipe) -> Any:
    from peft import LoraConfig

    adapter = recipe.adapter
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=adapter.target_modules,
        task_type="CAUSAL_LM",
    )


def peft_questions(recipe: Recipe, steps: int) -> Questions:
    """peft's recipe as its documentation has it, in a loop of its own."""
    import bitsandbytes
    from peft import get_peft_model, prepare_model_for_kbit_training

    torch.manual_seed(recipe.train.seed)
    options: dict[str, Any] = {"use_gradient_checkpointing": True}
    options["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    model = prepare_model_for_kbit_training(quantized_model(recipe), **options)
    model = get_peft_model(model, lora_config(recipe))
    model.config.use_cache = False
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = bitsandbytes.optim.AdamW8bit(trained, lr=recipe.train.lr, weight_decay=recipe.train.weight_decay)
    batches, done = kit_batches(recipe, steps), 0

    def step() -> Answer:
        nonlocal done
        micro_batches, total = batches.step(done), 0.0
        for batch in micro_batches:
            ids = batch.input_ids.to(device())
            with torch.autocast(device().type, dtype=torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss / len(micro_batches)
            loss.backward()
            total += loss.item()
        if recipe.train.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, recipe.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += 1
        return {"loss": total, "tokens": sum(batch.tokens for batch in micro_batches)}

    return {"step": step}


# ---------------------------------------------------------------------------------------------------------- trl


def no_words() -> Any:
    """A tokenizer, which SFTTrainer insists on, though its data are ids already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>", unk_token="<pad>")


def sft_config(recipe: Recipe, folder: str, steps: int) -> Any:
    """The memory options that this version of trl has and that this machine can take."""
    from trl import SFTConfig

    train, accelerated = recipe.train, device().type != "cpu"
    return SFTConfig(
        output_dir=folder,
        max_length=recipe.data.seq_len,
        max_steps=steps,
        per_device_train_batch_size=train.micro_batch,
        gradient_accumulation_steps=train.grad_accumulation,
        learning_rate=train.lr,
        lr_scheduler_type="constant",
        max_grad_norm=train.max_grad_norm or 0.0,
        train_sampling_strategy="sequential",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        activation_offloading=accelerated,  # on a CPU there is nowhere to go
        optim="paged_adamw_8bit" if accelerated else "adamw_8bit",
        bf16=True,
        use_cpu=not accelerated,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def trl_questions(recipe: Recipe, steps: int) -> Questions:
    """SFTTrainer's own loop in a thread, stopped before each step until it is asked for."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTTrainer

    asked: queue.Queue[None] = queue.Queue()
    answered: queue.Queue[Answer | BaseException] = queue.Queue()

    class OnDemand(TrainerCallback):
        """Says after each step how it went; the first answer says that the loop is ready."""

        def on_step_begin(self, *unused: Any, **more: Any) -> None:
            if not asked.unfinished_tasks:
                answered.put({})
            asked.get()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
            if logs and "loss" in logs:
                answered.put({"loss": logs["loss"]})

    batches = kit_batches(recipe, steps)
    rows = [ids for step in range(steps) for batch in batches.step(step) for ids in batch.input_ids.tolist()]
    folder = tempfile.mkdtemp(prefix="trl-", dir=recipe.output)
    trainer = SFTTrainer(
        model=quantized_model(recipe),
        args=sft_config(recipe, folder, steps),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=no_words(),
        peft_config=lora_config(recipe),
        callbacks=[OnDemand()],
    )

    def train() -> None:
        try:
            trainer.train()
        except BaseException as problem:
            answered.put(problem)

    def wait() -> Answer:
        answer = answered.get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def step() -> Answer:
        asked.put(None)
        tokens = recipe.train.grad_accumulation * recipe.train.micro_batch * recipe.data.seq_len
        return wait() | {"tokens": tokens}

    threading.Thread(target=train, daemon=True).start()
    wait()
    return {"step": step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("who", choices=list(MODULES))
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--steps", type=int, required=True, help="steps that will be asked for, at most")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    recipe = load_recipe(options.recipe)
    Path(recipe.output).mkdir(parents=True, exist_ok=True)
    questions = {"peft": peft_questions, "trl": trl_questions}[options.who]
    modules = (*libraries(recipe.model.path), *MODULES[options.who])
    serve(modules, lambda: questions(recipe, options.steps))


if __name__ == "__main__":
    main()
