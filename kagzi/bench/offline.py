"""Makes asv's pages work without a network: what they load from elsewhere is put beside them.

The scripts come from npm packages, by the ordinary client, at the time of building; the registry's
own checksums are checked by it. They are kept in a folder for the next time.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_TAG = re.compile(
    r'<(?P<tag>script|link)\b[^>]*?\b(?:src|href)="(?P<url>https?://[^"]+)"[^>]*>(?:</script>)?'
)
NPM_TIMEOUT_S = 120


class NotVendored(Exception):
    """A page would need the network."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a file is found: in a version of a package, under a path."""

    package: str
    version: str
    path: str

    @property
    def archive(self) -> str:
        return f"{self.package.replace('/', '-').lstrip('@')}-{self.version}.tgz"


def source_of(url: str) -> Source:
    """The npm package that holds what a content network gives at this address.

    Raises:
        NotVendored: It is none that asv's pages are known to use.
    """
    if found := re.fullmatch(r"https://code\.jquery\.com/jquery-([\d.]+)\.min\.js", url):
        return Source("jquery", found[1], "dist/jquery.min.js")
    if found := re.fullmatch(r"https://cdn\.jsdelivr\.net/npm/([^@/]+)@([\d.]+)/(.+)", url):
        return Source(found[1], found[2], found[3])
    if found := re.fullmatch(
        r"https://cdnjs\.cloudflare\.com/ajax/libs/([^/]+)/([\d.]+)/(.+)", url
    ):
        package, version, path = found.groups()
        if package == "flot":
            return Source("flot", version, path.replace(".min.js", ".js"))
        if package == "stupidtable":  # under another name there, and only one version
            return Source("stupid-table-plugin", "1.1.3", path)
        return Source(package, version, path)
    raise NotVendored(f"the dashboard loads {url}, and it is not known which package holds that")


def make_offline(pages: Path, kept: Path) -> list[Source]:
    """Rewrite every page in a folder; what they load is put into `vendor/` there.

    Args:
        kept: Holds archives of packages from one time to the next.

    Raises:
        NotVendored: Something could not be had.
    """
    needed: dict[str, Source] = {}
    for page in sorted(pages.glob("*.html")):
        text = page.read_text()
        for found in _TAG.finditer(text):
            needed[found["url"]] = source_of(found["url"])
        page.write_text(_TAG.sub(lambda found: _local_tag(found, needed), text))
    for source in needed.values():
        _place(source, kept, pages / "vendor")
    left = [page.name for page in pages.glob("*.html") if _TAG.search(page.read_text())]
    assert not left, "each tag was rewritten"
    return list(needed.values())


def _local_tag(found: re.Match[str], needed: dict[str, Source]) -> str:
    source = needed[found["url"]]
    place = f"vendor/{source.package}/{source.path}"
    if found["tag"] == "link":
        return f'<link rel="stylesheet" href="{place}">'
    return f'<script src="{place}" onerror="js_load_failure()"></script>'


def _place(source: Source, kept: Path, vendor: Path) -> None:
    """Unpack a file, and what a style sheet beside it may refer to."""
    archive = kept / source.archive
    if not archive.exists():
        _fetch(source, kept)
    with tarfile.open(archive) as members:
        wanted = f"package/{source.path}"
        fonts = str(PurePosixPath(wanted).parent.parent / "fonts") + "/"
        names = [
            name
            for name in members.getnames()
            if name == wanted or (wanted.endswith(".css") and name.startswith(fonts))
        ]
        if wanted not in names:
            raise NotVendored(f"{archive.name} holds no {source.path}")
        for name in names:
            content = members.extractfile(name)
            assert content is not None, "these are files"
            place = vendor / source.package / PurePosixPath(name).relative_to("package")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content.read())


def _fetch(source: Source, kept: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise NotVendored(
            "npm is not installed; it is needed once, to fetch the dashboard's scripts: "
            f"{source.package}@{source.version} and others"
        )
    kept.mkdir(parents=True, exist_ok=True)
    wanted = f"{source.package}@{source.version}"
    try:
        done = subprocess.run(
            [npm, "pack", "--silent", wanted],
            cwd=kept,
            capture_output=True,
            text=True,
            timeout=NPM_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NotVendored(f"npm gave no {wanted} within {NPM_TIMEOUT_S} s") from None
    if done.returncode or not (kept / source.archive).exists():
        said = (done.stderr or done.stdout).strip()
        raise NotVendored(f"npm gave no {wanted}: {said[-500:]}")
