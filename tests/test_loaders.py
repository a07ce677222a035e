"""Batches that depend on (seed, epoch, item) only; peers; faults."""
import hashlib
import json
import pickle
import warnings
from dataclasses import asdict
from pathlib import Path

import fastai.callback.progress  # noqa: F401  (patches Learner.no_bar)
import fastai.callback.schedule  # noqa: F401  (patches Learner.fine_tune, lr_find)
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.learner import Learner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as TF

from skin_gradcam import augment as A
from skin_gradcam import loaders as L
from skin_gradcam.data import LeakError, draw_manifest, read_folder
from skin_gradcam.lesions import CLASSES
from skin_gradcam.loaders import (
    Augment,
    Draw,
    EpochSetter,
    LesionDataset,
    LoaderError,
    SeededSampler,
    fastai_loaders,
    torch_loaders,
)
from skin_gradcam.phantoms import write_phantoms
from skin_gradcam.pictures import PictureError, open_picture, squash, to_input

HALF = (.5, .5, .5)
STURDY = Augment(blur=1., noise=.03, jpeg=50, cutout=.2, hair=.8, vignette=.9)
# made by the first release
OLD: dict[str, dict] = dict(default={}, sturdy=dict(zoom=[.85, 1.25], blur=1.7, noise=.04, cutout=.2))
FROZEN_DRAWS = 'f95c32e41b85ead0'
FROZEN_MEANS = {'default': 0.47988, 'sturdy': 0.47814}
FROZEN_BATCHES = {
    'default': [0.994, 0.8673, 0.1694, 0.2812, 0.1716, 0.7712, 0.3269, 0.5927, 0.087],
    'sturdy': [0.7926, 0.8302, 0.1622, 0.2767, 0.4135, 0.7752, 0.3056, 0.5884, 0.1025],
}


@pytest.fixture(scope='module')
def manifest(tmp_path_factory):
    root = write_phantoms(tmp_path_factory.mktemp('phantoms'), per_class=10, seed=2)
    return draw_manifest(read_folder(root)[0], root, per_class=10, shares=(6, 2, 1, 1), folds=2)


@pytest.fixture(scope='module')
def squares(manifest, tmp_path_factory):
    return L.open_squares(manifest.df, manifest.root, 48, tmp_path_factory.mktemp('cache'))


def batches(manifest, epochs=2, bs=4, fast=False, **kw):
    if fast: dl = fastai_loaders(manifest, 48, HALF, HALF, bs=bs, device='cpu', **kw).train
    else: dl = torch_loaders(manifest, 48, HALF, HALF, bs=bs, **kw)['train']
    return [tuple(b) for _ in range(epochs) for b in dl]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(m[k], n[k]) for m, n in zip(a, b, strict=True) for k in (0, 1))


@pytest.mark.parametrize('workers', [1, 2])
def test_workers_do_not_matter(manifest, workers):
    assert same(batches(manifest, augment=STURDY, seed=5), batches(manifest, augment=STURDY, seed=5, workers=workers))


@pytest.mark.parametrize('workers', [0, 2])
def test_a_cache_file_does_not_matter(manifest, workers, squares):
    assert same(batches(manifest, augment=STURDY, seed=5),
                batches(manifest, augment=STURDY, seed=5, workers=workers, cache=squares))
    folder = squares.path.parent
    assert same(batches(manifest, seed=5), batches(manifest, seed=5, fast=True, workers=workers, cache=folder))


@pytest.mark.parametrize('fold', [0, 1])
def test_folds_share_a_cache_file(manifest, fold, squares, tmp_path, monkeypatch):
    "No picture is decoded again, and the batches are those of a fold decoded by itself"
    m = manifest.with_fold(fold)
    want = batches(m, augment=STURDY, seed=5, workers=2)
    monkeypatch.setattr('skin_gradcam.cache.decode_checked', None)
    assert same(batches(m, augment=STURDY, seed=5, cache=squares), want)
    assert same(batches(m, augment=STURDY, seed=5, cache=squares.path.parent), want)


@pytest.mark.parametrize('workers', [0, 2])
def test_fastai_gives_the_same(manifest, workers):
    assert same(batches(manifest, seed=5), batches(manifest, seed=5, fast=True, workers=workers))


def test_threads_do_not_matter(manifest, squares):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    one = batches(manifest, seed=1, augment=STURDY)
    torch.set_num_threads(2)
    try: two = batches(manifest, seed=1, augment=STURDY, cache=squares)
    finally: torch.set_num_threads(before)
    assert all(torch.allclose(a[0], b[0], atol=1e-5) for a, b in zip(one, two, strict=True))


