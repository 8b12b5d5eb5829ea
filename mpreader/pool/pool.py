"""Pool: worker processes and shared memory as callers hold them, and the pools that a process shares.

It starts and stops coordinators and is their one caller; readers and fetchers use it, and nothing below this module.

::

    not running ──read, start──► running ──idle_timeout_s, no user, an error──► not running
                                    │ close                                      │ close
                                    └────────────► closed ◄──────────────────────┘

Each time that it runs it has a new coordinator and a new caller. In a forked child it is not running, whatever it was
in the parent; the parent's workers and memory are left untouched.
"""

from __future__ import annotations

import copy
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from mpreader.config import POOL_SETTINGS, PoolConfig, S3ClientConfig, check_type
from mpreader.errors import PoolClosed
from mpreader.host import Host
from mpreader.pool.caller import Caller
from mpreader.pool.coordinator.coordinator import Coordinator, Mailbox, Timeouts
from mpreader.pool.requests import CloseRead, ReadId, SlotRead
from mpreader.pool.sizing import size_pool
from mpreader.pool.source import Source
from mpreader.pool.stats import PoolStats, total
from mpreader.pool.transfer import Transfer

__all__ = ["Pool", "PoolConnection", "close_shared_pools", "release_shared_pool", "shared_pool", "use_shared_pool"]

_OWN_CALLER: Final = 1  # number of the pool's own caller; others count on from it

_pools: weakref.WeakSet[Pool] = weakref.WeakSet()
_shared: dict[tuple[object, ...], Pool] = {}
# Reentrant, like a pool's own: a garbage collection inside it may drop, and so release, a pool.
_shared_lock = threading.RLock()
_watches_forks = False


class PoolConnection:
    """One more caller of a coordinator, besides the pool's own.

    Attributes:
        number: Number of the caller.
    """

    def __init__(self, number: int, coordinator: Coordinator) -> None:
        self.number = number
        self._coordinator = coordinator

    def tell(self, message: object) -> None:
        """Send a message to the coordinator; lost once that has ended."""
        self._coordinator.tell(message)

    def try_tell(self, message: object) -> bool:
        """Send a message to the coordinator; False if that has ended."""
        return self._coordinator.try_tell(message)

    def close(self, *reads: ReadId) -> None:
        """End these reads, and the conversation: the mailbox is told nothing more, and what it had leased is free."""
        for read in reads:
            self._coordinator.tell(CloseRead(read))
        self._coordinator.disconnect(self.number)


class Pool:
    """Worker processes and shared memory behind a coordinator. Thread-safe.

    Attributes:
        sizes: Numbers that its coordinators are made with.
        timeouts: Waiting times that its coordinators are made with.
        users: Number of users of a shared pool; see :func:`use_shared_pool`.
        suspends_when_unused: True if a user of a shared pool has asked for its end, which waits for the last user.
    """

    def __init__(
        self,
        config: PoolConfig | None = None,
        s3client_config: S3ClientConfig | None = None,
        *,
        for_host: bool = False,
    ) -> None:
        """Set a pool up; nothing is started yet.

        Args:
            config: Settings of the pool.
            s3client_config: Settings of the S3 client.
            for_host: The pool receives for all ranks of the host: cores and memory are not divided by their number.

        Raises:
            ConfigError: A setting is wrong, or the host has too little memory.
        """
        _check_types(config, s3client_config)
        config = config or PoolConfig()
        host = Host.now()
        self.sizes = size_pool(
            config, s3client_config or S3ClientConfig(), replace(host, sharers=1) if for_host else host
        )
        self.timeouts = Timeouts(*(config.value(name) for name in Timeouts._fields))
        self.users = 0
        self.suspends_when_unused = False
        self._lock = threading.RLock()
        self._is_closed = False
        self._coordinator: Coordinator | None = None
        self._caller: Caller | None = None
        self._stop: Callable[[], object] = _nothing
        self._past_runs = PoolStats()
        self._has_read = False  # in the run that is under way, or was the last
        self._numbers = itertools.count(_OWN_CALLER + 1)
        _watch_forks()
        _pools.add(self)

    def __repr__(self) -> str:
        state = "closed" if self._is_closed else "running" if self.is_running else "not running"
        return (
            f"Pool({state}, workers={self.sizes.workers}, connections_per_worker={self.sizes.connections_per_worker})"
        )

    @property
    def is_running(self) -> bool:
        """True while worker processes are up."""
        return self._coordinator is not None and not self._coordinator.is_ended

    @property
    def is_closed(self) -> bool:
        """True after its owner has closed it."""
        return self._is_closed

    @property
    def coordinator(self) -> Coordinator | None:
        """The run that is under way, or the last one; None if there was none."""
        return self._coordinator

    def stats(self) -> PoolStats:
        """Statistics of all its runs together."""
        with self._lock:
            return total([self._past_runs, self._run_stats()])

    def start(self) -> None:
        """Start the workers, without waiting for them, so that they are up when they are needed.

        Raises:
            PoolClosed: The pool was closed.
            PoolError: They can't be started.
        """
        with self._lock:
            self._running()

    def read(self, sources: Sequence[Source], slot_reads: Sequence[SlotRead], *, grows: bool = False) -> Transfer:
        """Begin to read ahead, in order. Whoever calls this closes the transfer.

        Args:
            sources: Objects to read from.
            slot_reads: Reads of these objects, in the order in which they will be taken.
            grows: Go beyond ``max_memory`` rather than fail: for consumers that can't work with less than one whole
                item.

        Raises:
            PlanError: A slot read has no parts, or one that doesn't lie within its slot.
            PoolClosed: The pool was closed.
            PoolError: Workers can't be started.
        """
        transfer: Transfer | None = None
        try:
            with self._lock:
                while True:
                    coordinator, caller = self._running()
                    transfer, message = caller.open(sources, slot_reads, grows=grows)
                    if coordinator.try_tell(message):
                        self._has_read = True
                        return transfer
        except BaseException:  # a Ctrl-C, perhaps after the coordinator was told: nobody else could close it
            if transfer is not None:
                transfer.close()
            raise

    def connect(self, mailbox: Mailbox) -> PoolConnection:
        """Let somebody else speak to the coordinator, which is started if it is not running.

        Args:
            mailbox: Takes the coordinator's messages.

        Raises:
            PoolClosed: The pool was closed.
            PoolError: Workers can't be started.
        """
        with self._lock:
            coordinator, _ = self._running()
            connection = PoolConnection(next(self._numbers), coordinator)
            coordinator.connect(connection.number, mailbox)
            self._has_read = True
            return connection

    def suspend_if_unused(self) -> None:
        """End workers and downloads of a shared pool, unless somebody uses it again; the next use starts again."""
        with self._lock:
            if self.users <= 0:  # under the lock: whoever uses it anew has counted itself before it needs the lock
                self._stop()

    def close(self) -> None:
        """End workers and downloads and wait until they are gone. Views that were taken stay valid. Idempotent."""
        with self._lock:
            self._is_closed = True
            self._stop()

    def _run_stats(self) -> PoolStats:
        if self._coordinator is None or self._caller is None:
            return PoolStats()
        return replace(self._coordinator.stats(), seconds=self._caller.waited_s)

    def _running(self) -> tuple[Coordinator, Caller]:
        if self._is_closed:
            raise PoolClosed("the pool was closed; make a new one")
        if self._coordinator is None or self._caller is None or self._coordinator.is_ended:
            self._stop()
            self._past_runs = total([self._past_runs, self._run_stats()])
            failure = self._coordinator.failure if self._coordinator is not None and not self._has_read else None
            self._coordinator = self._caller = None  # counted: a start that fails must not count them again
            if failure is not None:  # nobody was told of it yet; and what broke at once would do so again and again
                raise copy.copy(failure)
            self._has_read = False
            coordinator = Coordinator(self.sizes, self.timeouts)
            # Also at exit, and when the pool is dropped without having been closed.
            self._stop = weakref.finalize(self, coordinator.stop)
            caller = Caller(_OWN_CALLER, coordinator.tell)
            coordinator.connect(caller.number, caller)
            self._coordinator, self._caller = coordinator, caller
        return self._coordinator, self._caller

    def _after_fork_in_child(self) -> None:
        self._lock = threading.RLock()  # a thread that is not here may have held the old one
        if self._coordinator is not None:
            self._coordinator.abandon()
        self._coordinator, self._caller, self._stop = None, None, _nothing


