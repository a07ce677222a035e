"""Fault injection and peers for `skin_gradcam.pictures`: whatever comes in, a picture or a PictureError comes out."""

import io
import os
import pickle
import random
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageFilter, ImageOps

from skin_gradcam.pictures import (
    Geometry,
    Limits,
    PictureError,
    open_picture,
    quality_notes,
    resize_map,
    squash,
    to_input,
)

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)
SMOOTH = np.stack(np.broadcast_arrays(np.arange(64)[None] * 3, np.arange(48)[:, None] * 4, 90), -1).astype(np.uint8)
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'TIFF', 'GIF')


def encoded(im, fmt, **kw):
    f = io.BytesIO()
    (Image.fromarray(im) if isinstance(im, np.ndarray) else im).save(f, fmt, **kw)
    return f.getvalue()


def png_chunk(kind, data=b''):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png_header(w, h, bits=8, colour=2):
    return b'\x89PNG\r\n\x1a\n' + png_chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, bits, colour, 0, 0, 0))


# ---------------------------------------------------------------- what must be read


@pytest.mark.parametrize('fmt', FORMATS)
def test_formats(fmt):
    got = np.array(open_picture(encoded(SMOOTH, fmt)), dtype=int)
    assert got.shape == SMOOTH.shape and abs(got - SMOOTH).mean() < (8 if fmt in ('JPEG', 'WEBP', 'GIF') else 0.001)


def test_suffix_does_not_matter(tmp_path):
    p = tmp_path / 'mole.jpg'
    p.write_bytes(encoded(SMOOTH, 'PNG'))
    assert (np.array(open_picture(p)) == SMOOTH).all()


