"""The page's promises: self-contained, escaped, whole, and readable in a real browser."""

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from infer import InferConfig, infer
from reports.page import (
    PAGE,
    Block,
    Section,
    read_section,
    to_picture,
    to_rows,
    without_secrets,
    write_page,
    write_section,
)
from reports.plots import to_png
from reports.waterfalls import draw_waterfall
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest
from tests.browser import find_chromium, look
from tests.tiny import pack_tiny, tiny_config
from train import train
from training.metrics import calibration

EVIL = "<script>window.injected=1</script><img src=x onerror='window.injected=1'>\"&amp;"
SECRET = "s3://KEY:SECRET@bucket/path and https://host/file?X-Amz-Signature=SECRET&token=SECRET"


class _Reader(HTMLParser):
    """Tags with their attributes, and the text outside of styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def pictures_of(html: str) -> list[str]:
    return [attributes["src"] or "" for tag, attributes in _Reader(html).tags if tag == "img"]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack_tiny(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def run_dir(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a training and a prediction, in a folder with an unfriendly name."""
    folder = tmp_path_factory.mktemp("runs") / "run <b onclick=alert(1)> & 'co'"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        train(tiny_config(manifest.root, folder, epochs=1, report=True))
        trained = (folder / PAGE).read_text()
        assert "Training" in trained and "Prediction" not in trained
        infer(InferConfig(str(manifest.root), (folder / "best.safetensors",), folder / "submission.csv",
                          precision="float32"))  # fmt: skip
    return folder


def evil_page(path: Path) -> Path:
    figure = draw_waterfall(np.random.default_rng(0).standard_normal((6, 14, 56)).astype(np.float16), (3.0, 70.0))
    picture = to_picture(to_png(figure), EVIL, EVIL, [EVIL])
    rows = to_rows({EVIL: {EVIL: [EVIL]}, "url": SECRET, "long": "x" * 4000})
    block = Block(EVIL, EVIL, [(EVIL, EVIL, EVIL)], [picture], True, rows, EVIL + SECRET)
    folded = Block(EVIL, rows=rows, is_folded=True)
    write_page(path, EVIL, [Section(EVIL, EVIL, [block, folded]), Section(SECRET, SECRET, [block])])
    return path


def test_the_page_holds_everything_and_refers_to_nothing(run_dir: Path) -> None:
    html = (run_dir / PAGE).read_text()
    page = _Reader(html)
    sources = pictures_of(html)
    # Four curves, four charts of the scores, three galleries of at most ten cadences, a histogram and the candidates.
    assert len(sources) > 20
    for source in sources:
        prefix, data = source.split(",", 1)
        assert prefix == "data:image/png;base64"
        assert matplotlib.image.imread(io.BytesIO(base64.b64decode(data, validate=True))).ndim >= 2
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "form", "base")
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith("#") and "srcset" not in attributes  # type: ignore[union-attr]
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert "default-src 'none'" in html
    for word in ("ROC AUC", "average precision", "recall at", "calibration", "Hz/s", "from channel", "truth: needle",
                 "What each part of the network learns",
                 "learning_rate", "torch", "cores", "submission.csv", "Prediction: test", "infer.py"):  # fmt: skip
        assert word in page.text, word
    assert (run_dir / PAGE).stat().st_size < 3e6


def test_whatever_comes_from_data_is_escaped_and_secrets_stay_out(tmp_path: Path) -> None:
    html = evil_page(tmp_path / PAGE).read_text()
    page = _Reader(html)
    assert "SECRET" not in html and "s3://...@bucket/path" in page.text
    assert not [tag for tag, attributes in page.tags if tag == "script" or "onerror" in attributes]
    assert page.text.count(EVIL) > 10


def test_secrets_are_cut_out_of_urls_and_nothing_else() -> None:
    assert without_secrets("https://u:p@h/a?b=c#d e") == "https://...@h/a?... e"
    assert without_secrets("gs://bucket/path, a@b?c") == "gs://bucket/path, a@b?c"


