"""Sources behind URLs: folders, parquet and record files, failing networks, untrusted names."""

from __future__ import annotations

import errno
import http.server
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.http import HTTPFileSystem

from pipeline.conversion.sources import open_source
from tests.helpers.images import write_photos
from tests.helpers.sources import JPEGS, cells, contents_of, open_quietly, write_parquet

pytestmark = pytest.mark.usefixtures("short_retries")


class Server(http.server.ThreadingHTTPServer):
    """Serves the files of a folder over HTTP.

    Attributes:
        statuses: For a path, the HTTP errors of its next requests, the last one first.
        requested: All paths that were requested.
    """

    statuses: dict[str, list[int]]
    requested: list[str]

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requested.append(self.path)
        statuses = self.server.statuses.get(self.path)
        if statuses:
            self.send_error(statuses.pop())
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def www(tmp_path: Path) -> Path:
    """The folder that `server` serves."""
    folder = tmp_path / "www"
    folder.mkdir()
    return folder


@pytest.fixture
def server(www: Path) -> Iterator[Server]:
    def handler(*arguments: Any) -> Handler:
        return Handler(*arguments, directory=str(www))

    server = Server(("127.0.0.1", 0), handler)  # type: ignore[arg-type]
    server.statuses = {}
    server.requested = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    HTTPFileSystem.clear_instance_cache()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_remote_folder_is_like_a_local_one(
    www: Path, scratch: Path, memory: Any, server: Server
) -> None:
    names = [
        "größe 1/a b.jpg",
        "größe 1/.hidden.jpg",
        "zwei/c.png",
        "zwei/deep/d.jpg",
        "zwei/notes.txt",
    ]
    for name in names:
        path = www / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(JPEGS[len(name) % 7])
    memory.put(str(www / "photos"), "/photos", recursive=True)
    local = contents_of(open_quietly(www / "photos", scratch))
    assert [name for name, *_ in local] == ["größe 1/a b.jpg", "zwei/c.png", "zwei/deep/d.jpg"]
    for spec in (
        "memory://photos",
        server.url("photos"),
        server.url("photos/"),
        (www / "photos").as_uri(),
    ):
        assert sorted(contents_of(open_quietly(spec, scratch))) == local, spec


def test_remote_images_are_downloaded_once(www: Path, scratch: Path, server: Server) -> None:
    write_photos(www / "photos", 3)
    first = contents_of(open_quietly(server.url("photos"), scratch))
    downloads = [path for path in server.requested if path.endswith("jpg")]
    assert len(downloads) == 3
    assert contents_of(open_quietly(server.url("photos"), scratch)) == first
    assert [path for path in server.requested if path.endswith("jpg")] == downloads


def test_requests_are_repeated_while_the_network_fails(
    www: Path, scratch: Path, server: Server
) -> None:
    write_photos(www / "photos", 6)
    server.statuses = {
        "/photos/class0/0003.jpg": [503, 500],
        "/photos/class1/0004.jpg": [404],
        "/photos/class2/0005.jpg": [403],
        "/photos/": [502],
    }
    source = open_quietly(server.url("photos"), scratch)
    assert len(source) == 4
    assert list(source.rejects) == ["class1/0004.jpg", "class2/0005.jpg"]
    assert "0005.jpg does not exist, or is not public" in source.rejects["class2/0005.jpg"]

    server.statuses = {"/photos/class0/0003.jpg": [503] * 9}
    (scratch / "spool").unlink()
    with pytest.raises(OSError, match=r"0003\.jpg cannot be downloaded: .*503"):
        open_quietly(server.url("photos"), scratch)


def test_full_disk_is_not_tried_again(
    scratch: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe({"/d/0.tar": JPEGS[0]})
    attempts = []

    def write_to_full_disk(path: str, to: str) -> None:
        attempts.append(path)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(memory), "get_file", staticmethod(write_to_full_disk))
    with pytest.raises(OSError, match="No space left"):
        open_quietly("memory://d/0.tar", scratch)
    assert len(attempts) == 1


def test_remote_splits_are_not_mixed(scratch: Path, memory: Any) -> None:
    memory.pipe({"/d/train/a/1.jpg": JPEGS[0], "/d/val/a/1.jpg": JPEGS[1]})
    message = r"memory://d holds train and val: convert each separately"
    with pytest.raises(ValueError, match=message):
        open_quietly("memory://d", scratch)
    assert contents_of(open_quietly("memory://d/val", scratch)) == [("a/1.jpg", JPEGS[1], None)]


def test_remote_parquet_is_downloaded_file_by_file(
    www: Path, scratch: Path, server: Server, memory: Any
) -> None:
    for part in range(3):
        path = www / f"train-{part}-of-3.parquet"
        write_parquet(path, cells(part), [part], ["a", "b", "c"])
    expected = [(f"{i}.jpg", JPEGS[i], "abc"[i]) for i in range(3)]
    source = open_quietly(server.url("train-{0..2}-of-3.parquet"), scratch)
    assert contents_of(source) == expected
    assert sorted(path.name for path in scratch.iterdir()) == ["spool", "spool.npz"]

    memory.put(str(www), "/www", recursive=True)
    assert contents_of(open_quietly("memory://www", scratch)) == expected
    assert contents_of(open_quietly("memory://www/*-of-3.parquet", scratch)) == expected
    one = open_quietly(server.url("train-1-of-3.parquet?download=true"), scratch)
    assert contents_of(one) == expected[1:2]


