"""Two public-domain books, the text that everything is measured on: Newton's Opticks and Tom Sawyer.

They are test data of two Debian packages. The lines of a paragraph are joined by blanks, so that the model reads
prose and not lines of 70 characters.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from kvcfg.config.workload import WorkloadConfig
from kvcfg.evaluation.text import text_sha, text_windows
from kvcfg.integrations.weights import cache_folder


@dataclass(frozen=True, slots=True)
class Book:
    """Where a book is found.

    Attributes:
        name: what results call it.
        package: of Debian 12.
        file: its name in the package.
        sha256: of that file; packages hold pieces of the books under the same name too.
    """

    name: str
    package: str
    file: str
    sha256: str

    def has(self, content: bytes) -> bool:
        """Whether a file's content is this book, whole and in this edition."""
        return hashlib.sha256(content).hexdigest() == self.sha256


BOOKS = (
    Book(
        "opticks",
        "golang-1.19-src",
        "Isaac.Newton-Opticks.txt",
        "d4a9ac22462b35e7821a4f2706c211093da678620a8f9997989ee7cf8d507bbd",
    ),
    Book(
        "sawyer",
        "golang-github-klauspost-compress-dev",
        "Mark.Twain-Tom.Sawyer.txt",
        "2a17996ae0fbb92571233a11f490f92a9bceb852468acb894d70c70a1e44b770",
    ),
)


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of a book.

    Attributes:
        text: name of the book.
        text_sha: sha256 of its prepared text.
        first_token: place of the window's first token in it.
        tokens: `[window_tokens]` int64.
    """

    text: str
    text_sha: str
    first_token: int
    tokens: Tensor


def windows_of(book: str, path: Path, tokenizer: object, num_windows: int, window_tokens: int) -> list[Window]:
    """Consecutive windows of a prepared book, from the workload's default first token on."""
    workload = WorkloadConfig(text=str(path), num_windows=num_windows, window_tokens=window_tokens)
    sha, first = text_sha(workload), workload.first_token
    cut = text_windows(workload, tokenizer).unbind()
    return [Window(book, sha, first + place * window_tokens, tokens) for place, tokens in enumerate(cut)]


def prepared_books(copies: Path | None = None, folder: Path | None = None) -> dict[str, Path]:
    """Paths of the prepared books by name; on first use they are looked for in `copies`, or fetched with apt-get.

    Args:
        copies: folder with the files as the packages have them, at any depth.
        folder: where prepared books are kept; None is the folder that weights are kept in.
    """
    folder = folder or cache_folder() / "texts"
    paths = {book.name: folder / f"{book.name}.txt" for book in BOOKS}
    for book in BOOKS:
        if not paths[book.name].exists():
            content = _from_package(book) if copies is None else _from_copies(book, copies)
            folder.mkdir(parents=True, exist_ok=True)
            paths[book.name].write_text(prepared(content.decode()), encoding="utf-8")
    return paths


def prepared(text: str) -> str:
    """Paragraphs on one line each, without the publisher's closing note."""
    joined = re.sub(r"(?<!\n)\n(?!\n)", " ", text)
    return joined.partition("End of the Project")[0]


def _from_copies(book: Book, folder: Path) -> bytes:
    for path in sorted(folder.rglob(book.file)):
        if book.has(content := path.read_bytes()):
            return content
    sys.exit(f"{folder} holds no {book.file} with sha256 {book.sha256}; it is in Debian's package {book.package}")


def _from_package(book: Book) -> bytes:
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        sys.exit(_by_hand(book, "there is no apt-get here"))
    with tempfile.TemporaryDirectory() as scratch:
        fetched = subprocess.run(["apt-get", "download", book.package], cwd=scratch, capture_output=True, text=True)
        if fetched.returncode:
            sys.exit(_by_hand(book, f"apt-get download {book.package} failed: {fetched.stderr.strip()}"))
        (archive,) = Path(scratch).glob("*.deb")
        with (
            subprocess.Popen(["dpkg-deb", "--fsys-tarfile", archive], stdout=subprocess.PIPE) as unpacked,
            tarfile.open(fileobj=unpacked.stdout, mode="r|") as files,
        ):
            contents = (files.extractfile(item) for item in files if item.isfile() and item.name.endswith(book.file))
            found = [content for file in contents if file and book.has(content := file.read())]
    if not found:
        sys.exit(_by_hand(book, f"this system's {book.package} holds another edition"))
    return found[0]


def _by_hand(book: Book, why: str) -> str:
    return (
        f"{why}. Download the package {book.package} of Debian 12 from a mirror, unpack it (dpkg-deb -x, or ar x and "
        f"tar xf data.tar.*) and give the folder: --books FOLDER"
    )
