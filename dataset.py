"""A dataset on disk, as prepare_wiki.py writes it: opened as windows over its shards, and verified.

    data_dir     -> open_dataset                the shards of each split, memory-mapped
    (seed, step) -> Split.random_windows        what a step trains on
                    Split.fixed_windows         what an evaluation scores
    data_dir     -> verify                      every checksum and count recomputed

Windows cross from one article into the next. They are a pure function of their arguments: nothing is remembered between
steps, so a run resumed at step s draws what it would have drawn, and any number of processes share the same batch.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from errors import UserError

VOCAB_SIZE = 50257  # GPT-2's
ENDOFTEXT = 50256  # an article begins with it, and it stands nowhere else
SPLITS = ("train", "val")


class Split:
    """The shards of one split, memory-mapped uint16 arrays, as windows of seq_len + 1 tokens."""

    def __init__(self, shards: list[np.ndarray]):
        self.shards = shards

    def starts(self, seq_len: int) -> np.ndarray:
        """Per shard, the number of starts whose window stays inside it."""
        return np.array([max(0, len(shard) - seq_len) for shard in self.shards])

    def tiles(self, seq_len: int) -> np.ndarray:
        """Per shard, the number of windows that tile it with stride seq_len: each target once, but for the last few."""
        return np.array([(len(shard) - 1) // seq_len for shard in self.shards])

    def random_windows(self, seq_len: int, batch_size: int, seed: int, step: int) -> np.ndarray:
        """The batch (batch_size, seq_len + 1) of a step: uniform over all starts in all shards."""
        starts = self.starts(seq_len)
        numbers = np.random.default_rng((seed, step)).integers(starts.sum(), size=batch_size)
        return self._read(starts, numbers, 1, seq_len)

    def count(self, seq_len: int, tokens: int) -> int:
        """How many windows of the tiling an evaluation of so many tokens (0 for all) scores: at least one."""
        tiles = int(self.tiles(seq_len).sum())
        return max(1, min(tiles, tokens // seq_len)) if tokens else tiles

    def spread(self, seq_len: int, n: int) -> np.ndarray:
        """Numbers of n windows, evenly spread over the W that tile the shards: floor(j * W / n)."""
        return np.arange(n) * self.tiles(seq_len).sum() // n

    def fixed_windows(self, seq_len: int, numbers: np.ndarray) -> np.ndarray:
        """The windows (len(numbers), seq_len + 1) of these numbers of the tiling."""
        return self._read(self.tiles(seq_len), numbers, seq_len, seq_len)

    def _read(self, per_shard: np.ndarray, numbers: np.ndarray, stride: int, seq_len: int) -> np.ndarray:
        """The windows of these numbers, counted through all shards, when shard i holds per_shard[i] of them."""
        ends = np.cumsum(per_shard)
        which = np.searchsorted(ends, numbers, side="right")
        starts = (numbers - (ends - per_shard)[which]) * stride
        windows = np.empty((len(numbers), seq_len + 1), dtype=np.int64)
        for row, shard, start in zip(windows, which, starts):
            row[:] = self.shards[shard][start : start + seq_len + 1]
        return windows


class Dataset(NamedTuple):
    meta: dict  # meta.json: what prepare_wiki.py wrote of itself
    train: Split
    val: Split
    token_bytes: np.ndarray  # UTF-8 bytes of each token id, for bits per byte


def open_dataset(data_dir: str, max_len: int) -> Dataset:
    """The dataset in data_dir, for windows of up to max_len tokens.

    Raises UserError if there is none, if it is half-made or damaged (by the shards' sizes), or if a split has no
    window of max_len.
    """
    path = Path(data_dir)
    if not os.path.isfile(path / "meta.json"):  # Path.is_file raises an error where it may not look
        raise UserError(f"{data_dir} is not a dataset (no meta.json in it): make one with prepare_wiki.py")
    try:
        meta = json.loads((path / "meta.json").read_text())
        shards = {split: [] for split in SPLITS}
        for shard in meta["shards"]:
            file, told = path / shard["file"], 2 * shard["tokens"]
            if file.stat().st_size != told:
                raise ValueError(f"{file.name} has {file.stat().st_size} bytes, not the {told} that meta.json says")
            shards[shard["split"]].append(np.memmap(file, np.uint16, "r"))
        token_bytes = np.load(path / "token_bytes.npy")
        if token_bytes.shape != (meta["tokenizer"]["vocab_size"],):
            raise ValueError(f"token_bytes.npy has shape {token_bytes.shape}")
    except Exception as error:  # json, numpy and zipfile each have their own
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{data_dir} is damaged: {what}; make it again with prepare_wiki.py") from error
    splits = [Split(shards[name]) for name in SPLITS]
    for name, split in zip(SPLITS, splits):
        if split.tiles(max_len).sum() == 0:
            raise UserError(f"{data_dir}: no {name} shard holds a window of {max_len + 1:,} tokens")
    return Dataset(meta, *splits, token_bytes)


# --------------------------------------------------------------------------------------------------------------------
# Whether it is still what was written


def read_meta(out: Path) -> dict:
    try:
        meta = json.loads((out / "meta.json").read_bytes())
        if not {"splits", "shards", "source", "options"} <= meta.keys():
            raise ValueError("keys are missing")
        return meta
    except FileNotFoundError:
        raise UserError(f"{out} is not a dataset: there is no meta.json in it") from None
    except (ValueError, AttributeError) as error:
        raise UserError(f"{out}/meta.json is damaged: {error}") from error


def verify(out: Path, lengths: np.ndarray) -> None:
    """Recomputes every checksum and count in meta.json, by the UTF-8 bytes (V,) of each token. Raises UserError with
    the first that differs."""
    meta = read_meta(out)

    def check(what: str, found: object, told: object) -> None:
        if found != told:
            raise UserError(f"{out} is damaged: {what} {found}, and meta.json says {told}")

    on_disk = sorted(path.name for split in SPLITS for path in out.glob(f"{split}_*.bin"))
    check("it has the shards", on_disk, sorted(shard["file"] for shard in meta["shards"]))
    try:
        as_expected = np.array_equal(np.load(out / "token_bytes.npy"), lengths)
    except (OSError, ValueError, EOFError):
        as_expected = False
    if not as_expected:
        raise UserError(f"{out} is damaged: token_bytes.npy does not hold the lengths of GPT-2's tokens")
    totals = {split: dict.fromkeys(("articles", "tokens", "bytes"), 0) for split in SPLITS}
    for shard in tqdm(meta["shards"], unit="shard", disable=None):
        sha256, size, starts_well = hashlib.sha256(), 0, True
        with (out / shard["file"]).open("rb") as file:
            while block := file.read(1 << 24):
                sha256.update(block)
                tokens = np.frombuffer(block[: len(block) // 2 * 2], "<u2")
                starts_well &= size > 0 or tokens[:1] == ENDOFTEXT
                tokens = np.minimum(tokens, ENDOFTEXT)  # if one is beyond, it is damaged, and the checksum says so
                counts = int((tokens == ENDOFTEXT).sum()), len(tokens), int(lengths[tokens].sum(dtype=np.int64))
                for key, count in zip(("articles", "tokens", "bytes"), counts):
                    totals[shard["split"]][key] += count
                size += len(block)
        check(f"{shard['file']} has bytes:", size, 2 * shard["tokens"])
        check(f"{shard['file']} has the sha256", sha256.hexdigest(), shard["sha256"])
        if not starts_well:
            raise UserError(f"{out} is damaged: {shard['file']} does not begin with an article")
    check("its splits have", totals, meta["splits"])
    print(f"{out}: {len(meta['shards'])} shards are what meta.json says, in checksums, articles, tokens and bytes")