def test_global_random_state_is_neither_used_nor_moved(manifest):
    torch.manual_seed(0); np.random.seed(0)
    a = batches(manifest, seed=3)
    torch.manual_seed(99); np.random.seed(99)
    before = torch.get_rng_state()
    assert same(a, batches(manifest, seed=3))
    assert same(a, batches(manifest, seed=3, fast=True))
    assert torch.equal(before, torch.get_rng_state())


def test_seeds_and_epochs_differ(manifest):
    a, b = batches(manifest, seed=0), batches(manifest, seed=1)
    assert not torch.equal(a[0][0], b[0][0]) and not torch.equal(a[0][0], a[len(a)//2][0])


def test_every_picture_once_an_epoch(manifest):
    ds = LesionDataset(manifest.role('train'), manifest.root, 32)
    order = list(SeededSampler(ds.labels, 3))
    assert sorted(order) == list(range(len(ds)))


def test_foreign_loader_and_collate(manifest):
    "A stock DataLoader with stock settings works on the data set"
    ds = LesionDataset(manifest.role('train'), manifest.root, 32, mean=HALF, std=HALF)
    x, y = next(iter(DataLoader(ds, batch_size=4)))
    assert x.shape == (4, 3, 32, 32) and y.tolist() == ds.labels[:4].tolist()
    assert torch.equal(x, ds.__getitems__([0, 1, 2, 3]).x)
    assert torch.equal(ds[-1][0], ds[len(ds)-1][0])
    with pytest.raises(IndexError): ds[len(ds)]


def test_cache_or_not(manifest):
    df = manifest.role('train')
    a, b = (LesionDataset(df, manifest.root, 40, augment=Augment(), cache=c) for c in ('memory', None))
    assert torch.equal(a.__getitems__([1, 3]).x, b.__getitems__([1, 3]).x)


def test_decoding_each_time_under_inference_mode(manifest):
    "The decoding threads are not in the caller's mode: they must not write into a tensor of it"
    with torch.inference_mode(): x, _ = next(iter(L.role_loader(manifest, 'valid', 32, HALF, HALF, cache=None)))
    y, _ = next(iter(L.role_loader(manifest, 'valid', 32, HALF, HALF)))
    assert torch.equal(x, y)


def test_same_pixels_as_inference(manifest):
    df = manifest.role('valid')
    ds = LesionDataset(df, manifest.root, 96, mean=(.4, .5, .6), std=(.2, .3, .4))
    for i, p in enumerate(manifest.paths(df)):
        want = to_input(squash(open_picture(p), 96)[0], (.4, .5, .6), (.2, .3, .4))
        assert torch.equal(ds[i][0], torch.from_numpy(want))


def test_bad_files_are_named(manifest, tmp_path):
    df = manifest.role('train')[:3].copy()
    for p in df.path:
        (tmp_path/p).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/p).write_bytes((manifest.root/p).read_bytes())
    torn = tmp_path/df.path[1]
    torn.write_bytes(torn.read_bytes()[:3000])
    with pytest.raises(PictureError) as e: LesionDataset(df, tmp_path, 32)
    assert df.path[1] in str(e.value) and str(tmp_path) not in str(e.value)
    torn.unlink()
    with pytest.raises(PictureError, match='no such file'): LesionDataset(df, tmp_path, 32)
    late = LesionDataset(df, tmp_path, 32, cache=None)
    assert late[0][0].shape == (3, 32, 32)
    with pytest.raises(PictureError, match=df.path[1]): late[1]


def test_no_bar_when_short(manifest, capsys):
    LesionDataset(manifest.role('train'), manifest.root, 32)
    assert capsys.readouterr() == ('', '')


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 5), st.integers(0, 5))
def test_balanced_order(labels, seed, epoch):
    labels = np.array(labels)
    order = L.epoch_order(labels, seed, epoch, True)
    drawn = [np.bincount(order, minlength=len(labels))[labels == c] for c in np.unique(labels)]
    sums = [d.sum() for d in drawn]
    assert len(order) == len(labels) and max(sums) - min(sums) <= 1
    assert all(d.max() - d.min() <= 1 for d in drawn), 'within a class each picture as often as the others'


def test_numbers_of_a_picture_are_frozen():
    "A recipe of last year draws what it drew; names may only be added at the end"
    known = ('flip_x flip_y rotate zoom stretch shift_x shift_y brightness contrast saturation hue red green blue blur '
             'jpeg quality cutout cutout_x cutout_y noise noise_seed').split()
    assert list(A.DRAWS[:22]) == known
    u = A.draw(7, 2, range(50))
    text = ' '.join(f'{x:.12f}' for k in known for x in u[k].tolist())
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == FROZEN_DRAWS


