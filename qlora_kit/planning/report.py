"""A plan as a table that a person reads in ten seconds: what takes the memory, the limit, the verdict, the next step.

How: rich draws it; it is imported only when something is printed. Figures come from the plan alone, nothing is computed
here. Imports no torch. Imported by the command line and training.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qlora_kit.planning.planner import Plan
from qlora_kit.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

BAR_CELLS = 24
MEANINGS = {
    "base_nf4": "4-bit block weights",
    "quant_constants": "their scales",
    "base_unquantized": "head, embedding, norms",
    "adapter": "LoRA A and B",
    "gradients": "of A and B",
    "optimizer": "moments, masters",
    "activations": "kept for backward",
    "logits": "one tile of the loss",
    "workspace": "weights in passing",
    "runtime": "context (est.)",
}
MOMENTS = {
    "loss": "the loss",
    "head backward": "the head's backward",
    "final norm": "the backward of the final norm",
    "kept block backward": "the backward of a block that kept its activations",
    "block backward": "one block's backward",
    "first block backward": "the first block's backward",
    "embedding backward": "the embedding's backward",
    "loss backward": "the loss' backward",
    "block product": "one product of a block's backward",
    "head": "a product with the 4-bit head",
    "optimizer step": "the optimizer's step",
}


def meaning(plan: Plan, name: str) -> str:
    """What a component is, in three words."""
    if name != "runtime" or plan.device.measured_bytes is None:
        return "kernels' code, heap (est.)" if name == "runtime" and plan.device.kind == "cpu" else MEANINGS[name]
    return "as measured here" if plan.device.kind != "cpu" else "kernels' code, measured; heap"


def bar(part: int, whole: int, cells: int = BAR_CELLS) -> str:
    """A bar of `cells` at `part == whole`, in eighths of a cell; longer parts are cut."""
    eighths = min(round(8 * cells * part / whole), 8 * cells) if whole > 0 else 0
    full, rest = divmod(eighths, 8)
    return "█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")


def verdict(plan: Plan) -> str:
    """One line: fits or not, how much is needed, how much there is."""
    needed, there = format_bytes(plan.peak_bytes), format_bytes(plan.budget_bytes)
    if plan.fits:
        return f"fits: {needed} needed of {there}, {format_bytes(plan.budget_bytes - plan.peak_bytes)} to spare"
    missing = format_bytes(plan.peak_bytes - plan.budget_bytes)
    return f"does not fit: {needed} needed ({plan.peak_phase}), {there} allowed, {missing} too much"


def parameters_line(plan: Plan) -> str:
    """What is trained, in the form that people compare."""
    return (
        f"trainable parameters: {plan.trainable_parameters:,} of {plan.total_parameters:,} "
        f"({plan.trainable_percent:.4f} %)"
    )


def stack_line(plan: Plan) -> str:
    """Another stack's peak beside this kit's."""
    there = f"{plan.stack} takes {format_bytes(plan.peak_bytes)} at its peak"
    if plan.kit_peak_bytes is None:
        return f"{there}; this kit cannot train this model"
    times = plan.peak_bytes / plan.kit_peak_bytes
    return f"{there}, this kit {format_bytes(plan.kit_peak_bytes)} for the same recipe: {times:.1f} times as much"


def placement_line(plan: Plan) -> str:
    """Where the blocks live, when not all of them are on the device; embedding and head, when they are not."""
    counts = {
        "on the device": plan.resident_blocks,
        "streamed from host memory": plan.host_blocks,
        "streamed from disk": plan.streamed_blocks - plan.host_blocks,
    }
    blocks = ", ".join(f"{count} {where}" for where, count in counts.items() if count or where == "on the device")
    where = {"host": "; embedding and head in host memory", "disk": "; embedding and head on disk"}
    return f"blocks: {blocks}{where.get(plan.settings['memory']['embeddings'], '')}"


def passage_line(plan: Plan) -> str:
    """What is recomputed, kept and offloaded, and how micro-batches pass the blocks."""
    memory, layers = plan.settings["memory"], plan.resident_blocks + plan.streamed_blocks
    wanted = memory["gradient_checkpointing"]
    recomputed = layers * wanted if isinstance(wanted, bool) else min(wanted, layers)
    parts = [f"{recomputed} of {layers} blocks recomputed in backward"]
    if memory["keep_dequantized"]:
        parts.append("a block's weights kept dequantized meanwhile")
    if memory["activation_offload"]:
        parts.append(f"their inputs {'in host memory' if memory['activation_offload'] == 'host' else 'on disk'}")
    group = memory["micro_batches_together"]
    parts.append(f"{group} micro-batches pass a block together" if group > 1 else "one micro-batch at a time")
    return "; ".join(parts)


def time_line(plan: Plan) -> str | None:
    """How long a step and the run will take, and what decides it; None where the device's rates are not known."""
    time = plan.estimated
    if time is None:
        return None
    run = "" if time.run_s is None else f", {format_seconds(time.run_s)} the run"
    train, tokens = plan.settings["train"], plan.settings["data"]["seq_len"]
    tokens *= train["micro_batch"] * train["grad_accumulation"]
    bound = "bound by transfers" if time.bound_by == "transfer" else "bound by compute"
    return f"time: about {format_seconds(time.step_s)} a step of {tokens:,} tokens{run} (estimated, {bound})"


