"""Fetching released files: from a server on the loopback interface that can misbehave."""

import hashlib
import http.server
import importlib.util
import os
import threading
import warnings
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from piip import DensePyramid, create_model, models
from piip.checkpoint import to_released
from piip.errors import CheckpointError, DownloadError, SpecError
from piip.zoo import download as module
from piip.zoo.download import download, download_released, mirrored
from piip.zoo.released import HUB, PUBLISHED, ROWS, SOURCES, branch_weights, find_row, find_source
from piip.zoo.specs import SPECS, as_built, resolve_spec

ROOT = Path(__file__).resolve().parents[2]
CONTENT = bytes(range(256)) * 40
NAME = "mask_rcnn_deit_tsb_1120_896_448_fpn_1x_coco_bs16"


class Server:
    """What it serves, how it behaves, and what it was asked."""

    def __init__(self) -> None:
        self.files = {"/file.bin": CONTENT}
        self.ranges = True
        self.cut = 0  # bytes after which the connection ends
        self.checksum = ""  # as the hub states it, on the way to where the file is stored
        self.etag = "v1"
        self.asked: list[tuple[str, str | None]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked.append((self.path, self.headers.get("Range")))
                if outer.checksum and not self.path.startswith("/stored"):
                    self.send_response(302)
                    self.send_header("Location", f"/stored{self.path}")
                    self.send_header("X-Linked-Etag", f'"{outer.checksum}"')
                    self.end_headers()
                    return
                content = outer.files.get(self.path.removeprefix("/stored"))
                if content is None:
                    self.send_error(404)
                    return
                wanted = self.headers.get("Range")
                start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and outer.ranges else 0
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(content) - start))
                self.send_header("ETag", f'"{outer.etag}"')
                self.end_headers()
                self.wfile.write(content[start : outer.cut or None])

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def server():
    server = Server()
    yield server
    server.stop()


def parts(folder: Path) -> list[Path]:
    return list(folder.glob("*.part"))


def test_a_file_is_fetched_once_and_whole(server, tmp_path):
    seen = []
    target = download(f"{server.url}/file.bin", tmp_path / "a" / "file.bin", progress=lambda *now: seen.append(now))
    assert target.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    download(f"{server.url}/file.bin", target)
    assert len(server.asked) == 1
    assert not parts(target.parent)


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_goes_on(server, tmp_path, ranges):
    target = tmp_path / "file.bin"
    server.cut, server.ranges = 3000, ranges
    with pytest.raises(DownloadError, match=r"connection ended after|IncompleteRead"):
        download(f"{server.url}/file.bin", target)
    assert not target.exists()
    (part,) = parts(tmp_path)
    assert part.stat().st_size == 3000
    server.cut = 0
    server.asked.clear()
    download(f"{server.url}/file.bin", target)
    assert target.read_bytes() == CONTENT
    assert server.asked[-1] == ("/file.bin", "bytes=3000-")
    assert not parts(tmp_path)


def test_another_version_of_the_file_starts_anew(server, tmp_path):
    server.cut = 3000
    with pytest.raises(DownloadError):
        download(f"{server.url}/file.bin", tmp_path / "file.bin")
    server.cut, server.etag, server.files["/file.bin"] = 0, "v2", CONTENT[::-1]
    assert download(f"{server.url}/file.bin", tmp_path / "file.bin").read_bytes() == CONTENT[::-1]


def test_checksums_of_the_hub_of_names_and_given_ones(server, tmp_path):
    right = hashlib.sha256(CONTENT).hexdigest()
    server.checksum = right
    assert download(f"{server.url}/file.bin", tmp_path / "a").read_bytes() == CONTENT
    server.checksum = "0" * 64
    with pytest.raises(DownloadError, match=r"arrived damaged: its SHA-256 is [0-9a-f]{64}, expected 0{64}"):
        download(f"{server.url}/file.bin", tmp_path / "b")
    server.checksum = ""
    name = f"net-{right[:8]}.pth"
    server.files |= {f"/{name}": CONTENT, "/net-01234567.pth": CONTENT}
    download(f"{server.url}/{name}", tmp_path / name)
    with pytest.raises(DownloadError, match=f"its SHA-256 is {right[:8]}, expected 01234567"):
        download(f"{server.url}/net-01234567.pth", tmp_path / "net-01234567.pth")
    with pytest.raises(DownloadError, match="arrived damaged"):
        download(f"{server.url}/file.bin", tmp_path / "c", sha256="abcd")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", name]


