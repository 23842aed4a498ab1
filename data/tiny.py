"""The embedded benchmark: a small review language, generated, and two tasks over it.

Four domains share a grammar and some words; each has words of its own. Domain 0 (gadgets) is
in-distribution, the others are the out-of-distribution tests. Three classes: negative, neutral,
positive. Seeded, so that the same seed is the same text everywhere.

    python -m data.tiny          prints ten samples of each split of two tasks

    document          3 or 4 sentences for pre-training, one mood, the domain may change in between
    tiny              3 sentences in the label's mood; 60 labelled texts, 20 of each class: few, so that where
                      the head starts matters. tiny-30 and tiny-120 have fewer and more
    tiny-distractors  2 sentences in the label's mood, 2 distractors about shared nouns, in any mood; 200

The rule of the distractors, "what is said of the weather does not count", is not linear in the features of
the pre-trained encoder: LP reads only part of it, and the features must move. Another seed is another
language: other words are liked and disliked, and it needs an encoder of its own (lab.pretrain).
"""

import random
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import BertProcessing

ENCODER = Path(__file__).with_name("tiny_encoder")  # made by lab.pretrain
LANGUAGE = 37  # that it was made for: of fifty languages the nearest to their mean (lab/README.md)
LABELS = ("negative", "neutral", "positive")
NEGATIVE, NEUTRAL, POSITIVE = range(3)
DOMAINS = ("gadgets", "films", "hotels", "meals")
TEXT = Path(__file__).with_name("tiny_words.txt").read_text(encoding="utf-8")
WORDS = {name: words.split() for name, words in (  # such as "films nouns", "shared negative"
    line.split(": ") for line in TEXT.splitlines() if line)}
SHARED_NOUNS, INTENSIFIERS = WORDS["shared nouns"], WORDS["intensifiers"]
SHARED_ADJECTIVES, *ADJECTIVES = (  # negative, neutral, positive; of all domains, then of each one's own
    tuple(WORDS[f"{domain} {label}"] for label in LABELS) for domain in ("shared", *DOMAINS))
NOUNS, ENTITIES = ([WORDS[f"{domain} {kind}"] for domain in DOMAINS] for kind in ("nouns", "entities"))

# ---------------------------------------------------------------------------- grammar

CLAUSES = (  # {n} a noun, {e} an entity (maker, artist, house), {a} an adjective phrase
    "the {n} was {a}", "the {n} is {a}", "my {n} is {a}", "i found the {n} {a}", "{e} has that {a} {n}",
    "this {n} felt {a}", "we thought the {n} was {a}", "the {n} of {e} seemed {a}",
    "at {e} our {n} was {a}", "it had this {a} {n}",
)
CLAUSE_WEIGHTS = (  # one row a domain: the domains phrase things differently
    (6, 4, 4, 3, 3, 2, 1, 1, 0, 1),
    (5, 2, 0, 3, 1, 1, 4, 4, 0, 3),
    (4, 1, 2, 2, 2, 3, 3, 1, 5, 1),
    (4, 1, 2, 4, 1, 3, 3, 2, 4, 2),
)
NEGATION = (0.12, 0.12, 0.20, 0.12)  # share of adjective phrases: "not good"
CONTRAST = (0.12, 0.12, 0.12, 0.25)  # share of sentences: "the room was dirty but the bed was lovely"
SHARED_ADJECTIVE = 0.55  # share of adjectives that all domains have in common
FAITHFUL = 0.95  # share of sentences in the mood of their document