@pytest.mark.parametrize('fmt', ('JPEG', 'PNG', 'WEBP', 'TIFF'))
@pytest.mark.parametrize('orientation', range(1, 9))
def test_orientation(fmt, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    kw = dict(quality=95) if fmt == 'JPEG' else dict(lossless=True) if fmt == 'WEBP' else {}
    data = encoded(SMOOTH, fmt, exif=exif, **kw)
    want = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert('RGB')
    assert want.size == ((64, 48) if orientation < 5 else (48, 64))
    got = open_picture(data)
    assert (np.array(got) == np.array(want)).all()
    assert (np.array(open_picture(Image.open(io.BytesIO(data)))) == np.array(want)).all()
    assert (np.array(open_picture(got)) == np.array(want)).all(), 'turned twice'


def test_orientation_undoes_the_camera():
    "A scene is known; the sensor saw it turned; the note says how: the scene comes back"
    scene = Image.fromarray(SMOOTH)
    exif = Image.Exif()
    for note, sensor in (
        (6, Image.Transpose.ROTATE_90),
        (8, Image.Transpose.ROTATE_270),
        (3, Image.Transpose.ROTATE_180),
    ):
        exif[0x0112] = note
        assert (np.array(open_picture(encoded(scene.transpose(sensor), 'PNG', exif=exif))) == SMOOTH).all()


@pytest.mark.parametrize('orientation', (0, 9, 255, 65535, 'upright', 6.5))
def test_odd_orientation_counts_as_upright(orientation):
    im = Image.fromarray(SMOOTH)
    im.getexif()[0x0112] = orientation
    assert open_picture(im).size == (64, 48)


@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_damaged_exif():
    for exif in (b'Exif\0\0', b'Exif\0\0MM\0*\xff\xff\xff\xff', b'Exif\0\0II*\0\x08\0\0\0\xff\xff', RNG.bytes(99)):
        assert open_picture(encoded(SMOOTH, 'JPEG', exif=exif)).size == (64, 48)


@pytest.mark.parametrize('dtype, top', ((np.uint16, 65535), (np.uint8, 255)))
def test_16_bit_grey(dtype, top):
    a = np.linspace(0, top, 48 * 64).reshape(48, 64).round().astype(dtype)
    for fmt in ('PNG', 'TIFF'):
        got = np.array(open_picture(encoded(a, fmt)), dtype=float)
        assert abs(got[..., 0] - a * (255 / top)).max() <= 0.51 and (got[..., :1] == got).all()


def test_16_bit_big_endian_tiff_and_rgb_png():
    import cv2

    a = np.linspace(0, 65535, 48 * 64 * 3).reshape(48, 64, 3).astype(np.uint16)
    got = np.array(open_picture(cv2.imencode('.png', a[..., ::-1])[1].tobytes()), dtype=float)
    assert abs(got - a / 257).max() <= 1
    big = Image.frombytes('I;16B', (64, 48), a[..., 0].astype('>u2').tobytes())
    assert abs(np.array(open_picture(big), dtype=float)[..., 0] - a[..., 0] / 257).max() <= 0.51


def test_cmyk_jpeg_keeps_colours():
    got = np.array(open_picture(encoded(Image.fromarray(SMOOTH).convert('CMYK'), 'JPEG', quality=95)), dtype=int)
    assert abs(got - SMOOTH).mean() < 6


def test_palette_with_transparency():
    im = Image.new('P', (16, 16), 0)
    im.putpalette([200, 0, 0, 0, 150, 0])
    im.putpixel((3, 3), 1)
    for kw in (dict(transparency=0), dict(transparency=b'\0\xff')):
        got = open_picture(encoded(im, 'PNG', **kw))
        assert got.getpixel((0, 0)) == (255, 255, 255) and got.getpixel((3, 3)) == (0, 150, 0)


@pytest.mark.parametrize('mode', ('RGBA', 'LA'))
def test_transparency_over_white(mode):
    im = Image.new(mode, (16, 16), (0, 0, 0, 0) if mode == 'RGBA' else (0, 0))
    assert open_picture(encoded(im, 'PNG')).getpixel((8, 8)) == (255, 255, 255)
    assert open_picture(np.array(Image.new('RGBA', (16, 16), (9, 9, 9, 0)))).getpixel((8, 8)) == (255, 255, 255)


def test_transparent_colour_of_rgb_png():
    im = Image.new('RGB', (16, 16), (1, 2, 3))
    assert open_picture(encoded(im, 'PNG', transparency=(1, 2, 3))).getpixel((8, 8)) == (255, 255, 255)


@pytest.mark.parametrize('fmt', ('GIF', 'WEBP', 'PNG', 'TIFF'))
def test_animation_gives_first_frame(fmt):
    frames = [Image.new('RGB', (32, 24), c) for c in ((250, 0, 0), (0, 250, 0), (0, 0, 250))]
    kw = dict(lossless=True) if fmt == 'WEBP' else {}
    got = open_picture(encoded(frames[0], fmt, save_all=True, append_images=frames[1:], **kw))
    assert got.size == (32, 24) and got.getpixel((5, 5)) == (250, 0, 0)


def test_progressive_and_one_bit_and_grey():
    assert open_picture(encoded(NOISE, 'JPEG', progressive=True)).size == (64, 48)
    assert open_picture(encoded(Image.new('1', (16, 16), 1), 'TIFF')).getpixel((1, 1)) == (255, 255, 255)
    assert open_picture(encoded(NOISE[..., 0], 'JPEG')).mode == 'RGB'


def test_source_is_left_alone():
    a = NOISE.copy()
    im = open_picture(a)
    im.paste((0, 0, 0), (0, 0, 9, 9))
    assert (a == NOISE).all()
    b = Image.fromarray(NOISE)
    open_picture(b).paste((0, 0, 0), (0, 0, 9, 9))
    assert (np.array(b) == NOISE).all()


def test_no_metadata_travels():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, 'camera'
    exif.get_ifd(0x8825)[1] = 'N'
    got = open_picture(encoded(SMOOTH, 'JPEG', exif=exif, icc_profile=b'x' * 200, comment=b'name of a patient'))
    assert not got.info and not len(got.getexif())
    again = encoded(got, 'JPEG')
    assert b'camera' not in again and b'patient' not in again


# ---------------------------------------------------------------- what must be refused, and how


def refused(src, *words, limits=None):
    with pytest.raises(PictureError) as e:
        open_picture(src, limits=limits or Limits(), name='mole.jpg')
    text = str(e.value)
    assert text.startswith('mole.jpg: ') and '\n' not in text and e.value.reason and e.value.advice, text
    for w in words:
        assert w in text, (w, text)


@pytest.mark.parametrize('share', (0.02, 0.3, 0.6, 0.9))
@pytest.mark.parametrize('fmt, switch', [(f, False) for f in FORMATS] + [(f, True) for f in ('JPEG', 'PNG', 'WEBP')])
def test_truncated(fmt, share, switch, monkeypatch):
    "At any place, and even where another library has told Pillow to accept broken files"
    monkeypatch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', switch)
    data = encoded(NOISE, fmt)
    refused(data[: int(len(data) * share)])
    assert ImageFile.LOAD_TRUNCATED_IMAGES is switch


def test_truncated_jpeg_says_so():
    data = encoded(NOISE, 'JPEG')
    refused(data[: len(data) // 2], 'the JPEG file breaks off', 'copy or save it again')
    thumb = Image.Exif()
    thumb[0x010F] = 'x'
    refused(encoded(NOISE, 'JPEG', exif=thumb)[:-2000], 'breaks off')


@pytest.mark.parametrize(
    'data, words',
    (
        (b'', 'the file is empty'),
        (b'\xff', 'no known kind of file'),
        (b'\xff\0\1\2\3\4', 'no known kind of file'),
        (b'not a picture at all', 'this is text'),
        (b'\xff\xd8\xff', 'the JPEG file'),
        (b'\x89PNG\r\n\x1a\n', 'the PNG file'),
        (b'GIF89a', 'the GIF file'),
        (b'BM', 'the BMP file'),
        (b'BMW is a car, and this is a text that begins like a bitmap. ' * 3, 'the BMP file'),
        (b'II*\0', 'the TIFF file'),
        (b'RIFF\0\0\0\0WEBP', '0x0 pixels'),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'an SVG drawing'),
        (b'<!doctype html><title>404</title>', 'a web page (HTML)'),
        (b'PK\3\4' + bytes(50), 'a ZIP archive'),
        (b'%PDF-1.4', 'a PDF'),
        (b'\0\0\0\x1cftypavif', 'an AVIF picture'),
        (b'\0\0\0\x18ftypheic', 'a HEIC picture'),
    ),
)
def test_foreign(data, words, tmp_path):
    refused(data, words)
    (tmp_path / 'x.jpg').write_bytes(data)
    refused(tmp_path / 'x.jpg', words)


def test_paths(tmp_path):
    refused(tmp_path, 'this is a folder')
    refused(tmp_path / 'none.jpg', 'there is no such file')
    refused(str(tmp_path / ('x' * 300 + '.jpg')), 'cannot be read')
    refused('/dev/zero', 'not a regular file')
    refused('a\0b', 'cannot be read')
    (tmp_path / 'loop').symlink_to(tmp_path / 'loop')
    refused(tmp_path / 'loop', 'cannot be read')
    refused('https://example.org/mole.jpg', 'there is no such file')


def test_no_permission(tmp_path, monkeypatch):
    def closed(*a, **kw):
        raise PermissionError(13, 'Permission denied')

    (tmp_path / 'x.jpg').touch()
    monkeypatch.setattr('builtins.open', closed)
    refused(tmp_path / 'x.jpg', 'Permission denied', 'check the path and its permissions')


def test_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / 'x.jpg')
    refused(tmp_path / 'x.jpg', 'not a regular file')


def test_sizes():
    for w, h in ((1, 1), (7, 300), (300, 7)):
        refused(encoded(Image.new('RGB', (w, h)), 'PNG'), f'{w}x{h} pixels', 'at least 8')
        refused(np.zeros((h, w, 3), np.uint8), f'{w}x{h} pixels')
    assert open_picture(np.zeros((8, 8), np.uint8)).size == (8, 8)
    refused(np.zeros((0, 8, 3), np.uint8), '8x0 pixels')
    refused(NOISE, '64x48', limits=Limits(max_pixels=64 * 48 - 1))
    assert open_picture(NOISE, Limits(max_pixels=64 * 48)).size == (64, 48)


def test_too_many_bytes(tmp_path):
    class Endless(io.RawIOBase):
        got = 0

        def read(self, n=-1):
            assert n > 0
            self.got += n
            return bytes(n)

    f = Endless()
    refused(f, 'more than 1 MiB', limits=Limits(max_bytes=2**20))
    assert f.got == 2**20 + 1
    with open(tmp_path / 'big.jpg', 'wb') as g:
        g.truncate(2**40)
    refused(tmp_path / 'big.jpg', 'more than 32 MiB')


@pytest.mark.parametrize(
    'bad',
    (
        NOISE.astype(np.float32),
        NOISE.astype(int),
        NOISE.transpose(2, 0, 1),
        NOISE[None],
        NOISE[:, :, :2],
        NOISE > 9,
        np.zeros((9, 9), object),
        3,
        None,
        [1, 2],
        {},
        object(),
    ),
)
def test_wrong_types(bad):
    refused(bad)


def test_file_object_of_text_and_closed():
    refused(io.StringIO('text'), "open the file in mode 'rb'")
    f = io.BytesIO(b'x')
    f.close()
    refused(f, 'cannot be read')


def bombs():
    idat = png_chunk(b'IDAT', zlib.compress(bytes(10**6)))
    yield 'png', png_header(30000, 30000) + idat + png_chunk(b'IEND')
    yield 'png-max', png_header(2**31 - 1, 2**31 - 1) + idat + png_chunk(b'IEND')
    j = bytearray(encoded(NOISE, 'JPEG'))
    k = j.index(b'\xff\xc0')
    j[k + 5 : k + 9] = struct.pack('>HH', 65500, 65500)
    yield 'jpeg', bytes(j)
    g = bytearray(encoded(NOISE, 'GIF'))
    g[6:10] = struct.pack('<HH', 65535, 65535)
    yield 'gif', bytes(g)
    b = bytearray(encoded(NOISE, 'BMP'))
    b[18:26] = struct.pack('<ii', 60000, 60000)
    yield 'bmp', bytes(b)
    yield (
        'webp',
        b'RIFF'
        + struct.pack('<I', 22)
        + b'WEBPVP8X'
        + struct.pack('<I', 10)
        + bytes(4)
        + (16382).to_bytes(3, 'little') * 2,
    )
    for tags in ({256: 40000, 257: 40000}, {256: 64, 257: 48, 322: 2**20, 323: 2**20}):
        entries = {
            258: 8,
            259: 1,
            262: 1,
            277: 1,
            **tags,
            **({324: 8, 325: 64} if 322 in tags else {273: 8, 278: tags[257], 279: 64}),
        }
        ifd = (
            struct.pack('<H', len(entries))
            + b''.join(struct.pack('<HHII', t, 4, 1, v) for t, v in sorted(entries.items()))
            + bytes(4)
        )
        yield 'tiff' + str(len(tags)), b'II*\0' + struct.pack('<I', 8) + ifd + bytes(999)


@pytest.mark.parametrize('kind, data', list(bombs()), ids=[k for k, _ in bombs()])
def test_bomb_is_refused_before_it_unfolds(kind, data, recwarn):
    warnings.simplefilter('error')
    refused(data, 'too large' if kind == 'tiff4' else 'million')
    assert not len(recwarn)


def test_bombs_need_no_memory():
    "A process of 1.5 GB at most refuses all of them; the peak grows by less than 40 MB"
    code = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1536*2**20,)*2)
