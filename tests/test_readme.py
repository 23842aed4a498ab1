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
DETAILS = "".join((ROOT / name / "README.md").read_text(encoding="utf-8") for name in ("data", "lab"))
COMMANDS = re.findall(r"python train\.py ([^\n`]*)", README + DETAILS)


def test_the_same_seed_promises_no_more_than_can_be_kept(capsys):
    """Another processor, a GPU or another number of threads adds in another order."""
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "the same numbers come out on one machine, on its CPU, with one number of threads" in said
    assert "On another machine the last digits may differ." in " ".join(README.split())


def test_the_example_sentences_consist_of_words_that_the_tiny_encoder_knows(capsys):
    """The READMEs' and that of predict.py --help: with unknown words they would show nothing."""
    with pytest.raises(SystemExit):
        predict.parse_args(["--help"])
    help_text = capsys.readouterr().out
    sentences = [re.search(pattern, text)[1] for pattern, text in (
        ('echo "(.*?)"', README), (r'tokenizer\(\["(.*?)"', DETAILS), ("echo '(.*?)'", help_text))]
    for sentence in sentences:
        assert not {*sentence.split()} - {*tiny.vocabulary()[0]}, sentence


def test_the_readme_is_short_and_shows_little_but_words():
    """At most 1,300 words, one number in ten words, two pictures, and the equation on the first screen."""
    words = README.split()
    assert len(words) <= 1300 and sum(bool(re.search(r"\d", word)) for word in words) <= len(words) / 10
    assert README.count("![") >= 2 and README[:README.index("(P + F)")].count("\n") < 40


def test_links_and_pictures_lead_somewhere():
    for path in ROOT.glob("**/README.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), (path, target)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_is_one_that_train_accepts(command):
    words = [re.sub(r"^\$\w+$", "1", word) for word in shlex.split(command.split(";")[0])]
    if not {"--help", "--resume"} & {*words}:
        train.parse_args(words)


@pytest.mark.slow
def test_the_three_commands_tell_the_story_that_the_readme_shows(tmp_path, capsys):
    """All rows of the README, up to what another processor rounds: and LP-FT is the best on every other domain."""
    rows = {method: line.split()[1:-1] for line in README.splitlines() for method in ("lp", "ft", "lpft")
            if line.startswith("films ") and line.endswith(f"({method})")}
    accuracies = {}
    for method, row in rows.items():
        assert train.main(["--method", method, "--out", str(tmp_path / method)]) == 0
        printed = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()
                   if line.startswith(("test ", *tiny.DOMAINS[1:]))}
        assert [float(x) for x in printed["films"]] == pytest.approx([float(x) for x in row], rel=0.05, abs=0.02)
        accuracies[method] = [float(printed[split][0]) for split in ("test", *tiny.DOMAINS[1:])]
    assert len(rows) == 3 and min(test for test, *_ in accuracies.values()) >= 0.975
    assert all(best > max(lp, ft) for best, lp, ft in [*zip(*(accuracies[m] for m in ("lpft", "lp", "ft")))][1:])
