"""The data of examples/train_tiny.py: what is withheld never shows, and only what a text tells can be known."""

from itertools import pairwise

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

import tiny_world as world
from tiny_world import Features, Tokens

TOKENS = Tokens(image=len(world.VOCABULARY), end_of_chunk=len(world.VOCABULARY) + 1)
SEEDS = pytest.mark.parametrize("seed", range(3))


def words_of(text: Tensor) -> list[str]:
    vocabulary = [*world.VOCABULARY, "<image>", "<EOC>"]
    return [vocabulary[i] for i in text.tolist()]


def telling_features(images_of_each: int = 12) -> Features:
    """Features that tell what they are of: one channel for each digit in each orientation, and one for each image."""
    digits = torch.arange(10).repeat(images_of_each)
    count = len(digits)
    features = torch.zeros(count, 8, 1, 80 + count)
    for orientation in range(8):
        features[torch.arange(count), orientation, 0, 8 * digits + orientation] = 1
    features[torch.arange(count), :, 0, 80 + torch.arange(count)] = 1
    return Features(features, digits)


# ---------------------------------------------------------------- words and text


def test_the_tokenizer_has_one_token_for_each_word() -> None:
    assert len(set(world.VOCABULARY)) == len(world.VOCABULARY)
    tokenizer = world.make_tokenizer()
    text = world.write_entries(2)[0][0]
    assert tokenizer(" ".join(words_of(text)))["input_ids"] == text.tolist()
    assert len(tokenizer) == len(world.VOCABULARY)
    assert set(world.TRAINED_NAMES).isdisjoint(world.UNSEEN_NAMES)


@SEEDS
@pytest.mark.parametrize("rare_nouns", [False, True])
def test_entries_name_a_noun_always_the_same_in_a_text_and_endings_agree(seed: int, rare_nouns: bool) -> None:
    torch.manual_seed(seed)
    rows, entries = 20, 10
    text, can_be_known = world.write_entries(rows, entries=entries, rare_nouns=rare_nouns)
    endings: dict[str, str] = {}
    for row in range(rows):
        begin, *words = words_of(text[row])
        assert begin == "<bos>"
        names: dict[str, str] = {}
        for entry in range(entries):
            noun, name, ending = words[3 * entry : 3 * entry + 3]
            assert noun in world.NOUNS
            assert name in world.NAMES
            assert bool(can_be_known[row, entry]) == (noun in names)
            assert names.setdefault(noun, name) == name
            assert endings.setdefault(noun, ending) == ending
        assert 1 <= len(names) <= 5
        assert len(set(names.values())) == len(names)
    assert len(set(endings.values())) > 1


def test_a_nouns_name_differs_between_texts() -> None:
    torch.manual_seed(0)
    text, _ = world.write_entries(200)
    noun = text[:, 1].mode().values
    names = text[text[:, 1] == noun, 2]
    assert len(names.unique()) > len(names) / 3


def test_captions_read_as_written() -> None:
    digits, orientations = torch.tensor([7, 0]), torch.tensor([4, 0])
    plain = world.caption(digits, end=world.TOKEN["."])
    assert [" ".join(words_of(row)) for row in plain] == ["a handwritten seven .", "a handwritten zero ."]
    turned = world.caption(digits, end=world.TOKEN["."], orientations=orientations)
    assert words_of(turned[0]) == ["a", "handwritten", "mirrored", "seven", "."]
    text = words_of(world.write_captions(3)[0])
    assert text[:3] == ["<bos>", "a", "handwritten"]
    assert text.count(".") == 7


# ---------------------------------------------------------------- images


def test_the_splits_hold_every_image_once() -> None:
    splits = world.load_splits()
    assert {name: len(split.pictures) for name, split in splits.items()} == {"train": 997, "val": 300, "test": 500}
    found = sorted(picture.tobytes() for split in splits.values() for picture in split.pictures)
    scans = load_digits().images * 255 / 16
    assert found == sorted(scan.round().astype("uint8").tobytes() for scan in scans)
    again = world.load_splits()
    for name, split in splits.items():
        assert torch.equal(again[name].pixel_values, split.pixel_values)
        assert torch.equal(again[name].digits, split.digits)
        assert torch.equal(world.make_image_processor()(split.pictures[:5])["pixel_values"], split.pixel_values[:5])


def test_the_orientations_are_eight_and_the_first_is_upright() -> None:
    image = torch.arange(9.0).view(1, 1, 3, 3)
    views = [world.orient(image, orientation) for orientation in range(len(world.ORIENTATIONS))]
    assert torch.equal(views[0], image)
    assert len({tuple(view.flatten().tolist()) for view in views}) == 8


# ---------------------------------------------------------------- images and text


@SEEDS
def test_images_of_a_class_are_drawn_without_repetition(seed: int) -> None:
    torch.manual_seed(seed)
    features = telling_features()
    digits = torch.tensor([[3, 5], [9, 0]])
    which = torch.randint(2, (2, 15)).sort(1).values[:, torch.randperm(15)]
    which[:, :12] = torch.arange(12) % 2
    drawn = features.draw(digits, which)
    assert torch.equal(features.digits[drawn], digits.gather(1, which))
    assert all(len(row.unique()) == len(row) for row in drawn)


