"Corruptions on pictures of every kind, what is left when the lesion is hidden, and both on real pictures"
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from PIL import Image

from skin_gradcam import stress as S
from skin_gradcam.checks import find_masks
from skin_gradcam.evaluation import balanced_accuracy, ece
from skin_gradcam.phantoms import draw_phantom
from skin_gradcam.pictures import open_picture

SEEDED = {'noise', 'hair', 'ruler', 'ink', 'off_centre'}


def test_import_without_torch():
    code = ("import sys, skin_gradcam.stress\n"
            "bad = [m for m in ('torch', 'fastai', 'sklearn', 'matplotlib') if m in sys.modules]\n"
            "assert not bad, bad")
    subprocess.run([sys.executable, '-c', code], check=True)


@pytest.fixture(scope='module')
def phantom(): return draw_phantom('bkl', 5, width=120, height=90)


@pytest.mark.parametrize('name', S.CORRUPTIONS)
@pytest.mark.parametrize('shape', [(16, 16), (17, 33), (40, 24), (90, 120)])
def test_any_size_and_content(name, shape):
    rng = np.random.default_rng(0)
    black, white = (np.full((*shape, 3), v, np.uint8) for v in (0, 255))
    for a in (rng.integers(0, 256, (*shape, 3), np.uint8), black, white):
        a.flags.writeable = False
        for severity in (1, 5):
            b = S.corrupted(a, name, severity, seed=2)
            assert b.dtype == np.uint8 and b.shape == a.shape and b.flags.writeable and not np.shares_memory(a, b)
            np.testing.assert_array_equal(b, S.corrupted(a, name, severity, seed=2))


@pytest.mark.parametrize('name', S.CORRUPTIONS)
def test_only_what_is_drawn_by_chance_depends_on_the_seed(name, phantom):
    all_ = {S.corrupted(phantom.image, name, 5, seed=s).tobytes() for s in range(4)}
    assert len(all_) == (4 if name in SEEDED else 1)


SPATIAL = ['gaussian_blur', 'defocus', 'hair', 'dark_corners', 'ruler', 'closer', 'off_centre', 'farther']


@pytest.mark.parametrize('name', SPATIAL)
def test_lengths_are_shares_of_the_picture(name):
    "Corrupting a picture of twice the size and shrinking it is nearly the same as corrupting the small one"
    big = draw_phantom('nv', 2, width=400, height=300, hair=0.).image
    def shrink(a): return np.asarray(Image.fromarray(a).resize((200, 150), Image.Resampling.BOX)).astype(float)
    small = shrink(big).astype(np.uint8)
    away = np.abs(S.corrupted(small, name, 4, seed=1) - small.astype(float)).mean()
    apart = np.abs(shrink(S.corrupted(big, name, 4, seed=1)) - S.corrupted(small, name, 4, seed=1)).mean()
    assert apart < .35 * away, (apart, away)


def test_robustness_is_what_one_gets_by_hand(phantom):
    rng = np.random.default_rng(0)
    pictures = [draw_phantom(c, i, width=48, height=36).image for i, c in enumerate(['nv', 'bkl', 'mel'] * 6)]
    y, ids = np.arange(18) % 3, np.arange(18) // 2
    direction = rng.normal(0, 1, (3, 3))
    asked = []
    def predict(batch):
        asked.append(len(batch))
        z = np.stack([a.mean((0, 1)) / 40 for a in batch]) @ direction
        e = np.exp(z - z.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)
    t = S.robustness(predict, pictures, y, ids, ['darker', 'ink'], severities=(2, 5), n_boot=50, seed=7)
    assert sum(asked) == 18 * 5 and list(t.severity) == ['-', '2', '5', 'mean', '2', '5', 'mean']
    clean = predict(pictures)
    for row in t[t.severity.isin(['2', '5'])].itertuples():
        seeds = [int(S.stream(7, 'picture', i).integers(2**31)) for i in range(18)]
        q = predict([S.corrupted(a, row.corruption, int(row.severity), s) for a, s in zip(pictures, seeds)])
        assert np.isclose(row.drop, balanced_accuracy(y, clean) - balanced_accuracy(y, q))
        assert np.isclose(row.ece_change, ece(y, q) - ece(y, clean)) and row.drop_low <= row.drop_high
    S.plot_robustness(t).canvas.draw()
    with pytest.raises(ValueError, match='no probability distribution'):
        S.robustness(lambda b: np.ones((len(b), 3)), pictures, y, ids, ['ink'])


