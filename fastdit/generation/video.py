"""Videos on disk: written under a temporary name and moved when complete, and read frame by frame."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import LONGEST_NAME, cut, moved_when_complete
from .errors import InputError

if TYPE_CHECKING:
    import numpy as np

SUFFIXES = (".mp4", ".mkv", ".mov")
CODEC = "libx264"
QUALITY = ("-crf", "12", "-preset", "medium")
TRIED = 32
"""Side in pixels of the picture that shows whether videos can be written."""


def check_ffmpeg(*, writes: bool = True) -> str:
    """Return the path of ffmpeg.

    Args:
        writes: Whether videos will be written, so that one is tried.

    Raises:
        InputError: There is none that runs, or it cannot write H.264.
    """
    import imageio_ffmpeg

    fix = "pip install imageio-ffmpeg, or put the path of one into IMAGEIO_FFMPEG_EXE"
    try:
        path = imageio_ffmpeg.get_ffmpeg_exe()
        subprocess.run([path, "-version"], check=True, capture_output=True)
    except RuntimeError as error:
        raise InputError(f"no ffmpeg was found, and videos cannot be written or read without it: {fix}") from error
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(f"the ffmpeg that was found does not run ({error}): {fix}") from error
    if writes:
        raw = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{TRIED}x{TRIED}", "-i", "-")
        command = [path, "-v", "error", *raw, "-c:v", CODEC, *QUALITY, "-pix_fmt", "yuv420p", "-f", "null", "-"]
        tried = subprocess.run(command, input=bytes(3 * TRIED**2), capture_output=True, check=False)
        if tried.returncode:
            said = " ".join(tried.stderr.decode(errors="replace").split()) or f"it ended with {tried.returncode}"
            raise InputError(f"the ffmpeg at {path} cannot write H.264 with {CODEC} ({said[:200]}): {fix}")
    return path


def check_target(path: Path, suffixes: tuple[str, ...] | None = SUFFIXES, *, new_folder: bool = False) -> None:
    """Check that a file can be written, before any work is done.

    Args:
        path: The file.
        suffixes: What its name may end with; ``None`` for anything.
        new_folder: Whether its folder is made when the file is, if only the folder's own is there.

    Raises:
        InputError: The folder does not exist or cannot be written, the path is a folder, or its suffix is another.
    """
    check_name(path)
    if os.path.isdir(path):
        raise InputError(f"cannot write {path}: it is a folder; pass a file name")
    if suffixes is not None and path.suffix.lower() not in suffixes:
        there = "" if path.suffix else "there is no such folder, and "
        raise InputError(f"cannot write {path}: {there}the name of the file must end with {' or '.join(suffixes)}")
    check_folder(path.parent, new=new_folder)
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"cannot write {path}: it is a device or a pipe; pass a file name")
    if os.path.exists(path) and not os.access(path, os.W_OK):
        raise InputError(f"cannot write {path}: the file exists and is read-only")


def check_name(path: Path) -> None:
    """Check that a name is not longer than file systems allow.

    Args:
        path: A file or a folder.

    Raises:
        InputError: It is.
    """
    size = len(os.fsencode(path.name))
    if size > LONGEST_NAME:
        raise InputError(
            f"cannot write {cut(path.name, 40)}...: the name has {size} bytes, and file systems allow {LONGEST_NAME}; "
            "give a shorter one"
        )


def check_folder(folder: Path, *, new: bool = False, option: str = "--output") -> None:
    """Check that files can be made in a folder.

    Args:
        folder: The folder.
        new: Whether it may be missing, and is made when it is needed.
        option: What names it.

    Raises:
        InputError: It does not exist, is none, or cannot be written.
    """
    check_name(folder)
    if new and not os.path.lexists(folder):
        folder = folder.parent
    if not os.path.lexists(folder):
        raise InputError(f"the folder {folder} does not exist; make it with: mkdir -p {folder}")
    if not os.path.isdir(folder):
        raise InputError(f"{folder} is a file, not a folder; pass another path to {option}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"the folder {folder} cannot be written; pass another path to {option}")


def write_video(frames: np.ndarray, path: Path, *, fps: float, advance: Callable[[], object] = lambda: None) -> None:
    """Write a video as H.264.

    Args:
        frames: ``(F, H, W, 3)`` in [0, 1].
        path: A name with one of ``SUFFIXES``.
        fps: Frames per second, above 0.
        advance: Called after each frame.

    Raises:
        InputError: The written video is incomplete, as on a full disk.
    """
    import imageio

    even = frames.shape[1] % 2 == 0 and frames.shape[2] % 2 == 0
    with moved_when_complete(path) as part:
        writer = imageio.get_writer(
            part,
            format="FFMPEG",  # type: ignore[arg-type]
            fps=fps,
            codec=CODEC,
            quality=None,
            macro_block_size=1,
            pixelformat="yuv420p" if even else "yuv444p",
            output_params=list(QUALITY),
            ffmpeg_log_level="error",
        )
        # the writer's own context manager leaves ffmpeg running after an error
        with closing(writer):
            for frame in frames:
                writer.append_data(to_bytes(frame))
                advance()
        VideoFile.open(part)


def to_bytes(frames: np.ndarray) -> np.ndarray:
    """Round colours to bytes.

    Args:
        frames: ``(..., 3)`` in [0, 1]; what is outside is clipped.

    Returns:
        The same shape, uint8.
    """
    return (frames.clip(0, 1) * 255 + 0.5).astype("uint8")


def side_by_side(left: np.ndarray, right: np.ndarray, gap: int = 8) -> np.ndarray:
    """Put two videos next to each other, with a white bar between them.

    Args:
        left: ``(F, H, W, 3)`` in [0, 1].
        right: ``(F, H, W, 3)`` in [0, 1].
        gap: Width of the bar in pixels, at least 0.

    Returns:
        ``(F, H, 2 * W + gap, 3)``.
    """
    import numpy as np

    bar = np.ones((*left.shape[:2], gap, left.shape[3]), dtype=left.dtype)
    return np.concatenate([left, bar, right], axis=2)


def _reader(path: Path) -> Any:
    import imageio

    return imageio.get_reader(path, format="FFMPEG")  # type: ignore[arg-type]


@dataclass(frozen=True)
class VideoFile:
    """Describe a video on disk.

    Args:
        path: The file.
        width: Pixels.
        height: Pixels.
        fps: Frames per second.
    """

    path: Path
    width: int
    height: int
    fps: float

    @classmethod
    def open(cls, path: Path) -> VideoFile:
        """Look at a file.

        Args:
            path: The file.

        Raises:
            InputError: It does not exist or is not a video.
        """
        if not os.path.isfile(path):
            raise InputError(f"no video {path} was found")
        try:
            with _reader(path) as reader:
                meta = reader.get_meta_data()
                width, height = meta["size"]
        except Exception as error:
            raise InputError(f"{path} cannot be read as a video; is it complete?") from error
        return cls(path, int(width), int(height), float(meta["fps"]))

    def frames(self) -> Iterator[np.ndarray]:
        """Yield the frames, ``(H, W, 3)`` uint8 each.

        Raises:
            InputError: The file breaks off.
        """
        with _reader(self.path) as reader:
            try:
                yield from reader
            except (RuntimeError, OSError) as error:
                raise InputError(f"{self.path} ends in the middle of a frame; is it complete?") from error
