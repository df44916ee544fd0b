"""What the tests share: the real sample as a dataset, and a way to run the programs as a user does."""

import contextlib
import ctypes
import fcntl
import hashlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.exactness import differences

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list) -> None:
    """Put the longest tests first: else one core idles while the other ends with one of them."""
    items.sort(key=lambda item: item.path.name not in ("test_train.py", "test_processes.py", "test_readme.py"))


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Compile nothing unless the test itself asks `on_machine` for it: compiling takes a core 10 s and more."""
    torch.compiler.set_stance("force_eager")
    yield
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # on_machine stops glibc from returning memory: it would add up over tests


@pytest.fixture(scope="session")
def sample_dir() -> Path:
    """data/sample: real articles. Of several pytest processes one prepares them, if they are not there yet."""
    folder = ROOT / "data" / "sample"
    with open(ROOT / "pyproject.toml") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not (folder / "meta.json").exists():
            subprocess.run([sys.executable, "prepare_wiki.py", "--sample", "--out", folder], cwd=ROOT, check=True)
    return folder


def write_dataset(folder: Path, **splits: list[np.ndarray]) -> None:
    """Write arrays of tokens as prepare_wiki.py does, each as a shard of its split. Their bytes are made up."""
    meta = {"tokenizer": {"name": "gpt2", "vocab_size": 50257}, "splits": {}, "shards": []}
    for split, shards in splits.items():
        tokens = np.concatenate(shards)
        meta["splits"][split] = {"articles": int((tokens == 50256).sum()), "tokens": len(tokens), "bytes": 0}
        for number, shard in enumerate(shards):
            entry = {"file": f"{split}_{number:05d}.bin", "split": split, "tokens": len(shard)}
            (folder / entry["file"]).write_bytes(content := shard.astype("<u2").tobytes())
            meta["shards"].append(entry | {"sha256": hashlib.sha256(content).hexdigest()})
    np.save(folder / "token_bytes.npy", np.random.default_rng(0).integers(1, 9, size=50257).astype(np.uint16))
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.fixture(scope="session")
def small_dir(sample_dir, tmp_path_factory) -> Path:
    """The sample's first 40,000 tokens to train on and first 4,200 held-out ones, for runs of seconds."""
    folder, sizes = tmp_path_factory.mktemp("small"), {"train": 40_000, "val": 4_200}
    shards = {split: [np.fromfile(sample_dir / f"{split}_00000.bin", "<u2", size)] for split, size in sizes.items()}
    write_dataset(folder, **shards)
    shutil.copy(sample_dir / "token_bytes.npy", folder)
    return folder


def run_program(*args: object, **kwargs: object) -> subprocess.CompletedProcess:
    """Run `python ARGS...` in the repository's folder; return the finished process with its output as text."""
    command = [sys.executable, *map(str, args)]
    kwargs = {"cwd": ROOT} | kwargs
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **kwargs)


def call_program(program: str, *args: object) -> subprocess.CompletedProcess:
    """Do what run_program does within this process, which saves the 5 s of importing torch."""
    out, err, argv, status = io.StringIO(), io.StringIO(), sys.argv, 0
    sys.argv = [program, *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / program), run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    finally:
        sys.argv = argv
        release_logs()
    return subprocess.CompletedProcess([program, *args], status, out.getvalue(), err.getvalue())


def release_logs() -> None:
    """Close the logs that runs of this process have open and locked, as the end of their own process would."""
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if link.readlink().name == "log.jsonl":
                os.close(int(link.name))


SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 32, "warmup_steps": 0, "learning_rate": 1e-2, "device": "cpu"}
SMALL |= {"compile": False, "dtype": "float32", "eval_tokens": 2_048, "log_interval": 1, "micro_batch_tokens": 512}
FEW = ((0, 16, 8, 1.0), (10, 32, 4, 0.5), (20, 64, 3, 0.25))


def as_qwen3(state: dict):
    """Return a checkpoint's model as transformers' own Qwen3ForCausalLM, filled name by name."""
    transformers = pytest.importorskip("transformers")
    config, weights = state["config"], state["model"]
    heads, width = config["n_head"], config["n_embd"]
    qwen3 = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=len(weights["embed.weight"]), hidden_size=width, num_hidden_layers=config["n_layer"],
        intermediate_size=len(weights["blocks.0.mlp.up_proj.weight"]), num_attention_heads=heads,
        num_key_value_heads=heads, head_dim=width // heads, rms_norm_eps=1e-6, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}, attention_bias=False,
        attn_implementation="eager"))  # fmt: skip
    renamed = {qwen3_name(name): weight for name, weight in weights.items()}
    qwen3.load_state_dict(renamed | {"lm_head.weight": weights["embed.weight"]})
    return qwen3.eval()


def qwen3_name(name: str) -> str:
    """Return transformers' name of a weight."""
    names = {"embed": "embed_tokens", "blocks": "layers", "attn": "self_attn", "attn_norm": "input_layernorm",
             "mlp_norm": "post_attention_layernorm"}  # fmt: skip
    return ".".join(["model", *(names.get(part, part) for part in name.split("."))])


def read_log(out_dir) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]


def assert_same_run(one, other) -> None:
    """Assert that two runs' checkpoints and logs differ in nothing but times: test_bench.py plants differences."""
    assert differences(one, other) == [] and not [*one.glob("*.tmp")]
