"""Listing: a configured source -> its files, in one fixed order."""

from __future__ import annotations

import errno
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from pukd_ray.config import ConfigError, RunConfig, SourceConfig
from pukd_ray.corpus.files import SourceFile, glob_pattern, leads_out
from pukd_ray.corpus.formats import FORMATS
from pukd_ray.corpus.huggingface import CARD, choose_split, front_matter
from pukd_ray.corpus.rows import safe_text
from pukd_ray.corpus.tables import pieces, spool, spool_rows
from pukd_ray.storage import is_local, list_files, local_path, open_storage, read_bytes, split_uri


def sources_by_role(config: RunConfig) -> dict[str, tuple[SourceConfig, ...]]:
    """Sources of each role that the config has."""
    roles = {"positives": config.positives, "corpus": config.corpus, "test": config.test}
    return {role: sources for role, sources in roles.items() if sources is not None}


def format_of(name: str) -> str | None:
    """Format that a file name stands for, or None."""
    base = _base(name)
    return next((each.name for each in FORMATS.values() if each.claims(base)), None)


def _base(name: str) -> str:
    return name.rpartition("/")[2].lower()


def split_glob(uri: str) -> tuple[str, str | None]:
    """(folder without wildcards, pattern below it or None)."""
    scheme, path, query = split_uri(uri)
    parts = path.split("/")
    first = next((i for i, part in enumerate(parts) if re.search(r"[*?\[]", part)), None)
    if first is None or (is_local(uri) and Path(path).exists()):  # a file may be called `a[1].jpg`
        return uri, None
    base = "/".join(parts[:first]) or ("/" if path.startswith("/") else ".")
    return f"{scheme}{base}{query}", "/".join(parts[first:])


_BRACES = re.compile(r"\{([^{}]*,[^{}]*|\d+\.\.\d+)\}")
MANY_SIBLINGS = 8
"""From so many files of one folder on, the folder is listed instead of asking for each."""
LISTED_AT_ONCE = 16
"""Folders of remote storage, each with all that is below it."""


def expand_braces(uris: Sequence[str]) -> list[str]:
    """`a-{00..19}.tar` and `{a,b}/x` as all that they stand for, unless there is a local file of that very name."""
    expanded = []
    for uri in uris:
        match = None if is_local(uri) and local_path(uri).exists() else _BRACES.search(uri)
        if match is None:
            expanded.append(uri)
            continue
        first, dots, last = match[1].partition("..")
        if dots:
            names: Sequence[str] = [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
        else:
            names = match[1].split(",")
        expanded += expand_braces([uri[: match.start()] + name + uri[match.end() :] for name in names])
    return expanded


_ASKS_FOR_HIDDEN = re.compile(r"(^|/)[._]")


def _hidden(relative: str, pattern: str | None) -> bool:
    """Hidden files and writers' leftovers (`_SUCCESS`, `_temporary/`), by the lakes' convention."""
    if pattern is not None and _ASKS_FOR_HIDDEN.search(pattern):
        return False
    *folders, name = relative.split("/")
    # Cameras write `_DSC0001.JPG`: a file with a leading underscore goes by its type.
    leftover = name.startswith("_") and format_of(name) is None
    return name.startswith(".") or leftover or any(folder.startswith((".", "_")) for folder in folders)


_LEFTOVERS = ("_temporary", "_delta_log", "__MACOSX")
"""Folders in which nobody misses an image."""


def _folder_missed(relative: str) -> str | None:
    """The folder, such as the class `_other`, for whose name alone a single image is hidden."""
    *folders, name = relative.split("/")
    kind = format_of(name)
    if kind is None or not FORMATS[kind].single_images or any(part.startswith(".") for part in (*folders, name)):
        return None
    at = next((i for i, folder in enumerate(folders) if folder.startswith("_")), None)
    return None if at is None or not {*_LEFTOVERS}.isdisjoint(folders) else "/".join(folders[: at + 1])


@dataclass(frozen=True)
class Files:
    """Files of a source, in order; however many there are, they take no memory."""

    table: pa.Table
    """`FOUND_SCHEMA`."""
    remarks: tuple[str, ...] = ()
    """What the user may not expect of this listing."""

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[SourceFile]:
        for piece in pieces(self.table.select(FOUND_SCHEMA.names[:4])):
            yield from map(SourceFile, *(column.to_pylist() for column in piece.columns))


FOUND_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("relative", pa.string()),
        ("size", pa.int64()),
        ("mtime", pa.string()),
        ("kind", pa.string()),  # format that the name stands for
        ("named", pa.bool_()),  # by a URI of its own
    ]
)


