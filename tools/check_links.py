#!/usr/bin/env python
"""Check every internal link, anchor and picture of the docs site and of the repository's Markdown files.

    python tools/check_links.py [--site _docs]

Links to other sites are not fetched. A page may load nothing from the network, except what `CDN` lists (the diagrams
of smalldocs). Prints every problem with its page and exits 1 if there is one.
"""
from __future__ import annotations

import argparse
import base64
import binascii
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
CDN = ('https://cdn.jsdelivr.net/npm/mermaid@',)
LOADS = {'img': ('src', 'srcset'), 'script': ('src',), 'iframe': ('src',), 'source': ('src', 'srcset'),
         'video': ('src', 'poster'), 'audio': ('src',), 'embed': ('src',), 'object': ('data',),
         'image': ('href', 'xlink:href'), 'input': ('src',)}
LOADED_RELS = {'stylesheet', 'icon', 'preload', 'modulepreload', 'prefetch', 'manifest', 'apple-touch-icon'}


class Page(HTMLParser):
    "What a page defines (`ids`), links to (`links`) and loads (`loads`)"
    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.problems: list[str] = []
        self.code = ''
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        a = {k: v or '' for k, v in attrs}
        self.code = tag if tag in ('style', 'script') else ''
        self.ids |= {a[k] for k in ('id', 'name') if a.get(k)}
        if tag in ('a', 'area') and 'href' in a: self.links.append(a['href'])
        if tag == 'link' and LOADED_RELS & set(a.get('rel', '').split()): self.loads.append(a.get('href', ''))
        for key in LOADS.get(tag, ()):
            if key in a: self.loads += [s.split()[0] for s in a[key].split(', ')] if key == 'srcset' else [a[key]]
        if tag == 'img' and 'alt' not in a: self.problems.append(f'picture without alt text: {a.get("src", "")[:60]}')
        self.loads += css_loads(a.get('style', ''))

    handle_startendtag = handle_starttag

    def handle_data(self, data: str) -> None:
        if self.code == 'style': self.loads += css_loads(data)
        if self.code == 'script': self.loads += re.findall(r'''\b(?:import|from)\s*\(?\s*["'](https?:[^"']+)''', data)


def css_loads(css: str) -> list[str]:
    "What a style sheet loads"
    found = re.findall(r'''url\(\s*["']?([^"')]+)|@import\s+["']([^"']+)''', css)
    return [a or b for a, b in found if not (a or b).startswith(('data:', '#'))]


def embedded(url: str) -> str | None:
    "What is wrong with the picture or file in a `data:` address"
    from PIL import Image
    if not (m := re.match(r'data:(image/(?:png|jpeg|gif|webp)|text/csv);base64,(.*)', url, re.S)): return None
    try: data = base64.b64decode(m[2], validate=True)
    except binascii.Error as e: return f'embedded {m[1]} does not decode: {e}'
    if m[1] == 'text/csv': return None
    try: Image.open(BytesIO(data)).verify()
    except (OSError, SyntaxError, ValueError) as e: return f'embedded picture does not decode: {e}'
    return None


def external(url: str) -> bool: return bool(re.match(r'(?!data:)[a-z][a-z0-9+.-]*:|//', url, re.I))


class Checker:
    "Pages parsed once each, so that anchors can be looked up"

    def __init__(self, root: Path) -> None:
        self.root, self.seen = root, dict[Path, Page]()

    def page(self, path: Path) -> Page:
        if path not in self.seen:
            text = path.read_text(encoding='utf-8')
            self.seen[path] = Page(md_html(text) if path.suffix == '.md' else text)
        return self.seen[path]

    def target(self, page: Path, url: str) -> str | None:
        "What is wrong with an internal address on `page`"
        path, _, anchor = url.partition('#')
        path = unquote(path.partition('?')[0])
        if path.startswith('/'): return f'address from the root of a server, the site may lie in a folder: {url}'
        to = (page.parent / path).resolve() if path else page
        if not to.is_relative_to(self.root): return f'leads out of {self.root.name}/: {url}'
        if to.is_dir() and self.root != ROOT: to = to / 'index.html'
        if not to.exists(): return f'no such file: {url}'
        has_anchors = anchor and to.suffix in ('.html', '.md')
        return f'no such anchor: {url}' if has_anchors and unquote(anchor) not in self.page(to).ids else None

    def problems(self, path: Path) -> Iterator[str]:
        page = self.page(path)
        yield from page.problems
        for url in page.links:
            if url.startswith('data:'): p = embedded(url)
            else: p = None if external(url) else self.target(path, url)
            if p: yield p
        for url in page.loads:
            if url.startswith('data:'): p = embedded(url)
            elif external(url): p = None if url.startswith(CDN) else f'loads from the network: {url}'
            else: p = self.target(path, url)
            if p: yield p


def md_html(text: str) -> str:
    "Markdown as HTML whose headings have the ids that code hosts give them"
    from markdown_it import MarkdownIt
    from mdit_py_plugins.anchors import anchors_plugin
    return MarkdownIt('commonmark').enable('table').use(anchors_plugin, max_level=6).render(text)


def site_problems(site: Path) -> Iterator[str]:
    check = Checker(site.resolve())
    for path in sorted(check.root.rglob('*.html')):
        for p in dict.fromkeys(check.problems(path)): yield f'{path.relative_to(check.root)}: {p}'
    for path in sorted(check.root.rglob('*.css')):
        for url in css_loads(path.read_text(encoding='utf-8')):
            p = f'loads from the network: {url}' if external(url) else check.target(path, url)
            if p: yield f'{path.relative_to(check.root)}: {p}'


def markdown_problems(root: Path = ROOT) -> Iterator[str]:
    "Problems of the Markdown files that git knows or would add"
    command = ['git', 'ls-files', '-co', '--exclude-standard', '*.md']
    names = subprocess.run(command, cwd=root, text=True, capture_output=True, check=True).stdout
    check = Checker(root)
    for name in sorted(set(names.splitlines())):
        if not (root / name).exists(): continue
        for p in dict.fromkeys(check.problems(root / name)):
            if not p.startswith('loads from the network: http'): yield f'{name}: {p}'


def main() -> int:
    p = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    p.add_argument('--site', type=Path, default=ROOT / '_docs', help='the built site (default: _docs)')
    p.add_argument('--markdown-only', action='store_true', help='only the Markdown files')
    args = p.parse_args()
    if not args.markdown_only and not (args.site / 'index.html').exists():
        sys.exit(f'{args.site}: no site here: run python tools/build_docs.py first')
    found = [*markdown_problems(), *([] if args.markdown_only else site_problems(args.site))]
    print('\n'.join(found) if found else f'links: all resolve ({args.site.name} and Markdown files)')
    return int(bool(found))


if __name__ == '__main__': sys.exit(main())
