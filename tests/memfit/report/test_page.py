import re
from pathlib import Path

import numpy as np
import pytest

from memfit.errors import RunStateError
from memfit.report.blocks import Note, Section
from memfit.report.history import MAX_POINTS
from memfit.report.page import SECTIONS, render, write_report
from memfit.report.run_files import read_run

HOSTILE = """<script>alert("x")</script>'"><img src=x onerror=alert(1)> {{ 7 * 7 }} & ümlaut"""


def test_nothing_is_loaded_from_anywhere(finished, finished_run_dir):
    html = (finished_run_dir / "report.html").read_text()
    addresses = re.findall(r"(?:https?:)?//[^\s\"'<)]+", html)
    assert [address for address in addresses if not address.startswith("http://www.w3.org/")] == []
    assert "@import" not in html
    assert not {"script", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in finished.elements}
    for tag, attributes in finished.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert not {"src", "srcset", "xlink:href"} & set(attributes), tag
        assert (attributes.get("href") or "#").startswith(("#", "data:")), tag


def test_the_page_forbids_its_browser_to_load_or_run_anything(finished):
    policies = [a["content"] for _, a in finished.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_a_phone_gets_its_own_width(finished):
    metas = {a.get("name"): a.get("content") for tag, a in finished.elements if tag == "meta"}
    assert metas["viewport"] == "width=device-width, initial-scale=1"
    assert metas["color-scheme"] == "light dark"


def test_every_picture_says_what_it_shows(finished):
    labels = [attributes.get("aria-label") for tag, attributes in finished.elements if tag == "svg"]
    assert len(labels) > 15
    assert all(labels)


def test_no_id_is_used_twice(finished):
    ids = [attributes["id"] for _, attributes in finished.elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_every_colour_that_is_used_is_defined_for_light_and_dark(finished_run_dir):
    html = (finished_run_dir / "report.html").read_text()
    light, dark = (set(re.findall(r"(--[\w-]+):", block)) for block in re.findall(r":root \{(.*?)\}", html, re.S))
    used = set(re.findall(r"var\((--[\w-]+)\)", html)) - {"--c"}
    assert used <= light == dark


@pytest.mark.parametrize("scheme", [0, 1])
def test_text_has_enough_contrast_in_light_and_dark(finished_run_dir, scheme):
    """Ratio of at least 4.5, as WCAG 2.1 asks for text of this size."""
    html = (finished_run_dir / "report.html").read_text()
    block = re.findall(r":root \{(.*?)\}", html, re.S)[scheme]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))

    def luminance(name):
        channels = [int(colours[name][place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    pairs = [(text, ground) for text in ("ink", "muted", "blue") for ground in ("paper", "card")]
    pairs += [(text, "card") for text in ("green", "red", "orange", "violet", "warn")]
    pairs += [("ink", wash) for wash in ("good-wash", "warn-wash", "bad-wash")]
    pairs += [("green", "good-wash"), ("warn", "warn-wash"), ("muted", "good-wash")]
    for text, ground in pairs:
        low, high = sorted((luminance(text), luminance(ground)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)


def test_the_same_run_gives_the_same_bytes(finished_run_dir):
    before = (finished_run_dir / "report.html").read_bytes()
    assert write_report(finished_run_dir).read_bytes() == before


def poison(value):
    """Add markup to every string of a document."""
    if isinstance(value, dict):
        return {key: poison(item) for key, item in value.items()}
    if isinstance(value, list):
        return [poison(item) for item in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_hostile_names_are_shown_as_text(run_dir, edit_json, write_stage, stage_events, page_of):
    data_dir = Path(read_run(run_dir).info["data_dir"])
    edit_json(data_dir / "manifest.json", poison)
    for name in ("plan.json", "evaluation.json", "export/model_card.json", "run.json"):
        edit_json(run_dir / name, poison)
    edit_json(run_dir / "run.json", lambda it: it.update(data_dir=str(data_dir)))
    edit_json(run_dir / "evaluation.json", lambda it: it["baselines"].update({HOSTILE: {"mae": 1.0}}))
    (run_dir / "config.toml").write_text(f'name = "x" # {HOSTILE}')
    events = stage_events(0)
    events[0]["stage"] = HOSTILE
    for event in events:
        if event["event"] == "epoch":
            event["train"][HOSTILE] = event["validation"][HOSTILE] = 1.0
    write_stage(0, events)
    (run_dir / "export" / "<img>.txt").write_text("")
    page = page_of(run_dir)
    assert not {"script", "img"} & {tag for tag, _ in page.elements}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    for section in ("header", "scores", "plan", "training", "data", "export", "steps", "environment", "config"):
        assert HOSTILE in page.texts[section], section
    assert "<img>.txt" in page.texts["export"]


def test_a_long_run_gives_a_small_page(run_dir, write_stage, stage_events, page_of):
    """100,000 steps and 2,000 epochs in one stage."""
    start, *epoch = stage_events(0, epochs=1, steps_per_epoch=50, ended=False)
    repeated = [
        event | {"step": 50 * number + min(place + 1, 50), "epoch": number + 1}
        for number in range(2000)
        for place, event in enumerate(epoch)
    ]
    write_stage(0, [start, *repeated])
    page = page_of(run_dir)
    assert (run_dir / "report.html").stat().st_size < 3_000_000
    assert page.row("training", "coarse")[3] == "100,000"
    assert "lowest to highest" in page.texts["training"]
    assert len(read_run(run_dir).stages[0].steps["loss"].buckets) <= MAX_POINTS


def test_a_million_test_rows_give_a_small_page(run_dir):
    truth = np.random.default_rng(0).normal(size=1_000_000).astype(np.float32)
    times = np.arange(len(truth)) * 1_000_000_000
    np.savez(run_dir / "predictions.npz", times=times, truth=truth, value=truth + 1, persistence=truth)
    assert write_report(run_dir).stat().st_size < 3_000_000


def test_a_workload_adds_its_own_section(run_dir, page_of, fast_plots):
    def attention(run):
        return Section("attention", "Attention <maps>", (Note(f"of {run.name}"),))

    def elsewhere(run):
        return None

    html = render(read_run(run_dir), (*SECTIONS, attention, elsewhere))
    assert '<section id="attention">' in html
    assert "Attention &lt;maps&gt;" in html
    assert "of weather" in html


def test_what_is_not_a_run_directory_is_refused(tmp_path):
    with pytest.raises(RunStateError, match="expected a run directory"):
        write_report(tmp_path / "absent")


def test_a_failed_render_leaves_the_earlier_page(run_dir, fast_plots):
    before = write_report(run_dir).read_text()

    def broken(run):
        raise RunStateError("no")

    with pytest.raises(RunStateError):
        write_report(run_dir, sections=(broken,))
    assert (run_dir / "report.html").read_text() == before
    assert list(run_dir.glob(".*")) == []