def blob(rng, h, w):
    "An ellipse anywhere, often over the frame"
    y, x = np.mgrid[:h, :w]
    v, u = (y - rng.uniform(0, h)) / rng.uniform(2, h / 2), (x - rng.uniform(0, w)) / rng.uniform(2, w / 2)
    return u**2 + v**2 < 1


def test_nothing_of_the_lesion_is_left():
    "Whatever stands inside the hidden area, the result is the same; whatever stands outside, it is untouched"
    rng, tried = np.random.default_rng(3), 0
    for _ in range(60):
        mask = blob(rng, 40, 56)
        for f, box in ((S.lesion_occluded, False), (S.background_only, True)):
            try: area = S.hidden_area(mask, .1, box)
            except S.MaskError as e:
                assert 'leave this picture out' in str(e)
                continue
            a = rng.integers(0, 256, (40, 56, 3), np.uint8)
            b = np.where(area[..., None], rng.integers(0, 256, a.shape, np.uint8), a)
            out = f(a, mask)
            np.testing.assert_array_equal(out, f(b, mask))
            np.testing.assert_array_equal(out[~area], a[~area])
            assert (area & mask).sum() == mask.sum()
            assert a[~area].min() <= out[area].min() and out[area].max() <= a[~area].max()
            tried += 1
    assert tried > 80


def test_fill_of_a_gradient_follows_it():
    ramp = np.repeat(np.linspace(50, 200, 80)[None, :, None], 60, 0).repeat(3, 2).astype(np.uint8)
    area = np.zeros((60, 80), bool)
    area[20:40, 30:50] = True
    assert np.abs(S.smooth_fill(ramp, area).astype(float) - ramp).max() < 25


@pytest.mark.data
def test_real_masks_and_pictures(real_data):
    root = real_data / 'ham10000'
    masks = find_masks(root)
    some = sorted(masks)[::1500][:6]
    for name in some:
        picture = np.asarray(open_picture(next(root.glob(f'HAM10000_images_part_*/{name}.jpg'))))
        mask = S.read_mask(root / masks[name], picture.shape[:2])
        assert mask.shape == picture.shape[:2] and 0 < mask.mean() < 1
        gone = S.lesion_occluded(picture, mask)
        kept = ~S.hidden_area(mask)
        assert len(np.unique(gone[mask], axis=0)) == 1 and (gone[kept] == picture[kept]).all()
        for corruption in S.CORRUPTIONS: assert S.corrupted(picture, corruption, 3).shape == picture.shape
    original = real_data / 'originals_600x450'
    if original.is_dir():
        path = next(p for p in sorted(original.rglob('*_segmentation.png')))
        full = S.read_mask(path)
        assert full.shape == (450, 600) and abs(S.read_mask(path, (224, 224)).mean() - full.mean()) < .01


@pytest.mark.data
def test_share_of_real_pictures_that_leave_no_skin(real_data):
    "About one in twenty, as the page says"
    t = pd.read_csv(ROOT / 'results/ham10000_roles.csv', comment='#')
    masks = find_masks(real_data / 'ham10000')
    left = [S.leaves_skin(S.read_mask(real_data / 'ham10000' / masks[i])) for i in t.image_id[::8]]
    assert .02 < 1 - np.mean(left) < .09


@pytest.mark.data
def test_whole_frame_masks_are_left_out_and_said(real_data):
    root = real_data / 'ham10000'
    masks = find_masks(root)
    pictures = [np.full((224, 224, 3), 90, np.uint8)] * 3
    real = [S.read_mask(root / masks[i]) for i in sorted(masks)[:2]]
    real.append(np.ones((224, 224), bool))
    t = S.occlusion_floors(lambda b: np.full((len(b), 3), 1 / 3), pictures, real, [0, 1, 2], list('abc'), n_boot=10)
    assert t.left_out.tolist() == [1] * 3 and t.n.tolist() == [2] * 3
