"What has no place on the page of inference: bad files, odd names, threads, memory, and an explainer without torch"
import gc
import io
import json
import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from skin_gradcam.bundle import BundleError, BundleInfo, default_bundle, load_bundle, write_bundle
from skin_gradcam.inference import (
    Explainer,
    Explanation,
    PredictionWriter,
    Unreadable,
    ahead,
    list_pictures,
    path_names,
    safe_name,
    write_predictions,
)
from skin_gradcam.lesions import CLASSES, DECISIONS
from skin_gradcam.pictures import Limits, PictureError

SIZE, CELLS = 32, 4


def tiny_info(**kw):
    base = dict(name='tiny', arch='none', classes=list(CLASSES), size=SIZE, mean=[.5]*3, std=[.25]*3,
                manifest_hash='0'*64, seen_lesions=dict(train=[], valid=[], calibration=[]))
    return BundleInfo(**{**base, **kw})


def tiny_bundle(folder, **kw):
    "A bundle whose network is: average the pixels of each cell, then one linear layer on red, green and blue"
    w = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    b = np.array([.2, 0, -.2], np.float32)
    return write_bundle(folder, {'classifier.weight': w, 'classifier.bias': b}, tiny_info(**kw))


def numpy_backend(bundle):
    w, b = bundle.head()
    k = bundle.info.size//CELLS

    def run(x):
        f = x.reshape(len(x), 3, CELLS, k, CELLS, k).mean((3, 5))
        maps = np.einsum('ck,bkhw->bchw', w, f)/CELLS**2
        return (f.mean((2, 3)) @ w.T + b).astype(np.float32), maps.astype(np.float32)
    return run


@pytest.fixture(scope='module')
def explainer(tmp_path_factory):
    bundle = tiny_bundle(tmp_path_factory.mktemp('bundle')/'tiny', thresholds=dict(indeterminate=.45))
    return Explainer(bundle, numpy_backend(bundle))


def noise(seed, size=(60, 45)):
    low = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(low).resize(size, Image.Resampling.BICUBIC)


def jpeg(im, **kw):
    buf = io.BytesIO()
    im.save(buf, 'JPEG', **kw)
    return buf.getvalue()


