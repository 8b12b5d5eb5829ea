"""Prefix strategies: choose the first part of the names of the files that each rank saves.

The storage writer uses them, and users choose one by ``prefix_strategy=``. S3 partitions a bucket by the first
characters of its keys. Ranks whose files differ in these characters are soon served by different partitions, and
together reach a higher rate of requests. A prefix must not lead out of the checkpoint; the writer checks that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch.distributed as dist

from mpreader.errors import ConfigError

__all__ = [
    "BinaryPrefixStrategy",
    "DefaultPrefixStrategy",
    "HexPrefixStrategy",
    "NumericPrefixStrategy",
    "RoundRobinPrefixStrategy",
    "S3PrefixStrategyBase",
]


class S3PrefixStrategyBase(ABC):
    """Base of the prefix strategies. The name of a rank's file is its prefix, a running number and ``.distcp``."""

    def __call__(self, rank: int) -> str:
        """Returns the prefix of the files of ``rank``; the same as :meth:`generate_prefix`."""
        return self.generate_prefix(rank)

    @abstractmethod
    def generate_prefix(self, rank: int) -> str:
        """Returns the prefix of the files of ``rank``, relative to the checkpoint; different for every rank."""


class DefaultPrefixStrategy(S3PrefixStrategyBase):
    """Prefixes ``__<rank>_``, which DCP itself uses: all files are in one folder."""

    def generate_prefix(self, rank: int) -> str:
        """Returns the prefix of the files of ``rank``."""
        return f"__{rank}_"


class NumericPrefixStrategy(S3PrefixStrategyBase):
    """Prefixes ``<number>/epoch_<epoch_num>/__<rank>_``, in which the number is written backwards.

    Written backwards, consecutive numbers differ in their first character, which S3 partitions by.

    Args:
        base: Base in which the number is written.
        epoch_num: Number of the checkpoint, written into the prefix. None: the prefix has no such part.
        min_prefix_length: Smallest number of digits; shorter numbers are filled up with zeros.
        prefix_count: Number of different numbers; rank ``r`` gets number ``r % prefix_count``. None: one for each rank
            of the process group, or a single one if there is none.

    Raises:
        ConfigError: An argument has a wrong type or value.
    """

    def __init__(
        self,
        base: int,
        epoch_num: int | None = None,
        min_prefix_length: int = 10,
        prefix_count: int | None = None,
    ) -> None:
        _require_whole("base", base, 2)
        _require_whole("min_prefix_length", min_prefix_length, 1)
        _require_epoch(epoch_num)
        if prefix_count is not None:
            _require_whole("prefix_count", prefix_count, 1)
        elif dist.is_available() and dist.is_initialized():
            prefix_count = dist.get_world_size()
        self.base = base
        self.epoch_num = epoch_num
        self.min_prefix_len = min_prefix_length
        self.prefix_count = prefix_count or 1
        self.prefix_map = self._numbers()

    def generate_prefix(self, rank: int) -> str:
        """Returns the prefix of the files of ``rank``."""
        return _join(self.prefix_map[rank % self.prefix_count], self.epoch_num, rank)

    def _numbers(self) -> list[str]:
        digits = self.min_prefix_len
        # More digits if there are more numbers than that, so that all of them have the same length and differ.
        while self.base**digits < self.prefix_count:
            digits += 1
        return [self._format_number(number, digits)[::-1] for number in range(self.prefix_count)]

    @abstractmethod
    def _format_number(self, number: int, length: int) -> str:
        """Returns ``number`` as text of ``length`` digits of the base, the highest first."""


class BinaryPrefixStrategy(NumericPrefixStrategy):
    """Prefixes with binary numbers; see :class:`NumericPrefixStrategy`."""

    def __init__(
        self, epoch_num: int | None = None, min_prefix_length: int = 10, prefix_count: int | None = None
    ) -> None:
        super().__init__(2, epoch_num, min_prefix_length, prefix_count)

    def _format_number(self, number: int, length: int) -> str:
        return format(number, f"0{length}b")


class HexPrefixStrategy(NumericPrefixStrategy):
    """Prefixes with hexadecimal numbers; see :class:`NumericPrefixStrategy`."""

    def __init__(
        self, epoch_num: int | None = None, min_prefix_length: int = 10, prefix_count: int | None = None
    ) -> None:
        super().__init__(16, epoch_num, min_prefix_length, prefix_count)

    def _format_number(self, number: int, length: int) -> str:
        return format(number, f"0{length}x")


class RoundRobinPrefixStrategy(S3PrefixStrategyBase):
    """Prefixes ``<user prefix>/epoch_<epoch_num>/__<rank>_``, in which the user prefixes are assigned in turn.

    Args:
        user_prefixes: The prefixes, without a slash at either end. Rank ``r`` gets number ``r % len(user_prefixes)``.
        epoch_num: Number of the checkpoint, written into the prefix. None: the prefix has no such part.

    Raises:
        ConfigError: An argument has a wrong type or value.
    """

    def __init__(self, user_prefixes: Sequence[str], epoch_num: int | None = None) -> None:
        if not user_prefixes or isinstance(user_prefixes, str):  # a string is a sequence, too: of its characters
            raise ConfigError(f"user_prefixes must be a list of at least one prefix, got {user_prefixes!r}")
        _require_epoch(epoch_num)
        self.user_prefixes = list(user_prefixes)
        self.epoch_num = epoch_num

    def generate_prefix(self, rank: int) -> str:
        """Returns the prefix of the files of ``rank``."""
        return _join(self.user_prefixes[rank % len(self.user_prefixes)], self.epoch_num, rank)


def _join(prefix: str, epoch_num: int | None, rank: int) -> str:
    epoch = "" if epoch_num is None else f"epoch_{epoch_num}/"
    return f"{prefix}/{epoch}__{rank}_"


def _require_epoch(epoch_num: object) -> None:
    if epoch_num is not None:
        _require_whole("epoch_num", epoch_num, None)


def _require_whole(name: str, value: object, least: int | None) -> None:
    # bool is a subclass of int, but no number that a user could mean.
    if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
        bound = "" if least is None else f" of at least {least}"
        raise ConfigError(f"{name} must be a whole number{bound}, got {value!r}")
