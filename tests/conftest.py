"""What the tests share: the real sample as a dataset, and ways to run the programs as a user does."""

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
    """Run the longest files first. If one came last, the other core would be idle meanwhile."""
    items.sort(key=lambda item: item.path.name not in ("test_train.py", "test_processes.py", "test_readme.py"))


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """Compile nothing unless the test asks `on_machine` for it: compiling takes 10 s or more."""
    torch.compiler.set_stance("force_eager")
    yield
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # give back the memory that on_machine makes glibc keep


@pytest.fixture(scope="session")
def sample_dir() -> Path:
    """Return data/sample, a dataset of real articles. If it is missing, one pytest process makes it for all."""
    folder = ROOT / "data" / "sample"
    with open(ROOT / "pyproject.toml") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not (folder / "meta.json").exists():
            subprocess.run([sys.executable, "prepare_wiki.py", "--sample", "--out", folder], cwd=ROOT, check=True)
    return folder


def write_dataset(folder: Path, **splits: list[np.ndarray]) -> None:
    """Write a dataset as prepare_wiki.py does, each array of tokens as a shard. The bytes per token are random."""
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
    """Return a dataset for runs of seconds: the sample's first 40,000 training and first 4,200 held-out tokens."""
    folder, sizes = tmp_path_factory.mktemp("small"), {"train": 40_000, "val": 4_200}
    shards = {split: [np.fromfile(sample_dir / f"{split}_00000.bin", "<u2", size)] for split, size in sizes.items()}
    write_dataset(folder, **shards)
    shutil.copy(sample_dir / "token_bytes.npy", folder)
    return folder


def run_program(*args: object, **kwargs: object) -> subprocess.CompletedProcess:
    """Run `python ARGS...` in the repository's folder; return the finished process with its output as text."""
    command, kwargs = [sys.executable, *map(str, args)], {"cwd": ROOT} | kwargs
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **kwargs)


def call_program(program: str, *args: object) -> subprocess.CompletedProcess:
    """Do what run_program does, but in this process: that saves the 5 s of importing torch."""
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
    """Close the logs that runs in this process still hold open and locked, as the end of a process would."""
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if link.readlink().name == "log.jsonl":
                os.close(int(link.name))


SMALL = {"n_layer": 1, "n_head": 2, "n_embd": 32, "warmup_steps": 0, "learning_rate": 1e-2, "device": "cpu"}
SMALL |= {"compile": False, "dtype": "float32", "eval_tokens": 2_048, "log_interval": 1, "micro_batch_tokens": 512}
FEW = ((0, 16, 8, 1.0), (10, 32, 4, 0.5), (20, 64, 3, 0.25))


def as_qwen3(state: dict):
    """Return transformers' own Qwen3ForCausalLM with the weights of a checkpoint, copied name by name."""
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
    """Return the name that transformers gives to a weight of model.GPT."""
    names = {"embed": "embed_tokens", "blocks": "layers", "attn": "self_attn", "attn_norm": "input_layernorm",
             "mlp_norm": "post_attention_layernorm"}  # fmt: skip
    return ".".join(["model", *(names.get(part, part) for part in name.split("."))])


def read_log(out_dir) -> list[dict]:
    return [json.loads(line) for line in (out_dir / "log.jsonl").read_text().splitlines()]


def assert_same_losses(one: Path, other: Path, keys: set, bound: float) -> None:
    """Assert that two logs have the same records, and losses and the like within `bound`."""
    for record, theirs in zip(read_log(one), read_log(other), strict=True):
        assert [record[key] for key in ("event", "step")] == [theirs[key] for key in ("event", "step")]
        ours, expected = ({key: found.get(key) for key in keys} for found in (record, theirs))
        assert ours == pytest.approx(expected, abs=bound)


def assert_same_run(one, other) -> None:
    """Assert that the checkpoints and logs of two runs differ only in times (test_bench.py tests `differences`)."""
    assert differences(one, other) == [] and not [*one.glob("*.tmp")]
