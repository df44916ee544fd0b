"""bench/forecast.py: its fit against a closed form, its sum of parts, and that config/sprint.py is what it says."""

import math
import re
from pathlib import Path

import numpy as np
import pytest

from bench import forecast
from config import load_config
from curriculum import Curriculum, Stage, learning_rate

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
    mean, deviation = forecast.forecast(Stage(0, 1, 1024, 1, 1.0), tokens, 1.0, 0.0)
    assert mean == pytest.approx(3.2760 + forecast.WIKIPEDIA[0]) and deviation > forecast.WIKIPEDIA[1]
    short, _ = forecast.forecast(Stage(0, 1, 256, 1, 1.0), tokens, 1.0, 0.0)
    assert short == pytest.approx(mean + 2 * forecast.LENGTH[0])
    assert forecast.forecast(Stage(0, 1, 2048, 1, 1.0), tokens, 1.0, -0.5)[0] == pytest.approx(mean - 0.03 - 0.5)


def test_sprint_is_the_shortest_that_the_forecast_supports():
    """25 at its end, at 2,048; not with a tenth less. And its file calls itself a forecast."""
    config = load_config([str(ROOT / "config" / "sprint.py")])
    curriculum = Curriculum(config.stages, config.max_steps)
    stage, tokens = curriculum.stages[-1], curriculum.tokens_before(config.max_steps)
    assert stage.seq_len == 2048
    fallen = 1 - learning_rate(config, stage, config.max_steps - 1) / config.learning_rate
    assert forecast.forecast(stage, tokens, fallen, 0.0)[0] < math.log(25)
    assert forecast.forecast(stage, 0.9 * tokens, fallen, 0.0)[0] > math.log(25)
    text = (ROOT / "config" / "sprint.py").read_text()
    assert text.startswith('"""A forecast, not a measurement')
    assert int(re.search(r"(\d+)M in all", text)[1]) == tokens // 1_000_000


def test_it_prints_the_plan_beside_the_forecast(run_program):
    done = run_program("bench/forecast.py", "config/curriculum9.py", "--shift=-0.1")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r" *[\d,]+  +[\d,]+  +[\d.,]+M", line)]
    assert [row[0] for row in rows] == ["2,000", "5,000", "10,000", "15,000", "20,000", "30,000", "50,000", "100,000"]
    assert [row[-2] for row in rows] == ["5,000", "1,000", "300", "150", "80", "50", "35", "25"]
    assert [float(row[7]) for row in rows] == [pytest.approx(math.exp(float(row[4])), rel=0.006) for row in rows]
