"""The official archive of CIFAR-100: a tar of Python pickles (https://www.cs.toronto.edu/~kriz/cifar.html).

Unpickling a file can run code that is in it. So only the official files are unpickled, which their md5 sums prove: to pass, a
harmful file would have to be a second preimage of a given md5 sum, which nobody can make (unlike two files of equal md5).
"""

from __future__ import annotations

import hashlib
import pickle
import socket
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER, ARCHIVE = "cifar-100-python", "cifar-100-python.tar.gz"


def read_archive(path: Path) -> dict[str, dict[str, Any]]:
    """The records of the files train and test, by name, from the archive or from the folder that it unpacks to.

    A record has `data`, an array (images, 3072) of uint8 (red, green and blue of 32 x 32 pixels), and the lists `filenames`,
    `fine_labels` and `coarse_labels`. Raises ValueError for a file that is not the official one.
    """
    from torchvision.datasets import CIFAR100

    official = dict(CIFAR100.train_list + CIFAR100.test_list)
    if path.is_dir():
        files = {name: (path / name).read_bytes() for name in official}
    else:
        with path.open("rb") as file:
            _check(str(path), hashlib.file_digest(file, "md5").hexdigest(), CIFAR100.tgz_md5)
        with tarfile.open(path) as tar:
            files = {name: _member(tar, f"{FOLDER}/{name}") for name in official}
    for name, content in files.items():
        _check(f"{path}, file {name}", hashlib.md5(content).hexdigest(), official[name])
    return {name: pickle.loads(content, encoding="latin1") for name, content in files.items()}


def download() -> Path:
    """The official archive in the user's cache folder, downloaded if it is not there yet. Raises ValueError if that fails."""
    from torchvision.datasets import CIFAR100
    from torchvision.datasets.utils import download_url

    from lgm_dist.data.bank import cache_folder

    folder = cache_folder()
    try:
        with _socket_timeout(30.0):
            download_url(CIFAR100.url, folder, CIFAR100.filename, CIFAR100.tgz_md5)
    except (OSError, RuntimeError) as fault:
        raise ValueError(f"cannot download CIFAR-100 from {CIFAR100.url} ({fault})") from fault
    return Path(folder, CIFAR100.filename)


def _check(where: str, found: str, wanted: str) -> None:
    if found != wanted:
        raise ValueError(f"source {where} is not the official file: its md5 is {found}, not {wanted}")


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    content = tar.extractfile(name)
    assert content, name
    return content.read()


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """Without it, a network that drops packets would keep us waiting for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
