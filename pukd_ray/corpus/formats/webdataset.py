"""Tars in the manner of webdataset: image members are rows, `.cls` and `.json` members of the same sample their labels.

A sample are neighbours of one key: the name up to its first dot or, where keys have dots themselves (`v1.0.jpg`,
`v1.0.cls`), up to its last. `image_column` chooses among the images of a key: an extension, or several with `;`
between.

A tar is read once, in blocks, while it is counted; its units then know where their samples are. So a single row costs
its sample; in a compressed tar, which has no places to go to, everything before it.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Any

import numpy as np

from pukd_ray.config import SourceConfig
from pukd_ray.corpus import units
from pukd_ray.corpus.faults import BROKEN, one_line, reason_of
from pukd_ray.corpus.files import IMAGE_BYTES, FileFacts, SourceFile, Spans, open_blocks, unpacked
from pukd_ray.corpus.formats.base import Format, every_name
from pukd_ray.corpus.pixels import IMAGE_EXTENSIONS
from pukd_ray.corpus.rows import (
    TEXT_CHARS,
    BadValueError,
    ImageRow,
    failed_rows,
    make_row,
    parse_json,
    parse_number,
    safe_text,
)
from pukd_ray.corpus.units import Unit, indexed_parts

HEADER_BYTES = 1 << 20
"""Longest header of a member that is read, such as a long name."""
SIDE_BYTES = 16 << 20
"""Longest `.json` that is read."""
SAMPLE_MEMBERS = 1000
"""Most members of one sample."""
_READ_WHOLE = (b"L", b"K", b"x", b"g", b"X")  # types of headers: long names and links, and pax's


def _claims(name: str) -> bool:
    return name.endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"))


class _Member(tarfile.TarInfo):
    """A header that is damaged, which tarfile takes for the end of the tar, or made to harm: an error."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Member:
        """The next member."""
        try:
            member = super().fromtarfile(tar)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"{error}") from None
        if member.size < 0:
            raise tarfile.ReadError("a negative size")
        return member

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _READ_WHOLE and not 0 <= self.size <= HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        member: tarfile.TarInfo = super()._proc_member(tar)  # type: ignore[misc]
        return member


@dataclass
class _Sample:
    """Neighbours in a tar that belong together."""

    key: str
    start: int
    """Place of its first header."""
    row: int
    """Of its first image."""
    stop: int = 0
    rows: int = 0
    """Images in it."""
    members: int = 0
    last: str = ""
    """Stem of the last member."""
    last_name: str = ""
    pictured: str = ""
    """Stem of the last image."""
    labelled: str = ""
    """Stem of the last side data."""
    keyed: bool = False
    """Whether there is side data of the key itself."""
    found: list[tuple[int, str, bytes | None, str | None, bool]] = field(default_factory=list)
    """(row, name, bytes, fault, whether its name is not the first of its kind) of the wanted images."""
    side: dict[str, bytes | BadValueError] = field(default_factory=dict)
    """Side data by name."""

    def ends_before(self, key: str, stem: str) -> bool:
        """Whether a member is of another sample."""
        # Where keys have dots, the first is no end of the key; an image and its own label are then a sample.
        whole = self.last == self.pictured == self.labelled != self.key and not self.keyed
        return key != self.key or (whole and stem != self.last) or self.members >= SAMPLE_MEMBERS


def _key_and_stem(name: str) -> tuple[str, str]:
    """A member's name up to the first and up to the last dot of its base name."""
    folder, slash, base = name.rpartition("/")
    first, last = base.find("."), base.rfind(".")
    return (name, name) if first < 0 else (f"{folder}{slash}{base[:first]}", f"{folder}{slash}{base[:last]}")


def _is_image(member: tarfile.TarInfo, chosen: Collection[str]) -> bool:
    name = PurePosixPath(member.name)
    if not (member.isfile() or _is_link(member)) or name.name.startswith("."):
        return False
    if chosen:
        key, stem = _key_and_stem(member.name)
        numbered = re.fullmatch(r"(\.[0-9]+)*", stem[len(key) :])  # a key with dots, not the name of a mask
        return member.name[len(stem if numbered else key) :].lower() in chosen
    return name.suffix.lower() in IMAGE_EXTENSIONS


