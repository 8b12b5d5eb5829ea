"""Protections against faults: without any one of them, a test of the fault matrix fails.

mpreader and its tests are copied to a temporary folder. There the tests pass; then one protection at a time is removed,
its test must fail, and the protection is put back. A test that passes without its protection would prove nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("mpreader", "tests", "scripts", "pyproject.toml")
TEST_TIMEOUT_S = 20  # without the protection that it proves a test may wait for ever
PYTEST_TIMEOUT_S = 120
BASELINE_TIMEOUT_S = 600

NETWORK = "tests/faults/test_network.py"
WORKERS = "tests/faults/test_workers.py"
CONNECTION = "mpreader/pool/worker/connection.py"
TAIL = "mpreader/pool/coordinator/tail.py"
TAIL_TEST = "tests/unit/pool/coordinator/test_tail.py"
SCHEDULER = "mpreader/pool/coordinator/scheduler.py"
SCHEDULER_TEST = "tests/unit/pool/coordinator/test_scheduler.py"
ADDRESSES = "mpreader/pool/worker/addresses.py"
ADDRESSES_TEST = "tests/integration/pool/worker/test_addresses.py"
PARTIAL_CONTENT = "mpreader/pool/worker/partial_content.py"
ITEMS = "mpreader/dcp/items.py"
BOXES = "tests/faults/test_boxes.py"
HOSTS = "tests/faults/test_hosts.py"
HOST_SERVER = "mpreader/pool/hosts/server.py"
HOST_MEMBER = "mpreader/pool/hosts/member.py"
RANK_HANGS = "ranks of a host: one is stopped, never comes, or is slow"
RANK_FAILS = "ranks of a host: an exception or a Ctrl-C in one"
RANKS_ERR = "ranks of a host: S3 refuses, an object is overwritten, a record is damaged"
RANKS_SHORT = "ranks of a host: out of shared memory, descriptors or workers"
CHANNEL_TEST = "tests/unit/pool/hosts/test_channel.py"
SHARING_TEST = "tests/integration/pool/test_host_sharing.py"
HEADER = "mpreader/formats/safetensors.py"
HEADER_TEST = "tests/unit/formats/test_safetensors.py::test_header_that_breaks_a_rule_is_refused"
SAFETENSORS = "damaged or hostile safetensors header or index"
SAFETENSORS_FILES = "mpreader/fetch/safetensors.py"
SAFETENSORS_FUZZ = "tests/fuzz/test_safetensors.py"


class Protection(NamedTuple):
    """A protection, how it is removed, and the test that then fails.

    Attributes:
        row: Row of the fault matrix.
        name: Name of the protection.
        file: File that holds it.
        old: Its code, which occurs in the file once.
        new: Code without the protection.
        test: Node of the test, as pytest names it.
    """

    row: str
    name: str
    file: str
    old: str
    new: str
    test: str


PROTECTIONS = (
    Protection(
        "connection closed early (FIN) in a body",
        "a body that ends early is noticed",
        CONNECTION,
        'raise GetFailed(FailureKind.BROKEN, f"the body ended after {received} of {wanted} bytes", received)',
        "break",
        f"{NETWORK}::test_body_that_breaks_is_resumed_where_it_broke[FaultKind.EARLY_CLOSE]",
    ),
    Protection(
        "connection closed early (FIN) in a body",
        "a part is resumed where it broke",
        "mpreader/pool/coordinator/coordinator.py",
        "rest = part.range.rest(part.received)",
        "rest = part.range",
        f"{NETWORK}::test_body_that_breaks_is_resumed_where_it_broke[FaultKind.EARLY_CLOSE]",
    ),
    Protection(
        "object overwritten between GETs",
        "If-Match is sent",
        CONNECTION,
        'headers.append(("If-Match", fetch.version.etag))',
        "pass",
        f"{NETWORK}::test_body_that_breaks_is_resumed_where_it_broke[FaultKind.EARLY_CLOSE]",
    ),
    Protection(
        "ETag missing or different in a 206",
        "the version of the response is compared",
        PARTIAL_CONTENT,
        "if find_difference(validators, response.validators) is not None:",
        "if False:",
        f"{NETWORK}::test_fault_that_stays_is_one_error_after_few_attempts[OTHER_ETAG---]",
    ),
    Protection(
        "object overwritten between GETs",
        "what the first response says of the version is kept",
        "mpreader/pool/coordinator/scheduler.py",
        "            source.version = version\n",
        "            pass\n",
        "tests/integration/test_versions.py::test_version_that_only_gets_tell_is_pinned_by_the_first_one[s3 stream]",
    ),
    Protection(
        "object overwritten between GETs",
        "responses that were in flight with the first one are compared with it",
        "mpreader/pool/coordinator/scheduler.py",
        "change = find_change(source.version.validators, found)",
        "change = None",
        "tests/unit/pool/coordinator/test_scheduler.py::"
        "test_scheduler_pins_what_the_first_response_says_of_the_version",
    ),
    Protection(
        "weak ETags, or If-Match refused, though nothing was overwritten",
        "a refused If-Match is left out",
        "mpreader/pool/worker/connection.py",
        "if not is_conditional or not is_condition_refused(failure, origin in _take_if_match):",
        "if True:",
        "tests/integration/test_versions.py::test_object_that_stayed_is_read[If-Match is 412-http fetch]",
    ),
    Protection(
        "Content-Encoding: stored with the object, or made on the way",
        "a body that is compressed on the way is refused",
        PARTIAL_CONTENT,
        "if not is_exact and is_compressed(response.encoding) and response.encoding != encoding:",
        "if False:",
        "tests/integration/test_versions.py::test_body_that_is_compressed_on_the_way_is_refused[s3 fetch]",
    ),
    Protection(
        "wrong Content-Length, Content-Range or total size",
        "the range of the response is compared",
        PARTIAL_CONTENT,
        "if named is None or (named.start, named.end) != (start, end):",
        "if named is None:",
        f"{NETWORK}::test_fault_that_stays_is_one_error_after_few_attempts[WRONG_RANGE---]",
    ),
    Protection(
        "wrong Content-Length, Content-Range or total size",
        "the total size of the response is compared",
        PARTIAL_CONTENT,
        "if object_size is not None and stated not in (object_size, None):",
        "if False:",
        f"{NETWORK}::test_fault_that_stays_is_one_error_after_few_attempts[WRONG_TOTAL---]",
    ),
    Protection(
        "wrong Content-Length, Content-Range or total size",
        "Content-Length is compared",
        PARTIAL_CONTENT,
        "if response.length not in (end - start, None):",
        "if False:",
        f"{NETWORK}::test_fault_that_stays_is_one_error_after_few_attempts[WRONG_LENGTH---]",
    ),
    Protection(
        "200 with the whole object instead of 206",
        "status 200 is accepted for a whole object only",
        PARTIAL_CONTENT,
        "if (start, end) != (0, response.length if object_size is None else object_size):",
        "if False:",
        f"{NETWORK}::test_fault_that_stays_is_one_error_after_few_attempts[WHOLE_OBJECT---]",
    ),
    Protection(
        "500, 503 SlowDown, a brown-out",
        "a busy server is asked again",
        "mpreader/pool/coordinator/retry.py",
        "        FailureKind.BUSY,\n        FailureKind.MALFORMED,\n",
        "        FailureKind.MALFORMED,\n",
        f"{NETWORK}::test_brown_out_is_outlived_with_growing_delays",
    ),
    Protection(
        "server stalls, or trickles",
        "connections that bring too little are ended",
        "mpreader/pool/worker/main.py",
        "if thread.connection.deadline < now:",
        "if False:",
        f"{NETWORK}::test_fault_that_passes_is_survived[TRICKLE 503]",
    ),
    Protection(
        "server stalls, or trickles",
        "a part has a deadline",
        "mpreader/pool/coordinator/scheduler.py",
        "[part for part in self._parts.values() if part.deadline < now]",
        "[]",
        f"{NETWORK}::test_part_that_takes_too_long_in_all_is_a_timeout",
    ),
    Protection(
        "one answer among many: its rate is far below the others'",
        "a slow request is cut",
        TAIL,
        "if allowance.budget >= 1 and self._is_slow(request, allowance.patience, now):",
        "if False:",
        f"{TAIL_TEST}::test_tail_is_cut_and_costs_little[2 % at 200 kB/s]",
    ),
    Protection(
        "one answer among many: its first byte is late",
        "cuts have a budget",
        TAIL,
        "if allowance.budget >= 1 and self._is_slow(request, allowance.patience, now):",
        "if self._is_slow(request, allowance.patience, now):",
        f"{TAIL_TEST}::test_cuts_are_bounded_by_the_budget_where_many_requests_are_slow[0.3-late]",
    ),
    Protection(
        "one answer among many: it falls silent in its body",
        "a silence counts, however fast the body came before",
        TAIL,
        " or silent_s > max(slow_s, patience * usual_s)",
        "",
        f"{TAIL_TEST}::test_tail_is_cut_and_costs_little[1 % fall silent just before the end]",
    ),
    Protection(
        "one answer among many: it falls silent in its body",
        "a cut is no failure",
        SCHEDULER,
        "if failure.kind is not FailureKind.SLOW:  # a cut is no failure",
        "if True:",
        f"{SCHEDULER_TEST}::test_scheduler_counts_no_cut_as_a_failure",
    ),
    Protection(
        "one answer among many: it falls silent in its body",
        "the bytes that came before a cut are kept",
        SCHEDULER,
        "part.received += failure.received",
        "part.received += failure.received * (failure.kind is not FailureKind.SLOW)",
        f"{SCHEDULER_TEST}::test_scheduler_sends_the_rest_of_a_part_that_was_cut_before_all_others",
    ),
    Protection(
        "one answer among many: its first byte is late",
        "a cut that comes too late does not strike the next request for its part",
        "mpreader/pool/worker/main.py",
        "if message.kind is FailureKind.CANCELLED:",
        "if True:",
        "tests/unit/pool/worker/test_main.py"
        "::test_cut_of_a_part_that_has_ended_does_not_strike_it_when_it_is_sent_again[True]",
    ),
    Protection(
        "one answer among many: its first byte is late",
        "a report of the request before is left out",
        "mpreader/pool/coordinator/in_flight.py",
        " and each.started_s >= request.sent_s:",
        ":",
        f"{TAIL_TEST}::test_report_of_a_request_that_was_sent_again_meanwhile_is_left_out",
    ),
    Protection(
        "a slow server: all answers are slow",
        "a request is compared with its peers of the same time",
        TAIL,
        "if len(peers) >= _LEAST_PEERS:\n        return peers\n",
        "if False:\n        return peers\n",
        f"{TAIL_TEST}::test_server_that_becomes_slow_for_all_sees_no_cuts_in_vain[8]",
    ),
    Protection(
        "a slow server: all answers are slow",
        "a large request is not compared with small ones",
        "mpreader/pool/coordinator/in_flight.py",
        "if size_class >= least_class",
        "if True",
        f"{TAIL_TEST}::test_large_request_is_not_compared_with_small_ones_whose_bytes_come_with_the_first",
    ),
    Protection(
        "a slow server: all answers are slow",
        "cuts that were in vain make patient",
        TAIL,
        "factor = 2.0 if request.cut.was_in_vain(first_byte_s, bytes_per_s) else 0.5",
        "factor = 0.5",
        f"{TAIL_TEST}::test_cuts_in_vain_become_rare",
    ),
    Protection(
        "a slow server: it pauses as a whole",
        "while a server pauses for all, nobody gets slower",
        TAIL,
        "clock_s = request.server.served_until(now)",
        "clock_s = now",
        f"{TAIL_TEST}::test_short_pauses_of_the_whole_server_see_no_cuts",
    ),
    Protection(
        "a slow server: it pauses as a whole",
        "a pause makes no request older",
        TAIL,
        "age_s = clock_s - progress.started_s - request.paused_s",
        "age_s = clock_s - progress.started_s",
        f"{TAIL_TEST}::test_long_pauses_of_the_whole_server_see_one_cut_each",
    ),
    Protection(
        "one of several addresses is slow, or refuses",
        "new connections are made to other addresses",
        ADDRESSES,
        "(max(now, self._record(info[4]).avoided_until_s), os.urandom(4))",
        "os.urandom(4)",
        f"{ADDRESSES_TEST}::test_address_that_refuses_is_left_alone_at_once",
    ),
    Protection(
        "one of several addresses is slow, or refuses",
        "kept connections are left for other addresses",
        "mpreader/pool/worker/connection.py",
        "if addresses.should_leave(*server_of(route), self._address):",
        "if False:",
        f"{ADDRESSES_TEST}::test_address_whose_requests_were_cut_twice_is_left_alone_by_kept_connections_too",
    ),
    Protection(
        "one of several addresses is slow, or refuses",
        "one slow request says nothing of its address",
        ADDRESSES,
        "if record.strikes + 1 < _STRIKES:",
        "if False:",
        f"{ADDRESSES_TEST}::test_address_whose_requests_were_cut_twice_is_left_alone_by_kept_connections_too",
    ),
    Protection(
        "one of several addresses is slow, or refuses",
        "a connection that is not made yet can be cut",
        "mpreader/pool/worker/transport.py",
        "announce(sock)  # outside of _try_connect: whoever raises in it wants no other address to be tried",
        "pass",
        f"{ADDRESSES_TEST}::test_address_that_swallows_packets_is_left_alone_once_its_request_is_cut",
    ),
    Protection(
        "refused connection, unknown host, TLS failure",
        "the server's certificate is checked",
        "mpreader/pool/worker/transport.py",
        "context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)",
        "context = ssl._create_unverified_context()",
        f"{NETWORK}::test_tls_is_read_with_the_right_authority_and_refused_with_another",
    ),
    Protection(
        "expired token or signature in a load",
        "an expired signature is renewed",
        "mpreader/pool/coordinator/scheduler.py",
        "elif failure.kind is FailureKind.EXPIRED and not part.is_resigned:",
        "elif False:",
        f"{NETWORK}::test_expired_signature_is_renewed_once_and_the_load_goes_on[403-ExpiredToken]",
    ),
    Protection(
        "bit flipped in a tensor's bytes",
        "the CRC of a tensor is compared",
        "mpreader/dcp/tensor.py",
        "if saved is not None and saved != self._crc:",
        "if False:",
        "tests/integration/dcp/test_load.py::test_flipped_bit_raises_checksum_mismatch_naming_the_tensor[plain]",
    ),
    Protection(
        "a box of a tensor: its record is not laid out as predicted",
        "where the payload really begins is compared with the prediction",
        ITEMS,
        "if not all(content.holds(run.start, run.end) for run in runs):",
        "if False:",
        f"{BOXES}::test_box_whose_payload_begins_elsewhere_is_read_again[long tail]",
    ),
    Protection(
        "a box of a tensor: its record is not laid out as predicted",
        "the strides that are stored say which bytes a box has",
        ITEMS,
        "stored_runs(layout.size, layout.stride, ",
        "stored_runs(layout.size, layout.stride[::-1], ",
        f"{BOXES}::test_box_of_a_tensor_in_another_order_is_read_again",
    ),
    Protection(
        "a box of a tensor: its record is not laid out as predicted",
        "an item whose front is not understood is read whole",
        ITEMS,
        "            if layout is None:\n                return PlannedItem(request, stored)\n",
        "            if layout is None:\n                return None\n",
        f"{BOXES}::test_box_whose_payload_begins_elsewhere_is_read_again[short tail]",
    ),
    Protection(
        "a box of a tensor: the front of its record is damaged",
        "the CRCs of the front are compared",
        "mpreader/formats/torch_save.py",
        "        _check_crcs(entries)  # first of all",
        "        pass  # first of all",
        f"{BOXES}::test_front_that_is_damaged_once_is_read_again_with_the_whole_item",
    ),
    Protection(
        "a box of a tensor: overwritten before what was not predicted is read",
        "what is read again is of the version that was read first",
        "mpreader/readers/read_ahead.py",
        "uri: known.get(uri) or make(uri)",
        "uri: make(uri)",
        "tests/integration/dcp/test_boxes.py::test_version_that_was_read_first_is_the_one_that_is_read_again",
    ),
    Protection(
        "a box of a tensor: a bit of it is flipped",
        'verify="whole" reads items whole',
        "mpreader/dcp/load.py",
        'if self._verify != "whole":',
        "if True:",
        f"{BOXES}::test_bit_that_is_flipped_in_a_box_is_found_where_items_are_read_whole",
    ),
    Protection(
        "worker killed, or out of memory",
        "the parts of a dead worker are given to others",
        "mpreader/pool/coordinator/coordinator.py",
        "        self._scheduler.lost(lost.parts, lost.exitcode, lost.why)\n",
        "        self._scheduler.lost((), lost.exitcode, lost.why)\n",
        f"{WORKERS}::test_killed_worker_is_replaced_and_its_parts_are_read_again[one]",
    ),
    Protection(
        "worker killed, or out of memory",
        "a part that kills workers is given up",
        "mpreader/pool/coordinator/scheduler.py",
        "elif part.crashes >= _MAX_CRASHES:",
        "elif False:",
        f"{WORKERS}::test_part_that_kills_every_worker_is_one_error",
    ),
    Protection(
        "worker stopped (stuck)",
        "a worker that is silent is killed",
        "mpreader/pool/coordinator/workers.py",
        "                worker.is_unresponsive = True\n                self._kill(worker)\n",
        "                worker.is_unresponsive = True\n",
        f"{WORKERS}::test_stuck_worker_is_killed_and_its_parts_are_read_again",
    ),
    Protection(
        "worker can't start",
        "restarts are bounded",
        "mpreader/pool/coordinator/workers.py",
        "if self._deaths > _MAX_DEATHS_PER_WORKER * self._limits.workers:",
        "if False:",
        f"{WORKERS}::test_workers_that_can_not_start_any_more_are_restarted_a_few_times_only",
    ),
    Protection(
        "parent killed",
        "a worker ends with its parent",
        "mpreader/pool/worker/main.py",
        "        while os.getppid() == parent_pid:\n"
        "            ready = [fd for fd, _ in poll.poll(self._poll_timeout_ms() or longest_ms)]\n"
        "            if parent_pidfd in ready:\n                return\n"
        "            if ready and not self._handle_message():\n                return\n",
        "        while True:\n"
        "            ready = [fd for fd, _ in poll.poll(self._poll_timeout_ms() or longest_ms)]\n"
        "            if self._sock.fileno() in ready:\n                self._handle_message()\n",
        "tests/integration/pool/test_lifecycle.py::test_killed_parent_takes_its_workers_along",
    ),
    Protection(
        "parent killed",
        "shared memory has no name",
        "mpreader/shared_memory.py",
        "    os.unlink(path)\n",
        "",
        "tests/unit/test_shared_memory.py::test_shared_memory_has_no_name_whatever_it_is_made_of[a file]",
    ),
    Protection(
        "frozen program; an executable that is no Python",
        "an interpreter is proved before a second worker is started",
        "mpreader/pool/coordinator/workers.py",
        "        if self._interpreters.is_proved:\n            self._start_others()\n",
        "        self._start_others()\n",
        "tests/integration/pool/test_interpreters.py"
        "::test_frozen_program_that_does_not_call_freeze_support_is_one_error",
    ),
    Protection(
        "frozen program; an executable that is no Python",
        "a process that was to be a worker starts none",
        "mpreader/pool/coordinator/process.py",
        "        require_no_worker()\n",
        "",
        "tests/integration/pool/test_interpreters.py"
        "::test_frozen_program_that_does_not_call_freeze_support_is_one_error",
    ),
    Protection(
        "refused system calls; no /proc, /dev/shm or home",
        "the end of a worker is asked for where no event tells it",
        "mpreader/pool/coordinator/coordinator.py",
        "        for worker in self.workers.take_ended():\n"
        "            self._handle_worker_event(worker, has_ended=True)\n",
        "",
        "tests/integration/pool/test_hosts.py::test_worker_that_dies_where_there_is_no_pidfd_is_replaced[killed]",
    ),
    Protection(
        "small or full /dev/shm",
        "memory that is not free is not taken",
        "mpreader/pool/coordinator/arena.py",
        "            if size > _free_bytes():\n",
        "            if False:\n",
        "tests/unit/test_shared_memory.py::test_memory_that_is_not_free_is_refused_before_it_is_touched",
    ),
    Protection(
        "small or full /dev/shm",
        "shared memory is reserved before it is used",
        "mpreader/shared_memory.py",
        "        os.posix_fallocate(fd, start, end - start)\n",
        "        pass\n",
        "tests/faults/test_shared_memory.py::test_read_with_less_shared_memory_than_allowed_ends[in place]",
    ),
    Protection(
        "100,000 tiny ranges; one 5 GB item; zero-length range; range past the end",
        "a range past the end is refused",
        "mpreader/pool/coordinator/scheduler.py",
        "if past_end > source.version.size:",
        "if False:",
        f"{NETWORK}::test_range_past_the_end_is_refused_before_any_get",
    ),
    Protection(
        "hostile .metadata",
        "a path must stay inside of the checkpoint",
        "mpreader/dcp/metadata.py",
        "if not is_inside(path):",
        "if False:",
        "tests/integration/dcp/test_load.py::test_hostile_metadata_is_refused_before_anything_is_read[multiprocess]",
    ),
    Protection(
        "hostile .metadata",
        "only the classes of a checkpoint are made",
        "mpreader/dcp/unpickling.py",
        "if name in _CLASSES_BY_MODULE.get(module, ()):",
        "if True:",
        "tests/unit/dcp/test_metadata.py::test_metadata_that_would_run_code_runs_nothing",
    ),
    Protection(
        "hostile .metadata",
        "nothing is changed that the whole process shares",
        "mpreader/dcp/unpickling.py",
        "return self._factory(_find(module, name))",
        "return _find(module, name)",
        "tests/unit/dcp/test_metadata.py::test_metadata_changes_nothing_that_is_not_its_own",
    ),
    Protection(
        "hostile .metadata",
        "ten bytes can't reserve gigabytes",
        "mpreader/dcp/unpickling.py",
        "    check_bounds(data)\n",
        "",
        "tests/unit/dcp/test_metadata.py::test_metadata_of_few_bytes_reserves_few",
    ),
    Protection(
        "hostile .metadata",
        "the runs of a box are bounded",
        "mpreader/formats/selection.py",
        "if math.prod(map(len, apart)) > _MOST_RUNS:",
        "if False:",
        "tests/unit/dcp/test_boxes.py::test_forged_number_of_runs_reserves_little",
    ),
    Protection(
        "secrets",
        "a worker's environment is chosen",
        "mpreader/pool/coordinator/process.py",
        "env=_environment(),",
        "env=dict(os.environ),",
        "tests/integration/pool/test_lifecycle.py::test_workers_know_no_secret",
    ),
    Protection(
        RANK_HANGS,
        "a rank looks, before it commits what it has copied, if it was given up meanwhile",
        HOST_MEMBER,
        "if self.board.has_ended(self._joined.place):",
        "if False:",
        f"{HOSTS}::test_rank_that_is_stopped_is_dropped_and_reads_by_itself_when_it_goes_on"
        "[whole-resolve_tensor-member]",
    ),
    Protection(
        RANK_HANGS,
        "the leader's own rank looks so, too",
        HOST_SERVER,
        "if self.board.has_ended(self._places[_LEADER]):",
        "if False:",
        f"{HOSTS}::test_rank_that_is_stuck_in_its_planner_is_dropped[leader]",
    ),
    Protection(
        RANK_HANGS,
        "a rank that is given up is told so before its memory is used again",
        HOST_SERVER,
        "self.board.end(self._places[number])",
        "pass",
        f"{HOSTS}::test_rank_that_is_stopped_is_dropped_and_reads_by_itself_when_it_goes_on"
        "[whole-resolve_tensor-member]",
    ),
    Protection(
        RANKS_ERR,
        "what one rank verifies for others, and finds damaged, they receive again",
        "mpreader/dcp/sharing.py",
        "_GOOD if is_good else _DAMAGED",
        "_GOOD",
        f"{HOSTS}::test_records_that_are_damaged_on_the_way_are_received_again[rows]",
    ),
    Protection(
        RANKS_ERR,
        "a verdict is not believed of what was received a second time",
        "mpreader/pool/hosts/broker.py",
        "self._on_repeat(message.slot_read)",
        "pass",
        "tests/unit/pool/hosts/test_broker.py::test_slot_that_comes_by_another_download_than_a_rank_has_taken_is_told_of",
    ),
    Protection(
        RANKS_ERR,
        "what a rank has not verified, though it was to, the others receive again",
        "mpreader/dcp/sharing.py",
        "or board.noted(verdict.number) != _GOOD:",
        "or board.noted(verdict.number) == _DAMAGED:",
        f"{HOSTS}::test_what_a_rank_was_to_verify_is_verified_by_the_others_if_it_does_not[raise-RankError-rows-member]",
    ),
    Protection(
        RANK_HANGS,
        "the silence of the leader is noticed",
        HOST_MEMBER,
        "elif time.monotonic() - self._channel.heard_s > _SILENCE_S:",
        "elif False:",
        f"{HOSTS}::test_rank_that_is_stopped_is_dropped_and_reads_by_itself_when_it_goes_on"
        "[whole-resolve_tensor-leader]",
    ),
    Protection(
        RANK_HANGS,
        "the silence of a rank that keeps memory is noticed",
        HOST_SERVER,
        "return time.monotonic() - heard_s > self._drop_after_s",
        "return False",
        f"{HOSTS}::test_rank_that_is_stopped_with_the_usual_limits_holds_the_others_up_for_less_than_10_s",
    ),
    Protection(
        RANK_HANGS,
        "a rank that waits for bytes itself is not taken for a silent one",
        "mpreader/pool/hosts/shares.py",
        "return bool(self.leases) and not self.waits_for",
        "return bool(self.leases)",
        "tests/unit/pool/hosts/test_broker.py::test_rank_that_waits_itself_is_not_overdue_though_it_keeps_memory",
    ),
    Protection(
        RANK_HANGS,
        "a rank that was silent does not believe the front of a record before it has looked if it was given up",
        ITEMS,
        "            self._check_held()  # before the layout, which may be that of another item, is believed\n",
        "",
        "tests/unit/dcp/test_items.py::"
        "test_layout_is_not_believed_if_the_memory_of_the_front_was_given_to_others[another record]",
    ),
    Protection(
        RANK_FAILS,
        "the memory that a leader keeps when it has failed is kept from nobody",
        HOST_SERVER,
        "self._call(self._forget, _LEADER)",
        "pass",
        f"{SHARING_TEST}::test_views_that_a_rank_keeps_when_it_leaves_keep_no_memory_from_the_others[leader]",
    ),
    Protection(
        RANK_FAILS,
        "a leader that fails before the others are served closes its socket",
        "mpreader/dcp/load.py",
        "offered.close()  # or others would wait for it",
        "pass",
        f"{HOSTS}::test_leader_that_fails_before_it_has_begun_to_read_is_not_waited_for[before the others are served]",
    ),
    Protection(
        RANK_FAILS,
        "a leader that fails before it reads ends its thread",
        "mpreader/dcp/sharing.py",
        "        except BaseException:\n            self._host.close()\n            raise",
        "        except ZeroDivisionError:\n            raise",
        f"{HOSTS}::test_leader_that_fails_before_it_has_begun_to_read_is_not_waited_for[while the others are served]",
    ),
    Protection(
        RANKS_SHORT,
        "a leader that can start no thread is no leader",
        HOST_SERVER,
        "except RuntimeError as error:",
        "except ZeroDivisionError as error:",
        f"{HOSTS}::test_rank_that_can_start_no_thread_for_the_sharing_reads_by_itself[leader]",
    ),
    Protection(
        RANKS_SHORT,
        "a rank that can start no thread reads by itself",
        HOST_MEMBER,
        "except RuntimeError as error:  # a limit of threads or memory",
        "except ZeroDivisionError as error:",
        f"{HOSTS}::test_rank_that_can_start_no_thread_for_the_sharing_reads_by_itself[member]",
    ),
    Protection(
        RANKS_SHORT,
        "a descriptor that was lost on the way is missed",
        "mpreader/pool/hosts/channel.py",
        "if flags & socket.MSG_CTRUNC:",
        "if False:",
        f"{CHANNEL_TEST}::test_descriptor_that_was_lost_is_not_replaced_by_the_next_one",
    ),
    Protection(
        RANK_HANGS,
        "a rank sends what it needs piece by piece, as the leader reads it",
        HOST_MEMBER,
        "            self._channel.watch(self._selector)  # its need may be more than the socket holds at one time\n",
        "",
        f"{SHARING_TEST}::test_need_may_be_larger_than_what_a_socket_holds_at_one_time",
    ),
    Protection(
        RANKS_ERR,
        "what a rank receives again, once more too, is of the version that its host has read",
        "mpreader/readers/read_ahead.py",
        "sources if before is None else {**before.sources, **sources},",
        "sources,",
        f"{HOSTS}::test_what_a_rank_receives_again_is_of_the_version_that_its_host_has_read[rows]",
    ),
    Protection(
        "ranks of a host: a process that is none of them",
        "the token is compared",
        "mpreader/pool/hosts/links.py",
        "len(link.token) == TOKEN_BYTES and not hmac.compare_digest(link.token, self._listener.token)",
        "False",
        f"{HOSTS}::test_process_that_is_none_of_the_ranks_is_told_nothing[without the token]",
    ),
    Protection(
        "ranks of a host: a process that is none of them",
        "the user of the other process is compared",
        "mpreader/pool/hosts/links.py",
        "if peer_user(connection) != os.getuid():",
        "if False:",
        f"{HOSTS}::test_process_that_is_none_of_the_ranks_is_told_nothing[of another user]",
    ),
    Protection(
        SAFETENSORS,
        "the length of a header is bounded",
        HEADER,
        "if nbytes > MAX_HEADER_BYTES:",
        "if False:",
        f"{HEADER_TEST}[huge header]",
    ),
    Protection(
        SAFETENSORS,
        "a header ends before its file does",
        HEADER,
        "if LENGTH_BYTES + nbytes > file_nbytes:",
        "if False:",
        f"{HEADER_TEST}[cut header]",
    ),
    Protection(
        SAFETENSORS,
        "a name is there once",
        HEADER,
        "if len(made) < len(pairs):",
        "if False:",
        f"{HEADER_TEST}[name twice]",
    ),
    Protection(
        SAFETENSORS,
        "a tensor has the bytes that its type and shape take",
        HEADER,
        "if end - start != nbits // 8:",
        "if False:",
        f"{HEADER_TEST}[other size]",
    ),
    Protection(
        SAFETENSORS,
        "elements are as many as can be counted",
        HEADER,
        "if count > _MOST:",
        "if False:",
        f"{HEADER_TEST}[more than can be counted, times 0]",
    ),
    Protection(
        SAFETENSORS,
        "no byte belongs to two tensors",
        HEADER,
        "if tensor.start != end:",
        "if tensor.start > end:",
        f"{HEADER_TEST}[overlap]",
    ),
    Protection(
        SAFETENSORS,
        "each byte belongs to a tensor",
        HEADER,
        "if tensor.start != end:",
        "if tensor.start < end:",
        f"{HEADER_TEST}[hole]",
    ),
    Protection(
        SAFETENSORS,
        "the tensors end where the file does",
        HEADER,
        "if end != file_nbytes:",
        "if False:",
        f"{HEADER_TEST}[file is longer]",
    ),
    Protection(
        SAFETENSORS,
        "lists in one another are bounded",
        HEADER,
        "if depth > _MOST_NESTED:",
        "if False:",
        f"{HEADER_TEST}[other field of 128 levels]",
    ),
    Protection(
        SAFETENSORS,
        "a name in an index does not lead out of the directory",
        SAFETENSORS_FILES,
        ' or ".." in name.split("/"):',
        ":",
        f"{SAFETENSORS_FUZZ}::test_index_that_is_none_is_refused[above]",
    ),
    Protection(
        SAFETENSORS,
        "a name in an index is no part of a URL",
        SAFETENSORS_FILES,
        "files = [quote(name) for name in files]",
        "pass",
        f"{SAFETENSORS_FUZZ}::test_name_in_an_index_is_that_of_a_file_whatever_its_letters",
    ),
    Protection(
        SAFETENSORS,
        "a tensor is in one file only",
        SAFETENSORS_FILES,
        "            _check_names(files)\n",
        "            pass\n",
        "tests/integration/safetensors/test_load.py::test_errors_name_what_is_wrong",
    ),
    Protection(
        "object overwritten between GETs",
        "tensors are of the version whose header was read",
        SAFETENSORS_FILES,
        "pins.enter_context(fetcher.pinned(uri, version))",
        '(pins.enter_context(fetcher.pinned(uri, version)) if uri[0] == "/" else (uri, None))',
        "tests/integration/safetensors/test_places.py::test_file_that_changes_is_never_mixed",
    ),
    Protection(
        "object overwritten between GETs",
        "a local file is looked at again after it was read",
        "mpreader/fetch/local.py",
        "            yield path, None\n            self._check_version(file, path, version)\n",
        "            yield path, None\n",
        "tests/integration/safetensors/test_places.py::test_file_that_changes_is_never_mixed",
    ),
    Protection(
        "views held while the load goes on; close with live views",
        "tensors of a stream that are kept leave it memory",
        "mpreader/safetensors/stream.py",
        " or not HELD_SLOTS.try_hold(view, self._max_held_bytes):",
        ":",
        "tests/integration/safetensors/test_stream.py::test_tensors_that_are_kept_are_never_overwritten",
    ),
)


class Outcome(NamedTuple):
    """Result of a run of pytest.

    Attributes:
        status: Exit status.
        said: First line of the first failure; empty if no test failed.
        output: All output.
        seconds: Wall time.
    """

    status: int
    said: str
    output: str
    seconds: float


class Failure(Exception):
    """A protection can't be removed, or no test fails without it."""


