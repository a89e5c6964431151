"""What the tests share: two processes of one thread, and a real, tiny processor, trained in a fraction of a second."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

SENTENCES = (
    "The quick brown fox jumps over the lazy dog. She sells sea shells by the sea shore, doesn't she?",
    "Im Anfang war das Wort, und am Ende der Zeile steht ein Punkt. Über sieben Brücken musst du gehn.",
    "El perro de san Roque no tiene rabo; la niña come una manzana roja en el jardín.",
    "Le soleil se lève à l'est et se couche à l'ouest, où l'été est très chaud.",
    "O rato roeu a roupa do rei de Roma, e a rainha não gostou.",
    "Trentatré trentini entrarono a Trento, tutti e trentatré trotterellando.",
    "Kucing itu tidur di atas meja, dan burung terbang tinggi di langit biru.",
    "Ang aso ay tumatakbo sa parke at ang bata ay kumakain ng mangga.",
    "Con mèo ngủ trên ghế, còn con chó chạy ngoài vườn.",
    "बिल्ली मेज़ पर सो रही है और बच्चा पानी पी रहा है।",
    "القطة تنام على الكرسي والولد يشرب الماء.",
    "แมวนอนอยู่บนโต๊ะ และเด็กกินข้าวกับปลา",
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(i, add(i, 1234567))\n",
    "12 + 34 = 46\n99 + 1 = 100\nWhere is the cat? In the picture there is a red apple and a small house.",
)


def pytest_xdist_auto_num_workers(config):
    """`-n auto`: two processes, but one for tests/dist, whose tests are up to four processes each."""
    return 0 if any("dist" in Path(arg).parts for arg in config.args) else 2


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """On a busy machine two threads stall each other, and tiny matrices gain nothing."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_processor():
    """A 600-token tokenizer over a dozen languages and tiles of 16 pixels, 4 tokens each."""
    from puna.processor import ImageProcessor, Processor, Tokenizer

    return Processor(Tokenizer.train(SENTENCES, 600), ImageProcessor(tile=16, patch=4, max_tiles=4))
