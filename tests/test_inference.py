"What has no place on the page of inference: bad files, odd names, threads, memory, and an explainer without torch"
import gc
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.numpy import save

from skin_gradcam.abstention import calibrate_gate, fit_gate
from skin_gradcam.bundle import (
    GATE,
    ONNX,
    BundleError,
    BundleInfo,
    add_files,
    default_bundle,
    load_bundle,
    write_bundle,
)
from skin_gradcam.inference import (
    Explainer,
    Explanation,
    PredictionWriter,
    Unreadable,
    ahead,
    list_pictures,
    path_names,
    prepare,
    safe_name,
    turn,
    write_predictions,
)
from skin_gradcam.lesions import CLASSES, DECISIONS
from skin_gradcam.phantoms import draw_phantom
from skin_gradcam.pictures import Limits, PictureError
from skin_gradcam.runtime import BackendError

ROOT = Path(__file__).resolve().parent.parent
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


def explainer_of(folder, **kw):
    "An explainer whose network averages cells; the tests of other modules use it too"
    bundle = tiny_bundle(folder, thresholds=dict(indeterminate=.4), **kw)
    return Explainer(bundle, numpy_backend(bundle))


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
    page = (tmp_path/'deep'/'out'/'report.html').read_text('utf-8')
    assert '<script>.jpg' not in page and '&lt;script&gt;.jpg' in page
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


# ---------------------------------------------------------------- gate, views, prior, notes, threads

@pytest.fixture(scope='module')
def gated(tmp_path_factory):
    "A little network with its ONNX file, a gate fitted on drawings, and what eight views need"
    torch = pytest.importorskip('torch')
    from skin_gradcam.models import create_model, model_tensors
    from skin_gradcam.onnx_export import add_onnx
    torch.manual_seed(0)
    net = create_model('test_efficientnet', pretrained=False).eval()
    info = tiny_info(arch='test_efficientnet', size=96, thresholds=dict(indeterminate=.2),
                     eight_views=dict(temperature=1.5, indeterminate=.1))
    b = add_onnx(write_bundle(tmp_path_factory.mktemp('gated')/'b', model_tensors(net), info))
    drawn = [drawing(i) for i in range(60)]
    run = Explainer(b, 'runtime').backend
    z, _, f = run(np.stack([prepare(im, '', b).x for im in drawn]))
    y = np.arange(60) % 3
    gate = calibrate_gate(fit_gate('mahalanobis', f[:36], z[:36], y[:36], rank=4), f[36:], z[36:])
    return add_files(b, {GATE: save(gate.to_arrays())})


def drawing(seed):
    return draw_phantom(CLASSES[seed % 3], seed=seed, width=120, height=90).picture


STATIC = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)


@pytest.mark.parametrize('backend', ['runtime', 'torch'])
def test_both_backends_refuse_the_same_pictures(gated, backend):
    one, other = Explainer.load(gated, backend), Explainer.load(gated, 'torch' if backend == 'runtime' else 'runtime')
    for im in [drawing(i) for i in range(70, 78)] + [STATIC]:
        a, b = one(im), other(im)
        assert a.decision == b.decision and a.strange_above == b.strange_above
        assert a.strangeness == pytest.approx(b.strangeness, rel=1e-2)
    assert one(STATIC).decision == 'not_dermoscopic' and one(STATIC).strangeness > one(STATIC).strange_above
    free = Explainer.load(gated, backend, gate=False)(STATIC)
    assert free.decision in (*CLASSES, 'indeterminate') and free.strangeness is free.strange_above is None


