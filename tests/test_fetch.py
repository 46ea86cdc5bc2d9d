"""Data over http: a real server on this machine that fails in every way, and URLs that would run a command."""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import webdataset
from test_shards import tiny_source

from lgm_dist.data import fetch as fetching
from lgm_dist.data.fetch import fetch
from lgm_dist.data.shards import Manifest, read_manifest, read_samples, write_shards

Fault = Callable[["Server", bytes], None]


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; the file whose name contains `at` is answered by `fault`."""

    at, fault, asked = "", staticmethod(lambda *_: None), 0
    gone = threading.Event()

    def do_GET(self) -> None:
        if not type(self).at or type(self).at not in self.path:
            return super().do_GET()
        type(self).asked += 1
        with contextlib.suppress(ConnectionError):  # the client gives up
            type(self).fault(self, Path(self.translate_path(self.path)).read_bytes())
        self.close_connection = True
        return None

    def head(self, size: int | None, status: int = 200) -> None:
        self.send_response(status)
        if size is not None:
            self.send_header("Content-Length", str(size))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def status(code: int) -> Fault:
    return lambda server, _: server.send_error(code)


def cut(server: Server, content: bytes) -> None:
    server.head(len(content))
    server.wfile.write(content[: len(content) // 2])


def cut_chunk(server: Server, content: bytes) -> None:
    server.protocol_version = "HTTP/1.1"
    server.send_response(200)
    server.send_header("Transfer-Encoding", "chunked")
    server.end_headers()
    server.wfile.write(b"%x\r\n" % len(content) + content[:100])


def hang_up(server: Server, _: bytes) -> None:
    server.connection.shutdown(socket.SHUT_RDWR)


def not_http(server: Server, _: bytes) -> None:
    server.wfile.write(b"SSH-2.0-OpenSSH_9.2\x1b[2J\r\n")


def silent(server: Server, content: bytes) -> None:
    server.head(len(content))
    server.wfile.write(content[:100])
    server.gone.wait(5)


def drip(server: Server, content: bytes) -> None:
    server.head(len(content))
    for i in range(len(content)):
        server.wfile.write(content[i : i + 1])
        time.sleep(0.02)


def twice(fault: Fault) -> Fault:
    def answer(server: Server, content: bytes) -> None:
        if server.asked <= 2:
            return fault(server, content)
        server.head(len(content))
        server.wfile.write(content)
        return None

    return answer


FAULTS: dict[str, tuple[Fault, str, int]] = {
    "404": (status(404), "the server answers 404 Not Found", 1),
    "403": (status(403), "the server answers 403 Forbidden", 1),
    "500": (status(500), "the server answers 500 Internal Server Error, 3 times", 3),
    "cut": (cut, r"the connection broke off after [\d,]+ of [\d,]+ bytes, 3 times", 3),
    "cut chunk": (cut_chunk, "the connection broke off, 3 times", 3),
    "hung up": (hang_up, "Remote end closed connection without response, 3 times", 3),
    "no http": (not_http, r"the server does not speak HTTP: SSH-2\.0-OpenSSH_9\.2\[2J, 3 times", 3),
    "silent": (silent, r"the server is silent for 0\.2 s, 3 times", 3),
    "drips": (drip, "the server sends less than 1,000 bytes a second, 3 times", 3),
}


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A manifest whose splits of 12 samples lie in three shards each."""
    return write_shards(tiny_source(), tmp_path / "tiny", samples_per_shard=5)


@pytest.fixture
def served(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of the manifest; timeouts are short."""
    monkeypatch.setattr(fetching, "TIMEOUT", 0.2)
    monkeypatch.setattr(fetching, "PAUSE", 0.0)
    Server.at, Server.asked, Server.gone = "", 0, threading.Event()
    handler = functools.partial(Server, directory=str(prepared.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/tiny.json"
        Server.gone.set()
        server.shutdown()


def test_manifest_and_shards_are_read_over_http(prepared: Path, served: str) -> None:
    local, remote = read_manifest(str(prepared)), read_manifest(served)
    assert isinstance(remote, Manifest)
    assert remote.digest == local.digest
    assert list(read_samples(remote, "val")) == list(read_samples(local, "val"))
    plain = webdataset.WebDataset(served.replace(".json", "-val-{000000..000002}.tar"), shardshuffle=False)
    assert len(list(plain)) == 12


@pytest.mark.parametrize("name", FAULTS)
def test_a_server_that_fails_is_named_with_the_file_and_the_command(served: str, name: str) -> None:
    manifest = read_manifest(served)
    fault, sentence, asked = FAULTS[name]
    Server.at, Server.fault = "-val-000001.tar", staticmethod(fault)
    shard = served.replace(".json", "-val-000001.tar")
    command = "`lgm-dist prepare folder --source PATH --name tiny --out DIR`"
    with pytest.raises(ValueError, match=rf"^shard {shard}: {sentence}; prepare the shards again with {command}$"):
        list(read_samples(manifest, "val"))
    assert Server.asked == asked
    Server.at = "tiny.json"
    with pytest.raises(ValueError, match=rf"^cannot read the manifest {served} \({sentence}\); prepare it with `.*`$"):
        read_manifest(served)


@pytest.mark.parametrize("fault", [status(503), cut, hang_up, silent], ids=["503", "cut", "hung up", "silent"])
def test_a_fault_that_passes_is_waited_for(prepared: Path, served: str, fault: Fault) -> None:
    """Bytes of the failed tries are not in the result."""
    Server.at, Server.fault = "-val-000001.tar", staticmethod(twice(fault))
    local = read_manifest(str(prepared))
    assert list(read_samples(read_manifest(served), "val")) == list(read_samples(local, "val"))
    assert Server.asked == 3


@pytest.mark.usefixtures("served")
def test_a_missing_server_is_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound but not listening: refuses
        url = f"http://127.0.0.1:{free.getsockname()[1]}/tiny.json"
        with pytest.raises(ValueError, match=r"tiny\.json \(Connection refused, 3 times\); prepare it"):
            read_manifest(url)
    for wrong in ("http://127.0.0.1:port/x.json", "http://[/x.json", "http://a b/x.json", "http://\u2028/x.json"):
        with pytest.raises(ValueError, match=r"x\.json \(this is not a URL: .*\); prepare it"):
            read_manifest(wrong)


def test_a_manifest_without_end_is_not_read_to_it(served: str) -> None:
    def endless(server: Server, _: bytes) -> None:
        server.head(None)
        while not server.gone.is_set():
            server.wfile.write(b" " * 2**20)

    Server.at, Server.fault = "tiny.json", staticmethod(endless)
    with pytest.raises(ValueError, match=r"tiny\.json \(it has more than 67,108,864 bytes\)"):
        read_manifest(served)


@pytest.mark.parametrize(
    "scheme", ["pipe:touch {trap}; echo http://", "file://{trap}", "ftp://127.0.0.1", "gs://bucket"]
)
def test_a_location_is_never_a_command(tmp_path: Path, scheme: str) -> None:
    """webdataset's opener would run the first one in a shell, and it may come from somebody else's config.json."""
    trap = tmp_path / "trap"
    location = scheme.format(trap=trap) + "/x.json"
    with pytest.raises(ValueError, match="only local paths and URLs with http:// or https:// are read"):
        read_manifest(location)
    with pytest.raises(OSError, match="only local paths"):
        fetch(location, io.BytesIO())
    assert not trap.exists()
