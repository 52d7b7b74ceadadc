"""Alignments as pictures: what is drawn for which weights, and what is said where they do not fit."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
import torch

import steploop as sl

pytest.importorskip("matplotlib")


def images(figure):
    return [axes.images[0] for axes in figure.axes if axes.images]


def test_the_picture_shows_the_weights_and_their_labels(tmp_path):
    weights = torch.softmax(torch.randn(4, 6), -1).requires_grad_()
    path = tmp_path / "alignment.png"
    figure = sl.view.alignment(weights, source="the cat sat".split(), target=["a", 2], title="what", path=path)
    (image,) = images(figure)
    np.testing.assert_allclose(image.get_array(), weights[:2, :3].detach().double(), rtol=1e-6)
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["the", "cat", "sat"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "2"]
    assert figure.get_suptitle() == "what"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_row_of_a_batch_and_all_of_its_heads():
    weights = torch.rand(5, 3, 2, 7)  # (T, B, heads, S)
    figure = sl.view.alignment(weights, row=-1, source_length=torch.tensor(4), target_length=2)
    assert [image.get_array().shape for image in images(figure)] == [(2, 4), (2, 4)]
    np.testing.assert_allclose(images(figure)[1].get_array(), weights[:2, 2, 1, :4], rtol=1e-6)
    assert images(sl.view.alignment(weights[:, :, 0], row=1))[0].get_array().shape == (5, 7)
    assert len(images(sl.view.alignment(weights[:, 0].numpy()))) == 2


def test_on_axes_that_are_there():
    from matplotlib.figure import Figure

    figure = Figure()
    axes = figure.subplots(1, 2)
    assert sl.view.alignment(torch.rand(3, 4), axes=axes[1], title="here") is figure
    assert not axes[0].images and axes[1].images and axes[1].get_title() == "here"
    with pytest.raises(sl.InputError, match="one head"):
        sl.view.alignment(torch.rand(3, 2, 4), axes=axes[0])


def test_long_and_tiny_ones(tmp_path):
    long = sl.view.alignment(torch.rand(300, 900), source=range(900), path=tmp_path / "long.pdf")
    assert len(long.axes[0].get_xticklabels()) <= 60
    sl.view.alignment(torch.ones(1, 1), path=tmp_path / "one.svg")
    sl.view.alignment(torch.rand(2, 3) * 40)  # weights that do not add up to 1: Graves' windows


@pytest.mark.parametrize(
    "weights, options, words",
    [
        (torch.rand(3), {}, r"\(T, S\)"),
        (torch.rand(3, 2, 4, 5), {}, "row=0"),
        (torch.rand(3, 4), {"row": 0}, "leave out row"),
        (torch.rand(3, 2, 4), {"row": 2}, "no row 2"),
        (torch.rand(3, 4), {"source": "a b c d e".split()}, "source labels"),
        (torch.rand(3, 4), {"target_length": 4}, "at most 3"),
    ],
)
def test_what_does_not_fit_is_named(weights, options, words):
    with pytest.raises(sl.InputError, match=words):
        sl.view.alignment(weights, **options)


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **named):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="fix: +pip install matplotlib"):
        sl.view.alignment(torch.rand(2, 2))
