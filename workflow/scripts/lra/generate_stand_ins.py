"""Stand-ins for data that cannot be made: AAN pairs, IMDB reviews, CIFAR-10 images.

They have the form of the real sets and can be learnt by a small Transformer, but say nothing about how
hard the real ones are.
"""

from collections.abc import Iterator
from random import Random

import numpy as np

# Topics of the papers, words and notation: two texts are related when they are about the same one.
TOPICS = (
    "parser treebank syntax grammar clause (S (NP (VP (PP ))) constituent dependency phrase",
    "speech phoneme acoustic vowel /ae/ /ih/ prosody pitch formant 440Hz 16kHz 20ms",
    "translation bilingual decoder BLEU METEOR WMT14 EN-DE EN-FR SMT corpus source target",
    "dialogue turn speaker {act} {slot} {user} intent belief assistant reply? request! booking",
    "morphology stem+ suffix+ -ing -ed -s inflection paradigm affix lemma prefix",
    "sentiment opinion review polarity emotion :-) :-( ** *** **** rating mood",
)
PLAIN = (
    "we the of a in to this paper and for show that with our results method is on model new "
    "data which approach set by an task from are it be used using as based can two"
).split()
TOPIC_SHARE = 0.6

GOOD = "wonderful superb brilliant charming moving delightful gripping excellent".split()
BAD = "awful boring dreadful clumsy tedious terrible lifeless horrible".split()
ASPECTS = (
    "plot acting music script ending dialogue photography cast direction pacing story lead"
).split()
FILLERS = (
    "I saw it on a rainy evening with two friends.",
    "It runs for almost two hours.",
    "The director is known for an earlier film.",
    "Most of it was shot in one house.",
    'Somebody in the row behind us said "hm" twice.',
    "It is based on a novel that I have not read.",
)
FORMS = (
    "The {aspect} was {word}.",
    "I found the {aspect} {word}.",
    "What a {word} {aspect}!",
    "The {aspect} is simply {word}, and the {other} is {second}.",
)
NEGATED = ("The {aspect} was not {word} at all.", "Nobody could call the {aspect} {word}.")
NEGATED_SHARE = 0.15
DISSENT_SHARE = 0.2


def generate_pairs(num_pairs: int, rng: Random, length: int) -> Iterator[tuple[int, str, str]]:
    """Label, text, text of about `length` bytes: label 1 when both are about one topic."""
    topics = [topic.split() for topic in TOPICS]
    for index in range(num_pairs):
        label = index % 2
        one = rng.randrange(len(topics))
        other = one if label else (one + 1 + rng.randrange(len(topics) - 1)) % len(topics)
        yield label, *(_paper(rng, topics[topic], length) for topic in (one, other))


def _paper(rng: Random, topic: list[str], length: int) -> str:
    words: list[str] = []
    size = 0
    length = round(length * rng.uniform(0.8, 1.2))
    while size < length:
        word = rng.choice(topic if rng.random() < TOPIC_SHARE else PLAIN)
        # A lone quote now and then, as in the real files, which use no quoting.
        word = f'"{word}' if rng.random() < 0.01 else word
        words.append(word)
        size += len(word) + 1
    return " ".join(words)


def generate_reviews(num_reviews: int, rng: Random, length: int) -> Iterator[tuple[str, dict]]:
    """Key and features of reviews of about `length` bytes, half of them positive.

    Most sentences agree with the label, some say the opposite, some negate the opposite word.
    """
    for index in range(num_reviews):
        label = index % 2
        text: list[str] = []
        target = length * rng.uniform(0.7, 1.3)
        while sum(map(len, text)) + len(text) < target:
            if rng.random() < 0.2:
                text.append(rng.choice(FILLERS))
            else:
                text.append(_judgement(rng, bool(label) != (rng.random() < DISSENT_SHARE)))
        name = "pos" if label else "neg"
        yield f"{name}/{index}.txt", {"text": " ".join(text), "label": label}


def _judgement(rng: Random, positive: bool) -> str:
    negated = rng.random() < NEGATED_SHARE
    words = rng.sample(GOOD if positive != negated else BAD, 2)
    aspects = rng.sample(ASPECTS, 2)
    form = rng.choice(NEGATED if negated else FORMS)
    return form.format(aspect=aspects[0], other=aspects[1], word=words[0], second=words[1])


def generate_digits(
    num_train: int, num_test: int, rng: np.random.Generator
) -> dict[str, Iterator[tuple[int, dict]]]:
    """Key and features of 32x32 RGB images: handwritten digits, enlarged, shifted, coloured, noisy.

    Source of the digits: scikit-learn's load_digits (UCI). The test set is drawn from other originals
    than the training set.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = rng.permutation(len(digits.target))
    edge = round(len(order) * num_train / (num_train + num_test))
    return {
        "train": _paint(digits, order[:edge], num_train, "train", rng.spawn(1)[0]),
        "test": _paint(digits, order[edge:], num_test, "test", rng.spawn(1)[0]),
    }


def _paint(
    digits, originals: np.ndarray, num_images: int, split: str, rng: np.random.Generator
) -> Iterator[tuple[int, dict]]:
    from PIL import Image

    for index in range(num_images):
        original = originals[rng.integers(len(originals))]
        label = int(digits.target[original])
        size = int(rng.integers(22, 29))
        left, top = rng.integers(0, 33 - size, 2)
        glyph = Image.fromarray((digits.images[original] * 15.9).astype(np.uint8))
        mask = np.zeros((32, 32, 1), np.float32)
        enlarged = np.asarray(glyph.resize((size, size), Image.Resampling.BILINEAR), np.float32)
        mask[top : top + size, left : left + size, 0] = enlarged / 255
        # Colours lean towards the class, as skies and meadows do in photographs, but vary a lot.
        paper = np.clip(rng.normal(20 + 8 * label, 16, 3), 0, 255)
        ink = np.clip(rng.normal(235 - 6 * ((3 * label) % 10), 18, 3), 0, 255)
        image = paper + mask * (ink - paper) + rng.normal(0, 6, (32, 32, 3))
        features = {
            "id": f"{split}_{index:05d}",
            "image": np.clip(np.round(image), 0, 255).astype(np.uint8),
            "label": label,
        }
        yield index, features
