"""Occlusion against captum, RISE against masks drawn and upsampled element by element."""

import math

import pytest
import torch
from captum.attr import Occlusion
from explain_references import explain_settings, images, linear_classifier, preprocess, vit

from maehpc import keys
from maehpc.explain.engine import Engine

X = preprocess().normalise(images(3)).double()
BLACK = preprocess().normalise(torch.zeros(1, 3, 16, 16)).double()
TARGETS = torch.tensor([0, 3, 4])


def close(ours, theirs, relative):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=relative * theirs.abs().max().item())


def maps_of(name, classifier, x=X, targets=TARGETS, baseline=BLACK, seed=0, **options):
    settings = explain_settings(name, options={name: options})
    return Engine(classifier, settings, baseline, seed).attribute(x, targets).maps[name]


@pytest.mark.parametrize("representation", ["cls", "mean"])
@pytest.mark.parametrize(("size", "stride"), [(None, None), (8, 8), (6, 4), (5, 3), (7, 7), (16, 4), (16, 16), (5, 2)])
def test_occlusion_equals_captum(representation, size, stride):
    classifier = vit(representation).double()
    given = {name: value for name, value in (("size", size), ("stride", stride)) if value}
    size, stride = size or 4, stride or 4
    theirs = Occlusion(classifier).attribute(X, (3, size, size), (3, stride, stride), BLACK, TARGETS).detach()
    assert torch.equal(theirs[:, 0], theirs[:, 1])
    close(maps_of("occlusion", classifier, **given), theirs[:, 0].double(), 1e-6)  # captum's sums are in float32


def test_occlusion_of_a_linear_model():
    """One pixel at a time: each pixel's own contribution, summed over channels."""
    weight = torch.randn(5, 48, generator=torch.Generator().manual_seed(0)).double()
    x, baseline = images(3, side=4).double(), images(1, side=4, seed=9).double()
    ours = maps_of("occlusion", linear_classifier(weight, 4), x, baseline=baseline, size=1, stride=1)
    torch.testing.assert_close(ours, (weight[TARGETS].reshape(x.shape) * (x - baseline)).sum(dim=1))


def naive_masks(seed, count, grid, keep, side):
    """By the paper's section 3.2: cells, upsampled to (grid + 1) cells, cut out at a random place."""
    generator = keys.generator(seed, "rise")
    cells = (torch.rand(count, grid, grid, generator=generator) < keep).tolist()
    cell = math.ceil(side / grid)
    shifts = torch.randint(cell, (count, 2), generator=generator).tolist()
    length = (grid + 1) * cell

    def between(position):
        """The two nearest cells' centres and the way from the first to the second."""
        at = max((position + 0.5) * grid / length - 0.5, 0.0)
        low = int(at)
        return low, min(low + 1, grid - 1), at - low

    masks = torch.zeros(count, side, side, dtype=torch.float64)
    for number, (down, right) in enumerate(shifts):
        for i in range(side):
            top, bottom, v = between(i + down)
            for j in range(side):
                left, beyond, h = between(j + right)
                c = cells[number]
                masks[number, i, j] = (1 - v) * ((1 - h) * c[top][left] + h * c[top][beyond]) + v * (
                    (1 - h) * c[bottom][left] + h * c[bottom][beyond]
                )
    return masks


@pytest.mark.parametrize("representation", ["cls", "mean"])
@pytest.mark.parametrize(("count", "grid", "keep"), [(20, 7, 0.5), (30, 3, 0.2), (9, 16, 0.8), (5, 1, 0.5)])
def test_rise_equals_naive_masks(representation, count, grid, keep):
    classifier = vit(representation).double()
    ours = maps_of("rise", classifier, seed=4, masks=count, grid=grid, keep=keep)
    masks = naive_masks(4, count, grid, keep, 16)
    scores = torch.stack(
        [classifier(X * mask + BLACK * (1 - mask)).gather(1, TARGETS[:, None])[:, 0].detach() for mask in masks]
    )
    assert (masks.sum(dim=0) > 0).all()
    where_kept = torch.einsum("nb,nij->bij", scores, masks) / masks.sum(dim=0)  # E[f | the pixel is kept]
    close(ours, where_kept - scores.mean(dim=0)[:, None, None], 1e-9)


def test_rise_does_not_see_a_constant_added_to_the_logit():
    classifier = vit().double()
    before = maps_of("rise", classifier, masks=20)
    with torch.no_grad():
        classifier.head[-1].bias += 100
    close(maps_of("rise", classifier, masks=20), before, 1e-10)


def test_rise_finds_the_pixel_that_counts():
    weight = torch.zeros(5, 3 * 8 * 8).double()
    weight[:, 3 * 8 + 5] = 1  # channel 0, row 3, column 5
    x = torch.ones(3, 3, 8, 8).double()
    ours = maps_of("rise", linear_classifier(weight, 8), x, baseline=x[:1] * 0, masks=400, grid=8)
    assert ours.flatten(1).argmax(dim=1).tolist() == [3 * 8 + 5] * 3


def test_a_pixel_that_no_mask_keeps_gets_zero():
    ours = maps_of("rise", vit().double(), masks=2, grid=4, keep=0.05)
    kept = naive_masks(0, 2, 4, 0.05, 16).sum(dim=0)
    assert not kept.all()
    assert ours.isfinite().all()
    assert not ours[:, kept == 0].any()