def test_a_damaged_section_is_refused_by_name(tmp_path: Path) -> None:
    section = Section("a", "b", [Block("c", pictures=[to_picture(b"png", "alt")], rows=[("x", "y")])])
    write_section(tmp_path, "1-training", section)
    path = tmp_path / "report" / "1-training.json"
    read = read_section(path)
    assert read.title == "a" and read.blocks[0].pictures[0].png == section.blocks[0].pictures[0].png
    good = json.loads(path.read_text())
    for bad in ("", "[]", "{}", path.read_text()[:-9], json.dumps({**good, "format": 0}),
                json.dumps({**good, "blocks": [{"surprise": 1}]})):  # fmt: skip
        path.write_text(bad)
        with pytest.raises(InputError, match=r"1-training\.json.*delete it"):
            read_section(path)


def test_weights_of_no_run_get_a_page_beside_the_submission(run_dir: Path, manifest: Manifest, tmp_path: Path) -> None:
    weights = tmp_path / "weights" / "lone.safetensors"
    weights.parent.mkdir()
    weights.write_bytes((run_dir / "best.safetensors").read_bytes())
    before = (run_dir / PAGE).read_bytes()
    out = tmp_path / "out.csv"
    infer(InferConfig(str(manifest.root), (weights, run_dir / "best.safetensors"), out, precision="float32"))
    assert "Prediction: test" in (tmp_path / "out.report.html").read_text()
    assert (run_dir / PAGE).read_bytes() == before and not (weights.parent / PAGE).exists()


def test_a_needle_is_drawn_bright_beside_two_far_stronger_lines_of_interference() -> None:
    noise = np.random.default_rng(0).standard_normal((6, 273, 256)).astype(np.float16)
    noise[::2, :, 40] += np.float16(3)
    noise[:, :, [100, 180]] += np.float16(60)
    (image,) = draw_waterfall(noise, None).axes[0].images
    darkest, brightest = image.get_clim()
    assert darkest < 0 and 3 > brightest > 0.5


def test_calibration_is_what_counting_gives() -> None:
    target = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    score = np.array([0.1, 0.2, 0.3, 0.8, 0.25, 0.7, 0.9, 1.0])
    means, shares, counts = calibration(target, score, bins=2)
    assert counts.tolist() == [4, 4] and shares.tolist() == [0.25, 0.75]
    assert means == pytest.approx([0.2125, 0.85])


@pytest.fixture
def chromium() -> str:
    found = find_chromium()
    if found is None:
        pytest.skip("no chromium on the path (Debian: apt-get install chromium); CHROMIUM names another")
    return found


@pytest.mark.parametrize(("width", "is_evil"), [(360, False), (360, True), (1200, False)])
def test_a_browser_shows_the_page_without_complaint(
    chromium: str, run_dir: Path, tmp_path: Path, width: int, is_evil: bool
) -> None:
    page = evil_page(tmp_path / PAGE) if is_evil else run_dir / PAGE
    seen = look(chromium, page, width)
    assert seen.complaints == [] and seen.requests == [] and seen.broken == []
    assert seen.pictures == len(pictures_of(page.read_text())) > 0
    assert seen.wide <= 0
    assert seen.scripts == 0 and not seen.ran
    assert (EVIL if is_evil else "validation ROC AUC") in seen.text


def test_the_browser_would_see_what_is_wrong(chromium: str, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<meta name=viewport content='width=device-width'><img alt=a src=gone.png><div style='width:900px'>wide</div>"
        "<script>window.injected = 1; console.error('oh')</script>"
    )
    seen = look(chromium, page, 360)
    assert seen.broken == ["a"] and seen.wide > 0 and seen.ran and seen.scripts == 1
    assert any("oh" in text for text in seen.complaints)
    assert [url.rpartition("/")[2] for url in seen.requests] == ["gone.png"]
