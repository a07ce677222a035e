#!/usr/bin/env python
"""Send the web app what no honest visitor would send, and see that it refuses each in time and without a fault.

    python tools/hostile_uploads.py                 # 5,000 uploads that must be refused, 500 that may be answered
    python tools/hostile_uploads.py --n 300         # fewer; writes nothing unless --out is given

Must be refused with 4xx: pictures cut off, other files under a picture's name (SVG, HTML, PDF, ZIP, HEIC, programs),
files that begin as something else and go on as a picture, headers that announce too many pixels, headers that lie,
pictures overwritten at their start, forms that break off, nest or repeat without end. May be answered, as the picture
that they are: valid pictures with damaged or endless metadata, with a second file behind their end, with foreign names.
For those the answer must not repeat what was hidden in them. For all: no 5xx, at most 2 s, and bounded memory.
"""
from __future__ import annotations

import argparse
import io
import json
import platform
import random
import resource
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from skin_gradcam.inference import Explainer
from skin_gradcam.phantoms import draw_phantom
from skin_gradcam.webapp import Settings, create_app

ROOT = Path(__file__).resolve().parent.parent
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'TIFF', 'GIF')
SECONDS, GROWTH_MB, SECRET = 2.0, 200, 'hidden-payload-7c1f'
SCRIPT = f'<script>alert("{SECRET}")</script>'.encode()

PICTURES: dict[tuple[str, int], bytes] = {}


def picture(fmt: str, k: int = 0, **kw) -> bytes:
    "One of four drawn pictures in a format"
    if kw or (fmt, k) not in PICTURES:
        buf = io.BytesIO()
        im = Image.fromarray(draw_phantom(('nv', 'bkl', 'mel')[k % 3], seed=k).image)
        im.save(buf, fmt, **kw)
        if kw: return buf.getvalue()
        PICTURES[fmt, k] = buf.getvalue()
    return PICTURES[fmt, k]


# ---------------------------------------------------------------- what must be refused: (name, content)


def cut(r: random.Random) -> tuple[str, bytes]:
    "A picture that breaks off"
    fmt = r.choice(FORMATS)
    data = picture(fmt, r.randrange(4))
    return f'a.{fmt.lower()}', data[:r.randrange(4, int(.6 * len(data)))]


def renamed(r: random.Random) -> tuple[str, bytes]:
    "Another kind of file under a picture's name"
    junk = r.randbytes(r.randrange(10, 3000))
    kinds = [b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><script>x</script></svg>',
             b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a "' + b'lol' * r.randrange(1, 500) + b'">]><svg>&a;</svg>',
             b'<!doctype html><html>' + SCRIPT, b'%PDF-1.7\n' + junk, b'PK\3\4' + junk, b'MZ' + junk, b'\x7fELF' + junk,
             b'\0\0\0\x18ftypheic' + junk, b'\0\0\0\x20ftypavif\0\0\0\0avif' + junk, b'8BPS' + junk, b'\x1f\x8b' + junk,
             b'#!/bin/sh\nrm -rf /\n', b'{"a":' * r.randrange(1, 2000), b'GIF88a' + junk, b'RIFF\0\0\0\0WAVE' + junk,
             b'P6 9999 9999 255\n' + junk, b'\0\0\1\0\1\0' + junk, b'\xff\x4f\xff\x51' + junk, b'II\x2b\0' + junk,
             b'\0' * len(junk), junk, b'/* XPM */' + junk, b'%!PS-Adobe-3.0 EPSF-3.0\n' + junk, b'\x89PNG\r\n' + junk]
    return r.choice(['mole.jpg', 'x.png', 'shell.php.jpg', '../../etc/passwd.gif']), r.choice(kinds)


def front(r: random.Random) -> tuple[str, bytes]:
    "Something else first, a whole picture behind it"
    head = r.choice(
        [b'<html>' + SCRIPT, b'%PDF-1.7\n', b'PK\3\4', b'\n', b'MZ', b'<?php system($_GET[0]);?>', b'\0' * 512]
    )
    return 'poly.jpg', head + picture(r.choice(FORMATS), r.randrange(4))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png(w: int, h: int, depth: int = 8, colour: int = 2, idat: bytes | None = None, extra: bytes = b'') -> bytes:
    "A PNG that announces a size, with little or much behind it"
    body = zlib.compress(b'\0' * 5000) if idat is None else idat
    head = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, depth, colour, 0, 0, 0))
    return head + extra + chunk(b'IDAT', body) + chunk(b'IEND', b'')