def test_bad_files_keep_their_rows_and_do_not_stop_the_run(explainer, tmp_path):
    d = tmp_path/'in'
    d.mkdir()
    good = jpeg(noise(1))
    bad = {'empty.jpg': b'', 'text.jpg': b'hello', 'cut.jpg': good[:len(good)//2], 'zeros.tif': bytes(1000),
           'page.png': b'<html><script>alert(1)</script>', 'svg.png': b'<svg xmlns="http://www.w3.org/2000/svg"/>',
           'tiny.png': png(Image.new('RGB', (2, 2)))}
    for name, data in bad.items():
        (d/name).write_bytes(data)
    for name in ('a.jpg', 'z.JPEG'):
        (d/name).write_bytes(good)
    (d/'folder.jpg').mkdir()
    answers = list(explainer.explain_many([*list_pictures(d), d/'not there.jpg'], bs=3))
    by_name = {a.name: a for a in answers}
    assert set(by_name) == {*bad, 'a.jpg', 'z.JPEG', 'not there.jpg'}
    for n in [*bad, 'not there.jpg']:
        assert isinstance(by_name[n], Unreadable) and by_name[n].reason and '\n' not in by_name[n].reason
    table = write_predictions(answers, tmp_path/'out', overlays='all')
    df = pd.read_csv(table, keep_default_na=False)
    assert list(df.columns[:5]) == ['image', 'decision', 'p_nv', 'p_bkl', 'p_mel']
    assert set(df.decision) <= set(DECISIONS)
    unreadable = df[df.decision == 'unreadable']
    assert set(unreadable.image) == {*bad, 'not there.jpg'}
    assert (unreadable.reason != '').all() and (unreadable.p_mel == '').all()
    with np.load(tmp_path/'out'/'maps.npz') as npz:
        assert set(npz.files) == {'a.jpg', 'z.JPEG'}
        assert npz['a.jpg'].dtype == np.float32 and npz['a.jpg'].shape == (3, CELLS, CELLS)
    assert sorted(os.listdir(tmp_path/'out'/'overlays')) == ['a.png', 'z.png']


def png(im):
    buf = io.BytesIO()
    im.save(buf, 'PNG')
    return buf.getvalue()


def test_order_is_kept_whatever_the_batch_size(explainer):
    sources = [b'bad' if i % 4 == 2 else noise(i) for i in range(11)]
    wanted = [explainer(s).p if not isinstance(s, bytes) else None for s in sources]
    for bs in (1, 2, 3, 5, 64):
        got = explainer.batch(sources, bs=bs)
        assert len(got) == len(sources)
        for a, w in zip(got, wanted):
            assert isinstance(a, Unreadable) if w is None else np.allclose(a.p, w, atol=1e-6)


@pytest.mark.parametrize('kw', [dict(bs=0), dict(workers=0)])
def test_senseless_batches_are_refused(explainer, kw):
    with pytest.raises(ValueError, match='at least 1'):
        explainer.batch([noise(0)], **kw)


def test_all_bad_and_none_at_all(explainer, tmp_path):
    assert [a.decision for a in explainer.batch([b'', b'x'])] == ['unreadable']*2
    assert explainer.batch([]) == []
    table = write_predictions([], tmp_path)
    assert table.read_text().count('\n') == 1
    with np.load(tmp_path/'maps.npz') as npz:
        assert npz.files == []


def test_same_names_in_two_folders(explainer, tmp_path):
    for f in ('a/x.jpg', 'b/x.jpg', 'b/y.jpg'):
        (tmp_path/'in'/f).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/'in'/f).write_bytes(jpeg(noise(len(f))))
    df = pd.read_csv(write_predictions(explainer.explain_many(tmp_path/'in'), tmp_path/'out', overlays='all'))
    assert list(df.image) == ['a/x.jpg', 'b/x.jpg', 'y.jpg']
    assert df.overlay.is_unique and all((tmp_path/'out'/o).is_file() for o in df.overlay)
    with np.load(tmp_path/'out'/'maps.npz') as npz:
        assert npz.files == list(df.image)
    assert path_names([tmp_path/'in'/'a'/'x.jpg']*2)[0] == path_names([tmp_path/'in'/'a'/'x.jpg']*2)[1]


def test_hostile_names(explainer, tmp_path):
    names = ['../../escape.jpg', '/etc/passwd.jpg', '<script>.jpg', 'a\nb.jpg', 'x'*300 + '.jpg', '=cmd().jpg', '..',
             '', '.hidden.jpg', 'é ü 漢.jpg', 'same.jpg', 'same.jpg', 'SAME.jpg', 'nul\0.jpg', 'lone\udcff.jpg']
    im = noise(3)
    answers = list(explainer.explain_many([(n, im) for n in names]))
    df = pd.read_csv(write_predictions(answers, tmp_path/'deep'/'out', overlays='all'), keep_default_na=False)
    assert len(df) == len(names) and df.image.is_unique and df.overlay.is_unique
    with np.load(tmp_path/'deep'/'out'/'maps.npz') as npz:
        assert npz.files == list(df.image)
    written = [p for p in tmp_path.rglob('*') if p.is_file()]
    assert all(p.is_relative_to(tmp_path/'deep'/'out') for p in written)
    assert len([p for p in written if p.parent.name == 'overlays']) == len(names)
    assert '<script>' not in (tmp_path/'deep'/'out'/'report.html').read_text('utf-8')
    for a in answers:
        f = a.save(tmp_path/'saved')
        assert f.parent == tmp_path/'saved' and json.loads(f.read_text('utf-8'))['decision'] == a.decision
    assert len(safe_name('x'*1000)) <= 120


def test_memory_of_a_stream_is_constant(explainer):
    alive, most = weakref.WeakSet(), 0

    class Source(io.BytesIO):
        pass

    def sources():
        nonlocal most
        data = jpeg(noise(0))
        for _ in range(300):
            s = Source(data)
            alive.add(s)
            most = max(most, len(alive))
            yield s
    kept, n = weakref.WeakSet(), 0
    for a in explainer.explain_many(sources(), bs=4):
        n += 1
        kept.add(a)
        gc.collect(0)
        assert len(kept) <= 8
    assert n == 300 and most <= 24


