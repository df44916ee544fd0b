"""The plan against design's numbers and a loop over steps; windows against enumeration and chi-square."""

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from config import Config, UserError, curriculum9, fixed2048
from curriculum import Curriculum, Split, at_length, expected_ppl, learning_rate, open_dataset, scale_table

# What the plan that this project follows says of its table, counted by hand: stage, its tokens and examples.
TOKENS_M = (32.8, 32.8, 65.5, 65.5, 96.8, 114.7, 153.6, 245.8, 819.2)
EXAMPLES_K = (512, 256, 256, 128, 126, 112, 100, 120, 400)
NINE = Curriculum(curriculum9.stages, curriculum9.max_steps)

SMALL = ((0, 8, 5, 2.0), (3, 16, 2, 1.0), (4, 4, 7, 0.5), (10, 16, 3, 0.25))


def row_at(rows: tuple, step: int) -> tuple:
    """By looking at every row."""
    return [row for row in rows if row[0] <= step][-1]


# --------------------------------------------------------------------------------------------------------------------
# What the table of nine stages implies


def test_tokens_and_examples_of_each_stage_are_the_plans():
    assert tuple(round(stage.tokens / 1e6, 1) for stage in NINE.stages) == TOKENS_M
    assert tuple(stage.examples / 1e3 for stage in NINE.stages) == EXAMPLES_K
    assert sum(stage.examples for stage in NINE.stages) == 2_010_000
    assert round(NINE.tokens_before(100_000) / 1e6, 1) == 1_626.6
    ends = {stage.end: examples for stage, examples in zip(NINE.stages, itertools.accumulate(EXAMPLES_K))}
    assert (ends[12_000], ends[35_000]) == (1_152, 1_490)