def _is_link(member: tarfile.TarInfo) -> bool:
    return member.islnk() or member.issym()


def _chosen(source: SourceConfig) -> frozenset[str]:
    """Extensions that `image_column` names; none where it is left as it is."""
    if source.image_column == SourceConfig.image_column:
        return frozenset()
    return frozenset("." + each.strip().lower().lstrip(".") for each in source.image_column.split(";"))


def _open(handle: IO[bytes]) -> tarfile.TarFile:
    return tarfile.TarFile(fileobj=handle, mode="r", tarinfo=_Member, encoding="utf-8")


def _walk(
    tar: tarfile.TarFile,
    source: SourceConfig,
    row: int,
    wanted: Callable[[int], bool],
    repeats: Callable[[str, int], bool],
    *,
    images: bool,
    sides: bool = True,
) -> Iterator[_Sample]:
    """The samples of a tar, of which the first image is row `row`, up to its end or a broken place, which raises.

    Only wanted images are extracted, if `images`; and all side data, if `sides`.
    """
    chosen = _chosen(source)
    sample: _Sample | None = None
    failure: BaseException | None = None
    try:
        while (member := tar.next()) is not None:
            vars(tar)["members"] = []  # it would keep all of them
            key, stem = _key_and_stem(member.name)
            if sample is None or sample.ends_before(key, stem):
                if sample is not None:
                    sample.stop = member.offset
                    yield sample
                sample = _Sample(key, member.offset, row)
            sample.members += 1
            sample.last, sample.last_name = stem, member.name
            if _is_image(member, chosen):
                again = repeats(member.name, row)
                if wanted(row):
                    data, fault = _extract(tar, member) if images or _is_link(member) else (None, None)
                    sample.found.append((row, member.name, data, fault, again))
                sample.rows, sample.pictured, row = sample.rows + 1, stem, row + 1
            elif member.isfile() and member.name.lower().endswith((".cls", ".json")):
                sample.labelled, sample.keyed = stem, sample.keyed or stem == key
                if sides:
                    extension = member.name[len(stem) :].lower()
                    if member.size > (SIDE_BYTES if extension == ".json" else TEXT_CHARS):
                        data, fault = None, f"corrupt: its {extension} has {member.size:,} bytes"
                    else:
                        data, fault = _extract(tar, member)
                    sample.side[stem + extension] = BadValueError(fault) if data is None else data
    except BROKEN as error:
        failure = error
    if sample is not None:
        sample.stop = tar.offset
        yield sample
    if failure is not None:
        raise failure


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[bytes | None, str | None]:
    """(bytes of a member, None), or (None, reason)."""
    if _is_link(member):  # the member that it leads to may be anywhere in the tar, or in none
        option = "--hard-dereference" if member.islnk() else "-h"
        return None, f"unsupported: a link in a tar: make it with tar {option}"
    if member.size > IMAGE_BYTES:
        return None, f"too_large: {member.size:,} bytes, more than {IMAGE_BYTES >> 20} MiB"
    try:
        source = tar.extractfile(member)
        data = source.read() if source else b""
    except (tarfile.ReadError, EOFError) as error:
        return None, f"truncated: the tar ends within this member: {one_line(error)}"
    except BROKEN as error:
        return None, reason_of(error)
    if len(data) < member.size:
        return None, "truncated: the tar ends within this member"
    return data, None


