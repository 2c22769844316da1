"""Listing: a configured source -> its files, in one fixed order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import pyarrow.fs as pafs

from pukd_ray.config import ConfigError, RunConfig, SourceConfig
from pukd_ray.corpus.files import SourceFile
from pukd_ray.corpus.formats import FORMATS
from pukd_ray.storage import is_local, list_files, open_storage, split_uri


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


def _pattern(glob: str) -> re.Pattern[str]:
    """Regular expression of a glob in which `*` stays within a folder and `**` crosses them."""
    forms = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    expression = ""
    for piece in re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^]/][^]/]*\])", glob):
        if re.fullmatch(r"\[.+\]", piece):
            expression += piece.replace("\\", r"\\").replace("[!", "[^", 1)
        else:
            expression += forms.get(piece) or re.escape(piece)
    return re.compile(expression)


def _hidden(relative: str, pattern: str | None) -> bool:
    """Hidden files and writers' leftovers (`_SUCCESS`, `_temporary/`), by the lakes' convention."""
    if pattern is not None and re.search(r"(^|/)[._]", pattern):
        return False  # asked for
    *folders, name = relative.split("/")
    # Cameras write `_DSC0001.JPG`: a file with a leading underscore goes by its type.
    leftover = name.startswith("_") and format_of(name) is None
    return name.startswith(".") or leftover or any(folder.startswith((".", "_")) for folder in folders)


def check_reachable(uris: Sequence[str], key: str) -> list[str]:
    """Faults that show without listing: storage that cannot be opened, a path that does not exist."""
    faults = []
    for uri in uris:
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
    for uri in source.uris:
        base, pattern = _split_glob(uri)
        scheme, base_path, query = split_uri(base)
        fs, path = open_storage(base)
        info = fs.get_file_info(path)
        if info.type == pafs.FileType.File:
            infos, root = [info], path.rpartition("/")[0]
        else:
            infos, root = list_files(fs, path, recursive=pattern is None or "/" in pattern or "**" in pattern), path
        form = None if pattern is None else _pattern(pattern)
        for item in infos:
            relative = item.path[len(root) :].lstrip("/")
            if form is not None and not form.fullmatch(relative):
                continue
            if info.type != pafs.FileType.File and _hidden(relative, pattern):
                continue
            if is_local(uri):
                full = item.path
            elif info.type == pafs.FileType.File:
                full = base
            else:
                full = f"{scheme}{base_path.rstrip('/')}/{relative}{query}"
            mtime = item.mtime_ns if item.mtime_ns is not None else ""
            found.setdefault(full, SourceFile(full, relative, item.size or 0, str(mtime)))
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
    form_of_files = FORMATS[format_name]
    # Files of other names belong to it if the config names it; single images, if all of them have such names.
    if source.format != "auto" and not (files and form_of_files.single_images):
        files = [
            f
            for f in found.values()
            if (kind := format_of(f.relative)) == format_name
            or (kind is None and form_of_files.any_name(_base(f.relative)))
        ]
    if not files:
        raise ConfigError([f"{key}.uri: no {format_name} files under {', '.join(source.uris)}"])
    chosen = {f.uri for f in files}
    left_out = Counter(
        PurePosixPath(f.relative).suffix.lower() or PurePosixPath(f.relative).name
        for f in found.values()
        if f.uri not in chosen and not FORMATS[format_name].side_file(_base(f.relative))
    )
    return format_name, files, left_out
