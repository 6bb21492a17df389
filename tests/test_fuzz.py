"""No content of a file is silently read wrong, crashes or hangs the process, or exhausts memory."""

from tests.fuzz import fuzz


def test_every_mutant_is_read_right_or_refused_by_an_error_that_names_a_file() -> None:
    """A few hundred mutants; `make fuzz` makes more."""
    counts, failures = fuzz(mutants=300, seed=1_000_000)
    assert not failures
    assert counts.total() == 300
    assert len({kind for kind, _ in counts}) == 15
    assert {outcome for _, outcome in counts} == {"refused", "right", "found", "consistent"}
    # The reader cannot notice a flipped bit in a snippet, but `verify` found every one.
    assert counts["snippet data", "found"] == sum(n for (kind, _), n in counts.items() if kind == "snippet data") > 0