def bomb(r: random.Random) -> tuple[str, bytes]:
    "Few bytes that announce many pixels, or unpack to many bytes"
    w, h = r.choice(
        [(65_000, 65_000), (2**31 - 1, 2**31 - 1), (40_000, 40_000), (10**6, 100), (9_000, 9_000), (6_000, 6_000)]
    )
    zeros = r.randrange(10**6, 2 * 10**7)
    jpeg = bytearray(picture('JPEG'))
    sof = next(i for i in range(len(jpeg)) if jpeg[i] == 255 and jpeg[i + 1] in (0xC0, 0xC2))
    side = r.choice((6_000, 9_000, 65_000))
    struct.pack_into('>HH', jpeg, sof + 5, side, side)
    bmp, gif = bytearray(picture('BMP')), bytearray(picture('GIF'))
    struct.pack_into('<ii', bmp, 18, min(w, 2**31 - 1), min(h, 2**31 - 1))
    struct.pack_into('<HH', gif, 6, 65_000, 65_000)
    webp = bytearray(
        b'RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0' + struct.pack('<I', 16_000)[:3] + struct.pack('<I', 16_000)[:3]
    )
    kinds = [
        png(w, h),
        png(w, h, 1, 0),
        png(w, h, 16, 6),
        bytes(jpeg),
        bytes(bmp),
        bytes(gif),
        bytes(webp),
        png(400, 300, idat=b'', extra=chunk(b'zTXt', b'a\0\0' + zlib.compress(b'\0' * zeros, 1))),
        png(400, 300, idat=b'', extra=chunk(b'iCCP', b'a\0\0' + zlib.compress(b'\0' * zeros, 1))),
        tiff({256: w % 2**32, 257: h % 2**32}),
        tiff({256: 300, 257: 200, 322: 60_000, 323: 60_000, 324: 8, 325: 8}),
    ]
    return 'bomb.png', r.choice(kinds)


def tiff(tags: dict[int, int]) -> bytes:
    "A TIFF with these tags and hardly any pixels"
    tags = {258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 2**31, 279: 100} | tags
    ifd = b''.join(struct.pack('<HHII', k, 4, 1, v) for k, v in sorted(tags.items()))
    return struct.pack('<2sHI', b'II', 42, 8) + struct.pack('<H', len(tags)) + ifd + b'\0' * 4


def lying(r: random.Random) -> tuple[str, bytes]:
    "A picture whose first bytes after the signature were overwritten, or whose body is noise"
    fmt = r.choice(('JPEG', 'PNG', 'WEBP', 'TIFF'))
    data = bytearray(picture(fmt, r.randrange(4)))
    if fmt == 'TIFF': return 'a.tiff', bytes(data[:4]) + r.randbytes(4) + r.randbytes(200)
    if fmt == 'PNG':
        return 'a.png', bytes(data[:33]) + chunk(b'IDAT', r.randbytes(r.randrange(1, 4000))) + chunk(b'IEND', b'')
    if fmt == 'WEBP': return 'a.webp', bytes(data[:30]) + r.randbytes(r.randrange(1, 2000))
    return 'a.jpg', bytes(data[:r.randrange(3, 20)]) + r.randbytes(r.randrange(20, 2000))


def odd(r: random.Random) -> tuple[str, bytes]:
    "Nothing at all, too little, too many passes, rings of references"
    ring = bytearray(tiff({256: 300, 257: 200}))
    struct.pack_into('<I', ring, len(ring) - 4, 8)  # the next directory is this one
    jpeg = picture('JPEG', progressive=True)
    first = jpeg.find(b'\xff\xda')
    second = jpeg.find(b'\xff\xda', first + 2)
    many = jpeg[:second] + jpeg[first:second] * r.randrange(101, 400) + b'\xff\xd9'
    one = io.BytesIO()
    Image.new('RGB', (r.randrange(1, 8), r.randrange(1, 400))).save(one, r.choice(('PNG', 'BMP')))
    return 'odd.jpg', r.choice(
        [b'', b'\xff', b'\xff\xd8\xff', b'BM', b'GIF89a', b'RIFF', bytes(ring), many, one.getvalue()]
    )


