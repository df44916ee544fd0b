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

from dataset import Split, open_dataset
from errors import UserError

# --------------------------------------------------------------------------------------------------------------------
# Windows. Each token of these shards is unlike all others, so a window's tokens say where it is.

LENGTHS = (5, 31, 1, 18, 6, 64, 2)


def make_split(lengths: tuple[int, ...]) -> Split:
    """Shard i holds 1000 * i, 1000 * i + 1, ..."""
    return Split([np.arange(1_000 * i, 1_000 * i + n, dtype=np.uint16) for i, n in enumerate(lengths)])


def all_starts(lengths: tuple[int, ...], seq_len: int) -> list[int]:
    """First tokens of all windows of seq_len + 1 tokens: those whose last token is still in the shard."""
    return [1_000 * i + s for i, n in enumerate(lengths) for s in range(n) if s + seq_len <= n - 1]


def assert_plausible(counts: list[int], cells: int) -> None:
    """Pearson's chi-square of counts that should be uniform over so many cells is within 4 standard deviations of
    its mean, from above and from below (evenly spread is not random either)."""
    expected = sum(counts) / cells
    statistic = sum((count - expected) ** 2 / expected for count in counts) + (cells - len(counts)) * expected
    df = cells - 1
    assert expected >= 5
    assert abs(statistic - df) < 4 * math.sqrt(2 * df)


@pytest.mark.parametrize("seq_len", [1, 5, 17, 63])
def test_random_windows_are_uniform_over_all_starts_and_stay_in_their_shard(seq_len):
    split, starts = make_split(LENGTHS), all_starts(LENGTHS, seq_len)
    windows = np.concatenate([split.random_windows(seq_len, 50, 1337, step) for step in range(400)])
    assert windows.shape == (20_000, seq_len + 1)
    assert (np.diff(windows, axis=1) == 1).all()  # contiguous: within one shard
    counts = Counter(windows[:, 0].tolist())
    assert set(counts) == set(starts)
    if len(starts) > 1:
        assert_plausible(list(counts.values()), len(starts))


