"""What the tests share: the real sample as a dataset, and a way to run the programs as a user does."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def sample_dir() -> Path:
    """data/sample: real articles, prepared if they are not there yet."""
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
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False, **kwargs)

    return run
