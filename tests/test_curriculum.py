"""The plan against design.md's numbers, and the table against a loop over steps."""

import itertools
import math
import re

import pytest
from conftest import call_program
from test_data import write_dataset

from config import curriculum9, fixed2048
from curriculum import Curriculum, at_length, expected_ppl, learning_rate, scale_table
from settings import Config, UserError

# What the plan that this project follows implies of its table, counted by hand: each stage's tokens and examples.
TOKENS_M = (32.8, 32.8, 65.5, 65.5, 96.8, 114.7, 153.6, 245.8, 819.2)
EXAMPLES_K = (512, 256, 256, 128, 126, 112, 100, 120, 400)
NINE = Curriculum(curriculum9.stages, curriculum9.max_steps)

SMALL = ((0, 8, 5, 2.0), (3, 16, 2, 1.0), (4, 4, 7, 0.5), (10, 4, 3, 0.25))


def print_plan(*arguments: object) -> str:
    """Return what curriculum.py prints about config/curriculum9.py, without thousands' commas."""
    done = call_program("curriculum.py", "config/curriculum9.py", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.replace(",", "")


def rows_of(plan: str, first: str) -> list[list[str]]:
    """Return the cells of printed lines by the pattern of their first word."""
    return [line.split() for line in plan.splitlines() if re.match(rf"\s*({first})\s", line)]


def test_tokens_and_examples_of_each_stage_are_the_plans():
    assert tuple(round(stage.tokens / 1e6, 1) for stage in NINE.stages) == TOKENS_M
    assert tuple(stage.examples / 1e3 for stage in NINE.stages) == EXAMPLES_K
    assert round(NINE.tokens_before(100_000) / 1e6, 1) == 1_626.6
    ends = {stage.end: examples for stage, examples in zip(NINE.stages, itertools.accumulate(EXAMPLES_K))}
    assert (ends[12_000], ends[35_000], ends[100_000]) == (1_152, 1_490, 2_010)


def test_printed_rows_are_those_of_the_plan():
    rows = rows_of(print_plan(), "[1-9]")
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


def test_printed_totals_are_those_of_the_plan():
    plan = print_plan()
    assert "100000 steps of a GPT with 123.6M parameters" in plan and "Never" not in plan
    assert "225870 training articles 874.0M tokens. Hours on an RTX 4090 at 0.15 of its peak." in plan
    (total,) = rows_of(plan, "in all")
    assert total[2:6] == ["0-100000", "2010000", "1626.6M", "1.861"]
    assert float(total[6]) == pytest.approx(1.5e18, rel=0.01) and float(total[8]) == pytest.approx(17, abs=0.5)
    assert "sees 2.53x as many examples as windows of 2048 throughout" in plan
    (throughout,) = rows_of(plan, "all at")
    assert int(throughout[4]) == pytest.approx(1_626_624_000 / 2_048, abs=8)  # to a batch of 8 windows
    phases = rows_of(plan, "foundation|comprehension|mastery")
    assert [row[1] for row in phases] == ["0-12000", "0-35000", "0-100000"]
    assert [row[2] for row in phases] == ["1152000", "1490000", "2010000"]
    assert [float(row[-1]) for row in phases] == pytest.approx([2, 6, 17], rel=0.2)


def test_plan_of_a_dataset_at_a_measured_speed(tmp_path):
    write_dataset(tmp_path, {"train": [9_000, 4_000], "val": [3_000]}, articles=13)
    plan = print_plan(f"--data_dir={tmp_path}", "--speed=130000")
    assert "13 training articles 13.0k tokens. Hours at 130000 tokens/s." in plan
    (total,) = rows_of(plan, "in all")
    assert float(total[-1]) == pytest.approx(1_626_624_000 / 130_000 / 3_600, rel=0.01)


def test_rows_and_phases_that_are_never_reached_are_named():
    plan = print_plan("--max_steps=15000")
    never = [*curriculum9.stages[5:], "comprehension to step 35000", "mastery to step 100000"]
    assert [line for line in plan.splitlines() if line.startswith("Never")] == [
        f"Never reached with max_steps=15000: {what}".replace(",", "") for what in never
    ]
    assert [cells[1] for cells in rows_of(plan, "[1-9]")][-1] == "12000-15000"
    assert rows_of(plan, "in all")[0][3:5] == ["1215000", "245.0M"]  # 1,152k and 3,000 batches of 21
    assert [cells[:2] for cells in rows_of(plan, "foundation|comprehension|mastery")] == [["foundation", "0-12000"]]


@pytest.mark.parametrize("rows, max_steps", [(curriculum9.stages, 100_000), (SMALL, 13), (SMALL, 10), (SMALL, 11)])
def test_stages_and_tokens_are_those_of_a_loop_over_steps(rows, max_steps):
    curriculum = Curriculum(rows, max_steps)
    tokens, row = 0, None
    for step in range(max_steps):
        before, row = row, [row for row in rows if row[0] <= step][-1]
        assert curriculum.ends_stage(step) == (before not in (row, None))
        stage = curriculum.at(step)
        assert (stage.number, stage.start, *stage[3:]) == (rows.index(row) + 1, *row)
        assert curriculum.tokens_before(step) == tokens
        tokens += row[1] * row[2]
    assert curriculum.tokens_before(max_steps) == tokens == sum(stage.tokens for stage in curriculum.stages)
    assert curriculum.ends_stage(max_steps)


def test_a_run_that_ends_early_has_the_stages_that_it_reaches():
    for max_steps, reached in ((1, 1), (3, 1), (4, 2), (5, 3), (10, 3), (11, 4), (1_000, 4)):
        curriculum = Curriculum(SMALL, max_steps)
        assert [stage.start for stage in curriculum.stages] == [row[0] for row in SMALL[:reached]]
        assert curriculum.stages[-1].end == max_steps
        assert (curriculum.last_len, curriculum.max_len) == (4, 16)  # of the table, reached or not


@pytest.mark.parametrize("warmup, cooldown, step, expected", [
    (200, 0, 0, 11.3 / 200), (200, 0, 99, 11.3 / 2), (200, 0, 199, 11.3), (200, 0, 1_999, 11.3), (200, 0, 2_000, 7.0),
    (200, 0, 99_999, 0.3), (0, 0, 0, 11.3), (0, 20_000, 80_000, 0.3), (0, 20_000, 90_000, 0.3 / 2),
    (0, 20_000, 99_999, 0.3 / 20_000),
    (4_000, 0, 2_999, 7.0 * 3 / 4),  # a warmup longer than the first stage continues through the second
    (200, 200_000, 99, 11.3 / 2 * 99_901 / 200_000),  # a cooldown longer than the run
])  # fmt: skip
def test_learning_rate(warmup, cooldown, step, expected):
    config = Config(warmup_steps=warmup, cooldown_steps=cooldown, learning_rate=6e-4)
    assert learning_rate(config, NINE.at(step), step) == pytest.approx(6e-4 * expected, rel=1e-12)


GOOD = (0, 64, 4, 1.0)


@pytest.mark.parametrize("rows, said", [
    ((), "stages is empty"), ((GOOD, 5), "row 2: 5 "), (("0, 64, 4, 1.0",), "row 1"),
    ((GOOD, (5, 64, 4)), r"row 2: \(5, 64, 4\)"), ((GOOD, (5.0, 64, 4, 1.0)), r"row 2: \(5.0, "),
    ((GOOD, (5, 64, True, 1.0)), "row 2"), ((GOOD, (5, 64, 4, None)), "row 2"),
    ((GOOD, (5, 0, 4, 1.0)), "row 2.*positive"), ((GOOD, (5, 64, 4, 1.0), (6, 64, -4, 1.0)), "row 3.*positive"),
    (((0, 64, 4, 0.0),), "row 1.*positive"), (((0, 64, 4, math.nan),), "row 1.*positive"),
    (((0, 64, 4, math.inf),), "row 1.*positive"), (((1, 64, 4, 1.0),), "ascend from 0"),
    (((-1, 64, 4, 1.0), (0, 64, 4, 1.0)), "ascend from 0"), ((GOOD, (7, 64, 4, 1.0), (7, 32, 4, 1.0)), "0, 7, 7"),
    ((GOOD, (2_000, 64, 4, 1.0), (5, 32, 4, 1.0)), "0, 2000, 5"),  # also where never reached
])  # fmt: skip
def test_a_table_that_makes_no_sense_is_refused_by_its_row(rows, said):
    with pytest.raises(UserError, match=said):
        Curriculum(rows, 10)


def test_scale_table_scales_steps_and_batches_and_nothing_else():
    scaled = scale_table(curriculum9.stages, steps=1 / 500, tokens=1 / 4)
    assert scaled[4] == (24, 768, 5, 1.0) and {row[2] for row in scale_table(SMALL, 1, 1e-6)} == {1}
    for old, new in zip(curriculum9.stages, scaled, strict=True):
        assert new == (old[0] // 500, old[1], pytest.approx(old[2] / 4, abs=0.5), old[3])
        assert list(map(type, new)) == [int, int, int, float]


def test_at_length_has_the_same_learning_rate_after_the_same_tokens():
    rows, max_steps = at_length(curriculum9.stages, 100_000, seq_len=512, batch_size=20)
    same = Curriculum(rows, max_steps)
    assert {row[1:3] for row in rows} == {(512, 20)}
    assert abs(same.tokens_before(max_steps) - 1_626_624_000) <= 512 * 20 / 2
    for step, row in ((0, 0), (2_001, 1), (3_999, 1), (7_000, 2), (13_000, 4), (34_990, 6), (50_010, 8), (99_990, 8)):
        assert same.at(NINE.tokens_before(step) // (512 * 20)).lr_scale == curriculum9.stages[row][3]
    assert fixed2048.max_steps == 99_281  # of 16,384 tokens; 1,626,624,000 tokens make 99,281.25
    assert fixed2048.stages[4] == (12_000, 2_048, 8, 1.0)  # up to here every batch has 16,384 tokens
    assert fixed2048.stages[-1] == (99_281 - 50_000, 2_048, 8, 0.3)  # and from here again


def test_expected_ppl_is_linear_in_the_logarithms_and_meets_the_plans_points_and_bounds():
    points = tuple((step, 7.0e5 * step**-0.8) for step in (100, 1_000, 3_000, 50_000))  # a power law is a line there
    for step in (100, 101, 500, 999, 1_000, 2_500, 3_000, 30_000, 50_000):
        assert expected_ppl(points, step) == pytest.approx(7.0e5 * step**-0.8, rel=1e-9)
    plans = {2: 5_000, 5: 1_000, 10: 300, 15: 150, 20: 80, 30: 50, 50: 35, 100: 25}
    assert {step: expected_ppl(curriculum9.plan_ppl, 1_000 * step) for step in plans} == pytest.approx(plans)
    assert expected_ppl(curriculum9.plan_ppl, 12_000) < 500 and expected_ppl(curriculum9.plan_ppl, 35_000) < 50
    assert expected_ppl(curriculum9.plan_ppl, 1_999) is expected_ppl((), 5_000) is None
