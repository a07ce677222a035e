"""What has no place on the page of `skin_gradcam.display`: threads, odd shapes, hostile numbers, what gets imported."""

import gc
import io
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from skin_gradcam.display import (
    alt_text,
    colorize,
    contour,
    describe_map,
    evidence_area,
    evidence_note,
    has_evidence,
    legend,
    overlay,
    scale_limit,
    show_contrast,
    show_maps,
    strength,
)
from skin_gradcam.phantoms import draw_phantom
from skin_gradcam.pictures import Geometry, resize_map

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(60, 200, (75, 100, 3), dtype=np.uint8)
MAPS = RNG.normal(0, 1, (3, 7, 7)).astype(np.float32)


def test_imports_neither_torch_nor_pyplot():
    "pyplot keeps figures alive for the whole process; torch is not needed to show a map"
    code = (
        "import sys, skin_gradcam.display; "
        "bad = {'torch', 'fastai', 'timm', 'torchvision', 'matplotlib.pyplot'} & set(sys.modules); "
        "sys.exit(str(bad) if bad else 0)"
    )
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr


@pytest.mark.parametrize('size', ((8, 8), (9, 301), (301, 9), (601, 451), (1200, 900)))
@pytest.mark.parametrize('grid', ((7, 7), (1, 1), (5, 9), (14, 14)))
def test_sizes_and_shapes(size, grid):
    m = np.random.default_rng(1).normal(size=grid)
    for kw in (dict(), dict(signed=False), dict(outline=0.5), dict(limit=9.0), dict(alpha=0), dict(alpha=1)):
        o = overlay(Image.new('RGB', size, (150, 120, 110)), m, **kw)
        assert o.size == size and o.mode == 'RGB'
        assert overlay(Image.new('RGB', size), -abs(m), **kw).size == size  # with a note on it


@pytest.mark.parametrize(
    'picture',
    (
        PICTURE,
        PICTURE[..., 0],
        np.dstack([PICTURE, PICTURE[..., :1]]),
        Image.fromarray(PICTURE),
        Image.fromarray(PICTURE).convert('L'),
        Image.fromarray(PICTURE).convert('P'),
    ),
)
def test_any_kind_of_picture(picture):
    before = np.array(picture)
    assert overlay(picture, MAPS[0]).size == (100, 75)
    assert (np.array(picture) == before).all()


def test_tint_lands_where_the_evidence_is():
    "On a wide and on a tall picture, each cell of the map tints its own part of the picture, and nothing far from it"
    for w, h in ((700, 210), (211, 701)):
        for i, j in ((0, 0), (1, 5), (6, 2), (3, 3)):
            m = np.zeros((7, 7))
            m[i, j] = 1
            o = np.asarray(overlay(np.full((h, w, 3), 128, np.uint8), m)).astype(int)
            moved = abs(o - 128).sum(2)
            y, x = np.unravel_index(moved.argmax(), moved.shape)
            assert abs((x + 0.5) / w * 7 - (j + 0.5)) <= 0.51 and abs((y + 0.5) / h * 7 - (i + 0.5)) <= 0.51
            ys, xs = np.nonzero(moved)
            assert (
                (xs / w * 7 > j - 0.6).all()
                and (xs / w * 7 < j + 1.6).all()
                and (ys / h * 7 > i - 0.6).all()
                and (ys / h * 7 < i + 1.6).all()
            )


def test_no_hidden_curve():
    "The tint grows in proportion to the value: no gamma, no squaring, no stretching to the map's own range"
    grey = np.full((8, 8, 3), 128, np.uint8)
    for sign in (1, -1):
        got = [
            np.asarray(overlay(grey, np.full((7, 7), sign * v), limit=1, note=False)).astype(float)[4, 4] - 128
            for v in np.linspace(0, 1, 21)
        ]
        want = np.linspace(0, 1, 21)[:, None] * got[-1]
        assert abs(np.array(got) - want).max() <= 1
    assert abs(np.array(got[-1])).max() > 50


def test_zero_is_no_tint_and_negative_is_hidden_unless_signed():
    flat = overlay(PICTURE, np.zeros((7, 7)), note=False)
    assert (np.asarray(flat) == PICTURE).all()
    assert (np.asarray(overlay(PICTURE, -np.ones((7, 7)), signed=False, note=False)) == PICTURE).all()
    assert (np.asarray(overlay(PICTURE, -np.ones((7, 7)), note=False)) != PICTURE).any()
    assert (np.asarray(overlay(PICTURE, MAPS[0], alpha=0, note=False)) == PICTURE).all()


