"""Personal data: numbers with marks or check digits go, arithmetic and code stay."""

import pytest

from dsv3.data.private import scrub


@pytest.mark.parametrize(
    ("text", "clean", "kind"),
    [
        ("call +49 30 901820 now", "call <phone> now", "phone"),
        ("call +1 (415) 555-2671.", "call <phone>.", "phone"),
        ("Tel: (212) 555-0123", "Tel: <phone>", "phone"),
        ("fax 212-555-0123", "fax <phone>", "phone"),
        ("联系电话13812345678", "联系电话<phone>", "phone"),
        ("card 4111 1111 1111 1111 ok", "card <card> ok", "card"),
        ("card 378282246310005 ok", "card <card> ok", "card"),
        ("to DE89 3704 0044 0532 0130 00 by May", "to <iban> by May", "iban"),
        ("身份证11010519491231002X。", "身份证<id>。", "id"),
        ("SSN 536-22-1234", "SSN <id>", "id"),
        ("key = AKIAIOSFODNN7EXAMPLE;", "key = <key>;", "key"),
        ("a ghp_" + "a1B2" * 9 + " b", "a <key> b", "key"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\nend", "<key>\nend", "key"),
        ("cut: -----BEGIN PRIVATE KEY-----\nMIIE", "cut: <key>", "key"),
    ],
)
def test_what_may_be_somebodys_own_is_replaced_and_counted(text, clean, kind):
    assert scrub(text) == (clean, {kind: 1})


@pytest.mark.parametrize(
    "text",
    [
        "4111 1111 1111 1112",  # check digit
        "41111111111111115",
        "0.4111111111111111",
        "DE88 3704 0044 0532 0130 00",
        "110105194912310021",
        "000-12-3456",
        "12345678901",
        "1 + 2 = 3 and 13812345678 / 2",
        "range(1000, 2000, 100)",
        "3.14159265358979",
        "2024-05-06 07:08:09",
        "pages 100-200, 300-400",
        "a +2 -3 +4 list",
        "0x4111111111111111",
        "Decimal('+35236450.6')",
        "version 1.2.3.4",
        "十三个字",
        "ASK-learn",
    ],
)
def test_numbers_without_marks_or_with_a_wrong_check_digit_stay(text):
    assert scrub(text) == (text, {})


def test_all_kinds_in_one_text_are_found_and_nothing_between_them_is_touched():
    text = (
        "Ann, +44 20 7946 0958, pays with 5555 5555 5555 4444; Bob, +44 20 7946 0959, with GB82 WEST 1234 5698 7654 32."
    )
    clean = "Ann, <phone>, pays with <card>; Bob, <phone>, with <iban>."
    assert scrub(text) == (clean, {"phone": 2, "card": 1, "iban": 1})
    assert scrub(clean) == (clean, {})
