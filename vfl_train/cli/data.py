"""`vfl-train data`."""

from __future__ import annotations

from vfl_train.cli.command import config_command
from vfl_train.config import DataConfig

EXAMPLE = """
vfl-train data check train.jsonl --image-root images
vfl-train data check 'pool-{000..011}.tar' --output report
vfl-train data preview owner/name --limit 3
"""


@config_command("data", DataConfig, EXAMPLE)
def data(config: DataConfig) -> None:
    """Look at training data.

    `check` reads every row and opens every image; it counts and names the rows that cannot be used and why,
    and what is odd about others: repeated ids, rows and images, boxes outside their image. `preview` prints
    the first rows as the model will see them, with what is trained on marked.

    Read are LLaVA, ShareGPT and messages rows as .json (one array) or .jsonl, parquet and Arrow files and
    folders of `datasets` with columns `messages` or `conversations` and `image` or `images`, webdataset
    .tar shards, and data sets of the Hub (owner/name). A video is a list of frames: `videos` holds one
    list of paths for each `<video>` of a row, `video` the list of the only one; video files are refused.
    """
    from vfl_train.data.check import check, preview

    (check if config.action == "check" else preview)(config)
