"""Downloads against a local server: whole, cut, wrong, interrupted."""

import hashlib
import http.server
import io
import threading
import zipfile
from dataclasses import replace

import pytest

from data import download as download_file
from data.download import download
from data.corpora import CORPORA


@pytest.fixture
def publish(monkeypatch):
    """publish(name, urls, rows, sha256): a data set is published elsewhere."""
    def publish(name, urls, rows, sha256=None):
        monkeypatch.setitem(CORPORA, name, replace(CORPORA[name], urls=urls, rows=rows, sha256=sha256 or {}))
    return publish


@pytest.fixture
def server(publish):
    """(base address, {path: bytes}, {path: bytes to announce too many}, set of paths asked for)."""
    files, excess, asked = {}, {}, set()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.add(self.path)
            if self.path not in files:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(files[self.path]) + excess.get(self.path, 0)))
            self.end_headers()
            self.wfile.write(files[self.path])

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    publish("cb", {"": f"http://127.0.0.1:{httpd.server_port}/CB.zip"}, {"train": 3, "test": 2})
    yield f"http://127.0.0.1:{httpd.server_port}", files, excess, asked
    httpd.shutdown()
    httpd.server_close()


LINE = '{"premise": "It may rain.", "hypothesis": "It rains.", "label": "neutral", "idx": 0}\n'


def make_archive(train=3, val=2, members=("CB/train.jsonl", "CB/val.jsonl"), line=LINE, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for member, count in zip(members, (train, val)):
            archive.writestr(member, line * count)
    return buffer.getvalue()


def left(folder):
    """Files, and folders that begin with a dot: the temporary ones."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")
                  if path.is_file() or path.name.startswith("."))


def test_an_archive_is_unpacked_counted_and_put_in_place(server, tmp_path, capsys):
    _, files, _, asked = server
    files["/CB.zip"] = make_archive()
    download("cb", tmp_path)
    assert left(tmp_path) == ["superglue/CB/train.jsonl", "superglue/CB/val.jsonl"]
    assert (tmp_path / "superglue/CB/train.jsonl").read_text() == LINE * 3
    asked.clear()
    download("cb", tmp_path)  # nothing is fetched twice
    assert not asked and "already" in capsys.readouterr().out


def test_a_file_that_is_there_is_not_touched(server, tmp_path):
    _, files, _, _ = server
    files["/CB.zip"] = make_archive()
    mine = tmp_path / "superglue/CB/val.jsonl"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    download("cb", tmp_path)
    assert mine.read_text() == "mine" and len(left(tmp_path)) == 2


@pytest.mark.parametrize("content, excess, message", [
    (make_archive()[:-30], 30, "got only"),  # the connection was cut
    (make_archive()[:-30], 0, "not the archive"),
    (b"<html>Sign in</html>", 0, "not the archive"),
    (make_archive(members=("DB/train.jsonl", "DB/val.jsonl")), 0, "not the archive"),
    (make_archive(train=2), 0, "has 2 rows; expected 3"),
    (make_archive(line=LINE.replace("neutral", "maybe")), 0, "CB.zip: CB/train.jsonl is not as expected: line 1"),
    (make_archive(line="<html>"), 0, "CB.zip: CB/train.jsonl is not as expected: line 1"),
    (make_archive(compression=zipfile.ZIP_DEFLATED).replace(b"\x0a", b"\x0b"), 0, "not the archive"),
    (None, 0, "Not Found"),
])
def test_a_cut_or_wrong_transfer_leaves_nothing(server, tmp_path, content, excess, message):
    _, files, excesses, _ = server
    if content is not None:
        files["/CB.zip"], excesses["/CB.zip"] = content, excess
    with pytest.raises((ValueError, OSError), match=message):
        download("cb", tmp_path / "new" / "folder")
    assert not left(tmp_path)


def test_an_interrupted_transfer_leaves_nothing(server, tmp_path, monkeypatch):
    _, files, _, _ = server
    files["/CB.zip"] = make_archive()

    class Interrupted:
        def __init__(self, **kwargs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return False

        def update(self, count):
            raise KeyboardInterrupt

    monkeypatch.setattr(download_file, "tqdm", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        download("cb", tmp_path)
    assert not left(tmp_path)


def test_the_sha256_of_a_file_is_compared(server, publish, tmp_path):
    base, files, _, _ = server
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    files["/train"] = files["/test"] = (header + "1\t5\t6\tIt fell .\tIt dropped .\n").encode()
    urls, rows = {"train": f"{base}/train", "test": f"{base}/test"}, {"train": 1, "test": 1}
    right = hashlib.sha256(files["/test"]).hexdigest()
    publish("mrpc", urls, rows, sha256={"train": right, "test": "0" * 64})
    with pytest.raises(ValueError, match="SHA-256 .* expected 0000"):
        download("mrpc", tmp_path)
    assert not left(tmp_path)
    publish("mrpc", urls, rows, sha256={"train": right, "test": right})
    download("mrpc", tmp_path)
    assert left(tmp_path) == ["glue/MRPC/msr_paraphrase_test.txt", "glue/MRPC/msr_paraphrase_train.txt"]


def test_a_server_that_does_not_answer_is_one_line(publish, tmp_path, capsys):
    publish("cb", {"": "http://127.0.0.1:9/CB.zip"}, {"train": 250, "test": 56})
    assert download_file.main(["cb", "--data-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("data.download: error: http://127.0.0.1:9/CB.zip") and len(error.splitlines()) == 1


def test_every_data_set_has_an_address_over_https_or_a_word_why_not(tmp_path, capsys):
    for name, corpus in CORPORA.items():
        if name == "amazon":
            assert download_file.main([name, "--data-dir", str(tmp_path)]) == 2
            assert "github.com" in capsys.readouterr().err
            continue
        assert all(url.startswith("https://") for url in corpus.urls.values())
        assert corpus.rows.keys() == corpus.files.keys()


def test_pubmed_is_the_variant_that_the_authors_train_on():
    """Numbers replaced with @: read from that folder, and downloaded into it."""
    files = CORPORA["pubmed20k"].files
    folder = "PubMed_20k_RCT_numbers_replaced_with_at_sign"
    assert files == {"train": f"{folder}/train.txt", "val": f"{folder}/dev.txt", "test": f"{folder}/test.txt"}
    assert {split: url.split("/master/")[1] for split, url in CORPORA["pubmed20k"].urls.items()} == files
