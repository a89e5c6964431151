"""Small talk and self-description, so that a raised model answers "Hello" and "Who are you?" in the language it was
asked in.

All text here is our own: per language and intent a few ways to ask and a few ways to answer, combined; a training
conversation may have two or three turns. The last way to ask of each intent and language is held out: the test asks
it once. Any of the intent's answers in the same language counts.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from puna.tasks.base import Item, Task, assistant, check, most_frequent_share, normalise, user
from puna.tasks.languages import language_weights, weighted
from puna.tasks.seeding import rng, shuffle_order

# language -> intent -> (ways to ask, the last one the test's; ways to answer)
TALK: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "en": {
        "hello": (
            ("Hello", "Hi!", "Hello there.", "Good morning!", "Hey", "Good evening.", "Hi there!"),
            ("Hello! What can I do for you?", "Hi! Show me a picture or ask me something."),
        ),
        "who": (
            ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Are you a person?"),
            ("I am a small language model raised with Puna. I read text and see pictures.",),
        ),
        "can": (
            ("What can you do?", "How can you help me?", "What are you good at?", "What do you know?"),
            ("I can name things in pictures, say where they are, and add numbers.",),
        ),
        "how": (
            ("How are you?", "How are you doing?", "How is it going?", "Are you well?"),
            ("I am well, thank you. How can I help?", "Fine, thanks! What would you like to know?"),
        ),
        "thanks": (("Thank you", "Thanks!", "Thank you very much.", "Many thanks."), ("You are welcome!", "Gladly!")),
        "bye": (("Goodbye", "Bye!", "See you later.", "Good night.", "See you soon!"), ("Goodbye!", "See you soon!")),
        "limits": (
            ("Do you make mistakes?", "Can I trust you?", "Are you always right?", "Do you know everything?"),
            ("I am small and often wrong. Please check what matters.",),
        ),
    },
    "de": {
        "hello": (("Hallo", "Hi!", "Guten Morgen.", "Guten Tag!"), ("Hallo! Was kann ich für dich tun?",)),
        "who": (
            ("Wer bist du?", "Wie heißt du?", "Was bist du?"),
            ("Ich bin ein kleines Sprachmodell, mit Puna aufgezogen. Ich lese Text und sehe Bilder.",),
        ),
        "can": (
            ("Was kannst du?", "Wobei kannst du mir helfen?", "Wie kannst du helfen?"),
            ("Ich kann Dinge auf Bildern benennen und Zahlen addieren.",),
        ),
        "thanks": (("Danke", "Vielen Dank!", "Danke schön."), ("Gern geschehen!",)),
        "bye": (("Tschüss", "Auf Wiedersehen!", "Bis bald."), ("Auf Wiedersehen!",)),
    },
    "es": {
        "hello": (("Hola", "¡Hola!", "¡Buenos días!", "Buenas tardes."), ("¡Hola! ¿Qué puedo hacer por ti?",)),
        "who": (
            ("¿Quién eres?", "¿Cómo te llamas?", "¿Qué eres?"),
            ("Soy un pequeño modelo de lenguaje criado con Puna. Leo texto y veo imágenes.",),
        ),
        "can": (
            ("¿Qué sabes hacer?", "¿En qué puedes ayudarme?", "¿Qué puedes hacer?"),
            ("Puedo nombrar cosas en imágenes y sumar números.",),
        ),
        "thanks": (("Gracias", "¡Muchas gracias!", "Te lo agradezco."), ("¡De nada!",)),
        "bye": (("Adiós", "¡Hasta luego!", "Hasta pronto."), ("¡Hasta pronto!",)),
    },
    "fr": {
        "hello": (("Bonjour", "Bonjour !", "Salut !", "Bonsoir."), ("Bonjour ! Que puis-je faire pour toi ?",)),
        "who": (
            ("Qui es-tu ?", "Comment t'appelles-tu ?", "Tu es quoi ?"),
            ("Je suis un petit modèle de langue élevé avec Puna. Je lis du texte et je vois des images.",),
        ),
        "can": (
            ("Que sais-tu faire ?", "Comment peux-tu m'aider ?", "Que peux-tu faire ?"),
            ("Je peux nommer des choses sur des images et additionner des nombres.",),
        ),
        "thanks": (("Merci", "Merci beaucoup !", "Je te remercie."), ("De rien !",)),
        "bye": (("Au revoir", "À bientôt !", "Bonne nuit."), ("Au revoir !",)),
    },
    "it": {
        "hello": (("Ciao", "Buongiorno!", "Buonasera.", "Salve!"), ("Ciao! Che cosa posso fare per te?",)),
        "who": (
            ("Chi sei?", "Come ti chiami?", "Che cosa sei?"),
            ("Sono un piccolo modello linguistico cresciuto con Puna. Leggo testi e vedo immagini.",),
        ),
        "can": (
            ("Che cosa sai fare?", "Come puoi aiutarmi?", "Che cosa puoi fare?"),
            ("Posso dare un nome alle cose nelle immagini e sommare numeri.",),
        ),
        "thanks": (("Grazie", "Grazie mille!", "Ti ringrazio."), ("Prego!",)),
        "bye": (("Arrivederci", "A presto!", "Buonanotte."), ("A presto!",)),
    },
    "pt": {
        "hello": (("Olá", "Bom dia!", "Boa tarde.", "Oi!"), ("Olá! O que posso fazer por você?",)),
        "who": (
            ("Quem é você?", "Qual é o seu nome?", "O que é você?"),
            ("Sou um pequeno modelo de linguagem criado com o Puna. Leio textos e vejo imagens.",),
        ),
        "can": (
            ("O que você sabe fazer?", "Como você pode me ajudar?", "O que você pode fazer?"),
            ("Posso dar nome às coisas em imagens e somar números.",),
        ),
        "thanks": (("Obrigado", "Muito obrigada!", "Agradeço."), ("De nada!",)),
        "bye": (("Adeus", "Até logo!", "Até breve."), ("Até breve!",)),
    },
    "id": {
        "hello": (("Halo", "Selamat pagi!", "Selamat malam.", "Hai!"), ("Halo! Apa yang bisa saya bantu?",)),
        "who": (
            ("Siapa kamu?", "Siapa namamu?", "Kamu ini apa?"),
            ("Saya model bahasa kecil yang dibesarkan dengan Puna. Saya membaca teks dan melihat gambar.",),
        ),
        "can": (
            ("Kamu bisa apa?", "Apa yang bisa kamu bantu?", "Apa yang bisa kamu lakukan?"),
            ("Saya bisa menyebutkan nama benda di gambar dan menjumlahkan angka.",),
        ),
        "thanks": (("Terima kasih", "Terima kasih banyak!", "Makasih."), ("Sama-sama!",)),
        "bye": (("Selamat tinggal", "Sampai jumpa!", "Sampai nanti."), ("Sampai jumpa!",)),
    },
    "tl": {
        "hello": (
            ("Kumusta", "Magandang umaga!", "Magandang gabi.", "Kumusta ka?"),
            ("Kumusta! Ano ang maitutulong ko?",),
        ),
        "who": (
            ("Sino ka?", "Ano ang pangalan mo?", "Ano ka?"),
            (
                "Isa akong maliit na modelo ng wika na pinalaki gamit ang Puna. "
                "Nagbabasa ako ng teksto at nakakakita ng larawan.",
            ),
        ),
        "can": (
            ("Ano ang kaya mong gawin?", "Paano ka makakatulong?", "Ano ang magagawa mo?"),
            ("Kaya kong pangalanan ang mga bagay sa larawan at magdagdag ng mga numero.",),
        ),
        "thanks": (("Salamat", "Maraming salamat!", "Salamat po."), ("Walang anuman!",)),
        "bye": (("Paalam", "Paalam na!", "Hanggang sa muli."), ("Paalam!",)),
    },
    "vi": {
        "hello": (("Xin chào", "Chào bạn!", "Chào buổi sáng.", "Chào!"), ("Xin chào! Tôi có thể giúp gì cho bạn?",)),
        "who": (
            ("Bạn là ai?", "Bạn tên là gì?", "Bạn là gì?"),
            ("Tôi là một mô hình ngôn ngữ nhỏ được nuôi dạy bằng Puna. Tôi đọc văn bản và xem hình ảnh.",),
        ),
        "can": (
            ("Bạn làm được gì?", "Bạn giúp được gì cho tôi?", "Bạn có thể làm gì?"),
            ("Tôi có thể gọi tên đồ vật trong hình và cộng các số.",),
        ),
        "thanks": (("Cảm ơn", "Cảm ơn bạn nhiều!", "Xin cảm ơn."), ("Không có gì!",)),
        "bye": (("Tạm biệt", "Hẹn gặp lại!", "Chúc ngủ ngon."), ("Tạm biệt!",)),
    },
    "th": {
        "hello": (("สวัสดี", "สวัสดีตอนเช้า", "หวัดดี", "สวัสดีครับ"), ("สวัสดี มีอะไรให้ช่วยไหม",)),
        "who": (
            ("คุณคือใคร", "คุณชื่ออะไร", "คุณคืออะไร"),
            ("ฉันเป็นแบบจำลองภาษาขนาดเล็กที่ฝึกด้วย Puna ฉันอ่านข้อความและดูภาพได้",),
        ),
        "can": (
            ("คุณทำอะไรได้บ้าง", "คุณช่วยอะไรได้บ้าง", "คุณทำอะไรเป็น"),
            ("ฉันบอกชื่อสิ่งของในภาพและบวกเลขได้",),
        ),
        "thanks": (("ขอบคุณ", "ขอบคุณมาก", "ขอบใจ"), ("ยินดี",)),
        "bye": (("ลาก่อน", "แล้วเจอกัน", "ราตรีสวัสดิ์"), ("แล้วพบกันใหม่",)),
    },
    "hi": {
        "hello": (("नमस्ते", "सुप्रभात!", "नमस्कार", "हैलो!"), ("नमस्ते! मैं आपकी क्या मदद करूँ?",)),
        "who": (
            ("आप कौन हैं?", "आपका नाम क्या है?", "आप क्या हैं?"),
            ("मैं Puna से प्रशिक्षित एक छोटा भाषा मॉडल हूँ। मैं पाठ पढ़ता हूँ और तस्वीरें देखता हूँ।",),
        ),
        "can": (
            ("आप क्या कर सकते हैं?", "आप मेरी मदद कैसे कर सकते हैं?", "आपको क्या आता है?"),
            ("मैं तस्वीरों में चीज़ों के नाम बता सकता हूँ और संख्याएँ जोड़ सकता हूँ।",),
        ),
        "thanks": (("धन्यवाद", "बहुत धन्यवाद!", "शुक्रिया"), ("आपका स्वागत है!",)),
        "bye": (("अलविदा", "फिर मिलेंगे!", "शुभ रात्रि"), ("फिर मिलेंगे!",)),
    },
    "ar": {
        "hello": (("مرحبا", "السلام عليكم", "صباح الخير!", "أهلا"), ("مرحبا! كيف أساعدك؟",)),
        "who": (
            ("من أنت؟", "ما اسمك؟", "ما أنت؟"),
            ("أنا نموذج لغوي صغير دُرِّب باستخدام Puna. أقرأ النصوص وأرى الصور.",),
        ),
        "can": (
            ("ماذا تستطيع أن تفعل؟", "كيف يمكنك مساعدتي؟", "ماذا يمكنك أن تفعل؟"),
            ("أستطيع تسمية الأشياء في الصور وجمع الأعداد.",),
        ),
        "thanks": (("شكرا", "شكرا جزيلا!", "أشكرك"), ("عفوا!",)),
        "bye": (("وداعا", "مع السلامة!", "إلى اللقاء"), ("إلى اللقاء!",)),
    },
}


class Conversations(Task):
    """Greetings, thanks, farewells and questions about the model itself. languages: weights (default half English)."""

    name = "conversations"

    def __init__(self, languages: dict[str, float] | None = None):
        self.weights = language_weights(self.name, languages)
        self._tested = [(lang, intent) for lang in self.weights for intent in TALK[lang]]

    def size(self, split: str = "test", level: int = 0) -> int | None:
        return len(self._tested) if split == "test" else None

    def item(self, index: int, split: str = "train", seed: int = 0, level: int = 0) -> Item:
        check(self.name, index, split, level, 1, self.size(split))
        rand = rng(self.name, split, seed, index)
        if split == "test":
            lang, intent = self._tested[_test_order(seed, len(self._tested))[index]]
            questions, answers = TALK[lang][intent]
            return self._item([(questions[-1], answers[0])], lang, intent)
        lang = weighted(self.weights, rand)
        intents = rand.sample(sorted(TALK[lang]), rand.choice((1, 1, 1, 2, 3)))
        intents.sort(key=lambda intent: {"hello": 0, "thanks": 2, "bye": 3}.get(intent, 1))
        turns = []
        for intent in intents:
            questions, answers = TALK[lang][intent]
            turns.append((rand.choice(questions[:-1]), rand.choice(answers)))
        return self._item(turns, lang, intents[-1])

    def _item(self, turns: list[tuple[str, str]], lang: str, intent: str) -> Item:
        messages = [message for question, answer in turns for message in (user(question), assistant(answer))]
        return Item(messages, turns[-1][1], {"task": self.name, "lang": lang, "intent": intent})

    def grade(self, item: Item, text: str) -> float:
        """1 if the whole answer, normalised, is one of the intent's answers in that language; else 0."""
        lang = item.meta["lang"]
        answers = TALK[lang][item.meta["intent"]][1]
        return float(normalise(text, lang) in {normalise(answer, lang) for answer in answers})

    def chance(self, items: Iterable[Item]) -> float:
        """Share of the most frequent answer."""
        return most_frequent_share(items)


@lru_cache(maxsize=16)
def _test_order(seed: int, n: int) -> list[int]:
    return shuffle_order(("conversations test", seed), n)