@pytest.mark.parametrize('kind', FROZEN_BATCHES)
def test_batches_of_older_recipes_are_frozen(kind):
    "Pixels as the first release made them, apart from the rounding of another processor"
    i, c, y, x = torch.meshgrid(*map(torch.arange, (4, 3, 32, 32)), indexing='ij')
    raw = ((x*(5+c) + y*(3+i) + x*y//3) % 256).to(torch.uint8)
    out = A.augmented(Augment(**OLD[kind]), raw, A.draw(3, 1, range(4)))
    got = out[:, :, [3, 16, 30], [5, 20, 11]].flatten()[::4]
    assert torch.allclose(got, torch.tensor(FROZEN_BATCHES[kind]), atol=2e-3)
    assert abs(out.mean() - FROZEN_MEANS[kind]) < 1e-4


def test_what_is_off_changes_nothing(manifest, squares):
    "Bit for bit: an old recipe without the new options, and one with them at 0"
    old = {k: v for k, v in asdict(Augment()).items() if k not in ('hair', 'vignette')}
    assert same(batches(manifest, augment=Augment(**old), cache=squares),
                batches(manifest, augment=Augment(**old, hair=0, vignette=0), cache=squares))
    x, u = squares.pixels[:4], A.draw(0, 0, range(4))
    plain = A.augmented(Augment.none(), torch.from_numpy(np.array(x)), u)
    assert torch.equal(plain, torch.from_numpy(x/np.float32(255)))


@pytest.mark.parametrize('file', ['ham10000_recipe_base.json', 'ham10000_recipe.json'])
def test_recipes_of_the_study_load(file):
    from skin_gradcam.training import Recipe
    path = Path(__file__).parents[1]/'results'/file
    stored, recipe = json.loads(path.read_text()), Recipe.load(path)
    assert (recipe.augment.hair, recipe.augment.vignette) == (0, 0)
    assert {k: v for k, v in json.loads(json.dumps(asdict(recipe.augment))).items() if k in stored['augment']} == \
        stored['augment']


def test_hair_and_vignette_only_darken(squares):
    x = torch.from_numpy(np.array(squares.pixels[:8]))
    u = A.draw(1, 0, range(8))
    none = asdict(Augment.none())
    plain = A.augmented(Augment(**none), x, u)
    dark = A.augmented(Augment(**{**none, 'vignette': 1}), x, u)
    assert (dark <= plain).all() and (dark == plain).flatten(1).all(1).tolist() == (u['vignette'] >= .5).tolist()
    hairy = A.augmented(Augment(**{**none, 'hair': 1}), x, u)
    assert (hairy == plain).flatten(1).all(1).tolist() == (u['hair'] >= .5).tolist()
    assert hairy.mean() < plain.mean()
    for bank in (A.hair_bank(48), A.corner_bank(48)):
        again = bank.clone()
        A.augmented(STURDY, x, u)
        assert torch.equal(bank, again), 'the bank is not painted over'


def test_a_dataset_with_a_cache_file_pickles_small(manifest, squares):
    "Worker processes that are not forks get the path"
    ds = LesionDataset(manifest.role('train'), manifest.root, 48, augment=STURDY, cache=squares)
    data = pickle.dumps(ds)
    assert len(data) < 20_000
    assert torch.equal(pickle.loads(data)[Draw(2, 3)][0], ds[Draw(2, 3)][0])


def test_a_table_without_hashes(manifest, squares, tmp_path):
    df = manifest.role('valid').drop(columns='sha256')
    a, b = (LesionDataset(df, manifest.root, 48, cache=c) for c in (squares, tmp_path))
    assert torch.equal(a[1][0], b[1][0])


@pytest.mark.parametrize('cache', ['mem', 5, True, False, '', 'folder/cache'])
def test_wrong_caches(manifest, cache):
    with pytest.raises(LoaderError, match="needs 'memory', 'disk', a folder as pathlib.Path"):
        LesionDataset(manifest.role('valid'), manifest.root, 48, cache=cache)


def test_the_users_cache_folder(manifest, tmp_path, monkeypatch):
    monkeypatch.setenv('SKIN_GRADCAM_CACHE', str(tmp_path))
    dls = torch_loaders(manifest, 48, HALF, HALF, bs=4, cache='disk')
    assert [p.parent.name for p in tmp_path.rglob('*.npy')] == ['squares']
    assert dls['train'].dataset.cache is dls['valid'].dataset.cache


tables = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 30), st.sampled_from(['train', 'valid', 'test'])),
                  min_size=2, max_size=12)


