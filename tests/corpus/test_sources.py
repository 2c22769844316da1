"""Listing: which files a source has, in which order, and what is said about the others."""

from collections import Counter
from pathlib import Path

import boto3
import pytest
from s3_server import serve_bucket
from small_files import PNG, units_of

from pukd_ray.config import ConfigError, SourceConfig
from pukd_ray.corpus.listing import list_inputs
from pukd_ray.corpus.reading import read_rows
from pukd_ray.corpus.sources import check_reachable, format_of, list_source
from pukd_ray.storage import open_storage, read_bytes


def make(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def relatives(uri: str | list[str], **more: object) -> list[str]:
    return [f.relative for f in list_source(SourceConfig(uri=uri, **more), "corpus")[1]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/B.PARQUET", "parquet"),
        ("a.pq", "parquet"),
        ("a.tar", "webdataset"),
        ("a.tar.gz", "webdataset"),
        ("a.tgz", "webdataset"),
        ("train-images-idx3-ubyte.gz", "idx"),
        ("t10k-images.idx3-ubyte", "idx"),
        ("train-labels-idx1-ubyte", None),
        ("data_batch_1.bin", "cifar"),
        ("x.JPeG", "images"),
        ("x.heic", "images"),
        ("x.txt", None),
        ("README", None),
    ],
)
def test_the_format_goes_by_the_name(name: str, expected: str | None) -> None:
    assert format_of(name) == expected


def test_a_folder_is_listed_in_path_order_and_other_files_are_counted(tmp_path: Path) -> None:
    make(tmp_path, "b/2.png", "a/1.jpg", "a/10.jpg", "3.JPG", "notes.txt", "a/more.TXT", "LICENSE")
    format_name, files, left_out = list_source(SourceConfig(uri=str(tmp_path)), "corpus")
    assert format_name == "images"
    assert [f.relative for f in files] == ["3.JPG", "a/1.jpg", "a/10.jpg", "b/2.png"]
    assert [f.uri for f in files] == [str(tmp_path / f.relative) for f in files]
    assert [f.size for f in files] == [5, 7, 8, 7]
    assert [int(f.mtime) for f in files] == [Path(f.uri).stat().st_mtime_ns for f in files]
    assert left_out == Counter({".txt": 2, "LICENSE": 1})


def test_hidden_files_and_leftovers_are_no_part_of_a_folder_but_camera_names_are(tmp_path: Path) -> None:
    make(tmp_path, ".trash/1.jpg", "._2.jpg", "_temporary/3.jpg", "_SUCCESS", "_DSC0001.JPG", "4.jpg")
    _, files, left_out = list_source(SourceConfig(uri=str(tmp_path)), "corpus")
    assert [f.relative for f in files] == ["4.jpg", "_DSC0001.JPG"]
    assert left_out == Counter()
    assert relatives(f"{tmp_path}/**/*.jpg") == ["4.jpg"]
    assert relatives(f"{tmp_path}/_temporary/*.jpg") == ["3.jpg"]
    assert relatives(f"{tmp_path}/**/_temp*/*") == ["_temporary/3.jpg"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["1.jpg", "12.jpg"]),
        ("?.jpg", ["1.jpg"]),
        ("[2-9].png", ["3.png"]),
        ("[!3].png", ["1.png"]),
        ("**/*.jpg", ["1.jpg", "12.jpg", "a/2.jpg", "a/b/c/4.jpg"]),
        ("a/**", ["2.jpg", "b/c/4.jpg"]),
        ("**/[ab]/*.jpg", ["a/2.jpg"]),
        ("a/b/*/4.jpg", ["c/4.jpg"]),
        ("*/b/*/4.jpg", ["a/b/c/4.jpg"]),
        ("1+.jpg", None),
    ],
)
def test_globs(tmp_path: Path, pattern: str, expected: list[str] | None) -> None:
    make(tmp_path, "1.jpg", "12.jpg", "1.png", "3.png", "a/2.jpg", "a/b/c/4.jpg")
    if expected is None:
        with pytest.raises(ConfigError) as caught:
            relatives(f"{tmp_path}/{pattern}")
        assert caught.value.faults == [f"corpus.uri: no files under {tmp_path}/{pattern}"]
    else:
        assert relatives(f"{tmp_path}/{pattern}") == expected


def test_a_name_with_brackets_is_a_file_if_there_is_one(tmp_path: Path) -> None:
    make(tmp_path, "a[1]/x.jpg", "a1/y.jpg")
    assert relatives(f"{tmp_path}/a[1]") == ["x.jpg"]
    assert relatives(f"{tmp_path}/a[1]/x.jpg") == ["x.jpg"]
    assert relatives(f"{tmp_path}/a[1]*/*.jpg") == ["a1/y.jpg"]


