"""What the tests share: the real sample as a dataset, and a way to run the programs as a user does."""

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list) -> None:
    """The longest tests first: else a core would idle while the other comes to its end with one of them."""
    items.sort(key=lambda item: item.path.name not in ("test_train.py", "test_processes.py", "test_readme.py"))


@pytest.fixture(scope="session")
def sample_dir() -> Path:
    """data/sample: real articles, prepared if they are not there yet, by one of the processes that test."""
    with open(ROOT / "pyproject.toml") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        subprocess.run([sys.executable, "prepare_wiki.py", "--sample", "--out", "data/sample"], cwd=ROOT, check=True)
    return ROOT / "data" / "sample"


@pytest.fixture(scope="session")
def small_dir(sample_dir, tmp_path_factory) -> Path:
    """The first 40,000 tokens to train on and 4,200 held out of the sample, for runs of seconds."""
    folder = tmp_path_factory.mktemp("small")
    meta = {"tokenizer": {"name": "gpt2", "vocab_size": 50257}, "splits": {}, "shards": []}
    for split, tokens in (("train", 40_000), ("val", 4_200)):
        file = f"{split}_00000.bin"
        shard = np.fromfile(sample_dir / file, "<u2", tokens)
        shard.tofile(folder / file)
        sha256 = hashlib.sha256(shard.tobytes()).hexdigest()
        meta["shards"].append({"file": file, "split": split, "tokens": tokens, "sha256": sha256})
        meta["splits"][split] = {"articles": int((shard == 50256).sum()), "tokens": tokens, "bytes": 0}
    shutil.copy(sample_dir / "token_bytes.npy", folder)
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def run_program():
    """Runs `python ARGS...` in the repository's folder; gives the finished process with its output as text."""

    def run(*args: object, **kwargs: object) -> subprocess.CompletedProcess:
        command = [sys.executable, *map(str, args)]
        kwargs = {"cwd": ROOT} | kwargs
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **kwargs)

    return run


SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 32, "warmup_steps": 0, "learning_rate": 1e-2, "device": "cpu"}
SMALL |= {"compile": False, "dtype": "float32", "eval_tokens": 2_048, "log_interval": 1, "micro_batch_tokens": 4_096}
FEW = ((0, 16, 8, 1.0), (10, 32, 4, 0.5), (20, 64, 3, 0.25))


@pytest.fixture
def config_file(tmp_path, small_dir):
    """A config file of a small run over the sample: FEW for 30 steps."""
    keys = SMALL | {"data_dir": str(small_dir), "out_dir": str(tmp_path / "run"), "stages": FEW, "max_steps": 30}
    keys |= {"eval_interval": 8, "checkpoint_interval": 3}
    path = tmp_path / "small.py"
    path.write_text("".join(f"{key} = {value!r}\n" for key, value in keys.items()))
    return path


def as_qwen3(state: dict):
    """The model of SMALL in a checkpoint as transformers' own, which is filled name by name."""
    transformers = pytest.importorskip("transformers")
    qwen3 = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=50304, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6, tie_word_embeddings=True, attention_bias=False))  # fmt: skip
    names = {"embed": "model.embed_tokens", "blocks": "model.layers", "attn": "self_attn",
             "attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}  # fmt: skip
    renamed = {}
    for name, weight in state["model"].items():
        head, *rest = [names.get(part, part) for part in name.split(".")]
        renamed[".".join(["model.norm" if head == "norm" else head, *rest])] = weight
    renamed["lm_head.weight"] = state["model"]["embed.weight"]
    qwen3.load_state_dict(renamed)
    return qwen3


def read_log(out_dir) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]


def without_times(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in ("time_s", "tokens_per_s", "mfu")} for record in records]


def weights_and_moments(path) -> list[torch.Tensor]:
    """Every tensor of a checkpoint, in a fixed order."""

    def tensors(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                yield from tensors(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                yield from tensors(item)

    return list(tensors(torch.load(path, weights_only=True)))


def assert_same_run(one, other) -> None:
    ours, theirs = weights_and_moments(one / "last.pt"), weights_and_moments(other / "last.pt")
    assert len(ours) == len(theirs) > 20
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert without_times(read_log(one)) == without_times(read_log(other))


def count_lines(out_dir) -> int:
    path = out_dir / "log.jsonl"
    return path.read_text().count("\n") if path.exists() else 0