def _measure(file: SourceFile, source: SourceConfig) -> FileFacts:
    """Walks the tar once."""
    parts: list[tuple[int, int]] = []
    indices: list[bytes] = []
    seen: set[str] = set()
    repeated: list[int] = []
    spans: list[tuple[int, int, int]] = []
    others: Counter[str] = Counter()
    note = None

    def repeats(name: str, row: int) -> bool:
        if name in seen:
            repeated.append(row)
        seen.add(name)
        return False

    def end_part() -> None:
        starts, stops, rows = np.array(spans, np.int64).reshape(-1, 3).T
        parts.append((int(rows.sum()), int(stops.max(initial=0) - starts.min(initial=0))))
        indices.append(Spans(starts, stops, rows).pack())
        spans.clear()

    rows = size = 0
    with open_blocks(file.uri) as handle:
        stream = unpacked(handle)
        packed = stream is not handle
        try:
            with _open(stream) as tar:
                for sample in _walk(tar, source, 0, lambda _: False, repeats, images=False, sides=False):
                    if not sample.rows:
                        others[PurePosixPath(safe_text(sample.last_name)).suffix or "no extension"] += 1
                        continue
                    stop = sample.stop if packed else min(sample.stop, file.size)
                    full = rows + sample.rows > units.UNIT_ROWS or size + stop - sample.start > units.UNIT_BYTES
                    if spans and full and not packed:
                        end_part()
                        rows = size = 0
                    spans.append((sample.start, stop, sample.rows))
                    rows, size = rows + sample.rows, size + stop - sample.start
            if _goes_on(stream):
                note = (
                    f"{file.uri} goes on behind its end of archive, after {sum(n for n, _ in parts) + rows} images, "
                    "and is read up to there: were tars joined? Keep them apart, or join them with tar --concatenate"
                )
        except BROKEN as error:
            if not spans and not parts:
                raise
            note = f"{file.uri} ends early, after {sum(n for n, _ in parts) + rows} images: {one_line(error)}"
    end_part()
    if len(parts) == 1:
        parts = [(parts[0][0], file.size)]
    if not seen and others:
        what = ", ".join(f"{n} {kind}" for kind, n in others.most_common(3))
        note = f"{file.uri} holds no images by the names of its members ({what}, ...)"
    return FileFacts(tuple(parts), note=note, indices=() if packed else tuple(indices), repeated=tuple(repeated))


def _goes_on(stream: IO[bytes]) -> bool:
    """Whether anything but zeros follows: of a tar that is followed by another, no reader takes more than the first."""
    while piece := stream.read(1 << 20):
        if piece.count(0) < len(piece):
            return True
    return False


def _read(unit: Unit, source: SourceConfig, positions: np.ndarray, images: bool) -> Iterator[ImageRow]:
    """Goes to the wanted samples; where the tar has no places to go to, on from its start."""
    read = _read_through if unit.index is None else _read_places
    return read(unit, source, unit.start + positions, images)


def _read_through(unit: Unit, source: SourceConfig, wanted: np.ndarray, images: bool) -> Iterator[ImageRow]:
    chosen, seen = frozenset(wanted.tolist()), set[str]()

    def repeats(name: str, row: int) -> bool:
        del row
        again = name in seen
        seen.add(name)
        return again

    done, failure = 0, None
    try:
        whole = int(wanted[-1]) == unit.start + unit.rows - 1
        with open_blocks(unit.files[0], whole=whole) as handle, _open(unpacked(handle)) as tar:
            for sample in _walk(tar, source, 0, chosen.__contains__, repeats, images=images):
                for row in _rows(unit, source, sample, images):
                    yield row
                    done += 1
                if done == len(wanted):
                    return
    except BROKEN as error:
        failure = reason_of(error)
    if failure:  # where the plan could read on; else it has told the user that this tar ends early
        yield from failed_rows(unit, wanted[done:].tolist(), failure)