class Copy:
    """A copy of mpreader and its tests, in which they can be changed and run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # The files that git tracks, and new ones: a protection and its test may not be committed yet.
        listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *COPIED]
        for name in subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0"):
            if name and (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, folder / name)
        self._wait_less()
        self._require_own_package()

    @contextlib.contextmanager
    def without(self, protection: Protection) -> Iterator[None]:
        """Remove a protection while the block runs.

        Raises:
            Failure: It is not there, or more than once.
        """
        file = self._folder / protection.file
        text = file.read_text()
        count = text.count(protection.old)
        if count != 1:
            raise Failure(f"{protection.file} holds it {count} times: {protection.old.strip()!r}")
        file.write_text(text.replace(protection.old, protection.new))
        try:
            yield
        finally:
            file.write_text(text)
            # Python recompiles a file if its size or its time, in whole seconds, has changed. Of two changes within one
            # second it would miss the second one.
            for cache in self._folder.rglob("__pycache__"):
                shutil.rmtree(cache)

    def run(self, tests: list[str], timeout_s: float) -> Outcome:
        """Run tests until one fails."""
        options = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider", f"--timeout={TEST_TIMEOUT_S}"]
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *tests],
            cwd=self._folder,
            env=self._environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a process group of its own, so that all of it can be killed
        )
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output = process.communicate()[0] + "\nE   it had to be killed\n"
        self._end_orphans()
        # pytest prints errors of fixtures before failures of tests, but here they are consequences of the failure.
        failure = output[max(0, output.find("= FAILURES =")) :]
        # Messages of errors are marked with an E. The leak check of tests/ prints its own without that mark.
        said = re.search(r"^(?:E +(?=\S)|(?=left behind: ))(.*)$", failure, re.MULTILINE)
        return Outcome(process.returncode, said[1] if said else "", output, time.monotonic() - started)

    def _wait_less(self) -> None:
        """Shorten the timeouts of the tests: without their protections many wait until they are over."""
        for file in self._folder.glob("tests/**/test_*.py"):
            text = re.sub(r"mark\.timeout\(\d+\)", f"mark.timeout({TEST_TIMEOUT_S})", file.read_text())
            file.write_text(text)

    def _require_own_package(self) -> None:
        """Check that the tests import the copy, not the installed package.

        Raises:
            Failure: They would test the installed package, and no removed protection would be missed.
        """
        # Workers import mpreader from the folder that process.py lies in; so its place is checked.
        program = (
            "import mpreader.pool.coordinator.process as p, pathlib; "
            "print(pathlib.Path(p.__file__).resolve().parents[3])"
        )
        command = [sys.executable, "-c", program]
        found = subprocess.run(command, cwd="/", env=self._environment(), capture_output=True, text=True, check=True)
        if Path(found.stdout.strip()) != self._folder:
            raise Failure(f"mpreader is imported from {found.stdout.strip()}, not from its copy")

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self._folder), "PYTHONDONTWRITEBYTECODE": "1"}

    def _end_orphans(self) -> None:
        """End the workers of the copy that have outlived their parent, since a protection was missing."""
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                # The command line of a worker holds the code that process.py starts it with, and so the copy's folder.
                if f"sys.path.append('{self._folder}')" in entry.read_text(errors="replace"):
                    os.kill(int(entry.parent.name), signal.SIGKILL)


def check(copy: Copy, protection: Protection) -> Outcome:
    """Run a protection's test without it.

    Raises:
        Failure: The test does not fail.
    """
    with copy.without(protection):
        outcome = copy.run([protection.test], PYTEST_TIMEOUT_S)
    if outcome.status == 0:
        raise Failure(f"{protection.test} passes all the same")
    if not outcome.said:  # no message of a failure: pytest did not find the test, say
        raise Failure(f"{protection.test} did not fail, but could not be run:\n{outcome.output[-3000:]}")
    return outcome


def cells(protection: Protection, outcome: Outcome) -> tuple[str, ...]:
    """Cells of a line of the table, without what differs in each run: folders, addresses and ports."""
    said = re.sub(r"/tmp/[\w./-]*/", "…/", outcome.said)
    said = re.sub(r"\b0x[0-9a-f]{6,}", "0x…", said)
    said = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1", said)
    said = said if len(said) <= 110 else said[:109] + "…"
    return protection.row, protection.name, protection.test.rpartition("::")[2], said, f"{outcome.seconds:.1f}"


def markdown(lines: list[tuple[str, ...]]) -> str:
    """The table as Markdown, with a heading."""
    head = ("what goes wrong", "protection removed", "test that then fails", "what it says", "s")
    rows = [head, ("---", "---", "---", "---", "---:")]
    for row, name, test, said, seconds in lines:
        rows.append((row, name, f"`{test}`", f"`{said.replace('`', chr(39)).replace('|', chr(92) + '|')}`", seconds))
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return (
        "# Protections, and the tests that fail without them\n\n"
        f"Written by `scripts/protections --markdown FILE`. Unchanged, all these tests pass; with one of the "
        f"{len(lines)} protections removed, its test fails.\n\n{table}\n"
    )


def main() -> int:
    """Remove the protections that the command line names, one by one; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="write the table there, if all is as it should be"
    )
    parser.add_argument("words", nargs="*", help="remove only protections whose entry holds all of these words")
    options = parser.parse_args()
    chosen = [entry for entry in PROTECTIONS if all(word in " ".join(entry) for word in options.words)]
    if not chosen:
        parser.error("no protection's entry holds all of these words")  # pytest would run all tests
    with tempfile.TemporaryDirectory(prefix="mpreader-protections-") as folder:
        try:
            return show(Copy(Path(folder).resolve()), chosen, options.markdown)
        except Failure as failure:
            print(failure, file=sys.stderr)
            return 1


def show(copy: Copy, chosen: list[Protection], file: Path | None) -> int:
    """Print the result of each protection, and write the table; returns the exit status."""
    started = time.monotonic()
    unchanged = copy.run([entry.test for entry in chosen], BASELINE_TIMEOUT_S)
    if unchanged.status:
        raise Failure(f"the tests don't pass as they are:\n{unchanged.output[-6000:]}")
    print(f"{len(chosen)} protections; with all of them the tests pass in {unchanged.seconds:.0f} s", flush=True)
    lines, failures = [], 0
    for number, protection in enumerate(chosen, 1):
        try:
            line = cells(protection, check(copy, protection))
        except Failure as failure:
            failures += 1
            print(f"{number:2} NOT MISSED: {protection.name}: {failure}", flush=True)
            continue
        lines.append(line)
        row, name, test, said, seconds = line
        print(f"{number:2} {row}\n   without: {name}\n   {test} fails in {seconds} s: {said}", flush=True)
    print(f"{len(lines)} of {len(chosen)} protections are missed when removed; {time.monotonic() - started:.0f} s")
    if file is not None and not failures:
        file.write_text(markdown(lines))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
