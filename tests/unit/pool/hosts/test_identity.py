"""Who shares a host, and with whom."""

from __future__ import annotations

import os
import pickle

from hypothesis import given
from hypothesis import strategies as st

from mpreader.pool.hosts.identity import TOKEN_BYTES, HostOffer, group, host_identity


def offer(identity: str, rank: int) -> HostOffer:
    return HostOffer(identity, b"\0%d" % rank, bytes([rank]) * TOKEN_BYTES)


@given(st.lists(st.sampled_from([None, "one", "two", "three"]), max_size=12))
def test_first_rank_of_each_host_leads_all_that_offer_there(identities: list[str | None]) -> None:
    offers = [None if identity is None else offer(identity, rank) for rank, identity in enumerate(identities)]
    shares = group(offers)
    assert len(shares) == len(offers)
    for rank, (own, share) in enumerate(zip(offers, shares, strict=True)):
        members = [other for other, each in enumerate(offers) if each and own and each.identity == own.identity]
        if len(members) < 2:
            assert share is None
        else:
            assert share == (offers[members[0]], members.index(rank), len(members))


def test_offer_goes_through_a_plan_and_shows_no_token() -> None:
    made = offer("host", 65)
    assert pickle.loads(pickle.dumps(made)) == made
    assert "A" not in repr(made)
    [_, share] = group([made, offer("host", 66)])
    assert "AAA" not in repr(share)
    assert "BBB" not in repr(share)


def test_identity_is_of_this_kernel_network_and_user() -> None:
    assert host_identity() == host_identity()
    assert host_identity().endswith(f":{os.getuid()}")
