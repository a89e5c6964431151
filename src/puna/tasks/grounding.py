"""Where is the ...? One object of a composed scene is asked for, the answer is its box.

Scenes (`pictures.Scene`) hold 3 to 6 different things, so the question cannot be answered without finding the one it
names. Boxes are exact by construction and written by the one box format, `<box label="pizza">x1,y1,x2,y2</box>`,
integers 0-999 of the picture. A training picture may be asked about several things in one conversation, since
pictures cost more tokens than questions; a test scene (unseen, on kinds of background never trained on) is asked
about once. Graded by IoU >= 0.5 of the first box; chance is what the best constant box reaches on the same items.

`Scenes` are such scenes as pre-training documents: the picture, then where each thing in it is, one a line in random
order. Without questions a box costs half the tokens, and the label has to be recognised too. They come in lessons
(`LESSONS`), from one large thing on one tile to what the test shows: where a thing is can be learnt before which of
several is meant, and large things before small ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count as count_from

import numpy as np

from puna.errors import PunaError
from puna.processor import Given
from puna.processor.grounding import format_box, iou, parse_boxes
from puna.tasks.base import Item, Task, assistant, check, user
from puna.tasks.languages import weighted
from puna.tasks.pictures import SCENE_SIDE, SIDE, PictureRef, Placed, Scene, by_id
from puna.tasks.seeding import rng

QUESTIONS = (
    "Where is the {name}?",
    "Find the {name}.",
    "Point to the {name}.",
    "Locate the {name}.",
    "Show me the {name}.",
)


def is_plural(name: str) -> bool:
    """Whether an English name reads as plural ("grapes", not "bus", "glass" or "tennis")."""
    return name.endswith("s") and not name.endswith(("ss", "us", "is", "as"))


def ask(name: str, rand) -> str:
    """A question for the thing called `name`."""
    question = rand.choice(QUESTIONS).format(name=name)
    return question.replace("Where is", "Where are") if is_plural(name) else question


class Grounding(Task):
    """Boxes of named things in composed scenes.

    turns: the most questions a training scene is asked, at least 1; the fewest are half of it. tests: how many test
    scenes.
    """

    name = "grounding"

    def __init__(self, turns: int = 3, tests: int = 300):
        if turns < 1 or tests < 1:
            raise PunaError("grounding: turns and tests must be at least 1")
        self.turns = turns
        self.tests = tests

    def size(self, split: str = "test", level: int = 0) -> int | None:
        return self.tests if split == "test" else None

    def item(self, index: int, split: str = "train", seed: int = 0, level: int = 0) -> Item:
        check(self.name, index, split, level, 1, self.size(split))
        rand = rng(self.name, split, seed, index)
        scene = Scene(rand.getrandbits(40), split)
        objects = scene.objects
        turns = rand.randint(max(1, self.turns // 2), self.turns) if split == "train" else 1
        wanted = rand.sample(objects, min(len(objects), turns))
        messages = []
        for turn, spot in enumerate(wanted):
            name = by_id()[spot.concept].names["en"]
            box = "".join(written(spot, scene.side))
            messages += [user(ask(name, rand), *([scene] if turn == 0 else [])), assistant(box)]
        meta = {
            "task": self.name,
            "lang": "en",
            "concept": wanted[-1].concept,
            "style": wanted[-1].style,
            "box": list(wanted[-1].box(scene.side)),
            "objects": len(objects),
            "background": scene.background,
        }
        return Item(messages, "".join(written(wanted[-1], scene.side)), meta)

    def grade(self, item: Item, text: str) -> float:
        """1 if the first box in `text` and the true box have an IoU of at least 0.5; else 0."""
        boxes = parse_boxes(text)
        return float(bool(boxes) and iou(boxes[0], parse_boxes(item.answer)[0]) >= 0.5)

    def chance(self, items: Iterable[Item]) -> float:
        """Share of the items that the best constant box answers."""
        return best_constant_box([item.meta["box"] for item in items])[1]


@dataclass(frozen=True)
class Lesson:
    """A kind of scene: its side in pixels, how many things, and how long they are (shares of the side)."""

    side: int
    fewest: int
    most: int
    smallest: float
    largest: float


LESSONS = {  # each harder than the one before; a tile is SIDE pixels
    "one": Lesson(SIDE, 1, 1, 0.4, 0.9),
    "smaller": Lesson(SIDE, 1, 1, 0.2, 0.8),
    "few": Lesson(SIDE, 2, 4, 0.2, 0.45),
    "alone": Lesson(SCENE_SIDE, 1, 1, 0.1, 0.4),
    "pair": Lesson(SCENE_SIDE, 2, 2, 0.15, 0.4),
    "wide": Lesson(SCENE_SIDE, 2, 6, 0.2, 0.4),
    "all": Lesson(SCENE_SIDE, 3, 6, 0.1, 0.4),
}


class Scenes:
    """Scenes and the places of all that is in them, endless: `document(i)` is a pure function of (seed, i).

    lessons: weights of `LESSONS` (default: all alike). words: share of the scenes that say places in words, "pizza top
    left", instead of boxes. Of a box's two dozen tokens only a few depend on the picture, and the others' noise hides
    them for ten thousands of pictures; two words are learnt sooner (docs/LOG.md), and boxes after them. The name comes
    first, as in a caption: what is asked for is known before its place is.
    told: False leaves the lines out, for the vision tower's own stage, which looks at nothing but pictures.
    """

    name = "scenes"

    def __init__(self, lessons: dict[str, float] | None = None, words: float = 0.0, told: bool = True):
        self.lessons = dict.fromkeys(LESSONS, 1.0) if lessons is None else dict(lessons)
        for lesson, weight in self.lessons.items():
            if lesson not in LESSONS or not weight >= 0:
                raise PunaError(
                    f"scenes: lessons are {', '.join(LESSONS)}, with weights of at least 0; got {lesson!r}: {weight}"
                )
        if not any(self.lessons.values()) or not 0 <= words <= 1:
            raise PunaError(f"scenes: needs a lesson of positive weight, and words in 0..1, not {words}")
        self.words, self.told = words, told

    def document(self, index: int, seed: int = 0) -> list[str | PictureRef]:
        """Document `index`: a training scene, then a line for each thing, in random order."""
        rand = rng(self.name, seed, index)
        lesson = LESSONS[weighted(self.lessons, rand)]
        sizes = (lesson.fewest, lesson.most, lesson.smallest, lesson.largest)
        scene = Scene(rand.getrandbits(40), "train", lesson.side, *sizes)
        if not self.told:
            return [scene]  # not drawn yet
        objects = rand.sample(scene.objects, len(scene.objects))
        line = in_words if rand.random() < self.words else written
        parts: list[str | PictureRef] = [scene]
        for i, spot in enumerate(objects):
            label, where = line(spot, scene.side)
            parts += [Given("\n" * (i > 0) + label), where]
        return parts

    def documents(self, seed: int = 0, start: int = 0) -> Iterator[list[str | PictureRef]]:
        """Documents from `start` on, without end."""
        for index in count_from(start):
            yield self.document(index, seed)


def in_words(spot: Placed, side: int) -> tuple[str, str]:
    """An object's English name and its place in words: "pizza", " top left"."""
    return by_id()[spot.concept].names["en"], f" {place(spot, side)}"


