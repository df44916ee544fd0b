"""Windows against enumeration and chi-square tests; datasets read back whole, and with each file damaged."""

import itertools
import json
import math
import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import write_dataset

from data import Split, micro_batches, open_dataset
from settings import UserError

LENGTHS = (5, 31, 1, 18, 6, 64, 2)


def make_split(lengths: tuple[int, ...]) -> Split:
    """Make a split whose shard i holds 1000 * i, 1000 * i + 1, ...: each token says where it is."""
    return Split([np.arange(1_000 * i, 1_000 * i + n, dtype=np.uint16) for i, n in enumerate(lengths)])


def assert_uniform(draws: list, cells: int) -> None:
    """Assert that Pearson's chi-square is within 4 standard deviations of its mean: too even is not random, either."""
    counts, expected = Counter(draws).values(), len(draws) / cells
    statistic = sum((count - expected) ** 2 / expected for count in counts) + (cells - len(counts)) * expected
    assert expected >= 5 and abs(statistic - (cells - 1)) <= 4 * math.sqrt(2 * (cells - 1))


@pytest.mark.parametrize("seq_len", [1, 5, 17, 63])
def test_random_windows_are_uniform_over_all_starts_and_stay_in_their_shard(seq_len):
    split = make_split(LENGTHS)
    starts = {1_000 * i + s for i, n in enumerate(LENGTHS) for s in range(n) if s + seq_len <= n - 1}
    windows = np.concatenate([split.random_windows(seq_len, 50, 1337, step) for step in range(400)])
    assert windows.shape == (20_000, seq_len + 1) and set(windows[:, 0].tolist()) == starts
    assert (np.diff(windows, axis=1) == 1).all()  # contiguous: within one shard
    assert_uniform(windows[:, 0].tolist(), len(starts))


