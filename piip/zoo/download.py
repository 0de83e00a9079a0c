"""Getting files that were released elsewhere: whole or not at all, checked, and resumed after an interruption."""

import errno
import hashlib
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

import torch

from piip.errors import DownloadError, SpecError
from piip.zoo.released import ENDPOINT, Row

_CHUNK = 1 << 20
_TIMEOUT = 30.0  # seconds without an answer
Progress = Callable[[int, int | None], None]


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and keeps what the hub says of a file before it sends to where the file is stored."""

    def __init__(self) -> None:
        self.linked: dict[str, str] = {}

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        self.linked.update({name.lower(): value for name, value in headers.items()})
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(url: str, target: str | Path, *, sha256: str | None = None, progress: Progress | None = None) -> Path:
    """Fetch a file, unless it is there.

    What arrives is kept beside the target as `NAME.HASH.part` until it is complete and checked, and fetching goes on
    where it stopped, in this call or a later one. The hash is that of the server's version: another version of the
    file starts anew. The checksum is the given one, the hub's, or the one in the name of the file (`-12345678.pth`),
    whichever is known first.

    Args:
        url: The address.
        target: Where the file goes.
        sha256: Its checksum, or the first digits.
        progress: Called with the bytes there so far and the size of the whole, None where the server does not say.

    Returns:
        The target.

    Raises:
        DownloadError: The server cannot be reached or has no such file, the file is incomplete or damaged, or the disk
            is full. Nothing is under the target's name then.
    """
    target = Path(target)
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part, expected = _fetch(url, target, progress)
        _check(part, sha256 or expected or _in_name(target.name), url)
        part.replace(target)
    except urllib.error.HTTPError as error:
        raise DownloadError(f"{url}: the server says {error.code} {error.reason}") from None
    except (urllib.error.URLError, TimeoutError, ConnectionError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise DownloadError(
            f"cannot get {url} ({reason}). Without network, get it on another machine and put it at {target}; a mirror "
            "of the hub is named by --endpoint or $HF_ENDPOINT"
        ) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(f"no space left for {target}: free some, and run the same again to go on") from None
        raise DownloadError(f"cannot write {target}: {error}") from None
    return target


def _fetch(url: str, target: Path, progress: Progress | None) -> tuple[Path, str | None]:
    """Fetch into the part file; returns it, and the checksum that the hub states."""
    response, linked = _open(url, 0)
    with response:
        total = int(response.headers.get("Content-Length") or 0) or None
        etag = linked.get("x-linked-etag") or response.headers.get("ETag") or ""
        version = hashlib.sha256(f"{url} {etag} {total}".encode()).hexdigest()[:12]
        part = target.with_name(f"{target.name}.{version}.part")
        done = part.stat().st_size if part.exists() else 0
        if total is not None and (free := shutil.disk_usage(target.parent).free) < total - done:
            raise DownloadError(
                f"{target} needs {_size(total - done)}, and there are {_size(free)} free in {target.parent}: free some "
                "space, or choose another folder"
            )
        if not done:
            _write(response, part, 0, total, progress)
    if done and done != total:
        response, _ = _open(url, done)
        with response:
            if response.status != 206:  # a server without ranges sends the whole again
                done = 0
            _write(response, part, done, total, progress)
    if total is not None and part.stat().st_size != total:
        raise DownloadError(
            f"{url}: the connection ended after {_size(part.stat().st_size)} of {_size(total)}; run the same again to "
            "go on from there"
        )
    checksum = etag.strip('"')
    return part, checksum if re.fullmatch("[0-9a-f]{64}", checksum) else None


def _open(url: str, start: int) -> tuple[HTTPResponse, dict[str, str]]:
    redirects = _Redirects()
    headers = {"User-Agent": "piip", "Accept-Encoding": "identity", **({"Range": f"bytes={start}-"} if start else {})}
    opener = urllib.request.build_opener(redirects)
    return opener.open(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT), redirects.linked


def _write(response: HTTPResponse, part: Path, done: int, total: int | None, progress: Progress | None) -> None:
    with part.open("ab" if done else "wb") as file:
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            done += len(chunk)
            if progress is not None:
                progress(done, total)


def _in_name(name: str) -> str | None:
    match = re.search(r"-([0-9a-f]{8})\.\w+$", name)
    return match and match[1]


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 checksum of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def _check(part: Path, expected: str | None, url: str) -> None:
    if expected is None:
        return
    found = file_sha256(part)
    if not found.startswith(expected):
        part.unlink()
        raise DownloadError(
            f"{url} arrived damaged: its SHA-256 is {found[: len(expected)]}, expected {expected}. It was removed; run "
            "the same again"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def mirrored(url: str, endpoint: str | None = None, mirror: str | None = None, *, name: str | None = None) -> str:
    """Return where to fetch a file from.

    Args:
        url: Its address.
        endpoint: Replaces the Hugging Face hub's address; `$HF_ENDPOINT` by default.
        mirror: A folder of a web server that has all files under their own names; replaces every address.
        name: The file's own name, with the folder where several are told apart by it (the `weights` of a branch);
            by default the last part of the address.
    """
    if mirror:
        return f"{mirror.rstrip('/')}/{name or url.rpartition('/')[2]}"
    endpoint = endpoint or os.environ.get("HF_ENDPOINT")
    return url.replace(ENDPOINT, endpoint.rstrip("/"), 1) if endpoint else url


def download_released(
    row: Row,
    folder: str | Path,
    *,
    endpoint: str | None = None,
    mirror: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Fetch the released weights of a row, a file or, for LLaVA, a directory.

    Args:
        row: The row.
        folder: Where they go.
        endpoint: See `mirrored`.
        mirror: See `mirrored`.
        progress: See `download`.

    Raises:
        DownloadError: See `download`; or nothing was released for this row, or a mirror of files is named for a
            repository.
    """
    if row.weights_url is None:
        raise DownloadError(f"no weights were released for {row.name}")
    if not row.repository:
        target = Path(folder) / f"{row.name}.pth"
        return download(mirrored(row.weights_url, endpoint, mirror), target, progress=progress)
    if mirror:
        raise DownloadError(
            f"{row.repository} is a whole repository, and {mirror} a mirror of single files: leave --mirror out, and "
            "name a mirror of the hub by --endpoint or $HF_ENDPOINT"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    target = Path(folder) / row.repository.rpartition("/")[2]
    try:
        return Path(snapshot_download(row.repository, local_dir=target, endpoint=endpoint or None))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise DownloadError(f"cannot get {row.weights_url}: {' '.join(str(error).split())[:300]}") from None


def download_weights(row: Row | None) -> Path:
    """Fetch the released weights of a row into torch's hub folder, unless they are there.

    Raises:
        SpecError: Not a row of the published tables, or its weights are not those of one vision model.
        DownloadError: See `download`; or nothing was released for this row.
    """
    if row is None:
        raise SpecError("pretrained=True is for rows of the published tables: give the path of a checkpoint instead")
    if row.repository:
        raise SpecError(f"{row.repository} holds a language model too: load it with piip_llava (see llava/README.md)")
    return download_released(row, Path(torch.hub.get_dir()) / "piip")
