"""The real llama.cpp, from the wheel xllamacpp, in a process of its own: what it computes for a GGUF file.

As a program: reads a JSON object {model, lora, prompts, texts, tokens} and prints one with, for each prompt (token ids),
the greedy tokens, each with the log-probabilities of the best, and for each text its ids.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

TIMEOUT = 300


def need() -> None:
    """Skip the test where the wheel isn't installed."""
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("llama.cpp isn't installed: pip install --no-deps xllamacpp==2026.10.11549")


def ask(model: Path, lora: Path | None = None, prompts: Any = (), texts: Any = (), tokens: int = 8) -> dict[str, Any]:
    """What llama.cpp says; RuntimeError with its last words where it refuses or stops."""
    asked = {
        "model": str(model),
        "lora": None if lora is None else str(lora),
        "prompts": [list(map(int, prompt)) for prompt in prompts],
        "texts": list(texts),
        "tokens": tokens,
    }
    done = subprocess.run(
        [sys.executable, __file__], input=json.dumps(asked), capture_output=True, text=True, timeout=TIMEOUT
    )
    if done.returncode:
        raise RuntimeError(f"llama.cpp stopped ({done.returncode}): {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _main() -> None:
    import xllamacpp as xl

    asked = json.load(sys.stdin)
    params = xl.CommonParams()
    params.model.path = asked["model"]
    params.flash_attn_type = 0
    params.n_ctx, params.n_parallel, params.warmup = 512, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = (
        xl.ggml_type.GGML_TYPE_F32
    )  # by default it keeps keys and values in 16 bits
    if asked["lora"]:
        params.lora_adapters = [xl.CommonAdapterLoraInfo(asked["lora"], 1.0)]
    server = xl.Server(params)

    def post(path: str, body: Any) -> Any:
        request = urllib.request.Request(
            server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return json.load(urllib.request.urlopen(request, timeout=TIMEOUT))

    answers = []
    for prompt in asked["prompts"]:
        body = {"n_predict": 1, "temperature": 0, "n_probs": 20, "cache_prompt": False, "return_tokens": True}
        steps: list[Any] = []
        while len(steps) < asked["tokens"]:  # one at a time: a token that ends inside a character has no probabilities
            done = post("/completion", {**body, "prompt": [*prompt, *(token for token, _ in steps)]})
            if not done["tokens"]:  # it has stopped
                break
            given = done.get("completion_probabilities") or [{"top_logprobs": []}]
            steps.append((done["tokens"][0], [(top["id"], top["logprob"]) for top in given[0]["top_logprobs"]]))
        answers.append(steps)
    ids = [
        post("/tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"]
        for text in asked["texts"]
    ]
    print("\n" + json.dumps({"answers": answers, "ids": ids}))


if __name__ == "__main__":
    _main()
