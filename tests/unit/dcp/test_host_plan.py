"""Plans of a host's read, compared with sets of bytes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence

from hypothesis import given
from hypothesis import strategies as st

from mpreader.config import KiB, MiB
from mpreader.dcp.host_plan import Answer, ItemNeed, Need, plan_host, taken_runs
from mpreader.dcp.planned import Check
from mpreader.formats.selection import GAPS, Run, Selection, joined_runs, placed_runs
from mpreader.pool.hosts.messages import SharedRead
from mpreader.ranges import Part

UNIT = 16 * KiB
FRONT = 700
GAP = GAPS[-1].between_records

Places = Mapping[str, Sequence[tuple[int, int]]]


def random_places(chance: random.Random) -> Places:
    """Returns offset and size of the items of some files."""
    places: dict[str, list[tuple[int, int]]] = {}
    for number in range(chance.randint(1, 3)):
        end, items = 0, places.setdefault(f"s3://bucket/{number}", [])
        for _ in range(chance.randint(0, 5)):
            start = end + chance.choice([0, 0, 1, 5 * UNIT, 3 * MiB])
            end = start + chance.choice([1, FRONT + 5, 3 * UNIT, 20 * UNIT, 200 * UNIT])
            items.append((start, end - start))
    return places


def random_selections(chance: random.Random, nbytes: int) -> tuple[Selection, ...] | None:
    if nbytes < 10 * UNIT or not chance.randint(0, 3):
        return None
    selections = []
    for _ in range(chance.randint(1, 3)):
        borders = sorted(chance.sample(range(1, nbytes // UNIT), 2 * chance.randint(1, 3)))
        runs = tuple(Run(start * UNIT, end * UNIT) for start, end in zip(borders[::2], borders[1::2], strict=True))
        selections.append(Selection(FRONT, runs, 0))
    return tuple(selections)


def random_need(chance: random.Random, places: Places) -> Need:
    files = {}
    for uri, items in places.items():
        chosen = [
            ItemNeed(offset, nbytes, random_selections(chance, nbytes))
            for offset, nbytes in items
            if chance.randint(0, 3)
        ]
        if chosen or chance.randint(0, 1):
            files[uri] = chosen
    return Need(files, verifies=bool(chance.randint(0, 4)))


def wanted(item: ItemNeed, check: Check | None) -> list[tuple[int, int]]:
    """Returns what a rank can't do without of an item."""
    if item.selections is None or (check is not None and check.is_own):
        return [(item.offset, item.offset + item.nbytes)]
    return [(run.start, run.end) for one in item.selections for run in placed_runs(one, item.offset)]


def lacking(ranges: Sequence[tuple[int, int]], parts: Sequence[Part]) -> list[tuple[int, int]]:
    """Returns what of the ranges is not in the parts."""
    left = [*ranges]
    for part in parts:
        left = [
            piece
            for start, end in left
            for piece in ((start, min(end, part.start)), (max(start, part.end), end))
            if piece[0] < piece[1]
        ]
    return left


def answers_of(read: SharedRead) -> list[Answer]:
    return [subscription.answer for subscription in read.subscriptions]


@given(st.integers(0, 1 << 32), st.sampled_from([64 * KiB, 1 * MiB, 8 * MiB]))
def test_each_rank_gets_what_it_needs_and_each_byte_is_in_one_part(seed: int, part_bytes: int) -> None:
    chance = random.Random(seed)
    places = random_places(chance)
    needs = [random_need(chance, places) for _ in range(chance.randint(1, 5))]
    uris, read = plan_host(needs, max_gap_bytes=GAP, part_bytes=part_bytes)

    parts = [(uris[one.source], one.parts[0]) for one in read.slot_reads]
    assert parts == sorted(parts, key=lambda part: (part[0], part[1].start)), "every rank takes in this order"
    for (uri, part), (next_uri, next_part) in itertools.pairwise(parts):
        assert uri < next_uri or part.end <= next_part.start
    for one in read.slot_reads:
        assert (one.nbytes, len(one.parts)) == (one.parts[0].size, 1)
        assert one.nbytes <= part_bytes

    for need, subscription in zip(needs, read.subscriptions, strict=True):
        answer: Answer = subscription.answer
        assert [uris[number] for number in subscription.sources] == [*need.files]
        assert [*subscription.indices] == sorted(set(subscription.indices))
        own = [(uri, part) for uri in need.files for part in answer.parts[uri]]
        assert own == [parts[index] for index in subscription.indices]
        for uri, items in need.files.items():
            told = [*zip(items, answer.checks[uri], strict=True)]
            assert not lacking([one for item, check in told for one in wanted(item, check)], answer.parts[uri])
            taken = [Part(*run) for item, check in told for run in taken_runs(item, check, answer)]
            for part in answer.parts[uri]:
                assert lacking([(part.start, part.end)], taken) != [(part.start, part.end)], "it holds something"