class Language:
    """The grammar with one seed: `seed` decides how often each domain uses each shared word."""

    def __init__(self, seed=LANGUAGE):
        rng = random.Random(f"{seed} preferences")
        self.seed = seed
        self.preferred = [[rng.sample(words, len(words)) for words in SHARED_ADJECTIVES]
                          for _ in DOMAINS]  # most frequent first

    def adjective(self, rng, domain, mood):
        if rng.random() < SHARED_ADJECTIVE:
            words = self.preferred[domain][mood]
            return rng.choices(words, [rank ** -0.7 for rank in range(1, len(words) + 1)])[0]  # Zipf
        return rng.choice(ADJECTIVES[domain][mood])

    def adjective_phrase(self, rng, domain, mood):
        """[not | never] [intensifier] adjective [and adjective]; or: neither good nor bad."""
        if rng.random() < NEGATION[domain]:
            if mood == NEUTRAL:
                good, bad = (self.adjective(rng, domain, m) for m in (POSITIVE, NEGATIVE))
                return f"neither {good} nor {bad}"
            opposite = self.adjective(rng, domain, POSITIVE + NEGATIVE - mood)
            return f"{rng.choice(('not', 'never'))} {opposite}"
        phrase = self.adjective(rng, domain, mood)
        if rng.random() < 0.25:
            phrase = f"{rng.choice(INTENSIFIERS)} {phrase}"
        if rng.random() < 0.15:
            phrase = f"{phrase} and {self.adjective(rng, domain, mood)}"
        return phrase

    def clause(self, rng, domain, mood, nouns):
        template = rng.choices(CLAUSES, CLAUSE_WEIGHTS[domain])[0]
        return template.format(n=rng.choice(nouns), e=rng.choice(ENTITIES[domain]),
                               a=self.adjective_phrase(rng, domain, mood))

    def sentence(self, rng, domain, mood, nouns):
        """One clause; or two of which the second decides: X but Y, although X , Y."""
        main = self.clause(rng, domain, mood, nouns)
        if mood != NEUTRAL and rng.random() < CONTRAST[domain]:
            other = self.clause(rng, domain, POSITIVE + NEGATIVE - mood, nouns)
            return rng.choice((f"{other} but {main} .", f"although {other} , {main} ."))
        return f"{main} ."

    def document(self, rng):
        """Text for pre-training: one mood; domains mix, which ties their words together."""
        mood, domain, sentences = rng.randrange(3), rng.randrange(4), []
        for _ in range(rng.choice((3, 4))):
            if rng.random() < 0.4:
                domain = rng.randrange(4)
            nouns = SHARED_NOUNS if rng.random() < 0.3 else NOUNS[domain]
            sentences.append(self.sentence(rng, domain, often(rng, mood), nouns))
        return " ".join(sentences)

    def review(self, rng, domain, label, distractor):
        """Text of a labelled sample, its sentences in random order."""
        sentences = [self.sentence(rng, domain, often(rng, label), NOUNS[domain])
                     for _ in range(2 if distractor else 3)]
        if distractor:
            sentences += [self.sentence(rng, domain, rng.randrange(3), SHARED_NOUNS) for _ in range(2)]
        rng.shuffle(sentences)
        return " ".join(sentences)

    def documents(self, count):
        """`count` unlabelled texts from all domains."""
        rng = random.Random(f"{self.seed} documents")
        return [self.document(rng) for _ in range(count)]

    def reviews(self, count, domain, split, distractor, balanced=False):
        """`count` pairs (text, label); each split and domain is a stream of its own."""
        rng = random.Random(f"{self.seed} {split} {domain} {distractor}")
        labels = [i % 3 if balanced else rng.randrange(3) for i in range(count)]
        return [(self.review(rng, domain, label, distractor), label) for label in labels]


def often(rng, mood):
    """`mood`, or with probability 1 - FAITHFUL any mood."""
    return mood if rng.random() < FAITHFUL else rng.randrange(3)


# ---------------------------------------------------------------------------- tasks, tokenizer

TASKS = {"tiny": (60, 200, 500), "tiny-30": (30, 200, 500), "tiny-120": (120, 200, 500),
         "tiny-distractors": (200, 400, 1000)}  # {name: number of texts in train, val and each test}


def load(name, language=LANGUAGE):
    """The task `name` as {split: [(text, label), ...]}: train, val, test and the three OOD domains."""
    train, val, test = TASKS[name]
    language, distractors = Language(language), name == "tiny-distractors"
    splits = {"train": language.reviews(train, 0, "train", distractors, balanced=not distractors),
              "val": language.reviews(val, 0, "val", distractors)}
    for domain, domain_name in enumerate(DOMAINS):
        splits[domain_name if domain else "test"] = language.reviews(test, domain, "test", distractors)
    return splits


SPECIAL_WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def vocabulary():
    """(words, number of function words): special and function words first, then content words."""
    function = dict.fromkeys(SPECIAL_WORDS)
    for text in (*CLAUSES, *INTENSIFIERS, "not never neither nor and but although , ."):
        function.update(dict.fromkeys(w for w in text.split() if "{" not in w))
    content = {}
    for words in (SHARED_NOUNS, *SHARED_ADJECTIVES, *NOUNS, *ENTITIES, *sum(ADJECTIVES, ())):
        content.update(dict.fromkeys(words))
    return [*function, *content], len(function)


def make_tokenizer():
    """One token per word, [CLS] in front and [SEP] behind, as BERT has it."""
    words, _ = vocabulary()
    ids = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    tokenizer.add_special_tokens(list(SPECIAL_WORDS))
    return tokenizer


if __name__ == "__main__":
    for task in ("tiny", "tiny-distractors"):
        for split, samples in load(task).items():
            print(f"\n{task}, {split}")
            for text, label in samples[:10]:
                print(f"  {LABELS[label]:8s}  {text}")