@pytest.mark.parametrize('size', ((450, 600), (224, 224), (301, 97), (1000, 14)))
@pytest.mark.parametrize('grid', ((7, 7), (5, 9), (14, 14), (1, 3)))
def test_enlarged_as_opencv_does(size, grid):
    "Half-pixel bilinear; the tolerance is relative to the map's largest value"
    import cv2

    m = np.random.default_rng(2).normal(size=grid).astype(np.float32)
    want = cv2.resize(m, size[::-1], interpolation=cv2.INTER_LINEAR)
    assert abs(resize_map(m, size) - want).max() <= 1e-6 * abs(m).max()


def test_alpha_is_a_straight_line_in_srgb():
    "0 gives the picture, 1 the colours alone where the map reaches the limit, and between them nothing is bent"
    m = MAPS[0] / abs(MAPS[0]).max()
    shown = [np.asarray(overlay(PICTURE, m, alpha=a, limit=1, note=False)).astype(float) for a in np.linspace(0, 1, 11)]
    assert (shown[0] == PICTURE).all()
    for k, got in enumerate(shown):
        assert abs(got - (shown[0] + k / 10 * (shown[-1] - shown[0]))).max() <= 2  # rounding to bytes
    s = resize_map(m, PICTURE.shape[:2])[..., None]
    tint = np.where(s > 0, *(colorize(np.array([[v]]), 1, alpha=1)[0, 0].astype(float) for v in (1, -1)))
    assert abs(shown[-1] - (PICTURE + abs(s) * (tint - PICTURE))).max() <= 1.5


def test_large_pictures_show_the_same():
    "The same overlay at 600x450 and, four times as large, brought down to it"
    small = draw_phantom('mel', 3, width=600, height=450)
    m = np.clip(MAPS[1], 0, None)
    large = small.picture.resize((2400, 1800), Image.Resampling.BICUBIC)
    big = overlay(large, m, Geometry(2400, 1800, 224), outline=0.5)
    one = overlay(small.picture, m, Geometry(600, 450, 224), outline=0.5)
    assert big.size == (2400, 1800)
    back = np.asarray(big.resize((600, 450), Image.Resampling.BOX)).astype(int)
    assert abs(back - np.asarray(one)).mean() < 2


@pytest.mark.parametrize('share', (0.15, 0.5, 0.9))
def test_outline_at_a_share_of_the_maximum(share):
    "The area inside is the area where the interpolated map exceeds that share of its largest value"
    m = np.random.default_rng(5).gamma(0.5, 1, (7, 7)) - 0.2
    want = (resize_map(m, (700, 700)) >= share * m.max()).mean()
    assert evidence_area(m, share, of='maximum') == pytest.approx(want, abs=0.01)
    assert len(contour(m, share, of='maximum')) >= 1 and contour(-abs(m), share, of='maximum') == []


def test_shared_scale_keeps_weak_maps_weak():
    limit = scale_limit(*MAPS, 10 * MAPS[0])
    strong, weak = (
        abs(np.asarray(overlay(PICTURE, k * MAPS[0], limit=limit, note=False)).astype(int) - PICTURE).mean()
        for k in (10, 1)
    )
    assert 6 < strong / weak < 14
    assert limit == pytest.approx(10 * abs(MAPS[0]).max())


def test_words_where_nothing_is_to_be_seen():
    for m, words in ((np.zeros((7, 7)), 'no evidence for this class'), (-np.ones((7, 7)), 'only evidence against')):
        assert evidence_note(m) == words
        o = np.asarray(overlay(np.full((150, 200, 3), 128, np.uint8), m, signed=False)).astype(int)
        assert (o[:120] == 128).all() and (o[-20:].max() > 200), 'the note stands at the lower edge'
    assert 'hardly any' in evidence_note(np.full((7, 7), 0.01), 1)


@pytest.mark.parametrize('bad', (np.nan, np.inf, -np.inf))
def test_numbers_that_cannot_be_shown(bad):
    m = MAPS[0].copy()
    m[2, 2] = bad
    for f in (
        lambda: overlay(PICTURE, m),
        lambda: overlay(PICTURE, m, limit=1),
        lambda: colorize(m),
        lambda: strength(m, 1),
        lambda: contour(m),
        lambda: show_maps(PICTURE, np.stack([m] * 3)),
        lambda: scale_limit(m),
    ):
        with pytest.raises(ValueError, match='NaN or infinity'):
            f()


