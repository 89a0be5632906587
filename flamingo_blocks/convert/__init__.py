"""Released checkpoints of the Flamingo family, loaded here and written back.

One module a family: `open_flamingo`, `idefics`, `mllama`, `flamingo_mini`, `flamingo_pytorch`. On the command line:

    python -m flamingo_blocks.convert open_flamingo checkpoint.pt --out DIRECTORY
"""
