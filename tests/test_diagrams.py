import itertools

import pytest
from PIL import Image

from tools.diagrams import COURSE
from utils import diagrams

DRAWN = {
    "one_pair": diagrams.one_pair,
    "image_tokens": diagrams.image_tokens,
    "policy_and_reference": diagrams.policy_and_reference,
    "four_bit_and_trained": diagrams.four_bit_and_trained,
    "paired_comparison": diagrams.paired_comparison,
    "derivation": diagrams.derivation,
    "memory_parts": diagrams.memory_parts,
    "course": diagrams.course,
}


@pytest.mark.parametrize("draw", DRAWN.values(), ids=list(DRAWN))
def test_every_word_is_in_the_figure_and_covers_no_other(draw):
    figure = draw()
    figure.draw_without_rendering()
    (axes,) = figure.axes
    texts = [text for text in axes.texts if text.get_text()]
    assert len(texts) >= 4
    areas = [text.get_window_extent() for text in texts]
    for text, area in zip(texts, areas, strict=True):
        inside = figure.bbox.contains(area.x0, area.y0) and figure.bbox.contains(area.x1, area.y1)
        assert inside, text
        assert text.get_fontsize() >= 9
    for (one, area), (other, second) in itertools.combinations(zip(texts, areas, strict=True), 2):
        assert not area.overlaps(second), (one, other)


@pytest.mark.parametrize("draw", DRAWN.values(), ids=list(DRAWN))
def test_every_word_in_a_box_fits_into_it(draw):
    figure = draw()
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = [patch.get_window_extent() for patch in axes.patches]
    for text in axes.texts:
        area = text.get_window_extent()
        if not text.get_text():
            continue
        center = ((area.x0 + area.x1) / 2, (area.y0 + area.y1) / 2)
        around = [found for found in boxes if found.contains(*center)]
        for found in around:
            assert found.x0 <= area.x0 and area.x1 <= found.x1, text


def test_the_readme_s_diagram_is_what_the_code_draws(tmp_path):
    drawn = tmp_path / "course.png"
    diagrams.course().savefig(drawn)
    with Image.open(COURSE) as committed, Image.open(drawn) as fresh:
        assert committed.size == fresh.size
        both = Image.blend(committed.convert("L"), fresh.convert("L").point(lambda v: 255 - v), 0.5)
        low, high = both.getextrema()
    assert COURSE.stat().st_size < 60_000
    assert 100 <= low and high <= 155, "python -m tools.diagrams draws it again"
