"""Greedy answers to the scored requests, as JSON: `-m tools.quickstart.answers MODEL EVAL ANSWERS OUT [ADAPTER]`.

A process of its own, so that its memory is gone when the quickstart trains. Called by `tools.quickstart`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from qlora_kit import files
from tools.quickstart.score import scored_requests

MAX_NEW_TOKENS = 72
BATCH = 16


def main(model: str, requests_file: str, answers_file: str, out: str, adapter: str | None = None) -> None:
    """Write `{"ids": [...], "answers": [...]}` to `out`."""
    from qlora_kit.adapters.store import load_adapter
    from qlora_kit.base.device import pick_device
    from qlora_kit.base.loader import load_base
    from qlora_kit.data.tokenize import load_tokenizer
    from qlora_kit.generation import Sampling, generate
    from qlora_kit.recipe import Model

    requests = scored_requests(Path(requests_file), Path(answers_file))
    base = load_base(Model(path=model), pick_device())
    if adapter is not None:
        load_adapter(base, Path(adapter))
    messages = [request.messages for request in requests]
    tokenizer = load_tokenizer(Path(model))
    answers = list(generate(base, tokenizer, messages, Sampling(MAX_NEW_TOKENS), batch=BATCH))
    files.write_json(Path(out), {"ids": [request.id for request in requests], "answers": answers})


if __name__ == "__main__":
    main(*sys.argv[1:])
