"""Listing: a configured source -> its files, in one fixed order."""

from __future__ import annotations

import errno
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow.fs as pafs

from pukd_ray.config import ConfigError, RunConfig, SourceConfig
from pukd_ray.corpus.files import SourceFile, glob_pattern, leads_out
from pukd_ray.corpus.formats import FORMATS
from pukd_ray.corpus.huggingface import CARD, choose_split, front_matter
from pukd_ray.corpus.rows import safe_text
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
    return PurePosixPath(name).name.lower()


def _split_glob(uri: str) -> tuple[str, str | None]:
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


def _hidden(relative: str, pattern: str | None) -> bool:
    """Hidden files and writers' leftovers (`_SUCCESS`, `_temporary/`), by the lakes' convention."""
    if pattern is not None and re.search(r"(^|/)[._]", pattern):
        return False  # asked for
    *folders, name = relative.split("/")
    # Cameras write `_DSC0001.JPG`: a file with a leading underscore goes by its type.
    leftover = name.startswith("_") and format_of(name) is None
    return name.startswith(".") or leftover or any(folder.startswith((".", "_")) for folder in folders)


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


def _files_below(fs: pafs.FileSystem, folder: str, deep: bool, *, local: bool, follow: bool) -> list[_Found]:
    """All files of a folder, sorted by path."""
    if not local:
        return [_Found(i.path, i.size or 0, _stamp(i)) for i in list_files(fs, folder, recursive=deep)]
    return sorted(_local_files(folder, deep, (), follow), key=lambda found: found.path)


def _local_files(folder: str, deep: bool, above: tuple[str, ...], follow: bool) -> Iterator[_Found]:
    """What Arrow leaves out too (links that lead nowhere) or cannot list at all (names that are no UTF-8)."""
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder above
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            path = safe_text(entry.path) if not entry.path.isprintable() else entry.path
            try:
                if not follow and (target := leads_out(entry.path, above[0] if above else real)):
                    if deep or not entry.is_dir():
                        yield _Found(path, 0, "", target)
                elif entry.is_dir():
                    if deep:
                        yield from _local_files(entry.path, deep, (*above, real), follow)
                elif entry.is_file():
                    facts = entry.stat()
                    yield _Found(path, facts.st_size, str(facts.st_mtime_ns) if path == entry.path else "")
                elif entry.is_symlink():
                    yield _Found(path, 0, "")
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                yield _Found(path, 0, "")  # a link that leads to itself


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


def _of_split(infos: list[_Found], root: str, fs: pafs.FileSystem, split: str | None, key: str) -> list[_Found]:
    """The files of one split, if a folder is a data set of Hugging Face or `split` says so; else all."""
    readme = next((item.path for item in infos if item.path == f"{root}/{CARD}"), None)
    card = front_matter(read_bytes(fs, readme).decode(errors="replace")) if readme else None
    if card is None and split is None:
        return infos
    relative = {item.path[len(root) :].lstrip("/"): item for item in infos}
    data = [name for name in relative if not _hidden(name, None) and format_of(name) is not None]
    return [relative[name] for name in choose_split(card or {}, data, split, key)]


def check_reachable(uris: Sequence[str], key: str) -> list[str]:
    """Faults that show without listing: storage that cannot be opened, a path that does not exist."""
    faults = []
    for uri in dict.fromkeys(each for given in uris for each in expand_braces([given])[:: MANY_SIBLINGS**3]):
        base, pattern = _split_glob(uri)
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


def list_source(source: SourceConfig, key: str) -> tuple[str, list[SourceFile], Counter[str]]:
    """All files of `source`: (format, files in (uri, path) order, suffixes of files left out with counts).

    Raises ConfigError naming `key` when nothing is found or the format cannot be told.
    """
    found: dict[str, SourceFile] = {}
    uris = expand_braces(source.uris)
    siblings = Counter(uri.rpartition("/")[0] for uri in uris)
    listed: dict[str, dict[str, pafs.FileInfo]] = {}
    missing = []
    links: dict[str, str] = {}
    for uri in uris:
        base, pattern = _split_glob(uri)
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
        if info.type == pafs.FileType.File:
            infos, root = [_Found(info.path, info.size or 0, _stamp(info))], folder
        else:
            deep = pattern is None or "/" in pattern or "**" in pattern
            infos = _files_below(fs, path, deep, local=is_local(uri), follow=source.follow_links)
            root = path
        glob = None if pattern is None else glob_pattern(pattern)
        if pattern is None and info.type != pafs.FileType.File:
            infos = _of_split(list(infos), root, fs, source.split, key)
        for item in infos:
            relative = item.path[len(root) :].lstrip("/")
            if item.leads_to and not _hidden(relative, pattern):
                links[item.path] = item.leads_to
            if glob is not None and not glob.fullmatch(relative):
                continue
            if info.type != pafs.FileType.File and _hidden(relative, pattern):
                continue
            if is_local(uri):
                full = item.path
            elif info.type == pafs.FileType.File:
                full = base
            else:
                full = f"{scheme}{base_path.rstrip('/')}/{relative}{query}"
            found.setdefault(full, SourceFile(full, relative, item.size, item.mtime))
    if missing and found:
        more = f" (and {len(missing) - 1:,} more)" if missing[1:] else ""
        raise ConfigError([f"{key}.uri: no such file or folder: {missing[0]}{more}"])
    kinds: Counter[str] = Counter(kind for f in found.values() if (kind := format_of(f.relative)))
    format_name: str = source.format
    if format_name == "auto" and len(kinds) == 1:
        format_name = kinds.most_common(1)[0][0]
    elif format_name == "auto" and not kinds:
        what = f"{len(found)} files of no known format" if found else "no files"
        raise ConfigError([f"{key}.uri: {what} under {', '.join(source.uris)}"])
    elif format_name == "auto":
        mix = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())
        raise ConfigError([f"{key}.format: {', '.join(source.uris)} holds several formats ({mix}): name one"])
    files = [f for f in found.values() if format_of(f.relative) == format_name]
    form = FORMATS[format_name]
    # Files of other names belong to it if the config names it; single images, if all of them have such names.
    if source.format != "auto" and not (files and form.single_images):
        files = [
            f
            for f in found.values()
            if (kind := format_of(f.relative)) == format_name or (kind is None and form.any_name(_base(f.relative)))
        ]
    if not files:
        raise ConfigError([f"{key}.uri: no {format_name} files under {', '.join(source.uris)}"])
    chosen = {f.uri for f in files}
    _refuse_links({link: to for link, to in links.items() if link in chosen or Path(to).is_dir()}, key)
    left_out = Counter(
        PurePosixPath(f.relative).suffix.lower() or PurePosixPath(f.relative).name
        for f in found.values()
        if f.uri not in chosen and not FORMATS[format_name].side_file(_base(f.relative))
    )
    return format_name, files, left_out