def test_a_single_file_and_a_list_keep_the_order_of_the_uris_and_count_no_file_twice(tmp_path: Path) -> None:
    make(tmp_path, "z.jpg", "a/1.jpg", "a/2.jpg")
    assert relatives(str(tmp_path / "z.jpg")) == ["z.jpg"]
    uris = [str(tmp_path / "z.jpg"), str(tmp_path / "a"), f"{tmp_path}/a/*.jpg", f"file://{tmp_path}/a/2.jpg"]
    files = list_source(SourceConfig(uri=uris), "corpus")[1]
    assert [(f.uri, f.relative) for f in files] == [
        (f"{tmp_path}/z.jpg", "z.jpg"),
        (f"{tmp_path}/a/1.jpg", "1.jpg"),
        (f"{tmp_path}/a/2.jpg", "2.jpg"),
    ]


@pytest.mark.parametrize("scheme", ["file://", "local://"])
def test_uris_of_local_files(tmp_path: Path, scheme: str) -> None:
    make(tmp_path, "a b/1.jpg", "a b/50%.jpg")
    for uri in (f"{scheme}{tmp_path}", f"{scheme}{tmp_path}/", f"{scheme}{tmp_path}/**/*.jpg"):
        files = list_source(SourceConfig(uri=uri), "corpus")[1]
        assert [f.relative for f in files] == ["a b/1.jpg", "a b/50%.jpg"]
        assert [read_bytes(*open_storage(f.uri)) for f in files] == [b"a b/1.jpg", b"a b/50%.jpg"]
        assert [f.size for f in files] == [9, 11]
    assert relatives(f"{scheme}{tmp_path}/a b/1.jpg") == ["1.jpg"]
    assert check_reachable([f"{scheme}{tmp_path}/a b", f"{scheme}{tmp_path}/none"], "test") == [
        f"test.uri: no such file or folder: {scheme}{tmp_path}/none"
    ]


def test_labels_of_idx_files_are_not_reported_as_left_out(tmp_path: Path) -> None:
    make(tmp_path, "train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz", "readme.md")
    format_name, files, left_out = list_source(SourceConfig(uri=str(tmp_path)), "corpus")
    assert (format_name, [f.relative for f in files]) == ("idx", ["train-images-idx3-ubyte.gz"])
    assert left_out == Counter({".md": 1})


def test_several_formats_need_a_name(tmp_path: Path) -> None:
    make(tmp_path, "1.jpg", "2.jpg", "t.parquet", "shard-000")
    with pytest.raises(ConfigError) as caught:
        relatives(str(tmp_path))
    assert caught.value.faults == [
        f"corpus.format: {tmp_path} holds several formats (2 images, 1 parquet): name one",
    ]
    assert relatives(str(tmp_path), format="images") == ["1.jpg", "2.jpg"]
    assert relatives(str(tmp_path), format="parquet") == ["t.parquet"]


@pytest.mark.parametrize(
    ("form", "name"), [("parquet", "00000.parquet"), ("webdataset", "00000.tar"), ("cifar", "data_batch_1.bin")]
)
def test_files_of_unusual_names_are_read_where_no_file_has_one_of_the_format(
    tmp_path: Path, form: str, name: str
) -> None:
    """As img2dataset, Hadoop and people leave them beside the data."""
    others = ["00000_stats.json", "README.md", "data_$folder$", "shard-000", "stats.csv"]
    make(tmp_path, name, *others)
    for uri in (str(tmp_path), f"{tmp_path}/*"):
        _, files, left_out = list_source(SourceConfig(uri=uri, format=form), "corpus")
        assert [f.relative for f in files] == [name]
        assert left_out == Counter({".json": 1, ".md": 1, "data_$folder$": 1, "shard-000": 1, ".csv": 1})
    # Named one by one they are meant.
    assert relatives([f"{tmp_path}/{name}", f"{tmp_path}/shard-000"], format=form) == [name, "shard-000"]
    (tmp_path / name).unlink()
    assert relatives(str(tmp_path), format=form) == others


def test_nothing_found_is_a_fault_of_the_key(tmp_path: Path) -> None:
    def faults(**more: object) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            list_source(SourceConfig(uri=str(tmp_path), **more), "positives.1")
        return caught.value.faults

    assert faults() == [f"positives.1.uri: no files under {tmp_path}"]
    make(tmp_path, "a.txt", "b.txt")
    assert faults() == [f"positives.1.uri: 2 files of no known format under {tmp_path}"]
    assert faults(format="images") == [f"positives.1.uri: no images files under {tmp_path}"]


