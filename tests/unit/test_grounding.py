"""The written form of boxes: one writer, one strict reader."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from puna.errors import PunaError
from puna.processor.grounding import (
    Box,
    Point,
    format_box,
    format_point,
    iou,
    parse_boxes,
    parse_points,
    to_normalised,
    to_pixels,
)  # fmt: skip

SPANS = st.lists(st.integers(0, 999), min_size=2, max_size=2, unique=True).map(sorted)


@given(st.text(), SPANS, SPANS)
def test_any_label_and_box_round_trip(label, x, y):
    box = (x[0], y[0], x[1], y[1])
    assert parse_boxes(f"There: {format_box(label, box)}!") == [Box(label, *box)]


def test_the_form_is_as_documented():
    assert format_box("red cat", (102, 40, 377, 512)) == '<box label="red cat">102,40,377,512</box>'
    assert format_box('a"<&>', (0, 0, 999, 999)) == '<box label="a&quot;&lt;&amp;&gt;">0,0,999,999</box>'
    assert parse_boxes('<box label="&amp;lt;">0,0,1,1</box>')[0].label == "&lt;"  # escapes are undone once only


def test_boxes_come_in_order_from_any_text():
    text = 'A <box label="a">1,2,3,4</box>, <b>b</b> <box label="b"> 5 , 6 ,7, 8 </box>\n<box label="a">0,0,9,9</box>'
    assert parse_boxes(text) == [Box("a", 1, 2, 3, 4), Box("b", 5, 6, 7, 8), Box("a", 0, 0, 9, 9)]
    assert parse_boxes("") == [] and parse_boxes("no boxes") == []


@pytest.mark.parametrize(
    "inside",
    [
        "5,5,5,9",
        "9,1,2,8",
        "1,9,8,2",
        "0,0,1000,9",
        "-1,0,5,5",
        "nan,0,5,5",
        "1,2,3",
        "1,2,3,4,5",
        "1.5,2,3,4",
        "",
        "٣,0,9,9",
    ],
)
def test_invalid_boxes_are_dropped_and_valid_neighbours_kept(inside):
    good = format_box("ok", (1, 1, 2, 2))
    assert parse_boxes(f'{good}<box label="x">{inside}</box>{good}') == [Box("ok", 1, 1, 2, 2)] * 2


@pytest.mark.parametrize(
    "text",
    ['<box label="a>1,2,3,4</box>', "<box>1,2,3,4</box>", '<box label="a">1,2,3,4', '<BOX label="a">1,2,3,4</BOX>',
     '<box label="<img>">1,2,3,4</box>'],
)  # fmt: skip
def test_malformed_tags_are_no_boxes(text):
    assert parse_boxes(text) == []


def test_hostile_length_is_read_in_linear_time():
    assert parse_boxes('<box label="' * 100_000) == []
    assert len(parse_boxes(format_box("x", (0, 0, 1, 1)) * 10_000)) == 10_000


@pytest.mark.parametrize(
    "box", [(5, 5, 5, 9), (0, 0, 1000, 5), (-1, 0, 5, 5), (math.nan, 0, 5, 5), (0.5, 0, 5, 5), (1, 2)]
)
def test_writing_an_invalid_box_is_told(box):
    with pytest.raises(PunaError, match="not a box"):
        format_box("x", box)


def test_iou_values_and_guards():
    assert iou((0, 0, 10, 10), (0, 0, 10, 10)) == 1.0
    assert iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert iou(Box("a", 0, 0, 10, 10), (0, 0, 10, 5)) == pytest.approx(0.5)
    assert iou((0, 0, 10, 10), (10, 0, 20, 10)) == 0.0
    for bad in ((5, 5, 5, 5), (9, 0, 1, 9), (0, 0, math.nan, 1), (0, 0, math.inf, 1), (1, 2)):
        assert iou(bad, bad) == 0.0


@given(st.integers(1, 5000), st.integers(1, 5000), SPANS, SPANS)
def test_pixels_and_back_is_exact_on_the_grid(w, h, x, y):
    box = (x[0], y[0], x[1], y[1])
    assert to_normalised(to_pixels(box, w, h), w, h) == box


def test_normalising_scales_cuts_and_never_gives_an_empty_box():
    assert to_normalised((0, 0, 64, 64), 64, 64) == (0, 0, 999, 999)
    assert to_normalised((16, 32, 48, 64), 64, 64) == (250, 500, 749, 999)
    assert to_normalised((-50, -50, 32, 900), 64, 64) == (0, 0, 500, 999)
    assert to_normalised((10, 10, 10.001, 10.001), 5000, 5000) == (2, 2, 3, 3)
    assert to_normalised((4999.9, 0, 5000, 1), 5000, 5000) == (998, 0, 999, 1)
    for outside in ((70, 0, 80, 10), (5, 5, 5, 9), (9, 0, 3, 9), (math.nan, 0, 1, 1)):
        with pytest.raises(PunaError, match="outside the picture"):
            to_normalised(outside, 64, 64)


@given(st.text(), st.integers(0, 999), st.integers(0, 999))
def test_any_point_round_trips_and_is_no_box(label, x, y):
    text = f"There: {format_point(label, x, y)}!"
    assert parse_points(text) == [Point(label, x, y)] and parse_boxes(text) == []


@pytest.mark.parametrize("inside", ["1", "1,2,3", "1000,5", "-1,5", "NaN,5", "1.5,2", "", "1,2,3,4"])
def test_bad_points_are_dropped_and_never_written(inside):
    assert parse_points(f'<point label="a">{inside}</point>') == []
    for x, y in ((1000, 5), (-1, 5), (math.nan, 5), (1.5, 2)):
        with pytest.raises(PunaError, match="not a point"):
            format_point("a", x, y)
