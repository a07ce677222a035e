#!/usr/bin/env python
"""Build README.md from `nbs/index.ipynb` and the docs site from all notebooks.

    python tools/build_docs.py                 # README.md, then the site in _docs/
    python tools/build_docs.py --readme-only   # README.md and its pictures, within a second
    python tools/build_docs.py --site-only     # the site alone
    python tools/build_docs.py --check         # exit 1, naming the first line that differs, if README.md is stale

The site is rendered by `nbdev-docs` where the quarto binary is installed, else from the same processed notebooks by
smalldocs. README.md is written here on every machine, so that `--check` means the same everywhere. Formulas become
MathML: the site loads nothing from the network. Links that leave `nbs/` (source code, CONTRIBUTING.md) lead to pages
made from those files.
"""
from __future__ import annotations

import argparse
import base64
import html
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r'(\]\(|\b(?:src|href)=")([^)\s"]+)')
FENCE = re.compile(r'^(```.*?^```)', re.M | re.S)
REBUILD = 'python tools/build_docs.py --readme-only'
MIMES = {'image/png': 'png', 'image/jpeg': 'jpg'}

# ---------------------------------------------------------------- README.md


def directives(source: str) -> tuple[dict[str, str], str]:
    "The `#| key: value` lines at the top of a cell, and the source without them"
    found = re.findall(r'^#\|[ \t]*([\w-]+):?[ \t]*(.*)$', source, re.M)
    return dict(found), re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip()


def from_root(text: str, folder: str = 'nbs') -> str:
    "Markdown written in `folder`, its relative links rewritten so that they work from the repository's root"
    def fix(m: re.Match) -> str:
        if re.match(r'[a-z][a-z0-9+.-]*:|[/#]', m[2]): return m[0]
        path, mark, anchor = m[2].partition('#')
        return m[1] + posixpath.normpath(posixpath.join(folder, path)) + mark + anchor
    parts = FENCE.split(text)
    return ''.join(p if p.startswith('```') else LINK.sub(fix, p) for p in parts)


def fenced(text: str, language: str = '') -> str:
    return f'```{language}\n{text.rstrip()}\n```'


def output_md(output: dict, picture: str, alt: str, pictures: dict[str, bytes]) -> str | None:
    "One saved output as Markdown; a picture goes into `pictures` under the path `picture` plus its suffix"
    if output['output_type'] == 'stream': return fenced(''.join(output['text'])) if output['name'] == 'stdout' else None
    if output['output_type'] == 'error': raise SystemExit('nbs/index.ipynb: an output is an error: run the page')
    data = {k: v if isinstance(v, str) else ''.join(v) for k, v in output['data'].items() if isinstance(v, str | list)}
    if 'text/markdown' in data: return from_root(data['text/markdown'])
    for mime, suffix in MIMES.items():
        if mime in data:
            pictures[f'{picture}.{suffix}'] = base64.b64decode(data[mime])
            return f'![{alt}]({picture}.{suffix})'
    table = data.get('text/html', '')
    if '<table' in table and 'data:' not in table: return re.sub(r'<style.*?</style>', '', table, flags=re.S).strip()
    return fenced(data['text/plain']) if 'text/plain' in data else None


def readme_parts(cells: list[dict], pictures: dict[str, bytes]) -> Iterator[str]:
    "README.md paragraph by paragraph"
    for cell in cells:
        options, source = directives(''.join(cell['source']))
        if {'hide', 'default_exp', 'export'} & options.keys() or options.get('include') == 'false': continue
        if cell['cell_type'] == 'markdown': yield from_root(source)
        if cell['cell_type'] != 'code': continue
        if options.get('echo') != 'false' and source: yield fenced(source, 'python')
        if options.get('output') == 'false': continue
        for out in cell['outputs']:
            name = f'nbs/images/index-{len(pictures) + 1}'
            yield output_md(out, name, options.get('fig-alt', 'output of the code above').strip('"\''), pictures) or ''


