"""llama.cpp itself, from the package registry, as the judge of our GGUF files: its token ids, logits and answers.

Why: only llama.cpp says what llama.cpp computes. Its log-probabilities show a row in the wrong order or a field that is
off, which no reader of the file can.
How: `xllamacpp` (extra `llamacpp`) holds llama.cpp's own server in this process; it is asked for the log-probability of
every token of the vocabulary, on the CPU, with an fp32 cache and no flash attention.
Imported by: tools.prove_gguf, tests.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PATIENCE_S = 120.0  # of one question: a long prompt on a slow machine


class LlamaCpp:
    """A GGUF model in llama.cpp, with a LoRA file beside it if one is given.

    Args:
        context: positions of the cache.
        threads: of the computation.
    Raises: ImportError: no llama.cpp. RuntimeError: llama.cpp cannot load the file.
    """

    def __init__(self, model: Path, lora: Path | None = None, *, context: int = 512, threads: int = 1) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(model)
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_parallel, settings.warmup, settings.verbosity = 1, False, -1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.no_extra_bufts = True  # weights as the file has them, not repacked
        settings.swa_full = True  # so that a prefix of the last question can be kept
        if lora is not None:
            settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        self.server = xllamacpp.Server(settings)
        self._complete([0], 1)  # a server that is let go before its loop has begun waits for it for ever

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Token ids; marks written in the text count as marks.

        Args:
            special: add what the file says stands before and after every text.
        """
        asked = {"content": text, "add_special": special, "parse_special": True}
        found: list[int] = self._post("/tokenize", asked)["tokens"]
        return found

    def rendered(self, messages: Sequence[dict[str, str]]) -> str:
        """The file's chat template on messages, with the opening of the answer."""
        return str(self._post("/apply-template", {"messages": list(messages)})["prompt"])

    def log_probabilities(self, ids: Sequence[int], vocabulary: int) -> np.ndarray:
        """fp32 [vocabulary]: of each token to follow `ids`."""
        # Nothing is reported for half a character or an end, so the choice is forced; the report is from before that.
        forced = [[self.encode("a")[-1], 1e6]]
        answer = self._complete(ids, 1, n_probs=vocabulary, logit_bias=forced)
        found = answer["completion_probabilities"][0]["top_logprobs"]
        row = np.full(vocabulary, -np.inf, dtype=np.float32)
        for token in found:
            row[token["id"]] = token["logprob"]
        return row

    def answer(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        """Ids of the most probable continuation, without the one that ends it."""
        found = self._complete(ids, new_tokens, return_tokens=True)
        tokens: list[int] = found["tokens"]
        return tokens[:-1] if found["stop_type"] == "eos" else tokens

    def _complete(self, ids: Sequence[int], new_tokens: int, **options: Any) -> dict[str, Any]:
        asked = {"prompt": list(ids), "n_predict": new_tokens, "temperature": 0.0, "cache_prompt": True, **options}
        return self._post("/completion", asked)

    def _post(self, path: str, asked: dict[str, Any]) -> dict[str, Any]:
        body = json.dumps(asked).encode()
        request = urllib.request.Request(
            self.server.listening_address + path, body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            found: dict[str, Any] = json.loads(answer.read())
        return found