def shared_pool(
    config: PoolConfig | None, s3client_config: S3ClientConfig | None = None, *, for_host: bool = False
) -> Pool:
    """Returns the process's pool for these settings, made when it is first asked for.

    It ends when it is idle, at exit, or when its users have said that it is not needed (``release_shared_pool``).

    Raises:
        ConfigError: A setting is wrong, or the host has too little memory.
    """
    _check_types(config, s3client_config)
    config = config or PoolConfig()
    s3client_config = s3client_config or S3ClientConfig()
    settings = (
        *map(config.value, POOL_SETTINGS),
        s3client_config.part_size,
        s3client_config.throughput_target_gbps,
        for_host,
    )
    with _shared_lock:
        pool = _shared.get(settings)
        if pool is None:
            pool = _shared[settings] = Pool(config, s3client_config, for_host=for_host)
        use_shared_pool(pool)
        return pool


def use_shared_pool(pool: Pool) -> None:
    """Be one more user of a pool from ``shared_pool``, until ``release_shared_pool``."""
    with _shared_lock:
        pool.users += 1


def release_shared_pool(pool: Pool, *, keep_warm: bool = False) -> None:
    """Say that a pool from ``shared_pool`` is not needed any more.

    Args:
        pool: The pool.
        keep_warm: Leave its processes to the idle timeout. Otherwise they end with the last user.
    """
    with _shared_lock:
        pool.users -= 1
        pool.suspends_when_unused |= not keep_warm
        is_over = pool.suspends_when_unused and pool.users <= 0
        if is_over:
            pool.suspends_when_unused = False
    if is_over:
        pool.suspend_if_unused()


def close_shared_pools() -> None:
    """Close the pools that ``shared_pool`` made; the next use makes new ones."""
    with _shared_lock:
        pools = list(_shared.values())
        _shared.clear()
    for pool in pools:
        pool.close()


def _check_types(config: object, s3client_config: object) -> None:
    check_type("pool_config", config, PoolConfig)
    check_type("s3client_config", s3client_config, S3ClientConfig)


def _nothing() -> None:
    pass


def _watch_forks() -> None:
    # When the first pool is made, not on import: whoever only imports mpreader pays nothing at its forks.
    global _watches_forks
    if not _watches_forks:
        _watches_forks = True
        os.register_at_fork(after_in_child=_after_fork_in_child)


def _after_fork_in_child() -> None:
    global _shared_lock
    _shared_lock = threading.RLock()
    for pool in list(_pools):
        pool._after_fork_in_child()
