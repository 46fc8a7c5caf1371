"""Whose files are whose, and for how long, without a server."""

from contextlib import suppress

import pytest

from minigpt4.common.errors import SampleError
from minigpt4.serving.uploads import MIB, Limits, NoRoomError, Uploads

LIMITS = Limits(images=2, image_bytes=MIB)


def sent(uploads, visitor, size=MIB):
    with uploads.room(visitor) as (path, grow):
        grow(size)
        path.write_bytes(b"x")
    return str(path)


@pytest.fixture
def make_uploads(tmp_path):
    return lambda **changes: Uploads(tmp_path, LIMITS, **changes)


def test_a_file_is_its_senders_and_then_of_one_tab(make_uploads):
    uploads = make_uploads()
    path = sent(uploads, "me")
    for visitor, tab in (("you", "a"), ("you", "b")):
        with pytest.raises(SampleError, match="not here"):
            uploads.take(path, visitor, tab)
    assert str(uploads.take(path, "me", "a")) == path == str(uploads.take(path, "me", "a"))
    with pytest.raises(SampleError, match="not here"):
        uploads.take(path, "me", "b")
    assert uploads.may_see(path, "me")
    assert not uploads.may_see(path, "you")


def test_a_tab_that_is_left_takes_its_files_along(make_uploads, tmp_path):
    uploads = make_uploads()
    used, unused, others = sent(uploads, "me", 1), sent(uploads, "me", 1), sent(uploads, "you", 1)
    other_tab = sent(uploads, "me", 1)
    uploads.take(used, "me", "a")
    uploads.take(other_tab, "me", "b")
    uploads.leave("me", "a")
    assert sorted(map(str, tmp_path.iterdir())) == sorted([others, other_tab])
    with pytest.raises(SampleError):
        uploads.take(unused, "me", "b")


def test_files_in_use_keep_their_place_and_old_ones_make_room(make_uploads, tmp_path):
    uploads = make_uploads()
    for _ in range(2):
        sent(uploads, "me")
    with pytest.raises(NoRoomError, match="2 MiB") as error:
        sent(uploads, "me")
    assert error.value.is_own
    for number in range(14):
        sent(uploads, f"visitor {number // 2}")
    with pytest.raises(NoRoomError, match="later") as error:
        sent(uploads, "one more")
    assert not error.value.is_own
    uploads = make_uploads(keep=-1)
    paths = [sent(uploads, "me") for _ in range(5)]
    assert [uploads.may_see(path, "me") for path in paths] == [False, False, False, True, True]


def test_an_upload_that_breaks_off_is_forgotten(make_uploads, tmp_path):
    uploads = make_uploads()
    for _ in range(10):
        with suppress(OSError), uploads.room("me") as (path, grow):
            grow(MIB)
            path.write_bytes(b"half")
            path.rename("")
    assert list(tmp_path.iterdir()) == []
    sent(uploads, "me")