@dataclass
class _Unseen:
    """What a listing passes over."""

    links: dict[str, str] = field(default_factory=dict)
    """Those that lead out of a folder, and where to."""
    images: Counter[str] = field(default_factory=Counter)
    """By the path of the hidden folder that they are in."""
    asked_for: set[str] = field(default_factory=set)
    """Hidden folders that another URI reads."""
    unmatched: list[str] = field(default_factory=list)
    """Given URIs under which there is no file."""

    def remarks(self, key: str, single_images: bool) -> Iterator[str]:
        """For a source of single images, or another."""
        images = Counter({folder: n for folder, n in self.images.items() if folder not in self.asked_for})
        if images and single_images:
            ((first, n),) = images.most_common(1)
            rest, folders = images.total() - n, len(images) - 1
            more = f", and {rest:,} in {folders:,} more" if rest else ""
            yield (
                f"{key}: left out, images in folders whose names begin with _: {n:,} in {first}{more}; "
                "rename them if they are meant"
            )
        if self.unmatched:
            more = f" (and {len(self.unmatched) - 1:,} more)" if self.unmatched[1:] else ""
            yield f"{key}.uri: no files under {self.unmatched[0]}{more}, only under the others"


@dataclass(frozen=True)
class _Found:
    path: str
    size: int
    mtime: str
    """Empty where it cannot be looked at: a local link that leads nowhere, a local name that is no UTF-8."""
    leads_to: str = ""
    """Where a local link leads that leaves the folder and is not to be followed."""


def _stamp(info: pafs.FileInfo) -> str:
    return str(info.mtime_ns if info.mtime_ns is not None else "")


def _files_below(fs: pafs.FileSystem, folder: str, deep: bool, *, local: bool, follow: bool) -> Iterator[_Found]:
    """All files of a folder, sorted by path; no more than some folders of them are held at a time."""
    if local:
        yield from _local_files(folder, deep, (), follow)
    elif deep:
        yield from _remote_files(fs, folder)
    else:
        yield from map(_found, list_files(fs, folder, recursive=False))


def _found(info: pafs.FileInfo) -> _Found:
    return _Found(info.path, info.size or 0, _stamp(info))


def _remote_files(fs: pafs.FileSystem, folder: str) -> Iterator[_Found]:
    """By prefix, some at a time: the first folders on the way down that are enough of them."""
    files: list[pafs.FileInfo] = []
    endless: list[str] = []
    folders = [folder]
    with ThreadPoolExecutor(LISTED_AT_ONCE) as pool:
        while folders and len(folders) <= LISTED_AT_ONCE:
            below = list(zip(folders, pool.map(partial(_children, fs), folders), strict=True))
            folders = []
            for parent, infos in below:
                deeper = [info.path for info in infos if info.type == pafs.FileType.Directory]
                # Of a key with an empty part, `a//1.png`, Arrow gives `a` as a folder in `a`; all below `a` is right.
                if any(len(path.rstrip("/")) <= len(parent.rstrip("/")) for path in deeper):
                    endless.append(parent)
                    continue
                files += [info for info in infos if info.type == pafs.FileType.File]
                folders += deeper
        folders += endless
        # As all paths below a folder begin with its own and a slash, this is the order of all paths.
        order = sorted([*((info.path, info) for info in files), *((f"{path}/", None) for path in folders)], key=_first)
        listed = _listed(pool, fs, [path[:-1] for path, info in order if info is None])
        for _, info in order:
            yield from map(_found, [info] if info else next(listed))


def _listed(pool: ThreadPoolExecutor, fs: pafs.FileSystem, folders: list[str]) -> Iterator[list[pafs.FileInfo]]:
    """All that is below each."""
    for start in range(0, len(folders), LISTED_AT_ONCE):
        yield from pool.map(partial(list_files, fs), folders[start : start + LISTED_AT_ONCE])


def _children(fs: pafs.FileSystem, folder: str) -> list[pafs.FileInfo]:
    found: list[pafs.FileInfo] = fs.get_file_info(pafs.FileSelector(folder, allow_not_found=True))
    return found


_first = itemgetter(0)