@pytest.fixture
def shards(www: Path) -> Path:
    """Three record files with odd names, and the description of the data set beside them."""
    folder = www / "set"
    folder.mkdir()
    for i in range(3):
        (folder / f"..{i:02d}.tar").write_bytes(JPEGS[i])
    (www / "set.json").write_text(json.dumps({"classes": ["x", "y", "z"]}))
    return folder


@pytest.mark.usefixtures("jpeg_lines")
def test_remote_shards_are_downloaded_and_opened(
    www: Path, shards: Path, scratch: Path, server: Server
) -> None:
    braces = "set/..{00..02}.tar"
    for spec in (
        server.url(braces),
        server.url("set"),
        f"{www}/{braces}",
        f"{shards.as_uri()}/..*.tar",
    ):
        source = open_quietly(spec, scratch)
        contents = [(image, label) for _, image, label in contents_of(source)]
        assert contents == [(JPEGS[i], "xyz"[i]) for i in range(3)], spec
        assert source.name(1).partition("/")[2] == "000001.tar, byte 0"
    server.requested.clear()
    open_quietly(server.url(braces), scratch)
    assert not [path for path in server.requested if path.endswith(".tar")]  # already downloaded
    single = open_quietly(server.url("set/..01.tar"), scratch)
    assert (single.read(0), single.classes) == (JPEGS[1], ["0", "1", "2"])


@pytest.mark.usefixtures("jpeg_lines", "shards")
def test_description_of_remote_shards_is_not_left_out_if_the_network_fails(
    scratch: Path, server: Server
) -> None:
    """The names of the classes would be missing."""
    server.statuses = {"/set.json": [503] * 9}
    with pytest.raises(OSError, match=r"set\.json cannot be downloaded"):
        open_quietly(server.url("set/..{00..02}.tar"), scratch)


@pytest.mark.usefixtures("jpeg_lines")
def test_names_from_a_server_never_become_paths(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet = write_parquet(tmp_path / "x", cells(0), [0]).read_bytes()
    (tmp_path / "x").unlink()

    class MaliciousFilesystem:
        protocol = "evil"

        def find(self, path: str) -> list[str]:
            names = ["../../a.parquet", f"{tmp_path}/b.parquet", "c/../../d.parquet"]
            return [f"{path}/{name}" for name in names]

        def get_file(self, path: str, to: str) -> None:
            if path.endswith(".json"):
                raise FileNotFoundError
            Path(to).write_bytes(JPEGS[0] if path.endswith("tar") else parquet)

    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda spec: (MaliciousFilesystem(), spec))
    assert len(open_quietly("evil://x", scratch)) == 3
    assert len(open_quietly("evil://x/../../{1..2}.tar", scratch)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]
    files = sorted(path.name for path in scratch.rglob("*") if path.is_file())
    assert files == ["000000.tar", "000001.tar", "spool", "spool.npz"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere://x", "nowhere"),
        ("s3://bucket/x", "s3fs"),
        ("memory://nothing/*.tar", "matches no file"),
        ("memory://nothing-{3..1}.tar", "matches no file"),
        ("memory://nothing", "memory://nothing holds no image"),
        ("memory://d/*", "name one folder, or files of one kind"),
    ],
)
def test_urls_without_images_are_refused(
    scratch: Path, memory: Any, spec: str, message: str
) -> None:
    memory.pipe({"/d/a.tar": b"1", "/d/b.parquet": b"2"})
    with pytest.raises(ValueError, match=message):
        open_quietly(spec, scratch)


def test_archive_among_images_is_ignored(scratch: Path, memory: Any) -> None:
    memory.pipe({"/d/a/1.jpg": JPEGS[0], "/d/a/backup.tar": b"", "/d/b/2.jpg": JPEGS[1]})
    assert contents_of(open_quietly("memory://d", scratch)) == [
        ("a/1.jpg", JPEGS[0], "a"),
        ("b/2.jpg", JPEGS[1], "b"),
    ]


@pytest.mark.usefixtures("jpeg_lines")
def test_numbers_may_follow_the_suffix(scratch: Path, memory: Any) -> None:
    """TFRecords are often named so."""
    memory.pipe({f"/d/cifar-train.tar-0000{i}-of-00002": JPEGS[i] for i in range(2)})
    source = open_quietly("memory://d/cifar-train.tar-*", scratch)
    assert [source.read(0), source.read(1)] == JPEGS[:2]


def test_missing_shard_is_named(scratch: Path, memory: Any) -> None:
    memory.pipe({"/d/0.tar": JPEGS[0]})
    with pytest.raises(OSError, match=r"/d/1\.tar does not exist"):
        open_quietly("memory://d/{0..1}.tar", scratch)


def test_images_are_downloaded_in_parallel_but_not_all_at_once(
    scratch: Path, memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe({f"/d/{i:04d}.jpg": JPEGS[i % 7] for i in range(400)})
    lock = threading.Lock()
    requested: list[str] = []
    running = 0
    most_running = 0
    cat_file = memory.cat_file

    def slow_cat_file(path: str) -> bytes:
        nonlocal running, most_running
        with lock:
            running += 1
            most_running = max(most_running, running)
            requested.append(path)
        time.sleep(0.002)
        with lock:
            running -= 1
        return cat_file(path)

    monkeypatch.setattr(type(memory), "cat_file", staticmethod(slow_cat_file))
    reports: list[tuple[int, int, int]] = []

    def report(done: int, total: int) -> None:
        reports.append((done, total, len(requested)))

    source = open_source("memory://d", report, scratch)
    assert [source.read(i) for i in range(400)] == [JPEGS[i % 7] for i in range(400)]
    assert most_running > 4
    assert reports[0] == (256, 400, 256)  # no more was downloaded than could be written
