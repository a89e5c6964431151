"""Tasks: pure functions of (split, seed, index), JSON-able recipes, exact boxes, fair grades and chance levels."""

import json

import numpy as np
import pytest

from puna import nursery
from puna.errors import PunaError
from puna.processor import Given
from puna.processor.grounding import format_box, iou, parse_boxes
from puna.tasks import (
    TASKS,
    Captions,
    EmojiPicture,
    Item,
    PictureRef,
    Scene,
    Scenes,
    backgrounds,
    grounding,
    naming,
    needle,
    pictures,
    task,
)
from puna.tasks.addition import worked
from puna.tasks.base import most_frequent_share, normalise
from puna.tasks.conversations import TALK
from puna.tasks.grounding import ask, best_constant_box
from puna.tasks.seeding import rng


def count(text: str) -> int:
    """A stand-in for a tokenizer: words and marks, digits one by one."""
    return sum(len(word) if word.isdigit() else 1 + len(word) // 6 for word in text.split())


CONFIG = {"needle": {"length": 400, "count": count, "tests": 20}, "grounding": {"tests": 12}}
ALL = [pytest.param(name, id=name) for name in TASKS]


def make(name: str):
    return task(name, **CONFIG.get(name, {}))


def pixels(picture) -> np.ndarray:
    return np.asarray(picture.open())


# ---- what every task promises


@pytest.mark.parametrize("name", ALL)
def test_items_are_pure_functions_of_split_seed_and_index(name):
    first, second = make(name), make(name)
    stream = first.items("train", seed=3)
    streamed = [next(stream) for _ in range(12)]
    assert streamed == [second.item(i, "train", 3) for i in reversed(range(12))][::-1]
    assert next(second.items("train", seed=3, start=7)) == streamed[7]
    assert len({json.dumps(item.to_json(), sort_keys=True) for item in streamed}) > 6  # not one item again and again
    assert streamed != [first.item(i, "train", 4) for i in range(12)]
    assert first.item(0, "train", 3) != first.item(0, "test", 3)


@pytest.mark.parametrize("name", ALL)
def test_items_survive_json(name):
    for split in ("train", "test"):
        item = make(name).item(1, split)
        again = Item.from_json(json.loads(json.dumps(item.to_json())))
        assert again == item
        assert all((pixels(a) == pixels(b)).all() for a, b in zip(again.pictures, item.pictures, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_the_test_split_is_finite_and_each_right_answer_scores(name):
    source = make(name)
    items = list(source.items("test", seed=1))
    assert len(items) == source.size("test") > 0 and source.size("train") is None
    for item in items:
        assert item.messages[-1]["role"] == "assistant" and item.prompt == item.messages[:-1]
        assert source.grade(item, item.messages[-1]["content"]) == 1
        assert source.grade(item, "") == source.grade(item, "I do not know") == 0
    with pytest.raises(IndexError):
        source.item(len(items), "test")


@pytest.mark.parametrize("name", ALL)
def test_unknown_splits_and_levels_are_errors(name):
    with pytest.raises(PunaError, match="unknown split 'val'"):
        make(name).item(0, "val")
    with pytest.raises(PunaError, match="level 99 does not exist"):
        make(name).item(0, level=99)


def test_registry_names_the_nearest_valid_name():
    with pytest.raises(PunaError, match="did you mean 'naming'"):
        task("namin")
    with pytest.raises(PunaError, match="did you mean 'turns'"):
        task("grounding", turn=2)
    with pytest.raises(PunaError, match="needs the setting 'length'"):
        task("needle")
    assert set(TASKS) == {"addition", "conversations", "facts", "grounding", "naming", "needle", "recall"}


# ---- pictures


def test_picture_is_a_pure_function_of_its_recipe_and_augmentation_changes_it():
    concept, style = nursery.concepts()[0].id, nursery.STYLES_TRAIN[0]
    plain, other = EmojiPicture(concept, style), EmojiPicture(concept, style, 5)
    assert (pixels(other) == pixels(EmojiPicture(concept, style, 5))).all()
    assert (pixels(other) != pixels(plain)).any() and (pixels(other) != pixels(EmojiPicture(concept, style, 6))).any()
    assert plain.size == plain.open().size == other.open().size == (64, 64)
    assert other.open().mode == "RGB"


def test_a_plain_picture_is_the_drawing_on_white():
    concept, style = nursery.concepts()[0].id, nursery.STYLES_TRAIN[0]
    rgba = np.asarray(nursery.picture(concept, style)).astype(float)
    wanted = rgba[..., :3] * rgba[..., 3:] / 255 + 255 - rgba[..., 3:]
    assert np.abs(pixels(EmojiPicture(concept, style)) - wanted).max() <= 1


def test_things_with_a_meaningful_side_are_not_mirrored(monkeypatch):
    def concept(name, group="objects/tool"):
        return nursery.Concept(name, {"en": name}, {}, group, False, nursery.STYLES_TRAIN)

    named = [
        concept("left arrow"),
        concept("flag: Chile"),
        concept("musical note"),
        concept("dog"),
        concept("x", "flags"),
    ]
    monkeypatch.setattr(pictures, "by_id", lambda: {c.id: c for c in named})
    pictures.may_mirror.cache_clear()
    try:
        assert [pictures.may_mirror(c.id) for c in named] == [False, False, False, True, False]
    finally:
        pictures.may_mirror.cache_clear()


def test_affine_without_change_is_the_identity():
    source = nursery.picture(nursery.concepts()[0].id, nursery.STYLES_TRAIN[0])
    affine = pictures._inverse_affine(1, 0, 0, 0, False)
    assert affine == pytest.approx((1, 0, 0, 0, 1, 0))
    mirrored = source.transform(source.size, 0, pictures._inverse_affine(1, 0, 0, 0, True), 0)
    assert (np.asarray(mirrored) == np.asarray(source)[:, ::-1]).all()


def test_colour_matrix_keeps_colours_at_rest_and_greys_at_zero_saturation():
    matrix = np.array(pictures.colour_matrix(0, 1, 1)).reshape(3, 4)[:, :3]
    assert matrix == pytest.approx(np.eye(3), abs=1e-9)
    grey = np.array(pictures.colour_matrix(0.5, 0, 0.5)).reshape(3, 4)[:, :3]
    assert (grey == grey[0]).all() and grey[0].sum() == pytest.approx(0.5)


def test_bad_recipes_are_errors():
    with pytest.raises(PunaError, match="unknown picture kind"):
        PictureRef.from_json({"kind": "photo"})
    with pytest.raises(PunaError, match="wrong fields"):
        PictureRef.from_json({"kind": "emoji", "colour": 1})
    with pytest.raises(PunaError, match="split"):
        Scene(1, "val")
    with pytest.raises(PunaError, match="background"):
        backgrounds.background("sand", rng(1), 8, 8)


@pytest.mark.parametrize("kind", backgrounds.KINDS)
def test_backgrounds_follow_their_generator(kind):
    one, same, other = (np.asarray(backgrounds.background(kind, rng(s), 48, 32)) for s in (1, 1, 2))
    assert one.shape == (32, 48, 3) and (one == same).all()
    assert kind == "white" or (one != other).any()


# ---- scenes


@pytest.mark.parametrize("split", ["train", "test"])
def test_scene_boxes_are_exactly_the_visible_pixels(split):
    for seed in range(8):
        scene = Scene(seed, split)
        assert 3 <= len(scene.objects) <= 6
        empty = np.zeros((scene.side, scene.side), np.uint8)
        for spot, drawn in pictures.layout(scene):
            canvas = empty.copy()
            canvas[spot.top : spot.bottom, spot.left : spot.right] = np.asarray(drawn)[..., 3]
            ys, xs = np.nonzero(canvas >= pictures.VISIBLE)
            assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (spot.left, spot.top, spot.right, spot.bottom)
            longest = max(spot.right - spot.left, spot.bottom - spot.top)
            assert 0.1 * scene.side - 1.5 <= longest <= 0.4 * scene.side + 1
            assert spot.style in nursery.STYLES_TRAIN
        for i, a in enumerate(scene.objects):
            for b in scene.objects[i + 1 :]:
                assert iou(a.box(scene.side), b.box(scene.side)) < 0.06  # 0.05, and the rounding to 0-999


def test_scene_paints_its_objects_where_the_boxes_say(monkeypatch):
    scene = Scene(11, "test")
    painted = pixels(scene)
    bare = np.asarray(backgrounds.background(scene.background, rng("scene paint", "test", 11), scene.side, scene.side))
    changed = (painted != bare).any(-1)
    inside = np.zeros_like(changed)
    for spot in scene.objects:
        assert changed[spot.top : spot.bottom, spot.left : spot.right].mean() > 0.2
        inside[spot.top : spot.bottom, spot.left : spot.right] = True
    assert not changed[~inside].any()


def test_grounding_grade_and_plurals():
    source = make("grounding")
    item = source.item(0, "test")
    x1, y1, x2, y2 = item.meta["box"]
    assert parse_boxes(item.answer)[0].coordinates == (x1, y1, x2, y2)
    assert source.grade(item, f"It is here: {item.answer}") == 1
    far = format_box("x", ((x1 + 500) % 990, (y1 + 500) % 990, (x1 + 500) % 990 + 9, (y1 + 500) % 990 + 9))
    assert source.grade(item, far) == 0
    assert source.grade(item, far + item.answer) == 0  # the first box counts
    assert {ask(name, rng(0, k)).split(" the ")[0] for name in ("bus", "glass") for k in range(20)} >= {"Where is"}
    assert "Where are the grapes?" in {ask("grapes", rng(0, k)) for k in range(20)}


def test_training_scenes_are_asked_about_several_objects():
    conversations = [make("grounding").item(i) for i in range(20)]
    assert {len(item.messages) // 2 for item in conversations} == {1, 2, 3}
    for item in conversations:
        asked = [m["content"] for m in item.messages if m["role"] == "assistant"]
        assert len(item.pictures) == 1 and len(set(asked)) == len(asked)


def test_scenes_are_read_out_whole():
    source, orders = Scenes(), []
    for index in range(30):
        scene, *parts = source.document(index, seed=1)
        assert [isinstance(part, Given) for part in parts] == [True, False] * len(scene.objects)
        lines = "".join(parts).split("\n")
        boxes = ["".join(grounding.written(spot, scene.side)) for spot in scene.objects]
        assert sorted(lines) == sorted(boxes)
        assert scene.split == "train"
        orders.append(boxes == lines)
    assert not all(orders), "the order of painting would give boxes away"
    assert source.document(3, seed=1) == source.document(3, seed=1) != source.document(3, seed=2)


@pytest.mark.parametrize("lesson", grounding.LESSONS)
def test_scenes_keep_to_their_lesson(lesson):
    told = grounding.LESSONS[lesson]
    scenes = [Scenes({lesson: 1.0}).document(i)[0] for i in range(60)]
    counts, lengths = set(), []
    for scene in scenes:
        assert scene.side == told.side and scene.size == (told.side, told.side)
        counts.add(len(scene.objects))
        lengths += [max(o.right - o.left, o.bottom - o.top) / scene.side for o in scene.objects]
    assert counts == set(range(told.fewest, told.most + 1))
    # Crowded scenes take smaller things, down to a tenth; scaling rounds to pixels and crops what became invisible.
    assert min(lengths) > 0.05 and max(lengths) <= told.largest + 1.5 / told.side
    assert max(lengths) - min(lengths) > 0.5 * (told.largest - told.smallest)


def test_scenes_that_are_not_told_are_the_same_pictures():
    told, bare = Scenes({"pair": 1.0}), Scenes({"pair": 1.0}, told=False)
    for index in range(5):
        assert bare.document(index) == told.document(index)[:1] and len(told.document(index)) == 5
        assert len(bare.document(index)[0].objects) == 2


def test_scenes_mix_their_lessons_by_weight():
    sides = [Scenes({"one": 3.0, "all": 1.0}).document(i)[0].side for i in range(200)]
    assert 0.65 < sides.count(pictures.SIDE) / 200 < 0.85
    for wrong in ({"lessons": {"hard": 1.0}}, {"lessons": {"one": -1.0}}):
        with pytest.raises(PunaError, match="lessons are one, smaller, few, alone, pair, wide, all"):
            Scenes(**wrong)
    for wrong in ({"words": -1}, {"words": 1.1}, {"lessons": {"one": 0}}, {"lessons": {}}):
        with pytest.raises(PunaError, match="a lesson of positive weight, and words in 0..1"):
            Scenes(**wrong)
    with pytest.raises(PunaError, match="1 to 6 objects, not 4 to 3"):
        Scene(0, fewest=4, most=3)
    with pytest.raises(PunaError, match="0.05 to 1 of its side long, not 0.5 to 0.4"):
        Scene(0, smallest=0.5)
    with pytest.raises(PunaError, match="at most 0.45 of its side long, not 0.9"):
        Scene(0, largest=0.9)


def test_scenes_say_places_in_words():
    spoken = [Scenes({"few": 1.0}, words=1.0).document(i) for i in range(200)]
    seen = set()
    for scene, *parts in spoken:
        by_name = {_name(spot.concept): spot for spot in scene.objects}
        lines = [(name.strip(), where) for name, where in zip(parts[::2], parts[1::2], strict=True)]
        assert sorted(name for name, _ in lines) == sorted(by_name)
        for name, where in lines:
            x1, y1, x2, y2 = by_name[name].box(scene.side)
            first, second = where.split()
            row, column = ("top", "middle", "bottom").index(first), ("left", "centre", "right").index(second)
            assert abs((y1 + y2) / 2 - (row + 0.5) * 333) <= 175 and abs((x1 + x2) / 2 - (column + 0.5) * 333) <= 175
            seen.add(where)
    assert len(seen) == 9
    boxed = [bool(parse_boxes("".join(Scenes(words=0.5).document(i)[1:]))) for i in range(200)]
    assert 0.4 < sum(boxed) / 200 < 0.6


def test_grounding_asks_at_least_half_of_its_turns():
    source = task("grounding", turns=6)
    counts = {len(source.item(i).messages) // 2 for i in range(60)}
    assert counts == {3, 4, 5, 6}


def test_best_constant_box_is_the_best():
    boxes = [[100, 100, 300, 300]] * 3 + [[120, 110, 300, 310]] + [[700, 700, 900, 900]]
    box, share = best_constant_box(boxes)
    assert share == 4 / 5 and all(iou(box, other) >= 0.5 for other in boxes[:4])
    assert best_constant_box([[0, 0, 500, 500], [500, 500, 999, 999]])[1] == 0.5
    with pytest.raises(PunaError):
        best_constant_box([])


# ---- grades


def test_naming_grade_takes_name_and_rare_synonyms_only(monkeypatch):
    def concept(key, name, *synonyms):
        return nursery.Concept(key, {"en": name}, {"en": synonyms}, "objects", True, nursery.STYLES_TRAIN)

    concepts = [
        concept("1", "hot dog", "frankfurter", "food"),
        concept("2", "pizza", "slice", "food"),
        concept("3", "bread", "slice", "food"),
    ]
    monkeypatch.setattr(nursery, "concepts", lambda: concepts)
    monkeypatch.setattr(naming, "by_id", lambda: {c.id: c for c in concepts})
    naming._owners.cache_clear(), naming.accepted.cache_clear()
    try:
        assert naming.accepted("1", "en") == {"hot dog", "frankfurter"}
        assert naming.accepted("2", "en") == {"pizza", "slice"}
        source, item = task("naming", lang="en"), Item([], "hot dog", {"lang": "en", "concept": "1"})
        for right in ("hot dog", "Hot dog.", "a hot-dog", " THE HOT DOG! ", "frankfurter"):
            assert source.grade(item, right) == 1, right
        for wrong in ("", "hot", "dog", "food", "hot dog and pizza", "it is a hot dog", "pizza"):
            assert source.grade(item, wrong) == 0, wrong
    finally:
        naming._owners.cache_clear(), naming.accepted.cache_clear()


def test_naming_draws_named_concepts_more_often_and_languages_by_weight():
    tested = {c.id for c in nursery.concepts() if c.naming}

    def share(weight):
        source = task("naming", naming_weight=weight)
        return np.mean([source.item(i).meta["concept"] in tested for i in range(300)])

    assert share(20.0) > share(1.0) + 0.2
    source = task("naming", languages={"hi": 3, "th": 1})
    langs = [source.item(i).meta["lang"] for i in range(100)]
    assert set(langs) == {"hi", "th"} and langs.count("hi") > langs.count("th")
    assert {task("naming", lang="vi").item(i, split).meta["lang"] for split in ("train", "test") for i in range(9)} == {
        "vi"
    }
    with pytest.raises(PunaError, match="unknown language 'xx'"):
        task("naming", lang="xx")


def test_naming_speaks_all_languages_and_asks_each_concept_once():
    assert set(naming.QUESTIONS) == set(TALK) == set(nursery.LANGUAGES)
    for lang in nursery.LANGUAGES:
        items = list(task("naming", lang=lang).items("test"))
        assert len(items) >= 40
        assert len({item.meta["concept"] for item in items}) == len(items)
        assert all(item.messages[0]["content"][1]["text"] in naming.QUESTIONS[lang] for item in items)


def test_shuffled_shows_every_item_another_concept():
    source = task("naming")
    items = list(source.items("test"))
    mixed = naming.shuffled(items, seed=2)
    for before, after in zip(items, mixed, strict=True):
        assert after.answer == before.answer and after.messages[-1] == before.messages[-1]
        assert after.pictures[0].concept == after.meta["shown"] != before.meta["concept"]
    assert sorted(m.meta["shown"] for m in mixed) == sorted(i.meta["concept"] for i in items)
    looked = [source.grade(item, item.pictures[0] and _name(item.meta["shown"])) for item in mixed]
    assert np.mean(looked) <= 0.02  # a perfect viewer falls to chance
    with pytest.raises(PunaError):
        naming.shuffled(items[:1])


def _name(concept: str) -> str:
    return pictures.by_id()[concept].names["en"]


def test_addition_shows_its_work_and_is_graded_by_the_last_integer():
    assert worked(37, 48) == "7+8=15, 3+4+1=8: 85"
    assert worked(95, 7) == "5+7=12, 9+0+1=10: 102"
    for a in range(0, 100, 7):
        for b in range(100):
            assert worked(a, b).endswith(f": {a + b}")
    source = task("addition")
    item = source.item(0, "test")
    assert source.grade(item, f"so it is {item.answer}.") == 1
    assert source.grade(item, f"{item.answer} or {int(item.answer) + 1}") == 0
    assert source.grade(item, f"1{item.answer}") == 0
    digits = [(i.meta["a"] < 10, i.meta["b"] < 10) for i in (source.item(k) for k in range(200))]
    assert any(map(any, digits))
    assert all(source.item(k, level=1).meta["a"] >= 10 <= source.item(k, level=1).meta["b"] for k in range(200))


def test_normalise():
    assert normalise("  The  Hot-Dog! ") == "hot dog"
    assert normalise("die Pizza", "de") == "pizza" and normalise("die Pizza", "en") == "die pizza"
    assert normalise("l’ours", "fr") == "ours"
    assert normalise("the") == "the"
    assert normalise("हॉकी।", "hi") == "हॉकी"


def test_most_frequent_share():
    items = [Item([], answer) for answer in ("a cat", "Cat", "dog", "cow")]
    assert most_frequent_share(items) == 0.5
    with pytest.raises(PunaError):
        most_frequent_share([])


# ---- needle


def test_needle_length_depth_and_keys():
    source = make("needle")
    items = list(source.items("test"))
    for item in items:
        text, question = item.messages[0]["content"].split("\n\n")
        assert 0.85 * 400 <= count(item.messages[0]["content"]) <= 400
        assert item.meta["keys"] >= 5
        codes = dict(
            line.removeprefix("The code of the ").split(" is ")
            for line in text.replace(". The code", ".\nThe code").replace("The code", "\nThe code").split("\n")
            if line.startswith("The code of the ")
            for line in [line[: line.index(".")]]
        )
        assert len(codes) == len(set(codes.values())) == item.meta["keys"]
        assert codes[item.meta["key"]] == item.answer and question == needle.QUESTION.format(key=item.meta["key"])
        assert all(text.count(code) == 1 for code in codes.values())
        other = next(code for code in codes.values() if code != item.answer)
        assert source.grade(item, f"It is {item.answer}.") == 1
        assert source.grade(item, other) == source.grade(item, f"{item.answer} or {other}") == 0
        assert source.grade(item, item.answer + "7") == 0
    depths = np.array([item.meta["depth"] for item in items])
    assert depths.min() < 0.15 and depths.max() > 0.85
    assert np.abs(np.sort(depths) - (np.arange(20) + 0.5) / 20).max() < 0.2  # even over the text
    assert source.chance(items) <= 1 / 5


def test_needle_asks_several_codes_of_one_text_in_training():
    source = task("needle", length=400, count=count, turns=4)
    items = [source.item(i, "train") for i in range(12)]
    assert {len(item.messages) // 2 for item in items} == {1, 2, 3, 4}
    for item in items:
        text = item.messages[0]["content"]
        for question, answer in zip(item.messages[::2], item.messages[1::2], strict=True):
            key = question["content"].rsplit("What is the code of the ")[-1].removesuffix("?")
            assert answer["content"].startswith(f"The code of the {key} is ") and answer["content"] in text
        assert sum(count(m["content"]) for m in item.messages[:-1]) <= 400
    assert all(len(item.messages) == 2 for item in source.items("test"))


def test_needle_trains_on_fewer_codes_and_shorter_texts_than_it_tests():
    source = task("needle", length=400, count=count, keys=(5, 8), fewest=1, shortest=0.4)
    items = [source.item(index, "train") for index in range(120)]
    assert {item.meta["keys"] for item in items} == set(range(1, 9))
    assert {item.meta["keys"] for item in source.items("test")} == set(range(5, 9))
    lengths = sorted(item.meta["length"] for item in items)
    assert 160 <= lengths[0] < 200 and 350 < lengths[-1] <= 400 and 230 < lengths[60] < 275, "even on a log scale"
    for wrong in (0, 9):
        with pytest.raises(PunaError, match="fewest must be 1 to 8"):
            task("needle", length=400, count=count, fewest=wrong)


def test_recall_says_every_code_again_in_another_order():
    source, orders, sizes = task("recall", fewest=2, most=4), [], set()
    for index in range(40):
        item = source.item(index)
        listed, question = item.messages[0]["content"].split("\n\n")
        answer = item.messages[1]["content"]
        assert question == needle.QUESTION_ALL and sorted(listed.split(". ")) != [listed]
        said = [f"{part}." for part in answer.removesuffix(".").split(". ")]
        assert sorted(said) == sorted(f"{part}." for part in listed.removesuffix(".").split(". "))
        sizes.add(len(said))
        orders.append(answer == listed)
    assert sizes == {2, 3, 4} and 0 < sum(orders) < 25
    tested = source.item(0, "test")
    assert tested.messages[0]["content"].endswith(needle.QUESTION.format(key=tested.meta["key"]))
    assert source.grade(tested, tested.messages[1]["content"]) == 1
    assert source.grade(tested, tested.messages[0]["content"]) == 0, "all codes are no answer"
    assert 0.25 <= source.chance(source.items("test")) <= 0.5
    with pytest.raises(PunaError, match="1 <= fewest <= most"):
        task("recall", fewest=3, most=2)


def test_needle_asks_for_all_codes_at_once_in_training():
    source = task("needle", length=400, count=count, every=1.0)
    orders = []
    for index in range(12):
        item = source.item(index, "train")
        text, question = item.messages[0]["content"].split("\n\n")
        answer = item.messages[1]["content"]
        sentences = [f"{part}." for part in answer.removesuffix(".").split(". ")]
        assert question == needle.QUESTION_ALL and len(item.messages) == 2
        assert len(set(sentences)) == item.meta["keys"] >= 5 and all(sentence in text for sentence in sentences)
        assert count(item.messages[0]["content"]) + count(answer) <= 400 + 20
        orders.append(sentences == sorted(sentences, key=text.index))
    assert not all(orders), "in the text's order the answer could be copied without looking"
    tested = source.item(0, "test")
    assert tested.messages[0]["content"].endswith(needle.QUESTION.format(key=tested.meta["key"]))


def test_needle_levels_double_the_length():
    item = make("needle").item(0, "test", level=1)
    assert 0.85 * 800 <= count(item.messages[0]["content"]) <= 800


def test_needle_refuses_impossible_settings():
    with pytest.raises(PunaError, match="give a length of at least"):
        task("needle", length=40, count=count)
    with pytest.raises(PunaError, match="at least 5"):
        task("needle", length=400, count=count, keys=(2, 3))


# ---- pre-training documents


def test_caption_documents_interleave_text_and_pictures():
    source = Captions()
    documents = [source.document(i, seed=1) for i in range(200)]
    assert documents == [Captions().document(i, seed=1) for i in range(200)]
    assert documents != [source.document(i, seed=2) for i in range(200)]
    stream = source.documents(seed=1, start=5)
    assert next(stream) == documents[5]
    shapes = set()
    for segments in documents:
        kinds = "".join("t" if isinstance(segment, str) else "p" for segment in segments)
        assert {"t", "p"} == set(kinds) and all(segment for segment in segments if isinstance(segment, str))
        shapes.add(kinds)
        shown = {c for s in segments if not isinstance(s, str) for c in pictures.by_id()[s.concept].names.values()}
        assert any(name in segment for segment in segments if isinstance(segment, str) for name in shown)
    assert {"pt", "tpt", "ptpt", "ptptpt"} <= shapes
    only = Captions(languages={"th": 1})
    assert all(isinstance(segment, (str, EmojiPicture)) for i in range(20) for segment in only.document(i))


@pytest.mark.parametrize("make", [lambda w: task("naming", languages=w), lambda w: Captions(languages=w)])
def test_bad_language_weights_are_errors(make):
    bad = [({"xx": 1}, "unknown language 'xx'"), ({"en": 0}, "above 0"), ({"en": 2, "de": -1}, "negative")]
    for weights, message in bad:
        with pytest.raises(PunaError, match=message):
            make(weights)


def test_facts_by_language_and_kind():
    source = task("facts", languages={"fr": 1}, kinds=["capital"])
    items = [*source.items("test"), *(source.item(i) for i in range(30))]
    assert {(item.meta["lang"], item.meta["kind"]) for item in items} == {("fr", "capital")}
    france = next(item for item in items if item.meta["subject"] == "France")
    assert (
        france.answer == "Paris" and source.grade(france, "paris.") == 1 and source.grade(france, "Paris, France") == 0
    )
    langs = [task("facts").item(i).meta["lang"] for i in range(200)]
    assert 60 < langs.count("en") < 140
    with pytest.raises(PunaError, match="no facts of kind 'king'"):
        task("facts", kinds=["king"])