def test_links_that_lead_out_of_the_folder_are_followed_only_if_that_is_meant(tmp_path: Path) -> None:
    lake, outside = tmp_path / "lake", tmp_path / "outside"
    for file in (lake / "a.png", lake / "more" / "b.png", outside / "c.png", outside / "notes.txt"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
    (lake / "inside.png").symlink_to("more/b.png")
    (lake / "notes.txt").symlink_to(outside / "notes.txt")  # not taken anyway

    def names(uri: Path = lake, **more: object) -> list[str]:
        return relatives(str(uri), **more)

    assert names() == ["a.png", "inside.png", "more/b.png"]
    (lake / "c.png").symlink_to(outside / "c.png")
    for uri in (lake, lake / "*.png"):
        with pytest.raises(ConfigError) as caught:
            names(uri)
        assert caught.value.faults == [
            f"corpus.uri: {lake}/c.png is a link that leads out of the folder, to {outside}/c.png: set "
            "corpus.follow_links to true if that is meant, or remove it"
        ]
    assert names(follow_links=True) == ["a.png", "c.png", "inside.png", "more/b.png"]
    assert names(lake / "c.png") == ["c.png"]  # by its own name
    (lake / "c.png").unlink()
    (lake / "deep").symlink_to(outside)
    with pytest.raises(ConfigError, match=rf"{lake}/deep is a link that leads out of the folder, to {outside}: set"):
        names()
    assert names(lake / "*.png") == ["a.png", "inside.png"]
    assert names(follow_links=True) == ["a.png", "deep/c.png", "inside.png", "more/b.png"]
    (tmp_path / "also").symlink_to(lake)
    (lake / "deep").unlink()
    assert names(tmp_path / "also") == ["a.png", "inside.png", "more/b.png"]


def remarks(uri: str | list[str], **more: object) -> tuple[str, ...]:
    return list_inputs({"corpus": (SourceConfig(uri=uri, **more),)}).remarks


def test_images_in_folders_that_are_hidden_by_an_underscore_are_told(tmp_path: Path) -> None:
    make(tmp_path, "cat/1.png", "_temporary/0/2.png", "__MACOSX/3.png", "_delta_log/4.png", ".git/_x/5.png", "_SUCCESS")
    make(tmp_path, "_notes/a.txt", "_other/._6.png", "_other/.cache/7.png")
    assert remarks(str(tmp_path)) == ()
    make(tmp_path, "_other/1.png", "_other/deep/2.jpg")
    told = f"corpus: left out, images in folders whose names begin with _: 2 in {tmp_path}/_other"
    assert remarks(str(tmp_path)) == (f"{told}; rename them if they are meant",)
    make(tmp_path, "a/_b/1.png", "_c/2.png")
    assert remarks(str(tmp_path)) == (f"{told}, and 2 in 2 more; rename them if they are meant",)
    assert relatives(str(tmp_path)) == ["cat/1.png"]
    told = f"corpus: left out, images in folders whose names begin with _: 1 in {tmp_path}/a/_b"
    for more in ("_*/**/*", "_*/**"):
        assert remarks([str(tmp_path), f"{tmp_path}/{more}"])[-1] == f"{told}; rename them if they are meant"
    assert "_other" not in remarks([str(tmp_path), f"{tmp_path}/_other"])[-1]
    assert remarks(f"{tmp_path}/ca*/*.png") == remarks(f"{tmp_path}/cat") == ()
    make(tmp_path, "a.parquet")
    assert remarks(str(tmp_path), format="parquet") == ("corpus: left out, not parquet by name: 1 .png",)


def test_a_given_uri_under_which_there_is_no_file_is_told(tmp_path: Path) -> None:
    make(tmp_path, "a/1.png", "b/1.jpeg")
    (tmp_path / "c").mkdir()
    uris = [f"{tmp_path}/a/*.{{jpg,png}}", f"{tmp_path}/a", f"{tmp_path}/b/*.png", f"{tmp_path}/c"]
    assert remarks(uris[:2]) == remarks(uris[0]) == ()
    told = f"corpus.uri: no files under {tmp_path}/b/*.png"
    assert remarks(uris[:3]) == (f"{told}, only under the others",)
    assert remarks(uris) == (f"{told} (and 1 more), only under the others",)


@pytest.mark.timeout(60)
def test_keys_of_s3_with_an_empty_part_end_the_listing() -> None:
    with serve_bucket("odd"):
        keys = ["x/a//b.png", "x/a/c.png", "x/a/d/e.png", "x/f.png", "x/g///h.png", "y//1.png", "y/1.png", "z/a/"]
        for key in keys:
            boto3.client("s3").put_object(Bucket="odd", Key=key, Body=PNG[1])
        assert relatives("s3://odd/x") == [key[2:] for key in keys[:5]]
        assert relatives("s3://odd/x/**/*.png") == [key[2:] for key in keys[:5]]
        assert relatives("s3://odd/x/a") == ["/b.png", "c.png", "d/e.png"]
        source = SourceConfig(uri="s3://odd/y")
        rows = [row for unit in units_of(source) for row in read_rows(unit, source)]
        assert [(row.image_id, row.source, row.error) for row in rows] == [
            ("/1.png", "s3://odd/y//1.png", "io: an empty part (//) in the key: it cannot be asked for"),
            ("1.png", "s3://odd/y/1.png", None),
        ]


def test_unreachable_sources_are_named(tmp_path: Path) -> None:
    uris = [str(tmp_path), f"{tmp_path}/no/*.jpg", f"{tmp_path}/no", "nope://x/y"]
    assert check_reachable(uris, "corpus.2") == [
        f"corpus.2.uri: no such folder: {tmp_path}/no",
        f"corpus.2.uri: no such file or folder: {tmp_path}/no",
        "corpus.2.uri: nope://x/y cannot be reached: nope://x/y: Protocol not known: nope; name a path or a scheme "
        "that an installed library serves, such as s3://",
    ]