def test_large_pictures_are_reduced_in_a_stream_and_kept_when_asked_for_alone(explainer):
    im = noise(0, (3000, 2000))
    one, = explainer.explain_many([im], keep_side=600)
    assert one.picture.size == (600, 400) and (one.geometry.width, one.geometry.height) == (3000, 2000)
    assert one.overlay().size == (600, 400)
    assert explainer(im).picture.size == (3000, 2000) and explainer(im).overlay().size == (1024, 683)
    none, = explainer.explain_many([im], keep_side=0)
    assert none.picture is None and '<img' not in none._repr_html_()
    with pytest.raises(ValueError, match='holds no picture'):
        none.overlay()
    assert np.array_equal(none.maps, one.maps)


def test_leaving_a_stream_early_leaves_no_thread(explainer):
    before = threading.active_count()
    stream = explainer.explain_many((noise(i) for i in iter(int, 1)), bs=2)
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_an_error_of_the_source_itself_is_not_swallowed(explainer):
    def broken():
        yield noise(0)
        raise RuntimeError('the list of files is gone')
    with pytest.raises(RuntimeError, match='list of files'):
        explainer.batch(broken())


def test_ahead_hands_on_errors_and_keeps_order():
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda i: 1//i, [1, 1, 0, 1], size=2))
    ready = threading.Barrier(2)
    out = ahead(lambda i: (ready.wait(5) if i < 2 else None, i)[1], range(6), size=4, workers=2)
    assert list(out) == list(range(6))


def test_threads_share_an_explainer(explainer):
    ims = [noise(i) for i in range(12)]
    serial = [explainer(im) for im in ims]
    start = threading.Barrier(6)

    def work(i):
        start.wait(5)
        return [explainer(im) for im in ims]
    with ThreadPoolExecutor(6) as pool:
        for got in pool.map(work, range(6)):
            for a, b in zip(got, serial):
                assert np.array_equal(a.maps, b.maps) and np.array_equal(a.p, b.p)


def test_limits_reach_the_decoder(tmp_path):
    bundle = tiny_bundle(tmp_path/'tiny')
    strict = Explainer(bundle, numpy_backend(bundle), Limits(max_pixels=1000))
    with pytest.raises(PictureError):
        strict(noise(0))
    assert strict.batch([jpeg(noise(0))])[0].decision == 'unreadable'


@pytest.mark.parametrize('wrong', [lambda x: (np.zeros((len(x), 2)), np.zeros((len(x), 2, 4, 4))),
                                   lambda x: (np.zeros((len(x)+1, 3)), np.zeros((len(x)+1, 3, 4, 4))),
                                   lambda x: (np.zeros((len(x), 3)), np.zeros((len(x), 3)))])
def test_a_backend_with_wrong_shapes_is_refused(explainer, wrong):
    with pytest.raises(ValueError, match='the backend gave logits'):
        Explainer(explainer.bundle, wrong)(noise(0))


def test_temperature_and_threshold_come_from_the_bundle(tmp_path):
    im = noise(5)
    cold = tiny_bundle(tmp_path/'cold', temperature=.25, thresholds=dict(indeterminate=0.))
    warm = tiny_bundle(tmp_path/'warm', temperature=50., thresholds=dict(indeterminate=.9))
    a, b = (Explainer(x, numpy_backend(x))(im) for x in (cold, warm))
    assert np.allclose(a.logits, b.logits) and a.p.max() > b.p.max() and a.top == b.top
    assert a.decision == a.top and b.decision == 'indeterminate' and '0.90' in b.reason
    assert abs(b.p.sum()-1) < 1e-12 and b.to_dict()['temperature'] == 50


def test_a_bundle_of_other_classes_is_refused(tmp_path):
    w = np.zeros((2, 3), np.float32)
    write_bundle(tmp_path/'two', {'classifier.weight': w, 'classifier.bias': w[:, 0]}, tiny_info(classes=['nv', 'mel']))
    with pytest.raises(ValueError, match='needs nv, bkl, mel'):
        Explainer(load_bundle(tmp_path/'two', classes=None), numpy_backend)
    with pytest.raises(BundleError):
        Explainer.load(tmp_path/'two')
    with pytest.raises(BundleError):
        Explainer.load(tmp_path/'nowhere')


