"""Directories for the Hugging Face hub, on disk and through a hub of our own on the loopback interface."""

import hashlib
import http.server
import json
import threading
from pathlib import Path

import pytest
import torch

from piip import Classifier, DensePyramid
from piip.errors import CheckpointError, DownloadError
from piip.integrations.hub import from_pretrained, licences, save_pretrained
from piip.zoo.specs import resolve_spec

SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "pos_grid": (4, 4)}
TOKEN = {**SMALL, "class_token": True, "pos_prefix": 1}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def spec(options=SMALL, **more):
    branches = [
        {
            "arch": "vit",
            "resolution": 32,
            "options": options,
            "weights": "deit_3_small_224_21k.pth",
            "window": [3, None],
        },
        {"arch": "vit", "resolution": 64, "options": options, "weights": "mae_pretrain_vit_base.pth"},
    ]
    if "class_token" in options:
        branches = [{key: value for key, value in branch.items() if key != "window"} for branch in branches]
    return {"branches": branches, "interactions": 2, "heads": 4, **more}


def shake(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 5)
    return model.eval()


@pytest.fixture
def models():
    rotary = {"branches": [{"arch": "vit_small_patch16_dinov3", "resolution": 32}], "interactions": 0}
    return {
        "rotary": shake(DensePyramid(rotary)),  # has buffers that no file holds
        "dense": shake(DensePyramid(spec(), scales=(2, 1, 0.5))),
        "taps": shake(DensePyramid(spec(), taps=[0])),
        "classes": shake(Classifier(spec(TOKEN), num_classes=5, head="branches")),
        "released": shake(Classifier(spec(TOKEN), num_classes=5, head="branches", readout="first_patch")),
        "merged": shake(Classifier(spec(), num_classes=3, head="merged")),
    }


@pytest.mark.parametrize("kind", ["rotary", "dense", "taps", "classes", "released", "merged"])
def test_what_is_saved_computes_the_same_when_it_is_loaded(models, kind, tmp_path):
    model = models[kind]
    save_pretrained(model, tmp_path / kind)
    again = from_pretrained(tmp_path / kind).eval()
    assert type(again) is type(model)
    assert again.describe() == model.describe()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        pair = model(images), again(images)
    outputs, repeated = ([out] if torch.is_tensor(out) else out for out in pair)
    assert all(torch.equal(a, b) for a, b in zip(outputs, repeated, strict=True))
    assert sorted(path.name for path in (tmp_path / kind).iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]


def test_a_merged_head_without_class_positions_stays_so(tmp_path):
    model = Classifier(spec(TOKEN), num_classes=3, head="merged")
    model.use_released_form()
    again = Classifier.from_pretrained(model.save_pretrained(tmp_path / "m"))
    assert again.released_form
    assert not any(branch.class_position for branch in again.pyramid.branches)


def test_another_class_is_refused(models, tmp_path):
    save_pretrained(models["dense"], tmp_path / "m")
    with pytest.raises(CheckpointError, match="holds a DensePyramid, not a Classifier"):
        Classifier.from_pretrained(tmp_path / "m")


def test_the_card_says_where_figures_and_weights_come_from(models, tmp_path):
    with pytest.raises(ValueError, match="metrics need an origin"):
        save_pretrained(models["dense"], tmp_path / "m", metrics={"box AP": 51.2})
    save_pretrained(models["dense"], tmp_path / "m", metrics={"box AP": 51.2}, origin="measured on mini data")
    card = (tmp_path / "m" / "README.md").read_text()
    assert "| box AP | 51.2 |" in card
    assert "Origin: measured on mini data." in card
    assert "`deit_3_small_224_21k.pth` | DeiT III | Apache-2.0 |" in card
    assert "| MAE | CC-BY-NC-4.0 |" in card
    assert "license: other" in card
    save_pretrained(models["dense"], tmp_path / "m")
    assert "Not stated: nobody gave a measured figure" in (tmp_path / "m" / "README.md").read_text()


def test_every_branch_of_the_zoo_has_a_licence_or_says_that_none_is_stated():
    found = {
        entry[1:]
        for name in ("deit3-sbl-1568-1120-672", "mae-sbl-1568-1120-672")
        for entry in licences(resolve_spec(name))
    }
    assert found == {("DeiT III", "Apache-2.0"), ("MAE", "CC-BY-NC-4.0")}
    own = {"branches": [{"arch": "vit", "resolution": 32, "options": SMALL, "weights": "mine.pth"}]}
    assert licences(resolve_spec(own)) == [("mine.pth", "unknown to piip", "unknown: state it here")]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda config: config.pop("library_name"), "is not the config of a PIIP model"),
        (lambda config: config.update(format=9), "has format 9, this version reads 1"),
        (lambda config: config.update(model="dens"), "unknown model 'dens' .did you mean dense"),
        (lambda config: config.pop("options"), "lacks options"),
        (
            lambda config: config["spec"].update(head="x", interactions=3),
            "model that can be built: branch 1 has 2 blocks",
        ),
        (lambda config: config["spec"]["branches"].pop(), "the file holds 2 branch"),
    ],
)
def test_configs_that_do_not_fit(models, tmp_path, change, says):
    folder = save_pretrained(models["dense"], tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=says):
        from_pretrained(folder)


def test_a_missing_directory_is_not_looked_up_on_the_hub(tmp_path):
    for source in (tmp_path / "nowhere", "./a/b", "alone"):
        with pytest.raises(CheckpointError, match="there is no directory"):
            from_pretrained(source)


@pytest.fixture
def hub(models, tmp_path):
    """A hub that has the repository `someone/pyramid`, as the client asks for it."""
    folder = save_pretrained(models["dense"], tmp_path / "served")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            prefix = "/someone/pyramid/resolve/main/"
            file = folder / self.path.removeprefix(prefix)
            if not self.path.startswith(prefix) or not file.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound" if self.path.startswith(prefix) else "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            content = file.read_bytes()
            self.send_response(200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    thread.join()
    server.server_close()


def test_from_a_hub(models, hub, tmp_path):
    endpoint, folder = hub
    model = DensePyramid.from_pretrained("someone/pyramid", endpoint=endpoint, cache_dir=tmp_path / "cache")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in models["dense"].state_dict().items())
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"someone/pyramid has no model.safetensors: it holds no PIIP model"):
        from_pretrained("someone/pyramid", endpoint=endpoint, cache_dir=tmp_path / "other")


def test_without_network(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # asking in vain takes the client 20 seconds
    with pytest.raises(DownloadError, match="cannot reach the hub for someone/pyramid"):
        from_pretrained("someone/pyramid", endpoint="http://127.0.0.1:9", cache_dir=tmp_path / "cache")


def test_files_are_replaced_whole(models, tmp_path, monkeypatch):
    folder = save_pretrained(models["dense"], tmp_path / "m")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*args, **kwargs):
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("piip.integrations.hub.save_file", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*model.safetensors: .*No space left"):
        save_pretrained(models["taps"], folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