def readme(index: Path = ROOT / 'nbs/index.ipynb') -> tuple[str, dict[str, bytes]]:
    "The text of README.md, and the pictures among the saved outputs by path"
    cells = json.loads(index.read_text(encoding='utf-8'))['cells']
    pictures: dict[str, bytes] = {}
    title, _, rest = ''.join(cells[0]['source']).partition('\n')
    parts = [title, '<!-- Generated from nbs/index.ipynb: edit that page, then run `python tools/build_docs.py` -->',
             from_root(rest.strip()), *readme_parts(cells[1:], pictures)]
    return '\n\n'.join(p for p in parts if p) + '\n', pictures


def write_readme() -> None:
    text, pictures = readme()
    (ROOT / 'README.md').write_text(text, encoding='utf-8')
    for name, data in pictures.items():
        (ROOT / name).parent.mkdir(exist_ok=True)
        (ROOT / name).write_bytes(data)
    print('wrote', ', '.join(['README.md', *pictures]))


def check_readme() -> int:
    "0 if README.md and its pictures are what `write_readme` would write, else 1 with the first difference"
    text, pictures = readme()
    path = ROOT / 'README.md'
    old = path.read_text(encoding='utf-8').splitlines() if path.exists() else []
    for n, (has, wants) in enumerate(zip([*old, None], [*text.splitlines(), None], strict=False), 1):
        if has != wants:
            print(f'README.md:{n}: is {has!r}, nbs/index.ipynb gives {wants!r}: run {REBUILD}')
            return 1
    stale = [n for n, data in pictures.items() if not (ROOT / n).exists() or (ROOT / n).read_bytes() != data]
    for n in stale: print(f'{n}: is not the output saved in nbs/index.ipynb: run {REBUILD}')
    return int(bool(stale))


# ---------------------------------------------------------------- the site


def page_names(nbs: Path) -> dict[str, str]:
    "For each notebook the name that nbdev's links give its page, relative to `nbs`: `00_x.ipynb` -> `x.ipynb`"
    from nbdev.config import nbpath2html
    found = sorted(p.relative_to(nbs) for p in nbs.rglob('*.ipynb'))
    found = [p for p in found if not any(s[0] in '._' for s in p.parts)]
    names = {p.as_posix(): nbpath2html(p).with_suffix('.ipynb').as_posix() for p in found}
    twice = [n for n in set(names.values()) if list(names.values()).count(n) > 1]
    if twice: raise SystemExit(f'two notebooks would have the page {twice[0]}: rename one')
    return names


def relink(text: str, folder: str, names: dict[str, str]) -> str:
    "Markdown of a page in `folder`, its links to notebooks rewritten to their page names"
    def fix(m: re.Match) -> str:
        path, mark, anchor = m[2].partition('#')
        name = names.get(posixpath.normpath(posixpath.join(folder, path)))
        return m[1] + posixpath.relpath(name, folder or '.') + mark + anchor if name else m[0]
    return LINK.sub(fix, text)


def stage_page(path: Path, name: Path, folder: str, names: dict[str, str]) -> None:
    "Give a processed notebook its page name, and drop what smalldocs does not know"
    nb = json.loads(path.read_text(encoding='utf-8'))
    for cell in nb['cells']:
        text = ''.join(cell['source'])
        if cell['cell_type'] == 'raw': text = re.sub(r'^output-file:.*\n', '', text, flags=re.M)
        cell['source'] = relink(text, folder, names) if cell['cell_type'] == 'markdown' else text
    path.unlink()
    name.write_text(json.dumps(nb), encoding='utf-8')


