"""The errors: one class catches all of them, and they survive pickling and copying with all their facts."""

from __future__ import annotations

import copy
import pickle

import pytest

import mpreader
from mpreader import ItemRange, PoolConfig, errors
from mpreader.errors import MpreaderError, TransportError, WorkerCrashed
from mpreader.ranges import plan_files

ALL = [getattr(errors, name) for name in errors.__all__]


def example(cls: type[MpreaderError]) -> MpreaderError:
    if issubclass(cls, TransportError):
        return cls("what happened", bucket="b", key="k/1", range=(5, 10), attempts=3)
    if issubclass(cls, WorkerCrashed):
        return cls("what happened", exitcode=-9, ranges=((0, 5), (7, 9)))
    return cls("what happened")


def test_errors_are_public_and_all_caught_by_one_class() -> None:
    for cls in ALL:
        assert getattr(mpreader, cls.__name__) is cls
        assert issubclass(cls, MpreaderError)


def test_wrong_arguments_are_value_errors_as_those_of_the_standard_library() -> None:
    with pytest.raises(ValueError, match="workers"):
        PoolConfig(workers=0)
    with pytest.raises(ValueError, match="part_bytes"):
        plan_files({"s3://b/k": [ItemRange(0, 10)]}, max_gap_bytes=0, part_bytes=0)


@pytest.mark.parametrize("cls", ALL)
def test_error_survives_with_all_its_facts(cls: type[MpreaderError]) -> None:
    error = example(cls)
    error.added_by_hand = "too"  # type: ignore[attr-defined]
    pickled = [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for twin in (*pickled, copy.copy(error)):
        assert type(twin) is cls
        assert str(twin) == "what happened"
        assert twin.args == error.args
        assert vars(twin) == vars(error)


def test_error_from_the_operating_system_family_has_a_plain_message() -> None:
    # OSError's own __str__ shows errno and file name when it has them; the message must not be lost to it.
    error = example(errors.ObjectMissing)
    assert isinstance(error, OSError)
    assert str(error) == "what happened"
    assert error.errno is None


@pytest.mark.parametrize("cls", ALL)
def test_error_tells_what_it_is_needed_for_and_keeps_its_facts(cls: type[MpreaderError]) -> None:
    error = example(cls)
    told = error.needed_for("layer.0")
    assert type(told) is cls
    assert str(told) == "what happened [needed for 'layer.0']"
    assert told.__dict__ == error.__dict__
    assert str(error) == "what happened"
