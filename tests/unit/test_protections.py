"""Protections: each code that ``scripts/protections`` removes is there exactly once, and each of its tests exists."""

from __future__ import annotations

import pytest

from scripts.faults.protections import PROTECTIONS, ROOT, Protection


@pytest.mark.parametrize("protection", PROTECTIONS, ids=lambda protection: protection.name)
def test_protection_can_be_removed_and_has_its_test(protection: Protection) -> None:
    assert (ROOT / protection.file).read_text().count(protection.old) == 1
    file, _, name = protection.test.partition("::")
    assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text()
