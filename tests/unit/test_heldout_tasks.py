"""What is tested is never trained on: held-out pairs of numbers, the held-out style, scenes, texts, phrasings."""

from puna import nursery
from puna.tasks import Captions, EmojiPicture, addition, backgrounds, needle, pictures, task
from puna.tasks.base import normalise
from puna.tasks.conversations import TALK
from puna.tasks.facts import templates


def test_ten_percent_of_ordered_pairs_are_held_out_with_their_swap():
    held_out = addition.held_out()
    assert len(held_out) == 810  # of 90 * 90
    assert all((b, a) in held_out for a, b in held_out)
    assert all(10 <= a <= 99 and 10 <= b <= 99 for a, b in held_out)
    assert {a // 10 for a, _ in held_out} == {b % 10 or 10 for _, b in held_out} - {10} == set(range(1, 10))


def test_held_out_pairs_never_train_and_are_all_tested():
    source = task("addition")
    trained = {
        (i.meta["a"], i.meta["b"]) for level in (0, 1) for i in (source.item(k, level=level) for k in range(3000))
    }
    held_out = addition.held_out()
    assert len(trained) > 3000
    assert not trained & held_out
    for seed in (0, 1):
        tested = [(i.meta["a"], i.meta["b"]) for i in source.items("test", seed)]
        assert len(tested) == len(held_out) and set(tested) == held_out
    assert tested != [(i.meta["a"], i.meta["b"]) for i in source.items("test", 0)]  # the seed shuffles


def test_held_out_style_is_tested_and_never_trained():
    naming, grounding, captions = task("naming"), task("grounding"), Captions()
    styles = {naming.item(i).meta["style"] for i in range(400)}
    styles |= {s.style for i in range(400) for s in captions.document(i) if isinstance(s, EmojiPicture)}
    styles |= {spot.style for i in range(60) for spot in grounding.item(i).pictures[0].objects}
    assert styles == set(nursery.STYLES_TRAIN)  # all of them, and no other
    assert nursery.STYLE_HELD_OUT not in styles
    tested = [item.pictures[0] for item in naming.items("test")]
    assert {picture.style for picture in tested} == {nursery.STYLE_HELD_OUT}
    assert {picture.seed for picture in tested} == {None}  # plain, on white
    assert len(tested) >= 150
    assert all(naming.item(i).pictures[0].seed is not None for i in range(50))


def test_styles_a_concept_is_trained_in_exclude_the_held_out_one():
    assert all(
        nursery.STYLE_HELD_OUT not in pictures.styles(c.id) and pictures.styles(c.id) for c in nursery.concepts()
    )


def test_test_scenes_use_backgrounds_never_trained_on():
    source = task("grounding", tests=60)
    trained = {source.item(i).meta["background"] for i in range(120)}
    tested = {item.meta["background"] for item in source.items("test")}
    assert trained == set(backgrounds.TRAIN) and tested == set(backgrounds.TEST)
    assert not trained & tested
    one, other = pictures.Scene(7, "train"), pictures.Scene(7, "test")
    assert one.objects != other.objects  # the same seed is another scene in the other split


def test_needles_are_tested_in_held_out_text():
    train, test = ({s for d in needle.sentences("en", split) for s in d} for split in ("train", "test"))
    source = task("needle", length=300, count=lambda text: len(text) // 4, tests=5)
    fresh = 0
    for item in source.items("test"):
        text = item.messages[0]["content"]
        fresh += sum(sentence in text for sentence in test - train if len(sentence) > 40)
    assert fresh > 5
    texts = nursery.texts("en", "val")
    assert not set(texts) & set(nursery.texts("en", "train"))
    train_item = source.item(0, "train")
    assert any(sentence in train_item.messages[0]["content"] for sentence in train if len(sentence) > 40)


def test_facts_are_tested_in_phrasings_never_trained():
    source = task("facts")
    tested = list(source.items("test"))
    assert len({(i.meta["kind"], i.meta["subject"], i.meta["lang"]) for i in tested}) == len(tested)
    for item in [*tested[:50], *(source.item(i) for i in range(200))]:
        kind, subject, lang = (item.meta[key] for key in ("kind", "subject", "lang"))
        filled = [template.replace("{subject}", subject) for template in templates(kind, lang)]
        question = item.messages[0]["content"]
        assert question == filled[-1] if item in tested[:50] else question in filled[:-1]
        assert len(set(filled)) == len(filled) >= 3


def test_conversations_hold_out_a_phrasing_of_each_intent():
    source = task("conversations")
    held_out = {item.messages[0]["content"] for item in source.items("test")}
    assert held_out == {questions[-1] for talk in TALK.values() for questions, _ in talk.values()}
    trained = {m["content"] for i in range(1500) for m in source.item(i).messages if m["role"] == "user"}
    assert len(trained) > 100 and not {bare(text) for text in trained} & {bare(text) for text in held_out}


def bare(text: str) -> str:
    return normalise(text, "none")
