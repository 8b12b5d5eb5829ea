"""The global promise: whatever happens, exact bytes or one typed error, in time, and nothing left behind."""

from __future__ import annotations

import sys

import pytest

from scripts.faults import rank_storm, storm

# A seed with many kills and slow answers. scripts/soak runs thousands of schedules.
SEED = 18
SCHEDULES = 32
RANKS_SEED = 12
RANKS_SCHEDULES = 14
MOST_RANKS = 4


@pytest.mark.row("random plans, faults and kills (storm)", within_s=40)
def test_storm_ends_in_exact_bytes_or_one_typed_error(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = storm.run_storm(SEED, SCHEDULES)
    with capsys.disabled():
        sys.stdout.write(f"\nstorm, seed {SEED}: {storm.summary(outcomes)}\n")
    assert len(outcomes) == SCHEDULES
    # Or it would prove nothing: what passes must mostly be survived, and there must have been something to survive.
    passing = [outcome for outcome in outcomes if outcome.is_transient]
    assert sum(outcome.result == "exact" for outcome in passing) >= 0.9 * len(passing)
    assert sum(outcome.faults for outcome in outcomes if outcome.is_slow) >= SCHEDULES // 8
    assert sum(outcome.cuts for outcome in outcomes) >= 1
    assert sum(outcome.faults for outcome in outcomes) >= SCHEDULES // 2
    assert sum(outcome.kills for outcome in outcomes) >= SCHEDULES // 10
    assert {outcome.plan for outcome in outcomes} == {"fetch", "stream", "fetch_object", "fetch_many", "load"}


@pytest.mark.row("random plans, faults and kills (storm)", within_s=40)
def test_storm_of_ranks_ends_in_exact_bytes_or_one_typed_error(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = rank_storm.run_rank_storm(RANKS_SEED, RANKS_SCHEDULES, MOST_RANKS)
    with capsys.disabled():
        sys.stdout.write(f"\nstorm of ranks, seed {RANKS_SEED}: {rank_storm.summary(outcomes)}\n")
    assert len(outcomes) == RANKS_SCHEDULES
    # Or it would prove nothing.
    assert {outcome.kind for outcome in outcomes} == {"rows", "columns", "whole", "subsets", "mixed"}
    assert sum(outcome.shared_bytes > 0 for outcome in outcomes) >= RANKS_SCHEDULES // 2
    assert {"kill", "stop"} <= {mishap for outcome in outcomes for mishap in outcome.mishaps}
    assert sum(outcome.faults for outcome in outcomes) >= RANKS_SCHEDULES // 2
    results = [result for outcome in outcomes for result in outcome.results]
    assert results.count("exact") >= len(results) // 2