def test_a_failing_run_leaves_the_result_before(explainer, tmp_path):
    write_predictions(explainer.explain_many([('one.jpg', noise(0))]), tmp_path, overlays=1)
    before = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    with pytest.raises(KeyboardInterrupt), PredictionWriter(tmp_path) as w:
        w.add(explainer(noise(1), name='two.jpg'))
        raise KeyboardInterrupt
    assert before == {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
    write_predictions(explainer.explain_many([('three.jpg', noise(2))]), tmp_path, overlays=1)
    assert os.listdir(tmp_path/'overlays') == ['three.png']


def test_overlays_are_limited(explainer, tmp_path):
    table = write_predictions(explainer.explain_many(noise(i) for i in range(7)), tmp_path, overlays=3)
    df = pd.read_csv(table, keep_default_na=False)
    assert (df.overlay != '').tolist() == [True]*3 + [False]*4
    assert (tmp_path/'report.html').read_text('utf-8').count('<article') == 3
    for bad in (-1, 'some', 2.5):
        with pytest.raises(ValueError, match='overlays'):
            PredictionWriter(tmp_path, overlays=bad)


def test_every_class_map_adds_up(explainer):
    for i in range(5):
        e = explainer(noise(i))
        assert isinstance(e, Explanation) and np.allclose(e.maps.sum((1, 2)) + e.bias, e.logits, atol=1e-4)
        t = e.contributions()
        assert np.allclose(t[['positive', 'negative', 'bias']].sum(axis=1), t['logit'], atol=1e-4)
        assert json.loads(json.dumps(e.to_dict(maps=True), allow_nan=False))['schema'] == 1


def test_an_explainer_without_torch(tmp_path):
    "Import, explain, write and print with a backend in numpy: no deep-learning library is loaded"
    tiny_bundle(tmp_path/'tiny')
    code = f'''
import sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_inference import numpy_backend, noise
from skin_gradcam.bundle import load_bundle
from skin_gradcam.inference import Explainer, write_predictions
b = load_bundle({str(tmp_path/'tiny')!r})
e = Explainer(b, numpy_backend(b))
write_predictions(e.explain_many([noise(i) for i in range(3)]), {str(tmp_path/'out')!r})
str(e(noise(0))), e(noise(0))._repr_html_()
print(sorted({{'torch', 'fastai', 'timm', 'torchvision'}} & set(sys.modules)))
'''
    got = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)
    assert got.stdout.strip() == '[]', got.stderr


def test_the_torch_backend_gives_what_gradcam_gives(tmp_path):
    torch = pytest.importorskip('torch')
    from skin_gradcam.gradcam import gradcam
    from skin_gradcam.models import create_model, model_from_bundle, model_tensors
    torch.manual_seed(0)
    model = create_model('resnet18', pretrained=False).eval()
    bundle = write_bundle(tmp_path/'b', model_tensors(model), tiny_info(arch='resnet18', size=64))
    ex = Explainer.load(bundle)
    ims = [noise(i) for i in range(3)]
    single, many = [ex(im) for im in ims], ex.batch(ims)
    net = model_from_bundle(bundle)
    from skin_gradcam.inference import prepare
    x = torch.from_numpy(np.stack([prepare(im, 'x', bundle).x for im in ims]))
    maps = gradcam(net, x, target='all').numpy()
    for a, b, m in zip(single, many, maps):
        scale = np.abs(m).max()
        assert np.allclose(a.maps, b.maps, atol=1e-5*scale) and np.allclose(a.maps, m, atol=1e-5*scale)
        assert np.allclose(a.maps.sum((1, 2)) + a.bias, a.logits, atol=1e-4)


@pytest.mark.data
def test_a_folder_of_originals_with_their_masks(explainer, real_data, tmp_path):
    "36 photographs lie beside 36 masks: the masks are not explained"
    answers = list(explainer.explain_many(real_data/'originals_600x450', keep_side=64))
    assert len(answers) == 36 and all(isinstance(a, Explanation) for a in answers)
    assert {(a.geometry.width, a.geometry.height, a.picture.width) for a in answers} == {(600, 450, 64)}


def test_the_bundle_that_ships():
    try:
        bundle = default_bundle()
    except BundleError as e:
        pytest.skip(f'{e}')
    e = Explainer.load(bundle)(noise(0))
    assert np.allclose(e.maps.sum((1, 2)) + e.bias, e.logits, atol=1e-4)