@pytest.mark.parametrize(
    'kw',
    (
        dict(alpha=-0.1),
        dict(alpha=1.1),
        dict(limit=0),
        dict(limit=-1),
        dict(limit=float('nan')),
        dict(outline=1.0),
        dict(outline=-1),
        dict(geometry=Geometry(75, 100, 224)),
    ),
)
def test_wrong_arguments(kw):
    with pytest.raises(ValueError):
        overlay(PICTURE, MAPS[0], **kw)


def test_map_of_wrong_shape():
    for m in (np.zeros(7), np.zeros((0, 7)), MAPS[None]):
        with pytest.raises(ValueError):
            overlay(PICTURE, m)
    for maps in (MAPS[0], MAPS[:2], MAPS[None]):
        with pytest.raises(ValueError, match='nv, bkl, mel'):
            show_maps(PICTURE, maps)
    with pytest.raises(ValueError):
        show_maps(PICTURE, MAPS, p=[0.5, 0.5])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(3, 9), st.integers(3, 9), st.sampled_from((0.25, 0.5, 0.9)))
def test_outline_holds_its_share(seed, h, w, share):
    m = np.random.default_rng(seed).gamma(0.5, 1, (h, w)) - 0.3
    lines = contour(m, share)
    if not has_evidence(m):
        assert not lines and evidence_area(m, share) == 0
        return
    S = 480
    inside = np.zeros((S, S), bool)
    for line in lines:  # holes are lines too: even-odd rule
        assert ((line >= 0) & (line <= 1)).all() and (line[0] == line[-1]).all()
        one = Image.new('1', (S, S))
        ImageDraw.Draw(one).polygon([tuple(map(float, S * q)) for q in line], fill=1)
        inside ^= np.asarray(one)
    big = np.clip(resize_map(m, (S, S)), 0, None)
    # the same region, found another way; equal values (the held edges) stay together, so it may hold more
    v = np.sort(big, axis=None)[::-1]
    level = v[np.searchsorted(np.cumsum(v, dtype=float), share * v.sum(dtype=float))]
    want = big >= level * (1 - 1e-3)
    clear = abs(big - level) > 0.02 * big.max()  # where two grids of samples must agree; a plateau may fall either way
    assert ((inside ^ want) & clear).mean() < 0.03
    assert big[want].sum() / big.sum() > share - 0.01
    assert (want & clear).mean() - 0.01 < evidence_area(m, share) < (want | ~clear).mean() + 0.01


def test_outline_at_the_border_is_closed():
    m = np.zeros((7, 7))
    m[0, 0] = m[6, 6] = 1
    lines = contour(m)
    assert len(lines) == 2 and all((line[0] == line[-1]).all() for line in lines)
    assert min(line.min() for line in lines) < 0.01 and max(line.max() for line in lines) > 0.99


def test_figures_from_many_threads_are_the_same():
    def job(i):
        return show_maps(PICTURE, MAPS * (1 + i % 3), p=[0.2, 0.3, 0.5], side=80).render()

    one = [job(i) for i in range(3)]
    with ThreadPoolExecutor(8) as pool:
        many = list(pool.map(job, range(9)))
    assert all(b == one[i % 3] for i, b in enumerate(many))
    assert len(set(one)) == 3


def test_figures_are_let_go():
    refs = []
    for _ in range(3):
        chart = show_maps(PICTURE, MAPS, side=60)
        chart.render()
        refs.append(weakref.ref(chart))
    del chart
    gc.collect()
    assert [r() for r in refs] == [None] * 3


def test_figure_formats_and_scale():
    chart = show_maps(PICTURE, MAPS, limit=0.5)
    assert Image.open(io.BytesIO(chart.render('png'))).format == 'PNG' and chart.render('svg').lstrip().startswith(
        b'<?xml'
    )
    bar = chart.axes[-1]
    assert [t.get_text() for t in bar.get_yticklabels()] == ['-0.5', '-0.25', '0', '+0.25', '+0.5']
    assert show_maps(PICTURE, MAPS).axes[-1].get_ylim()[1] == pytest.approx(abs(MAPS).max())
    assert len(show_maps(PICTURE, MAPS[:1], classes=['x']).axes) == 3


