from __future__ import annotations

import pytest

from mpreader.dcp import (
    BinaryPrefixStrategy,
    DefaultPrefixStrategy,
    HexPrefixStrategy,
    RoundRobinPrefixStrategy,
    S3PrefixStrategyBase,
)
from mpreader.errors import ConfigError


def s3torchconnector(name: str, *args: object, **kwargs: object) -> S3PrefixStrategyBase:
    from s3torchconnector.dcp import s3_prefix_strategy

    strategy: S3PrefixStrategyBase = getattr(s3_prefix_strategy, name)(*args, **kwargs)
    return strategy


@pytest.mark.parametrize("prefix_count", [None, 1, 2, 7, 64])
@pytest.mark.parametrize("epoch_num", [None, 0, 3])
@pytest.mark.parametrize("min_prefix_length", [1, 3, 10])
@pytest.mark.parametrize("strategy", [BinaryPrefixStrategy, HexPrefixStrategy])
def test_numeric_prefixes_are_those_of_s3torchconnector(
    strategy: type, prefix_count: int | None, epoch_num: int | None, min_prefix_length: int
) -> None:
    theirs = s3torchconnector(strategy.__name__, epoch_num, min_prefix_length, prefix_count)
    ours = strategy(epoch_num, min_prefix_length, prefix_count)
    assert [ours(rank) for rank in range(130)] == [theirs(rank) for rank in range(130)]


@pytest.mark.parametrize("epoch_num", [None, 0, 3])
def test_round_robin_prefixes_are_those_of_s3torchconnector(epoch_num: int | None) -> None:
    theirs = s3torchconnector("RoundRobinPrefixStrategy", ["a", "b/c"], epoch_num)
    ours = RoundRobinPrefixStrategy(["a", "b/c"], epoch_num)
    assert [ours(rank) for rank in range(5)] == [theirs(rank) for rank in range(5)]


def test_default_prefix_is_that_of_dcp() -> None:
    assert DefaultPrefixStrategy()(12) == "__12_"


@pytest.mark.parametrize(
    ("strategy", "arguments"),
    [
        (BinaryPrefixStrategy, {"min_prefix_length": 0}),
        (BinaryPrefixStrategy, {"epoch_num": "1"}),
        (HexPrefixStrategy, {"prefix_count": 0}),
        (HexPrefixStrategy, {"prefix_count": 1.5}),
        (RoundRobinPrefixStrategy, {"user_prefixes": []}),
        (RoundRobinPrefixStrategy, {"user_prefixes": "abc"}),
    ],
)
def test_prefix_strategies_refuse_what_makes_no_prefix(strategy: type, arguments: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        strategy(**arguments)
