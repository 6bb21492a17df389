"""The promises of scores and logits: tables, submissions and captions of pictures keep their order."""

import csv
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports.candidates import Scored
from shard_tools.errors import InputError
from training.metrics import apart, mean_score, roc_auc, sigmoid
from training.out_of_fold import read_scores, write_scores

LOGITS = st.lists(st.floats(-1e5, 1e5) | st.floats(-40, 40) | st.floats(30, 40), min_size=1, max_size=60)


@settings(deadline=None)
@given(LOGITS)
def test_scores_of_a_submission_have_the_order_of_their_logits(values: list[float]) -> None:
    """Also after they are written and read again."""
    logit = np.array(values)
    score = mean_score([logit], "logits")
    assert (score >= 0).all() and (score <= 1).all()
    assert (np.sign(score[:, None] - score) == np.sign(logit[:, None] - logit)).all()
    text = "id,target\n" + "".join(f"x,{value!r}\n" for value in score.tolist())
    read = pd.read_csv(io.StringIO(text))["target"].to_numpy()
    crowded = logit > -700  # below it readers differ, as float64 ends there
    assert (np.sign(read[crowded][:, None] - read[crowded]) == np.sign(score[crowded][:, None] - score[crowded])).all()


def test_scores_that_are_moved_apart_stay_where_they_are_but_for_the_last_digits() -> None:
    logit = np.linspace(30, 60, 40_000)
    assert len(np.unique(sigmoid(logit))) < 30_000 and len(np.unique(apart(logit))) == 40_000
    assert np.abs(apart(logit) - sigmoid(logit)).max() < 4e-11
    usual = np.random.default_rng(0).normal(0, 5, 1000)
    assert (apart(usual) == sigmoid(usual)).all()


def test_the_sigmoid_keeps_faint_logits_apart() -> None:
    score = sigmoid(np.array([-700.0, -300, -38, -37.5, 0]))
    assert (np.diff(score) > 0).all() and score[-1] == 0.5 and score[2] == pytest.approx(np.exp(-38.0))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 1), st.floats(-1e4, 1e4)), min_size=1, max_size=20))
def test_a_table_of_scores_comes_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, lines: list) -> None:  # type: ignore[type-arg]
    path = tmp_path_factory.mktemp("oof") / "oof.csv"
    target, logit = np.array([t for t, _ in lines], np.int8), np.array([value for _, value in lines])
    keys = [f"{number}e5" for number in range(len(lines))]
    write_scores(path, keys, target, logit)
    assert path.read_text().startswith("id,target,score,logit\n")
    read = read_scores(path)
    assert read.keys == keys and (read.target == target).all()
    assert (read.logit == logit).all() and (read.score == sigmoid(logit)).all()
    write_scores(path, keys, target, logit, np.zeros(len(lines), np.int8))
    with path.open(newline="") as file:
        assert next(csv.DictReader(file)).keys() == {"id", "fold", "target", "score", "logit"}


def test_a_table_without_logits_as_older_runs_wrote_it_is_read_in_its_order(tmp_path: Path) -> None:
    older = 0.5 * (1 + np.tanh(0.5 * np.array([-800.0, -37, -36, -1, 0, 20, 36, 800])))
    text = "".join(f"k{number},{number % 2},{score!r}\n" for number, score in enumerate(older.tolist()))
    (tmp_path / "oof.csv").write_text("id,target,score\n" + text)
    read = read_scores(tmp_path / "oof.csv")
    assert np.isfinite(read.logit).all() and (read.score == older).all()
    assert (np.sign(np.diff(read.logit)) == np.sign(np.diff(older))).all()
    assert roc_auc(read.target, read.logit) == roc_auc(read.target, older)


@pytest.mark.parametrize("line", ["a,1", "a,1,x,0.1", "a,1,nan,0.1", "a,1,0.5,inf", "a,?,0.5,0.1"])
def test_a_table_that_is_none_is_refused_by_name(tmp_path: Path, line: str) -> None:
    (tmp_path / "oof.csv").write_text(f"id,target,score,logit\n{line}\n")
    with pytest.raises(InputError, match=r"oof\.csv: expected columns id, target, score and logit"):
        read_scores(tmp_path / "oof.csv")


def test_what_is_said_of_candidates_tells_those_apart_whose_scores_are_one() -> None:
    logit = np.array([2.0, 120.0, 41.25, 41.251])
    scored = Scored(np.arange(4), np.full(4, -1, np.int8), sigmoid(logit), logit)
    assert scored.falling.tolist() == [1, 3, 2, 0]
    said = [scored.say(place) for place in scored.falling]
    assert said[0] == ["rank 1 of 4", "logit 120.00, score 1.0000"]
    assert said[1][0] == "rank 2 of 4" and said[2] == ["rank 3 of 4", "logit 41.25, score 1.0000"]
    ranks = Scored(np.arange(2), np.full(2, -1, np.int8), np.array([0.5, 1.0]))
    assert ranks.say(1) == ["rank 1 of 2", "score 1.0000"]
