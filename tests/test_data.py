"""Windows against enumeration and chi-square; datasets as they are, and damaged in every file."""

import itertools
import json
import math
import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from data import Split, micro_batches, open_dataset
from settings import UserError

LENGTHS = (5, 31, 1, 18, 6, 64, 2)


def make_split(lengths: tuple[int, ...]) -> Split:
    """Make a split whose shard i holds 1000 * i, 1000 * i + 1, ...: each token says where it is."""
    return Split([np.arange(1_000 * i, 1_000 * i + n, dtype=np.uint16) for i, n in enumerate(lengths)])


def assert_uniform(draws: list, cells: int) -> None:
    """Pearson's chi-square is within 4 standard deviations of its mean, on both sides: even is not random either."""
    counts, expected = Counter(draws).values(), len(draws) / cells
    statistic = sum((count - expected) ** 2 / expected for count in counts) + (cells - len(counts)) * expected
    assert expected >= 5
    assert abs(statistic - (cells - 1)) <= 4 * math.sqrt(2 * (cells - 1))


@pytest.mark.parametrize("seq_len", [1, 5, 17, 63])
def test_random_windows_are_uniform_over_all_starts_and_stay_in_their_shard(seq_len):
    split = make_split(LENGTHS)
    starts = {1_000 * i + s for i, n in enumerate(LENGTHS) for s in range(n) if s + seq_len <= n - 1}
    windows = np.concatenate([split.random_windows(seq_len, 50, 1337, step) for step in range(400)])
    assert windows.shape == (20_000, seq_len + 1)
    assert (np.diff(windows, axis=1) == 1).all()  # contiguous: within one shard
    assert set(windows[:, 0].tolist()) == starts
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
    split = make_split(LENGTHS)
    keys = [(seed, step) for seed in (0, 1, 1337, 2**31) for step in (0, 1, 2, 99_999)]
    first = {key: split.random_windows(5, 64, *key) for key in keys}
    for key in reversed(keys):
        assert np.array_equal(make_split(LENGTHS).random_windows(5, 64, *key), first[key])
    for a, b in itertools.combinations(keys, 2):
        assert not np.array_equal(first[a], first[b]), (a, b)


