"""The loader for programs with their own loop: one call, whose every option does what its documentation says."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline import open_loader
from pipeline.augment import DrawConfig
from pipeline.canvas import CanvasConfig
from pipeline.loader import Loader
from shard_tools.errors import InputError
from shard_tools.manifest import Manifest
from tests.tiny import CANVAS, SHAPE, pack_tiny


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return pack_tiny(tmp_path_factory.mktemp("opening"), train=53)


def rows_of(loader: Loader) -> list[int]:
    """Rows of one epoch, in their order, without the repeats at its end."""
    return [row for batch in loader for row in batch.row[batch.counts].tolist()]


def test_each_epoch_holds_every_sample_once_in_an_order_of_its_own(manifest: Manifest) -> None:
    with open_loader(manifest, fold=0, batch_size=8, canvas=CANVAS, augment=DrawConfig()) as loader:
        epochs = [rows_of(loader) for _ in range(3)]
    expected = manifest.rows("train", 0).tolist()
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert epochs[0] != expected and epochs[0] != epochs[1] != epochs[2]


def test_a_held_out_fold_and_the_test_split_come_in_the_order_of_the_shards(manifest: Manifest) -> None:
    for split, fold, expected in (("train", 1, manifest.rows("train", 1, True)), ("test", None, manifest.rows("test"))):
        with open_loader(manifest, split, fold, held_out=fold is not None, canvas=CANVAS) as loader:
            assert rows_of(loader) == expected.tolist()


@pytest.mark.parametrize("as_what", [str, Path, "manifest"])
def test_shards_may_be_a_folder_or_a_manifest(manifest: Manifest, as_what: type | str) -> None:
    shards = manifest if isinstance(as_what, str) else as_what(manifest.root)
    with open_loader(shards, split="test", batch_size=4) as loader:
        assert len(rows_of(loader)) == len(manifest.rows("test"))


def test_batches_have_the_documented_shapes(manifest: Manifest) -> None:
    channels, height, width = CANVAS.channels, CANVAS.height, CANVAS.width
    with open_loader(manifest, batch_size=5) as loader:
        batch = next(iter(loader))
        assert batch.image.shape == (5, *SHAPE) and batch.image.dtype == torch.float16
    with open_loader(manifest, batch_size=5, canvas=CANVAS, augment=DrawConfig(cutmix=1.0)) as loader:
        batch = next(iter(loader))
        assert batch.image.shape == (5, channels, height, width) and batch.image.dtype == torch.float32
        assert batch.target.min() >= 0 and batch.target.max() <= 1
    with open_loader(manifest, "test", batch_size=5, canvas=CANVAS, views=CANVAS.views) as loader:
        batch = next(iter(loader))
        assert batch.image.shape == (5, len(CANVAS.views), channels, height, width)
        assert batch.target.tolist() == [-1] * 5


def test_weighted_sampling_draws_both_classes_equally_often(manifest: Manifest) -> None:
    rare = manifest.target.copy()
    positive = np.flatnonzero(rare == 1)
    rare[positive[3:]] = 0
    skewed = Manifest(**{**vars(manifest), "target": rare})
    with open_loader(skewed, batch_size=53, sampling="weighted") as loader:
        drawn = torch.cat([batch.target for _ in range(20) for batch in loader])
    assert 0.4 < drawn.mean() < 0.6


def test_a_state_continues_in_the_middle_of_an_epoch_bit_for_bit(manifest: Manifest) -> None:
    def opened() -> Loader:
        return open_loader(manifest, batch_size=8, canvas=CANVAS, augment=DrawConfig(), seed=5)

    with opened() as first, opened() as second:
        batches = iter(first)
        next(batches), next(batches)
        state = first.state_dict()
        rest = [batch.image.clone() for batch in batches]
        second.load_state_dict(state)
        again = [batch.image.clone() for batch in second]
    assert len(rest) == len(again) > 2
    assert all(torch.equal(a, b) for a, b in zip(rest, again, strict=True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "validation"}, "expected one of train, test"),
        ({"held_out": True}, "needs a fold"),
        ({"augment": DrawConfig()}, "need a canvas"),
        ({"augment": DrawConfig(), "canvas": CANVAS, "views": CANVAS.views}, "choose one"),
        ({"views": CANVAS.views}, "need a canvas"),
        ({"views": ("flip_time",), "canvas": CanvasConfig("stack6")}, "expected some of .'identity', 'flip_frequency'"),
        ({"views": (), "canvas": CANVAS}, "expected some of"),
        ({"fold": 9, "held_out": True}, r"fold 9.*its folds are \[0, 1, 2, 3, 4\]"),
        ({"fold": 9}, r"fold 9.*its folds are \[0, 1, 2, 3, 4\]"),
        ({"fold": 0, "split": "test"}, "only the train split has folds"),
        ({"batch_size": 0}, "expected at least 1"),
        ({"sampling": "weighted", "split": "test"}, "needs a target of 0 or 1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    manifest: Manifest, options: dict[str, object], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        open_loader(manifest, **options)  # type: ignore[arg-type]


def test_ranks_share_an_epoch(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes of torch.distributed together read each row once."""
    script = (
        "import sys, torch; from pipeline import open_loader\n"
        "torch.distributed.init_process_group('gloo', init_method=sys.argv[2], rank=int(sys.argv[3]), world_size=2)\n"
        "with open_loader(sys.argv[1], batch_size=4, device='cpu') as loader:\n"
        "    print(*[row for batch in loader for row in batch.row[batch.counts].tolist()])\n"
    )
    meeting = (Path(str(manifest.root)).parent / "meeting").as_uri()
    words = [sys.executable, "-c", script, str(manifest.root), meeting]
    started = [
        subprocess.Popen([*words, str(rank)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."})
        for rank in range(2)
    ]
    # torch 2.10 prints a line of its own before.
    shares = [set(map(int, process.communicate(timeout=120)[0].splitlines()[-1].split())) for process in started]
    assert not shares[0] & shares[1]
    assert shares[0] | shares[1] == set(manifest.rows("train").tolist())


def test_a_model_of_ones_own_learns_from_it(manifest: Manifest) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(CANVAS.channels * CANVAS.height * CANVAS.width, 1))
    optimiser = torch.optim.SGD(model.parameters(), 0.01)
    losses = []
    with open_loader(manifest, batch_size=16, canvas=CANVAS) as loader:
        for _ in range(6):
            for batch in loader:
                loss = nn.functional.binary_cross_entropy_with_logits(model(batch.image[:, 0])[:, 0], batch.target)
                optimiser.zero_grad()
                torch.autograd.backward(loss)
                optimiser.step()
                losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_planning_needs_no_torch() -> None:
    script = "import sys, pipeline, pipeline.plan; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]
