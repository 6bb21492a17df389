"""What a training starts from: files that anyone may have written load whole or say what they lack, and a hub that is
not there stops it."""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reports.plots import write_roc
from shard_tools.errors import InputError
from shard_tools.pack import PackConfig, pack
from tests.conftest import ROOT
from tests.range_server import serving
from tests.tiny import tiny_config, write_tiny_data
from train import train
from training.accelerator import check_compiler
from training.config import TrainConfig
from training.cross_validation import train_folds
from training.model import ModelConfig, build_model
from training.pretrained import NoPretrainedError, is_reachable
from training.search.candidates import CUTOUT_PLANES, upright_shape
from training.weights import save_weights

NANO = ModelConfig("swin_nano")
HUB_MODEL = "test_resnet.r160_in1k"  # timm's model for tests: 0.5 million weights, and a repository on the hub


def built(config: ModelConfig, seed: int = 0, channels: int = 6, height: int = 56, width: int = 112) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_model(config, channels, height, width)


def from_file(path: Path, model: str = "swin_nano", **options: object) -> torch.nn.Module:
    config = dataclasses.replace(ModelConfig(model, str(path)), **options)  # type: ignore[arg-type]
    return built(config, seed=1)


@pytest.fixture(scope="module")
def trained() -> dict[str, Tensor]:
    """Weights that no initialisation gives, for a canvas that is not square."""
    return {name: value + 0.1 for name, value in built(NANO).state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_weights_of_ones_own_load_whole_with_their_head(trained: dict[str, Tensor], tmp_path: Path) -> None:
    save_weights(tmp_path / "best.safetensors", trained, {})
    assert_same(from_file(tmp_path / "best.safetensors").state_dict(), trained)


def test_ones_own_head_stays_when_canvas_and_channels_change(trained: dict[str, Tensor], tmp_path: Path) -> None:
    save_weights(tmp_path / "best.safetensors", trained, {})
    config = ModelConfig("swin_nano", str(tmp_path / "best.safetensors"))
    found = built(config, 1, channels=2, height=112, width=56).state_dict()
    for name in ("head.fc.weight", "head.fc.bias", "layers.1.blocks.0.mlp.fc1.weight"):
        assert torch.equal(found[name], trained[name]), name


@pytest.mark.parametrize(
    "prefixes", ["model.", "backbone.", "module.", "_orig_mod.", "net.", "model.module._orig_mod."]
)
@pytest.mark.parametrize("nested", [False, True])
def test_what_wrappers_put_before_names_is_taken_off(
    trained: dict[str, Tensor], tmp_path: Path, prefixes: str, nested: bool
) -> None:
    state = {f"{prefixes}{name}": value for name, value in trained.items()}
    torch.save({"state_dict": state, "epoch": 3} if nested else state, tmp_path / "weights.ckpt")
    assert_same(from_file(tmp_path / "weights.ckpt").state_dict(), trained)


def test_a_network_within_the_candidates_is_found_under_its_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = built(ModelConfig("swin_pico", stem="candidates"), 0).state_dict()
    save_weights(tmp_path / "best.safetensors", state, {})
    with caplog.at_level(logging.INFO, "training.pretrained"):
        config = ModelConfig("swin_pico", str(tmp_path / "best.safetensors"))
        found = built(config, 1, CUTOUT_PLANES, *upright_shape(56)).state_dict()
    name = "layers.1.blocks.0.mlp.fc1.weight"
    assert torch.equal(found[name], state[f"backbone.{name}"])
    assert "not used: control_share, slope, weigh.0.bias" in caplog.text


def test_each_weight_that_is_missing_is_named_and_the_file_refused(trained: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({name: v for name, v in trained.items() if not name.startswith("layers.3")}, tmp_path / "part.pth")
    lacks = sum(name.startswith("layers.3") for name in trained)
    with pytest.raises(InputError, match=rf"part\.pth: .* lacks {lacks} of its {len(trained)} weights \(layers\.3\."):
        from_file(tmp_path / "part.pth")


def test_each_weight_that_is_not_used_is_named_in_one_line(
    trained: dict[str, Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = {"decoder.weight": torch.zeros(3), "neck.bias": torch.zeros(1)}
    save_file(trained | extra, tmp_path / "more.safetensors")
    with caplog.at_level(logging.INFO, "training.pretrained"):
        assert_same(from_file(tmp_path / "more.safetensors").state_dict(), trained)
    foreign = timm.create_model("resnet18", num_classes=1000).state_dict()
    save_file(foreign, tmp_path / "imagenet.safetensors")
    with caplog.at_level(logging.INFO, "training.pretrained"):
        from_file(tmp_path / "imagenet.safetensors", "resnet18")
    unused = [
        record.message.partition("not used: ")[2] for record in caplog.records if record.name == "training.pretrained"
    ]
    assert unused == ["decoder.weight, neck.bias", "fc.bias, fc.weight"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(
    trained: dict[str, Tensor], tmp_path: Path, value: float
) -> None:
    name = "layers.0.blocks.0.mlp.fc1.bias"
    broken = {**trained, name: torch.full_like(trained[name], value)}
    save_file(broken, tmp_path / "broken.safetensors")
    with pytest.raises(InputError, match=rf"broken\.safetensors: {name}: not finite"):
        from_file(tmp_path / "broken.safetensors")


def test_files_that_hold_no_weights_of_the_model_are_refused_in_a_line(tmp_path: Path) -> None:
    deeper = timm.create_model("swin_tiny_patch4_window7_224", in_chans=6).state_dict()
    for name, content, message in [
        ("deeper.pth", deeper, "does not fit swin_tiny"),
        ("empty.pth", {"epoch": 3}, "holds 0 sets of weights"),
        ("two.pth", {"generator": {"a": torch.zeros(1)}, "judge": {"a": torch.zeros(1)}}, "holds 2 sets"),
    ]:
        torch.save(content, tmp_path / name)
        with pytest.raises(InputError, match=rf"--pretrained .*{name}: {message}"):
            from_file(tmp_path / name)


# Models by name


@pytest.mark.parametrize("name", ["dla34", "vgg11", "hrnet_w18_small"])
def test_models_without_stochastic_depth_are_built_and_refuse_to_be_given_some(name: str) -> None:
    with torch.device("meta"):
        build_model(ModelConfig(name), 1, 64, 128)
        with pytest.raises(InputError, match=rf"--drop-path 0.1: {name} has no stochastic depth"):
            build_model(ModelConfig(name, drop_path=0.1), 1, 64, 128)


def test_stochastic_depth_is_what_was_asked_for() -> None:
    for rate in (0.0, 0.2):
        rates = [getattr(each, "drop_prob", 0.0) for each in built(ModelConfig("swin_nano", drop_path=rate)).modules()]
        assert max(rates) == pytest.approx(rate)


def test_a_variant_that_timm_does_not_know_is_refused_with_those_it_knows() -> None:
    with pytest.raises(InputError, match=r"swin_tiny_patch4_window7_224\.ms_in21k: .*ms_in22k"):
        built(ModelConfig("swin_tiny_patch4_window7_224.ms_in21k"))


@pytest.mark.parametrize(("name", "height", "width"), [("dla34", 8, 8), ("vit_tiny_patch16_224", 8, 224)])
def test_a_model_that_fails_on_the_canvas_says_so_before_any_data_is_read(
    name: str, height: int, width: int, tmp_path: Path
) -> None:
    canvas = dataclasses.replace(tiny_config(tmp_path, tmp_path).canvas, height=height, width=width)
    config = tiny_config(tmp_path / "no shards", tmp_path / "run", model=ModelConfig(name), canvas=canvas)
    with pytest.raises(InputError, match=rf"--model {name}, on a canvas of 2 x {height} x {width}: fails"):
        train(config)


def test_compiling_without_a_compiler_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    for device, variable in (("cpu", "CXX"), ("cuda", "CC")):
        with pytest.raises(InputError, match=rf"--compile: needs a compiler \({variable}"):
            check_compiler(torch.device(device))
    with pytest.raises(InputError, match="--compile"):
        train(tiny_config(tmp_path / "no shards", tmp_path / "run", compile=True))


# The hub


class Hub(ThreadingHTTPServer):
    """A mirror of the model hub on loopback, which holds the weights of one model or nothing."""

    daemon_threads = True

    def __init__(self, weights: bytes | None = None, status: int = 200) -> None:
        self.weights, self.status, self.asked = weights, status, list[str]()
        super().__init__(("127.0.0.1", 0), _Answers)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        body = self.server.weights if self.path.endswith("/resolve/main/model.safetensors") else b""
        self.send_response(self.server.status if body is not None else 404)
        body = body or b""
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 (the base class looks for it)

    def log_message(self, format: str, *arguments: object) -> None:
        """Log nothing."""


@contextmanager
def silent() -> Iterator[str]:
    """The URL of a server that accepts connections but never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def refusing() -> Iterator[str]:
    """A URL that refuses connections: its port is bound, so that nobody else takes it, but not listened on."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{closed.getsockname()[1]}"


def run_train(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    names = {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "no_proxy": "*"}
    return subprocess.run(
        [sys.executable, "train.py", "--tracker", "none", "--no-report", *words], cwd=ROOT, text=True,
        capture_output=True, timeout=300, env={**os.environ, **names, **environment},
    )  # fmt: skip


def test_without_the_hubs_weights_a_training_stops_before_it_reads_data_and_says_three_ways_out(tmp_path: Path) -> None:
    """Nothing listens at the endpoint, whose port is not 443, and the shards do not exist."""
    words = ["--shards", str(tmp_path / "none"), "--run-dir", str(tmp_path / "run"), "--model", HUB_MODEL]
    with refusing() as nowhere:
        done = run_train([*words, "--preset", "full", "--drop-path", "0"], HF_ENDPOINT=nowhere, HF_HOME=str(tmp_path))
    assert done.returncode == 1
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    for word in (nowhere, HUB_MODEL, "HF_HOME", "--pretrained FILE", "--pretrained none"):
        assert word in said
    assert not (tmp_path / "run").exists()


@pytest.fixture
def hub_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    """Make the hub's library ask an address, with an empty cache."""
    from huggingface_hub import constants

    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)

    def use(url: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    return use


def hub_weights(tmp_path: Path) -> bytes:
    torch.manual_seed(3)
    save_file(timm.create_model(HUB_MODEL).state_dict(), tmp_path / "model.safetensors")
    return (tmp_path / "model.safetensors").read_bytes()


def test_weights_come_from_a_mirror_of_the_hub_and_then_from_the_cache(hub_at, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The mirror's port is not 443; the second time the mirror is gone."""
    hub = Hub(hub_weights(tmp_path))
    given = load_file(tmp_path / "model.safetensors")
    hub_at(hub.url)
    with serving(hub):
        models = [built(ModelConfig(HUB_MODEL, "hub"), 1)]
    assert any(path.endswith("model.safetensors") for path in hub.asked)
    models.append(built(ModelConfig(HUB_MODEL, "hub"), 2))
    for model in models:
        assert torch.equal(model.state_dict()["layer3.0.conv2.weight"], given["layer3.0.conv2.weight"])


@pytest.mark.parametrize("kind", ["absent", "gateway", "empty", "own", "unpublished"])
def test_whatever_keeps_the_hubs_weights_away_is_one_error(hub_at, kind: str) -> None:  # type: ignore[no-untyped-def]
    model = {"own": "swin_nano", "unpublished": "coatnet_0_224"}.get(kind, HUB_MODEL)
    hub = Hub(b"" if kind == "empty" else None, 502 if kind == "gateway" else 200)
    with serving(hub):
        hub_at(hub.url)
        with (
            pytest.raises(NoPretrainedError, match="--pretrained none"),
            torch.device("meta" if kind == "unpublished" else "cpu"),
        ):
            build_model(ModelConfig(model, "hub"), 2, 224, 224)
    assert bool(hub.asked) == (kind not in ("own", "unpublished"))


def test_an_endpoint_is_reachable_where_it_answers_and_by_the_proxy_that_leads_to_it(
    monkeypatch: pytest.MonkeyPatch,
    hub_at,  # type: ignore[no-untyped-def]
) -> None:
    monkeypatch.setenv("no_proxy", "")
    good, gateway = Hub(b"x"), Hub(b"x", 502)
    hub_at(good.url)
    with serving(good), serving(gateway), refusing() as nowhere:
        assert is_reachable(good.url) and not is_reachable(nowhere) and not is_reachable("no address")
        for proxy, expected in ((good.url, True), (gateway.url, False)):
            monkeypatch.setenv("http_proxy", proxy)
            assert is_reachable("http://hub.invalid") == expected
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert is_reachable(good.url)
    monkeypatch.setattr("training.pretrained._HUB_SECONDS", 0.3)  # for servers that never answer
    with silent() as hanging:
        assert not is_reachable(hanging)
        monkeypatch.setenv("no_proxy", "")
        monkeypatch.setenv("http_proxy", hanging)
        assert not is_reachable("http://hub.invalid")


@pytest.mark.parametrize("fold", [0, "all"])
def test_a_run_goes_on_from_its_checkpoint_where_there_is_no_hub(hub_at, tmp_path: Path, fold: object) -> None:  # type: ignore[no-untyped-def]
    write_tiny_data(tmp_path / "data", 20, 4)
    shards = Path(pack(PackConfig(tmp_path / "data", tmp_path / "shards", folds=2, workers=1)).root)
    config = tiny_config(shards, tmp_path / "run", fold=fold, epochs=1, model=ModelConfig(HUB_MODEL, "hub"))
    hub = Hub(hub_weights(tmp_path))

    def go(config: TrainConfig) -> None:
        if fold == "all":
            train_folds(config, train, write_roc)
        else:
            train(config)

    with serving(hub):
        hub_at(hub.url)
        go(config)
    record = json.loads(next((tmp_path / "run").rglob("config.json")).read_text())
    assert record["model"]["pretrained"] == "hub"
    (tmp_path / "hub").rename(tmp_path / "gone")
    with refusing() as nowhere:
        hub_at(nowhere)
        with pytest.raises(NoPretrainedError):
            go(dataclasses.replace(config, run_dir=tmp_path / "other"))
        go(dataclasses.replace(config, resume=True))
        for checkpoints in (tmp_path / "run").rglob("checkpoints"):
            shutil.rmtree(checkpoints)  # a copy may lack them, and the run is still finished
        go(dataclasses.replace(config, resume=True))