# ---------------------------------------------------------------- forms that no browser sends: (content type, body)


def form(r: random.Random) -> tuple[str, bytes]:
    "A form that breaks off, has no end, no boundary, or thousands of parts"
    b = b'x' * r.choice([1, 70, 500])
    head = b'--' + b + b'\r\nContent-Disposition: form-data; name="picture"; filename="a.jpg"\r\n\r\n'
    pic = picture('JPEG', r.randrange(4))
    kind = 'multipart/form-data; boundary=' + b.decode()
    many = (
        (b'--' + b + b'\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n') * r.randrange(40, 3000)
        + b'--'
        + b
        + b'--\r\n'
    )
    nested = (b'--' + b + b'\r\nContent-Type: multipart/mixed; boundary=y\r\n\r\n') * r.randrange(1, 300)
    return r.choice(
        [
            (kind, head + pic),
            (kind, head[: r.randrange(1, len(head))]),
            (kind, many),
            (kind, nested),
            (kind, b''),
            ('multipart/form-data', head + pic + b'\r\n--' + b + b'--\r\n'),
            (kind, b'--' + b + b'--\r\n'),
            ('image/jpeg', pic),
            ('application/x-www-form-urlencoded', b'picture=' + b'a' * r.randrange(1, 200_000)),
            ('application/json', b'[' * 10_000),
            (kind, b'--' + b + b'\r\n' + b'X-Long: ' + b'y' * r.randrange(10, 10**6)),
            ('', pic),
            ('text/\x00html', pic),
            (
                kind,
                b'--'
                + b
                + b'\r\nContent-Disposition: form-data; name="picture"\r\n\r\n'
                + b'9' * r.randrange(1, 10**6)
                + b'\r\n--'
                + b
                + b'--\r\n',
            ),
            (
                kind,
                b'--'
                + b
                + b'\r\nContent-Disposition: form-data; name="'
                + b'n' * 5000
                + b'"; filename="a"\r\n\r\n1\r\n--'
                + b
                + b'--\r\n',
            ),
            ('multipart/form-data; boundary=' + 'b' * 4000, head + pic),
            ('multipart/form-data; boundary="' + b.decode(), head + pic),
            (kind, r.randbytes(r.randrange(1, 20_000))),
        ]
    )


# ---------------------------------------------------------------- what may be answered


def metadata(r: random.Random) -> tuple[str, bytes]:
    "A whole picture with damaged, endless or talkative metadata"
    n = r.randrange(1, 60_000)
    exif = b'Exif\0\0' + r.choice([
        b'MM\0*\0\0\0\x08' + b'\xff\xff' + r.randbytes(n), b'II*\0' + struct.pack('<I', 2**32 - 1) + r.randbytes(n),
        b'II*\0\x08\0\0\0' + struct.pack('<HHHII', 1, 0x0112, 3, 2**32 - 1, 2**31), r.randbytes(n), SCRIPT * 50,
        b'II*\0\x08\0\0\0' + struct.pack('<HHHIII', 1, 0x8769, 4, 1, 8, 8)])
    jpeg = picture('JPEG', r.randrange(4))
    app = b'\xff\xe1' + struct.pack('>H', min(len(exif) + 2, 65_535)) + exif[:65_533]
    text = chunk(b'tEXt', b'Comment\0' + SCRIPT)
    raw = picture('PNG', r.randrange(4))
    return 'meta.jpg', r.choice([jpeg[:2] + app + jpeg[2:], jpeg[:2] + app * r.randrange(2, 20) + jpeg[2:],
                                 jpeg[:2] + b'\xff\xfe' + struct.pack('>H', len(SCRIPT) + 2) + SCRIPT + jpeg[2:],
                                 raw[:33] + text * r.randrange(1, 50) + raw[33:]])