def test_no_network_and_no_such_file(server, tmp_path):
    with pytest.raises(DownloadError, match=r"404 Not Found"):
        download(f"{server.url}/none.bin", tmp_path / "none.bin")
    with pytest.raises(DownloadError, match=r"cannot get http://127.0.0.1:9/x .*put it at .*x; a mirror .*HF_ENDPOINT"):
        download("http://127.0.0.1:9/x", tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_full_disk(server, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(100))
    with pytest.raises(DownloadError, match=r"needs 0.01 MB, and there are 0.00 MB free"):
        download(f"{server.url}/file.bin", tmp_path / "file.bin")
    monkeypatch.undo()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write", full)
    with pytest.raises(DownloadError, match=r"no space left for .*file.bin: free some"):
        download(f"{server.url}/file.bin", tmp_path / "file.bin")
    assert not list(tmp_path.iterdir())


def test_mirrors(monkeypatch):
    url = find_row(NAME).weights_url
    assert url == f"https://huggingface.co/{HUB}/resolve/main/detection/{NAME}.pth"
    assert mirrored(url, "http://mirror/") == f"http://mirror/{HUB}/resolve/main/detection/{NAME}.pth"
    assert mirrored(url, mirror="http://files/piip/") == f"http://files/piip/{NAME}.pth"
    files = {weights for spec in SPECS for weights in branch_weights(spec)}
    urls = {mirrored(find_source(name)[1], mirror="http://files", name=name) for name in files}
    assert urls == {f"http://files/{name}" for name in files}
    deit = find_source("deit_3_small_224_21k.pth")[1]
    assert mirrored(deit, "http://mirror") == deit
    monkeypatch.setenv("HF_ENDPOINT", "http://other")
    assert mirrored(url).startswith("http://other/OpenGVLab/")


def test_released_weights_of_a_row(server, tmp_path):
    server.files[f"/{HUB}/resolve/main/detection/{NAME}.pth"] = CONTENT
    path = download_released(find_row(NAME), tmp_path, endpoint=server.url)
    assert (path.name, path.read_bytes()) == (f"{NAME}.pth", CONTENT)
    with pytest.raises(DownloadError, match="no weights were released for mask_rcnn_vit-t_vit-s_convnext-b"):
        download_released(find_row("vt-vs-cb-1024-672-448"), tmp_path)


def test_a_mirror_of_files_is_refused_for_a_repository(tmp_path):
    says = (
        r"PIIP-LLaVA_CLIP-BL_512-256_7B is a whole repository, and http://files .*: leave --mirror out, .*HF_ENDPOINT"
    )
    with pytest.raises(DownloadError, match=says):
        download_released(find_row("clip-bl-512-256"), tmp_path, mirror="http://files")


def test_every_branch_of_every_row_has_a_source():
    files = {weights for spec in SPECS for weights in branch_weights(spec)}
    urls = {name: find_source(name)[1] for name in files}
    assert all(url.endswith(name.rpartition("/")[2]) for name, url in urls.items())
    assert len(set(urls.values())) == len(urls)
    assert {find_source(name)[0] for name in files} <= set(SOURCES)
    with pytest.raises(SpecError, match=r"nobody's pretrained file is called 'x\.pth'; known: DeiT, DeiT III"):
        find_source("x.pth")


def test_pretrained_takes_a_row_or_a_path(tmp_path, monkeypatch):
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    branches = [{"arch": "vit", "resolution": side, "options": {**small, "family": "deit"}} for side in (32, 64)]
    spec = {"branches": branches, "interactions": 2, "heads": 4}
    model = DensePyramid(spec)
    torch.save({"state_dict": to_released(model)}, tmp_path / "released.pth")
    again = create_model(spec, pretrained=tmp_path / "released.pth")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(SpecError, match="pretrained=True is for rows of the published tables"):
        create_model(spec, pretrained=True)
    asked = []

    def fetch(row, folder):
        asked.append((row.name, Path(folder)))
        return tmp_path / "released.pth"

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(module, "download_released", fetch)
    with pytest.raises(CheckpointError, match=r"released\.pth.*the file holds 2 branch\(es\), the spec 3"):
        create_model("ct-cs-cb-1024-672-448", pretrained=True)
    assert asked == [(PUBLISHED["ct-cs-cb-1024-672-448"].name, tmp_path / "home" / "hub" / "piip")]


def test_one_released_file_for_both_forms_of_a_row(tmp_path, monkeypatch):
    sizes = ((32, 2), (16, 2), (24, 2), (8, 2))
    spec = resolve_spec(
        {
            "branches": [
                {"arch": "vit", "resolution": 32, "options": {"embed_dim": dim, "depth": depth, "num_heads": 2}}
                for dim, depth in sizes
            ],
            "interactions": 2,
            "heads": 4,
        }
    )
    row = replace(find_row("deit3-tsbl-1344-896-672-448"), spec="tiny", config="tiny_1x.py")
    monkeypatch.setitem(SPECS, "tiny", spec)
    monkeypatch.setitem(SPECS, "tiny-as-built", as_built(spec))
    for alias in ("tiny", "tiny_1x"):
        monkeypatch.setitem(PUBLISHED, alias, row)
    model = create_model("tiny-as-built")
    torch.save({"state_dict": to_released(model)}, tmp_path / "released.pth")
    monkeypatch.setattr(module, "download_released", lambda row, folder: tmp_path / "released.pth")
    for name in ("tiny-as-built", "tiny_1x-as-built"):
        again = create_model(name, pretrained=True)
        assert again.spec == as_built(spec)
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"; create_model\('tiny-as-built', pretrained=True\) takes this file$"):
        create_model("tiny", pretrained=True)
    torch.save({"state_dict": to_released(create_model("tiny"))}, tmp_path / "released.pth")
    with pytest.raises(CheckpointError, match=r"; create_model\('tiny', pretrained=True\) takes this file$"):
        create_model("tiny-as-built", pretrained=True)


