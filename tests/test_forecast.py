"""bench/forecast.py: its fit against a closed form, its sum of parts, and that config/sprint.py is what it says."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from bench import forecast, recipe, report
from config import load_config
from curriculum import Curriculum, Stage, learning_rate
from errors import CommandLine

ROOT = Path(forecast.__file__).resolve().parent.parent


def test_the_fit():
    """A law is found again from its own points; the published curve is met to a hundredth of a nat."""
    tokens = np.array([100.0, 200.0, 400.0, 900.0, 2000.0])
    law = forecast.fit(tokens, 2.9 + 7 * tokens**-0.4, np.arange(2.5, 3.1, 0.1))
    assert law == pytest.approx((2.9, 7, 0.4), rel=1e-6)
    for step, loss in forecast.CURVE.items():
        assert forecast.predict(forecast.LAW, step * 524_288 / 1e6) == pytest.approx(loss, abs=0.01)


def test_the_sum_of_parts():
    """Where the published run ends, its own setting's loss and the difference of the text; other lengths add to it."""
    tokens = 5100 * 524_288
    mean, deviation = forecast.forecast(Stage(0, 1, 1024, 1, 1.0), tokens, 1.0)
    assert mean == pytest.approx(3.2760 + forecast.WIKIPEDIA[0] + forecast.OURS[0])
    assert deviation > forecast.WIKIPEDIA[1]
    short, _ = forecast.forecast(Stage(0, 1, 256, 1, 1.0), tokens, 1.0)
    assert short == pytest.approx(mean + 2 * forecast.LENGTH[0])
    assert forecast.forecast(Stage(0, 1, 2048, 1, 1.0), tokens, 1.0)[0] == pytest.approx(mean - 0.03)
    # By nanoGPT's recipe alone, its loss is reached with the measured ratio of its tokens.
    by_ratio, _ = forecast.forecast(Stage(0, 1, 1024, 1, 1.0), forecast.RATIO * 10.3e9, 1.0)
    assert by_ratio + forecast.OURS[0] == pytest.approx(3.272 + forecast.WIKIPEDIA[0])


def test_the_ratio_is_the_measured_one():
    """Of the committed runs, the seeds' middle one, first point under the last loss of nanoGPT's recipe."""
    parser = CommandLine()
    recipe.add_arguments(parser)
    found, _ = report.find("nanogpt", parser.parse_args(["nanogpt", f"--results={ROOT / 'bench' / 'recipe'}"]))
    ratios = []
    for seed in range(3):
        end = found["nanoGPT"][seed]["points"][-1]
        tokens, losses = report.curve(found["and the lengths of the table"][seed], "tokens")
        after = int(np.argmax(losses < end["loss"]))
        share = (losses[after - 1] - end["loss"]) / (losses[after - 1] - losses[after])
        ratios.append((tokens[after - 1] + share * (tokens[after] - tokens[after - 1])) / end["tokens"])
    assert round(float(np.median(ratios)), 2) == forecast.RATIO


def test_sprint_is_the_shortest_that_the_forecast_supports():
    """25 at its end, at 2,048; not with a tenth less. And its file calls itself a forecast."""
    config = load_config([str(ROOT / "config" / "sprint.py")])
    curriculum = Curriculum(config.stages, config.max_steps)
    stage, tokens = curriculum.stages[-1], curriculum.tokens_before(config.max_steps)
    assert stage.seq_len == 2048
    fallen = 1 - learning_rate(config, stage, config.max_steps - 1) / config.learning_rate
    assert forecast.forecast(stage, tokens, fallen)[0] < math.log(25)
    assert forecast.forecast(stage, 0.9 * tokens, fallen)[0] > math.log(25)
    text = (ROOT / "config" / "sprint.py").read_text()
    assert text.startswith('"""A forecast, not a measurement')
    assert re.search(r"([\d,]+)M in all", text)[1] == f"{tokens / 1e6:,.0f}"


def test_it_prints_the_plan_beside_the_forecast(run_program):
    done = run_program("bench/forecast.py", "config/curriculum9.py")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r" *[\d,]+  +[\d,]+  +[\d.,]+M", line)]
    assert [row[0] for row in rows] == ["2,000", "5,000", "10,000", "15,000", "20,000", "30,000", "50,000", "100,000"]
    assert [row[-2] for row in rows] == ["5,000", "1,000", "300", "150", "80", "50", "35", "25"]
    assert [float(row[7]) for row in rows] == [pytest.approx(math.exp(float(row[4])), rel=0.006) for row in rows]
