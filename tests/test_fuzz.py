"""The fuzzer: no changed file makes a reader raise anything but ValueError, and a reader that does is found."""

from __future__ import annotations

from pathlib import Path

import fuzz
import pytest

from lgm_dist.data import manifest as manifests


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_every_changed_file_is_read_or_refused(name: str, tmp_path: Path) -> None:
    assert fuzz.search(fuzz.TARGETS[name], 0.8, 1, tmp_path) > 5


def test_a_reader_that_trips_is_found_with_its_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trips(record: dict[str, object], *_: object) -> object:
        return record["no such field"]

    monkeypatch.setattr(manifests, "_field", trips)
    with pytest.raises(KeyError) as found:
        fuzz.search(fuzz.manifest, 5, 1, tmp_path)
    assert "manifest was given b'" in found.value.__notes__[0]


def test_a_seed_is_always_changed_alike() -> None:
    first, second = ([fuzz.mutate(b"seed" * 9, fuzz.random.Random(n)) for n in range(50)] for _ in range(2))
    assert first == second
    assert len(set(first)) > 45
