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
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlretrieve

from tqdm import tqdm

from data import check_rows
from data.corpora import CORPORA
from plumbing.flags import Parser, exit_status, run_main

SUPERGLUE = "https://dl.fbaipublicfiles.com/glue/superglue/data/v2"
GLUE = "https://dl.fbaipublicfiles.com/glue/data"
SENTEVAL = "https://dl.fbaipublicfiles.com/senteval/senteval_data"
PUBMED = "https://raw.githubusercontent.com/Franck-Dernoncourt/pubmed-rct/master"


@dataclass
class Source:
    """Where a data set is published: one archive, or a file for each split."""

    urls: dict  # {split: address}, or {"": address of a zip archive}
    rows: dict  # {split: number of rows}
    sha256: dict | None = None  # {split: of the file}, where known


def archive(base, name, train, test):
    return Source({"": f"{base}/{name}.zip"}, {"train": train, "test": test})


SOURCES = {
    "boolq": archive(SUPERGLUE, "BoolQ", 9427, 3270),
    "cb": archive(SUPERGLUE, "CB", 250, 56),
    "rte": archive(SUPERGLUE, "RTE", 2490, 277),
    "wic": archive(SUPERGLUE, "WiC", 5428, 638),
    "wsc": archive(SUPERGLUE, "WSC", 554, 104),
    "cola": archive(GLUE, "CoLA", 8551, 1043),
    "sst2": archive(GLUE, "SST-2", 67349, 872),
    "mrpc": Source({split: f"{SENTEVAL}/msr_paraphrase_{split}.txt" for split in ("train", "test")},
                   {"train": 4076, "test": 1725},
                   {"train": "60a9b09084528f0673eedee2b69cb941920f0b8cd0eeccefc464a98768457f89",
                    "test": "a04e271090879aaba6423d65b94950c089298587d9c084bf9cd7439bd785f784"}),
    "pubmed20k": Source({split: f"{PUBMED}/{file}" for split, file in CORPORA["pubmed20k"].files.items()},
                        {"train": 180040, "val": 30212, "test": 30135}),
}


def download(name, data_dir, sources=SOURCES):
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
    source = sources[name]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder) as temporary:
        fetched = {split: fetch(url, Path(temporary) / (split or "archive"), (source.sha256 or {}).get(split))
                   for split, url in source.urls.items() if split in ("", *absent)}
        if "" in fetched:
            fetched = unpack(fetched[""], source.urls[""], absent, Path(temporary))
        for split, path in fetched.items():
            url = source.urls.get(split) or source.urls[""]
            try:
                rows = [row for row in corpus.read(path) if row[1] is not None]
                count = len(check_rows(rows, corpus.labels, pairs=bool(rows) and rows[0][2] is not None))
            except ValueError as error:
                raise ValueError(f"{url}: {corpus.files[split]} is not as expected: "
                                 f"{str(error).removeprefix(f'{path}, ')}") from None
            if count != source.rows[split]:
                raise ValueError(f"{url}: {corpus.files[split]} has {count} rows; expected "
                                 f"{source.rows[split]}")
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