@settings(max_examples=200, deadline=None)
@given(tables, st.booleans())
def test_splitter_refuses_exactly_the_leaks(rows, by_fold):
    "Lesions or files on both sides are refused; otherwise every picture of the two roles is on its side"
    df = pd.DataFrame(rows, columns=['lesion_id', 'sha256', 'role']).astype({'lesion_id': str, 'sha256': str})
    df['fold'] = df.role.map(dict(train=1, valid=0, test=-1))
    sides = {r: df[df.role == r] for r in ('train', 'valid')}
    split = L.LesionSplitter(fold=0 if by_fold else None)
    if not all(map(len, sides.values())):
        with pytest.raises(LoaderError, match='pictures to train on'): split(df)
    elif any(set(sides['train'][k]) & set(sides['valid'][k]) for k in ('lesion_id', 'sha256')):
        with pytest.raises(LeakError, match=r'in two roles: .*\(train and valid\)'): split(df)
    else: assert [list(df.index[i]) for i in split(df)] == [list(d.index) for d in sides.values()]


def test_fastai_from_a_block(manifest):
    "Workers, transforms of fastai's own, and a Learner"
    from fastai.vision.augment import aug_transforms
    block = L.lesion_block(manifest, 48, fold=1, batch_tfms=aug_transforms(flip_vert=True, max_rotate=90))
    dls = block.dataloaders(manifest.df, bs=4, num_workers=2, device='cpu')
    x, y = dls.train.one_batch()
    assert x.shape == (4, 3, 48, 48) and 0 <= x.min() and x.max() <= 1 and set(y.tolist()) <= {0, 1, 2}
    held = {manifest.df.lesion_id[i] for i in dls.valid_ds.items.index}
    assert held and not held & {manifest.df.lesion_id[i] for i in dls.train_ds.items.index}
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 3))
    learn = Learner(dls, net)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert np.isfinite(learn.recorder.values[-1]).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=1, max_size=6), st.one_of(st.none(), st.floats(0, .9999)))
def test_class_weights(counts, beta):
    "Mean over the pictures 1; never more for a class with more pictures; between no weights and inverse frequency"
    w = L.class_weights(np.repeat(np.arange(len(counts)), counts), len(counts), beta).double()
    n = torch.tensor(counts).double()
    assert abs((w*n).sum()/n.sum() - 1) < 1e-4
    assert all(w[a] <= w[b]*1.00001 for a in range(len(n)) for b in range(len(n)) if n[a] >= n[b])
    assert w.max()/w.min() <= n.max()/n.min()*1.0001


@pytest.mark.parametrize('beta', [1, -1, 1.5, float('nan')])
def test_wrong_beta(beta):
    with pytest.raises(LoaderError, match='beta'): L.class_weights([0, 1], 2, beta)


floats = dict(rotate=180, shift=.5, brightness=1, contrast=1, saturation=1, hue=.5, cast=.5, blur=3, noise=.3,
              cutout=.9, hair=1, vignette=1)
zooms = st.tuples(st.floats(.3, 1), st.floats(1, 4))
strengths = st.builds(Augment, flip=st.booleans(), zoom=zooms, stretch=st.floats(1, 2),
                      jpeg=st.integers(0, 95), **{k: st.floats(0, v) for k, v in floats.items()})


@settings(max_examples=40, deadline=None)
@given(strengths, st.integers(0, 1000))
def test_any_strength(a, epoch):
    x = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(epoch))
    y = A.augmented(a, x, A.draw(0, epoch, [0, 1]))
    assert y.shape == x.shape and y.isfinite().all() and y.min() >= 0 and y.max() <= 1+1e-5
    assert Augment(**json.loads(json.dumps(asdict(a)))) == a


@pytest.mark.parametrize('wrong', [dict(rotate=-1), dict(zoom=1.2), dict(zoom=(0, 1)), dict(zoom=(1.1, 1)),
                                   dict(zoom=('a', 'b')), dict(hue=float('nan')), dict(flip=1), dict(jpeg=100),
                                   dict(brightness=True), dict(cutout='much'), dict(hair=2),
                                   dict(vignette=-.1)])
def test_wrong_strengths(wrong):
    with pytest.raises(LoaderError, match=next(iter(wrong))): Augment(**wrong)


