"""The feature cache: the rows that belong together, whatever file they are in, and more than Arrow sorts at once."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pukd_ray.run.folder import RunFolder
from pukd_ray.selection.features import LABELS, Features, load_features

VIEWS = 3


def write_cache(
    folder: RunFolder, rows: int, width: int, files: int, *, pixels: int = 0, kind: pa.DataType | None = None
) -> list[str]:
    """Rows i with features i, i + 1/4 in view v of P; every third is of P, some unreadable, shuffled over the files."""
    kind = kind or pa.large_binary()
    shuffled = np.random.default_rng(0).permutation(rows)
    names = []
    for number, part in enumerate(np.array_split(shuffled, files)):
        columns: dict[str, list[object]] = {name: [] for name in ("role", "unit", "source_row", "image_id", "error")}
        data, shown = [], []
        for i in part.tolist():
            is_p, readable = i % 3 == 0, i % 10 != 9
            columns["role"].append("positives" if is_p else "corpus")
            columns["unit"].append("p" if is_p else LABELS if i % 7 == 0 else f"u{i % 2}")
            columns["source_row"].append(i)
            columns["image_id"].append(str(i))
            columns["error"].append(None if readable else "corrupt: x")
            of_views = [np.full(width, i % 1000 + v / 4, np.float16) for v in range(VIEWS if is_p else 1)]
            data.append(np.concatenate(of_views).tobytes() if readable else None)
            shown.append(bytes([i % 256]) * pixels * len(of_views) if readable and pixels else None)
        table = pa.table(
            columns, schema=pa.schema([(n, pa.int64() if n == "source_row" else pa.string()) for n in columns])
        )
        table = table.append_column("features", pa.array(data, kind)).append_column("pixels", pa.array(shown, kind))
        table = table.append_column("label", pa.array([str(i % 5) for i in part]))
        table = table.append_column("teacher_label", pa.array(part % 5, pa.int32()))
        table = table.append_column("relevant", pa.array([bool(i % 2) for i in part]))
        names.append(f"selector/features/{number}.parquet")
        folder.write_table(names[-1], table)
    return names


def check(found: Features, rows: int, width: int) -> None:
    readable = [i for i in range(rows) if i % 10 != 9]
    p = [i for i in readable if i % 3 == 0]
    known = [i for i in readable if i % 3 and i % 7 == 0]
    u = [i for unit in range(2) for i in readable if i % 3 and i % 7 and i % 2 == unit]
    assert found.p.shape == (len(p), VIEWS, width)
    assert found.p_rows.tolist() == p
    for v in range(VIEWS):
        assert np.array_equal(found.p[:, v, 0], np.float16([i % 1000 + v / 4 for i in p]))
        assert np.array_equal(found.p[:, v, -1], found.p[:, v, 0])
    assert np.array_equal(found.u[:, -1], np.float16([i % 1000 for i in u]))
    assert found.known is not None
    assert np.array_equal(found.known[:, 0], np.float16([i % 1000 for i in known]))
    assert found.p_labels.tolist() == [i % 5 for i in p]
    assert found.u_teacher.tolist() == [i % 5 for i in u]
    assert found.u_relevant.tolist() == [i % 2 for i in u]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])  # the first: of runs before this version
@pytest.mark.parametrize("pixels", [0, 12])
def test_rows_are_sorted_and_kept_together(tmp_path: Path, pixels: int, kind: pa.DataType) -> None:
    folder = RunFolder(str(tmp_path / "run"))
    found = load_features(folder, write_cache(folder, 200, 8, 7, pixels=pixels, kind=kind))
    check(found, 200, 8)
    if not pixels:
        assert found.p_pixels is found.u_pixels is found.known_pixels is None
        return
    assert found.p_pixels is not None
    assert found.u_pixels is not None
    assert found.p_pixels[:, 1, 5].tolist() == found.p_rows.tolist()
    assert found.u_pixels[:, 3].tolist() == [int(x) for x in found.u[:, 0]]


@pytest.mark.slow
def test_more_than_two_gibibytes(tmp_path: Path) -> None:
    """1,000 classes x 20 P with 8 views of 2,048 channels are 0.65 GB in float16; here 2.4 GB."""
    folder = RunFolder(str(tmp_path / "run"))
    check(load_features(folder, write_cache(folder, 3600, 200_000, 4)), 3600, 200_000)
