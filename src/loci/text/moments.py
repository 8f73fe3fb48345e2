"""Moments as the store keeps them: whole microseconds since 1970 in UTC, the offset beside."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

DAY = 86_400_000_000  # microseconds
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_micros(moment: datetime) -> int:
    """Whole microseconds since 1970 in UTC of a moment that has a time zone."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def to_moment(micros: int, offset: int = 0) -> datetime:
    """The moment again, in the zone `offset` minutes east of Greenwich."""
    return (_EPOCH + timedelta(microseconds=micros)).astimezone(timezone(timedelta(minutes=offset)))


def now_micros() -> int:
    """This moment."""
    return to_micros(datetime.now(UTC))