@pytest.mark.peer
def test_warp_like_affine_grid():
    u, x = A.draw(0, 0, range(6)), torch.rand(6, 3, 33, 33)
    m = A.affine(Augment(), u)
    grid = F.affine_grid(m, x.shape, align_corners=False)
    want = F.grid_sample(x, grid, padding_mode='reflection', align_corners=False)
    assert torch.allclose(A.warp(x, m), want, atol=1e-4)


@pytest.mark.peer
@pytest.mark.parametrize('name,peer', [('saturation', TF.adjust_saturation), ('brightness', TF.adjust_brightness)])
def test_colour_like_torchvision(name, peer):
    u, x = A.draw(0, 0, range(4)), torch.rand(4, 3, 16, 16)*.5+.2
    a = Augment(**{**asdict(Augment.none()), name: .3})
    got = A.recolour(x, *A.recolouring(a, u, x.mean((2, 3))))
    want = torch.stack([peer(p, float(((2*s - 1)*.3).exp())) for p, s in zip(x, u[name], strict=True)])
    assert torch.allclose(got, want, atol=1e-3)


@pytest.mark.peer
def test_blur_like_torchvision():
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(A.blurred(x, torch.tensor([1.5, 1.5])), TF.gaussian_blur(x, [11, 11], [1.5, 1.5]), atol=1e-4)


class Keep(Callback):
    def __init__(self): self.seen = []
    def before_batch(self):
        if self.training: self.seen.append((self.xb[0].clone(), self.yb[0].clone()))


def learner(manifest, *cbs, workers=0):
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 3))
    dls = fastai_loaders(manifest, 48, HALF, HALF, bs=4, seed=5, device='cpu', workers=workers)
    return Learner(dls, net, lr=.01, cbs=cbs)


@pytest.mark.parametrize('workers', [0, 2])
def test_epochs_count_through_fine_tune(manifest, workers):
    keep = Keep()
    learn = learner(manifest, EpochSetter(), keep, workers=workers)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(2, freeze_epochs=1)
    assert same(keep.seen, batches(manifest, epochs=3, seed=5))


def test_epochs_after_lr_find_and_resume(manifest, tmp_path):
    want = batches(manifest, epochs=3, seed=5)
    keep = Keep()
    learn = learner(manifest, EpochSetter(start=1), keep)
    learn.path = tmp_path
    with learn.no_bar(), learn.no_logging():
        learn.lr_find(num_it=20, show_plot=False)
        keep.seen.clear()
        learn.fit(2)
    assert same(keep.seen, want[len(want)//3:])


def test_epoch_setter_on_other_loaders(manifest):
    "Loaders that know of no epoch are left alone; plain torch loaders in fastai's DataLoaders are told"
    from fastai.data.core import DataLoaders
    keep, made = Keep(), torch_loaders(manifest, 48, HALF, HALF, bs=4, seed=5)
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 3))
    learn = Learner(DataLoaders(made['train'], made['valid']), net, cbs=[EpochSetter(start=1), keep])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    want = batches(manifest, epochs=2, seed=5)
    assert same(keep.seen, want[len(want)//2:])


def test_draw_pickles():
    d = pickle.loads(pickle.dumps(Draw(4, 7)))
    assert (d, d.epoch, type(d)) == (4, 7, Draw)


def test_small_training_set(manifest):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        dls = fastai_loaders(manifest, 32, HALF, HALF, bs=10_000, device='cpu')
    assert len(dls.train) == 1 and 'taking bs=18' in str(said[0].message)


def test_balanced_through_the_loader(manifest):
    df = manifest.df.copy()
    few = df[(df.role != 'train') | (df.dx != 'mel') | (df.index % 3 == 0)]
    from skin_gradcam.data import Manifest
    m = Manifest(few, manifest.root, CLASSES)
    counts = m.counts().loc['train']
    assert counts['mel'] < counts['nv']
    y = torch.cat([b[1] for b in torch_loaders(m, 32, HALF, HALF, bs=1, balanced=True)['train']])
    n = torch.bincount(y, minlength=3)
    assert n.max() - n.min() <= 1


@pytest.mark.data
def test_real_pictures(real_data):
    folder = real_data/'ham10000'
    t = pd.read_csv(folder/'HAM10000_metadata.csv').drop_duplicates('dx')
    files = {p.stem: p.relative_to(folder).as_posix() for p in folder.rglob('*.jpg')}
    t = t[t.dx.isin(CLASSES) & t.image_id.isin(files)]
    df = t.assign(path=[files[i] for i in t.image_id])
    x = LesionDataset(df, folder, 160, augment=Augment()).__getitems__(range(len(df))).x
    assert x.shape == (len(df), 3, 160, 160) and x.isfinite().all() and x.std() > .1
