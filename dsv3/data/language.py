"""What a word is, and which language a text is in: by its script, then by its function words.

    script      letters that are not Latin are counted by Unicode block. Kana makes Han Japanese; letters of their own part
                Ukrainian and Bulgarian from Russian, Persian and Urdu from Arabic
    words       of a text in Latin letters: each language's most frequent short words (articles, prepositions, pronouns,
                auxiliaries), a word that k languages share counting 1/k for each

The answer carries a confidence: the language's share of the letters (scripts), or of the function words found (Latin). A text
with few function words, under 6% of its words, is "und": tables, lists of names, code.

No model and nothing to download; fastText's models know more languages and short texts better (data/steps.py takes one).
Words are letters and digits, lower case; scripts without spaces count a character as a word.
Source: function words are a standard feature of language identification (Ingle 1976; Grefenstette 1995); the lists are ours.
Does not: part Simplified from Traditional Chinese, or find two languages in one text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

UNKNOWN = "und"
_NO_SPACES = "\u0e00-\u0e7f\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_NO_SPACES}]|[^\W_{_NO_SPACES}]+")
_LOOKED_AT = 20_000
"""Characters of a text that decide; more change nothing and cost time."""
_LEAST_COVERAGE = 0.06
_LETTER = 0.25
"""Weight of a word of one consonant (Czech has some): it may be a unit, a variable or what is left of a contraction."""
_LATIN = "a-zA-Z\u00aa-\u024f\u1e00-\u1eff"

_SCRIPTS: Mapping[str, re.Pattern[str]] = MappingProxyType(
    {
        name: re.compile(f"[{block}]")
        for name, block in {
            "latin": _LATIN,
            "zh": "\u3400-\u9fff\uf900-\ufaff",
            "ja": "\u3040-\u30ff",
            "ko": "\u1100-\u11ff\uac00-\ud7af",
            "ru": "\u0400-\u04ff",
            "el": "\u0370-\u03ff\u1f00-\u1fff",
            "ar": "\u0600-\u06ff",
            "he": "\u0590-\u05ff",
            "hi": "\u0900-\u097f",
            "bn": "\u0980-\u09ff",
            "ta": "\u0b80-\u0bff",
            "th": "\u0e00-\u0e7f",
            "ka": "\u10a0-\u10ff",
            "hy": "\u0530-\u058f",
        }.items()
    }
)
_OWN_LETTERS = (("ru", "uk", "іїєґ"), ("ar", "ur", "ٹڈڑےں"), ("ar", "fa", "پچژگ"))

_FUNCTION_WORDS = {
    "en": "the of and to in a is that was for it with as his on be at by had not are but from or have an they which "
    "you were her all she there would their we him been has when who will no more if out so this what my",
    "de": "der die und in den von zu das mit sich des auf für ist im dem nicht ein eine als auch es an werden aus er "
    "hat dass sie nach wird bei einer um am sind noch wie einem über einen so zum war haben nur oder aber vor zur",
    "fr": "de la le et les des en un du une que est pour qui dans a par plus pas au sur ne se ce il sont avec mais ou "
    "son elle nous vous cette été être leur ses aux comme fait tout je on si était peut même",
    "es": "de la que el en y a los del se las por un para con no una su al es lo como más pero sus le ya o fue este ha "
    "sí porque esta son entre cuando muy sin sobre ser también me hasta hay donde quien desde todo",
    "it": "di e che la il un a per è in una sono mi si ho non ma lo ha le con da del della nel dei alla più anche come "
    "gli al delle questo se io era dal sulla essere suo ai cui quando questa stato sua",
    "pt": "de a o que e do da em um para é com não uma os no se na por mais as dos como mas foi ao ele das tem à seu "
    "sua ou ser quando muito há nos já está eu também só pelo pela até isso são você",
    "nl": "de van een het en in is dat op te zijn met voor niet aan er om ook als dan maar bij of uit nog wordt door "
    "naar heeft hij ze we kan tot werd deze dit wat hebben was zich geen over",
    "sv": "och i att det som en på är av för med den till inte har de om ett men var jag sig från vi så kan när han "
    "man ska eller hade vid nu sin mot också under efter skulle",
    "da": "og i at det en den til er som på de med for af ikke der et har men om var jeg han sig kan fra vi så ved "
    "hun blev eller havde skal over også efter nu denne meget",
    "no": "og i det er på en som til av for at med ikke den har de et om men var jeg seg fra vi så kan han ved hun ble "
    "eller hadde skal over også etter nå denne mye være",
    "fi": "ja on ei se että hän oli mutta ovat kun niin myös joka sekä tai kuin jos ole ollut mukaan siitä sen nyt vain "
    "jo minä sinä mitä tämä voi hänen olla jotka",
    "pl": "i w na z się nie do to że jest o jak za od po co ale przez dla ma czy tym który są jego już było tylko może "
    "tak być ich by oraz jej przy również",
    "cs": "a v se na je že s z do to o i k ve pro jsem za by ale po si jako od jeho byl jsou co podle však tak které "
    "který nebo není při už její může být",
    "ro": "și de în a la o cu pe nu că este din un pentru mai sunt se care fi ce au ca dar prin sau după lui era această "
    "fost ne te sa dacă pentru când",
    "hu": "a az és hogy nem is egy van meg csak de ha volt mint már még vagy ki azt el ez sem kell lehet ezt aki nagyon "
    "után majd ami így volna",
    "tr": "ve bir bu da de için ile çok olarak ne daha gibi var o en kadar olan sonra ama ya her mi değil ki ben olduğu "
    "göre bunu ise veya tarafından",
    "id": "yang dan di dari untuk dengan pada ini tidak dalam itu adalah akan ke oleh sebagai juga atau dapat telah ada "
    "bahwa mereka saya karena lebih bisa sudah kita para",
    "vi": "của và là các có được trong cho không người một những với đã này khi đến về như từ ra tại cũng nhiều vào trên "
    "theo sẽ năm phải rằng bị sau",
    "ca": "de la i el que a en els les del per un amb és una no al va se més com però són aquest seva dels són als "
    "aquesta ha també on seu entre molt fins hi",
}
_TABLE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        word: tuple(language for language, listed in _FUNCTION_WORDS.items() if word in listed.split())
        for word in {word for listed in _FUNCTION_WORDS.values() for word in listed.split()}
    }
)
LANGUAGES = (
    *_FUNCTION_WORDS,
    "zh",
    "ja",
    "ko",
    "ru",
    "uk",
    "bg",
    "el",
    "ar",
    "fa",
    "ur",
    "he",
    "hi",
    "bn",
    "ta",
    "th",
    "ka",
    "hy",
)
"""What `identify` can answer, by ISO 639-1, besides UNKNOWN."""


def words(text: str) -> list[str]:
    """Words of a text in order, lower case, without marks; of scripts without spaces each character."""
    return _WORD.findall(text.lower())


def identify(text: str) -> tuple[str, float]:
    """(language, confidence from 0 to 1); (UNKNOWN, 0) of a text without letters or with few function words."""
    text = text[:_LOOKED_AT]
    if not text.isascii():
        language, share = _by_script(text)
        if language != "latin":
            return language, share
    return _by_words(text)


def _by_script(text: str) -> tuple[str, float]:
    counts: dict[str, float] = {name: len(pattern.findall(text)) for name, pattern in _SCRIPTS.items()}
    letters = sum(counts.values())
    if not letters:
        return UNKNOWN, 0.0
    # A Han character is a word, a Latin letter a fifth of one: a Chinese text that names products stays Chinese.
    counts["latin"] /= 5
    if counts["ja"] and counts["ja"] * 10 > counts["zh"]:
        counts["ja"] += counts.pop("zh")
    best = max(counts, key=lambda name: counts[name])
    share = counts[best] / sum(counts.values())
    for script, language, own in _OWN_LETTERS:
        if best == script and sum(map(text.lower().count, own)) * 100 > counts[best]:
            return language, share
    if best == "ru" and text.count("ъ") * 100 > counts["ru"] and "ы" not in text:
        return "bg", share
    return best, share


def _by_words(text: str) -> tuple[str, float]:
    found = Counter(words(text))
    total = sum(found.values())
    scores: dict[str, float] = {}
    for word, count in found.items():
        languages = _TABLE.get(word, ())
        for language in languages:
            weight = _LETTER if word in "bcdfghjklmnpqrstvwxz" else 1.0
            scores[language] = scores.get(language, 0.0) + weight * count / len(languages)
    if not scores:
        return UNKNOWN, 0.0
    best = max(scores, key=lambda language: scores[language])
    if scores[best] < _LEAST_COVERAGE * total:
        return UNKNOWN, 0.0
    return best, scores[best] / sum(scores.values())
