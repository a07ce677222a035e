"""Servers on this machine that speak what the sources of pictures speak, and misbehave on command.

`Server` serves bytes with ranges and validators; `isic` and `kaggle` fill one with the protocol of the ISIC Archive's
API v2 and of Kaggle. Faults are queued for a path and used up one by one, a fault for each request.
"""
from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import threading
import zipfile
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import urlsplit


@dataclass
class Fault:
    "What goes wrong with one answer"
    status: int = 0  # answer this instead
    headers: dict = field(default_factory=dict)  # sent too
    cut: int | None = None  # the line breaks after so many bytes of the body
    trickle: float = 0  # seconds between single bytes
    stall: float = 0  # seconds of silence before the answer
    no_range: bool = False  # ranges are ignored
    body: bytes | None = None  # instead of the file
    same_name: bool = False  # with `body`: keeps the validator of the file


class Asked(NamedTuple):
    path: str
    first: int  # byte that the range begins with
    headers: dict


class Server:
    "A server on a free port of 127.0.0.1; a proxy too, which answers for every host"
    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.extra: dict[str, dict] = defaultdict(dict)  # further headers of a file
        self.calls: dict[str, object] = {}  # path -> function of the JSON that was posted -> (status, headers, body)
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        self.asked: list[Asked] = []
        self.pace: tuple[int, float] | None = None  # so many bytes, then so many seconds of rest
        self.validators = True
        self.closing, self.lock = threading.Event(), threading.Lock()
        self.http = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.http.daemon_threads, self.http.owner = True, self
        self.http.handle_error = lambda *args: None  # clients that go away are what this is about
        threading.Thread(target=self.http.serve_forever, args=[.05], daemon=True).start()

    @property
    def url(self) -> str: return f'http://127.0.0.1:{self.http.server_port}'

    def close(self) -> None:
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()

    def key(self, path: str) -> str:
        "The name of a request among the files: with its query if that is known, else without"
        parts = urlsplit(path)
        full = parts.path + (f'?{parts.query}' if parts.query else '')
        return full if full in self.files else parts.path

    def fault(self, key: str) -> Fault:
        with self.lock: return self.faults[key].pop(0) if self.faults[key] else Fault()

    def starts(self, path: str) -> list[int]: return [a.first for a in self.asked if a.path == path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args): pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        self.answer(json.loads(body or b'{}'))

    def do_GET(self): self.answer(None)

    def answer(self, posted):
        s = self.server.owner
        key = s.key(self.path)
        m = re.match(r'bytes=(\d+)-', self.headers.get('Range', ''))
        first = int(m[1]) if m else 0
        s.asked.append(Asked(key, first, dict(self.headers)))
        f = s.fault(key)
        if f.stall and s.closing.wait(f.stall): return
        if f.status: return self.send(f.status, f.headers, f.body or b'<html>busy</html>', f)
        if key in s.calls: return self.send(*s.calls[key](posted), f)
        if key not in s.files: return self.send(404, {}, b'not here', f)
        data = s.files[key] if f.body is None else f.body
        tag = f'"{hashlib.md5(s.files[key] if f.same_name else data).hexdigest()}"'
        extra = {**s.extra[key], **({'ETag': tag} if s.validators else {}), **f.headers}
        if not f.no_range: extra['Accept-Ranges'] = 'bytes'
        fresh = self.headers.get('If-Range', tag) == tag
        if first and fresh and not f.no_range:
            if first >= len(data): return self.send(416, {**extra, 'Content-Range': f'bytes */{len(data)}'}, b'', f)
            span = f'bytes {first}-{len(data) - 1}/{len(data)}'
            return self.send(206, {**extra, 'Content-Range': span}, data[first:], f)
        self.send(200, extra, data, f)

    def send(self, status, headers, body, f):
        s = self.server.owner
        self.send_response(status)
        for k, v in {'Content-Length': str(len(body)), **headers}.items(): self.send_header(k, v)
        try:
            self.end_headers()
            if f.trickle:
                for i in range(len(body)):
                    self.wfile.write(body[i:i + 1])
                    if s.closing.wait(f.trickle): break
            elif s.pace and f.cut is None:
                for i in range(0, len(body), s.pace[0]):
                    self.wfile.write(body[i:i + s.pace[0]])
                    if s.closing.wait(s.pace[1]): break
            else: self.wfile.write(body[:f.cut])
        except OSError: self.close_connection = True
        if f.cut is not None or s.closing.is_set(): self.close_connection = True


def zipped(files: dict[str, bytes]) -> bytes:
    "A zip archive"
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as z:
        for name, data in files.items(): z.writestr(name, data)
    return out.getvalue()


def isic_record(s: Server, isic_id: str, data: bytes, **clinical) -> dict:
    "A record of the archive, whose picture the server has"
    s.files[f'/files/{isic_id}.jpg'] = data
    full = dict(url=f'{s.url}/files/{isic_id}.jpg?Signature=abc', size=len(data))
    r = dict(isic_id=isic_id, public=True, copyright_license='CC-BY-NC', attribution='ViDIR Group, Vienna',
             files=dict(full=full, thumbnail_256=full),
             metadata=dict(acquisition=dict(pixels_x=600, pixels_y=450, image_type='dermoscopic'), clinical=clinical))
    s.files[f'/api/v2/images/{isic_id}/'] = json.dumps(r).encode()
    return r


def isic(s: Server, records: list[dict], page: int = 5) -> str:
    "Serve records as collection 212, so many a page; gives the address of the API"
    start = '/api/v2/images/search/?collections=212&limit=100'
    def address(i): return start + (f'&cursor=c{i}' if i else '')
    for i in range(0, max(len(records), 1), page):
        after = s.url + address(i + page) if i + page < len(records) else None
        body = dict(count=len(records), next=after, previous=None, results=records[i:i + page])
        s.files[address(i)] = json.dumps(body).encode()
    return f'{s.url}/api/v2/'


STORE = '/bundle/archive.zip'  # where Kaggle's storage keeps an archive
GET, DOWNLOAD = (f'/api/v1/datasets.DatasetApiService/{o}' for o in ('GetDataset', 'DownloadDataset'))


def kaggle(s: Server, archive: bytes, version: int = 2) -> dict[str, str]:
    "Serve one data set as Kaggle does; gives the environment that leads kagglehub here, through a proxy"
    s.files[STORE] = archive
    md5 = base64.b64encode(hashlib.md5(archive).digest()).decode()
    s.extra[STORE] = {'x-goog-hash': f'crc32c=AAAAAA==,md5={md5}', 'Content-Type': 'application/zip'}
    reply = json.dumps(dict(currentVersionNumber=version, ref='someone/something')).encode()
    s.calls[GET] = lambda q: (200, {'Content-Type': 'application/json'}, reply)
    s.calls[DOWNLOAD] = lambda q: (302, {'Location': f'http://storage.invalid{STORE}?Signature=abc'}, b'')
    return dict(KAGGLE_API_ENVIRONMENT='LOCALHOST', http_proxy=s.url, HTTP_PROXY=s.url, no_proxy='', NO_PROXY='')
