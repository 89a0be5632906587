"""The world of train_tiny.py: handwritten digits, a made-up language, and prompts that join the two.

Everything is drawn from torch's random numbers, so that a seed gives the same world again.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from flamingo_blocks.processing_flamingo import FlamingoImageProcessor

IMAGE_SIZE = 32
# Of the images' pixels, which are in 0..1.
MEAN, STD = 0.3, 0.35

# ---------------------------------------------------------------- words


def make_up_words(count: int) -> list[str]:
    """Make up words such as "bado" or "kig", always the same."""
    consonants, vowels = "bdfgklmnprstvz", "aeiou"
    syllables = [a + b + c for a in consonants for b in vowels for c in consonants]
    order = torch.randperm(len(syllables), generator=torch.Generator().manual_seed(0)).tolist()
    return [syllables[i] + vowels[i % 5] * (i % 2) for i in order[:count]]


DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ORIENTATIONS = [
    "upright",
    "left",
    "upside-down",
    "right",
    "mirrored",
    "mirrored-left",
    "mirrored-upside-down",
    "mirrored-right",
]
ENDINGS = ["-ba", "-do", "-ki", "-le", "-mu", "-no", "-pi", "-ra"]
_MADE_UP = make_up_words(144)
# Names are what things are called. The language model knows all of them; stage 3 uses the first 32 alone.
NAMES, NOUNS = _MADE_UP[:48], _MADE_UP[48:]
TRAINED_NAMES, UNSEEN_NAMES = NAMES[:32], NAMES[32:]
VOCABULARY = ["<pad>", "<bos>", "<eos>", "<unk>", ".", "a", "handwritten"]
VOCABULARY += DIGITS + ORIENTATIONS + ENDINGS + NAMES + NOUNS
TOKEN = {word: index for index, word in enumerate(VOCABULARY)}


def ids_of(words: list[str]) -> Tensor:
    """Look words up."""
    return torch.tensor([TOKEN[word] for word in words])


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of one token a word. It knows neither `<image>` nor `<EOC>`."""
    words = Tokenizer(models.WordLevel(TOKEN, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )


# ---------------------------------------------------------------- text without images


def write_entries(rows: int, *, entries: int = 10, rare_nouns: bool = False) -> tuple[Tensor, Tensor]:
    """Write texts such as "<bos> kig bado -le mup sona -ki kig bado -le ...": noun, name, ending.

    A noun's name is drawn anew for each text: it can be told only from the text before. The ending agrees with the
    noun. As in natural language, a few nouns are frequent and most are rare.

    Args:
        rows: Number of texts.
        entries: Of each text, over 2 to 5 nouns. In 3 of 10 texts, 5 nouns come once each, then again in another order.
        rare_nouns: Draw all nouns equally often, and no texts of the second kind: for testing.

    Returns:
        Token ids, (rows, 1 + 3 * entries); and whether a noun was named before, so that its name can be known,
        (rows, entries).
    """
    rank = torch.arange(1, len(NOUNS) + 1)
    weight = torch.ones(len(NOUNS)) if rare_nouns else 1 / rank
    nouns = weight.expand(rows, -1).multinomial(5)
    names = torch.ones(rows, len(NAMES)).multinomial(5)
    which = (torch.rand(rows, entries) * torch.randint(2, 6, (rows, 1))).long()
    if not rare_nouns:
        twice = torch.cat([torch.arange(5).expand(rows, 5), torch.rand(rows, 5).argsort(1)], dim=1)
        which[: 3 * rows // 10, :10] = twice[: 3 * rows // 10, :entries]
    nouns, names = nouns.gather(1, which), names.gather(1, which)
    words = [ids_of(NOUNS)[nouns], ids_of(NAMES)[names], ids_of(ENDINGS)[nouns % len(ENDINGS)]]
    text = F.pad(torch.stack(words, dim=-1).flatten(1), (1, 0), value=TOKEN["<bos>"])
    return text, named_before(which)


def named_before(which: Tensor) -> Tensor:
    """Tell for each item of each row whether the same number stands earlier in its row."""
    return (which[:, :, None] == which[:, None, :]).tril(-1).any(-1)


def write_captions(rows: int, *, captions: int = 7) -> Tensor:
    """Write texts such as "<bos> a handwritten two . a handwritten nine . ...", about nothing."""
    text = caption(torch.randint(10, (rows * captions,)), end=TOKEN["."]).view(rows, -1)
    return F.pad(text, (1, 0), value=TOKEN["<bos>"])


def caption(digits: Tensor, *, end: int, orientations: Tensor | None = None) -> Tensor:
    """Write "a handwritten (mirrored) seven" and `end` for each digit: images -> images text."""
    words = [torch.full_like(digits, TOKEN["a"]), torch.full_like(digits, TOKEN["handwritten"])]
    if orientations is not None:
        words.append(ids_of(ORIENTATIONS)[orientations])
    return torch.stack([*words, ids_of(DIGITS)[digits], torch.full_like(digits, end)], dim=-1)


# ---------------------------------------------------------------- images


@dataclass
class Digits:
    """Scans of handwritten digits."""

    pictures: list[Image.Image]
    pixel_values: Tensor  # images channels height width
    digits: Tensor  # images


def load_splits() -> dict[str, Digits]:
    """Load the digits in a fixed split: whatever is tuned is tuned on "val", never on "test"."""
    data = load_digits()
    pictures = [Image.fromarray((image * 255 / 16).round().astype("uint8")) for image in data.images]
    pixel_values = make_image_processor()(pictures)["pixel_values"]
    digits = torch.tensor(data.target)
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(1234))
    parts = dict(zip(("train", "val", "test"), order.split([997, 300, 500]), strict=True))
    return {
        name: Digits([pictures[i] for i in part.tolist()], pixel_values[part], digits[part])
        for name, part in parts.items()
    }


def make_image_processor() -> FlamingoImageProcessor:
    """Make what brings pictures to the size and range that the vision encoder takes."""
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return FlamingoImageProcessor(size=size, image_mean=[MEAN], image_std=[STD], channels=1)


def orient(pixel_values: Tensor, orientation: int) -> Tensor:
    """Turn images by quarters, counter-clockwise; from the fifth orientation on mirror them first."""
    if orientation >= 4:
        pixel_values = pixel_values.flip(-1)
    return pixel_values.rot90(orientation % 4, (-2, -1))


def orient_all(pixel_values: Tensor) -> Tensor:
    """Show images in every orientation: images ... -> images orientations ..."""
    return torch.stack([orient(pixel_values, i) for i in range(len(ORIENTATIONS))], dim=1)


# ---------------------------------------------------------------- images and text


class Features:
    """What the frozen vision encoder makes of images in each orientation, once for all.

    Args:
        features: (images, orientations, patches, vision_dim).
        digits: (images,).
    """

    def __init__(self, features: Tensor, digits: Tensor) -> None:
        self.features = features
        self.digits = digits
        found = [(digits == digit).nonzero().squeeze(-1) for digit in range(10)]
        self.count = torch.tensor([len(images) for images in found])
        # The images of each digit, padded to the most frequent one.
        self.by_digit = torch.nn.utils.rnn.pad_sequence(found, batch_first=True)

    def draw(self, digits: Tensor, which: Tensor) -> Tensor:
        """Draw different images of each class.

        Args:
            digits: The digit of each class, (batch, classes).
            which: The class of each image, (batch, images).

        Returns:
            Indices of images, (batch, images).
        """
        images = self.by_digit[digits]
        is_padding = torch.arange(images.shape[-1]) >= self.count[digits][..., None]
        order = torch.rand(images.shape).masked_fill(is_padding, 2).argsort(-1)
        one_hot = F.one_hot(which, digits.shape[1])
        nth = ((one_hot.cumsum(1) - one_hot) * one_hot).sum(-1)
        rows = torch.arange(len(which))[:, None]
        return images[rows, which, order[rows, which, nth]]


@dataclass
class Tokens:
    """Ids of the two tokens that join images and text; they are new to the language model."""

    image: int
    end_of_chunk: int

    def interleave(self, names: Tensor, *, query: bool = False) -> Tensor:
        """Write "<bos> <image> name <EOC> <image> name <EOC> ...", with one more <image> for a query."""
        image, end = torch.full_like(names, self.image), torch.full_like(names, self.end_of_chunk)
        text = F.pad(torch.stack([image, names, end], dim=-1).flatten(1), (1, 0), value=TOKEN["<bos>"])
        return F.pad(text, (0, 1), value=self.image) if query else text

    def begin(self, rows: int) -> Tensor:
        """Write "<bos> <image>", after which a caption comes."""
        return torch.tensor([[TOKEN["<bos>"], self.image]]).repeat(rows, 1)

    def labels(self, input_ids: Tensor) -> Tensor:
        """Mask what is given, not predicted."""
        return input_ids.masked_fill((input_ids == self.image) | (input_ids == TOKEN["<bos>"]), -100)


def make_up_characters(train: Digits, digits: list[int], *, characters: int = 400, copies: int = 16) -> Tensor:
    """Make up characters that nobody knows: one digit over another, or half of one beside half of another.

    Args:
        train: Images to make them of.
        digits: Digits that may be used.
        characters: How many.
        copies: Of each, from other images of the same two digits in the same orientations.

    Returns:
        Pixel values, (characters, copies, channels, height, width).
    """
    used = [(train.digits == digit).nonzero().squeeze(-1) for digit in digits]
    turned = orient_all(train.pixel_values)
    position = torch.arange(IMAGE_SIZE) - (IMAGE_SIZE - 1) / 2
    made = []
    for _ in range(characters):
        first, second = (
            turned[used[which][torch.randint(len(used[which]), (copies,))], orientation]
            for which, orientation in zip(
                torch.randint(len(digits), (2,)).tolist(), torch.randint(len(ORIENTATIONS), (2,)).tolist(), strict=True
            )
        )
        angle = 2 * torch.pi * torch.rand(())
        is_first_half = position[:, None] * angle.sin() + position * angle.cos() > 0
        over, beside = first.maximum(second), first.where(is_first_half, second)
        made.append(over if torch.rand(()) < 0.5 else beside)
    return torch.stack(made)


def draw_episodes(
    features: Features, characters: Tensor, digits: list[int], rows: int, *, images: int = 10
) -> tuple[Tensor, Tensor]:
    """Draw texts in which 2 to 5 kinds of images get names: the same kind the same name, in this text alone.

    In half of the texts a kind is a made-up character, in the others a digit in an orientation; of these, in a quarter
    all kinds differ in digit or orientation, in the others in digit. A fifth of the features is missing, others in each
    text. So there is no end of kinds, and to compare images is all that helps.

    Args:
        features: Images of digits to draw from.
        characters: Features of made-up characters, (characters, copies, patches, vision_dim).
        digits: Digits that may occur.
        rows: Number of texts.
        images: In each text.

    Returns:
        Token ids of the names, (rows, images); features, (rows, images, patches, vision_dim).
    """
    which = (torch.rand(rows, images) * torch.randint(2, 6, (rows, 1))).long()
    names = ids_of(TRAINED_NAMES)[torch.ones(rows, len(TRAINED_NAMES)).multinomial(5).gather(1, which)]
    of_digit = torch.tensor(digits)
    pairs = torch.ones(rows, len(ORIENTATIONS) * len(digits)).multinomial(5)
    fine = (of_digit[pairs // len(ORIENTATIONS)], pairs % len(ORIENTATIONS))
    coarse = (of_digit[torch.ones(rows, len(digits)).multinomial(5)], torch.randint(len(ORIENTATIONS), (rows, 5)))
    is_fine = torch.rand(rows, 1) < 0.25
    kinds, orientations = (torch.where(is_fine, *both) for both in zip(fine, coarse, strict=True))
    shown = features.features[features.draw(kinds, which), orientations.gather(1, which)]
    kinds = torch.ones(rows, len(characters)).multinomial(5).gather(1, which)
    made_up = characters[kinds, torch.randint(characters.shape[1], which.shape)]
    shown = torch.where(torch.rand(rows, 1, 1, 1) < 0.5, made_up, shown)
    return names, shown * (torch.rand(rows, 1, 1, shown.shape[-1]) > 0.2)


@dataclass
class Prompts:
    """Prompts that name images of two kinds and ask for the name of another one.

    Attributes:
        images: Indices of the images, the last one is asked for: (prompts, shots + 1).
        names: The two names, (prompts, 2).
        shown: Which of the two names stands behind each image, (prompts, shots).
        which: Which of the two each image really is, (prompts, shots + 1).
    """

    images: Tensor
    names: Tensor
    shown: Tensor
    which: Tensor

    @property
    def answers(self) -> Tensor:
        """Token ids of the right names."""
        return self.names.gather(1, self.which[:, -1:]).squeeze(1)


def draw_prompts(
    features: Features, digits: list[int], shots: int, count: int, *, seed: int, shuffle: bool = False
) -> Prompts:
    """Draw prompts of two digits, upright, and of two names that stage 3 never used.

    Args:
        features: Images to draw from.
        digits: Digits to draw from.
        shots: Images with a name in front of the one that is asked for, half of each digit, or one more of one.
        count: Number of prompts.
        seed: The same seed gives the same prompts, also for another model.
        shuffle: Shuffle the names of each prompt, as a control: then nothing can be learned from it.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        two = torch.tensor(digits)[torch.ones(count, len(digits)).multinomial(2)]
        names = ids_of(UNSEEN_NAMES)[torch.ones(count, len(UNSEEN_NAMES)).multinomial(2)]
        support = (torch.arange(shots) + torch.randint(2, (count, 1))) % 2
        support = support.gather(1, torch.rand(count, shots).argsort(1))
        which = torch.cat([support, torch.randint(2, (count, 1))], dim=1)
        shown = support.gather(1, torch.rand(count, shots).argsort(1)) if shuffle else support
        return Prompts(features.draw(two, which), names, shown, which)