@pytest.fixture(scope="module")
def plan() -> str:
    """What `python curriculum.py config/curriculum9.py` prints, without thousands' commas."""
    command = [sys.executable, "curriculum.py", "config/curriculum9.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.replace(",", "")


def rows_of(plan: str, first: str) -> list[list[str]]:
    """The cells of the printed lines that start with a word of this pattern."""
    return [line.split() for line in plan.splitlines() if re.match(rf"\s*({first})\s", line)]


def test_printed_rows_are_those_of_the_plan(plan):
    rows = rows_of(plan, "[1-9]")
    ends = [*(row[0] for row in curriculum9.stages[1:]), 100_000]
    assert len(rows) == 9
    for number, (cells, (start, seq_len, batch_size, lr_scale), end) in enumerate(zip(rows, curriculum9.stages, ends)):
        assert cells[:4] == [f"{number + 1}", f"{start}-{end}", f"{seq_len}", f"{batch_size}"]
        lr, per_article, epoch, examples, tokens, epochs, flops, ppl, hours = cells[4:]
        assert float(lr) == pytest.approx(6e-4 * lr_scale, rel=0.05)
        assert float(per_article) == pytest.approx(3_870 / seq_len, abs=0.06)
        assert float(epoch) == round(874e6 / (batch_size * seq_len))
        assert (int(examples), tokens) == (1_000 * EXAMPLES_K[number], f"{TOKENS_M[number]}M")
        assert float(epochs) == pytest.approx(TOKENS_M[number] / 874, abs=6e-4)
        # PaLM's 6 N + 12 L C T, N being what is multiplied: 12 blocks and the head
        expected = TOKENS_M[number] * 1e6 * (6 * 123_568_128 + 12 * 12 * 768 * seq_len)
        assert float(flops) == pytest.approx(expected, rel=0.05)
        assert float(hours) == pytest.approx(expected / (0.15 * 165.2e12) / 3600, rel=0.01)
    assert [cells[6] for cells in rows].count("53345") == 7


def test_printed_totals_are_those_of_the_plan(plan):
    assert "100000 steps of a GPT with 123.6M parameters" in plan
    assert "225870 training articles 874.0M tokens. Hours on an RTX 4090 at 0.15 of its peak." in plan
    total = re.search(r"In all (\d+) examples (.+)M tokens \((.+) epochs\) (.+) FLOPs (.+) hours", plan)
    examples, tokens, epochs, flops, hours = map(float, total.groups())
    assert (examples, tokens, epochs) == (2_010_000, 1_626.6, 1.86)
    assert flops == pytest.approx(1.5e18, rel=0.01)
    assert hours == pytest.approx(17, abs=0.5)
    assert "The curriculum sees 2.53x as many examples" in plan
    assert re.search(r"windows of 2048 throughout: 794250 examples", plan)  # 1,626,624,000 / 2,048
    (foundation,), (comprehension,), (mastery,) = (rows_of(plan, p) for p in ("foundation", "comprehension", "mastery"))
    assert [row[1] for row in (foundation, comprehension, mastery)] == ["12000", "35000", "100000"]
    assert [row[3] for row in (foundation, comprehension, mastery)] == ["1152000", "1490000", "2010000"]
    assert [float(row[2]) for row in (foundation, comprehension, mastery)] == pytest.approx([2, 6, 17], rel=0.2)
    assert "Never reached" not in plan


def test_plan_of_a_dataset_at_a_measured_speed(run_program, tmp_path):
    write_dataset(tmp_path, {"train": [9_000, 4_000], "val": [3_000]}, articles=13)
    done = run_program("curriculum.py", "config/curriculum9.py", f"--data_dir={tmp_path}", "--speed=130000")
    assert "13 training articles, 13.0k tokens. Hours at 130000 tokens/s." in done.stdout
    hours = re.search(r"([\d.]+) hours\.\nThe same", done.stdout)
    assert float(hours[1]) == pytest.approx(1_626_624_000 / 130_000 / 3_600, rel=0.01)


def test_rows_that_are_never_reached_are_said(run_program):
    done = run_program("curriculum.py", "config/curriculum9.py", "--max_steps=15000")
    assert [line for line in done.stdout.splitlines() if line.startswith("Never reached with max_steps=15000")] == [
        f"Never reached with max_steps=15000: {row}" for row in curriculum9.stages[5:]
    ]
    assert re.search(r"\n5 +12,000-15,000 ", done.stdout) and not re.search(r"\n6 ", done.stdout)
    assert "In all 1,215,000 examples, 245.0M tokens" in done.stdout  # 1,152k and 3,000 batches of 21


def test_phases_are_not_said_to_go_on_after_the_run(run_program):
    done = run_program("curriculum.py", "config/curriculum9.py", "--max_steps=15000")
    rows = rows_of(done.stdout.replace(",", ""), "foundation|comprehension|mastery")
    assert rows[0][:2] == ["foundation", "12000"]
    assert all(int(cells[1]) <= 15_000 for cells in rows if cells[1].isdigit())


# --------------------------------------------------------------------------------------------------------------------
# The table, step by step


BOUNDARIES = [0, *itertools.chain(*((s - 1, s, s + 1) for s, *_ in curriculum9.stages[1:])), 99_999]


@pytest.mark.parametrize("step", BOUNDARIES)
def test_stage_at_and_beside_its_boundaries(step):
    row = row_at(curriculum9.stages, step)
    stage = NINE.at(step)
    assert (stage.start, stage.seq_len, stage.batch_size, stage.lr_scale) == row
    assert NINE.index(step) == curriculum9.stages.index(row)
    assert NINE.stages[NINE.index(step)] == stage


@pytest.mark.parametrize("rows, max_steps", [(curriculum9.stages, 100_000), (SMALL, 13), (SMALL, 10), (SMALL, 11)])
def test_tokens_and_ends_of_stages_are_those_of_a_loop_over_steps(rows, max_steps):
    curriculum = Curriculum(rows, max_steps)
    tokens = 0
    for step in range(max_steps):
        if step % 997 in (0, 3, 4, 5, 10) or max_steps < 100:
            assert curriculum.tokens_before(step) == tokens
        ends = step > 0 and row_at(rows, step) != row_at(rows, step - 1)
        assert curriculum.ends_stage(step) == ends
        tokens += row_at(rows, step)[1] * row_at(rows, step)[2]
    assert curriculum.tokens_before(max_steps) == tokens == sum(stage.tokens for stage in curriculum.stages)
    assert curriculum.ends_stage(max_steps)


def test_a_run_that_ends_early_has_the_stages_that_it_reaches():
    for max_steps, reached in ((1, 1), (3, 1), (4, 2), (5, 3), (10, 3), (11, 4), (1_000, 4)):
        curriculum = Curriculum(SMALL, max_steps)
        assert [stage[0] for stage in curriculum.stages] == [row[0] for row in SMALL[:reached]]
        assert curriculum.stages[-1].end == max_steps
        assert (curriculum.last_len, curriculum.max_len) == (16, 16)  # of the table, reached or not
    unsorted = Curriculum(((0, 64, 1, 1.0), (5, 8, 1, 1.0)), 10)
    assert (unsorted.last_len, unsorted.max_len) == (8, 64)


@pytest.mark.parametrize(
    "warmup_steps, step, expected",
    [
        (200, 0, 6e-4 * 11.3 / 200),
        (200, 99, 6e-4 * 11.3 / 2),
        (200, 198, 6e-4 * 11.3 * 199 / 200),
        (200, 199, 6e-4 * 11.3),
        (200, 200, 6e-4 * 11.3),
        (200, 1_999, 6e-4 * 11.3),
        (200, 2_000, 6e-4 * 7.0),
        (200, 49_999, 6e-4 * 0.4),
        (200, 50_000, 6e-4 * 0.3),
        (200, 99_999, 6e-4 * 0.3),
        (0, 0, 6e-4 * 11.3),
        (1, 0, 6e-4 * 11.3),
        (4_000, 1_999, 6e-4 * 11.3 / 2),
        (4_000, 2_999, 6e-4 * 7.0 * 3 / 4),  # a warmup longer than the first stage goes on through the second
    ],
)
def test_learning_rate(warmup_steps, step, expected):
    config = Config(warmup_steps=warmup_steps, learning_rate=6e-4)
    assert learning_rate(config, NINE.at(step), step) == pytest.approx(expected, rel=1e-12)


GOOD = (0, 64, 4, 1.0)


@pytest.mark.parametrize(
    "rows, max_steps, said",
    [
        ((), 10, "stages is empty"),
        ((GOOD,), 0, "max_steps=0"),
        ((GOOD,), -5, "max_steps=-5"),
        ((GOOD, 5), 10, r"row 2: 5 "),
        (("0, 64, 4, 1.0",), 10, r"row 1"),
        ((GOOD, (5, 64, 4)), 10, r"row 2: \(5, 64, 4\)"),
        ((GOOD, (5, 64, 4, 1.0, 1)), 10, r"row 2: \(5, 64, 4, 1.0, 1\)"),
        ((GOOD, (5.0, 64, 4, 1.0)), 10, r"row 2: \(5.0, "),
        ((GOOD, (5, "64", 4, 1.0)), 10, r"row 2: \(5, '64'"),
        ((GOOD, (5, 64, True, 1.0)), 10, r"row 2"),
        ((GOOD, (5, 64, 4, "1")), 10, r"row 2"),
        ((GOOD, (5, 64, 4, None)), 10, r"row 2"),
        ((GOOD, (5, 0, 4, 1.0)), 10, r"row 2.*positive"),
        ((GOOD, (5, 64, 4, 1.0), (6, 64, -4, 1.0)), 10, r"row 3.*positive"),
        (((0, 64, 4, 0.0),), 10, r"row 1.*positive"),
        (((0, 64, 4, math.nan),), 10, r"row 1.*positive"),
        (((0, 64, 4, math.inf),), 10, r"row 1.*positive"),
        (((1, 64, 4, 1.0),), 10, r"row 1.*step 0"),
        (((-1, 64, 4, 1.0), (0, 64, 4, 1.0)), 10, r"row 1.*step 0"),
        ((GOOD, (5, 64, 4, 1.0), (5, 32, 4, 1.0)), 10, r"row 3.*after step 5"),
        ((GOOD, (7, 64, 4, 1.0), (5, 32, 4, 1.0)), 10, r"row 3.*after step 7"),
        ((GOOD, (2_000, 64, 4, 1.0), (5, 32, 4, 1.0)), 10, r"row 3.*after step 2,000"),  # also where never reached
    ],
)
def test_a_table_that_makes_no_sense_is_refused_by_its_row(rows, max_steps, said):
    with pytest.raises(UserError, match=said):
        Curriculum(rows, max_steps)


def test_scale_table_scales_steps_and_batches_and_nothing_else():
    scaled = scale_table(curriculum9.stages, steps=1 / 500, tokens=1 / 4)
    for row, (step, seq_len, batch_size, lr_scale) in zip(curriculum9.stages, scaled, strict=True):
        assert (seq_len, lr_scale) == (row[1], row[3])
        assert (type(step), type(batch_size)) == (int, int)
        assert step == row[0] // 500
        assert abs(batch_size - max(1, row[2] / 4)) <= 0.5
    assert scale_table(curriculum9.stages, 1, 1) == curriculum9.stages
    assert {row[2] for row in scale_table(curriculum9.stages, 1, 1e-6)} == {1}
    assert [row[0] for row in scale_table(SMALL, 100, 1)] == [0, 300, 400, 1_000]
    with pytest.raises(UserError, match="row 2"):  # scaled so far that two rows start at once
        Curriculum(scale_table(SMALL, 0.1, 1), 10)


def test_at_length_has_the_same_learning_rate_after_the_same_tokens():
    rows, max_steps = at_length(curriculum9.stages, 100_000, seq_len=512, batch_size=20)
    same = Curriculum(rows, max_steps)
    assert {row[1:3] for row in rows} == {(512, 20)}
    assert abs(same.tokens_before(max_steps) - 1_626_624_000) <= 512 * 20 / 2
    for step, row in ((0, 0), (2_001, 1), (3_999, 1), (7_000, 2), (13_000, 4), (34_990, 6), (50_010, 8), (99_990, 8)):
        assert same.at(NINE.tokens_before(step) // (512 * 20)).lr_scale == curriculum9.stages[row][3]


def test_fixed2048_is_curriculum9_in_windows_of_2048():
    assert fixed2048.max_steps == 99_281  # of 16,384 tokens; 1,626,624,000 tokens make 99,281.25
    assert [row[3] for row in fixed2048.stages] == [row[3] for row in curriculum9.stages]
    assert fixed2048.stages[4] == (12_000, 2_048, 8, 1.0)  # so far all batches had 16,384 tokens
    assert fixed2048.stages[-1] == (99_281 - 50_000, 2_048, 8, 0.3)  # from here they have again


# --------------------------------------------------------------------------------------------------------------------
# What the plan expects


def test_expected_ppl_is_linear_in_the_logarithms():
    points = tuple((step, 7.0e5 * step**-0.8) for step in (100, 1_000, 3_000, 50_000))  # a power law is a line there
    for step in (100, 101, 500, 999, 1_000, 2_500, 3_000, 30_000, 50_000):
        assert expected_ppl(points, step) == pytest.approx(7.0e5 * step**-0.8, rel=1e-9)
    assert expected_ppl(((10, 400), (1_000, 4)), 100) == pytest.approx(40)  # halfway in both
    assert expected_ppl(((10, 400), (1_000, 4), (100_000, 1)), 10_000) == pytest.approx(2)


def test_expected_ppl_says_nothing_before_the_first_point_or_without_any():
    assert expected_ppl(curriculum9.plan_ppl, 0) is None
    assert expected_ppl(curriculum9.plan_ppl, 1_999) is None
    assert expected_ppl((), 5_000) is None


def test_expected_ppl_of_the_nine_stages_meets_the_plans_points_and_bounds():
    points = {2: 5_000, 5: 1_000, 10: 300, 15: 150, 20: 80, 30: 50, 50: 35, 100: 25}
    assert {step: expected_ppl(curriculum9.plan_ppl, 1_000 * step) for step in points} == pytest.approx(points)
    assert expected_ppl(curriculum9.plan_ppl, 12_000) < 500
    assert expected_ppl(curriculum9.plan_ppl, 35_000) < 50


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


FOUR_TO_SIXTEEN = Curriculum(SMALL, 13)


@pytest.fixture
def dataset_dir(tmp_path) -> Path:
    write_dataset(tmp_path, {"train": [100, 17, 40], "val": [50, 30]})
    return tmp_path


def test_open_dataset_reads_what_was_written(dataset_dir):
    dataset = open_dataset(str(dataset_dir), FOUR_TO_SIXTEEN)
    assert dataset.meta == json.loads((dataset_dir / "meta.json").read_text())
    for split, files in ((dataset.train, ("train_00000", "train_00001", "train_00002")),
                         (dataset.val, ("val_00000", "val_00001"))):  # fmt: skip
        contents = [list(memoryview((dataset_dir / f"{file}.bin").read_bytes()).cast("H")) for file in files]
        assert [shard.tolist() for shard in split.shards] == contents
    assert np.array_equal(dataset.token_bytes, np.load(dataset_dir / "token_bytes.npy"))
    first = np.fromfile(dataset_dir / "train_00000.bin", "<u2", 17)
    assert np.array_equal(dataset.train.fixed_windows(16, np.array([0]))[0], first)


def test_open_dataset_reads_the_sample(sample_dir):
    dataset = open_dataset(str(sample_dir), NINE)
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
        open_dataset(str(dataset_dir), FOUR_TO_SIXTEEN)
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
        open_dataset(str(tmp_path), FOUR_TO_SIXTEEN)


def test_open_dataset_takes_a_split_with_a_single_window(tmp_path):
    write_dataset(tmp_path, {"train": [3, 17], "val": [17]})
    dataset = open_dataset(str(tmp_path), FOUR_TO_SIXTEEN)
    whole = np.fromfile(tmp_path / "train_00001.bin", "<u2").tolist()
    assert dataset.train.random_windows(16, 3, 1, 1).tolist() == [whole] * 3
    assert dataset.val.count(16, 0) == 1