@pytest.mark.parametrize("seq_len", [1, 4, 5, 17, 30, 63])
def test_fixed_windows_score_each_target_once(seq_len):
    split = make_split(LENGTHS)
    tiling = []  # by walking through the shards
    for i, n in enumerate(LENGTHS):
        for start in range(0, n - seq_len, seq_len):
            tiling.append(list(range(1_000 * i + start, 1_000 * i + start + seq_len + 1)))
    numbers = np.arange(split.count(seq_len))
    windows = split.fixed_windows(seq_len, numbers)
    assert windows.tolist() == tiling
    assert split.fixed_windows(seq_len, numbers[::-1]).tolist() == tiling[::-1]  # each by its number alone
    targets = Counter(windows[:, 1:].flatten().tolist())
    assert set(targets.values()) == {1}
    for i, n in enumerate(LENGTHS):  # all but a shard's first token and a rest that fills no window
        scored = [token - 1_000 * i for token in targets if token // 1_000 == i]
        assert scored == list(range(1, len(scored) + 1)) and n - 1 - seq_len < len(scored) <= n - 1


@pytest.mark.parametrize("seq_len, tokens, expected", [
    (10, 0, 10), (10, 1, 1), (10, 19, 1), (10, 20, 2), (10, 99, 9), (10, 100, 10), (10, 110, 10), (10, 10**15, 10),
    (38, 0, 2), (39, 0, 1), (70, 0, 1), (70, 5, 1), (1, 0, 108),
])  # fmt: skip
def test_count_of_windows_that_an_evaluation_scores(seq_len, tokens, expected):
    """3 + 7 windows of 10 tile shards of 39 and 71 tokens."""
    assert make_split((39, 71)).count(seq_len, tokens) == expected


def test_spread_is_the_floor_of_even_fractions():
    for n in (1, 2, 3, 7, 50, 107, 108):
        assert make_split((39, 71)).spread(1, n).tolist() == [math.floor(Fraction(j * 108, n)) for j in range(n)]


@pytest.mark.parametrize("n, seq_len, most", [(0, 10, 30), (1, 10, 10), (21, 10, 40), (8, 10, 49), (7, 3, 100)])
def test_micro_batches_are_as_few_and_as_equal_as_can_be(n, seq_len, most):
    parts = micro_batches(np.arange(n), seq_len, most)
    sizes = [len(part) for part in parts]
    assert [number for part in parts for number in part] == list(range(n))
    assert not parts or max(sizes) - min(sizes) <= 1 and 0 < max(sizes) * seq_len <= most
    assert not parts or (len(parts) - 1) * (most // seq_len) < n  # one part fewer could not hold them


def write_dataset(folder: Path, lengths: dict[str, list[int]], articles: int = 1) -> None:
    """Write random tokens in shards of these lengths, in the format of prepare_wiki.py."""
    rng = np.random.default_rng(0)
    meta = {"tokenizer": {"name": "gpt2", "vocab_size": 50257}, "splits": {}, "shards": []}
    for split, sizes in lengths.items():
        meta["splits"][split] = {"articles": articles, "tokens": sum(sizes), "bytes": 4 * sum(sizes)}
        for number, size in enumerate(sizes):
            file = f"{split}_{number:05d}.bin"
            rng.integers(50257, size=size).astype("<u2").tofile(folder / file)
            meta["shards"].append({"file": file, "split": split, "tokens": size, "sha256": f"{split}{number}"})
    np.save(folder / "token_bytes.npy", rng.integers(9, size=50257).astype(np.uint16))
    (folder / "meta.json").write_text(json.dumps(meta))


@pytest.fixture
def dataset_dir(tmp_path) -> Path:
    (tmp_path / "dataset").mkdir()
    write_dataset(tmp_path / "dataset", {"train": [100, 17, 40], "val": [50, 30]})
    return tmp_path / "dataset"


def test_open_dataset_reads_what_was_written(dataset_dir):
    (dataset_dir / "val_00001.bin").write_bytes(np.array([0, 1, 32_768, 50_256, 65_535, *range(25)], "<u2").tobytes())
    dataset = open_dataset(str(dataset_dir), 16)
    assert dataset.meta == json.loads((dataset_dir / "meta.json").read_text())
    for name, split, n in (("train", dataset.train, 3), ("val", dataset.val, 2)):
        contents = [(dataset_dir / f"{name}_{i:05d}.bin").read_bytes() for i in range(n)]
        expected = [[a + 256 * b for a, b in zip(text[::2], text[1::2])] for text in contents]  # little-endian
        assert [shard.tolist() for shard in split.shards] == expected
        assert split.fixed_windows(16, np.array([0])).tolist() == [expected[0][:17]]
    assert np.array_equal(dataset.token_bytes, np.load(dataset_dir / "token_bytes.npy"))


def change_shard(folder: Path, **changes) -> None:
    """Change the first shard's entry in meta.json."""
    meta = json.loads((folder / "meta.json").read_text())
    meta["shards"][0].update(changes)
    (folder / "meta.json").write_text(json.dumps(meta))


def test_a_fingerprint_is_of_the_text_alone(dataset_dir, tmp_path):
    first = open_dataset(str(dataset_dir), 16).fingerprint
    moved = shutil.copytree(dataset_dir, tmp_path / "moved")
    (moved / "train_00000.bin").rename(moved / "another_name.bin")
    change_shard(moved, file="another_name.bin", note="new")
    assert open_dataset(f"{moved}/", 4).fingerprint == first
    seen = {first}
    for changes in ({"sha256": "other"}, {"split": "val"}, {"sha256": "train1"}):
        change_shard(shutil.copytree(dataset_dir, tmp_path / str(len(seen))), **changes)
        seen.add(open_dataset(str(tmp_path / str(len(seen))), 16).fingerprint)
    assert len(seen) == 4


@pytest.mark.parametrize("file, content, said", [  # None removes the file, a number cuts it, {} makes a folder of it
    ("meta.json", None, "is not a dataset: it has no meta.json; make one with prepare_wiki.py"),
    ("meta.json", {}, "/meta.json: Is a directory"), ("meta.json", 100, "meta.json is damaged"),
    ("meta.json", b"[]", "meta.json is damaged"), ("meta.json", b"{}", "meta.json is damaged: keys are missing"),
    ("meta.json", b'{"tokenizer": {}, "splits": {}, "shards": [{}]}', "is damaged"),
    ("token_bytes.npy", None, "/token_bytes.npy: No such file"), ("token_bytes.npy", {}, "npy: Is a directory"),
    ("token_bytes.npy", 1_000, "is damaged"), ("token_bytes.npy", 0, "is damaged"),
    ("train_00002.bin", None, "/train_00002.bin: No such file"), ("train_00001.bin", 32, "is damaged: train_00001.bin"),
    ("val_00001.bin", 0, "is damaged: val_00001.bin"), ("val_00001.bin", bytes(62), "is damaged: val_00001.bin"),
])  # fmt: skip
def test_open_dataset_refuses_what_is_missing_or_damaged_and_says_which(dataset_dir, file, content, said):
    path = dataset_dir / file
    path.rename(moved := dataset_dir / "moved")
    if content == {}:
        path.mkdir()
    elif content is not None:
        path.write_bytes(moved.read_bytes()[:content] if isinstance(content, int) else content)
    with pytest.raises(UserError, match=f"{dataset_dir}.*{said}") as refusal:
        open_dataset(str(dataset_dir), 16)
    assert ("damaged" in str(refusal.value)) == ("damaged" in said)


@pytest.mark.parametrize("train, val, refused", [([100], [10, 16], "val"), ([16, 10], [100], "train")])
def test_open_dataset_wants_a_window_of_the_longest_length_in_each_split(tmp_path, train, val, refused):
    write_dataset(tmp_path, {"train": train, "val": val})
    with pytest.raises(UserError, match=f"no {refused} shard holds a window of 17 tokens"):
        open_dataset(str(tmp_path), 16)
    assert open_dataset(str(tmp_path), 9).val.count(9) > 0
