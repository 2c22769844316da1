"""The sample of the corpus that training sees."""

import numpy as np
import pytest

from pukd_ray.corpus.reading import ReadRequest
from pukd_ray.corpus.units import Unit
from pukd_ray.selection.sampling import sample_corpus


def unit(name: str, rows: int) -> Unit:
    return Unit(unit_id=name, role="corpus", source=0, format="idx", files=(name,), ids=(name,), start=0, rows=rows)


def drawn(wanted: list[ReadRequest]) -> dict[str, list[int]]:
    return {w.unit.unit_id: w.positions.tolist() for w in wanted if w.positions is not None}


def test_a_small_corpus_is_taken_whole() -> None:
    units = [unit("a", 60), unit("none", 0), unit("b", 40)]
    for size in (100, 5000):
        assert [(w.unit.unit_id, w.positions) for w in sample_corpus(units, size, 0)] == [("a", None), ("b", None)]


@pytest.mark.parametrize("size", [1, 63, 64, 1000, 9_999])
@pytest.mark.parametrize("rows", [[10_000], [1] * 20_000, [4096] * 50, [10] * 3000, [1, 5000, 7, 40_000, 0, 300]])
def test_the_sample_has_the_size_asked_for(rows: list[int], size: int) -> None:
    wanted = sample_corpus([unit(f"u{i}", n) for i, n in enumerate(rows)], size, 3)
    taken = drawn(wanted)
    assert sum(map(len, taken.values())) in (size - 1, size)
    assert len(taken) == len(wanted)
    for name, positions in taken.items():
        assert positions == sorted(set(positions))
        assert positions[0] >= 0
        assert positions[-1] < rows[int(name[1:])]


def test_it_depends_on_seed_and_names_but_not_on_their_order() -> None:
    units = [unit(f"u{i}", 500) for i in range(40)]
    first = drawn(sample_corpus(units, 1280, 0))
    assert len(first) == 20  # a unit is opened for no less than 64 rows
    assert drawn(sample_corpus(units[::-1], 1280, 0)) == first
    other = drawn(sample_corpus(units, 1280, 1))
    assert other.keys() != first.keys()
    both = other.keys() & first.keys()
    assert both
    assert all(other[name] != first[name] for name in both)


def test_units_are_sampled_in_proportion_to_their_rows() -> None:
    units = [unit(f"u{i}", n) for i, n in enumerate([1000, 2000, 3000, 4000])]
    counts = {name: len(rows) for name, rows in drawn(sample_corpus(units, 1000, 5)).items()}
    for name, expected in {"u0": 100, "u1": 200, "u2": 300, "u3": 400}.items():
        assert abs(counts[name] - expected) <= 1


def test_rows_are_drawn_evenly() -> None:
    hits = np.zeros(50)
    for seed in range(400):
        (rows,) = drawn(sample_corpus([unit("a", 50)], 10, seed)).values()
        hits[rows] += 1
    assert abs(hits.mean() - 80) < 1e-9
    assert hits.std() < 16  # binomial: 8