def room_line(plan: Plan) -> str | None:
    """How far it could go; None when it does not fit."""
    if plan.room is None:
        return None
    length, rows = plan.room.seq_len, plan.room.micro_batch
    return f"room: up to data.seq_len={length} or train.micro_batch={rows} would fit"


def run_lines(plan: Plan) -> list[str]:
    """Parameters, placement, passage, and where it fits time and room."""
    of_a_run = (time_line(plan), room_line(plan)) if plan.fits else ()
    return [parameters_line(plan), placement_line(plan), passage_line(plan), *filter(None, of_a_run)]


def _component_table(plan: Plan) -> Table:
    from rich.table import Table
    from rich.text import Text

    total = sum(plan.components.values())
    whole = max(total, plan.budget_bytes)
    title = Text(f"training peak, at {MOMENTS[plan.peak_moment]}, on {plan.device.name}", style="italic")
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("component", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("", width=BAR_CELLS, no_wrap=True)
    table.add_column("what", style="dim", no_wrap=True)
    for name, count in plan.components.items():
        if count:
            table.add_row(name, format_bytes(count), bar(count, whole), meaning(plan, name))
    colour = "green" if total <= plan.budget_bytes else "red"
    table.add_row("total", format_bytes(total), f"[{colour}]{bar(total, whole)}[/]", "", style="bold")
    table.add_row("limit", format_bytes(plan.budget_bytes), bar(plan.budget_bytes, whole), "memory of the device")
    return table


def _phase_table(plan: Plan) -> Table:
    from rich.table import Table

    table = Table(title="phases, peak of each", title_justify="left", box=None)
    table.add_column("phase")
    for place in ("device", "host", "disk, written"):
        table.add_column(place, justify="right", no_wrap=True)
    for name, phase in plan.phases.items():
        cells = (format_bytes(count) if count else "-" for count in vars(phase).values())
        table.add_row(name, *cells, style="bold" if name == plan.peak_phase else None)
    return table


def print_plan(
    plan: Plan, console: Console, next_step: str = "qlora-kit train with this recipe", notes: Sequence[str] = ()
) -> None:
    """Print components, phases, notes (of the data), trained parameters, time, room, verdict and next step."""
    from rich.text import Text

    settings = plan.settings
    shape = f"{settings['train']['micro_batch']} x {settings['data']['seq_len']} tokens a forward"
    where = "" if plan.stack == "kit" else f", with {plan.stack}"
    title = f"{settings['model']['path']}, {settings['model']['quantization']}, {shape}{where}"
    console.print(Text(title, style="bold"))
    console.print(_component_table(plan))
    console.print(_phase_table(plan))
    for line in (*notes, *run_lines(plan)):
        console.print(Text(line))
    console.print(Text(verdict(plan), style="bold green" if plan.fits else "bold red"))
    for suggestion in plan.suggestions:
        console.print(Text(f"  {'fits with: ' if suggestion.startswith('--set') else ''}{suggestion}"), soft_wrap=True)
    if plan.stack != "kit":
        console.print(Text(stack_line(plan), style="bold"))
    elif plan.fits:
        console.print(Text(f"next: {next_step}"), soft_wrap=True)
