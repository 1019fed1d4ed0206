"""A tiny model folder with a tokenizer, and a data file, made once for the tests that run the whole arrow."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

WORDS = ["one", "two", "three", "four", "five", "cat", "mat", "sat", "the", "on"]


@pytest.fixture(scope="session", autouse=True)
def kernels():
    """Built before anything is compared bit by bit: a run that finds them half-built goes without."""
    from lorafit.native import build

    build.library()


@pytest.fixture(scope="session")
def generic(tmp_path_factory):
    """The kernels for any processor of this kind, as they are where there are no tiles and no wide vectors."""
    import ctypes
    import shutil
    import subprocess

    from lorafit.native import build

    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None or build.library() is None:
        pytest.skip("no C++ compiler that builds the kernels")
    to = tmp_path_factory.mktemp("generic") / "kernels.so"
    sources = map(str, build.KERNELS)
    flags = ["-O1", "-fopenmp", "-fPIC", "-shared", "-std=c++17", "-w"]
    subprocess.run([compiler, *flags, *sources, "-o", str(to)], check=True)
    return ctypes.CDLL(str(to))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    import torch
    from data_helpers import CHATML, tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model")
    tok = tokenizer(CHATML)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def conversation(i: int) -> dict:
    a, b, c = (WORDS[(i * k + k) % len(WORDS)] for k in (1, 3, 7))
    return {
        "messages": [
            {"role": "user", "content": f"{a} {b} {i}"},
            {"role": "assistant", "content": f"the {c} sat on the mat {i % 7}"},
        ]
    }


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(conversation(i)) + "\n" for i in range(60)))
    return path