@pytest.mark.slow
def test_a_published_row_brings_its_levels():
    with torch.device("meta"):
        dino, mixed = (create_model(name) for name in ("deit3-384-sbl-1792-1120-672", "ct-cs-cb-1024-672-448"))
        own = create_model("ct-cs-cb-1024-672-448", scales=(4, 2))
    assert dino.scales == (2, 1, 0.5)
    assert (mixed.taps, own.taps, own.scales) == ([0, 1, 10], [], (4, 2))


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("download_tool", ROOT / "tools" / "download.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def test_the_tool_lists_fetches_and_verifies(tool, server, tmp_path, capsys):
    tool.main(["list", "sbl_1120"])
    assert "released models (1)" in capsys.readouterr().out
    tool.main(["list"])
    assert f"released models ({len(ROWS)})" in capsys.readouterr().out
    server.files["/deit_3_small_224_21k.pth"] = CONTENT
    tool.main(["get", "deit_3_small_224_21k.pth", "--mirror", server.url, "--out", str(tmp_path)])
    assert (tmp_path / "deit_3_small_224_21k.pth").read_bytes() == CONTENT
    capsys.readouterr()
    tool.main(["verify", str(tmp_path / "deit_3_small_224_21k.pth")])
    assert hashlib.sha256(CONTENT).hexdigest() in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="truncated or not a checkpoint"):
        tool.main(["verify", str(tmp_path / "deit_3_small_224_21k.pth"), "--model", "deit3-sbl-1120-672-448"])
    with pytest.raises(CheckpointError, match="expected ffff: get it again"):
        tool.main(["verify", str(tmp_path / "deit_3_small_224_21k.pth"), "--sha256", "ffff"])
    with pytest.raises(SpecError, match=r"unknown row 'deit3-sbl-1120-672-449'.*did you mean deit3-sbl-1120-672-448"):
        tool.main(["get", "deit3-sbl-1120-672-449"])
    assert os.listdir(tmp_path) == ["deit_3_small_224_21k.pth"]


