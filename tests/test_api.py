"""The public names are these, and each is there."""

import lorafit

NAMES = """METHODS Chat Config Example Host Job LorafitError Message Method Plan Route Run Tokens encode load open_session prepare
read"""


def test_all():
    assert lorafit.__all__ == sorted(NAMES.split())
    for name in lorafit.__all__:
        assert getattr(lorafit, name).__doc__, name