def _local_files(folder: str, deep: bool, above: tuple[str, ...], follow: bool) -> Iterator[_Found]:
    """What Arrow leaves out too (links that lead nowhere) or cannot list at all (names that are no UTF-8)."""
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder above
        return
    children: list[tuple[str, os.DirEntry[str], str]] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            path = safe_text(entry.path) if not entry.path.isprintable() else entry.path
            outside = "" if follow or not entry.is_symlink() else leads_out(entry.path, above[0] if above else real)
            try:
                is_folder = entry.is_dir()
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                is_folder = False  # a link that leads to itself
            if deep or not is_folder:
                children.append((f"{path}/" if is_folder and not outside else path, entry, outside))
    for path, entry, outside in sorted(children, key=_first):
        if path.endswith("/"):
            yield from _local_files(entry.path, deep, (*above, real), follow)
            continue
        try:
            if outside:
                yield _Found(path, 0, "", outside)
            elif entry.is_file():
                facts = entry.stat()
                yield _Found(path, facts.st_size, str(facts.st_mtime_ns) if path == entry.path else "")
            elif entry.is_symlink():
                yield _Found(path, 0, "")
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            yield _Found(path, 0, "")


def _refuse_links(links: dict[str, str], key: str) -> None:
    """ConfigError if there are any: whoever fills a corpus would choose which files of this machine are read."""
    for link, target in links.items():
        more = f", and so do {len(links) - 1:,} more" if links.keys() - {link} else ""
        raise ConfigError(
            [
                f"{key}.uri: {link} is a link that leads out of the folder, to {target}{more}: set {key}.follow_links "
                "to true if that is meant, or remove it"
            ]
        )


def _card_of(fs: pafs.FileSystem, folder: str) -> Mapping[str, Any] | None:
    """What the README of a data set of Hugging Face says; None of other folders."""
    path = f"{folder}/{CARD}"
    if fs.get_file_info(path).type != pafs.FileType.File:
        return None
    return front_matter(read_bytes(fs, path).decode(errors="replace"))


def _of_split(infos: Iterable[_Found], root: str, card: Mapping[str, Any], split: str | None, key: str) -> list[_Found]:
    """The files of one split of a data set, which are few."""
    relative = {item.path[len(root) :].removeprefix("/"): item for item in infos}
    data = [name for name in relative if not _hidden(name, None) and format_of(name) is not None]
    return [relative[name] for name in choose_split(card, data, split, key)]


def check_reachable(uris: Sequence[str], key: str) -> list[str]:
    """Faults that show without listing: storage that cannot be opened, a path that does not exist."""
    faults = []
    for uri in dict.fromkeys(each for given in uris for each in expand_braces([given])[:: MANY_SIBLINGS**3]):
        base, pattern = split_glob(uri)
        try:
            fs, path = open_storage(base)
            info = fs.get_file_info(path)
        except (ValueError, OSError) as error:
            faults.append(f"{key}.uri: {uri} cannot be reached: {error}")
            continue
        if info.type == pafs.FileType.NotFound:
            what = "folder" if pattern else "file or folder"
            faults.append(f"{key}.uri: no such {what}: {base}")
    return faults


def list_source(source: SourceConfig, key: str) -> tuple[str, Files, Counter[str]]:
    """All files of `source`: (format, files in (uri, path) order, suffixes of files left out with counts).

    Raises ConfigError naming `key` when nothing is found or the format cannot be told.
    """
    unseen = _Unseen()
    found = spool_rows(_find(source, key, unseen), FOUND_SCHEMA)
    kinds = Counter[str]({kind: n for kind, n in _counted(found.column("kind")) if kind is not None})
    where = ", ".join(source.uris)
    format_name: str = source.format
    if format_name == "auto" and len(kinds) == 1:
        format_name = kinds.most_common(1)[0][0]
    elif format_name == "auto" and not kinds:
        what = f"{len(found)} files of no known format" if len(found) else "no files"
        raise ConfigError([f"{key}.uri: {what} under {where}"])
    elif format_name == "auto":
        mix = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
        raise ConfigError([f"{key}.format: {where} holds several formats ({mix}): name one"])
    form = FORMATS[format_name]
    # Files of other names belong to it if the config names it, and they are named too or all of them have such names.
    any_name = source.format != "auto" and not kinds[format_name]
    named_too = source.format != "auto" and not form.single_images
    left_out: Counter[str] = Counter()

    def chosen(piece: pa.Table) -> pa.Table:
        kind = piece.column("kind")
        mine = pc.equal(kind, format_name).fill_null(False).to_numpy(zero_copy_only=False).copy()
        others = np.flatnonzero(~mine)
        columns = (piece.column(c).take(others).to_pylist() for c in ("relative", "kind", "named"))
        for row, name, other, named in zip(others.tolist(), *columns, strict=True):
            if (any_name or (named_too and named)) and other is None and form.any_name(_base(name)):
                mine[row] = True
            elif not form.side_file(_base(name)):
                left_out[PurePosixPath(name).suffix.lower() or PurePosixPath(name).name] += 1
        return piece.filter(mine)

    files = found if kinds[format_name] == len(found) else spool(map(chosen, pieces(found)), FOUND_SCHEMA)
    if not len(files):
        raise ConfigError([f"{key}.uri: no {format_name} files under {where}"])
    links = unseen.links
    mine = files.column("uri").filter(pc.is_in(files.column("uri"), pa.array(links, pa.string()))).to_pylist()
    _refuse_links({link: to for link, to in links.items() if link in mine or Path(to).is_dir()}, key)
    return format_name, Files(files, tuple(unseen.remarks(key, form.single_images))), left_out


