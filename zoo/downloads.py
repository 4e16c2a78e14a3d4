"""Fetching a file so that it is there whole or not at all.

`download` writes to `<name>.partial` beside the target and renames when size and hash are right. A cut connection is
resumed where it stopped, as long as the server says (by ETag or date) that the file is still the same one; a server
that cannot resume sends the file again. Every failure is one sentence in a `DownloadError`.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

_CHUNK = 1 << 20
_PAGE = re.compile(rb"\s*(<!doctype html|<html|<head|<\?xml)", re.IGNORECASE)


class DownloadError(RuntimeError):
    """A file could not be fetched. The message says why and what to do; nothing is at the target."""


class _Cut(Exception):  # noqa: N818 - a signal: the same request may succeed if it is made again
    """The connection ended early, timed out, or the server is in trouble."""


def download(
    url: str,
    target: str | PathLike,
    *,
    size: int | None = None,
    sha256: str | None = None,
    name: str | None = None,
    timeout: float = 30.0,
    attempts: int = 4,
    pause: float = 1.0,
    progress: bool = True,
) -> Path:
    """Fetch `url` to the file `target`, unless it is there.

    Two processes that ask for the same target share the work: the second waits for the first.

    Args:
        url: http or https.
        target: the file to write; its folder is made.
        size: bytes that it must have, where they are known.
        sha256: hexadecimal digest that it must have, where it is known.
        name: the manifest's name of the weights, for the advice in errors.
        timeout: seconds without an answer or without data.
        attempts: how often to ask again after a cut connection, counted from the last progress.
        pause: seconds before the second attempt, doubled for each further one.
        progress: show a bar when standard error is a terminal.

    Raises:
        DownloadError: no such file, refused, unreachable, cut off, a web page, or another size or hash. What was
            fetched of a cut file is kept beside the target and used by the next call.
    """
    target = Path(target)
    if urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(f"{url} is not an address that begins with https://")
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked_partial(target) as file:
            if not target.is_file():  # not fetched by another process while this one waited
                _fetch(_Job(url, target, size, sha256, name, timeout, attempts, pause, progress), file)
    except OSError as error:
        raise DownloadError(f"{target} cannot be written: {error.strerror or error}") from error
    return target


def from_hub(repo: str, file: str, *, size: int | None = None, sha256: str | None = None) -> Path:
    """A file of a huggingface repository, through its cache.

    Raises:
        DownloadError: unreachable, no such file, or another size or hash than expected.
    """
    from huggingface_hub import hf_hub_download

    try:
        path = Path(hf_hub_download(repo, file))
    except Exception as error:  # of many kinds without a common base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
        raise DownloadError(
            f"{file} of huggingface.co/{repo} could not be fetched ({reason}): check the connection, or fetch it with "
            "a browser and add it with `zoo weights add FILE`"
        ) from error
    check_file(path, size, sha256)
    return path


def file_sha256(path: str | PathLike) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(path: str | PathLike, size: int | None = None, sha256: str | None = None) -> None:
    """Compare a file with what is known of it.

    Raises:
        DownloadError: another size or hash.
    """
    there = os.path.getsize(path)
    if size is not None and there != size:
        raise DownloadError(f"{path} has {there} bytes, expected {size}: it is incomplete or another file")
    if sha256 is not None and (found := file_sha256(path)) != sha256:
        raise DownloadError(f"{path} has the SHA-256 {found}, expected {sha256}: it is damaged or another file")


class _Job:
    """One download: what is wanted, and the little file that remembers which version the partial file is of."""

    def __init__(self, url, target, size, sha256, name, timeout, attempts, pause, progress):
        self.url, self.target, self.size, self.sha256, self.name = url, target, size, sha256, name
        self.timeout, self.attempts, self.pause = timeout, attempts, pause
        self.progress = progress and sys.stderr.isatty()
        self.notes = target.with_name(f"{target.name}.partial.json")

    def validator(self) -> str | None:
        """The header by which a server tells whether its file is still the one that was begun."""
        try:
            notes = json.loads(self.notes.read_text())
        except (OSError, ValueError):
            return None
        return notes.get("validator") if isinstance(notes, dict) and notes.get("url") == self.url else None

    def remember(self, headers: Any) -> None:
        etag = headers.get("ETag")
        strong = etag if etag and not etag.startswith("W/") else None
        self.notes.write_text(json.dumps({"url": self.url, "validator": strong or headers.get("Last-Modified")}))

    def advice(self) -> str:
        model = f" --model {self.name}" if self.name else ""
        return f"fetch it with a browser and add it with `zoo weights add FILE{model}`"


def _fetch(job: _Job, file: IO[bytes]) -> None:
    failures = 0
    while True:
        before = file.seek(0, os.SEEK_END)
        try:
            _request(job, file)
            break
        except _Cut as cut:
            file.flush()
            failures = 1 if file.seek(0, os.SEEK_END) > before else failures + 1
            if failures >= job.attempts:
                raise DownloadError(f"{job.url}: {cut}; run the same command again to go on from there") from cut
            time.sleep(job.pause * 2 ** (failures - 1))
    file.flush()
    os.fsync(file.fileno())
    partial = Path(file.name)
    try:
        _check(job, file)
    except DownloadError:
        partial.unlink(missing_ok=True)
        job.notes.unlink(missing_ok=True)
        raise
    os.replace(partial, job.target)
    job.notes.unlink(missing_ok=True)


def _check(job: _Job, file: IO[bytes]) -> None:
    length = file.seek(0, os.SEEK_END)
    file.seek(0)
    if length == 0:
        raise DownloadError(f"{job.url} is an empty file: {job.advice()}")
    if job.size is not None and length != job.size:
        raise DownloadError(
            f"{job.url} has {length} bytes, expected {job.size}: the file was replaced; nothing is kept"
        )
    if job.sha256 is not None:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != job.sha256:
            raise DownloadError(
                f"{job.url} has the SHA-256 {found}, expected {job.sha256}: it was damaged on the way or replaced; "
                "nothing is kept, try again"
            )


def _request(job: _Job, file: IO[bytes]) -> None:
    """Ask for what is missing and append it; returns when the file is complete."""
    have = file.seek(0, os.SEEK_END)
    headers = {"User-Agent": "zoo", "Accept-Encoding": "identity"}
    validator = job.validator()
    if have and (validator or job.sha256):
        headers["Range"] = f"bytes={have}-"
        if validator:
            headers["If-Range"] = validator
    try:
        response = _OPENER.open(urllib.request.Request(job.url, headers=headers), timeout=job.timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:  # nothing behind what is there: begin again
            _restart(job, file)
            raise _Cut("the server has less than was fetched before") from error
        _explain_status(job, error.code)
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise _Cut(f"no answer within {job.timeout:g} seconds") from error
        raise _Cut(f"not reachable ({getattr(reason, 'strerror', None) or reason})") from error
    with response:
        _receive(job, file, response, have)


def _explain_status(job: _Job, code: int) -> None:
    if code in (404, 410):
        raise DownloadError(f"{job.url} does not exist any more (HTTP {code}): look for the file and add it by hand")
    if code in (401, 403, 407):
        raise DownloadError(f"{job.url} refuses access (HTTP {code}): {job.advice()}")
    if code in (408, 425, 429) or code >= 500:
        raise _Cut(f"the server is in trouble (HTTP {code})")
    raise DownloadError(f"{job.url} answered HTTP {code}: {job.advice()}")


def _receive(job: _Job, file: IO[bytes], response: Any, have: int) -> None:
    if response.headers.get_content_type() in ("text/html", "application/xhtml+xml"):
        raise DownloadError(f"{job.url} answered with a web page instead of the file: {job.advice()}")
    resumed = response.status == 206
    if resumed:
        place = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        if place is None or int(place[1]) != have:
            _restart(job, file)
            raise _Cut("the server sent another part than was asked for")
    else:  # the whole file: the server cannot resume, or has another version now
        file.seek(0)
        file.truncate()
        have = 0
        job.remember(response.headers)
    length = response.headers.get("Content-Length")
    total = have + int(length) if length and length.isdigit() else None
    if total is not None and job.size is not None and total != job.size:
        _restart(job, file)
        raise DownloadError(f"{job.url} has {total} bytes, expected {job.size}: the file was replaced; nothing is kept")
    with _bar(job, have, total) as advance:
        while True:
            try:
                chunk = response.read(_CHUNK)
            except http.client.IncompleteRead as error:
                chunk = error.partial
                file.write(chunk)
                have += len(chunk)
                break
            except TimeoutError as error:
                raise _Cut(f"no data for {job.timeout:g} seconds after {have} bytes") from error
            except OSError as error:
                raise _Cut(f"the connection broke after {have} bytes") from error
            if not chunk:
                break
            if have == 0 and _PAGE.match(chunk):
                _restart(job, file)
                raise DownloadError(f"{job.url} answered with a web page instead of the file: {job.advice()}")
            file.write(chunk)
            have += len(chunk)
            advance(len(chunk))
    if total is not None and have < total:
        raise _Cut(f"the connection was cut after {have} of {total} bytes")


def _restart(job: _Job, file: IO[bytes]) -> None:
    file.seek(0)
    file.truncate()
    job.notes.unlink(missing_ok=True)


@contextlib.contextmanager
def _bar(job: _Job, have: int, total: int | None) -> Iterator[Any]:
    if not job.progress:
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(initial=have, total=total, unit="B", unit_scale=True, desc=job.target.name, leave=False) as bar:
        yield bar.update


@contextlib.contextmanager
def _locked_partial(target: Path) -> Iterator[IO[bytes]]:
    """`<target>.partial`, open for appending, held by this process alone; without locks a name of its own."""
    partial = target.with_name(f"{target.name}.partial")
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        with partial.open("a+b") as file:
            yield file
        return
    while True:
        with partial.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # whoever held it before may have renamed or removed it
            if partial.exists() and os.path.samestat(os.fstat(file.fileno()), partial.stat()):
                try:
                    yield file
                finally:
                    with contextlib.suppress(OSError):
                        if not os.path.getsize(partial):
                            partial.unlink()
                return
        if target.is_file():
            with open(os.devnull, "a+b") as nothing:
                yield nothing
            return


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but not from https to an unprotected or other kind of address."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        old, new = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if new not in ("http", "https") or (old == "https" and new == "http"):
            raise DownloadError(f"{req.full_url} leads to {newurl}, which is not protected: fetch it with a browser")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_OPENER = urllib.request.build_opener(_SafeRedirects)
