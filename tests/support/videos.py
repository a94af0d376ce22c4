"""Video files of known shades."""

from pathlib import Path

import av
import numpy as np

CODECS = {"mp4": ("libx264", 2), "mkv": ("libx264", 2), "webm": ("libvpx-vp9", 0), "avi": ("mpeg4", 0)}


def write_video(path: Path, frames: int = 23, height: int = 24, width: int = 32) -> Path:
    """Frame i is of shade 10 i, modulo 250; a key frame every 5."""
    codec, between = CODECS[path.suffix[1:]]
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 5, between
        stream.codec_context.thread_count = 1
        for i in range(frames):
            image = np.full((height, width, 3), 10 * i % 250, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode())
    return path


def shades(clip: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / 10) for frame in clip]
