"""Event files in the run folder, by the tensorboard package alone: no torch, no tensorflow.

protobuf makes its message classes at import, so the type checker cannot see them.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flowgrpo_ray.run.trackers.base import Picture, TrackedRun, Tracker

FOLDER = "tensorboard"


class TensorBoardTracker(Tracker):
    """Scalars; the spec as hparams and as text; a picture of each prompt, and a table of scores."""

    def __init__(self) -> None:
        self._events: Any = None
        self._introduced = False

    def start(self, run: TrackedRun) -> None:
        self._run = run

    def log(self, values: Mapping[str, float], iteration: int) -> None:
        self._write(iteration, [{"tag": t, "simple_value": v} for t, v in values.items()])

    def pictures(self, pictures: Sequence[Picture], iteration: int) -> None:
        values = [
            {
                "tag": f"eval/pictures/{place:02}",
                "image": _encoded(picture),
                "metadata": {"summary_description": picture.prompt},
            }
            for place, picture in enumerate(pictures)
        ]
        self._write(iteration, [*values, _text("eval/pictures", _table(pictures))])

    def rewind(self, iteration: int) -> None:
        """Make readers drop what earlier event files hold of later steps."""
        from tensorboard.compat.proto.event_pb2 import SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        if self._folder.exists():
            self._add(iteration + 1, session_log=SessionLog(status=SessionLog.START))
            self._introduced = False

    def finish(self, failed: bool) -> None:
        if self._events:
            self._events.close()

    @property
    def _folder(self) -> Path:
        return self._run.folder / FOLDER

    def _write(self, step: int, values: Sequence[Mapping[str, Any]]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        if not self._introduced:
            self._introduced = True
            self._introduce()
        self._add(step, summary=Summary(value=[Summary.Value(**value) for value in values]))

    def _introduce(self) -> None:
        """The spec, for the tabs HParams and Text. The name as trial id: two runs of one spec are
        two rows there."""
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb

        plain = {
            key: value if isinstance(value, bool | int | float | str) else json.dumps(value)
            for key, value in self._run.flat().items()
        }
        self._add(0, summary=hparams_pb(plain, trial_id=self._run.name))
        spec = yaml.safe_dump(self._run.spec, sort_keys=False, allow_unicode=True)
        texts = [_text("spec", f"```yaml\n{spec}```")]
        if self._run.notes:
            texts.append(_text("notes", self._run.notes))
        self._write(0, texts)

    def _add(self, step: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._events is None:
            self._events = EventFileWriter(str(self._folder))
        self._events.add_event(Event(wall_time=time.time(), step=step, **content))
        self._events.flush()


def _encoded(picture: Picture) -> dict[str, Any]:
    png = io.BytesIO()
    picture.image().save(png, format="PNG")
    height, width, _ = picture.pixels.shape
    return {
        "height": height,
        "width": width,
        "colorspace": 3,  # RGB
        "encoded_image_string": png.getvalue(),
    }


def _text(tag: str, markdown: str) -> dict[str, Any]:
    from tensorboard.plugins.text.metadata import create_summary_metadata

    tensor = {"dtype": "DT_STRING", "tensor_shape": {}, "string_val": [markdown.encode()]}
    return {"tag": tag, "metadata": create_summary_metadata("", ""), "tensor": tensor}


def _table(pictures: Sequence[Picture]) -> str:
    """Prompts and scores, as Markdown."""
    rewards = list(pictures[0].scores)
    rows = [["picture", "prompt", *rewards], ["---"] * (len(rewards) + 2)]
    for place, picture in enumerate(pictures):
        scores = ["–" if s is None else f"{s:.4g}" for s in picture.scores.values()]
        prompt = picture.prompt.replace("|", "\\|").replace("\n", " ")
        rows.append([f"{place:02}", prompt, *scores])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
