import pytest

from asyncbucket.testing.provider.app import go_duration

MILLISECOND = 1_000_000
SECOND = 1_000_000_000


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0s"),
        (1, "1ms"),
        (120 * MILLISECOND, "120ms"),
        (999 * MILLISECOND + 1, "1s"),
        (8640 * MILLISECOND, "8.64s"),
        (59_999 * MILLISECOND, "59.999s"),
        (60 * SECOND, "1m0s"),
        (360 * SECOND, "6m0s"),
        (3661 * SECOND + 500 * MILLISECOND, "1h1m1.5s"),
    ],
)
def test_duration_is_written_in_go_format(nanoseconds: int, text: str) -> None:
    assert go_duration(nanoseconds) == text
