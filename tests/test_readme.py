"""The README tells the truth about files and flags."""

import re
import shlex
from pathlib import Path

import pytest

import predict
import train
from data import tiny

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"python train\.py ([^\n`]*)", README)


def test_the_same_seed_promises_no_more_than_can_be_kept(capsys):
    """Another processor, a GPU or another number of threads adds in another order."""
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    for text in (README, capsys.readouterr().out):
        promise = "the same numbers (come out )?on one machine, on its CPU, with one number of threads"
        assert re.search(promise, " ".join(text.split()))


def test_the_example_sentences_consist_of_words_that_the_tiny_encoder_knows(capsys):
    """The README's and that of predict.py --help: with unknown words they would show nothing."""
    with pytest.raises(SystemExit):
        predict.parse_args(["--help"])
    help_text = capsys.readouterr().out
    sentences = re.findall(r'tokenizer\(\["(.*?)"', README) + re.findall("echo '(.*?)'", help_text)
    assert len(sentences) == 2
    for sentence in sentences:
        assert not {*sentence.split()} - {*tiny.vocabulary()[0]}, sentence


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_is_one_that_train_accepts(command):
    words = [re.sub(r"^\$\w+$", "1", word) for word in shlex.split(command.split(";")[0])]
    if not {"--help", "--resume"} & {*words}:
        train.parse_args(words)
