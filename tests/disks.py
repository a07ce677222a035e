"A disk that is full, for the tests that fill one"
from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def disk_of_1_mib(folder: Path, otherwise: Callable[[], None]) -> Iterator[None]:
    "A file system of 1 MiB where one can be mounted; where not, a folder, after a call that makes the system pretend"
    folder.mkdir()
    try: mounted = not subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', folder],
                                      capture_output=True).returncode
    except OSError: mounted = False
    if not mounted: otherwise()
    try: yield
    finally:
        if mounted: subprocess.run(['umount', '-l', folder], check=True)
