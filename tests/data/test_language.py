"""Language identification: one sentence a language, real text at hand, and what is no language at all."""

import json
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data.corpus import PYTHON_ENGLISH, read_documents
from dsv3.data.language import LANGUAGES, UNKNOWN, identify, words

DATA = next((p / "shared/data" for p in Path(__file__).parents if (p / "shared/data").exists()), Path("none"))

SENTENCES = {
    "en": "All human beings are born free and equal in dignity and rights, and they should act towards one another.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren und sollen einander mit dem Geist begegnen.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits, et ils sont doués de raison.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, como están dotados de razón.",
    "it": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti, e sono dotati di ragione.",
    "pt": "Todos os seres humanos nascem livres e iguais em dignidade e em direitos e não são dotados de outra razão.",
    "nl": "Alle mensen worden vrij en gelijk in waardigheid en rechten geboren, en zij zijn begiftigd met verstand.",
    "sv": "Alla människor är födda fria och lika i värde och rättigheter, och de har fått förnuft och samvete.",
    "pl": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw, i nie są sobie obcy.",
    "tr": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar ve bu haklar için bir arada yaşarlar.",
    "vi": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền của mình trong cuộc sống.",
    "id": "Semua orang dilahirkan merdeka dan dengan hak yang sama, dan mereka tidak boleh dibedakan oleh siapa pun.",
    "zh": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心。",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "ru": "Все люди рождаются свободными и равными в своём достоинстве и правах, были бы они добры.",
    "uk": "Всі люди народжуються вільними і рівними у своїй гідності та правах.",
    "bg": "Всички хора се раждат свободни и равни по достойнство и права, надарени с разум и съвест, един към друг, защото така е.",
    "el": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "ar": "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق.",
    "fa": "تمام افراد بشر آزاد به دنیا می‌آیند و از لحاظ حیثیت و حقوق با هم برابرند، گروهی پیش از همه.",
    "he": "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
    "hi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
    "th": "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
}


@pytest.mark.parametrize("language", SENTENCES)
def test_a_sentence_of_each_language(language: str) -> None:
    found, confidence = identify(SENTENCES[language])
    assert found == language
    assert 0.3 < confidence <= 1
    assert language in LANGUAGES


def test_a_chinese_text_that_names_products_stays_chinese() -> None:
    assert identify("我们用 PyTorch 和 CUDA 训练 DeepSeek-V3 模型，效果很好。")[0] == "zh"
    assert identify("The word 道 (dào) means way, and it is one of the oldest words of the language.")[0] == "en"


@pytest.mark.parametrize("text", ["", "12 + 30 = 42", "x1 y2 z3 qqq", "Müller Schmidt Paris Tokyo 1999", "🙂🙂"])
def test_a_text_without_words_of_a_language_is_unknown(text: str) -> None:
    assert identify(text) == (UNKNOWN, 0.0)


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_any_text_has_an_answer(text: str) -> None:
    language, confidence = identify(text)
    assert language in (*LANGUAGES, UNKNOWN)
    assert 0 <= confidence <= 1
    assert " ".join(words(text)) == " ".join(words(text.lower()))


def test_real_english_is_found() -> None:
    topics = islice(read_documents([PYTHON_ENGLISH]), 80)
    documents = [d.text for d in topics if len(d.text) > 300]
    assert sum(identify(text)[0] == "en" for text in documents) > 0.97 * len(documents)


@pytest.mark.skipif(not DATA.exists(), reason="the shared texts are not here")
def test_real_texts_at_hand_are_found() -> None:
    lines = (DATA / "text/chinese-classics.jsonl").read_text().splitlines()[::50]
    assert all(identify(json.loads(line)["text"])[0] == "zh" for line in lines)
    prose = [p for p in (DATA / "text/wikitext2-valid.txt").read_text().split("\n") if len(p) > 200]
    assert sum(identify(p)[0] == "en" for p in prose) > 0.99 * len(prose)