def test_branches_of_one_name_come_from_their_folders(tool, server, tmp_path):
    names = branch_weights("ct-cs-cb-1024-672-448")
    server.files |= {f"/{name}": name.encode() for name in names}
    row = "ct-cs-cb-1024-672-448"
    tool.main(["get", row, "--branches", "--mirror", server.url, "--out", str(tmp_path)])
    assert {name: (tmp_path / name).read_text() for name in names} == {name: name for name in names}
    branches = SPECS[row].branches
    assert [tool.find_branch(branches, tmp_path / branch.weights) for branch in branches] == list(branches)
    assert tool.find_branch(branches, tmp_path / "pytorch_model.bin") == branches[0]


def test_the_tool_fetches_one_file_for_both_forms_of_a_row(tool, server, tmp_path):
    row = find_row("deit3-tsbl-1344-896-672-448")
    server.files[f"/{row.name}.pth"] = CONTENT
    tool.main(["get", f"{row.spec}-as-built", "--mirror", server.url, "--out", str(tmp_path)])
    assert os.listdir(tmp_path) == [f"{row.name}.pth"]


def test_a_file_is_verified_without_memory_for_a_model(tool, tmp_path, monkeypatch, capsys):
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2, "pos_grid": (4, 4)}
    branch = {"arch": "vit", "resolution": 64, "options": options, "weights": "branch.pth"}
    spec = resolve_spec({"branches": [branch, {**branch, "weights": None}], "interactions": 2, "heads": 4})
    monkeypatch.setitem(SPECS, "tiny", spec)
    model = create_model(spec)
    released = to_released(model)
    torch.save(released, tmp_path / "backbone.pth")
    torch.save(
        {**{f"backbone.{n}": t for n, t in released.items()}, "neck.bias": torch.ones(1)}, tmp_path / "whole.pth"
    )
    torch.save(model.pyramid.branches[0].state_dict(), tmp_path / "branch.pth")
    devices = []

    def watch(build):
        def watched(*args, **options):
            built = build(*args, **options)
            devices.extend(p.device.type for p in built.parameters())
            return built

        return watched

    monkeypatch.setattr("piip.models.build_pyramid", watch(models.build_pyramid))
    monkeypatch.setattr(tool, "build_branch", watch(tool.build_branch))
    for name, says in (
        ("backbone", "fits tiny: nothing is missing or left over"),
        ("whole", "the backbone fits tiny: nothing is missing or left over; neck and heads are not compared"),
        ("branch", "fits the branch vit of tiny"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tool.main(["verify", str(tmp_path / f"{name}.pth"), "--model", "tiny"])
        assert capsys.readouterr().out.splitlines()[-1] == says
        assert set(devices) == {"meta"}
        devices.clear()
    state = {**model.pyramid.branches[0].state_dict(), "blocks.0.mlp.fc1.bias": torch.zeros(3)}
    torch.save(state, tmp_path / "branch.pth")
    with pytest.raises(CheckpointError, match=r"does not fit the branch: .*blocks\.0\.mlp\.fc1\.bias"):
        tool.main(["verify", str(tmp_path / "branch.pth"), "--model", "tiny"])
    with pytest.raises(SpecError, match="clip-l-336 is a vision tower of LLaVA"):
        tool.main(["verify", str(tmp_path / "whole.pth"), "--model", "clip-l-336"])