@pytest.mark.parametrize('backend', ['runtime', 'torch'])
@pytest.mark.parametrize('views', [1, 8])
def test_eight_threads_answer_as_one(gated, backend, views):
    "Gate, notes, maps and probabilities, whatever the other threads ask"
    ex = Explainer.load(gated, backend, views=views, prior=(.8, .1, .1))
    pictures = [*map(drawing, range(70, 77)), STATIC]
    serial = [ex(im).to_dict(maps=True) for im in pictures]
    start = threading.Barrier(8)

    def work(shift):
        start.wait(30)
        return [ex(pictures[(i+shift) % 8]).to_dict(maps=True) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for shift, got in enumerate(pool.map(work, range(8))):
            for i, d in enumerate(got):
                want = serial[(i+shift) % 8]
                assert (d['decision'], d['notes'], d['views']) == (want['decision'], want['notes'], views)
                assert d['probabilities'] == pytest.approx(want['probabilities'], abs=1e-5)
                np.testing.assert_allclose(d['map']['values'], want['map']['values'], atol=1e-5)


def test_every_kind_of_source_gives_the_same_answer(gated, tmp_path):
    "A path, text, bytes, an open file, an array, a PIL picture; one, a list, a folder, a generator"
    ex, im = Explainer.load(gated), drawing(71)
    data = png(im)
    (tmp_path/'in').mkdir()
    file = tmp_path/'in'/'a.png'
    file.write_bytes(data)
    single = [file, str(file), data, bytearray(data), memoryview(data), io.BytesIO(data), np.asarray(im), im]
    want = ex(im)
    for s in single:
        assert np.allclose(ex(s).p, want.p, atol=1e-6), type(s)
    with open(file, 'rb') as f:
        assert ex(f).name == 'a.png'
    for many in (file, tmp_path/'in', str(tmp_path/'in'), [file], [im], (s for s in [data]), [('named', data)], data):
        answers = ex.batch(many)
        assert len(answers) == 1 and np.allclose(answers[0].p, want.p, atol=1e-6), type(many)
    with open(file, 'rb') as f:
        assert ex.batch(f)[0].name == 'a.png'
    assert [a.name for a in ex.batch(tmp_path/'in')] == ['a.png']
    assert [a.decision for a in ex.batch([tmp_path/'nowhere.png', None, 3])] == ['unreadable']*3


def test_a_stranger_is_named_nowhere(gated, tmp_path):
    "Table, words, alt text, card and files of a picture that the gate refuses: no class, no overlay"
    ex = Explainer.load(gated)
    answers = [ex(drawing(71), name='lesion'), ex(STATIC, name='cat')]
    assert [a.decision == 'not_dermoscopic' for a in answers] == [False, True]
    df = pd.read_csv(write_predictions(answers, tmp_path/'out', overlays='all'), keep_default_na=False)
    assert df.decision[1] == 'not_dermoscopic' and (df.top[1], df.margin[1], df.overlay[1]) == ('', '', '')
    assert 'strangeness' in df.reason[1] and df.p_mel[1] != '' and list(df.columns)[-1] == 'notes'
    cat = answers[1]
    for text in (cat.words, cat.alt_text, str(cat)):
        assert 'ot dermoscopic' in text and not any(n in text for n in ('nevus', 'keratosis', '(nv)', '(mel)', '(bkl)'))
    d = cat.to_dict()
    assert d['usable'] is False and 'not to be used' in d['remarks'][0]
    assert cat._repr_html_().count('<img') == 1
    cat.save(tmp_path/'saved')
    assert os.listdir(tmp_path/'saved') == ['cat.json']


def test_eight_views_do_not_care_how_the_picture_lies(gated):
    "A square picture, turned and mirrored: the same logits, and maps that turn with it"
    ex = Explainer.load(gated, views=8)
    a = np.asarray(drawing(70).resize((96, 96)))
    want = ex(a)
    assert (want.views, want.temperature, want.threshold) == (8, 1.5, .1)
    for k in range(8):
        got = ex(np.ascontiguousarray(turn(a.transpose(2, 0, 1), k).transpose(1, 2, 0)))
        np.testing.assert_allclose(got.logits, want.logits, atol=1e-4)
        np.testing.assert_allclose(got.maps, turn(want.maps, k), atol=1e-4)
    assert np.allclose(want.maps.sum((1, 2)) + want.bias, want.logits, atol=1e-4)
    plain = Explainer.load(gated)(a)
    assert not np.allclose(plain.logits, want.logits, atol=1e-3)
    assert plain.strangeness == pytest.approx(want.strangeness, rel=1e-4)


def test_a_prior_moves_the_probabilities_and_nothing_else(gated):
    im = drawing(72)
    plain, moved = Explainer.load(gated)(im), Explainer.load(gated, prior=dict(nv=.9, bkl=.08, mel=.02))(im)
    odds = (moved.p/plain.p)/(moved.p/plain.p)[0]
    assert np.allclose(odds, [1, .08/.9, .02/.9]) and np.array_equal(plain.maps, moved.maps)
    assert np.allclose(Explainer.load(gated, prior=(1/3, 1/3, 1/3))(im).p, plain.p)
    for bad in ({}, [1, 0, 0], dict(nv=1), (.5, .5, .5), 'nv', [np.inf, 0, 0], dict(nv='a', bkl=0, mel=0)):
        with pytest.raises(ValueError, match='give a share above 0 for each of nv, bkl, mel'):
            Explainer.load(gated, prior=bad)


def test_notes_reach_the_table(gated, tmp_path):
    soft = drawing(70).resize((12, 9)).resize((120, 90))
    e = Explainer.load(gated)(soft)
    assert 'blurred' in e.notes and e.to_dict()['notes'] == list(e.notes) and 'blurred' in str(e)
    df = pd.read_csv(write_predictions([e], tmp_path), keep_default_na=False)
    assert df.notes[0] == '; '.join(e.notes)


def test_a_file_without_features_and_a_gate(gated, tmp_path):
    "An ONNX file of an earlier day: the gate cannot look, and that is said rather than passed over"
    onnx = pytest.importorskip('onnx')
    proto = onnx.load_from_string(gated.read(ONNX))
    kept = [o for o in proto.graph.output if o.name != 'features']
    del proto.graph.output[:]
    proto.graph.output.extend(kept)
    shutil.copytree(gated.folder, tmp_path/'old')
    old = add_files(load_bundle(tmp_path/'old'), {ONNX: proto.SerializeToString()})
    with pytest.raises(BackendError, match='gives no features for the gate'):
        Explainer.load(old)
    assert Explainer.load(old, gate=False)(drawing(70)).strangeness is None
    assert Explainer.load(old, 'torch')(drawing(70)).strangeness is not None


@pytest.mark.parametrize('out', [lambda z, m, f: (z, m, f[:, :5]), lambda z, m, f: (z, m, f*np.nan)])
def test_a_backend_with_wrong_features_is_refused(gated, out):
    run = Explainer.load(gated).backend
    with pytest.raises(ValueError, match='features'):
        Explainer(gated, lambda x: out(*run(x)))(drawing(70))


def test_the_gate_that_ships_is_the_one_of_the_study():
    "Kind and limit, and no more than 5 % refused of what set the limit"
    with open(ROOT/'results'/'ham10000_gate.json') as f: told = json.load(f)
    with open(ROOT/'results'/'ham10000_abstention.json') as f: study = json.load(f)['gate']
    b = default_bundle()
    rules = Explainer.load(b, views=8).rules
    assert told['weights'] == b.info.files['model.safetensors'] == study['weights']
    assert rules.gate.kind == told['gate']['kind'] == study['ships']
    assert rules.gate.threshold == told['gate']['limit'] == pytest.approx(study['threshold'][study['ships']], rel=1e-4)
    assert told['gate']['refused'] <= .05 and rules.gate.nbytes <= 500_000
    eight = told['eight_views']
    assert (rules.temperature, rules.threshold) == (eight['temperature'], eight['indeterminate'])
    assert GATE in b.read('MODEL_CARD.md').decode()


@pytest.mark.data
def test_the_gate_on_real_originals(real_data):
    "36 photographs as they were taken: at most four are refused, and those that are, are marked"
    answers = Explainer.load().batch(real_data/'originals_600x450', keep_side=0)
    refused = [a for a in answers if a.decision == 'not_dermoscopic']
    assert len(answers) == 36 and len(refused) <= 4
    assert all(a.strangeness > a.strange_above and not a.usable for a in refused)


def test_the_import_stays_light():
    "scipy, matplotlib, torch and onnxruntime wait until they are needed"
    code = ("import sys, skin_gradcam.inference\n"
            "bad = {'scipy', 'matplotlib', 'torch', 'onnxruntime', 'sklearn'} & set(sys.modules)\n"
            "assert not bad, bad")
    subprocess.run([sys.executable, '-c', code], check=True)


def test_a_stream_gives_each_thread_a_whole_batch():
    "With onnxruntime: one thread a run, the order kept, the explainer's own answers, one session for all streams"
    e = Explainer.load(gate=False)
    pictures = [draw_phantom(CLASSES[i % 3], seed=i).image for i in range(11)]
    many = list(e.explain_many([*pictures[:4], b'no picture', *pictures[4:]], bs=2, workers=3))
    assert [a.decision == 'unreadable' for a in many] == [i == 4 for i in range(12)]
    assert [a.name for a in many] == [f'picture-{i+1}' for i in range(12)]
    for a, im in zip([a for a in many if a.decision != 'unreadable'], pictures, strict=True):
        np.testing.assert_allclose(a.p, e(im).p, atol=1e-5)
    kept = e.one
    assert kept.backend.threads == 1 and kept is not e
    list(e.explain_many(pictures[:1]))
    assert e.one is kept
    assert Explainer(default_bundle(), kept.backend).batch(pictures[:1])[0].p.tolist() == kept(pictures[0]).p.tolist()
