"""Windows from shards of articles: ENDOFTEXT, title, blank line, text. A window may cross into the next article.

Windows depend only on shards and arguments: a resumed run, and N processes together, draw those of one unbroken run.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from settings import UserError, one_line

VOCAB_SIZE = 50257  # GPT-2's
ENDOFTEXT = 50256  # begins every article, and no article contains it
SPLITS = ("train", "val")


class Split:
    """The shards of one split: memory-mapped uint16 arrays, read as windows of seq_len + 1 tokens."""

    def __init__(self, shards: list[np.ndarray]):
        self.shards = shards
        self.lengths = np.array([len(shard) for shard in shards])

    def random_windows(self, seq_len: int, batch_size: int, seed: int, step: int) -> np.ndarray:
        """Draw a step's batch (batch_size, seq_len + 1), uniform over all starts whose window fits in its shard."""
        n_starts = np.maximum(0, self.lengths - seq_len)  # of each shard
        numbers = np.random.default_rng((seed, step)).integers(n_starts.sum(), size=batch_size)
        return self._read(n_starts, numbers, 1, seq_len)

    def spread(self, seq_len: int, tokens: int = 0) -> np.ndarray:
        """Return the numbers of the windows that an evaluation of `tokens` tokens scores, spread evenly over all."""
        tiles = int(self._tiles(seq_len).sum())
        n = max(1, min(tiles, tokens // seq_len)) if tokens else tiles  # 0 scores all
        return np.arange(n) * tiles // n

    def fixed_windows(self, seq_len: int, numbers: np.ndarray) -> np.ndarray:
        """Return windows (len(numbers), seq_len + 1) by number. Window i of a shard starts at its token i * seq_len."""
        return self._read(self._tiles(seq_len), numbers, seq_len, seq_len)

    def _tiles(self, seq_len: int) -> np.ndarray:
        return np.maximum(0, self.lengths - 1) // seq_len

    def _read(self, per_shard: np.ndarray, numbers: np.ndarray, stride: int, seq_len: int) -> np.ndarray:
        """Return windows by number, counted through all shards. Shard i holds per_shard[i], `stride` tokens apart."""
        ends = np.cumsum(per_shard)
        which = np.searchsorted(ends, numbers, side="right")
        starts = (numbers - (ends - per_shard)[which]) * stride
        windows = np.empty((len(numbers), seq_len + 1), dtype=np.int64)
        for window, shard, start in zip(windows, which, starts):
            window[:] = self.shards[shard][start : start + seq_len + 1]
        return windows


class Dataset(NamedTuple):
    meta: dict  # meta.json
    train: Split
    val: Split
    token_bytes: np.ndarray  # UTF-8 bytes of each token id, for bits per byte
    fingerprint: str  # hash of meta.json's checksums: a run resumes only on the same text


def open_dataset(data_dir: str | Path, max_len: int = 0) -> Dataset:
    """Open a dataset. Raises UserError if a file has a wrong size, or a split has no window of max_len tokens."""
    path, shards = Path(data_dir), {split: [] for split in SPLITS}
    try:
        meta = json.loads((path / "meta.json").read_bytes())
        for shard in meta["shards"]:
            file = path / shard["file"]
            if file.stat().st_size != 2 * shard["tokens"]:
                raise ValueError(f"{file.name} does not have the size in meta.json")
            shards[shard["split"]].append(np.memmap(file, np.uint16, "r"))
        token_bytes = np.load(path / "token_bytes.npy")
        checksums = repr([(shard["split"], shard["sha256"]) for shard in meta["shards"]])
    except OSError as error:
        raise UserError(f"no dataset in {data_dir}, where prepare_wiki.py would make it: {one_line(error)}") from error
    except (ValueError, EOFError, KeyError, TypeError) as error:
        raise UserError(f"{data_dir} is damaged: {error}; remove it and make it again") from error
    splits = [Split(shards[name]) for name in SPLITS]
    for name, split in zip(SPLITS, splits):
        if max_len and not len(split.spread(max_len)):
            raise UserError(f"{data_dir}: no {name} shard holds a window of {max_len + 1:,} tokens")
    return Dataset(meta, *splits, token_bytes, hashlib.sha256(checksums.encode()).hexdigest())


def micro_batches(windows: np.ndarray, seq_len: int, micro_batch_tokens: int) -> list[np.ndarray]:
    """Split windows of seq_len, or their numbers, evenly into the fewest micro-batches within micro_batch_tokens."""
    count = math.ceil(len(windows) / max(1, micro_batch_tokens // seq_len))
    return np.array_split(windows, count) if count else []