def stage() -> Path:
    "The notebooks processed by nbdev (symbols documented and linked), every page under its final name"
    import yaml
    from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
    from nbdev.serve import proc_nbs
    refresh_quarto_yml()
    nbdev_sidebar.__wrapped__()
    names = page_names(ROOT / 'nbs')
    try: cache = Path(proc_nbs(force=True, n_workers=min(2, os.cpu_count() or 1)))
    except Exception as e: raise SystemExit(f'nbdev cannot document a page: {e}') from e
    for old, new in names.items():
        stage_page(cache / old, cache / new, posixpath.dirname(old), names)
    sidebar = re.sub(r'[\w/]+\.ipynb', lambda m: names.get(m[0], m[0]), (cache / 'sidebar.yml').read_text())
    sidebar = re.sub(r'(section: )(\w)', lambda m: m[1] + m[2].upper(), sidebar)
    (cache / 'sidebar.yml').write_text(sidebar)
    options = yaml.safe_load((cache / 'nbdev.yml').read_text())
    options.pop('format-links', None)
    (cache / 'nbdev.yml').write_text(yaml.safe_dump(options, sort_keys=False))
    return cache


HANDLED = re.compile(r'broken link /?blob/|outside the project|html\.(?:grid|html-math)')  # seen to elsewhere


def render_smalldocs(out: Path) -> None:
    from smalldocs.site import build
    cache = stage()
    site = build(cache, quiet=True)
    for w in site.warnings:
        if not HANDLED.search(w): print('warning:', w, file=sys.stderr)
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(cache / '_docs', out)
    shutil.rmtree(cache)
    (out / 'sitemap.xml').unlink(missing_ok=True)  # it needs the address of the site, which is not ours to know


def render_quarto(out: Path) -> None:
    subprocess.run(['nbdev-docs'], cwd=ROOT, check=True)
    if out != ROOT / '_docs':
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(ROOT / '_docs', out)


# ---------------------------------------------------------------- after rendering