def test_random_windows_are_uniform_and_independent_over_steps_over_seeds_and_in_a_batch():
    split = make_split((40, 28))  # 36 + 24 starts of windows of 4
    by_step = [int(split.random_windows(4, 1, 5, step)[0, 0]) for step in range(6_000)]
    by_seed = [int(split.random_windows(4, 1, seed, 7)[0, 0]) for seed in range(6_000)]
    in_batch = split.random_windows(4, 6_000, 5, 0)[:, 0].tolist()
    for draws in (by_step, by_seed, in_batch):
        assert_uniform(draws, 60)
        cells = [(token if token < 1_000 else token - 964) // 5 for token in draws]
        assert_uniform(list(itertools.pairwise(cells)), 144)


def test_random_windows_are_a_function_of_seed_and_step_alone():
    split, keys = make_split(LENGTHS), list(itertools.product((0, 1, 1337, 2**31), (0, 1, 2, 99_999)))
    first, again = ([split.random_windows(5, 64, *key).tolist() for key in order] for order in (keys, keys[::-1]))
    assert again[::-1] == first and all(a != b for a, b in itertools.combinations(first, 2))


@pytest.mark.parametrize("seq_len", [1, 4, 5, 17, 30, 63])
def test_fixed_windows_tile_each_shard(seq_len):
    """Windows overlap by one token, so each target is scored once, except a shard's last few."""
    split = make_split(LENGTHS)
    starts = [1_000 * i + start for i, n in enumerate(LENGTHS) for start in range(0, n - seq_len, seq_len)]
    tiling, numbers = [list(range(start, start + seq_len + 1)) for start in starts], split.spread(seq_len)
    assert split.fixed_windows(seq_len, numbers).tolist() == tiling
    assert split.fixed_windows(seq_len, numbers[::-1]).tolist() == tiling[::-1]  # a window depends on its number only


@pytest.mark.parametrize("seq_len, W, cases", [
    (10, 10, {0: 10, 1: 1, 19: 1, 20: 2, 99: 9, 100: 10, 110: 10, 10**15: 10}),
    (1, 108, {n: n for n in (1, 2, 3, 7, 50, 107, 108)})])  # fmt: skip
def test_an_evaluation_scores_n_of_all_W_windows_evenly_spread(seq_len, W, cases):
    """Shards of 39 and 71 tokens hold 3 + 7 windows of length 10, and 38 + 70 windows of length 1."""
    for tokens, n in cases.items():
        even = [math.floor(Fraction(j * W, n)) for j in range(n)]
        assert make_split((39, 71)).spread(seq_len, tokens).tolist() == even


@pytest.mark.parametrize("n, seq_len, most", [(0, 10, 30), (1, 10, 10), (21, 10, 40), (8, 10, 49), (7, 3, 100)])
def test_micro_batches_are_as_few_and_as_equal_as_can_be(n, seq_len, most):
    parts = micro_batches(np.arange(n), seq_len, most)
    sizes = [len(part) for part in parts]
    assert [number for part in parts for number in part] == list(range(n))
    assert not parts or max(sizes) - min(sizes) <= 1 and 0 < max(sizes) * seq_len <= most
    assert not parts or (len(parts) - 1) * (most // seq_len) < n  # one part fewer could not hold them


def write_random(folder: Path, train: tuple = (100, 17, 40), val: tuple = (50, 30)) -> None:
    """Write random tokens in shards of these lengths."""
    random = np.random.default_rng(0)
    train, val = ([random.integers(50257, size=size) for size in sizes] for sizes in (train, val))
    write_dataset(folder, train=train, val=val)


def test_open_dataset_reads_what_was_written(tmp_path):
    write_random(tmp_path)
    dataset = open_dataset(str(tmp_path), 16)
    assert dataset.meta == json.loads((tmp_path / "meta.json").read_text())
    for name, split, n in (("train", dataset.train, 3), ("val", dataset.val, 2)):
        contents = [(tmp_path / f"{name}_{i:05d}.bin").read_bytes() for i in range(n)]
        expected = [[a + 256 * b for a, b in zip(text[::2], text[1::2])] for text in contents]  # little-endian
        assert [shard.tolist() for shard in split.shards] == expected
    assert np.array_equal(dataset.token_bytes, np.load(tmp_path / "token_bytes.npy"))


def test_a_fingerprint_depends_on_the_text_alone(tmp_path):
    write_random(tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())

    def fingerprint(**changes: str) -> str:
        """Return the fingerprint with changes to the first shard's entry."""
        first, *rest = meta["shards"]
        (tmp_path / "meta.json").write_text(json.dumps(meta | {"shards": [first | changes, *rest]}))
        return open_dataset(str(tmp_path), 4).fingerprint
    shutil.copy(tmp_path / "train_00000.bin", tmp_path / "another_name.bin")
    assert fingerprint(file="another_name.bin", note="new") == fingerprint()
    others = {"sha256": "new"}, {"split": "val"}, {"sha256": meta["shards"][1]["sha256"]}
    assert len({fingerprint(), *(fingerprint(**changes) for changes in others)}) == 4


@pytest.mark.parametrize("file, content, words", [  # None removes the file, a number cuts it
    ("meta.json", None, "prepare_wiki.py would make it: .*/meta.json: No such file"),
    ("meta.json", 100, "is damaged"), ("meta.json", b"[]", "is damaged"), ("meta.json", b"{}", "is damaged"),
    ("meta.json", b'{"tokenizer": {}, "splits": {}, "shards": [{}]}', "is damaged"),
    ("token_bytes.npy", None, "/token_bytes.npy: No such file"), ("token_bytes.npy", 1_000, "is damaged"),
    ("val_00001.bin", 32, "is damaged: val_00001.bin"), ("val_00001.bin", bytes(62), "is damaged: val_00001.bin"),
    ("token_bytes.npy", 0, "is damaged"), ("val_00001.bin", None, "/val_00001.bin: No such file")])  # fmt: skip
def test_a_missing_or_damaged_file_is_refused(tmp_path, file, content, words):
    write_random(tmp_path)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(whole[:content] if isinstance(content, int) else content)
    with pytest.raises(UserError, match=f"{tmp_path}.*{words}"):
        open_dataset(str(tmp_path), 16)


@pytest.mark.parametrize("train, val, refused", [((100,), (10, 16), "val"), ((16, 10), (100,), "train")])
def test_each_split_needs_a_window_of_the_longest_length(tmp_path, train, val, refused):
    write_random(tmp_path, train, val)
    with pytest.raises(UserError, match=f"no {refused} shard holds a window of 17 tokens"):
        open_dataset(str(tmp_path), 16)
    open_dataset(str(tmp_path), 15)
