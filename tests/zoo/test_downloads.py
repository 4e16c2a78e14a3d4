"""Downloads end with the whole right file or with none, against a server that misbehaves in every way."""

import contextlib
import email.utils
import hashlib
import multiprocessing
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import zoo.manifest
from zoo import downloads
from zoo.downloads import DownloadError, check_file, download
from zoo.manifest import Weights, obtain

DATA = bytes(range(256)) * 400  # 102,400 bytes
OTHER = DATA[::-1]
SHA = hashlib.sha256(DATA).hexdigest()


class Server:
    """What the handler does: `script` has one entry a request, the last one stays."""

    def __init__(self):
        self.data, self.etag, self.date, self.ranges, self.length = DATA, '"1"', None, True, None
        self.cuts: list[int | None] = []  # bytes after which each request is cut
        self.status: list[int] = []
        self.headers: dict[str, str] = {}
        self.kind = "application/octet-stream"
        self.requests: list[str | None] = []


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        plan = self.server.plan
        asked = self.headers.get("Range")
        plan.requests.append(asked)
        status = plan.status.pop(0) if plan.status else 200
        if status != 200:
            self.send_response(status)
            if status in (301, 302):
                self.send_header("Location", plan.headers["Location"])
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body, start = plan.data, 0
        valid = self.headers.get("If-Range") in (None, plan.etag, plan.date)
        if asked and plan.ranges and valid:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Type", plan.kind)
        self.send_header("Content-Length", str(plan.length or len(body) - start))
        if plan.etag:
            self.send_header("ETag", plan.etag)
        if plan.date:
            self.send_header("Last-Modified", plan.date)
        self.end_headers()
        cut = plan.cuts.pop(0) if plan.cuts else None
        with contextlib.suppress(OSError):
            self.wfile.write(body[start:] if cut is None else body[start : start + cut])
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def http():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def plan(http):
    http.plan = Server()
    http.plan.url = f"http://127.0.0.1:{http.server_address[1]}/weights.pth"
    return http.plan


def fetch(plan, target, **options):
    return download(plan.url, target, **{"pause": 0.0, "timeout": 2.0, "progress": False, **options})


def assert_only(folder, *names):
    assert sorted(p.name for p in folder.iterdir()) == sorted(names)


def test_a_file_arrives_whole_and_is_not_fetched_again(plan, tmp_path):
    target = tmp_path / "new" / "weights.pth"
    assert fetch(plan, target, size=len(DATA), sha256=SHA) == target
    assert target.read_bytes() == DATA
    assert_only(target.parent, "weights.pth")
    fetch(plan, target)
    assert plan.requests == [None]


def test_a_cut_connection_is_resumed(plan, tmp_path):
    plan.cuts = [1000, 5000, 70000]
    fetch(plan, tmp_path / "w", sha256=SHA)
    assert (tmp_path / "w").read_bytes() == DATA
    assert plan.requests == [None, "bytes=1000-", "bytes=6000-", "bytes=76000-"]
    assert_only(tmp_path, "w")


def test_a_later_call_goes_on_where_an_interrupted_one_ended(plan, tmp_path):
    plan.cuts = [3000, 0, 0]
    with pytest.raises(DownloadError, match=r"cut after 3000 of 102400 bytes; run the same command again"):
        fetch(plan, tmp_path / "w", attempts=2)
    assert_only(tmp_path, "w.partial", "w.partial.json")
    fetch(plan, tmp_path / "w")
    assert (tmp_path / "w").read_bytes() == DATA
    assert plan.requests[-1] == "bytes=3000-"


@pytest.mark.parametrize("by", ["etag", "date"])
def test_a_file_that_changed_in_between_is_fetched_from_the_start(by, plan, tmp_path):
    if by == "date":
        plan.etag, plan.date = None, email.utils.formatdate(1e9, usegmt=True)
    plan.cuts = [3000, 0]
    with pytest.raises(DownloadError):
        fetch(plan, tmp_path / "w", attempts=1)
    plan.data, plan.cuts = OTHER, []
    setattr(plan, by, '"2"' if by == "etag" else email.utils.formatdate(2e9, usegmt=True))
    fetch(plan, tmp_path / "w")
    assert (tmp_path / "w").read_bytes() == OTHER


def test_a_server_without_ranges_sends_all_of_it_again(plan, tmp_path):
    plan.ranges, plan.cuts = False, [3000]
    fetch(plan, tmp_path / "w", sha256=SHA)
    assert (tmp_path / "w").read_bytes() == DATA


def test_without_a_version_nothing_is_resumed(plan, tmp_path):
    plan.etag, plan.cuts = None, [3000]
    fetch(plan, tmp_path / "w")
    assert (tmp_path / "w").read_bytes() == DATA
    assert plan.requests == [None, None]


def test_a_weak_version_is_no_version(plan, tmp_path):
    plan.etag, plan.cuts = 'W/"1"', [3000]
    fetch(plan, tmp_path / "w")
    assert plan.requests == [None, None]


def test_a_file_that_became_shorter_is_begun_again(plan, tmp_path):
    plan.cuts = [90000]
    with pytest.raises(DownloadError):
        fetch(plan, tmp_path / "w", attempts=1)
    plan.data = DATA[:80000]  # under the same version
    fetch(plan, tmp_path / "w")
    assert (tmp_path / "w").read_bytes() == DATA[:80000]


@pytest.mark.parametrize("options", [dict(sha256="0" * 64), dict(size=len(DATA) + 1)])
def test_another_file_than_expected_leaves_nothing(options, plan, tmp_path):
    with pytest.raises(DownloadError, match=r"expected .*nothing is kept") as caught:
        fetch(plan, tmp_path / "w", **options)
    assert "\n" not in str(caught.value)
    assert_only(tmp_path)


