"""Forecasts in the report: scores of single steps are those of all of them, and the first step is drawn."""

import numpy as np

from memfit.files import read_json, write_json
from memfit.report.measures import best_of, improvement, measure


def test_a_score_of_one_step_is_read_as_that_of_all():
    about = measure("mape_step_12")
    assert (about.label, about.better, about.write(0.104)) == ("MAPE, step 12", "lower", measure("mape").write(0.104))
    assert best_of("r2_step_3", [0.2, 0.7]) == 0.7
    assert best_of("mse_step_1", [4.0, 1.0]) == 1.0
    assert improvement("huber_step_2", 1.0, 2.0) == 0.5


def test_other_names_with_such_an_ending_are_plain_numbers():
    for name in ("own_step_2", "mae_step_last", "_step_3"):
        assert (measure(name).better, measure(name).label) == ("", name.replace("_", " "))


def test_the_first_step_is_drawn_over_time(run_dir, page_of, fast_plots):
    count = 30
    truth = np.sin(np.arange(count)).astype(np.float32)
    np.savez(
        run_dir / "predictions.npz",
        times=np.arange(count) * 3_600_000_000_000,
        truth=truth,
        value=truth + 0.1,
        persistence=truth - 0.5,
        truth_horizon=np.tile(truth[:, None], 4),
        value_horizon=np.tile(truth[:, None] + 0.1, 4),
        alignment=np.full((count, 4, 6), 1 / 6, np.float32),
    )
    evaluation = read_json(run_dir / "evaluation.json")
    write_json(run_dir / "evaluation.json", {**evaluation, "threshold": None})
    shown = page_of(run_dir).texts["predictions"]
    assert f"The last {count} test rows" in shown
    assert "Errors" in shown
