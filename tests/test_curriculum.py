"""The printed plan against numbers worked out by hand, and the stages against a loop over steps."""

import contextlib
import math
import re

import pytest
from conftest import ROOT, call_program

from config import curriculum9
from curriculum import Curriculum, expected_ppl, learning_rate
from settings import Config, UserError

# Worked out by hand from config/curriculum9.py's table: each stage's tokens in millions, examples in thousands
TOKENS_M = (32.8, 32.8, 65.5, 65.5, 96.8, 114.7, 153.6, 245.8, 819.2)
EXAMPLES_K = (512, 256, 256, 128, 126, 112, 100, 120, 400)
NINE = Curriculum(curriculum9.stages, curriculum9.max_steps)

GOOD = (0, 64, 4, 1.0)
SMALL = ((0, 8, 5, 2.0), (3, 16, 2, 1.0), (4, 4, 7, 0.5), (10, 4, 3, 0.25))


def print_plan(*arguments: object) -> str:
    """Return what curriculum.py prints about config/curriculum9.py, without thousands' commas."""
    with contextlib.chdir(ROOT / "tests"):  # where no data/wiki is
        done = call_program("curriculum.py", ROOT / "config/curriculum9.py", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.replace(",", "")


def rows_of(plan: str, first: str) -> list[list[str]]:
    """Return the cells of the printed lines whose first word matches the pattern `first`."""
    return [line.split() for line in plan.splitlines() if re.match(rf"\s*({first})\s", line)]


def test_printed_rows_are_those_of_the_plan():
    rows = rows_of(print_plan(), "[1-9]")
    for cells, stage, examples_k, tokens_m in zip(rows, NINE.stages, EXAMPLES_K, TOKENS_M, strict=True):
        assert cells[:4] == [f"{stage.number}", f"{stage.start}-{stage.end}", f"{stage.seq_len}", f"{stage.batch_size}"]
        lr, per_article, epoch, examples, tokens, epochs, flops, ppl, hours = cells[4:]
        assert float(lr) == pytest.approx(6e-4 * stage.lr_scale, rel=0.05)
        assert float(per_article) == pytest.approx(3_870 / stage.seq_len, abs=0.06)
        assert float(epoch) == round(874e6 / (stage.batch_size * stage.seq_len))
        assert (int(examples), round(int(tokens) / 1e6, 1)) == (1_000 * examples_k, tokens_m)
        assert float(epochs) == pytest.approx(tokens_m / 874, abs=6e-4)
        # PaLM's 6 N + 12 L C T, where N counts the weights of matrix products: 12 blocks and the head
        expected = tokens_m * 1e6 * (6 * 123_568_128 + 12 * 12 * 768 * stage.seq_len)
        assert float(flops) == pytest.approx(expected, rel=0.05)
        assert float(hours) == pytest.approx(expected / (0.15 * 165.2e12) / 3600, rel=0.01)


def test_printed_totals_are_those_of_the_plan():
    plan = print_plan()
    assert "100000 steps of a GPT with 123.6M parameters" in plan and "Never" not in plan
    assert "225870 training articles 874000000 tokens. Hours at 15% of an RTX 4090's peak." in plan
    (total,) = rows_of(plan, "in all")
    assert total[2:6] == ["0-100000", "2010000", "1626624000", "1.861"]
    assert float(total[6]) == pytest.approx(1.5e18, rel=0.01) and float(total[8]) == pytest.approx(17, abs=0.5)
    assert "sees 2.53x as many examples as windows of 2048 throughout" in plan
    (throughout,) = rows_of(plan, "all at")
    assert int(throughout[4]) == pytest.approx(1_626_624_000 / 2_048, abs=8)  # to within a batch of 8
    phases = rows_of(plan, "foundation|comprehension|mastery")
    assert [row[1:3] for row in phases] == [["0-12000", "1152000"], ["0-35000", "1490000"], ["0-100000", "2010000"]]
    assert [float(row[-1]) for row in phases] == pytest.approx([2, 6, 17], rel=0.2)


def test_plan_of_a_dataset_at_a_measured_speed(small_dir):
    plan = print_plan(f"--data_dir={small_dir}", "--speed=130000")
    assert "training articles 40000 tokens. Hours at 130000 tokens/s." in plan
    (total,) = rows_of(plan, "in all")
    assert float(total[-1]) == pytest.approx(1_626_624_000 / 130_000 / 3_600, rel=0.01)


def test_rows_that_are_never_reached_are_named():
    plan = print_plan("--max_steps=15000")
    never = [f"Never reached with max_steps=15000: {row}".replace(",", "") for row in curriculum9.stages[5:]]
    assert [line for line in plan.splitlines() if line.startswith("Never")] == never
    assert [cells[1] for cells in rows_of(plan, "[1-9]")][-1] == "12000-15000"
    assert rows_of(plan, "in all")[0][3:5] == ["1215000", "244992000"]  # 1,152k and 3,000 batches of 21
    assert [cells[:2] for cells in rows_of(plan, "foundation|comprehension|mastery")] == [["foundation", "0-12000"]]


@pytest.mark.parametrize("rows, max_steps", [
    (curriculum9.stages, 100_000), *((SMALL, n) for n in (1, 3, 4, 5, 10, 11, 13, 1_000))])  # fmt: skip
def test_stages_and_tokens_are_those_of_a_loop_over_steps(rows, max_steps):
    curriculum = Curriculum(rows, max_steps)
    assert (curriculum.last_len, curriculum.max_len) == ((4, 16) if rows == SMALL else (2_048, 2_048))
    tokens, row = 0, None
    for step in range(max_steps):
        before, row = row, [row for row in rows if row[0] <= step][-1]
        assert (step in curriculum.ends) == (before not in (row, None))
        stage = curriculum.at(step)
        assert (stage.number, stage.start, *stage[3:]) == (rows.index(row) + 1, *row)
        assert curriculum.tokens_before(step) == tokens
        tokens += row[1] * row[2]
    assert curriculum.tokens_before(max_steps) == tokens == sum(stage.tokens for stage in curriculum.stages)
    assert max_steps in curriculum.ends and curriculum.stages[-1].end == max_steps
    assert len(curriculum.stages) == sum(row[0] < max_steps for row in rows)


@pytest.mark.parametrize("warmup, cooldown, step, expected", [
    (200, 0, 0, 11.3 / 200), (200, 0, 99, 11.3 / 2), (200, 0, 199, 11.3), (200, 0, 1_999, 11.3), (200, 0, 2_000, 7.0),
    (4_000, 0, 2_999, 7.0 * 3 / 4),  # a warmup longer than the first stage continues through the second
    (200, 200_000, 99, 11.3 / 2 * 99_901 / 200_000),  # a cooldown longer than the run
    (0, 0, 0, 11.3), (0, 20_000, 80_000, 0.3), (0, 20_000, 90_000, 0.3 / 2),
    (0, 20_000, 99_999, 0.3 / 20_000)])  # fmt: skip
def test_learning_rate(warmup, cooldown, step, expected):
    config = Config(warmup_steps=warmup, cooldown_steps=cooldown, learning_rate=6e-4)
    assert learning_rate(config, NINE.at(step), step) == pytest.approx(6e-4 * expected, rel=1e-12)


@pytest.mark.parametrize("rows, said", [
    ((), "stages"), ((GOOD, 5), "row 2: 5 "), ((GOOD, (5, 64, 4)), "row 2"), ((GOOD, (5.0, 64, 4, 1.0)), "row 2"),
    ((GOOD, (5, 64, True, 1.0)), "row 2"), ((GOOD, (5, 0, 4, 1.0)), "row 2"), ((GOOD, (5, 64, -4, 1.0)), "row 2"),
    (((0, 64, 4, 0.0),), "row 1"), (((0, 64, 4, math.nan),), "row 1"), (((0, 64, 4, math.inf),), "row 1"),
    ((GOOD, (2_000, 64, 4, 1.0), (5, 32, 4, 1.0)), "0, 2000, 5"),  # rows past max_steps count, too
    (((1, 64, 4, 1.0),), "ascend from 0"), ((GOOD, (7, 64, 4, 1.0), (7, 32, 4, 1.0)), "0, 7, 7")])  # fmt: skip
def test_an_invalid_table_is_refused_and_its_row_named(rows, said):
    with pytest.raises(UserError, match=said):
        Curriculum(rows, 10)


def test_expected_ppl_is_linear_in_the_logarithms_and_meets_the_plans_bounds():
    points = tuple((step, 7.0e5 * step**-0.8) for step in (100, 1_000, 3_000, 50_000))  # a power law is a line there
    for step in (100, 101, 500, 999, 1_000, 2_500, 3_000, 30_000, 50_000):
        assert expected_ppl(points, step) == pytest.approx(7.0e5 * step**-0.8, rel=1e-9)
    assert expected_ppl(curriculum9.plan_ppl, 12_000) < 500 and expected_ppl(curriculum9.plan_ppl, 35_000) < 50
    assert expected_ppl(curriculum9.plan_ppl, 1_999) is expected_ppl((), 5_000) is None