@SEEDS
def test_made_up_characters_are_made_of_what_they_may(seed: int) -> None:
    torch.manual_seed(seed)
    digits = torch.arange(10).repeat(4)
    # An image of a digit is as bright as the digit, on the left side alone.
    pixel_values = torch.zeros(40, 1, world.IMAGE_SIZE, world.IMAGE_SIZE)
    pixel_values[..., : world.IMAGE_SIZE // 2] = 1 + digits.view(-1, 1, 1, 1)
    made = world.make_up_characters(world.Digits([], pixel_values, digits), [2, 5, 6], characters=40, copies=3)
    assert made.shape == (40, 3, 1, world.IMAGE_SIZE, world.IMAGE_SIZE)
    assert set(made.unique().tolist()) == {0, 3, 6, 7}
    for character in made:
        assert len(character.unique()) <= 3  # paper and two digits
        assert torch.equal(character[0], character[1])  # copies are of the same digits in the same orientations
    assert len({tuple(character[0].flatten().tolist()) for character in made}) > 20


@SEEDS
def test_episodes_show_what_they_may_and_name_kinds_consistently(seed: int) -> None:
    torch.manual_seed(seed)
    allowed = [1, 2, 3, 6, 8, 9]
    telling = telling_features()
    # A character is a mixture of two digits, here each of the others with its predecessor.
    characters = torch.zeros(6, 4, 1, telling.features.shape[-1])
    for character, digit in enumerate(allowed):
        characters[character, :, :, [8 * digit, 8 * allowed[character - 1]]] = 1
    names, features = world.draw_episodes(telling, characters, allowed, 50)
    kinds = features[:, :, 0, :80] != 0
    digits_shown = kinds.view(50, 10, 10, 8).any(-1)
    withheld = [digit for digit in range(10) if digit not in allowed]
    assert digits_shown[..., allowed].any((0, 1)).all()
    assert not digits_shown[..., withheld].any()
    unseen = world.ids_of(world.UNSEEN_NAMES)
    assert not torch.isin(names, unseen).any()
    assert torch.isin(names, world.ids_of(world.TRAINED_NAMES)).all()
    for row in range(50):
        assert 1 <= len(names[row].unique()) <= 5
        for name in names[row].unique():
            same = kinds[row, names[row] == name]
            assert (same == same[0]).all()


def test_a_text_of_images_reads_as_written_and_gives_no_loss_where_it_is_given() -> None:
    names = world.ids_of(world.NAMES[:2])[None]
    text = TOKENS.interleave(names, query=True)
    first, second = world.NAMES[:2]
    assert words_of(text[0]) == ["<bos>", "<image>", first, "<EOC>", "<image>", second, "<EOC>", "<image>"]
    is_given = TOKENS.labels(text)[0] == -100
    assert is_given.tolist() == [word in ("<bos>", "<image>") for word in words_of(text[0])]
    assert words_of(TOKENS.begin(2)[1]) == ["<bos>", "<image>"]
    assert words_of(TOKENS.interleave(names[:, :0], query=True)[0]) == ["<bos>", "<image>"]


@pytest.mark.parametrize("shots", [0, 1, 2, 5, 8])
@pytest.mark.parametrize("shuffle", [False, True])
def test_prompts_ask_for_what_they_told(shots: int, shuffle: bool) -> None:
    features = telling_features()
    prompts = world.draw_prompts(features, [4, 7, 9], shots, 60, seed=3, shuffle=shuffle)
    assert prompts.images.shape == prompts.which.shape == (60, shots + 1)
    assert torch.isin(prompts.names, world.ids_of(world.UNSEEN_NAMES)).all()
    assert (prompts.names[:, 0] != prompts.names[:, 1]).all()
    digits = features.digits[prompts.images]
    for row in range(60):
        shown = prompts.which[row, :-1]
        assert abs(int((shown == 0).sum()) - int((shown == 1).sum())) <= 1
        for each in (0, 1):
            assert len(digits[row, prompts.which[row] == each].unique()) <= 1
        assert len(digits[row].unique()) == len(prompts.which[row].unique())
        assert len(prompts.images[row].unique()) == shots + 1
        assert prompts.shown[row].sort().values.equal(shown.sort().values)
        assert prompts.answers[row] == prompts.names[row, prompts.which[row, -1]]
    assert set(digits.flatten().tolist()) <= {4, 7, 9}
    if shots:
        assert torch.equal(prompts.shown, prompts.which[:, :-1]) == (not shuffle or shots == 1)
    assert 0.2 < prompts.which[:, -1].float().mean() < 0.8


def test_shuffled_prompts_tell_nothing() -> None:
    prompts = world.draw_prompts(telling_features(), [4, 7], 8, 2000, seed=0, shuffle=True)
    agree = (prompts.shown == prompts.which[:, :-1]).float().mean()
    assert abs(agree - 0.5) < 0.02


def test_the_same_seed_gives_the_same_prompts_and_disturbs_nothing() -> None:
    features = telling_features()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = (world.draw_prompts(features, [4, 7], 4, 10, seed=2) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    others = [world.draw_prompts(features, [4, 7], 4, 10, seed=seed).images for seed in (2, 3)]
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.names, second.names)
    assert any(not torch.equal(a, b) for a, b in pairwise(others))