def _read_places(unit: Unit, source: SourceConfig, wanted: np.ndarray, images: bool) -> Iterator[ImageRow]:
    assert unit.index is not None
    spans, chosen, repeated = Spans.unpack(unit.index), frozenset(wanted.tolist()), frozenset(unit.repeated)
    firsts = unit.group_start + np.cumsum(spans.rows) - spans.rows
    places = np.searchsorted(firsts, wanted, "right") - 1
    needed, run = np.unique(places), _runs(np.unique(places))
    done, failure = 0, None
    try:
        with open_blocks(unit.files[0], spans.starts[needed], spans.stops[needed]) as handle:
            while done < len(wanted):
                # As far as wanted samples follow each other they are walked in one go; what is broken ends that, and
                # the walk begins again behind the rows that came. A sample that gives none at its own place is lost.
                before, first = done, int(places[done])
                stop = int(spans.stops[run[np.searchsorted(needed, first)]])
                window: Any = _Window(handle, int(spans.starts[first]), stop)
                broken = "corrupt: not where it was when the tar was planned"
                try:
                    with _open(window) as tar:
                        low = int(wanted[done])
                        walk = _walk(
                            *(tar, source, int(firsts[first])),
                            wanted=lambda row, low=low: row >= low and row in chosen,  # type: ignore[misc]
                            repeats=lambda _, row: row in repeated,
                            images=images,
                        )
                        for sample in walk:
                            for row in _rows(unit, source, sample, images):
                                yield row
                                done += 1
                except BROKEN as error:
                    broken = reason_of(error)
                if done == before:
                    lost = wanted[done:][places[done:] == first]
                    yield from failed_rows(unit, lost.tolist(), broken)
                    done += len(lost)
    except BROKEN as error:
        failure = reason_of(error)
    if failure:
        yield from failed_rows(unit, wanted[done:].tolist(), failure)


def _runs(numbers: np.ndarray) -> np.ndarray:
    """The last of the consecutive numbers that each of `numbers` (rising) is among."""
    ends = np.r_[np.diff(numbers) > 1, True]
    last: np.ndarray = numbers[np.flatnonzero(ends)[np.cumsum(ends) - ends]]
    return last


class _Window(io.RawIOBase):
    """Bytes [start, stop) of a file as a file."""

    def __init__(self, handle: IO[bytes], start: int, stop: int) -> None:
        super().__init__()
        self._handle, self._start, self._stop = handle, start, stop
        handle.seek(start)

    def read(self, size: int | None = -1, /) -> bytes:
        rest = max(0, self._stop - self._handle.tell())
        return self._handle.read(rest if size is None or size < 0 else min(size, rest))

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        assert whence == io.SEEK_SET
        return self._handle.seek(self._start + offset) - self._start

    def tell(self) -> int:
        return self._handle.tell() - self._start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def _rows(unit: Unit, source: SourceConfig, sample: _Sample, images: bool) -> Iterator[ImageRow]:
    """The wanted rows of a sample, with their labels."""
    for row, member, data, fault, again in sample.found:
        name = f"{unit.ids[0]}#{safe_text(member)}"
        label, truth = _label(sample, _key_and_stem(member)[1], source)
        if data == b"":
            label = None if isinstance(label, BadValueError) else label  # empty: the first of several reasons
        duplicate = f"{safe_text(member)} is in this tar twice" if again else None
        name = f"{name}#{row}" if again else name
        yield make_row(
            *(unit, row, data), images=images, name=name, label=label, truth=truth, duplicate=duplicate, error=fault
        )


def _label(sample: _Sample, stem: str, source: SourceConfig) -> tuple[Any, Any]:
    """(label or BadValueError, truth) of the image whose name begins with `stem`."""
    label = truth = None
    try:
        if (text := _side(sample, stem, ".cls")) is not None:
            label = parse_number(text.decode(errors="surrogateescape").strip())
        if (text := _side(sample, stem, ".json")) is not None:
            values = parse_json(text, "its .json is no JSON")
            if isinstance(values, dict):
                said = values.get(source.label_column or "label")
                label = label if said is None else said
                truth = values.get(source.relevant_column) if source.relevant_column else None
        if isinstance(label, dict | list):
            raise BadValueError("corrupt: the label is an object or a list")
    except BadValueError as fault:
        return fault, truth
    return label, truth


def _side(sample: _Sample, stem: str, extension: str) -> bytes | None:
    """Side data of the image itself, else of its key."""
    data = sample.side.get(stem + extension, sample.side.get(sample.key + extension))
    if isinstance(data, BadValueError):
        raise data
    return data


WEBDATASET = Format(
    name="webdataset",
    claims=_claims,
    measure=_measure,
    cut=indexed_parts,
    read=_read,
    row_addressable=True,
    read_to_count=True,
    counts_links=True,
    any_name=every_name,
)
"""A row costs its sample; in a compressed tar, everything before it."""
