"""Packer: several examples in a row, so that little of a batch is padding."""

from collections.abc import Iterator

from flamingo_blocks.data.examples import Example


class Packer:
    """Fill rows with examples in the order in which they come: an example that does not fit begins the next row.

    Args:
        length: The most tokens of a row.
        max_media: The most media of a row, which bounds the memory that they take. None: any number.

    Attributes:
        held: The example that was taken from the iterator, but is in no row yet; it begins the next one. Who goes on
            later, from a saved state, must keep it, or know how to make it again.

    Raises:
        ValueError: If a number is not positive.
    """

    held: Example | None

    def __init__(self, length: int, *, max_media: int | None = None) -> None:
        if length < 1 or (max_media is not None and max_media < 1):
            raise ValueError(f"length and max_media must be at least 1, got {length} and {max_media}")
        self.length = length
        self.max_media = max_media
        self.held = None

    def next_row(self, examples: Iterator[Example]) -> list[Example]:
        """Fill a row.

        Args:
            examples: Where to take them from, one after the other.

        Returns:
            The row's examples; none, if there are no more.

        Raises:
            ValueError: If an example does not fit into a row of its own.
        """
        row: list[Example] = []
        while (example := next(examples, None) if self.held is None else self.held) is not None:
            self.held = example
            if not self._fits([example]):
                raise ValueError(
                    f"an example has {len(example)} tokens and {len(example.media)} media, but a row takes "
                    f"{self.length} tokens and {'any number of' if self.max_media is None else self.max_media} media; "
                    "make rows longer, or examples shorter by max_tokens and max_media of ExampleMaker"
                )
            if not self._fits([*row, example]):
                break
            row.append(example)
            self.held = None
        return row

    def _fits(self, row: list[Example]) -> bool:
        media = sum(len(example.media) for example in row)
        return sum(map(len, row)) <= self.length and (self.max_media is None or media <= self.max_media)