def test_random_windows_are_uniform_over_steps_and_over_seeds_and_independent_from_step_to_step():
    split, starts = make_split((40, 28)), all_starts((40, 28), 4)
    cells = {start: number * 12 // len(starts) for number, start in enumerate(starts)}
    assert len(starts) == 60
    by_step = [int(split.random_windows(4, 1, 5, step)[0, 0]) for step in range(6_000)]
    by_seed = [int(split.random_windows(4, 1, seed, 7)[0, 0]) for seed in range(6_000)]
    for draws in (by_step, by_seed):
        assert_plausible(list(Counter(draws).values()), 60)
        pairs = Counter((cells[a], cells[b]) for a, b in itertools.pairwise(draws))
        assert_plausible(list(pairs.values()), 144)
    in_batch = split.random_windows(4, 6_000, 5, 0)[:, 0].tolist()
    assert_plausible(list(Counter((cells[a], cells[b]) for a, b in itertools.pairwise(in_batch)).values()), 144)


def test_random_windows_are_a_function_of_seed_and_step_alone():
    split = make_split(LENGTHS)
    keys = [(seed, step) for seed in (0, 1, 1337, 2**31) for step in (0, 1, 2, 99_999)]
    first = {key: split.random_windows(5, 64, *key) for key in keys}
    np.random.seed(1)  # the global generator has no part in it
    for key in reversed(keys):
        assert np.array_equal(make_split(LENGTHS).random_windows(5, 64, *key), first[key])
    for a, b in itertools.combinations(keys, 2):
        assert not np.array_equal(first[a], first[b]), (a, b)


def test_tokens_come_out_as_the_ids_that_they_are():
    split = Split([np.array([0, 1, 32_767, 32_768, 50_256, 65_535], np.uint16)])
    assert split.fixed_windows(5, np.array([0])).tolist() == [[0, 1, 32_767, 32_768, 50_256, 65_535]]
    assert split.random_windows(5, 2, 0, 0).tolist() == 2 * [[0, 1, 32_767, 32_768, 50_256, 65_535]]


@pytest.mark.parametrize("seq_len", [1, 4, 5, 17, 30, 63])
def test_fixed_windows_score_each_target_once(seq_len):
    split = make_split(LENGTHS)
    tiling = []  # by walking through the shards
    for i, n in enumerate(LENGTHS):
        start = 0
        while start + seq_len < n:
            tiling.append(list(range(1_000 * i + start, 1_000 * i + start + seq_len + 1)))
            start += seq_len
    n = split.count(seq_len, 0)
    windows = split.fixed_windows(seq_len, np.arange(n))
    assert windows.tolist() == tiling
    assert split.fixed_windows(seq_len, np.arange(n)[::-1]).tolist() == tiling[::-1]  # each by its number alone
    targets = Counter(windows[:, 1:].flatten().tolist())
    assert set(targets.values()) == {1}
    for i, length in enumerate(LENGTHS):  # all but a shard's first token and a rest that fills no window
        scored = sum(token // 1_000 == i for token in targets)
        assert length - 1 - seq_len < scored <= length - 1
        assert all(1_000 * i + position in targets for position in range(1, scored + 1))


@pytest.mark.parametrize(
    "seq_len, eval_tokens, expected",
    [
        (10, 0, 10),  # 3 + 7 windows tile shards of 39 and 71 tokens
        (10, 1, 1),
        (10, 9, 1),
        (10, 19, 1),
        (10, 20, 2),
        (10, 99, 9),
        (10, 100, 10),
        (10, 110, 10),
        (10, 10**15, 10),
        (38, 0, 2),
        (39, 0, 1),
        (70, 0, 1),
        (70, 5, 1),
        (1, 0, 108),
    ],
)
def test_count_of_windows_that_an_evaluation_scores(seq_len, eval_tokens, expected):
    assert make_split((39, 71)).count(seq_len, eval_tokens) == expected


@pytest.mark.parametrize("n", [1, 2, 3, 7, 50, 107, 108])
def test_spread_is_the_floor_of_even_fractions(n):
    numbers = make_split((39, 71)).spread(1, n)
    assert numbers.tolist() == [math.floor(Fraction(j * 108, n)) for j in range(n)]
    assert len(set(numbers.tolist())) == n


# --------------------------------------------------------------------------------------------------------------------
# A dataset on disk


def write_dataset(folder: Path, lengths: dict[str, list[int]], articles: int = 1) -> dict:
    """Random tokens in shards of these lengths, in the format that prepare_wiki.py writes; gives meta.json."""
    rng = np.random.default_rng(0)
    meta = {"tokenizer": {"name": "gpt2", "vocab_size": 50257}, "splits": {}, "shards": []}
    for split, sizes in lengths.items():
        meta["splits"][split] = {"articles": articles, "tokens": sum(sizes), "bytes": 4 * sum(sizes)}
        for number, size in enumerate(sizes):
            file = f"{split}_{number:05d}.bin"
            rng.integers(50257, size=size).astype("<u2").tofile(folder / file)
            meta["shards"].append({"file": file, "split": split, "tokens": size, "sha256": ""})
    np.save(folder / "token_bytes.npy", rng.integers(9, size=50257).astype(np.uint16))
    (folder / "meta.json").write_text(json.dumps(meta))
    return meta


@pytest.fixture
def dataset_dir(tmp_path) -> Path:
    write_dataset(tmp_path, {"train": [100, 17, 40], "val": [50, 30]})
    return tmp_path


def test_open_dataset_reads_what_was_written(dataset_dir):
    dataset = open_dataset(str(dataset_dir), 16)
    assert dataset.meta == json.loads((dataset_dir / "meta.json").read_text())
    for split, files in ((dataset.train, ("train_00000", "train_00001", "train_00002")),
                         (dataset.val, ("val_00000", "val_00001"))):  # fmt: skip
        contents = [list(memoryview((dataset_dir / f"{file}.bin").read_bytes()).cast("H")) for file in files]
        assert [shard.tolist() for shard in split.shards] == contents
    assert np.array_equal(dataset.token_bytes, np.load(dataset_dir / "token_bytes.npy"))
    first = np.fromfile(dataset_dir / "train_00000.bin", "<u2", 17)
    assert np.array_equal(dataset.train.fixed_windows(16, np.array([0]))[0], first)


def test_open_dataset_reads_the_sample(sample_dir):
    dataset = open_dataset(str(sample_dir), 2048)
    for name, split in (("train", dataset.train), ("val", dataset.val)):
        counts = dataset.meta["splits"][name]
        tokens = np.concatenate(split.shards)
        assert (len(tokens), (tokens == 50256).sum()) == (counts["tokens"], counts["articles"])
        # Bytes as meta.json counts them are of the articles' text, and each token knows its own.
        assert dataset.token_bytes[tokens].sum() == counts["bytes"]


def change_meta(**changes):
    """Damage: the first shard's entry in meta.json is changed."""

    def damage(folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        meta["shards"][0].update(changes)
        (folder / "meta.json").write_text(json.dumps(meta))

    return damage


def cut(name: str, size: int):
    def damage(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return damage


@pytest.mark.parametrize(
    "damage, said",
    [
        (shutil.rmtree, r"is not a dataset \(no meta.json in it\): make one with prepare_wiki.py"),
        (lambda folder: (folder / "meta.json").unlink(), r"is not a dataset \(no meta.json in it\)"),
        (cut("meta.json", 100), "is damaged: JSONDecodeError"),
        (lambda folder: (folder / "meta.json").write_text("[]"), "is damaged"),
        (lambda folder: (folder / "meta.json").write_text("{}"), "is damaged: KeyError.*shards"),
        (lambda folder: (folder / "token_bytes.npy").unlink(), "is damaged: FileNotFoundError.*token_bytes"),
        (cut("token_bytes.npy", 1_000), "is damaged"),
        (cut("token_bytes.npy", 0), "is damaged"),
        (lambda folder: np.save(folder / "token_bytes.npy", np.ones(9)), "token_bytes"),
        (change_meta(tokens="100"), "is damaged"),
        (cut("train_00001.bin", 32), "train_00001.bin has 32 bytes, not the 34 that meta.json says"),
        (cut("val_00000.bin", 99), "val_00000.bin has 99 bytes, not the 100 "),
        (cut("val_00001.bin", 0), "val_00001.bin has 0 bytes, not the 60 "),
        (lambda folder: (folder / "train_00002.bin").unlink(), "train_00002.bin"),
        (lambda folder: (folder / "val_00001.bin").write_bytes(bytes(62)), "val_00001.bin has 62 bytes, not the 60 "),
        (change_meta(tokens=101), "train_00000.bin has 200 bytes, not the 202 "),
        (change_meta(split="test"), "is damaged"),
    ],
)
def test_open_dataset_refuses_what_is_missing_or_damaged(dataset_dir, damage, said):
    damage(dataset_dir)
    with pytest.raises(UserError, match=said) as refusal:
        open_dataset(str(dataset_dir), 16)
    assert str(dataset_dir) in str(refusal.value)


@pytest.mark.parametrize(
    "lengths, said",
    [
        ({"train": [100], "val": []}, "no val shard holds a window of 17 tokens"),
        ({"train": [100], "val": [16, 16, 16]}, "no val shard holds a window of 17 tokens"),
        ({"train": [16, 10], "val": [100]}, "no train shard holds a window of 17 tokens"),
    ],
)
def test_open_dataset_refuses_a_split_without_a_window_of_the_longest_length(tmp_path, lengths, said):
    write_dataset(tmp_path, lengths)
    with pytest.raises(UserError, match=said):
        open_dataset(str(tmp_path), 16)


def test_open_dataset_takes_a_split_with_a_single_window(tmp_path):
    write_dataset(tmp_path, {"train": [3, 17], "val": [17]})
    dataset = open_dataset(str(tmp_path), 16)
    whole = np.fromfile(tmp_path / "train_00001.bin", "<u2").tolist()
    assert dataset.train.random_windows(16, 3, 1, 1).tolist() == [whole] * 3
    assert dataset.val.count(16, 0) == 1