def _counted(column: pa.ChunkedArray) -> list[tuple[str | None, int]]:
    """(value, how often it is there), by its first place."""
    return [(each["values"], each["counts"]) for each in column.value_counts().to_pylist()]


def _find(source: SourceConfig, key: str, unseen: _Unseen) -> Iterator[tuple[str, str, int, str, str | None, bool]]:
    """Rows of `FOUND_SCHEMA` of all that its URIs name, none twice; fills `unseen`."""
    givens = [(given, uri) for given in source.uris for uri in expand_braces([given])]
    uris = [uri for _, uri in givens]
    siblings = Counter(uri.rpartition("/")[0] for uri in uris)
    listed: dict[str, dict[str, pafs.FileInfo]] = {}
    missing: list[str] = []
    several, some = len(uris) > 1, False
    seen: set[str] = set()
    matched: dict[str, bool] = dict.fromkeys(source.uris, False)
    for given, uri in givens:
        base, pattern = split_glob(uri)
        scheme, base_path, query = split_uri(base)
        fs, path = open_storage(base)
        folder = path.rpartition("/")[0]
        if pattern is None and siblings[uri.rpartition("/")[0]] > MANY_SIBLINGS:
            if folder not in listed:
                listed[folder] = {item.path: item for item in list_files(fs, folder, recursive=False)}
            info = listed[folder].get(path) or fs.get_file_info(path)
        else:
            info = fs.get_file_info(path)
        if info.type == pafs.FileType.NotFound and pattern is None:
            missing.append(base)
            continue
        infos: Iterable[_Found]
        is_file = info.type == pafs.FileType.File
        if source.split is not None and (is_file or pattern is not None):
            raise ConfigError(
                [f"{key}.split: needs the folder of a data set, and {uri} is a file or a pattern: name its folder"]
            )
        if is_file:
            infos, root = [_found(info)], folder
        else:
            deep = pattern is None or "/" in pattern or "**" in pattern
            infos = _files_below(fs, path, deep, local=is_local(uri), follow=source.follow_links)
            root = path
            unseen.asked_for.add(root)
            card = _card_of(fs, path) if pattern is None else None
            if card is not None or source.split is not None:
                infos = _of_split(infos, root, card or {}, source.split, key)
        glob = None if pattern is None else glob_pattern(pattern)
        asks = pattern is not None and _ASKS_FOR_HIDDEN.search(pattern) is not None
        for item in infos:
            relative = item.path[len(root) :].removeprefix("/")
            if item.leads_to and not _hidden(relative, pattern):
                unseen.links[item.path] = item.leads_to
            if glob is not None and not glob.fullmatch(relative):
                continue
            is_hidden = not is_file and _hidden(relative, pattern)
            if (is_hidden or asks) and (missed := _folder_missed(relative)) is not None:
                unseen.images[f"{root}/{missed}"] += is_hidden
                unseen.asked_for.update([f"{root}/{missed}"] if asks else [])
            if is_hidden:
                continue
            matched[given] = True
            if is_local(uri):
                full = item.path
            elif is_file:
                full = base
            else:
                full = f"{scheme}{base_path.rstrip('/')}/{relative}{query}"
            if several:
                if full in seen:
                    continue
                seen.add(full)
            some = True
            yield full, relative, item.size, item.mtime, format_of(relative), is_file
    unseen.unmatched += [given for given, is_matched in matched.items() if not is_matched]
    if missing and some:
        more = f" (and {len(missing) - 1:,} more)" if missing[1:] else ""
        raise ConfigError([f"{key}.uri: no such file or folder: {missing[0]}{more}"])
