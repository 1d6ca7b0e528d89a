"""Runs of images, or of a user's own task, are shown as far as they are like a series."""

import numpy as np

from memfit.files import read_json, write_json
from memfit.report.run_files import read_run
from memfit.report.sections.headline import verdict


def as_images(run_dir) -> None:
    """Make the run one of a classifier of two classes."""
    info = read_json(run_dir / "run.json")
    manifest = {
        "workload": "vision",
        "fingerprint": "f00",
        "num_images": 9,
        "image_size": [8, 8],
        "class_names": ["cat", "dog"],
        "class_counts": {"train": [3, 2], "validation": [1, 1], "test": [1, 1]},
        "borders": {s: {"start": a, "stop": b} for s, a, b in (("train", 0, 5), ("validation", 5, 7), ("test", 7, 9))},
        "duplicates": {"dropped_from_train": 4},
    }
    folder = run_dir / "images"
    folder.mkdir()
    write_json(folder / "manifest.json", manifest)
    write_json(run_dir / "run.json", {**info, "data_dir": str(folder)})
    scores = {"top1_accuracy": 0.9, "nll": 0.3, "own": 2.0}
    evaluation = {
        "headline": "top1_accuracy",
        "num_rows": 2,
        "metrics": scores,
        "baselines": {"majority": {"top1_accuracy": 0.5}},
    }
    write_json(run_dir / "evaluation.json", evaluation)
    np.savez(run_dir / "predictions.npz", class_truth=np.array([0, 1]), **{"class": np.array([0, 0])})


def test_images_are_shown_with_their_classes(run_dir, page_of, fast_plots):
    as_images(run_dir)
    texts = page_of(run_dir).texts
    assert "Accuracy 90" in texts["header"]
    assert "80 % better" in texts["header"]
    for words in ("Num images", "8 x 8", "Dropped from train", "cat", "dog"):
        assert words in texts["data"]
    assert "Classes" in texts["predictions"]
    assert "cat" in texts["predictions"]
    assert "Log loss" in texts["scores"]


def test_calibration_is_drawn_where_probabilities_are_known(run_dir, page_of, fast_plots):
    as_images(run_dir)
    assert "Calibration" not in page_of(run_dir).texts["predictions"]
    told = np.array([[0.9, 0.1], [0.8, 0.2]], np.float32)
    arrays = {"class_truth": np.array([0, 1]), "class": np.array([0, 0]), "class_probabilities": told}
    np.savez(run_dir / "predictions.npz", **arrays)
    assert "Confidence and truth" in page_of(run_dir).texts["predictions"]


def test_of_many_classes_the_most_frequent_mistakes_are_listed(run_dir, page_of, fast_plots):
    as_images(run_dir)
    truth, predicted = np.repeat(np.arange(30), 4), np.repeat(np.arange(30), 4)
    predicted[:3], predicted[8] = 29, 5
    np.savez(run_dir / "predictions.npz", class_truth=truth, **{"class": predicted})
    text = page_of(run_dir).texts["predictions"]
    assert "most frequent mistakes among 30" in text
    assert "dog" not in text, "a class that is never mistaken"
    listed = " ".join(text.split("mistakes among 30")[1].split())
    assert listed == "truth taken for rows of class 0 class 29 3 4 class 2 class 5 1 4"


def test_the_score_that_decides_is_the_workloads(run_dir):
    as_images(run_dir)
    evaluation = read_json(run_dir / "evaluation.json")
    write_json(run_dir / "evaluation.json", {**evaluation, "headline": "own"})
    assert verdict(read_run(run_dir)) == ("own 2.000 on 2 test rows; no baseline to compare with.", "pending")
    write_json(run_dir / "evaluation.json", {**evaluation, "headline": "missing"})
    assert verdict(read_run(run_dir)) == ("No result yet: it has no missing.", "pending")