from skin_gradcam.pictures import open_picture, PictureError
bombs = {list(bombs())!r}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for k,b in bombs:
    try: open_picture(b); sys.exit(k+' was read')
    except PictureError as e: assert 'memory' not in str(e).lower(), e
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before
assert grown < 40*1024, grown
assert 'torch' not in sys.modules and 'fastai' not in sys.modules
"""
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]


@pytest.mark.parametrize('mode', ('RGB', 'RGBA', 'P', 'I;16'))
def test_memory_is_bounded_by_the_pixels(mode):
    "Decoding 9 million pixels needs at most 16 bytes each, whatever the mode"
    code = f"""
import io, resource
from PIL import Image
from skin_gradcam.pictures import open_picture
def peak(n):
    f = io.BytesIO(); Image.new({mode!r}, (n, n)).save(f, 'PNG'); data = f.getvalue(); del f
    open_picture(data)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024
before = peak(64)
assert (grown := peak(3000)-before) < 16*9_000_000+16*2**20, grown
"""
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]


def test_jpeg_with_a_thousand_passes():
    data = encoded(NOISE, 'JPEG', progressive=True)
    k = data.rfind(b'\xff\xda')
    refused(data[:k] + data[k:-2] * 200 + b'\xff\xd9', 'more than 100 passes')


def test_text_bomb_in_png():
    im = encoded(SMOOTH, 'PNG')
    k = im.index(b'IDAT') - 4
    data = im[:k] + png_chunk(b'zTXt', b'k\0\0' + zlib.compress(bytes(20 * 2**20), 1)) + im[k:]
    refused(data, 'the PNG file is damaged')


# ---------------------------------------------------------------- fuzzing


def mutate(data, rnd):
    data = bytearray(data)
    for _ in range(rnd.randint(1, 12)):
        i = min(int(rnd.expovariate(1 / (len(data) / 4))), len(data) - 1)
        what = rnd.random()
        if what < 0.6:
            data[i] = rnd.randrange(256)
        elif what < 0.75:
            del data[i : i + rnd.randint(1, 40)]
        elif what < 0.9:
            data[i:i] = rnd.randbytes(rnd.randint(1, 40))
        else:
            data[i : i + 4] = rnd.choice((b'\xff\xff\xff\xff', b'\0\0\0\0', b'\x7f\xff\xff\xff'))
        if not data:
            break
    return bytes(data)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('fmt', FORMATS)
def test_fuzz(fmt):
    rnd = random.Random(fmt)
    exif = Image.Exif()
    exif[0x0112] = 6
    seeds = [
        encoded(NOISE[:24, :32], fmt),
        encoded(Image.fromarray(SMOOTH).convert('P' if fmt in ('GIF', 'PNG', 'BMP', 'TIFF') else 'L'), fmt),
    ]
    if fmt in ('JPEG', 'PNG', 'WEBP', 'TIFF'):
        seeds.append(encoded(SMOOTH, fmt, exif=exif))
    read = 0
    for _ in range(300):
        data = mutate(rnd.choice(seeds), rnd)
        try:
            im = open_picture(data, Limits(max_pixels=10**6))
            assert im.mode == 'RGB' and im.width * im.height <= 10**6
            read += 1
        except PictureError as e:
            assert '\n' not in str(e)
    assert 0 < read < 300


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=400),
    st.sampled_from(
        (b'', b'\xff\xd8\xff', b'\x89PNG\r\n\x1a\n', b'GIF89a', b'BM', b'II*\0', b'MM\0*', b'RIFF\0\0\0\0WEBPVP8X')
    ),
)
@pytest.mark.filterwarnings('ignore')
def test_any_bytes(data, head):
    try:
        assert open_picture(head + data, Limits(max_pixels=10**6)).mode == 'RGB'
    except PictureError as e:
        assert e.reason


def test_threads_and_globals():
    "Many threads give what one gives; no switch of Pillow or warnings has moved"
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    jobs = [encoded(NOISE, f) for f in FORMATS] * 8 + [b'text', png_header(30000, 30000)] * 8
    start = threading.Barrier(8)

    def job(i):
        if i < 8:
            start.wait()
        try:
            return open_picture(jobs[i]).tobytes()
        except PictureError as e:
            return str(e)

    with ThreadPoolExecutor(8) as pool:
        many = list(pool.map(job, range(len(jobs))))
    start = threading.Barrier(1)
    assert many == [job(i) for i in range(len(jobs))]
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))


def test_error_travels():
    try:
        open_picture(b'', name='a.jpg')
    except PictureError as e:
        assert str(pickle.loads(pickle.dumps(e))) == str(e)


# ---------------------------------------------------------------- geometry


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 14), st.integers(1, 14), st.integers(14, 300), st.integers(14, 300), st.integers(0, 99))
@pytest.mark.peer
def test_upsampling_equals_opencv(h, w, H, W, seed):
    import cv2

    m = np.random.default_rng(seed).normal(0, 5, (h, w)).astype(np.float32)
    np.testing.assert_allclose(
        resize_map(m, (H, W)), cv2.resize(m, (W, H), interpolation=cv2.INTER_LINEAR), atol=1e-5 * 5
    )


@pytest.mark.peer
def test_upsampling_equals_torch():
    import torch

    m = np.random.default_rng(3).normal(size=(3, 7, 7)).astype(np.float32)
    want = torch.nn.functional.interpolate(
        torch.from_numpy(m)[None], size=(451, 601), mode='bilinear', align_corners=False
    )[0].numpy()
    np.testing.assert_allclose(Geometry(601, 451, 224).to_picture(m), want, atol=1e-5)


def test_map_follows_the_picture():
    "A bright spot put into the picture is found again where it was, through squash and back"
    for (x, y), (W, H) in (((500, 60), (600, 450)), ((33, 301), (71, 333)), ((120, 9), (223, 19))):
        a = np.zeros((H, W, 3), np.uint8)
        a[max(0, y - 6) : y + 7, max(0, x - 6) : x + 7] = 255
        sq, g = squash(open_picture(a), 224)
        back = g.to_picture(to_input(sq, (0, 0, 0), (1, 1, 1))[0])
        got = np.argwhere(back > 0.9 * back.max()).mean(0) + 0.5
        want = np.argwhere(a[..., 0]).mean(0) + 0.5
        assert abs(got - want).max() < 2.5, (got, want)


def test_large_map_of_large_picture_is_float32():
    big = Geometry(4000, 3000, 224).to_picture(np.eye(7))
    assert big.dtype == np.float32 and big.shape == (3000, 4000)


@pytest.mark.data
def test_squash_equals_the_squashed_copies(real_data):
    "The 36 originals against their squashed copies: about 2.3 grey levels apart, nothing turned or shifted"
    diffs = []
    for p in sorted((real_data / 'originals_600x450').glob('ISIC_*.jpg')):
        copies = list((real_data / 'ham10000').glob(f'HAM10000_images_part_*/{p.name}'))
        if not copies:
            continue
        a, b = open_picture(p), open_picture(copies[0])
        assert a.size == (600, 450)
        diffs.append(abs(np.array(squash(a, b.width)[0], dtype=float) - np.array(b)).mean())
    assert len(diffs) >= 30 and np.mean(diffs) < 2.5 and max(diffs) < 5, (len(diffs), np.mean(diffs), np.max(diffs))


@pytest.mark.data
def test_real_pictures_get_no_remark(real_data):
    "Every 80th picture of the data set and all originals are free of remarks; blurred, most are not"
    small = sorted((real_data / 'ham10000').glob('HAM10000_images_part_*/*.jpg'))[::80]
    full = sorted((real_data / 'originals_600x450').glob('*.jpg'))
    noted = [(p.name, n) for p in [*small, *full] if (n := quality_notes(open_picture(p)))]
    assert len(noted) <= 2, noted
    soft = [quality_notes(open_picture(p).filter(ImageFilter.GaussianBlur(6))) for p in full]
    assert sum('blurred' in n for n in soft) >= 0.9 * len(full)