def place(spot: Placed, side: int) -> str:
    """Where the middle of an object is, in two words: the row and the column of a 3 x 3 grid, "middle right"."""
    row, column = (3 * (a + b) // (2 * side) for a, b in ((spot.top, spot.bottom), (spot.left, spot.right)))
    return f"{('top', 'middle', 'bottom')[row]} {('left', 'centre', 'right')[column]}"


def written(spot: Placed, side: int) -> tuple[str, str]:
    """An object's box in the box format, labelled with its English name: the label's part, and the rest."""
    box = format_box(by_id()[spot.concept].names["en"], spot.box(side))
    at = box.index(">") + 1
    return box[:at], box[at:]


def best_constant_box(boxes: list, steps: int = 16) -> tuple[tuple[int, int, int, int], float]:
    """The one box that has IoU >= 0.5 with most of `boxes` (x1, y1, x2, y2), and the share it reaches.

    Searched among the boxes themselves and all boxes on a grid of `steps` x `steps`. PunaError on no boxes.
    """
    if not len(boxes):
        raise PunaError("a chance level needs at least one item")
    true_N4 = np.asarray(boxes, np.float32)
    edges = np.linspace(0, 999, steps + 1).round()
    low_P, high_P = (edges[index] for index in np.triu_indices(steps + 1, 1))
    x, y = np.divmod(np.arange(len(low_P) ** 2), len(low_P))
    grid_C4 = np.stack([low_P[x], low_P[y], high_P[x], high_P[y]], 1)
    candidates_C4 = np.concatenate([true_N4, grid_C4]).astype(np.float32)
    hits_C = np.zeros(len(candidates_C4), np.int64)
    area_C = np.prod(candidates_C4[:, 2:] - candidates_C4[:, :2], axis=1)
    for true_4 in true_N4:
        shared_C2 = np.minimum(candidates_C4[:, 2:], true_4[2:]) - np.maximum(candidates_C4[:, :2], true_4[:2])
        shared_C = np.prod(np.maximum(shared_C2, 0), axis=1)
        hits_C += 3 * shared_C >= area_C + np.prod(true_4[2:] - true_4[:2])  # shared / union >= 1/2
    best = int(hits_C.argmax())
    return tuple(int(edge) for edge in candidates_C4[best]), float(hits_C[best] / len(true_N4))
