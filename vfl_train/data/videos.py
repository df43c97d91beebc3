"""Videos: lists of frames that somebody else cut, never files.

Which frames a model sees is decided by whoever made the list: a processor that samples frames anew is told
not to, so that one row gives the same tokens everywhere. All models are told `FPS` frames a second, which is
what Qwen's own tools and LLaMA-Factory sample at; it sets timestamps and temporal positions.

Source: qwen-vl-utils, vision_process.py (`FPS`, and the metadata it makes of a list of frames).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vfl_train.data.images import image_size, open_image
from vfl_train.data.rows import ImageRef, Reason, Row, RowError, one_line

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

FPS = 2.0
MAX_FRAMES = 768  # of all videos of one row together; what Qwen's processors sample at most of one
MAX_FRAME_PIXELS = 400_000_000  # of them all, decoded: 1.2 GB


def video_file(name: object) -> RowError:
    """The refusal of a video that is named by one file."""
    detail = f"{one_line(str(name), 120)} is one file where a video's list of frames should be"
    fix = "cut it (ffmpeg -i clip.mp4 -vf fps=2 clip/%04d.jpg) and list the frames"
    return RowError(Reason.video_file, f"{detail}: {fix}", fix)


def check_frame_count(counts: Sequence[int]) -> None:
    """Raises RowError for a video without frames, or too many in all; `counts`: frames of each video."""
    if 0 in counts:
        raise RowError(Reason.video_frames, "a video without frames")
    if sum(counts) > MAX_FRAMES:
        detail = f"{sum(counts)} frames in the videos of one row, at most {MAX_FRAMES} are allowed"
        raise RowError(Reason.video_frames, detail)


def verify_videos(videos: Sequence[Sequence[ImageRef]]) -> RowError | None:
    """Why the frames of a row's videos cannot be used together, by their headers, or None."""
    try:
        check_frames([[image_size(ref) for ref in refs] for refs in videos])
    except RowError as error:
        return error.with_traceback(None)
    return None


def check_frames(sizes: Sequence[Sequence[tuple[int, int]]]) -> None:
    """Raises RowError unless the frames of each video are of one size, (width, height), and all together are
    few and small enough to be decoded at once."""
    check_frame_count([len(frames) for frames in sizes])
    for frames in sizes:
        if len(set(frames)) > 1:
            shown = " and ".join(f"{width} x {height}" for width, height in sorted(set(frames))[:2])
            raise RowError(Reason.video_frames, f"frames of one video differ in size ({shown})")
    if sum(width * height for frames in sizes for width, height in frames) > MAX_FRAME_PIXELS:
        detail = f"the frames of the videos have more than {MAX_FRAME_PIXELS} pixels together"
        raise RowError(Reason.video_frames, detail)


def open_row(row: Row) -> tuple[list[PilImage], list[list[PilImage]]]:
    """The images and the frames of the videos of a row, decoded.

    Raises:
        RowError: one cannot be used, or the frames differ in size, are too many or too large.
    """
    videos = open_videos(row.videos)
    return [open_image(ref) for ref in row.images], videos


def open_videos(videos: Sequence[Sequence[ImageRef]]) -> list[list[PilImage]]:
    """The frames of videos, decoded; their sizes are looked at before. Raises RowError as `open_row`."""
    check_frames([[image_size(ref) for ref in refs] for refs in videos])
    return [[open_image(ref) for ref in refs] for refs in videos]


def processor_options(processor: Any, videos: Sequence[Sequence[PilImage]]) -> dict[str, Any]:
    """What a processor's call is given for `videos`: frames and how it must take them.

    Raises:
        RowError: it takes no videos, or the frames of one differ in size or are too many.
    """
    if not videos:
        return {}
    if getattr(processor, "video_processor", None) is None or not getattr(processor, "video_token", None):
        raise RowError(Reason.not_encodable, f"this model's {type(processor).__name__} takes no videos")
    for frames in videos:
        if isinstance(frames, str | os.PathLike):  # processors would open it, or fetch it
            raise video_file(frames)
    check_frames([[frame.size for frame in frames] for frames in videos])
    options: dict[str, Any] = {
        "do_sample_frames": False,
        "video_metadata": [
            {"total_num_frames": len(frames), "fps": FPS, "frames_indices": list(range(len(frames)))}
            for frames in videos
        ],
    }
    if getattr(processor.video_processor, "cap_pixels_per_frame", True) is None:
        # Left open, its meaning changes with the version of transformers; so the models were trained.
        options["cap_pixels_per_frame"] = True
    return {"videos": [list(frames) for frames in videos], "videos_kwargs": options}