@given(st.integers(0, 1 << 32))
def test_item_is_received_whole_for_all_or_for_none(seed: int) -> None:
    chance = random.Random(seed)
    places = random_places(chance)
    needs = [random_need(chance, places) for _ in range(chance.randint(1, 5))]
    _, read = plan_host(needs, max_gap_bytes=GAP, part_bytes=1 * MiB)
    checks: dict[tuple[str, int], list[tuple[int, ItemNeed, Check | None, bool]]] = {}
    for place, (need, answer) in enumerate(zip(needs, answers_of(read), strict=True)):
        for uri, items in need.files.items():
            for item, check in zip(items, answer.checks[uri], strict=True):
                checks.setdefault((uri, item.offset), []).append((place, item, check, need.verifies))
    for told in checks.values():
        whole = [(place, item, check, verifies) for place, item, check, verifies in told if check is not None]
        assert len(whole) in {0, len(told)}
        runs = [Run(*one) for _, item, _, _ in told for one in wanted(item, None)]
        first = joined_runs(runs, 0)[0]
        if any(item.selections is None for _, item, _, _ in told) or first.size == told[0][1].nbytes:
            assert whole
        if whole:
            check_verified_once(whole)
    verdicts = {check.verdict for told in checks.values() for _, _, check, _ in told if check and check.verdict}
    assert {verdict.number for verdict in verdicts} == {*range(read.notes)}


def check_verified_once(told: Sequence[tuple[int, ItemNeed, Check, bool]]) -> None:
    """Check that each rank verifies an item that it wants all of, and that one rank does for those that do not."""
    verifying = [(place, item, check) for place, item, check, verifies in told if verifies]
    is_whole = [item.selections is None for _, item, _ in verifying]
    verdicts = {check.verdict for _, _, check in verifying if check.verdict is not None}
    if all(is_whole):
        assert not verdicts
        assert all(check.is_own for _, _, check in verifying)
        return
    [verdict] = verdicts
    assert all(check.is_own or check.verdict == verdict for _, _, check in verifying)
    own = {place for place, _, check in verifying if check.is_own}
    assert verdict.place in own
    assert own == ({place for place, item, _ in verifying if item.selections is None} or {verdict.place})


def rows_of(number: int, count: int, nbytes: int) -> Need:
    """Returns the need of one of ``count`` ranks, which divide the rows of two items between them."""
    size = (nbytes - FRONT) // count
    runs = (Run(FRONT + number * size, FRONT + (number + 1) * size),)
    items = [ItemNeed(start, nbytes, (Selection(FRONT, runs, 0),)) for start in (0, nbytes)]
    return Need({"s3://bucket/a": items}, verifies=True)


def test_ranks_that_need_all_rows_receive_whole_items_and_divide_their_checks() -> None:
    nbytes = 8 * MiB + FRONT
    uris, read = plan_host([rows_of(number, 4, nbytes) for number in range(4)], max_gap_bytes=GAP, part_bytes=2 * MiB)
    assert uris == ["s3://bucket/a"]
    assert sum(one.nbytes for one in read.slot_reads) == 2 * nbytes
    checks = [answer.checks["s3://bucket/a"] for answer in answers_of(read)]
    for of_item in zip(*checks, strict=True):
        assert [check.is_own for check in of_item if check is not None].count(True) == 1
    verifying = [any(check is not None and check.is_own for check in of_rank) for of_rank in checks]
    assert sum(verifying) == 2, "two items, and two ranks to verify them"


def test_rank_takes_only_what_it_needs_of_a_large_item_that_others_verify() -> None:
    nbytes = 32 * MiB + FRONT
    _, read = plan_host([rows_of(number, 4, nbytes) for number in range(4)], max_gap_bytes=GAP, part_bytes=1 * MiB)
    assert sum(one.nbytes for one in read.slot_reads) == 2 * nbytes
    for answer in answers_of(read):
        verified = sum(check is not None and check.is_own for check in answer.checks["s3://bucket/a"])
        taken = sum(part.size for part in answer.parts["s3://bucket/a"])
        others = 2 - verified
        assert others * 8 * MiB <= taken - verified * nbytes <= others * (8 + 3) * MiB


def test_ranks_that_need_some_of_the_rows_receive_no_others() -> None:
    nbytes = 16 * MiB + FRONT
    needs = [rows_of(number, 8, nbytes) for number in (1, 1, 4, 4)]
    _, read = plan_host(needs, max_gap_bytes=GAP, part_bytes=2 * MiB)
    assert sum(one.nbytes for one in read.slot_reads) <= 1.01 * 4 * 2 * MiB
    assert all(check is None for answer in answers_of(read) for check in answer.checks["s3://bucket/a"])


def test_ranks_without_any_needs_take_nothing() -> None:
    empty = Need({}, verifies=True)
    assert plan_host([empty, empty], max_gap_bytes=GAP, part_bytes=MiB)[1].slot_reads == ()
    _, read = plan_host([empty, rows_of(0, 1, 8 * MiB)], max_gap_bytes=GAP, part_bytes=MiB)
    assert read.subscriptions[0].indices == read.subscriptions[0].sources == ()
    assert [*read.subscriptions[1].indices] == [*range(len(read.slot_reads))]