MATH = re.compile(r'<span class="math (inline|display)">\\[(\[](.*?)\\[)\]]</span>', re.S)
KATEX = re.compile(r'<(?:link|script)[^>]*katex[^>]*>(?:</script>)?', re.I)
REMOTE_IMPORT = re.compile(r'@import\s*(?:url\(["\']?https?:[^)]*\)|"https?:[^"]*"|\'https?:[^\']*\')[^;]*;')
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}
body {{ font-family: system-ui, sans-serif; line-height: 1.5; margin: 0 auto; max-width: 62rem; padding: 1rem; }}
code {{ overflow-wrap: anywhere; }} pre {{ overflow-x: auto; font-size: .85rem; }} a {{ color: #0b5ea8; }}
table {{ display: block; overflow-x: auto; border-collapse: collapse; margin: 1rem 0; }}
td, th {{ border-bottom: 1px solid #ddd; padding: .2rem .6rem; text-align: left; vertical-align: top; }}</style></head>
<body><nav><a href="{home}">skin_gradcam</a> / {title}</nav><main>{body}</main></body></html>
"""


def mathml(page: str) -> str:
    "`page` with its formulas as MathML, which browsers show without a script"
    from latex2mathml.converter import convert
    def fix(m: re.Match) -> str:
        return convert(html.unescape(m[2]), display='block' if m[1] == 'display' else 'inline')
    page, n = MATH.subn(fix, page)
    return KATEX.sub('', page) if n else page


def file_page(name: str, out: Path) -> str:
    "Show the repository's file `name` in the site; returns the page, relative to `out`"
    from markdown_it import MarkdownIt
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import TextLexer, get_lexer_for_filename
    from pygments.util import ClassNotFound
    page = out / 'files' / f'{name}.html'
    if page.exists(): return f'files/{name}.html'
    text, form = (ROOT / name).read_text(encoding='utf-8'), HtmlFormatter(lineanchors='L', linenos='inline')
    try: lexer = get_lexer_for_filename(name)
    except ClassNotFound: lexer = TextLexer()
    body = highlight(text, lexer, form)
    if name.endswith('.md'): body = MarkdownIt('commonmark').enable('table').render(text)
    page.parent.mkdir(parents=True, exist_ok=True)
    home = posixpath.relpath('index.html', posixpath.dirname(f'files/{name}'))
    text = PAGE.format(title=html.escape(name), style=form.get_style_defs(), home=home, body=body)
    page.write_text(text, encoding='utf-8')
    return f'files/{name}.html'


def file_link(href: str, folder: str, out: Path) -> str:
    "A link on a page in `folder`: to a file outside `nbs/`, it leads to that file's page; any other stays"
    path, _, anchor = html.unescape(href).partition('#')
    if re.match(r'[a-z][a-z0-9+.-]*:', path): return href
    source = re.fullmatch(r'(?:\.{0,2}/)*blob/[\w.-]+/(.+)', path)  # nbdev's link to a symbol's source
    name = f'../{source[1]}' if source else posixpath.normpath(posixpath.join(folder, path))
    if not re.match(r'\.\./(?!\.\.)', name) or not (ROOT / 'nbs' / name).is_file(): return href
    name = name.removeprefix('../')
    line = re.fullmatch(r'L(\d+)', anchor)
    return posixpath.relpath(file_page(name, out), folder or '.') + (f'#L-{line[1]}' if line else '')


def alt_texts(page: str) -> str:
    "`page` with an alternative text for every picture that has none: the heading over it (`#| fig-alt:` is better)"
    heading = ''
    def fix(m: re.Match) -> str:
        nonlocal heading
        if m[1] is None: return f'<img alt="figure in: {heading}"'
        heading = html.escape(html.unescape(re.sub(r'<[^>]+>', '', m[1])).strip())
        return m[0]
    return re.sub(r'<h[1-6][^>]*>(.*?)</h|<img(?![^>]*\salt=)', fix, page, flags=re.S)


def class_anchor(href: str, folder: str, ids: dict[str, set[str]]) -> str:
    "A link to a method that has no heading of its own leads to its class"
    path, _, anchor = href.partition('#')
    there = ids.get(posixpath.normpath(posixpath.join(folder, path)), {anchor})
    owner = anchor.partition('.')[0]
    return f'{path}#{owner}' if anchor not in there and owner in there else href


def finish(out: Path) -> None:
    "Formulas, links and alternative texts of the rendered pages; no fonts from the network"
    pages = {p.relative_to(out).as_posix(): p.read_text(encoding='utf-8') for p in out.rglob('*.html')}
    ids = {name: set(re.findall(r'\bid="([^"]+)"', text)) for name, text in pages.items()}
    for name, text in pages.items():
        folder = posixpath.dirname(name)
        def fix(m: re.Match, folder: str = folder) -> str:
            return m[1] + class_anchor(file_link(m[2], folder, out), folder, ids)
        page = re.sub(r'(<a\b[^>]*?\bhref=")([^"#][^"]*)', fix, alt_texts(mathml(text)))
        (out / name).write_text(page, encoding='utf-8')
    for path in out.rglob('*.css'):
        css = path.read_text(encoding='utf-8')
        path.write_text(REMOTE_IMPORT.sub('', css), encoding='utf-8')


def build_site(out: Path) -> None:
    os.chdir(ROOT)
    os.environ['PYTHONPATH'] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
    sys.path.insert(0, str(ROOT))
    (render_quarto if shutil.which('quarto') else render_smalldocs)(out)
    finish(out)
    print(f'wrote {os.path.relpath(out)}: {sum(1 for _ in out.rglob("*.html"))} pages')


def main() -> int:
    head, _, rest = (__doc__ or '').partition('\n\n')
    p = argparse.ArgumentParser(description=head, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--check', action='store_true', help='only compare README.md with nbs/index.ipynb')
    p.add_argument('--readme-only', action='store_true', help='write README.md and its pictures, no site')
    p.add_argument('--site-only', action='store_true', help='build the site, leave README.md')
    p.add_argument('--out', type=Path, default=ROOT / '_docs', help='where the site goes (default: _docs)')
    args = p.parse_args()
    if args.check: return check_readme()
    if not args.site_only: write_readme()
    if not args.readme_only: build_site(args.out.resolve())
    return 0


if __name__ == '__main__': sys.exit(main())
