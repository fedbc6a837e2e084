"""`dsv3 serve`: the file of API keys."""

import pytest

from dsv3.cli.serving import _keys


def write(path, text, mode=0o600):
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return path


def test_a_keys_file_is_read_with_its_limits(tmp_path, monkeypatch):
    monkeypatch.setenv("DSV3_API_KEY", "from-the-environment")
    text = "# who may use it\nann sk-ann-secret\nbob sk-bob#1-secret 2 4000  # with limits\neve sk-eve-secret - 10\n\n"
    found = _keys(write(tmp_path / "keys", text))
    assert [(k.name, k.secret, k.max_concurrent, k.tokens_per_minute) for k in found] == [
        ("env0", "from-the-environment", None, None),
        ("ann", "sk-ann-secret", None, None),
        ("bob", "sk-bob#1-secret", 2, 4000),  # a # inside a word is part of it
        ("eve", "sk-eve-secret", None, 10),
    ]


@pytest.mark.parametrize(
    ("text", "mode", "said"),
    [
        ("ann sk-ann-secret", 0o644, "chmod 600"),
        ("ann", 0o600, "line 1: write NAME SECRET"),
        ("\nann sk-ann-secret many", 0o600, "line 2: write NAME SECRET"),
        ("# nobody", 0o600, "holds no key"),
        ("ann sk-ann-secret 0", 0o600, "max_concurrent"),
    ],
)
def test_a_keys_file_that_is_wrong_is_refused_without_telling_a_secret(tmp_path, monkeypatch, text, mode, said):
    monkeypatch.delenv("DSV3_API_KEY", raising=False)
    with pytest.raises(ValueError, match=said) as refused:
        _keys(write(tmp_path / "keys", text, mode))
    assert "sk-ann" not in str(refused.value)
