"""Pictures show the report's numbers, whatever names say."""

from __future__ import annotations

import numpy as np
import pytest

from moa.eval.paired import pictures as module
from moa.eval.paired.pictures import MOST_LETTERS, pictures, short
from moa.eval.paired.view import DEPTH_BUCKETS, View

NAMES = ["accuracy_by_kv_bytes", "loss_by_kv_bytes_1", "accuracy_by_depth", "accuracy_by_depth_and_task"]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, in order."""
    found = []
    monkeypatch.setattr(module, "png", lambda figure: found.append(figure) or b"")
    return found


def shown(figure):
    return [axes for axes in figure.axes if axes.get_visible() and axes.get_label() != "<colorbar>"]


def test_there_is_a_picture_for_what_was_measured(made_up, figures):
    assert [p.name for p in pictures(View(made_up()))] == NAMES
    assert [p.name for p in pictures(View(made_up(losses=(), tasks=("kv",))))] == [NAMES[0], NAMES[2]]
    assert [p.name for p in pictures(View(made_up(depths=False, losses=())))] == [NAMES[0]]
    assert [p.name for p in pictures(View(made_up(lengths=(None,))))] == NAMES[2:]
    assert [p.name for p in pictures(View(made_up(lengths=(None,), depths=False)))] == []
    assert [p.name for p in pictures(View(made_up(("dense",))))] == [NAMES[0], *NAMES[2:]]


def test_every_variant_is_a_point_with_its_interval(made_up, figures):
    view = View(made_up(lengths=(512, 1024, 2048, 4096)))
    list(pictures(view))
    panels = shown(figures[0])
    assert [axes.get_title() for axes in panels] == ["512 tokens", "1,024 tokens", "2,048 tokens", "4,096 tokens"]
    for axes, n in zip(panels, view.lengths, strict=True):
        assert len(axes.containers) == 4
        for container, variant in zip(axes.containers, (*view.others, view.dense), strict=True):
            line, _, (bars,) = container.lines
            mean = view.mean(variant, n)
            assert line.get_ydata()[0] == pytest.approx(100 * mean.value)
            assert np.sort(bars.get_segments()[0][:, 1]) == pytest.approx([100 * mean.low, 100 * mean.high])
            assert line.get_xdata()[0] == pytest.approx(variant.kv_at(n).kv_bytes, rel=0.1)  # nudged
            assert (line.get_markerfacecolor() == "white") is not variant.saves_memory
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels == ["dense", "moa", "other", "masked (accuracy only)"]


def test_losses_are_told_above_dense(made_up, figures):
    view = View(made_up())
    list(pictures(view))
    for axes, n in zip(shown(figures[1]), view.lengths, strict=True):
        for container, variant in zip(axes.containers, view.others, strict=False):
            assert container.lines[0].get_ydata()[0] == pytest.approx(view.loss_difference(variant, n, "nll").value)
        assert axes.containers[-1].lines[0].get_ydata()[0] == 0


def test_heat_is_accuracy_by_length_and_depth(made_up, figures):
    view = View(made_up())
    list(pictures(view))
    panels = shown(figures[2])
    assert [axes.get_title() for axes in panels] == [v.name for v in view.report.variants]
    for axes, variant in zip(panels, view.report.variants, strict=True):
        shares = axes.images[0].get_array().data
        assert shares.shape == (DEPTH_BUCKETS, 2)
        assert axes.images[0].get_clim() == (0, 1)
        for column, n in enumerate(view.lengths):
            found = view.by_depth(variant, [cell for cell in view.with_depth if cell[1] == n])
            assert shares[:, column] == pytest.approx([at[0] for at in found])
            written = [t.get_text() for t in axes.texts if t.get_position()[0] == column]
            assert written == [f"{100 * at[0]:.0f}" for at in found]


def test_the_lowest_panel_of_each_column_names_lengths(made_up, figures):
    list(pictures(View(made_up())))
    named = [[label.get_text() for label in axes.get_xticklabels()] for axes in shown(figures[2])]
    assert named == [[], *[["1,024", "4,096"]] * 3]


def test_each_task_has_its_row(made_up, figures):
    view = View(made_up())
    list(pictures(view))
    panels = shown(figures[3])
    assert len(panels) == 3 * 4
    assert [axes.get_ylabel() for axes in panels[::4]] == ["kv", "passkey", "vt"]
    found = view.by_depth(view.dense, [("passkey", 1024, "score")])
    assert panels[4].images[0].get_array().data[:, 0] == pytest.approx([at[0] for at in found])


@pytest.mark.slow
def test_hostile_names_are_drawn(made_up):
    """No formulas, no hidden labels, no warning of letters without a shape."""
    names = ("dense", r"$\frac{$", "_hidden", "a\nb" * 30, "模型", "%s{}")
    drawn = list(pictures(View(made_up(names, (r"$\frac{$", "_y", "任务"), losses=("$$",), samples=4))))
    assert [picture.name for picture in drawn] == NAMES
    assert all(picture.png.startswith(b"\x89PNG") for picture in drawn)


def test_long_names_are_cut():
    assert short("a\n b") == "a b"
    assert len(short("x" * 100)) == MOST_LETTERS