def test_a_length_that_the_server_does_not_keep_is_a_cut(plan, tmp_path):
    plan.length = len(DATA) + 10
    with pytest.raises(DownloadError, match="cut after 102400 of"):
        fetch(plan, tmp_path / "w", attempts=1)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (404, r"does not exist any more \(HTTP 404\)"),
        (
            403,
            r"refuses access \(HTTP 403\): fetch it with a browser and add it with `zoo weights add FILE --model a\.b`",
        ),
        (418, "answered HTTP 418"),
        (503, r"the server is in trouble \(HTTP 503\)"),
        (429, r"the server is in trouble \(HTTP 429\)"),
    ],
)
def test_refusals_are_one_sentence(status, sentence, plan, tmp_path):
    plan.status = [status] * 4
    with pytest.raises(DownloadError, match=sentence) as caught:
        fetch(plan, tmp_path / "w", name="a.b")
    assert "\n" not in str(caught.value)
    assert len(plan.requests) == (4 if status in (429, 503) else 1)
    assert_only(tmp_path)


def test_trouble_that_passes_is_waited_for(plan, tmp_path):
    plan.status = [503, 500]
    assert fetch(plan, tmp_path / "w").read_bytes() == DATA


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/octet-stream"])
def test_a_web_page_is_not_a_file(kind, plan, tmp_path):
    plan.status, plan.headers["Location"] = [302], "/confirm?id=1"
    plan.data, plan.kind = b"<!DOCTYPE html><html>Google Drive can't scan this file</html>", kind
    with pytest.raises(
        DownloadError, match=r"a web page instead of the file: fetch it with a browser.*zoo weights add"
    ):
        fetch(plan, tmp_path / "w")
    assert_only(tmp_path)
    assert len(plan.requests) == 2


def test_an_empty_answer_is_not_a_file(plan, tmp_path):
    plan.data = b""
    with pytest.raises(DownloadError, match="is an empty file"):
        fetch(plan, tmp_path / "w")
    assert_only(tmp_path)


@pytest.mark.parametrize("where", ["file:///etc/passwd", "ftp://127.0.0.1/x"])
def test_other_kinds_of_addresses_are_refused(where, plan, tmp_path):
    with pytest.raises(DownloadError, match="not an address that begins with https"):
        download(where, tmp_path / "w")
    plan.status, plan.headers["Location"] = [302], where
    with pytest.raises(DownloadError):
        fetch(plan, tmp_path / "w", attempts=1)
    assert_only(tmp_path)


def test_a_server_that_is_not_there_and_one_that_is_silent(tmp_path):
    with pytest.raises(DownloadError, match="not reachable"):
        download("http://127.0.0.1:9/w", tmp_path / "w", attempts=2, pause=0)
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/w"
        with pytest.raises(DownloadError, match=r"no answer within 0\.1 seconds"):
            download(url, tmp_path / "w", attempts=1, timeout=0.1)
    assert_only(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(plan, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match=r"file/w cannot be written"):
        fetch(plan, tmp_path / "file" / "w")


def test_an_interruption_leaves_no_final_file(plan, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(downloads, "_check", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(plan, tmp_path / "w")
    monkeypatch.undo()
    assert not (tmp_path / "w").exists()
    assert fetch(plan, tmp_path / "w", sha256=SHA).read_bytes() == DATA


def _fetch_in_process(url, target, results):
    results.put(download(url, target, progress=False, pause=0, sha256=SHA).read_bytes() == DATA)


def test_two_processes_fetch_one_file_once(plan, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    jobs = [context.Process(target=_fetch_in_process, args=(plan.url, tmp_path / "w", results)) for _ in range(2)]
    for job in jobs:
        job.start()
    assert [results.get(timeout=60) for _ in jobs] == [True, True]
    for job in jobs:
        job.join()
    assert plan.requests == [None]
    assert_only(tmp_path, "w")


def test_a_file_is_compared_with_what_is_known_of_it(tmp_path):
    (tmp_path / "w").write_bytes(DATA)
    check_file(tmp_path / "w", len(DATA), SHA)
    with pytest.raises(DownloadError, match="has 102400 bytes, expected 3"):
        check_file(tmp_path / "w", 3)
    with pytest.raises(DownloadError, match="has the SHA-256"):
        check_file(tmp_path / "w", None, "0" * 64)


def test_an_entry_with_an_address_is_fetched_into_the_folder(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_WEIGHTS", str(tmp_path))
    entry = Weights(
        "crate_tiny", "x", "classification", "url", file="w.pth", url="https://example.org/w.pth", sha256=SHA
    )
    object.__setattr__(entry, "url", plan.url)
    assert zoo.manifest.local_file("crate_tiny", entry) is None
    assert obtain("crate_tiny", entry, progress=False) == tmp_path / "w.pth"
    assert obtain("crate_tiny", entry).read_bytes() == DATA
    assert len(plan.requests) == 1


def test_a_file_of_the_hub_comes_through_its_cache(tmp_path, monkeypatch):
    import huggingface_hub

    (tmp_path / "w").write_bytes(DATA)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, file: str(tmp_path / "w"))
    assert downloads.from_hub("a/b", "w", sha256=SHA) == tmp_path / "w"
    with pytest.raises(DownloadError, match="expected 0000"):
        downloads.from_hub("a/b", "w", sha256="0" * 64)

    def offline(repo, file):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(DownloadError, match=r"w of huggingface\.co/a/b could not be fetched \(no route\)"):
        downloads.from_hub("a/b", "w")