def colours(chart):
    return np.asarray(Image.open(io.BytesIO(chart.render('png'))).convert('RGB')).reshape(-1, 3).astype(int)


@pytest.mark.parametrize('ground', (255, 200, 90))
def test_legend_and_overlay_have_the_same_colours(ground):
    "The legend beside a picture of one colour holds the very colours of the overlays"
    flat = np.full((75, 100, 3), ground, np.uint8)
    strip = colours(show_maps(flat, MAPS, limit=2, outline=None))
    for v in (-2, -1, 1, 2):
        want = np.asarray(overlay(flat, np.full((7, 7), v), limit=2, note=False))[30, 50]
        assert (abs(strip - want) <= 2).all(1).any()
    if ground == 255:
        assert (abs(colours(legend(2)) - colorize(np.array([[2]]), 2)[0, 0]) <= 2).all(1).any()


def test_own_scales_have_own_legends():
    weak = MAPS * np.array([1, 0.1, 0.01])[:, None, None]
    chart = show_maps(PICTURE, weak, shared=False, side=80)
    bars = [a for a in chart.axes[4:] if a.get_visible()]
    assert [a.get_xlim()[1] for a in bars] == pytest.approx([abs(m).max() for m in weak])


@pytest.mark.parametrize('columns', (1, 2, 3, 9))
def test_columns(columns):
    chart = show_maps(PICTURE, MAPS, columns=columns, side=80, p=[0.2, 0.3, 0.5], logits=[1, 2, 3])
    shown = [a for a in chart.axes if a.images]
    places = {a.get_subplotspec().colspan.start for a in shown}
    assert len(shown) == 4 and places == set(range(min(columns, 4)))
    chart.render()
    box = chart.bbox
    for a in chart.axes:  # nothing is cut off, headings included
        t = a.get_tightbbox()
        assert t is None or (t.y1 <= box.y1 + 1 and t.y0 >= box.y0 - 1 and t.x0 >= box.x0 - 1 and t.x1 <= box.x1 + 1)


def test_the_difference_of_two_classes():
    chart = show_contrast(PICTURE, MAPS, 'mel', 'nv', logits=[0.5, 0, 2], side=80)
    assert chart.axes[3].get_title() == 'mel minus nv\nlogit +1.50'
    top = max(abs(m).max() for m in (MAPS[2], MAPS[0], MAPS[2] - MAPS[0]))
    assert chart.axes[-1].get_ylim()[1] == pytest.approx(top)
    assert describe_map(MAPS[2] - MAPS[0], 'melanoma rather than melanocytic nevus') in chart.alt
    for bad in (('mel', 'mel'), ('mel', 'cat')):
        with pytest.raises(ValueError):
            show_contrast(PICTURE, MAPS, *bad)


def test_maps_without_a_unit_claim_none():
    chart = show_maps(PICTURE, 1e-3 * MAPS, unit='', side=80)
    assert chart.axes[-1].get_ylabel() == 'against ← no unit → for'
    assert 'logit' not in chart.alt and chart.alt.count('speak') == 6


def test_words_travel_inside_the_files():
    chart = show_maps(PICTURE, MAPS, side=60)
    assert len(chart.alt) > 200
    assert Image.open(io.BytesIO(chart.render())).info['comment'].decode() == chart.alt
    assert Image.open(io.BytesIO(chart.render('png'))).text['Description'] == chart.alt
    assert chart.alt[:60] in chart.render('svg').decode()
    assert b'/Subject' in chart.render('pdf')


@pytest.mark.parametrize('decision', ('nv', 'bkl', 'mel', 'indeterminate', 'not_dermoscopic'))
def test_alt_text(decision):
    text = alt_text(SimpleNamespace(name='a.jpg', decision=decision, maps=MAPS, p=np.array([0.2, 0.7, 0.1])))
    assert text.startswith(f'Heat map over a.jpg: decision {decision}') and 'bkl 0.70, nv 0.20, mel 0.10' in text
    assert '\n' not in text and len(text) < 800 and text.endswith('.')


def test_amounts_in_words_are_the_sums():
    m = np.array([[1.5, -0.25], [0.5, -1.0]])
    assert describe_map(m, 'mel').startswith(
        'For melanoma speak +2 logits, most at the upper left'
    ) and '-1.2 logits speak against' in describe_map(m, 'mel')