def behind(r: random.Random) -> tuple[str, bytes]:
    "A whole picture, another file behind it, and a name that is no name"
    name = r.choice(
        [SECRET + '<img src=x onerror=alert(1)>.jpg', '../' * 40 + SECRET, SECRET + '\u202egpj.exe', SECRET * 50]
    )
    return name, picture(r.choice(('JPEG', 'PNG', 'GIF', 'WEBP')), r.randrange(4)) + r.choice(
        [SCRIPT, b'PK\3\4' + SCRIPT, b'%PDF' + SCRIPT]
    )


REFUSE: tuple[Callable, ...] = (cut, renamed, front, bomb, lying, odd, form)
MAY: tuple[Callable, ...] = (metadata, behind)


def cases(n: int, may: int, seed: int = 0) -> Iterator[tuple[str, bool, dict]]:
    "Kind, whether it must be refused, and what to post"
    r = random.Random(seed)
    for i in range(n + may):
        must = i < n
        kind = (REFUSE if must else MAY)[i % len(REFUSE if must else MAY)]
        name, data = kind(r)
        if kind is form:
            yield kind.__name__, must, dict(data=data, content_type=name)
        else:
            yield (
                kind.__name__,
                must,
                dict(data={'picture': (io.BytesIO(data), name)}, content_type='multipart/form-data'),
            )


def memory_mb() -> float: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(n: int, may: int, explainer: Explainer, seed: int = 0) -> dict:
    "Send them all; what came back"
    app = create_app(explainer, Settings(rate_limit=''))
    client = app.test_client()
    for k in range(3): client.post('/api/v1/explain', data={'picture': (io.BytesIO(picture('JPEG', k)), 'a')})
    before, times, statuses, wrong = memory_mb(), [], Counter(), []
    for i, (kind, must, post) in enumerate(cases(n, may, seed)):
        to = '/answer' if i % 4 == 3 else '/api/v1/explain'
        start = time.perf_counter()
        answer = client.post(to, **post)
        times.append((time.perf_counter() - start, kind))
        statuses[kind, answer.status_code] += 1
        fits = 400 <= answer.status_code < 500 or not must and answer.status_code == 200
        if not fits or SECRET in answer.text: wrong.append(dict(i=i, kind=kind, status=answer.status_code, to=to))
    app.extensions['skin_gradcam'].batcher.close()
    slowest = max(times)
    return dict(
        refused=sum(v for (k, s), v in statuses.items() if 400 <= s < 500),
        answered=sum(v for (_, s), v in statuses.items() if s == 200),
        faults=sum(v for (_, s), v in statuses.items() if s >= 500),
        wrong=wrong,
        sent=n + may,
        must_be_refused=n,
        slowest=dict(seconds=round(slowest[0], 3), kind=slowest[1]),
        total_seconds=round(sum(t for t, _ in times), 1),
        memory=dict(before_mb=round(before), growth_mb=round(memory_mb() - before)),
        kinds={
            k: {str(s): statuses[k, s] for _, s in sorted(x for x in statuses if x[0] == k)}
            for k in {k for k, _ in statuses}
        },
    )


def main() -> int:
    p = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    p.add_argument('--n', type=int, default=5000, help='uploads that must be refused')
    p.add_argument('--may', type=int, help='uploads that may be answered (a tenth of --n)')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path, help='JSON to write (results/web_hostile.json for the full run)')
    a = p.parse_args()
    out = a.out or (ROOT / 'results/web_hostile.json' if a.n >= 5000 else None)
    got = run(a.n, a.n // 10 if a.may is None else a.may, Explainer.load(), a.seed)
    ok = not got['wrong'] and got['slowest']['seconds'] < SECONDS and got['memory']['growth_mb'] < GROWTH_MB
    d = dict(
        what='hostile uploads to the web app',
        limits=dict(seconds=SECONDS, growth_mb=GROWTH_MB),
        passed=ok,
        seed=a.seed,
        machine=f'{platform.machine()}, Python {platform.python_version()}',
        **got,
    )
    print(json.dumps(d, indent=1))
    if out: out.write_text(json.dumps(d, indent=1) + '\n')
    return int(not ok)


if __name__ == '__main__': sys.exit(main())
