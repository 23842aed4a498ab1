"""Get the paper's data sets from where they are published.

    python -m data.download cb rte                  into datasets/
    python -m data.download cola --data-dir my/data

Each file comes over HTTPS under a temporary name, is compared with the SHA-256 where it is known, unpacked,
and its rows are counted; only then does it get its name. A transfer that is cut, wrong or interrupted leaves
no file behind, and files that are there stay.
"""

import hashlib
import http.client
import socket
import tempfile
import zipfile
import zlib
from pathlib import Path
from urllib.request import urlretrieve

from tqdm import tqdm

from data import check_rows
from data.corpora import CORPORA
from plumbing.flags import Parser, exit_status, run_main


def download(name, data_dir):
    """Put the files of one data set below `data_dir`; ValueError or OSError with nothing changed."""
    corpus = CORPORA[name]
    folder = Path(data_dir) / corpus.group
    absent = {split: file for split, file in corpus.files.items() if not (folder / file).is_file()}
    if not absent:
        print(f"{name}: already in {folder}")
        return
    if corpus.by_hand:
        raise ValueError(f"{name}: its publishers give no address for a program; {corpus.by_hand}; "
                         f"put these into {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as temporary:
        fetched = {split: fetch(url, Path(temporary) / (split or "archive"), corpus.sha256.get(split))
                   for split, url in corpus.urls.items() if split in ("", *absent)}
        if "" in fetched:
            fetched = unpack(fetched[""], corpus.urls[""], absent, Path(temporary))
        for split, path in fetched.items():
            url = corpus.urls.get(split) or corpus.urls[""]
            try:
                rows = [row for row in corpus.read(path) if row[1] is not None]
                count = len(check_rows(rows, corpus.labels, pairs=bool(rows) and rows[0][2] is not None))
            except ValueError as error:
                raise ValueError(f"{url}: {corpus.files[split]} is not as expected: "
                                 f"{str(error).removeprefix(f'{path}, ')}") from None
            if count != corpus.rows[split]:
                raise ValueError(f"{url}: {corpus.files[split]} has {count} rows; expected "
                                 f"{corpus.rows[split]}")
        for split, path in fetched.items():
            (folder / absent[split]).parent.mkdir(parents=True, exist_ok=True)
            path.replace(folder / absent[split])
    print(f"{name}: {', '.join(absent.values())} in {folder}")


def fetch(url, path, sha256=None):
    """Write what `url` serves to `path`, and return it; OSError if it is cut, ValueError for another hash."""
    socket.setdefaulttimeout(60)
    try:
        with tqdm(desc=url.rsplit("/", 1)[1], unit="B", unit_scale=True, delay=1) as bar:
            urlretrieve(url, path, lambda blocks, size, total: bar.update(size))
    except (OSError, http.client.HTTPException) as error:  # urllib's are OSErrors
        raise OSError(f"{url}: {getattr(error, 'reason', None) or error}") from None
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 and digest != sha256:
        raise ValueError(f"{url}: SHA-256 is {digest}; expected {sha256}")
    return path


def unpack(archive, url, members, folder):
    """{split: file} of these `members`, {split: NAME/file}, of a zip archive."""
    try:
        with zipfile.ZipFile(archive) as opened:
            paths = {split: folder / f"{split}{Path(member).suffix}" for split, member in members.items()}
            for split, member in members.items():
                paths[split].write_bytes(opened.read(member))  # the path is ours: no member picks its own
    except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{url}: not the archive that was expected ({error})") from None
    return paths


def main(argv=None):
    parser = Parser("data.download", description="Download data sets of the paper.",
                    epilog="Example: python -m data.download cb rte cola")
    parser.add_argument("names", nargs="+", choices=CORPORA, metavar="NAME", help=", ".join(CORPORA))
    parser.add_argument("--data-dir", type=Path, default=Path("datasets"), metavar="DIR",
                        help="where to put them (default: %(default)s)")
    args = parser.parse_args(argv)
    return exit_status("data.download", lambda: [download(name, args.data_dir) for name in args.names])


if __name__ == "__main__":
    run_main(main)
