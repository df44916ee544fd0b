"""The plan against design's numbers, and the table against a loop over steps."""

import itertools
import math
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from test_dataset import write_dataset

from config import Config, curriculum9, fixed2048
from curriculum import Curriculum, at_length, expected_ppl, learning_rate, scale_table
from errors import UserError

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


@pytest.mark.parametrize("step, share", [(0, 1), (79_999, 1), (80_000, 1), (90_000, 1 / 2), (99_999, 1 / 20_000)])
def test_the_rate_falls_over_the_last_steps_whatever_the_stage(step, share):
    config = Config(warmup_steps=0, cooldown_steps=20_000, learning_rate=6e-4)
    expected = 6e-4 * NINE.at(step).lr_scale * share
    assert learning_rate(config, NINE.at(step), step) == pytest.approx(expected, rel=1e-12)
    # More than the run: from the first step on, and through a stage's end.
    config = Config(warmup_steps=0, cooldown_steps=200_000, learning_rate=6e-4)
    assert learning_rate(config, NINE.at(step), step) == pytest.approx(
        6e-4 * NINE.at(step).lr_scale * (100_000 - step) / 200_000, rel=1e-12)  # fmt: skip


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
