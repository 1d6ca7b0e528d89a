import re

import pytest

from memfit.report.plots import COLOURS, new_plot


def drawn(name="figure", xlabel="epoch", label="A curve."):
    with new_plot() as plot:
        plot.axes.plot([1, 2, 3], [1.0, 4.0, 2.0], color=COLOURS["blue"], marker="o")
        plot.axes.set_xlabel(xlabel)
        return str(plot.svg(name, label))


def test_the_same_data_give_the_same_bytes():
    assert drawn() == drawn()


def test_colours_come_from_the_page():
    svg = drawn()
    assert "var(--blue)" in svg
    assert not re.findall(r"#[0-9a-fA-F]{6}", svg)


def test_the_picture_scales_with_the_page():
    svg = drawn()
    opening = svg[: svg.index(">")]
    assert "viewBox=" in opening
    assert "width=" not in opening


def test_two_figures_share_no_ids():
    first, second = (set(re.findall(r' id="([^"]+)"', drawn(name))) for name in ("one", "two"))
    assert first
    assert not first & second


def test_every_reference_has_its_target():
    svg = drawn()
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    assert used
    assert used <= set(re.findall(r' id="([^"]+)"', svg))


def test_there_is_no_style_sheet_font_or_metadata_that_reaches_out():
    svg = drawn()
    assert not re.findall(r"<style|<metadata|font-family|http|<!--|<\?xml", svg)


def test_text_stays_text_and_markup_in_it_is_escaped():
    svg = drawn(xlabel="<script>x</script> & $a_1$ $", label='"quoted" <b>')
    assert "<script>" not in svg
    assert "&lt;script&gt;x&lt;/script&gt; &amp; $a_1$ $" in svg
    assert 'aria-label="&#34;quoted&#34; &lt;b&gt;"' in svg


@pytest.mark.parametrize("name", ["日本語", "🚀", "العربية"])
def test_a_script_that_the_measuring_font_lacks_is_drawn_without_a_warning(name):
    assert name in drawn(xlabel=name)
