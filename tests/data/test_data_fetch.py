"""Downloads from a server of the test's own, through the real downloaders."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torchvision
from medmnist import INFO

from maehpc.data import fetch, prepare
from maehpc.errors import InputError, RunError


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address it is served at."""
    folder = tmp_path / "site"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def published(site, arrays, save_npz, monkeypatch: pytest.MonkeyPatch) -> Path:
    """dermamnist at 64 pixels, published on the test's server."""
    folder, address = site
    data = save_npz(arrays).read_bytes()
    monkeypatch.setitem(INFO["dermamnist"], "url_64", f"{address}/dermamnist_64.npz")
    monkeypatch.setitem(INFO["dermamnist"], "MD5_64", hashlib.md5(data).hexdigest())
    (folder / "dermamnist_64.npz").write_bytes(data)
    return folder / "dermamnist_64.npz"


def test_medmnist_lands_where_packing_finds_it(published: Path, arrays, home: Path, tmp_path: Path, capsys):
    path = fetch("dermamnist", 64)
    assert path == home / ".medmnist" / "dermamnist_64.npz"
    assert path.read_bytes() == published.read_bytes()
    assert [item.name for item in path.parent.iterdir()] == [path.name]
    assert capsys.readouterr().out == "", "stdout belongs to the command"
    with prepare("dermamnist", 64, tmp_path / "packs") as pack:
        np.testing.assert_array_equal(pack.images("val"), arrays["val_images"])


def test_a_whole_file_is_not_fetched_twice_and_a_cut_one_is_replaced(published: Path, tmp_path: Path):
    path = fetch("dermamnist", 64, tmp_path / "root")
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    assert fetch("dermamnist", 64, tmp_path / "root").read_bytes() == whole
    published.unlink()
    assert fetch("dermamnist", 64, tmp_path / "root").read_bytes() == whole


def test_a_download_that_is_cut_off_leaves_nothing(published: Path, tmp_path: Path):
    published.write_bytes(published.read_bytes()[:-10])
    with pytest.raises(RunError, match=r"cannot download dermamnist \(64 pixels\)"):
        fetch("dermamnist", 64, tmp_path / "root")
    assert list((tmp_path / "root").iterdir()) == []


@pytest.mark.parametrize("name", ["dermamnist", "cifar10"])
def test_without_network_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch, home: Path, name: str):
    nowhere = "http://127.0.0.1:9/file"  # the discard port: nobody listens
    monkeypatch.setitem(INFO["dermamnist"], "url", nowhere)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", nowhere)
    with pytest.raises(RunError, match="Connection refused; check the network, or put") as caught:
        fetch(name)
    assert "\n" not in str(caught.value)
    assert str(home / ".medmnist") in str(caught.value)
    assert list((home / ".medmnist").iterdir()) == []


def test_cifar10(site, home: Path, monkeypatch: pytest.MonkeyPatch):
    folder, address = site
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in ("test_batch", "batches.meta"):
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = 4
            archive.addfile(member, io.BytesIO(b"\x80\x04N."))
    (folder / "cifar.tar.gz").write_bytes(buffer.getvalue())
    cifar = torchvision.datasets.CIFAR10
    monkeypatch.setattr(cifar, "url", f"{address}/cifar.tar.gz")
    monkeypatch.setattr(cifar, "tgz_md5", hashlib.md5(buffer.getvalue()).hexdigest())
    monkeypatch.setattr(cifar, "train_list", [])
    monkeypatch.setattr(cifar, "test_list", [["test_batch", hashlib.md5(b"\x80\x04N.").hexdigest()]])
    monkeypatch.setattr(
        cifar, "__init__", lambda self, root, download: (setattr(self, "root", root), self.download())[0]
    )
    path = fetch("cifar10")
    assert path == home / ".medmnist" / "cifar-10-batches-py"
    assert sorted(item.name for item in path.iterdir()) == ["batches.meta", "test_batch"]
    assert [item.name for item in path.parent.iterdir()] == [path.name], "the archive is not kept"


def test_what_cannot_be_fetched_is_told():
    with pytest.raises(InputError, match="no data set 'mnist' to fetch"):
        fetch("mnist")
    with pytest.raises(InputError, match="digits needs no fetching"):
        fetch("digits")
    with pytest.raises(InputError, match="does not exist at 30 pixels"):
        fetch("dermamnist", 30)
